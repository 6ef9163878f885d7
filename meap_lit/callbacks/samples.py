"""Show what the model reads and writes, and give the curves of TensorBoard titles."""

from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from meap_lit.callbacks.loggers import as_code, writers
from meap_lit.errors import UserError, check_range
from meap_lit.inference.generation import check_prompts, generate
from meap_lit.model.config import DecoderConfig
from meap_lit.modules import MEAPFineTuning, MEAPPretraining
from meap_lit.parallel.ranks import Ranks
from meap_lit.parallel.strategies import Sharded
from meap_lit.preview.rows import rows_of_step
from meap_lit.preview.text import text_of_rows
from meap_lit.tokenizer.chat_template import ChatTemplate

CHARTS = {
    "Loss": {
        "Training loss and clean validation loss (nats per token)": ["train/loss$", "val/loss$"],
        "Clean validation perplexity": ["val/perplexity$"],
    },
    "Optimizer": {
        "Learning rate": ["train/lr$"],
        "Norm of the gradients before clipping": ["train/grad_norm$"],
    },
    "Speed and memory": {
        "Tokens per second": ["throughput/tokens_per_second$"],
        "Tokens seen": ["throughput/tokens_seen$"],
        "TeraFLOPs per second of the model": ["throughput/model_teraflops_per_second$"],
        "Peak memory of a device (GB)": ["memory/gigabytes$"],
    },
    "Retrieval": {"Accuracy of the retrieval probe (share of the questions)": ["val/retrieval_accuracy$"]},
}
"""Titles of the curves in TensorBoard's tab Custom Scalars, with regular expressions of their tags, by group."""
TEXT_CHARTS = {
    "Masks": {
        "Mask ratio P, requested and realized (share of the input tokens)": ["mask/ratio$", "mask/realised_ratio$"]
    }
}
CHAT_CHARTS = {
    "Masks": {
        "Loss of answers and of masked tokens (nats per token)": ["train/answer_loss$", "train/masked_loss$"],
        "Masked tokens and copies of a step": ["data/masked_tokens$", "data/copies$"],
        "Share of a step's tokens that are not padding": ["data/share_of_real_tokens$"],
    }
}
MIXTURE_CHARTS = {
    "Datasets": {
        "Clean validation loss of each dataset (nats per token)": ["val/loss/"],
        "Share of the tokens so far from each dataset": ["mix/"],
    }
}
GPU_CHARTS = {"Use of the GPU": {"Model FLOPs utilization (share of the peak)": ["throughput/mfu$"]}}

_WIDTH = 110


class Samples(L.Callback):
    """Show rows of training with their masks at the start of a run, and continuations of prompts at validations.

    Both are texts in TensorBoard, W&B and MLflow; other loggers get nothing. The rows are those that `meap-lit preview`
    shows. Until a schedule has begun to mask, the rows of a later step are shown at each validation. The continuations
    take the most likely token each time, so they depend on the weights alone. Nothing here changes the state of
    training.

    Args:
        rows: Rows of training to show; 0 for none.
        prompts: Texts to continue; in fine-tuning each is the message of a user. None by default.
        max_new_tokens: Maximum number of tokens to add to a prompt, or less if the context is full.

    Raises:
        UserError: If a number is out of range. When a run starts, if a prompt fills the context.
    """

    off: ClassVar[dict[str, Any]] = {"rows": 0, "prompts": []}
    """The options that `samples: null` sets."""

    def __init__(self, rows: int = 2, prompts: list[str] | None = None, max_new_tokens: int = 32) -> None:
        check_range("samples.rows", rows, "[0, inf)")
        check_range("samples.max_new_tokens", max_new_tokens, "[1, inf)")
        self.rows = rows
        self.prompts = prompts or []
        self.max_new_tokens = max_new_tokens
        self._shows_rows = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prompt_ids: list[list[int]] = []
        if not self.prompts:
            return
        if why := _why_left_out(trainer, pl_module):
            rank_zero_info(f"samples.prompts are left out: {why}")
            return
        data, config = trainer.datamodule, pl_module.config
        if data.kind == "chat":
            template = ChatTemplate.load("tokenizer", data.tokenizer)
            self._prompt_ids = [template.encode_prompt([{"role": "user", "content": text}]) for text in self.prompts]
            self._stop_token_ids = data.stop_token_ids
        else:
            self._prompt_ids = [data.tokenizer.encode_prompt(text) for text in self.prompts]
            self._stop_token_ids = [data.tokenizer.eos_token_id]
        longest = max(map(len, self._prompt_ids))
        self._num_new_tokens = max(1, min(self.max_new_tokens, config.max_seq_len - longest))
        Ranks(trainer).do(lambda: self._check(config))  # only the first rank has writers
        if not writers(trainer):
            self._prompt_ids = []

    def _check(self, config: DecoderConfig) -> None:
        try:
            check_prompts(self._prompt_ids, self._num_new_tokens, len(self._prompt_ids), config)
        except UserError as error:
            raise UserError(f"samples.prompts: {error}") from error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(_layout(trainer))
        self._shows_rows = self.rows > 0
        self._show_rows(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._show_rows(trainer, pl_module)
        if self._prompt_ids:
            self._show_continuations(trainer, pl_module)

    def _show_rows(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        is_known = isinstance(pl_module, MEAPPretraining | MEAPFineTuning)
        if not (self._shows_rows and is_known and writers(trainer) and step < trainer.max_steps):
            return
        rows = rows_of_step(pl_module, trainer.datamodule, step=step, max_steps=trainer.max_steps, num_rows=self.rows)
        for writer in writers(trainer):
            writer.add_text("rows", as_code(text_of_rows(rows, _WIDTH)), step)
        # until a schedule has begun to mask; a plain run never does
        self._shows_rows = pl_module.plain_override is not None and not any(row.num_masked for row in rows)

    def _show_continuations(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tokenizer = trainer.datamodule.tokenizer
        # each length of the cache would be compiled anew
        with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            continuations = generate(
                pl_module.decoder,
                self._prompt_ids,
                max_new_tokens=self._num_new_tokens,
                stop_token_ids=self._stop_token_ids,
                forbidden_token_ids=[
                    tokenizer.mask_token_id,
                    *tokenizer.ids_without_token(pl_module.config.vocab_size),
                ],
            )
        texts = []
        for prompt, ids, new_ids in zip(self.prompts, self._prompt_ids, continuations, strict=True):
            texts += ["**Prompt**", as_code(prompt), "**Continuation**", as_code(tokenizer.text_after(ids, new_ids))]
        for writer in writers(trainer):
            writer.add_text("continuations", "\n\n".join(texts), trainer.global_step)


def _layout(trainer: L.Trainer) -> dict[str, dict[str, list[Any]]]:
    """Return the charts of what a run logs, as TensorBoard takes them."""
    data = trainer.datamodule
    groups = {**CHARTS, **(CHAT_CHARTS if data.kind == "chat" else TEXT_CHARTS)}
    groups |= MIXTURE_CHARTS if len(data.datasets) > 1 else {}
    groups |= GPU_CHARTS if trainer.strategy.root_device.type == "cuda" else {}
    return {group: {title: ["Multiline", tags] for title, tags in charts.items()} for group, charts in groups.items()}


def _why_left_out(trainer: L.Trainer, pl_module: L.LightningModule) -> str | None:
    if isinstance(trainer.strategy, Sharded):
        return "trainer.strategy divides the model among devices, and generation needs a whole one"
    return "products of single tokens in float8 (model.float8) are not tested" if pl_module.float8 else None
