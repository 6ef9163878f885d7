"""Pretrain with MEAP: mask some input tokens, predict every next token."""

from typing import Any, Literal

import torch
from torch import Tensor

from meap_lit.data.datamodule import StreamingData
from meap_lit.data.stream.text import TextBatch
from meap_lit.errors import check_range
from meap_lit.masking import check_ratio, mask_inputs, rare_ids
from meap_lit.masking.schedules import Constant, MaskSchedule
from meap_lit.modules.base import DecoderModule
from meap_lit.modules.log_steps import ends_step, host_number, is_logged


class MEAPPretraining(DecoderModule):
    """Mask-Enhanced Autoregressive Prediction (arXiv 2502.07490, section 3.1).

    A share P of the input tokens becomes the mask token; the loss is the ordinary cross entropy of every next token.
    With P = 0 this is plain next-token prediction. Validation never masks.

    Args:
        mask_ratio: P: a number, or a schedule of the optimizer step (`meap_lit/masking/schedules.py`).
        mask_scope: `sequence` draws positions for each sequence; `batch` one set for all sequences of a step, as the
            authors' released code does.
        mask_cycle: Number of optimizer steps after which the drawn sets repeat; the released code has 51, drawn by
            Python's generator from the seeds 50 to 100. Never, if not given.
        span_len: Length in tokens of the spans that are masked together; 1 draws single tokens, as the paper does.
        protect: Never masked: the special tokens `bos` and `eos`, and `last`, the last position of a row, which
            the released code never masks.
        protect_rare: The rarest tokens, which together make up at most this share of the training tokens, are never
            masked. They are counted in the rows that the run trains on first.
        seed: Seed of the masks.
        **kwargs: As for `DecoderModule`.
    """

    incidental = (*DecoderModule.incidental, "seed")

    def __init__(
        self,
        mask_ratio: float | MaskSchedule,
        mask_scope: Literal["sequence", "batch"] = "sequence",
        mask_cycle: int | None = None,
        span_len: int = 1,
        protect: list[Literal["bos", "eos", "last"]] | None = None,
        protect_rare: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_range("model.mask_cycle", mask_cycle, "[1, inf)")
        check_range("model.span_len", span_len, "[1, inf)")
        check_ratio("model.protect_rare", protect_rare)
        self.mask_ratio = mask_ratio if isinstance(mask_ratio, MaskSchedule) else Constant(mask_ratio)
        self.mask_scope = mask_scope
        self.mask_cycle = mask_cycle
        self.span_len = span_len
        self.protect = protect or []
        self.protect_rare = protect_rare
        self.seed = seed
        self.mask_token_id: int | None = None
        """Id of the data's mask token; set when a run starts."""
        self.protected: Tensor | None = None
        """Ids that are never masked, [V], bool; set when a run starts. As a buffer, it would be sent every step."""

    @property
    def plain_override(self) -> str | None:
        return "--model.mask_ratio 0" if getattr(self.mask_ratio, "mask_ratio", 1) > 0 else None

    def on_fit_start(self) -> None:
        self.prepare_masks(self.data)

    def prepare_masks(self, data: StreamingData) -> None:
        """Take from the data, after its `setup`, the mask token and the tokens that are never masked."""
        self.mask_token_id = data.tokenizer.mask_token_id
        tokens = [name for name in self.protect if name != "last"]
        if not (tokens or self.protect_rare):
            return
        protected = torch.zeros(data.tokenizer.vocab_size, dtype=torch.bool)
        ids = {"bos": data.tokenizer.bos_token_id, "eos": data.tokenizer.eos_token_id}
        protected[[ids[name] for name in tokens if ids[name] is not None]] = True
        if self.protect_rare:
            protected |= rare_ids(data.token_counts(), self.protect_rare)
        self.protected = protected.to(self.device)

    def on_train_start(self) -> None:
        super().on_train_start()
        # no buffer, which bf16-true would round to three digits at every micro-batch
        self._step_loss = torch.zeros((), dtype=torch.float32, device=self.device)

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        input_ids, input_mask = self.mask_batch(batch, self.global_step, self.trainer.max_steps)
        self.masks_drawn |= self.mask_ratio(self.global_step, self.trainer.max_steps) > 0
        with self.dropout_of(batch_idx):
            # every row supervises all its T labels, so a mean over equal micro-batches is the mean over the step
            loss = self._summed_loss(input_ids, batch["labels"]) / batch["labels"].numel()
        self._log_step(loss, input_mask, batch_idx)
        return loss

    def mask_batch(self, batch: TextBatch, step: int, max_steps: int) -> tuple[Tensor, Tensor]:
        """Return the masked input ids and the input mask, each [B, T], of a training batch.

        Args:
            batch: Rows of text.
            step: Optimizer step that trains on them, counted from 0.
            max_steps: Optimizer steps of the run.
        """
        assert self.mask_token_id is not None
        sample_ids = batch["sample_ids"]
        return mask_inputs(
            batch["input_ids"],
            torch.zeros_like(sample_ids) if self.mask_scope == "batch" else sample_ids,
            mask_token_id=self.mask_token_id,
            mask_ratio=self.mask_ratio(step, max_steps),
            seed=self.seed,
            step=step % self.mask_cycle if self.mask_cycle else step,
            span_len=self.span_len,
            protected=self.protected,
            protect_last="last" in self.protect,
        )

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        summed_loss = self._summed_loss(batch["input_ids"], batch["labels"])
        self._validate(summed_loss, batch["labels"], batch.get("source", 0))

    def _summed_loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        assert self.decoder is not None
        hidden = self.decoder(input_ids)  # [B, T, D]
        return self.decoder.lm_head.loss(hidden, labels)[0]

    def _log_step(self, loss: Tensor, input_mask: Tensor, batch_idx: int) -> None:
        """Log the mean loss of the whole optimizer step, at its last micro-batch. Nothing here waits for the GPU."""
        self._step_loss += loss.detach() / self.trainer.accumulate_grad_batches
        if not ends_step(self.trainer, batch_idx):
            return
        if is_logged(self.trainer, self.global_step + 1):
            self.log("train/loss", self._step_loss.clone(), sync_dist=True)
            self.log("mask/ratio", host_number(self.mask_ratio(self.global_step, self.trainer.max_steps)))
            self.log("mask/realised_ratio", input_mask.float().mean())
        self._step_loss.zero_()
