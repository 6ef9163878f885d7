"""The base of the LightningModules: build the decoder, validate without masks, update the weights, save and load."""

import dataclasses
import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from meap_lit import hub
from meap_lit.checkpoint.source import CheckpointSource, check_tokenizer, new_mask_token, open_source, vocab_size_for
from meap_lit.data.datamodule import StreamingData
from meap_lit.errors import UserError
from meap_lit.hf.weights import WeightSource, load_weights
from meap_lit.model import IGNORE_INDEX, Decoder, DecoderConfig
from meap_lit.model.build import allocate, copy_whole, init_weights, meta_decoder
from meap_lit.model.config import Context, vocab_rows
from meap_lit.model.float8 import MULTIPLE, use_float8
from meap_lit.model.lora import LoRA, add_lora, draw_dropout_from, is_adapter
from meap_lit.model.recompute import checkpoint_and_compile
from meap_lit.modules.log_steps import host_number, is_logged
from meap_lit.modules.optimizer import AdamW
from meap_lit.modules.resume import check_same_model, name_parameters
from meap_lit.parallel.float8 import as_plain_shards, find_scales
from meap_lit.parallel.ranks import Ranks
from meap_lit.parallel.sharding import clip_grad_norm, write_shard
from meap_lit.parallel.strategies import Sharded
from meap_lit.tokenizer.tokenizer import Tokenizer


class DecoderModule(L.LightningModule, ABC):
    """A decoder in training; a subclass defines the loss.

    Args:
        optimizer: AdamW and its learning-rate schedule.
        decoder: The model, with random weights.
        init_from: Start from these weights instead: a Hugging Face folder, a Hub id (ORG/NAME or ORG/NAME@REVISION), a
            checkpoint or a run's folder. The vocabulary grows by the mask token if it has none.
        context: Longer context or other rotary frequencies than those weights were trained with.
        lora: Train low-rank adapters on these projections and nothing else.
        activation_checkpointing: Keep fewer activations for the backward pass and recompute the others: `full` keeps
            one hidden state per block, `selective` also the results of matrix products and attention.
        compile: Compile the blocks (torch.compile), which delays the first step; `auto` compiles them on a GPU.
        float8: Compute the large linear layers of the blocks in float8 (`meap_lit/model/float8.py`). Weights and
            checkpoints do not change, so a resume may switch it on or off. Needs torchao and a GPU of compute
            capability 8.9 or newer; faster only with compiled blocks and trainer.precision bf16-mixed. `all_gather`
            also gathers sharded weights in float8.
    """

    incidental: ClassVar[tuple[str, ...]] = ("activation_checkpointing", "compile")
    """Options of a class that do not decide what a run learns, see `Budget.incidental`; a seed is one."""

    def __init__(
        self,
        optimizer: AdamW,
        decoder: DecoderConfig | None = None,
        init_from: str | None = None,
        context: Context | None = None,
        lora: LoRA | None = None,
        activation_checkpointing: Literal["none", "selective", "full"] = "none",
        compile: bool | Literal["auto"] = "auto",
        float8: bool | Literal["all_gather"] = False,
    ) -> None:
        super().__init__()
        if (decoder is None) == (init_from is None):
            raise UserError("set one of model.decoder (random weights) and model.init_from (a checkpoint)")
        self.optimizer = optimizer
        self.initial_config = decoder
        if context is not None and init_from is None:
            raise UserError("model.context needs model.init_from; for random weights, set it in model.decoder")
        if float8 and lora is not None:
            raise UserError("model.float8 cannot be combined with model.lora; leave one of the two out")
        self.init_from = init_from
        self.context = context
        self.lora = lora
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile
        self.float8 = float8
        self.decoder: Decoder | None = None
        self.origin: dict[str, Any] = {}
        """Source of the weights, and its properties that the export needs; saved in checkpoints."""
        self.is_compiled = False
        """Whether the blocks are compiled, known once the model is built."""
        self.masks_drawn = False
        """Whether inputs were masked, in this run or in that of `init_from`."""
        self.strict_loading = lora is None  # a checkpoint of adapters holds nothing else
        self.bad_gradient_step: Tensor | None = None
        """First optimizer step of this run with gradients that were not finite, scalar int64 on their device, or -1."""

    @property
    def data(self) -> StreamingData:
        """The datamodule of the run."""
        return self.trainer.datamodule

    @property
    @abstractmethod
    def plain_override(self) -> str | None:
        """Command-line words that turn a masked run into its baseline; None if the run is plain."""

    # ---------------------------------------------------------------------------------------------- model

    def prepare_data(self) -> None:
        """Download the model of a Hub id, once on each node."""
        hub.download(self.init_from, "checkpoint")

    def setup(self, stage: str) -> None:
        if self.trainer.datamodule is None:
            raise UserError(
                "the model needs a datamodule, which knows the tokenizer; call trainer.fit(module, datamodule=...)"
            )
        if self.trainer.precision == "16-mixed":
            raise UserError("trainer.precision 16-mixed is not supported: small gradients underflow; use bf16-mixed")
        if self.trainer.gradient_clip_algorithm == "value":
            raise UserError("trainer.gradient_clip_algorithm value is not supported; use norm, or leave it out")
        if self.lora is not None and self.lora.frozen_dtype == "bfloat16" and self.trainer.precision != "bf16-mixed":
            raise UserError(
                f"model.lora.frozen_dtype bfloat16 needs trainer.precision bf16-mixed, got {self.trainer.precision}"
            )
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if on_cpu and self.trainer.precision.startswith("bf16") and torch.backends.cpu.get_cpu_capability() == "AVX2":
            # a step takes 12 times as long as in float32 (benchmarks/log.md)
            rank_zero_warn(
                f"this CPU has no AVX-512, without which PyTorch multiplies bfloat16 slowly; "
                f"trainer.precision 32-true is much faster here than {self.trainer.precision}"
            )
        ranks = Ranks(self.trainer)
        found = ranks.do(lambda: self.data.fingerprints)
        ranks.do(lambda: self.data.check_alike(found))

    def configure_model(self) -> None:
        """Build the decoder, now that the vocabulary is known and the strategy has chosen devices.

        The decoder is built without memory, sharded if the strategy does so, and only then allocated and filled, so
        that no device ever holds more than its shard.

        Raises:
            UserError: If the vocabulary or the context is too small for the data.
        """
        if self.decoder is not None:
            return
        source = self._open_source()
        self.config = self._choose_config(source)
        self._check_context(source)
        # strategy and precision (float32 unless bf16-true) have set torch's defaults
        decoder = meta_decoder(self.config, torch.get_default_dtype())
        device, write = torch.get_default_device(), copy_whole
        if self.lora is not None:
            add_lora(decoder, self.lora)
        if self.float8:  # layers are replaced before anything is put around them
            self._use_float8(decoder)
        strategy = self.trainer.strategy
        on_gpu = strategy.root_device.type == "cuda"
        self.is_compiled = on_gpu if self.compile_blocks == "auto" else self.compile_blocks
        checkpoint_and_compile(decoder, self.activation_checkpointing, self.is_compiled)
        if isinstance(strategy, Sharded):
            strategy.shard(decoder)
            device, write = strategy.parameter_device, write_shard
        allocate(decoder, device)
        names = [name for name, _ in decoder.named_parameters() if source is None or is_adapter(name)]
        init_weights(decoder, names, write)
        if source is not None:
            load_weights(decoder, source, first_new_token=self.origin["first_new_token"], write=write)
        self.decoder = decoder

    def _open_source(self) -> WeightSource | None:
        """Open the source of the weights after the first rank has verified it for all."""
        if self.init_from is None:
            return None
        path, ranks = hub.pinned(self.init_from), Ranks(self.trainer)
        verify = getattr(self.trainer.checkpoint_callback, "verify", True) and ranks.rank == 0

        def found() -> str:
            source = open_source(path, verify)
            return str(source.path) if isinstance(source, CheckpointSource) else path

        # a run that is still saving may have another checkpoint a moment later
        return open_source(ranks.do(found)[0], verify=False)

    def _rows_without_mask(self) -> int | None:
        """Return the vocabulary rows that the model would have without the mask token; None if it came with one."""
        tokenizer = self.data.tokenizer
        if self.initial_config is None:
            return self.origin["rows"]
        if not tokenizer.mask_is_new:
            return None
        return vocab_rows(tokenizer.vocab_size - 1, self.initial_config.vocab_size)

    def _use_float8(self, decoder: Decoder) -> None:
        data, strategy = self.data, self.trainer.strategy
        if isinstance(strategy, Sharded) and strategy.tensor_parallel_size > 1:
            raise UserError(
                f"model.float8 cannot be combined with trainer.strategy.tensor_parallel_size "
                f"{strategy.tensor_parallel_size}; set that to 1 or leave model.float8 out"
            )
        if data.micro_batch_size * data.seq_len % MULTIPLE:
            raise UserError(
                f"model.float8 needs micro-batches of a multiple of {MULTIPLE} tokens, got data.micro_batch_size "
                f"{data.micro_batch_size} x data.seq_len {data.seq_len}; change one of the two"
            )
        all_gather = self.float8 == "all_gather"
        if all_gather and not isinstance(strategy, Sharded):
            raise UserError(
                "model.float8 all_gather needs sharded weights, such as with recipes/strategy/fsdp.yaml; write true"
            )
        use_float8(decoder, strategy.root_device, all_gather=all_gather)

    def _choose_config(self, source: WeightSource | None) -> DecoderConfig:
        tokenizer = self.data.tokenizer
        if source is None:
            assert self.initial_config is not None
            return with_vocabulary(self.initial_config, tokenizer)
        self.masks_drawn = isinstance(source, CheckpointSource) and source.rows_without_mask is None
        new_mask = new_mask_token(source, tokenizer)
        rows_before = None if new_mask is None else source.config.vocab_size
        name = hub.pinned(self.init_from or "")
        self.origin = {
            "init_from": name if hub.is_pinned(name) else str(source.path),  # finds the source again
            "base": None if self.lora is None else source.fingerprint(),
            "first_new_token": new_mask,
            "rows": source.rows_without_mask if isinstance(source, CheckpointSource) else rows_before,
            "model_type": source.model_type,
            "dtype": str(source.dtype).removeprefix("torch."),
            "generation": source.generation,
            "positions": source.positions,
        }
        config = dataclasses.replace(source.config, vocab_size=vocab_size_for(source, tokenizer))
        return config if self.context is None else self.context.of(config)

    def _check_context(self, source: WeightSource | None) -> None:
        data = self.data
        if data.longest_input <= self.config.max_seq_len:
            return
        context = f"{self.config.max_seq_len} tokens"
        if source is not None and source.config.max_seq_len == self.config.max_seq_len:
            context = source.context
        raise UserError(
            f"the longest input of the data, {data.longest_input} tokens (data.seq_len {data.seq_len}), is longer "
            f"than the model's context, {context}; shorten the one or raise the other with "
            f"model.{'decoder' if source is None else 'context'}.max_seq_len"
        )

    def dropout_of(self, batch_idx: int) -> AbstractContextManager[None]:
        """Return a context in which seed, step, micro-batch and rank alone decide the adapters' dropout."""
        if self.lora is None or self.lora.dropout == 0:
            return nullcontext()
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        rank = self.data.rank_slice.rank
        return draw_dropout_from(self.device, self.data.seed, self.global_step, micro_batch, rank)

    # ---------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._val_shares = self.data.val_shares
        self._val_sums = torch.zeros(len(self._val_shares), 2, dtype=torch.float32, device=self.device)

    def _validate(self, summed_loss: Tensor, labels: Tensor, source: int = 0) -> None:
        """Add a batch to the validation loss of its dataset: its loss summed over the supervised labels, [B, T]."""
        num_labels = (labels != IGNORE_INDEX).sum()
        mean = summed_loss / num_labels.clamp(min=1)  # rounded as torchmetrics' MeanMetric would, which drops a NaN
        self._val_sums[source] += torch.stack([mean * num_labels, num_labels])

    def on_validation_epoch_end(self) -> None:
        """Log the loss of each dataset, if there are several, and that of their mixture."""
        summed, num_labels = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum").unbind(1)  # [S] each
        losses = dict(zip(self._val_shares, summed / num_labels, strict=True))
        counts = dict(zip(self._val_shares, num_labels.tolist(), strict=True))
        read = [name for name, count in counts.items() if count] or list(losses)  # all: the loss of no label is NaN
        total = sum(self._val_shares[name] for name in read)  # 1, unless `trainer.limit_val_batches` left some out
        loss = torch.stack([losses[name] * (self._val_shares[name] / total) for name in read]).sum()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self.log("val/perplexity", loss.exp(), sync_dist=True)
        if len(self.data.datasets) > 1:
            for name in read:
                self.log(f"val/loss/{name}", losses[name], sync_dist=True)

    # ---------------------------------------------------------------------------------------------- optimizer

    def on_train_start(self) -> None:
        if self.is_compiled:
            rank_zero_info("the first step compiles the blocks, which may take a minute")
        self.bad_gradient_step = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Mark the values of earlier steps as logged; Lightning would log them again if a run stops in between."""
        for metric in self.trainer.fit_loop.epoch_loop._results.values():
            metric.has_reset = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.decoder is not None
        return self.optimizer.build(self.decoder)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate and all other options from the recipe and the step alone.

        A Lightning scheduler would restore its rates from a checkpoint, whatever the recipe of the resumed run says.
        """
        factor = self.optimizer.lr_factor(self.global_step, self.trainer.max_steps)
        self.optimizer.set_options(optimizer, lr=self.optimizer.lr * factor)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.float8 == "all_gather":
            find_scales(self)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients by their global norm, and log the norm at logged steps.

        A norm that is not finite vetoes this update and all later ones, so the weights remain those of the last good
        step until the host reads `bad_gradient_step`. The veto remains on the device.
        """
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        norm = clip_grad_norm(self.parameters(), limit)
        if self.bad_gradient_step is None:
            self.bad_gradient_step = torch.full((), -1, dtype=torch.int64, device=norm.device)
        is_new = ~norm.isfinite() & (self.bad_gradient_step < 0)
        self.bad_gradient_step.masked_fill_(is_new, self.global_step + 1)
        # what torch's GradScaler sets: a fused optimizer then leaves weights, moments and step counts as they are
        optimizer.found_inf = (self.bad_gradient_step >= 0).float()  # type: ignore[attr-defined]
        if is_logged(self.trainer, self.global_step + 1):
            self.log("train/grad_norm", norm)
            self.log("train/lr", host_number(optimizer.param_groups[0]["lr"]))

    # ---------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return all weights, or with `lora` only the adapters: the frozen weights are in `init_from`."""
        state = super().state_dict(*args, **kwargs)
        if self.float8 == "all_gather":
            state = as_plain_shards(state)
        if self.lora is None or self.init_from is None:
            return state
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model, and adapters of one: they might fit, and mean nothing.

        Raises:
            UserError: If the checkpoint's model, adapters or tokenizer are not those of the recipe.
        """
        is_foreign = type(self.data).__qualname__ not in checkpoint
        if is_foreign and self.trainer.state.fn == "fit":
            return  # a run of another kind: `Budget` says so
        about = checkpoint.get("decoder", {})
        self.masks_drawn |= about.get("rows_without_mask") is None
        check_same_model(about, self.config, self.lora, self.origin)
        if self.trainer.state.fn == "fit":  # its data is compared, and so its tokenizer
            if self.lora is None:  # the weights come from where the run began, whatever the recipe says now
                self.origin.update((name, about[name]) for name in self.origin if name in about)
        else:
            checkpoint_path = Path(self.trainer.ckpt_path)
            trained_with = checkpoint_path.absolute().parents[1] / "tokenizer"
            check_tokenizer(self.data.tokenizer, trained_with, checkpoint_path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # names hold for every strategy, and torch's optimizers take them for their own numbers
        for optimizer, state in zip(self.trainer.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            if state:  # one rank may have gathered it all
                name_parameters(state, optimizer, self.named_parameters())
        data = self.data
        checkpoint["decoder"] = {
            "config": dataclasses.asdict(self.config),
            "mask_token_id": data.tokenizer.mask_token_id,
            "tokens_seen": data.samples_seen * data.seq_len,
            "lora": None if self.lora is None else dataclasses.asdict(self.lora),
            "rows_without_mask": None if self.masks_drawn else self._rows_without_mask(),
            **self.origin,
        }
        checkpoint["hub"] = hub.commits()


def with_vocabulary(config: DecoderConfig, tokenizer: Tokenizer) -> DecoderConfig:
    """Return the configuration of a new model, with room for the tokenizer's ids, the mask token among them.

    Raises:
        UserError: If the stated vocabulary is too small.
    """
    rows = vocab_rows(tokenizer.vocab_size, config.vocab_size)
    if rows is None:
        raise UserError(
            f"decoder.vocab_size {config.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} tokens "
            f"(mask token included); write {vocab_rows(tokenizer.vocab_size)} or leave it out"
        )
    return dataclasses.replace(config, vocab_size=rows)
