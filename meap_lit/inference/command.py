"""`python -m meap_lit generate`: continue prompts with a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meap_lit.errors import UserError
from meap_lit.inference.generation import Sampling
from meap_lit.inference.language_model import Device, Dtype, LanguageModel
from meap_lit.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Generate:
    """Continue prompts with a checkpoint. The text of a single prompt is printed as it grows.

    Args:
        checkpoint: A Hugging Face folder, a .ckpt file, or the folder of a run.
        prompt: One prompt or several.
        prompt_file: A text file that is one more prompt, up to a newline at its end.
        chat: Put each prompt as a user's message, by the chat template.
        system: What the system says before each message; with `chat`.
        template: Chat template as for `prepare chat`; the tokenizer's own if not given; with `chat`.
        tokenizer: Folder of the tokenizer; the checkpoint's own if not given.
        max_new_tokens: Most tokens to add to a prompt; if not given, 128 or what the context leaves, if that is less.
        temperature: Divides the logits before a token is drawn; 0 takes the most likely one.
        top_k: Draw among this many most likely tokens only; 0 and -1 set no limit.
        top_p: Draw among the fewest most likely tokens that together reach this probability; 1 sets no limit.
        seed: Seed of the draws.
        batch_size: Prompts continued at once.
        dtype: Dtype of the weights; if not given, bfloat16 on a GPU, and on a CPU the checkpoint's own.
        device: Where to compute; auto takes a GPU if there is one.
        verify: Hash the checkpoint of a run and compare it with its checksums; false compares sizes only.
    """

    checkpoint: str
    prompt: list[str] | None = None
    prompt_file: str | None = None
    chat: bool = False
    system: str | None = None
    template: str = "tokenizer"
    tokenizer: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    batch_size: int = 8
    dtype: Dtype | None = None
    device: Device = "auto"
    verify: bool = True

    def run(self) -> None:
        """Print the continuations.

        Raises:
            UserError: If there is no prompt, one is too long, or the checkpoint or its tokenizer will not do.
        """
        texts = self._texts()
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.seed)
        model = LanguageModel(self.checkpoint, self.tokenizer, self.dtype, self.device, self.verify)
        stop_token_ids: tuple[int, ...] = ()
        if self.chat:
            template = model.chat_template(self.template)
            stop_token_ids = template.stop_token_ids
            prompts = [template.encode_prompt(self._messages(text)) for text in texts]
        else:
            prompts = [model.encode(text) for text in texts]
        room = model.config.max_seq_len - max(map(len, prompts))
        printer = _Printer(model.tokenizer, prompts)
        model.generate(
            prompts,
            max_new_tokens=max(1, min(128, room)) if self.max_new_tokens is None else self.max_new_tokens,
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            batch_size=self.batch_size,
            on_token=printer.on_token,
        )
        printer.close()

    def _texts(self) -> list[str]:
        texts = list(self.prompt or [])
        if self.prompt_file is not None:
            try:
                texts.append(Path(self.prompt_file).read_text(encoding="utf-8").removesuffix("\n"))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read prompt_file {self.prompt_file}: {error}") from error
        if not texts:
            raise UserError("no prompt; give one with --prompt or --prompt_file")
        for text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"prompt {text!r} is not valid UTF-8; write it to a file in UTF-8 for --prompt_file")
        if not self.chat and (self.system is not None or self.template != "tokenizer"):
            raise UserError("system and template do nothing without chat; add --chat or leave them out")
        return texts

    def _messages(self, text: str) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": text}]


class _Printer:
    """Prints a single continuation as it grows, several when all are done."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> None:
        self.streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        self.texts = ["" for _ in prompts]

    def on_token(self, index: int, token_id: int) -> None:
        self._add(index, self.streams[index].push(token_id))

    def close(self) -> None:
        for index, stream in enumerate(self.streams):
            self._add(index, stream.flush())
        if len(self.texts) == 1:
            print()
            return
        for number, text in enumerate(self.texts, start=1):
            print(f"--- {number} of {len(self.texts)}\n{text}")

    def _add(self, index: int, text: str) -> None:
        if len(self.texts) == 1:
            print(text, end="", flush=True)
        else:
            self.texts[index] += text


class TextStream:
    """The text that follows a prompt, token by token.

    A token alone is not text: it may be part of a character, and a decoder may drop a space where it takes the first
    token for the beginning. So each is decoded after those before it, back to where text was last complete, and what
    is new in the result is returned (as text-generation-inference does, `decode_token`).

    Args:
        tokenizer: The tokenizer.
        prompt: Ids before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._num_told = len(self._ids)  # ids whose text has been returned

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty if a character is still open."""
        self._ids.append(token_id)
        text = self._untold()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids, self._num_told = self._ids[self._num_told :], len(self._ids) - self._num_told
        return text

    def flush(self) -> str:
        """What is left at the end: replacement characters where a character was never completed."""
        text = self._untold()
        self._num_told = len(self._ids)
        return text

    def _untold(self) -> str:
        told = self._tokenizer.decode(self._ids[: self._num_told], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(told) :]
