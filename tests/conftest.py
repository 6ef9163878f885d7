"""A small prepared dataset, made once per test session by the same steps that a user calls."""

import gc
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# before torch: two workers share two cores, and a fork of a process with OpenMP threads would wait for them for good
os.environ["OMP_NUM_THREADS"] = "1"
# before huggingface_hub: a mistyped path must not be looked for in the network
os.environ["HF_HUB_OFFLINE"] = "1"
# before the first product on a GPU: without it torch refuses to be deterministic there
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import torch

from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.tokenizer.tokenizer import Tokenizer

_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
"""As the session began."""

WORDS = ("the", "a", "old", "new", "river", "market", "lantern", "garden", "keeps", "finds")
WORDS += ("near", "under", "every", "quiet", "bright", "stone")


SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs.",
    "How vexingly quick daft zebras jump!",
    "def add(a, b):\n    return a + b\n",
]


@dataclass(frozen=True)
class Prepared:
    """Folders of a tokenizer and of a dataset made with it."""

    texts: Path
    tokenizer: str
    dataset: str


_TRAINING_FIXTURES = {"toy_recipe", "toy_sft_recipe"}


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run a toy recipe as slow, whether they request it or name it in a parameter."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        fixtures = {*getattr(item, "fixturenames", ()), *(value for value in values if isinstance(value, str))}
        if not fixtures.isdisjoint(_TRAINING_FIXTURES):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from Python's collector, which every run calls at its validations.

    A collection takes milliseconds then instead of 0.3 s and more, in forked processes too.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Undo what a test sets, such as MASTER_PORT and a process group: later tests start processes of their own."""
    yield
    for name in os.environ.keys() - _ENVIRONMENT.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    if torch.distributed.is_initialized():  # a forked process would take the group for its own and wait in it for good
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    """A byte-level BPE of 300 tokens at most."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.txt").write_text("\n".join(SENTENCES * 3))
    TrainTokenizer(input=[str(folder / "corpus.txt")], vocab_size=300, output=str(folder / "bpe")).run()
    return str(folder / "bpe")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real files from public repositories; not part of this project."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    texts = folder / "texts"
    texts.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        draws = torch.randint(len(WORDS), (60,), generator=generator).tolist()
        (texts / f"{number}.txt").write_text(" ".join(WORDS[draw] for draw in draws) + ".\n")
    tokenizer, dataset = str(folder / "tokenizer"), str(folder / "dataset")
    TrainTokenizer(input=[str(texts)], vocab_size=320, output=tokenizer).run()
    PrepareText(input=[str(texts)], tokenizer=tokenizer, output=dataset, val_share=0.1, num_workers=1).run()
    return Prepared(texts, tokenizer, dataset)


@pytest.fixture(scope="session")
def chat(prepared, tmp_path_factory) -> str:
    """Folder of 150 conversations of one to three turns, prepared with the tokenizer of `prepared`."""
    folder = tmp_path_factory.mktemp("chat")
    generator = torch.Generator().manual_seed(1)

    def words(longest):
        count = int(torch.randint(1, longest, (1,), generator=generator))
        return " ".join(WORDS[draw] for draw in torch.randint(len(WORDS), (count,), generator=generator).tolist())

    with open(folder / "chat.jsonl", "w") as file:
        for number in range(150):
            turns = [{"role": role, "content": words(longest)} for role, longest in (("user", 8), ("assistant", 40))]
            turns *= 1 + number % 3
            file.write(json.dumps({"messages": turns}) + "\n")
    dataset = str(folder / "dataset")
    PrepareChat(
        input=[str(folder / "chat.jsonl")],
        tokenizer=prepared.tokenizer,
        template="mistral",
        output=dataset,
        val_share=0.1,
        num_workers=1,
    ).run()
    return dataset


@pytest.fixture(scope="session")
def source_folder(prepared, tmp_path_factory) -> Path:
    """A tiny random Llama, saved by transformers, with 320 vocabulary rows and the tokenizer of `prepared`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=320,
        max_position_embeddings=400,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in Path(prepared.tokenizer).glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


TOY_RECIPE = """\
seed_everything: 1
model:
  class_path: meap_lit.modules.MEAPPretraining
  init_args:
    seed: ${{seed_everything}}
    decoder: {{num_layers: 2, num_heads: 2, num_kv_heads: 1, hidden_size: 32, intermediate_size: 64, max_seq_len: 64}}
    mask_ratio: 0.15
    optimizer: {{lr: 3.0e-3, final_lr: 3.0e-4}}
data:
  class_path: meap_lit.data.pretraining.PretrainingData
  init_args:
    datasets: {dataset}
    tokenizer: {tokenizer}
    seed: ${{seed_everything}}
    seq_len: 32
    global_batch_size: 8
    micro_batch_size: 4
    num_workers: 0
budget: {{max_steps: 12, val_every_n_steps: 5}}
checkpoint: {{every_n_steps: 5, keep: -1}}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {runs}, name: toy}}
"""


@pytest.fixture
def toy_recipe(prepared, tmp_path) -> Path:
    """A recipe that trains a toy model for twelve steps; its logs go to `runs` beside it."""
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(TOY_RECIPE.format(dataset=prepared.dataset, tokenizer=prepared.tokenizer, runs=tmp_path / "runs"))
    return recipe


TOY_SFT_RECIPE = """\
seed_everything: 1
model:
  class_path: meap_lit.modules.MEAPFineTuning
  init_args:
    init_from: {source}
    optimizer: {{lr: 3.0e-3, final_lr: 3.0e-4}}
data:
  class_path: meap_lit.data.finetuning.FineTuningData
  init_args:
    datasets: {dataset}
    tokenizer: {tokenizer}
    seed: ${{seed_everything}}
    seq_len: 400
    global_batch_size: 4
    micro_batch_size: 2
    num_workers: 0
    duplication: {{mask_ratio: 0.2, min_copied: 10}}
budget: {{max_steps: 12, val_every_n_steps: 5}}
checkpoint: {{every_n_steps: 5, keep: -1}}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {runs}, name: toy}}
"""


@pytest.fixture
def toy_sft_recipe(prepared, chat, source_folder, tmp_path) -> Path:
    """A recipe that fine-tunes a toy checkpoint for twelve steps; its logs go to `runs` beside it."""
    recipe = tmp_path / "toy_sft.yaml"
    paths = {"source": source_folder, "dataset": chat, "tokenizer": prepared.tokenizer, "runs": tmp_path / "runs"}
    recipe.write_text(TOY_SFT_RECIPE.format(**paths))
    return recipe
