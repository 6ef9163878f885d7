"""`meap-lit generate`: continue prompts with a checkpoint."""

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
        checkpoint: A Hugging Face folder, a Hub id (ORG/NAME or ORG/NAME@REVISION), a .ckpt file, or the folder of a
            run.
        prompt: One prompt or several.
        prompt_file: Text file that holds one more prompt; a newline at its end is left out.
        chat: Make each prompt a user's message in the chat template.
        system: System message before each prompt; needs `chat`.
        template: Chat template, as for `prepare chat`; the tokenizer's own by default; needs `chat`.
        tokenizer: Folder or Hub id of the tokenizer; the checkpoint's own by default.
        max_new_tokens: Maximum number of tokens to add to a prompt; by default 128, or less if the context is full.
        temperature: Divides the logits before a token is drawn; 0 takes the most likely token.
        top_k: Draw among this many most likely tokens; 0 and -1 set no limit.
        top_p: Draw among the fewest most likely tokens that together reach this probability; 1 sets no limit.
        seed: Seed of the draws.
        batch_size: Number of prompts to continue at once.
        dtype: Dtype of the weights; by default bfloat16 on a GPU, and the checkpoint's own on a CPU.
        device: Device to compute on; auto takes a GPU if there is one.
        verify: Compare the checkpoint of a run with its checksums; false compares file sizes only.
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
            UserError: If there is no prompt, one is too long, or the checkpoint or its tokenizer cannot be used.
        """
        texts = self._texts()
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.seed)
        model = LanguageModel(self.checkpoint, self.tokenizer, self.dtype, self.device, self.verify)
        stop_token_ids: tuple[int, ...] = ()
        if self.chat:
            template = model.chat_template(self.template)
            stop_token_ids = template.stop_token_ids
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            prompts = [template.encode_prompt([*system, {"role": "user", "content": text}]) for text in texts]
        else:
            prompts = [model.encode(text) for text in texts]
        room = model.config.max_seq_len - max(map(len, prompts))
        stream = TextStream(model.tokenizer, prompts[0]) if len(prompts) == 1 else None

        def show(_: int, token_id: int) -> None:
            if stream is not None:
                print(stream.push(token_id), end="", flush=True)

        continuations = model.generate(
            prompts,
            max_new_tokens=max(1, min(128, room)) if self.max_new_tokens is None else self.max_new_tokens,
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            batch_size=self.batch_size,
            on_token=show,
        )
        if stream is not None:
            print(stream.flush())
            return
        for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True), start=1):
            print(f"--- {number} of {len(prompts)}\n{model.text_after(prompt, continuation)}")

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


class TextStream:
    """Decode the tokens that follow a prompt one by one.

    The text of a token depends on the tokens before it: it may complete a character, and some decoders drop a space at
    the beginning. Each token is decoded after the tokens of the last complete text, and the new part is returned (as in
    text-generation-inference, `decode_token`). `tokenizers.decoders.DecodeStream` raises on bytes that form no
    character, and does not return an incomplete character at the end.

    Args:
        tokenizer: The tokenizer.
        prompt: Ids before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._num_returned = len(self._ids)  # ids whose text has been returned

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty if its last character is incomplete."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids, self._num_returned = self._ids[self._num_returned :], len(self._ids) - self._num_returned
        return text

    def flush(self) -> str:
        """Return the rest of the text, with replacement characters for an incomplete character."""
        text = self._new_text()
        self._num_returned = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._num_returned], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(before) :]
