"""Small inputs that the data tests share."""

from pathlib import Path

import pytest

from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.tokenizer.tokenizer import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs.",
    "How vexingly quick daft zebras jump!",
    "def add(a, b):\n    return a + b\n",
]


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
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder
