"""Fine-tune with MEAP: train on each sample and on a copy with a part of the answer masked."""

from typing import ClassVar

import torch
from torch import Tensor

from meap_lit.data.stream.chat import PackedBatch
from meap_lit.hf.weights import token_ids
from meap_lit.modules.base import DecoderModule
from meap_lit.modules.log_steps import ends_step, host_number, is_logged


class MEAPFineTuning(DecoderModule):
    """Supervised fine-tuning on duplicated sequences (arXiv 2502.07490, section 3.2).

    The loss is taken on the answers of the originals (U_q) and on the masked tokens of the copies (U_m), and divided
    by |U_q| + |U_m| of the whole optimizer step, over its micro-batches and all devices, so that it does not depend on
    how a batch is split. The datamodule duplicates and masks (`meap_lit/masking/duplication.py`).
    Validation has neither copies nor masks. The options are those of `DecoderModule`.
    """

    decided_by: ClassVar[dict[str, str]] = {"seed": "data.seed"}
    """Options of pretraining that this class does not have, and the key that decides instead."""

    def configure_model(self) -> None:
        super().configure_model()
        # the model learns to end its answers as the chat template does
        generation = self.origin.get("generation", {})
        stops = sorted({*token_ids(generation, "eos_token_id"), *self.data.stop_token_ids})
        self.origin["generation"] = {**generation, "eos_token_id": stops}

    @property
    def plain_override(self) -> str | None:
        masked = self.data.duplication.mask_ratio > 0
        return "--data.duplication.mask_ratio 0" if masked else None

    def on_train_start(self) -> None:
        super().on_train_start()
        # no buffer, which bf16-true would round to three digits at every micro-batch
        self._step_sums = torch.zeros(2, dtype=torch.float32, device=self.device)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        with self.dropout_of(batch_idx):
            total, losses = self._losses(batch)  # scalar, [B, T]
        self.masks_drawn |= self.plain_override is not None and self.data.duplication.mask_inputs
        masked = (losses * batch["in_copy"]).sum()
        self._step_sums += torch.stack([losses.sum() - masked, masked])
        # Lightning takes the mean over micro-batches, and data parallelism over devices; the step's sum is wanted
        num_parts = self.trainer.accumulate_grad_batches * self.data.rank_slice.num_replicas
        self._log_step(batch, batch_idx)
        return total * num_parts / batch["num_labels"]

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        self._validate(self._losses(batch)[0], batch["labels"], batch.get("source", 0))

    def _losses(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the summed loss, scalar, and the loss of every position for the log, [B, T]."""
        assert self.decoder is not None
        hidden = self.decoder(batch["input_ids"], batch["position_ids"], batch["documents"])  # [B, T, D]
        return self.decoder.lm_head.loss(hidden, batch["labels"], batch["label_positions"])

    def _log_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Log the losses of the whole optimizer step, at its last micro-batch. Nothing here waits for the GPU."""
        if not ends_step(self.trainer, batch_idx):
            return
        if is_logged(self.trainer, self.global_step + 1):
            # `sync_dist` takes the mean over devices
            answer, masked = self._step_sums * self.data.rank_slice.num_replicas
            num_masked = batch["num_masked"]
            self.log("train/loss", (answer + masked) / batch["num_labels"], sync_dist=True)
            if num_masked < batch["num_labels"]:  # with the layout `separate` a small step may have copies only
                self.log("train/answer_loss", answer / (batch["num_labels"] - num_masked), sync_dist=True)
            if num_masked:
                self.log("train/masked_loss", masked / num_masked, sync_dist=True)
            self.log("data/copies", host_number(batch["num_copies"]))
            self.log("data/masked_tokens", host_number(num_masked))
            self.log("data/share_of_real_tokens", host_number(batch["num_tokens"] / self.data.tokens_per_step))
        self._step_sums.zero_()
