"""A tiny model that two devices can split between them."""

import shutil
from pathlib import Path

from tests.support.hf_models import random_model


def save_split_model(tokenizer: str, folder: Path) -> Path:
    """Save a random Llama of 320 vocabulary rows, tied, whose heads divide by two, with the files of a tokenizer."""
    model = random_model("Llama", vocab_size=320, max_position_embeddings=400, tie_word_embeddings=True)
    model.save_pretrained(folder)
    for file in Path(tokenizer).glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder
