import copy
import warnings
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from meap_lit.checkpoint.export import Export
from meap_lit.data.pretraining import PretrainingData
from meap_lit.data.stream.micro_batches import Slice, TrainStream
from meap_lit.data.stream.order import MixedOrder, ShuffledOrder
from meap_lit.data.stream.text import BlockReader, TokenBlocks
from meap_lit.errors import UserError
from meap_lit.masking import num_masked
from meap_lit.masking.schedules import WarmupHold
from meap_lit.model import Decoder, DecoderConfig
from meap_lit.modules import AdamW, MEAPPretraining
from meap_lit.recipe.cli import RecipeCLI
from meap_lit.tokenizer.tokenizer import Tokenizer

TOY = DecoderConfig(num_layers=2, num_heads=2, num_kv_heads=1, hidden_size=32, intermediate_size=64, max_seq_len=64)


def run(recipe, *overrides):
    return RecipeCLI.run(["fit", "--config", str(recipe), *overrides])


def trainer_of(device="cpu", *, precision="32-true", vocab_size=64):
    """What `setup` and `configure_model` ask of a Trainer of one process and of its datamodule."""
    tokenizer = SimpleNamespace(vocab_size=vocab_size)
    data = SimpleNamespace(tokenizer=tokenizer, longest_input=32, fingerprints={}, check_alike=lambda found: None)
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(
        datamodule=data,
        strategy=strategy,
        precision=precision,
        gradient_clip_algorithm="norm",
        global_rank=0,
        local_rank=0,
        world_size=1,
    )


class Recorder(L.Callback):
    """Keeps the losses of the training steps."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fit(prepared, *, mask_ratio, max_steps=6, micro_batch_size=4, global_batch_size=8, tmp_path, module=None, **kwargs):
    """Train a toy model by the Python interface; returns the module and the per-micro-batch losses."""
    from meap_lit.callbacks import Budget

    L.seed_everything(3)
    data = PretrainingData(
        prepared.dataset,
        prepared.tokenizer,
        seq_len=32,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        num_workers=0,
    )
    module = module or MEAPPretraining(
        decoder=TOY, mask_ratio=mask_ratio, optimizer=AdamW(lr=1e-3, final_lr=1e-4), **kwargs
    )
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=tmp_path,
        callbacks=[Budget(max_steps=max_steps, val_every_n_steps=100), recorder],
    )
    trainer.fit(module, datamodule=data)
    return module, recorder.losses


def test_ratio_zero_is_plain_next_token_prediction_bit_for_bit(prepared, tmp_path):
    module, losses = fit(prepared, mask_ratio=0.0, micro_batch_size=8, tmp_path=tmp_path)

    # the same training written down plainly, on the same batches
    L.seed_everything(3)
    data = PretrainingData(prepared.dataset, prepared.tokenizer, seq_len=32, num_workers=0)
    plain = Decoder(module.config)
    optimizer = AdamW(lr=1e-3, final_lr=1e-4)
    adamw = optimizer.build(plain)
    for step, batch in enumerate(batches(data, prepared, 6)):
        for group in adamw.param_groups:
            group["lr"] = optimizer.lr * optimizer.lr_factor(step, 6)
        loss = summed_loss(plain, batch) / batch["labels"].numel()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        assert loss.item() == losses[step]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, module.decoder.state_dict()[name]), name


def batches(data, prepared, count):
    blocks = TokenBlocks(f"{prepared.dataset}/train", 32)
    order = MixedOrder([ShuffledOrder(blocks.chunk_sizes, (data.seed, 0))], [1.0], data.seed)
    reader = BlockReader([blocks], 32, vocab_size=320)
    return islice(
        TrainStream(order, reader, rank_slice=Slice(), global_batch_size=8, micro_batch_size=8, start=0), count
    )


def summed_loss(decoder, batch):
    from meap_lit.model import linear_cross_entropy

    return linear_cross_entropy(decoder(batch["input_ids"]), decoder.lm_head.weight, batch["labels"])[0]


def test_the_loss_is_the_cross_entropy_of_every_next_token(prepared, tmp_path):
    module, _ = fit(prepared, mask_ratio=0.15, max_steps=1, tmp_path=tmp_path)
    tokens = torch.randint(0, 300, (3, 33), generator=torch.Generator().manual_seed(0))
    loss = module._summed_loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    logits = module.decoder.logits(module.decoder(tokens[:, :-1]))
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_inputs_are_masked_and_labels_stay_clean(prepared, tmp_path):
    module, _ = fit(prepared, mask_ratio=0.15, max_steps=1, tmp_path=tmp_path)
    batch = {
        "input_ids": torch.full((4, 32), 7),
        "labels": torch.full((4, 32), 7),
        "sample_ids": torch.arange(4),
    }
    before = copy.deepcopy(batch)
    input_ids, input_mask = module.mask_batch(batch, step=0, max_steps=1)
    assert (input_mask.sum(dim=1) == num_masked(0.15, 32)).all()
    assert (input_ids[input_mask] == module.mask_token_id).all()
    assert (input_ids[~input_mask] == 7).all()
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_one_set_of_positions_for_the_batch_and_a_cycle_of_steps(prepared, tmp_path):
    module, _ = fit(prepared, mask_ratio=0.15, max_steps=1, mask_scope="batch", mask_cycle=2, tmp_path=tmp_path)
    batch = {"input_ids": torch.full((4, 32), 7), "sample_ids": torch.arange(4)}
    first, second, third = (module.mask_batch(batch, step=step, max_steps=3)[1] for step in range(3))
    assert first.any()
    assert (first == first[0]).all()
    assert not torch.equal(first, second)
    assert torch.equal(first, third)


def test_the_last_position_is_never_masked_as_in_the_released_code(prepared, tmp_path):
    options = {"mask_scope": "batch", "protect": ["last"]}
    module, _ = fit(prepared, mask_ratio=0.9, max_steps=1, tmp_path=tmp_path, **options)
    batch = {"input_ids": torch.full((4, 32), 7), "sample_ids": torch.arange(4)}
    _, input_mask = module.mask_batch(batch, step=0, max_steps=1)
    assert (input_mask.sum(dim=1) == num_masked(0.9, 32)).all()
    assert not input_mask[:, -1].any()


def test_the_schedule_is_followed_by_optimizer_step(prepared, tmp_path):
    _, losses = fit(prepared, mask_ratio=WarmupHold(0.5, warmup_steps=4, hold_off=1), max_steps=3, tmp_path=tmp_path)
    _, plain_losses = fit(prepared, mask_ratio=0.0, max_steps=3, tmp_path=tmp_path)
    assert losses[:4] == plain_losses[:4], "steps 0 and 1, two micro-batches each, are not masked"
    assert losses[4] != plain_losses[4]


def test_spans_are_masked(prepared, tmp_path):
    module, _ = fit(prepared, mask_ratio=0.25, max_steps=1, span_len=4, tmp_path=tmp_path)
    batch = {"input_ids": torch.full((50, 32), 7), "sample_ids": torch.arange(50)}
    _, input_mask = module.mask_batch(batch, step=0, max_steps=1)
    assert input_mask.sum(dim=1).tolist() == [8] * 50
    starts = (input_mask & ~input_mask.roll(1, dims=1)).sum(dim=1)
    assert starts.max() == 2, "two spans of 4, or one of 8"


def test_special_and_rare_tokens_are_never_masked(prepared, tmp_path):
    protect = {"protect": ["eos"], "protect_rare": 0.1}
    module, _ = fit(prepared, mask_ratio=0.5, max_steps=1, tmp_path=tmp_path, **protect)
    blocks = TokenBlocks(f"{prepared.dataset}/train", 32)
    rows = torch.stack([blocks[number][:-1] for number in range(len(blocks))])
    counts = Counter(rows.flatten().tolist())
    eos = Tokenizer.load(prepared.tokenizer).eos_token_id
    protected = set(module.protected.nonzero().flatten().tolist())
    share = sum(counts[token] for token in protected) / rows.numel()  # EOS is one of the rare here
    next_share = min(counts[token] for token in counts.keys() - protected) / rows.numel()
    assert 0.02 < share < 0.11, "the run counts a few epochs and a part of one"
    assert share + next_share > 0.09
    _, input_mask = module.mask_batch({"input_ids": rows, "sample_ids": torch.arange(len(rows))}, step=0, max_steps=1)
    assert input_mask.any()
    assert not protected & set(rows[input_mask].tolist())
    module.protect_rare = 0.0
    module.on_fit_start()
    assert module.protected.nonzero().flatten().tolist() == [eos]
    module.protect = ["bos"]
    module.data.tokenizer.bos_token_id = 7
    module.on_fit_start()
    assert module.protected.nonzero().flatten().tolist() == [7]


def test_the_split_into_micro_batches_changes_nothing(prepared, tmp_path):
    whole, _ = fit(prepared, mask_ratio=0.15, micro_batch_size=8, tmp_path=tmp_path)
    for micro_batch_size in (1, 2):
        split, _ = fit(prepared, mask_ratio=0.15, micro_batch_size=micro_batch_size, tmp_path=tmp_path)
        for name, tensor in whole.decoder.state_dict().items():
            torch.testing.assert_close(tensor, split.decoder.state_dict()[name], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ whole runs


def test_pretraining_goes_on_from_a_checkpoint_of_transformers(prepared, tmp_path, source_folder):
    from transformers import LlamaForCausalLM

    module = MEAPPretraining(init_from=str(source_folder), mask_ratio=0.15, optimizer=AdamW(lr=1e-12, final_lr=0))
    module, _ = fit(prepared, mask_ratio=None, module=module, max_steps=1, tmp_path=tmp_path)
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(source_folder)(tokens).logits
        torch.testing.assert_close(module.decoder.logits(module.decoder(tokens)), expected, atol=1e-4, rtol=0)


def test_what_a_run_logs(toy_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    longer = ["--data.seq_len=192", "--model.decoder.max_seq_len=192"]
    cli = run(toy_recipe, *longer, "--probe.lengths=[192]", "--probe.num_items=2")
    folder = tmp_path / "runs" / "toy" / "version_0"
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert len(scalars["train/loss"]) == 12
    assert [event.step for event in events.Scalars("val/loss")] == [4, 9, 11]  # Lightning counts from 0
    assert scalars["val/perplexity"][-1] == pytest.approx(torch.tensor(scalars["val/loss"][-1]).exp().item(), rel=1e-4)
    assert scalars["mask/ratio"] == pytest.approx([0.15] * 12)
    assert scalars["mask/realised_ratio"] == pytest.approx([28 / 192] * 12)
    assert scalars["throughput/tokens_seen"] == [8 * 192 * step for step in range(1, 13)]
    assert all(value > 0 for value in scalars["throughput/tokens_per_second"])
    for tag in ("train/lr", "train/grad_norm", "memory/gigabytes", "throughput/model_teraflops_per_second"):
        assert len(scalars[tag]) == 12, tag
    assert "retrieval" in events.Tags()["images"]
    assert any("recipe" in tag for tag in events.Tags()["tensors"])
    assert (folder / "retrieval.png").is_file()
    saved = (folder / "config.yaml").read_text()
    assert "ratio: 0.15" in saved
    assert "seed: 1" in saved
    assert cli.model.config.vocab_size == 320


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.decoder.vocab_size", "256"], r"vocab_size 256 is smaller than the tokenizer's 320 tokens"),
        (["--data.seq_len", "65"], r"65 tokens \(data.seq_len 65\), is longer than the model's context, 64 tokens;"),
        (["--trainer.gradient_clip_algorithm", "value"], r"gradient_clip_algorithm value is not supported; use norm"),
        (["--model.mask_cycle", "0"], r"mask_cycle must be at least 1, got 0"),
        (["--model.span_len", "0"], r"^model.span_len must be at least 1, got 0$"),
        (["--model.protect_rare", "10"], r"^model.protect_rare must be in \[0, 1\), got 10; write 0.1 for 10%$"),
        (["--model.protect_rare", "-0.1"], r"^model.protect_rare must be in \[0, 1\), got -0.1$"),
        (["--data.micro_batch_size", "3"], r"global_batch_size 8 cannot be divided by .* 3 x 1 devices = 3"),
    ],
)
def test_wrong_values_are_named(toy_recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        run(toy_recipe, *overrides)


def test_a_module_without_a_datamodule_is_refused(tmp_path):
    module = MEAPPretraining(decoder=TOY, mask_ratio=0.15, optimizer=AdamW())
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match=r"^the model needs a datamodule, .*; call trainer.fit\(module, datamodule="):
        trainer.fit(module, DataLoader([0]))


def test_float16_is_refused():
    module = MEAPPretraining(decoder=TOY, mask_ratio=0.15, optimizer=AdamW())
    module.trainer = trainer_of(precision="16-mixed")  # on a CPU the Trainer itself falls back to bfloat16
    with pytest.raises(UserError, match=r"trainer.precision 16-mixed is not supported: .*; use bf16-mixed"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("capability", "precision", "device", "warns"),
    [
        ("AVX2", "bf16-mixed", "cpu", True),
        ("AVX2", "bf16-true", "cpu", True),
        ("AVX2", "32-true", "cpu", False),
        ("AVX512", "bf16-mixed", "cpu", False),
        ("AVX2", "bf16-mixed", "cuda", False),
    ],
)
def test_bfloat16_on_a_cpu_that_multiplies_it_slowly_is_a_warning(monkeypatch, capability, precision, device, warns):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    module = MEAPPretraining(decoder=TOY, mask_ratio=0.15, optimizer=AdamW())
    module.trainer = trainer_of(device, precision=precision)
    with warnings.catch_warnings(record=True) as caught:
        module.setup("fit")
    found = [str(one.message) for one in caught]
    assert bool(found) == warns
    assert all(f"trainer.precision 32-true is much faster here than {precision}" in one for one in found)


def test_a_context_is_extended_and_goes_out_with_the_model(toy_recipe, source_folder, tmp_path):
    """A checkpoint of 400 positions goes on at 512 with another rotary base; transformers agrees with the result."""
    context = ["--model.context.max_seq_len", "512", "--model.context.rope_theta", "640000"]
    context += ["--model.context.rope_scaling", "{type: linear, factor: 2}", "--data.seq_len", "500"]
    source = ["--model.decoder", "null", "--model.init_from", str(source_folder), "--budget.max_steps", "1"]
    cli = RecipeCLI.run(["fit", "--config", str(toy_recipe), *source, *context, "--data.global_batch_size", "4"])
    Export(checkpoint=str(tmp_path / "runs" / "toy"), output=str(tmp_path / "exported")).run()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert exported.config.max_position_embeddings == 512
    assert exported.config.rope_parameters["rope_theta"] == 640_000
    assert exported.config.rope_parameters["factor"] == 2
    input_ids = torch.arange(500)[None] % 300
    decoder = cli.model.decoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(decoder(input_ids)), exported(input_ids).logits, atol=1e-4, rtol=0)


def test_a_context_of_random_weights_is_refused(toy_recipe):
    with pytest.raises(UserError, match=r"^model.context needs model.init_from; for random weights"):
        RecipeCLI.run(["fit", "--config", str(toy_recipe), "--model.context.max_seq_len", "512"])


@pytest.mark.parametrize(
    ("device", "compile", "is_compiled"),
    [("cpu", "auto", False), ("cuda", "auto", True), ("cpu", True, True), ("cuda", False, False)],
)
def test_blocks_are_compiled_on_a_gpu_unless_the_recipe_says_otherwise(monkeypatch, device, compile, is_compiled):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    module = MEAPPretraining(decoder=TOY, mask_ratio=0.15, optimizer=AdamW(), compile=compile)
    module.trainer = trainer_of(device)
    module.configure_model()
    assert module.is_compiled is is_compiled
    assert len(compiled) == (TOY.num_layers if is_compiled else 0)


def test_the_logged_loss_of_many_micro_batches_is_exact_in_bf16_true(toy_recipe, tmp_path, monkeypatch):
    """Summed in bfloat16, 64 times 10 / 64 is 9.6."""
    monkeypatch.setattr(
        MEAPPretraining,
        "_summed_loss",
        lambda self, input_ids, labels: self.decoder(input_ids).sum() * 0 + 10 * labels.numel(),
    )
    words = ["--trainer.precision", "bf16-true", "--data.global_batch_size", "64", "--data.micro_batch_size", "1"]
    words += ["--budget.max_steps", "1", "--trainer.log_every_n_steps", "1"]
    cli = RecipeCLI.run(["fit", "--config", str(toy_recipe), *words])
    assert cli.trainer.callback_metrics["train/loss"] == 10


def test_a_run_that_compiles_says_so_at_its_first_step(toy_recipe, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    for words in ([], ["--model.compile", "true"]):
        caplog.clear()
        with caplog.at_level("INFO"):
            RecipeCLI.run(["fit", "--config", str(toy_recipe), "--budget.max_steps", "1", *words])
        assert ("the first step compiles the blocks" in caplog.text) is bool(words)
