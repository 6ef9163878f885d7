"""Fine-tuning on duplicated sequences, against the same training written down plainly."""

import dataclasses
import json
import shutil
from contextlib import nullcontext
from functools import partial
from itertools import islice
from unittest import mock

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from meap_lit.callbacks import Budget
from meap_lit.checkpoint.export import Export
from meap_lit.checkpoint.source import open_source
from meap_lit.data.finetuning import FineTuningData
from meap_lit.data.store.manifest import load_samples
from meap_lit.data.stream.chat import ChatSamples
from meap_lit.data.stream.micro_batches import Slice
from meap_lit.errors import UserError
from meap_lit.inference.language_model import LanguageModel
from meap_lit.masking.duplication import Duplication, concatenate, masked_copy, original
from meap_lit.model import IGNORE_INDEX, Decoder, DecoderConfig, linear_cross_entropy, recompute
from meap_lit.model.attention import Documents
from meap_lit.model.lora import LoRA
from meap_lit.modules import AdamW, MEAPFineTuning
from meap_lit.modules.resume import check_same_model
from tests.support.hf_models import edit_config

TOY = DecoderConfig(num_layers=2, num_heads=2, num_kv_heads=1, hidden_size=32, intermediate_size=64, max_seq_len=400)
OPTIMIZER = AdamW(lr=1e-3, final_lr=1e-4)
SHORT = Duplication(min_copied=10, mask_ratio=0.2)
SEPARATE = Duplication(min_copied=10, mask_ratio=0.2, layout="separate")


class Recorder(L.Callback):
    """Keeps the batches and losses of the training steps, and what was logged last."""

    def __init__(self):
        self.batches, self.losses, self.logged = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def make_data(prepared, chat, duplication=SHORT, **kwargs):
    kwargs = {"seq_len": 400, "global_batch_size": 4, "micro_batch_size": 2, "num_workers": 0, **kwargs}
    return FineTuningData(duplication=duplication, datasets=chat, tokenizer=prepared.tokenizer, **kwargs)


def fit(prepared, chat, duplication=SHORT, *, max_steps=4, tmp_path, module=None, ckpt_path=None, trainer=(), **data):
    L.seed_everything(3)
    module = module or MEAPFineTuning(decoder=TOY, optimizer=OPTIMIZER)
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
        **dict(trainer),
    )
    trainer.fit(module, datamodule=make_data(prepared, chat, duplication, **data), ckpt_path=ckpt_path)
    return module, recorder


def assert_same_weights(one, other, **tolerance):
    for (name, a), (_, b) in zip(one.decoder.state_dict().items(), other.decoder.state_dict().items(), strict=True):
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance)
        else:
            assert torch.equal(a, b), name


# --------------------------------------------------------------------------------------------------- the loss


def document_loss(decoder, document):
    """Summed loss of one document on its own, by plain PyTorch."""
    hidden = decoder(document.input_ids[None], document.position_ids[None])
    return F.cross_entropy(
        decoder.logits(hidden)[0].double(), document.labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )


@pytest.mark.parametrize("duplication", [SHORT, Duplication(0.2, "concat", "restarted", 10), SEPARATE], ids=str)
def test_a_packed_step_is_its_samples_one_by_one(prepared, chat, tmp_path, duplication):
    """Rows are rebuilt from the order's keys by hand; loss and gradients equal those of the packed batch."""
    module, recorder = fit(prepared, chat, duplication, max_steps=1, micro_batch_size=4, tmp_path=tmp_path)
    (batch,) = recorder.batches
    data = module.trainer.datamodule
    rows = list(islice(data.order().iterate(0), 4))
    samples = ChatSamples(f"{chat}/train", 320)
    torch.manual_seed(0)
    decoder = Decoder(module.config)

    documents = []
    for row in rows:
        for (_, index, epoch), has_original, has_copy in row.documents:
            input_ids, answers = samples[index]
            copy = partial(
                masked_copy, mask_token_id=data.tokenizer.mask_token_id, seed=0, sample_id=index, visit=epoch
            )
            parts = [original(input_ids, answers)] * has_original
            parts += [copy(input_ids, answers, duplication)] * has_copy
            documents.append(parts[0] if len(parts) == 1 else concatenate(*parts, duplication.copy_positions))
    assert batch["num_copies"] >= 3, "there is something to compare"
    assert batch["num_labels"] == sum(int((document.labels != IGNORE_INDEX).sum()) for document in documents)
    expected = sum(document_loss(decoder, document) for document in documents) / batch["num_labels"]
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()

    module.decoder = decoder
    loss = module._losses(batch)[0] / batch["num_labels"]
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_ratio_zero_is_plain_fine_tuning_bit_for_bit(prepared, chat, tmp_path, layout):
    duplication = Duplication(mask_ratio=0.0, layout=layout, min_copied=10)
    module, recorder = fit(prepared, chat, duplication, max_steps=6, micro_batch_size=4, tmp_path=tmp_path)

    # the same training written down plainly: rows of samples, labels where the answers are
    L.seed_everything(3)
    plain = Decoder(module.config)
    adamw = OPTIMIZER.build(plain)
    samples = ChatSamples(f"{chat}/train", 320)
    rows = module.trainer.datamodule.order().iterate(0)
    for step, batch in enumerate(recorder.batches):
        input_ids, position_ids = torch.full((2, 4, 400), module.trainer.datamodule.tokenizer.eos_token_id)
        labels = torch.full((4, 400), IGNORE_INDEX)
        lengths = []
        for place, row in enumerate(islice(rows, 4)):
            start = 0
            for document in row.documents:
                tokens, answers = samples[document.visit.sample]
                input_ids[place, start : start + len(tokens)] = tokens
                position_ids[place, start : start + len(tokens)] = torch.arange(len(tokens))
                for answer in answers:
                    target = slice(start + answer.start - 1, start + answer.end - 1)
                    labels[place, target] = tokens[answer.start : answer.end]
                start += len(tokens)
            position_ids[place, start:] = 0
            lengths.append([len(samples[document.visit.sample][0]) for document in row.documents])
        for group in adamw.param_groups:
            group["lr"] = OPTIMIZER.lr * OPTIMIZER.lr_factor(step, 6)
        hidden = plain(input_ids, position_ids, Documents.of_rows(lengths, 400))
        num_labels = int((labels != IGNORE_INDEX).sum())
        loss = linear_cross_entropy(hidden, plain.lm_head.weight, labels, batch["label_positions"])[0] / num_labels
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        assert batch["num_copies"] == 0
        assert loss.item() == recorder.losses[step]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, module.decoder.state_dict()[name]), name


def test_the_split_into_micro_batches_changes_nothing(prepared, chat, tmp_path):
    whole, _ = fit(prepared, chat, micro_batch_size=4, tmp_path=tmp_path)
    for micro_batch_size in (1, 2):
        split, _ = fit(prepared, chat, micro_batch_size=micro_batch_size, tmp_path=tmp_path)
        assert_same_weights(whole, split, atol=1e-5, rtol=1e-4)


def test_what_is_logged_of_a_step(prepared, chat, tmp_path):
    """Over both micro-batches of the last step."""
    module, recorder = fit(prepared, chat, max_steps=2, tmp_path=tmp_path)
    logged, batch = recorder.logged[-1], recorder.batches[-1]
    step = recorder.batches[-2:]
    num_masked = sum(int((part["input_ids"] == module.data.tokenizer.mask_token_id).sum()) for part in step)
    num_answer = sum(int(((part["labels"] != IGNORE_INDEX) & ~part["in_copy"]).sum()) for part in step)
    assert batch["num_masked"] == num_masked > 0
    assert batch["num_labels"] == num_masked + num_answer
    assert logged["data/copies"] == batch["num_copies"] > 0
    assert logged["data/masked_tokens"] == num_masked
    assert logged["data/share_of_real_tokens"] == pytest.approx(batch["num_tokens"] / (4 * 400), rel=1e-6)
    # Lightning hands on a micro-batch's share of the step's loss
    assert logged["train/loss"] == pytest.approx(sum(recorder.losses[-2:]), rel=1e-5)
    parts = logged["train/answer_loss"] * num_answer + logged["train/masked_loss"] * num_masked
    assert logged["train/loss"] == pytest.approx(parts / batch["num_labels"], rel=1e-5)


def test_validation_is_clean_and_does_not_depend_on_rows(prepared, chat, tmp_path):
    module, _ = fit(prepared, chat, max_steps=1, tmp_path=tmp_path)
    samples = ChatSamples(f"{chat}/val", 320)
    documents = [original(*samples[index]) for index in range(len(load_samples(chat, "val").num_tokens))]
    with torch.no_grad():
        total = sum(document_loss(module.decoder, document) for document in documents)
    expected = float(total) / sum(int((document.labels != IGNORE_INDEX).sum()) for document in documents)
    for micro_batch_size in (1, 2, 4):
        data = make_data(prepared, chat, micro_batch_size=micro_batch_size)
        (metrics,) = module.trainer.validate(module, datamodule=data, verbose=False)
        assert metrics["val/loss"] == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------- adapters, checkpointing


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=4, targets=["q_proj", "down_proj"], dropout=0.1)])
def test_activation_checkpointing_changes_no_bit(prepared, chat, tmp_path, lora, mode):
    kept = MEAPFineTuning(decoder=TOY, optimizer=OPTIMIZER, lora=lora)
    again = MEAPFineTuning(decoder=TOY, optimizer=OPTIMIZER, lora=lora, activation_checkpointing=mode)
    for module, recomputes in ((kept, False), (again, True)):
        L.seed_everything(3)
        with mock.patch("meap_lit.model.recompute.checkpoint", wraps=recompute.checkpoint) as checkpoint:
            fit(prepared, chat, tmp_path=tmp_path, module=module)
        assert checkpoint.called == recomputes
    assert_same_weights(kept, again)


@pytest.mark.parametrize("stated_in", ["config.json", "generation_config.json"])
def test_what_the_base_said_of_stops_and_positions_is_exported(prepared, chat, tmp_path, source_folder, stated_in):
    base = shutil.copytree(source_folder, tmp_path / "base")
    positions = {"max_position_embeddings": 800, "sliding_window": 400}
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    edit_config(base, architectures=["MistralForCausalLM"], model_type="mistral", **positions)
    stated = json.loads((base / stated_in).read_text()) | {"eos_token_id": [270, 271]}
    (base / stated_in).write_text(json.dumps(stated))

    module = MEAPFineTuning(init_from=str(base), optimizer=OPTIMIZER)
    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=module, max_steps=1)
    module.trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    stops = sorted({270, 271, *module.trainer.datamodule.stop_token_ids})
    assert len(stops) > 2
    options = {"tokenizer": prepared.tokenizer, "output": str(tmp_path / "out")}
    Export(checkpoint=str(tmp_path / "tuned.ckpt"), **options).run()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["temperature"]) == (stops, 0.5)
    assert written["eos_token_id"] == stops
    assert {name: written[name] for name in positions} == positions
    assert LanguageModel(str(tmp_path / "out")).stop_token_ids == stops
    assert LanguageModel(str(tmp_path / "tuned.ckpt"), prepared.tokenizer).stop_token_ids == stops


def test_adapters_alone_are_trained_and_saved(prepared, chat, tmp_path, source_folder):
    lora = LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"])

    def adapted(optimizer=OPTIMIZER):
        return MEAPFineTuning(init_from=str(source_folder), optimizer=optimizer, lora=lora)

    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=adapted())
    module.trainer.save_checkpoint(tmp_path / "adapters.ckpt")
    checkpoint = torch.load(tmp_path / "adapters.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names == {f"decoder.layers.{n}.self_attn.{p}_proj.lora_{x}" for n in (0, 1) for p in "qv" for x in "ab"}
    start = adapted()
    start, _ = fit(prepared, chat, tmp_path=tmp_path, module=start, max_steps=1)
    for name, tensor in module.decoder.state_dict().items():
        trained = "lora" in name
        assert torch.equal(tensor, start.decoder.state_dict()[name]) != trained, name

    still = adapted(AdamW(lr=1e-30, final_lr=0.0))  # one more step changes nothing
    fit(prepared, chat, tmp_path=tmp_path, module=still, max_steps=5, ckpt_path=tmp_path / "adapters.ckpt")
    assert still.global_step == 5
    assert_same_weights(module, still)


def test_weights_are_kept_in_the_precision_of_the_trainer(prepared, chat, tmp_path, source_folder):
    module = MEAPFineTuning(init_from=str(source_folder), optimizer=OPTIMIZER)
    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=module, trainer={"precision": "bf16-true"})
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        (
            LoRA(),
            LoRA(rank=4),
            "adapters have model.lora.rank 8, those of the recipe 4; leave it as it was, or start a new run",
        ),
        (LoRA(), LoRA(alpha=8), "adapters have model.lora.alpha 16, those of the recipe 8; leave it as it was"),
        (
            LoRA(),
            LoRA(targets=["q_proj"]),
            r"model.lora.targets \[q_proj, v_proj\], those of the recipe \[q_proj\]; leave it",
        ),
        (
            LoRA(),
            LoRA(targets=["q_proj", "k_proj"]),
            r"lora.targets \[q_proj, v_proj\], those of the recipe \[k_proj, q_proj\]",
        ),
        (LoRA(), None, r"the checkpoint has adapters, and the recipe has no model.lora; set it as it was: .*'rank': 8"),
        (None, LoRA(), "the checkpoint has no adapters, and the recipe has model.lora; leave it out"),
    ],
)
def test_other_adapters_than_the_checkpoint_has_are_refused(saved, now, message):
    about = {"lora": saved and dataclasses.asdict(saved)}
    with pytest.raises(UserError, match=message):
        check_same_model(about, DecoderConfig(vocab_size=8), now, {})


def test_a_run_and_a_validation_compare_adapters(prepared, chat, tmp_path, source_folder):
    def adapted(lora):
        return MEAPFineTuning(init_from=str(source_folder), optimizer=OPTIMIZER, lora=lora)

    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=adapted(LoRA()), max_steps=1)
    checkpoint = tmp_path / "adapters.ckpt"
    module.trainer.save_checkpoint(checkpoint)
    with pytest.raises(UserError, match=r"adapters have model.lora.rank 8, those of the recipe 4"):
        fit(prepared, chat, tmp_path=tmp_path, module=adapted(LoRA(rank=4)), ckpt_path=checkpoint)
    data = make_data(prepared, chat)
    with pytest.raises(UserError, match=r"the checkpoint has adapters, and the recipe has no model.lora"):
        module.trainer.validate(adapted(None), datamodule=data, ckpt_path=checkpoint, verbose=False)


def test_targets_may_be_named_in_another_order_and_dropout_may_change(prepared, chat, tmp_path, source_folder):
    def adapted(targets, **lora):
        return MEAPFineTuning(init_from=str(source_folder), optimizer=OPTIMIZER, lora=LoRA(targets=targets, **lora))

    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=adapted(["q_proj", "v_proj"]), max_steps=1)
    module.trainer.save_checkpoint(tmp_path / "adapters.ckpt")
    other = adapted(["v_proj", "q_proj"], dropout=0.1)
    resumed, _ = fit(prepared, chat, tmp_path=tmp_path, module=other, ckpt_path=tmp_path / "adapters.ckpt", max_steps=2)
    assert resumed.trainer.global_step == 2


def test_dropout_follows_from_seed_step_micro_batch_and_rank_and_leaves_the_random_state_alone(
    prepared, chat, tmp_path
):
    module = MEAPFineTuning(decoder=TOY, optimizer=OPTIMIZER, lora=LoRA(dropout=0.5))
    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=module, max_steps=1)  # of two micro-batches
    state = torch.get_rng_state()

    def drawn(batch_idx=0, seed=0, step=1, rank=0):
        torch.rand(batch_idx)
        with (
            mock.patch.object(module.data, "seed", seed),
            mock.patch.object(type(module), "global_step", step),
            mock.patch.object(type(module.data), "rank_slice", Slice(rank, 2)),
            module.dropout_of(batch_idx),
        ):
            return tuple(torch.rand(8).tolist())

    assert drawn(0) == drawn(0) == drawn(2), "a micro-batch is counted within its step"
    assert len({drawn(), drawn(1), drawn(seed=1), drawn(step=2), drawn(rank=1)}) == 5
    torch.set_rng_state(state)
    with module.dropout_of(1):
        torch.rand(8)
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_of_another_model_are_refused(prepared, chat, tmp_path, source_folder):
    def adapted(folder):
        return MEAPFineTuning(init_from=str(folder), optimizer=OPTIMIZER, lora=LoRA())

    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=adapted(source_folder))
    module.trainer.save_checkpoint(tmp_path / "adapters.ckpt")
    for name in ("copy", "other"):
        shutil.copytree(source_folder, tmp_path / name)
    options = {"ckpt_path": tmp_path / "adapters.ckpt", "max_steps": module.trainer.global_step + 1}
    fit(prepared, chat, tmp_path=tmp_path, module=adapted(tmp_path / "copy"), **options)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, tmp_path / "other/model.safetensors")
    with pytest.raises(
        UserError, match=r"adapters were trained on .*source0, model.init_from is .*other now, a model wi"
    ):
        fit(prepared, chat, tmp_path=tmp_path, module=adapted(tmp_path / "other"), ckpt_path=tmp_path / "adapters.ckpt")


def test_adapters_never_go_onto_another_model_of_the_same_name(prepared, chat, tmp_path, source_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source_folder, tmp_path / "model")
    module = MEAPFineTuning(init_from="model", optimizer=OPTIMIZER, lora=LoRA())
    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=module)
    module.trainer.save_checkpoint(tmp_path / "adapters.ckpt")
    assert open_source(tmp_path / "adapters.ckpt").base
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, tmp_path / "model/model.safetensors")
    with pytest.raises(
        UserError, match=r"model cannot be opened: model has other weights than the model that they were"
    ):
        open_source(tmp_path / "adapters.ckpt")


@pytest.mark.parametrize(
    ("now", "is_refused"),
    [
        ("elsewhere/checkpoints/step=1000.ckpt", False),  # moved with its run
        ("run/checkpoints/step=5000.ckpt", True),  # the run went on, and keeps two
        ("elsewhere/model", True),
    ],
)
def test_adapters_of_a_checkpoint_that_is_gone(now, is_refused):
    config = DecoderConfig(vocab_size=8)
    about = {"lora": dataclasses.asdict(LoRA()), "init_from": "/gone/run/checkpoints/step=1000.ckpt"}
    with pytest.raises(UserError, match="adapters were trained on /gone") if is_refused else nullcontext():
        check_same_model(about, config, LoRA(), {"init_from": now})


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("duplication", "data", "message"),
    [
        (SHORT, {"seq_len": 100}, r"a sample of \d+ tokens, longer than data.seq_len 100; raise it, or prep.*100"),
        (SHORT, {"seq_len": 200}, r"samples of dataset .* do not fit twice into data.seq_len 200, the longest has"),
    ],
)
def test_rows_without_room_are_named(prepared, chat, tmp_path, duplication, data, message):
    with pytest.raises(UserError, match=message):
        fit(prepared, chat, duplication, tmp_path=tmp_path, **data)


def test_samples_without_room_can_go_without_copy(prepared, chat, tmp_path):
    duplication = Duplication(mask_ratio=0.2, min_copied=10, no_room="skip_copy")
    module, recorder = fit(prepared, chat, duplication, max_steps=2, tmp_path=tmp_path, seq_len=200)
    assert recorder.batches[0]["num_copies"] > 0
    assert any(sizes.without_room.any() for sizes in module.trainer.datamodule.sizes)


def test_text_is_no_chat(prepared, chat, tmp_path):
    with pytest.raises(UserError, match=r"holds documents of text, .* conversations.* prepare chat"):
        fit(prepared, prepared.dataset, tmp_path=tmp_path)


def test_one_of_decoder_and_init_from_is_stated():
    for arguments in ({}, {"decoder": TOY, "init_from": "x"}):
        with pytest.raises(UserError, match=r"set one of model.decoder .* and model.init_from"):
            MEAPFineTuning(optimizer=OPTIMIZER, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "model.lora.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "model.lora.alpha must be above 0, got 0"),
        ({"dropout": 1.0}, r"model.lora.dropout must be in \[0, 1\), got 1"),
        ({"targets": ["query"]}, r"model.lora.targets must name some of q_proj, .*, got \['query'\]"),
        ({"targets": []}, "model.lora.targets must name some of"),
    ],
)
def test_wrong_adapters_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        LoRA(**arguments)


def test_frozen_bfloat16_needs_autocast(prepared, chat, tmp_path):
    module = MEAPFineTuning(decoder=TOY, optimizer=OPTIMIZER, lora=LoRA(frozen_dtype="bfloat16"))
    with pytest.raises(UserError, match=r"lora.frozen_dtype bfloat16 needs trainer.precision bf16-mixed, got 32-true"):
        fit(prepared, chat, tmp_path=tmp_path, module=module)


@pytest.mark.parametrize("start", ["decoder", "init_from"])
def test_frozen_bfloat16_trains_the_adapters(prepared, chat, tmp_path, source_folder, start):
    model = {"decoder": TOY} if start == "decoder" else {"init_from": str(source_folder)}
    module = MEAPFineTuning(optimizer=OPTIMIZER, lora=LoRA(frozen_dtype="bfloat16"), **model)
    module, _ = fit(prepared, chat, tmp_path=tmp_path, module=module, trainer={"precision": "bf16-mixed"})
    attention = module.decoder.layers[0].self_attn
    assert attention.q_proj.weight.dtype == module.decoder.embed_tokens.weight.dtype == torch.bfloat16
    assert attention.q_proj.lora_b.dtype == torch.float32
    assert attention.q_proj.lora_b.abs().max() > 0
