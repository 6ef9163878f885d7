"""A tokenizer of a few whole words."""

import json
from pathlib import Path

import tokenizers


def save_word_level(folder: Path, num_tokens: int, has_mask: bool, **settings: object) -> Path:
    """`num_tokens` words split at white space: <s>, </s>, [MASK] if it `has_mask`, w3, w4 and so on."""
    special = ["<s>", "</s>", "[MASK]"] if has_mask else ["<s>", "</s>"]
    words = special + [f"w{number}" for number in range(len(special), num_tokens)]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: id for id, word in enumerate(words)}, "</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings})
    )
    return folder
