"""A checkpoint as a language model: it continues prompts, or scores given text by its log-likelihood."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from meap_lit.checkpoint.source import DTYPES, open_source, tokenizer_of
from meap_lit.errors import UserError
from meap_lit.hf.weights import build_decoder, token_ids
from meap_lit.inference.generation import GREEDY, IsDone, OnToken, Sampling, check_prompts, generate, not_finite
from meap_lit.model import IGNORE_INDEX, Decoder
from meap_lit.tokenizer.chat_template import ChatTemplate

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class LanguageModel:
    """A decoder with its tokenizer. The weights are read at their first use.

    Args:
        checkpoint: A Hugging Face folder, a Hub id, a .ckpt file or folder, or the folder of a run.
        tokenizer: Folder or Hub id of the tokenizer; the checkpoint's own by default.
        dtype: Dtype of the weights; by default bfloat16 on a GPU, and the checkpoint's own on a CPU.
        device: Device to compute on; auto takes a GPU if there is one.
        verify: Compare the checkpoint of a run with its checksums; False compares file sizes only.

    Raises:
        UserError: If the checkpoint or the device does not exist, or no tokenizer fits the checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        dtype: Dtype | None = None,
        device: Device | torch.device = "auto",
        verify: bool = True,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.source = open_source(checkpoint, verify)
        self.config = self.source.config
        self.tokenizer = tokenizer_of(self.source, tokenizer)
        self.today: datetime | None = None
        """Current time for chat templates; if None, the time at which a template is loaded."""
        self._templates: dict[str, ChatTemplate] = {}
        on_gpu = self.device.type == "cuda"
        self.dtype = DTYPES[dtype or "bfloat16"] if dtype or on_gpu else self.source.dtype

    @cached_property
    def decoder(self) -> Decoder:
        return build_decoder(self.config, self.source, dtype=self.dtype, device=self.device).eval()

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a text: the tokenizer's EOS and those that the checkpoint names."""
        return sorted({self.tokenizer.eos_token_id, *token_ids(self.source.generation, "eos_token_id")})

    @cached_property
    def forbidden_token_ids(self) -> list[int]:
        """Ids that are never generated: the mask token, ids without a token, and what the checkpoint suppresses."""
        rows = self.config.vocab_size
        assert rows is not None
        ids = {self.tokenizer.mask_token_id, *self.tokenizer.ids_without_token(rows)}
        ids |= {*token_ids(self.source.generation, "suppress_tokens")}
        return sorted(token_id for token_id in ids if token_id < rows)  # the mask token may be newer than the model

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as a prompt, see `Tokenizer.encode_prompt`."""
        return self.tokenizer.encode_prompt(text)

    def chat_template(self, name: str = "tokenizer") -> ChatTemplate:
        """Return the chat template of that name, see `ChatTemplate.load`."""
        if name not in self._templates:
            self._templates[name] = ChatTemplate.load(name, self.tokenizer, self.today)
        return self._templates[name]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_token_ids: Iterable[int] = (),
        batch_size: int = 8,
        on_token: OnToken | None = None,
        is_done: IsDone | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue prompts, see `generation.generate`.

        Args:
            stop_token_ids: Further ids that end a continuation, such as those of a chat template.
        """
        check_prompts(prompts, max_new_tokens, batch_size, self.config, self.source.context)
        return generate(
            self.decoder,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_token_ids=sorted({*self.stop_token_ids, *stop_token_ids}),
            forbidden_token_ids=self.forbidden_token_ids,
            batch_size=batch_size,
            on_token=on_token,
            is_done=is_done,
            numbers=numbers,
        )

    def continue_texts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_token_ids: Iterable[int] = (),
        is_done: IsDone | None = None,
    ) -> list[str]:
        """Return the greedy continuation of each prompt as text; all prompts are one batch."""
        continuations = self.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            batch_size=max(1, len(prompts)),
            is_done=is_done,
        )
        return [
            self.text_after(prompt, continuation) for prompt, continuation in zip(prompts, continuations, strict=True)
        ]

    def text_after(self, prompt: Sequence[int], continuation: Sequence[int]) -> str:
        """Return the text that `continuation` adds to `prompt`, without special tokens."""
        return self.tokenizer.text_after(prompt, continuation)

    @torch.no_grad()
    def log_probs(self, rows: Sequence[Sequence[int]], first: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return log-probabilities of the last tokens of each row, given all tokens before; all rows are one batch.

        Args:
            rows: Token ids of each row.
            first: Position of the first token to score in each row, at least 1.

        Returns:
            For each row, of its N = len(row) - first tokens, the log-probabilities, [N] float32 on the CPU, and whether
            each token is the most likely one, [N] bool.

        Raises:
            UserError: If a value is not finite.
        """
        assert min(first) >= 1, "the first token of a row has no context"
        # attention is causal: padding on the right changes nothing
        input_ids = pad_sequence([torch.tensor(row[:-1]) for row in rows], batch_first=True).to(self.device)  # [B, T]
        labels = pad_sequence([torch.tensor(row[1:]) for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
        for row_labels, start in zip(labels, first, strict=True):
            row_labels[: start - 1] = IGNORE_INDEX
        is_scored = labels != IGNORE_INDEX  # [B, T]
        scored = self.decoder(input_ids)[is_scored.to(self.device)]  # [M, D]
        found, is_best = [], []
        # in pieces: [M, V] logits in float32 are large
        for piece, wanted in zip(scored.split(1024), labels[is_scored].to(self.device).split(1024), strict=True):
            logits = self.decoder.logits(piece).float()  # [m, V]
            found.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
            is_best.append(logits.argmax(-1) == wanted)
        sizes = is_scored.sum(dim=1).tolist()
        values = torch.cat(found).cpu()
        if not values.isfinite().all():
            raise not_finite()
        return list(zip(values.split(sizes), torch.cat(is_best).cpu().split(sizes), strict=True))


load_model = LanguageModel
"""The same by a verb, as scripts have it."""


def choose_device(device: Device) -> torch.device:
    """Return the device; raise UserError for cuda on a machine without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda is not available; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
