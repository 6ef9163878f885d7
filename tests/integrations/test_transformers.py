"""The collators in transformers' Trainer and TRL's SFTTrainer, against runs of this project on the same rows."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from meap_lit.callbacks import Budget
from meap_lit.checkpoint.source import new_mask_token, open_source, vocab_size_for
from meap_lit.data.finetuning import FineTuningData
from meap_lit.data.pretraining import PretrainingData
from meap_lit.data.stream.chat import ChatSamples
from meap_lit.data.stream.order import Visit
from meap_lit.data.stream.packing import pack_rows
from meap_lit.errors import UserError
from meap_lit.hf.weights import build_decoder, load_weights
from meap_lit.integrations.transformers import (
    MEAPFineTuningCollator,
    MEAPPretrainingCollator,
    add_mask_token,
    with_sample_ids,
)
from meap_lit.masking.duplication import Duplication
from meap_lit.masking.schedules import Linear
from meap_lit.modules import AdamW, MEAPFineTuning, MEAPPretraining
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support import hf_ranks
from tests.support.hf_models import save_variant
from tests.support.word_tokenizer import save_word_level

STEPS, SEQ_LEN = 6, 32
OPTIMIZER = AdamW(lr=1e-3, final_lr=1e-4)
SHORT = Duplication(mask_ratio=0.2, min_copied=10, no_room="skip_copy")
KINDS = {"Trainer": (Trainer, TrainingArguments, {}), "SFTTrainer": (SFTTrainer, SFTConfig, {"max_length": None})}
WORKERS = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}


# ------------------------------------------------------------------------------------------------ what is compared


class Recorder(L.Callback):
    """Keeps what the decoder reads, the batches and the loss of each step."""

    def __init__(self):
        self.inputs, self.batches, self.losses = [], [], []

    def on_fit_start(self, trainer, module):
        embedding = module.decoder.embed_tokens
        embedding.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]) if module.training else None)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))  # divided by the micro-batches of a step


def train_here(module, data, tmp_path):
    """Train by Lightning, as a recipe does."""
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[Budget(max_steps=STEPS, val_every_n_steps=STEPS), recorder],
    )
    trainer.fit(module, datamodule=data)
    return recorder


def train_there(kind, model, collator, rows, tmp_path, *, max_steps=STEPS, resume=None, **options):
    """Train by a trainer of Hugging Face; what the model reads and the loss of each micro-batch."""
    trainer_class, arguments_class, defaults = KINDS[kind]
    inputs, losses = [], []

    class Recording(trainer_class):
        def training_step(self, *args, **kwargs):
            losses.append(float(super().training_step(*args, **kwargs)))
            return torch.tensor(losses[-1])

    def record(_, args):
        if model.training:
            inputs.append(args[0].clone())

    hook = model.get_input_embeddings().register_forward_pre_hook(record)
    optimizer = OPTIMIZER.build(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: OPTIMIZER.lr_factor(step, STEPS))
    arguments = {
        "output_dir": str(tmp_path / "there"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": max_steps,
        "max_grad_norm": 0,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **defaults,
        **options,
    }
    trainer = Recording(
        model=model,
        args=arguments_class(**arguments),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[collator],
        optimizers=(optimizer, schedule),
        processing_class=AutoTokenizer.from_pretrained(model.name_or_path),
    )
    trainer.train(resume_from_checkpoint=resume)
    hook.remove()
    return inputs, losses


def load(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    add_mask_token(model, tokenizer)
    return model, tokenizer


def per_step(losses):
    """Losses of steps of two micro-batches."""
    return [first + second for first, second in zip(losses[::2], losses[1::2], strict=True)]


def assert_same_weights(module, model):
    theirs = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    for name, ours in module.decoder.state_dict().items():
        torch.testing.assert_close(theirs[name], ours, rtol=1e-3, atol=2e-5)


# ------------------------------------------------------------------------------------------------ pretraining


@pytest.fixture(scope="module")
def pretrained(prepared, source_folder, tmp_path_factory):
    """A run of this project, P rising over the run, and its rows as a dataset in the order of the run."""
    module = MEAPPretraining(init_from=str(source_folder), optimizer=OPTIMIZER, mask_ratio=Linear(0.05, 0.5), seed=7)
    data = PretrainingData(
        prepared.dataset, prepared.tokenizer, seq_len=SEQ_LEN, global_batch_size=8, micro_batch_size=4, num_workers=0
    )
    recorder = train_here(module, data, tmp_path_factory.mktemp("here"))
    tokens = [torch.cat((batch["input_ids"], batch["labels"][:, -1:]), dim=1) for batch in recorder.batches]
    rows = {
        "input_ids": torch.cat(tokens).tolist(),
        "sample_id": torch.cat([batch["sample_ids"] for batch in recorder.batches]).tolist(),
    }
    return module, recorder, Dataset.from_dict(rows)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, WORKERS], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_is_that_of_this_project(pretrained, source_folder, tmp_path, kind, options):
    """Equal masks bit for bit, equal losses and equal weights at the end, with steps of two micro-batches."""
    module, ours, rows = pretrained
    model, tokenizer = load(source_folder)
    collator = MEAPPretrainingCollator(tokenizer, mask_ratio=Linear(0.05, 0.5), seed=7)
    inputs, losses = train_there(kind, model, collator, rows, tmp_path, **options)

    assert len(inputs) == len(ours.inputs) == 2 * STEPS
    for theirs, here in zip(inputs, ours.inputs, strict=True):
        assert torch.equal(theirs[:, :-1], here)
        assert (here == tokenizer.mask_token_id).any()
    torch.testing.assert_close(per_step(losses), per_step(ours.losses), rtol=1e-5, atol=1e-5)
    assert_same_weights(module, model)


@pytest.mark.slow
def test_a_resumed_run_continues_with_its_masks(pretrained, source_folder, tmp_path):
    _, ours, rows = pretrained
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    for resume in (None, str(tmp_path / "there" / "checkpoint-2")):
        model, tokenizer = load(source_folder)
        collator = MEAPPretrainingCollator(tokenizer, mask_ratio=Linear(0.05, 0.5), seed=7)
        inputs, _ = train_there("Trainer", model, collator, rows, tmp_path, resume=resume, **options)
    assert len(inputs) == 2 * (STEPS - 2)
    assert all(torch.equal(theirs[:, :-1], here) for theirs, here in zip(inputs, ours.inputs[4:], strict=True))


@pytest.mark.slow
def test_two_processes_read_what_one_reads(tmp_path):
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "tests/support/hf_ranks.py", str(tmp_path)]
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=300)
    for kind in hf_ranks.KINDS:
        hf_ranks.main(kind, tmp_path)
        files = [tmp_path / f"{kind}-{name}.json" for name in ("0-1", "0-2", "1-2")]
        alone, first, second = (json.loads(file.read_text()) for file in files)
        assert len(alone) == 8  # four steps of two micro-batches
        for whole, *parts in zip(alone, first, second, strict=True):
            assert sorted(whole) == sorted([*parts[0], *parts[1]])


@pytest.mark.parametrize("is_streamed", [False, True])
def test_sample_ids_number_the_rows(is_streamed):
    rows = short_rows(3)
    numbered = with_sample_ids(rows.to_iterable_dataset() if is_streamed else rows, source=2)
    assert [row["sample_id"] for row in numbered] == [2 * 2**32, 2 * 2**32 + 1, 2 * 2**32 + 2]


def test_shards_that_workers_would_number_by_themselves_are_refused():
    with pytest.raises(UserError, match="the streamed dataset has 2 shards, so the numbers of its rows would depend"):
        with_sample_ids(short_rows(4).to_iterable_dataset(num_shards=2))


@pytest.mark.parametrize("collator_class", [MEAPPretrainingCollator, MEAPFineTuningCollator])
def test_rows_that_are_padded_are_refused(small, collator_class):
    collator = collator_class(small[1])
    as_in_training(collator)
    row = {"input_ids": [7, 8, 9, 1], "labels": [7, 8, 9, -100], "sample_id": 0}
    assert collator([row | {"attention_mask": [1, 1, 1, 1]}])["attention_mask"].all()
    with pytest.raises(UserError, match=r"the rows are padded \(attention_mask has a 0\)"):
        collator([row | {"attention_mask": [1, 1, 1, 0]}])


def test_an_end_of_text_that_is_the_unknown_token_too_is_never_masked(small):
    tokenizer = small[1]
    tokenizer.unk_token = tokenizer.eos_token
    collator = MEAPFineTuningCollator(tokenizer, Duplication(mask_ratio=0.9, min_copied=1))
    as_in_training(collator)
    ids = [7, 8, 9, 10, 11, tokenizer.eos_token_id]
    (copy,) = collator([{"input_ids": ids, "labels": ids, "sample_id": 0}])["input_ids"][:, len(ids) :]
    assert (copy[:-1] == tokenizer.mask_token_id).any()
    assert copy[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("window", "num_tokens"), [(None, 60), (32, 30)])
def test_a_copy_needs_room_in_the_window(small, window, num_tokens):
    model, tokenizer = small
    model.config.sliding_window = window
    collator = MEAPFineTuningCollator(tokenizer, Duplication(mask_ratio=0.5, min_copied=1, no_room="skip_copy"))
    collator.is_callback = True
    collator.on_train_begin(None, TrainerState(), None, model=model)
    ids = list(range(10, 40))
    assert collator([{"input_ids": ids, "labels": ids, "sample_id": 0}])["input_ids"].size(1) == num_tokens
    collator.on_train_end(None, None, None, model=model)


@pytest.fixture
def small(source_folder):
    model, tokenizer = load(source_folder)
    return model, tokenizer


def short_rows(num=8):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (num,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [torch.randint(5, 300, (n,), generator=generator).tolist() for n in lengths]}
    )


def batches_of(kind, model, collator, rows, tmp_path, **options):
    """What the model is called with in training, and in an evaluation after it."""
    called = []
    hook = model.model.register_forward_pre_hook(lambda _, args, kwargs: called.append(kwargs), with_kwargs=True)
    train_there(kind, model, collator, rows, tmp_path, gradient_accumulation_steps=1, max_steps=2, **options)
    hook.remove()
    return called


@pytest.mark.slow
def test_padding_the_last_token_and_protected_tokens_are_never_masked(small, tmp_path):
    model, tokenizer = small
    rows = with_sample_ids(short_rows())
    protected = sorted({ids[0] for ids in rows["input_ids"]})
    collator = MEAPPretrainingCollator(tokenizer, mask_ratio=0.3, seed=1, protected_ids=protected)
    masked = 0
    for number, batch in enumerate(batches_of("Trainer", model, collator, rows, tmp_path)):
        for row, input_ids, attention in zip(
            rows.select(range(4 * number, 4 * number + 4)), batch["input_ids"], batch["attention_mask"], strict=True
        ):
            ids = torch.tensor(row["input_ids"])
            input_mask = input_ids[: len(ids)] != ids
            assert attention.tolist() == [1] * len(ids) + [0] * (len(input_ids) - len(ids))
            assert (input_ids[len(ids) :] == tokenizer.eos_token_id).all()
            assert (input_ids[: len(ids)][input_mask] == tokenizer.mask_token_id).all()
            may = [token not in protected for token in ids[:-1].tolist()]
            assert input_mask.sum() == min(max(1, int(0.3 * (len(ids) - 1))), sum(may))
            assert not input_mask[-1]
            assert not input_mask[:-1][~torch.tensor(may)].any()
            masked += int(input_mask.sum())
    assert masked > 20


def as_in_training(collator):
    collator.is_callback = True
    collator._is_training.fill_(1)


def test_masks_do_not_depend_on_padding_or_on_the_rows_beside(small):
    _, tokenizer = small
    rows = list(with_sample_ids(short_rows()))
    collator = MEAPPretrainingCollator(tokenizer, mask_ratio=0.3)
    as_in_training(collator)
    batch = collator(rows)
    together = collator._masked(batch["input_ids"], batch["attention_mask"], batch["sample_ids"])
    for row, input_ids in zip(rows, together, strict=True):
        alone = collator([row])
        (expected,) = collator._masked(alone["input_ids"], alone["attention_mask"], alone["sample_ids"])
        assert torch.equal(input_ids[: len(expected)], expected)


def test_ratio_zero_is_the_plain_batch(small):
    _, tokenizer = small
    rows = list(with_sample_ids(short_rows()))
    collator = MEAPPretrainingCollator(tokenizer, mask_ratio=0.0)
    as_in_training(collator)
    batch = collator(rows)
    sample_ids = batch["sample_ids"]
    assert collator.prepare_inputs(batch, sample_ids, True)["input_ids"] is batch["input_ids"]
    for row, input_ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        padding = len(input_ids) - len(row["input_ids"])
        assert input_ids == row["input_ids"] + [tokenizer.eos_token_id] * padding
        assert labels == row["input_ids"] + [-100] * padding


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_never_masked(small, tmp_path, kind):
    model, tokenizer = small
    collator = MEAPPretrainingCollator(tokenizer, mask_ratio=0.5)
    rows = with_sample_ids(short_rows())
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append((model.training, args[0])))
    trainer_class, arguments_class, defaults = KINDS[kind]
    arguments = arguments_class(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=2,
        report_to="none",
        eval_strategy="steps",
        eval_steps=1,
        **defaults,
    )
    trainer = trainer_class(
        model, arguments, train_dataset=rows, eval_dataset=short_rows(), data_collator=collator, callbacks=[collator],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    masked = {True: [], False: []}
    for training, input_ids in seen:
        masked[training].append(bool((input_ids == tokenizer.mask_token_id).any()))
    assert masked == {True: [True, True], False: [False, False]}


# ------------------------------------------------------------------------------------------------ fine-tuning

NUM_SAMPLES = 24


class InOrder(FineTuningData):
    """The first conversations of a dataset, two epochs in its order: four a micro-batch, eight a step."""

    def train_dataloader(self):
        reader = self._reader("train")
        self.documents, batches = [], []
        for epoch in range(2):
            for start in range(0, NUM_SAMPLES, 8):
                step = []
                for first in (start, start + 4):
                    visits = [Visit(0, sample, epoch) for sample in range(first, first + 4)]
                    step.append(pack_rows(visits, self.sizes, self.seq_len, self.duplication.layout))
                    keys = sorted(key for row in step[-1] for key in row.documents)
                    keys.sort(key=lambda key: (key.visit.sample, not key.has_original))
                    self.documents.append([reader.document(key) for key in keys])
                batches += [reader.read(rows, step[0] + step[1], len(rows)) for rows in step]
        return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)

    def samples(self):
        """Return the same conversations as rows for the collator."""
        reader = self._reader("train")
        return [reader.sources[0][number] for number in range(NUM_SAMPLES)]


LAYOUTS = [
    SHORT,
    Duplication(0.2, "concat", "restarted", 10, "skip_copy"),
    Duplication(0.2, "separate", min_copied=10),
    Duplication(0.0, "concat", min_copied=10),
]


def labels_of(input_ids, answers):
    """Labels as Hugging Face has them: at the learned tokens themselves."""
    labels = [-100] * len(input_ids)
    for start, _, end in answers:
        labels[start:end] = input_ids[start:end].tolist()
    return labels


@pytest.mark.slow
@pytest.mark.parametrize("duplication", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("Trainer", {**WORKERS, "dataloader_persistent_workers": True}), ("SFTTrainer", WORKERS)],
    ids=str,
)
def test_fine_tuning_is_that_of_this_project(prepared, chat, source_folder, tmp_path, kind, options, duplication):
    """Equal copies and masks bit for bit, equal losses and weights, over two epochs; answers are found in labels."""
    data = InOrder(
        duplication=duplication, datasets=chat, tokenizer=prepared.tokenizer, seq_len=400, global_batch_size=8,
        micro_batch_size=4, num_workers=0, seed=5,
    )  # fmt: skip
    module = MEAPFineTuning(init_from=str(source_folder), optimizer=OPTIMIZER)
    ours = train_here(module, data, tmp_path)

    samples = data.samples()
    rows = [{"input_ids": ids.tolist(), "labels": labels_of(ids, answers)} for ids, answers in samples]
    model, tokenizer = load(source_folder)
    collator = MEAPFineTuningCollator(tokenizer, duplication, seed=5)
    assert [collator._answers(row) for row in rows] == [answers for _, answers in samples]
    rows = with_sample_ids(Dataset.from_list(rows))
    inputs, losses = train_there(kind, model, collator, rows, tmp_path, **options)

    num_masked = []
    for theirs, documents in zip(inputs, data.documents, strict=True):
        for input_ids, document in zip(theirs, documents, strict=True):
            assert torch.equal(input_ids[: len(document)], document.input_ids)
            assert (input_ids[len(document) :] == tokenizer.eos_token_id).all()
        num_masked.append(int((theirs == tokenizer.mask_token_id).sum()))
    assert all(num_masked) == (duplication.mask_ratio > 0)
    epochs = inputs[:6], inputs[6:]
    assert all(torch.equal(one, other) for one, other in zip(*epochs, strict=True)) == (duplication.mask_ratio == 0)
    torch.testing.assert_close(per_step(losses), per_step(ours.losses), rtol=1e-5, atol=1e-5)
    assert_same_weights(module, model)


@pytest.fixture(scope="module")
def conversations(chat, prepared):
    """The conversations of `chat` as rows with labels."""
    samples = ChatSamples(f"{chat}/train", 320)
    rows = [samples[number] for number in range(NUM_SAMPLES)]
    return Dataset.from_list([{"input_ids": ids.tolist(), "labels": labels_of(ids, answers)} for ids, answers in rows])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_fine_tuning_continues_with_the_masks_of_its_epoch(source_folder, conversations, tmp_path, stop):
    """An epoch is three steps, so that the run stops within one, between two, and within the second."""
    options = {"save_strategy": "steps", "save_steps": stop}
    inputs = {}
    for resume in (None, str(tmp_path / "there" / f"checkpoint-{stop}")):
        model, tokenizer = load(source_folder)
        collator = MEAPFineTuningCollator(tokenizer, SHORT, seed=5)
        rows = with_sample_ids(conversations)
        inputs[resume], _ = train_there("Trainer", model, collator, rows, tmp_path, resume=resume, **options)
    whole, rest = inputs.values()
    assert len(rest) == 2 * (STEPS - stop)
    assert all(torch.equal(one, other) for one, other in zip(whole[2 * stop :], rest, strict=True))


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_sft_trainer_prepares_conversations_by_itself(source_folder, tmp_path, form):
    """Texts in, as TRL's users have them: what is masked is within the answers, and what closes them is not."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source_folder), AutoTokenizer.from_pretrained(source_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model.resize_token_embeddings(384)
    add_mask_token(model, tokenizer)
    tokenizer.chat_template = CHATML
    question, answer = "the old river finds", "every quiet lantern keeps the bright stone near a market garden"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows = {"messages": [turns * 2] * 4}
    if form != "messages":
        rows = {"prompt": [turns[:1]] * 4, "completion": [turns[1:]] * 4}
    collator = MEAPFineTuningCollator(tokenizer, Duplication(0.3, min_copied=5, no_room="skip_copy"))
    batches = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True)
    arguments = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=4, report_to="none",
        assistant_only_loss=form == "messages",
    )  # fmt: skip
    SFTTrainer(
        model, arguments, train_dataset=with_sample_ids(Dataset.from_dict(rows)), data_collator=collator,
        callbacks=[collator], processing_class=tokenizer,
    ).train()  # fmt: skip
    (batch,) = batches
    for row in batch:
        first, copy = row.chunk(2)
        input_mask = copy == tokenizer.mask_token_id
        assert torch.equal(copy[~input_mask], first[~input_mask])
        num_turns = 2 if form == "messages" else 1
        length = len(tokenizer(answer)["input_ids"])
        assert input_mask.sum() == num_turns * int(0.3 * length) > 0
        said = torch.zeros_like(input_mask)
        text = tokenizer.apply_chat_template(turns * num_turns, return_assistant_tokens_mask=True, return_dict=True)
        said[: len(first)] = torch.tensor(text["assistant_masks"]).bool()
        assert not input_mask[~said].any()
        assert not input_mask[first == tokenizer.convert_tokens_to_ids("<|im_end|>")].any()


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_what_the_trainers_need_is_asked_for(source_folder, conversations, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source_folder), AutoTokenizer.from_pretrained(source_folder)
    rows, ids = short_rows(), with_sample_ids(short_rows())

    def train(collator, rows, callback=True, **options):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none", **options)
        trainer = Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator,
            callbacks=[collator] if callback else [],
        )  # fmt: skip
        trainer.train()

    tokenizer.mask_token = None
    with pytest.raises(UserError, match="the tokenizer has no mask token; call add_mask_token"):
        MEAPPretrainingCollator(tokenizer)
    add_mask_token(model, tokenizer)
    with pytest.raises(UserError, match=r"data_collator=meap, callbacks=\[meap\]"):
        train(MEAPPretrainingCollator(tokenizer), ids, callback=False, remove_unused_columns=False)
    for collator in (MEAPPretrainingCollator(tokenizer), MEAPFineTuningCollator(tokenizer)):
        with pytest.raises(UserError, match=r"data_collator=meap, callbacks=\[meap\]"):
            train(collator, with_sample_ids(conversations), callback=False)  # which removes the ids
    with pytest.raises(UserError, match="pass train_dataset=with_sample_ids"):
        train(MEAPPretrainingCollator(tokenizer), rows)
    with pytest.raises(UserError, match="pass train_dataset=with_sample_ids"):
        train(MEAPFineTuningCollator(tokenizer), conversations)
    with pytest.raises(UserError, match="the rows have neither labels nor answers"):
        train(MEAPFineTuningCollator(tokenizer), ids)
    with pytest.raises(UserError, match="the evaluation set has a column sample_id"):
        train(MEAPFineTuningCollator(tokenizer), with_sample_ids(conversations), eval_strategy="steps", eval_steps=1)
    with pytest.raises(UserError, match=r"\d+ tokens, more than max_length 8"):
        train(MEAPFineTuningCollator(tokenizer, max_length=8), with_sample_ids(conversations))
    stopping = MEAPFineTuningCollator(tokenizer, Duplication(min_copied=5), max_length=60)
    long = conversations.filter(lambda row: 40 < len(row["input_ids"]) <= 60)
    with pytest.raises(UserError, match="does not fit twice into max_length 60"):
        train(stopping, with_sample_ids(long))
    model.resize_token_embeddings(tokenizer.mask_token_id)
    with pytest.raises(UserError, match="none for the mask token"):
        train(MEAPPretrainingCollator(tokenizer), ids)


def test_no_evaluation_outside_of_training_has_copies_or_masks(small, conversations, tmp_path):
    model, tokenizer = small
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for collator in (MEAPPretrainingCollator(tokenizer, 0.5), MEAPFineTuningCollator(tokenizer, SHORT)):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none")
        rows = with_sample_ids(conversations)
        trainer = Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator, callbacks=[collator]
        )
        losses = [trainer.evaluate()["eval_loss"]]
        trainer.train()
        seen.clear()
        losses.append(trainer.evaluate()["eval_loss"])
        longest = max(len(row["input_ids"]) for row in conversations)
        assert all(input_ids.size(1) <= longest for input_ids in seen)
        assert not any((input_ids == tokenizer.mask_token_id).any() for input_ids in seen)
        assert losses[0] != losses[1]


def test_a_run_leaves_nothing_on_the_model(small, tmp_path):
    model, tokenizer = small
    collator = MEAPPretrainingCollator(tokenizer)
    for rows, fails in ((short_rows(), True), (with_sample_ids(short_rows()), False)):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none")
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[collator])
        if fails:
            with pytest.raises(UserError):
                trainer.train()
        else:
            trainer.train()
    assert not model._forward_pre_hooks


# ------------------------------------------------------------------------------------------------ the mask token


@pytest.mark.parametrize("num_tokens", [60, 64, 96], ids=["spare rows", "a spare row", "no row"])
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_a_new_mask_token_is_that_of_a_run(tmp_path, name, num_tokens):
    """Ids, number of rows and their values are those of a run of this project that starts from the folder."""
    folder = save_word_level(tmp_path / "model", num_tokens, has_mask=False)
    save_variant(name, folder)
    source, ours = open_source(folder), Tokenizer.load(str(folder))
    config = dataclasses.replace(source.config, vocab_size=vocab_size_for(source, ours))
    decoder = build_decoder(config, source)
    load_weights(decoder, source, first_new_token=new_mask_token(source, ours))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for _ in range(2):  # a second call changes nothing
        assert add_mask_token(model, tokenizer) == tokenizer.mask_token_id == ours.mask_token_id == num_tokens
        assert model.config.vocab_size == config.vocab_size
        assert torch.equal(model.get_input_embeddings().weight, decoder.embed_tokens.weight)
        assert torch.equal(model.get_output_embeddings().weight, decoder.lm_head.weight)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name == "llama tied")


def test_a_mask_token_that_exists_keeps_its_row(tmp_path):
    folder = save_word_level(tmp_path / "model", 90, has_mask=True)
    before = save_variant("llama", folder).get_input_embeddings().weight
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert add_mask_token(model, tokenizer) == 2
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    folder = save_word_level(tmp_path / "model", 150, has_mask=False)
    save_variant("llama", folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match="has 151 ids and the model 96 vocabulary rows"):
        add_mask_token(model, tokenizer)
