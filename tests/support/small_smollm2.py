"""A folder that is read like a model of the Hub: a random Llama of a few thousand weights, with the tokens of chatml.

    python -m tests.support.small_smollm2 HuggingFaceTB/SmolLM2-135M

A folder takes precedence over an id of the same name, so the commands of the documents run without a network.
"""

import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from tests.support.documents import PAGES
from tests.support.hf_models import random_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def save(folder: Path) -> None:
    """Save model and tokenizer as transformers saves them."""
    trained = ByteLevelBPETokenizer()
    trained.train([str(page) for page in PAGES], vocab_size=1024, special_tokens=SPECIAL, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    model = random_model("Llama", vocab_size=1024, max_position_embeddings=512, tie_word_embeddings=True)
    model.save_pretrained(folder)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
