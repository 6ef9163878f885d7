"""Pretraining with MEAP: mask some input tokens, predict every next token."""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric

from meap_lit.data.streaming import Batch
from meap_lit.errors import UserError
from meap_lit.masking import MaskSchedule, mask_inputs
from meap_lit.model import IGNORE_INDEX, Decoder, DecoderConfig, linear_cross_entropy
from meap_lit.model.config import pad_vocab_size
from meap_lit.modules.optimizer import AdamW


class MEAPPretraining(L.LightningModule):
    """Mask-Enhanced Autoregressive Prediction (arXiv 2502.07490, section 3.1).

    A share P of the input tokens becomes the mask token; the loss is the ordinary cross entropy of every next token.
    With P = 0 this is plain next-token prediction. Validation never masks.

    Args:
        decoder: The model.
        mask: P as a function of the optimizer step.
        optimizer: AdamW and its learning-rate schedule.
        seed: Seed of the masks.
        mask_scope: `sequence` draws positions for each sequence; `batch` one set for all sequences of a step, as the
            authors' released code does.
        mask_cycle: Number of optimizer steps after which the drawn sets repeat; the released code has 51. Never, if
            not given.
        protect: Special tokens that are never masked.
        mask_token_id: Id of the mask token; taken from the data's tokenizer if not given.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        mask: MaskSchedule,
        optimizer: AdamW,
        seed: int = 0,
        mask_scope: Literal["sequence", "batch"] = "sequence",
        mask_cycle: int | None = None,
        protect: list[Literal["bos", "eos"]] | None = None,
        mask_token_id: int | None = None,
    ) -> None:
        super().__init__()
        if mask_cycle is not None and mask_cycle < 1:
            raise UserError(f"model.mask_cycle must be at least 1, got {mask_cycle}")
        self.config = decoder
        self.mask = mask
        self.optimizer = optimizer
        self.seed = seed
        self.mask_scope = mask_scope
        self.mask_cycle = mask_cycle
        self.protect = protect or []
        self.mask_token_id = mask_token_id
        self.protected_ids: list[int] = []
        self.decoder: Decoder | None = None
        self.val_loss = MeanMetric()
        self.register_buffer("_step_loss", torch.zeros(()), persistent=False)

    # ---------------------------------------------------------------------------------------------- model

    def setup(self, stage: str) -> None:
        if self.trainer.precision == "16-mixed":
            raise UserError("trainer.precision 16-mixed is not supported: small gradients underflow; use bf16-mixed")
        if self.trainer.gradient_clip_algorithm == "value":
            raise UserError("trainer.gradient_clip_algorithm value is not supported; use norm, or leave it out")

    def configure_model(self) -> None:
        """Build the decoder, now that the vocabulary is known and the strategy has chosen a device."""
        if self.decoder is None:
            self._adopt_vocabulary()
            self.decoder = Decoder(self.config)

    def _adopt_vocabulary(self) -> None:
        """Take vocabulary size, mask token and protected ids from the data's tokenizer."""
        data = getattr(self._trainer, "datamodule", None)
        if data is not None:
            tokenizer = data.tokenizer
            self.mask_token_id = tokenizer.mask_token_id if self.mask_token_id is None else self.mask_token_id
            if self.config.vocab_size is None:
                self.config = dataclasses.replace(self.config, vocab_size=pad_vocab_size(tokenizer.vocab_size))
            if self.config.vocab_size < tokenizer.vocab_size:
                raise UserError(
                    f"decoder.vocab_size {self.config.vocab_size} is smaller than the tokenizer's "
                    f"{tokenizer.vocab_size} tokens (mask token included); "
                    f"write {pad_vocab_size(tokenizer.vocab_size)} or leave it out"
                )
            ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
            self.protected_ids = [ids[name] for name in self.protect if ids[name] is not None]
            if data.seq_len > self.config.max_seq_len:
                raise UserError(
                    f"data.seq_len {data.seq_len} is longer than the model's context, "
                    f"decoder.max_seq_len {self.config.max_seq_len}; shorten the one or raise the other"
                )
        if self.config.vocab_size is None or self.mask_token_id is None:
            raise UserError("without a datamodule, decoder.vocab_size and model.mask_token_id must be given")
        if not 0 <= self.mask_token_id < self.config.vocab_size:
            raise UserError(
                f"model.mask_token_id {self.mask_token_id} is outside the vocabulary of {self.config.vocab_size}"
            )

    # ---------------------------------------------------------------------------------------------- steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        input_ids, input_mask = self.mask_batch(batch)
        loss = self._mean_loss(input_ids, batch["labels"])
        self._log_step(loss, input_mask, batch_idx)
        return loss

    def mask_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Masked input ids and the input mask, each [B, T], of a training batch at the present step."""
        assert self.mask_token_id is not None
        step, sample_ids = self.global_step, batch["sample_ids"]
        return mask_inputs(
            batch["input_ids"],
            torch.zeros_like(sample_ids) if self.mask_scope == "batch" else sample_ids,
            mask_token_id=self.mask_token_id,
            mask_ratio=self.mask(step, self.trainer.max_steps),
            seed=self.seed,
            step=step % self.mask_cycle if self.mask_cycle else step,
            protected_ids=self.protected_ids,
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        num_labels = (batch["labels"] != IGNORE_INDEX).sum()
        total = self._summed_loss(batch["input_ids"], batch["labels"])
        self.val_loss.update(total / num_labels.clamp(min=1), weight=num_labels)

    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()
        self.val_loss.reset()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self.log("val/perplexity", loss.exp(), sync_dist=True)

    def _mean_loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        # every row supervises all its T labels, so a mean over equal micro-batches is the mean over the step
        return self._summed_loss(input_ids, labels) / labels.numel()

    def _summed_loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        assert self.decoder is not None
        hidden = self.decoder(input_ids)  # [B, T, D]
        return linear_cross_entropy(hidden, self.decoder.lm_head.weight, labels)

    def _log_step(self, loss: Tensor, input_mask: Tensor, batch_idx: int) -> None:
        """Log the mean loss of the whole optimizer step, at its last micro-batch. Nothing here waits for the GPU."""
        accumulation = self.trainer.accumulate_grad_batches
        self._step_loss += loss.detach() / accumulation
        if (batch_idx + 1) % accumulation == 0:
            self.log("train/loss", self._step_loss.clone(), prog_bar=True, sync_dist=True)
            self.log("mask/ratio", self.mask(self.global_step, self.trainer.max_steps))
            self.log("mask/realised_ratio", input_mask.float().mean())
            self._step_loss.zero_()

    # ---------------------------------------------------------------------------------------------- optimizer

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        assert self.decoder is not None
        optimizer = self.optimizer.build(self.decoder)
        factor = partial(self.optimizer.lr_factor, max_steps=self.trainer.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm and log it, computing it once."""
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    # ---------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["decoder"] = {"config": dataclasses.asdict(self.config), "mask_token_id": self.mask_token_id}
