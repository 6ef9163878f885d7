"""A small prepared dataset, made once per test session by the same steps that a user calls."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from meap_lit.data.text import PrepareText
from meap_lit.data.tokenizer import TrainTokenizer

WORDS = ("the", "a", "old", "new", "river", "market", "lantern", "garden", "keeps", "finds")
WORDS += ("near", "under", "every", "quiet", "bright", "stone")


@dataclass(frozen=True)
class Prepared:
    """Folders of a tokenizer and of a dataset made with it."""

    texts: Path
    tokenizer: str
    dataset: str


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


TOY_RECIPE = """\
seed_everything: 1
model:
  class_path: meap_lit.modules.MEAPPretraining
  init_args:
    seed: ${{seed_everything}}
    decoder: {{num_layers: 2, num_heads: 2, num_kv_heads: 1, hidden_size: 32, intermediate_size: 64, max_seq_len: 64}}
    mask: {{class_path: meap_lit.masking.Constant, init_args: {{ratio: 0.15}}}}
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
