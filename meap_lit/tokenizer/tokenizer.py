"""The tokenizer of a recipe: any Hugging Face `tokenizer.json`, plus the mask token of MEAP."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from meap_lit.errors import UserError, in_one_line
from meap_lit.files import read_json, read_text, run_versions, write_file
from meap_lit.hub import TOKENIZER_FILES, local_folder

MASK_TOKEN = "[MASK]"
MASK_TOKENS = (MASK_TOKEN, "<mask>")
"""Names under which a vocabulary may have a mask token; the first is added where it has none."""
END_OF_TEXT = "<|endoftext|>"

# Used where neither tokenizer_config.json nor special_tokens_map.json names the token; the first that exists.
_WELL_KNOWN = {
    "eos": ("</s>", END_OF_TEXT, "<|end_of_text|>", "<|im_end|>", "<eos>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "mask": MASK_TOKENS,
}
_TOKEN_SETTINGS = ("bos_token", "eos_token", "mask_token", "pad_token", "unk_token")
# Settings of tokenizer_config.json that `save` keeps; the others name classes and files that `save` does not write.
_KEPT_SETTINGS = (
    *("chat_template", "model_max_length", "padding_side", "unk_token", "pad_token"),
    *("add_bos_token", "add_eos_token"),  # for others than transformers 5
)


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows its end-of-text and mask tokens and ignores special tokens in the text.

    The mask token is added in memory, as the next free id, to a tokenizer that has none: Llama 2 has 32,000 tokens,
    so its mask is 32,000 and `vocab_size` 32,001. Text that spells a special token (`"</s>"`) is encoded as the
    characters it is made of, even where the vocabulary has that text as an ordinary piece. Truncation and padding
    stored in tokenizer.json are ignored.

    Whether a text begins with BOS is decided here: `before_text` and `after_text` are what the tokenizer itself writes
    around a text. Documents, prompts and what is scored all follow them, as transformers does with the same folder.
    Naming a BOS is not writing it: GPT-2 and SmolLM2 name one and write none.

    Args:
        backend: The tokenizer; it is changed.
        settings: Content of tokenizer_config.json; names the special tokens.
        path: Where it came from, for messages.

    Raises:
        UserError: If there is no end-of-text token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], path: str = "tokenizer") -> None:
        self.path = path
        self._settings = settings
        known_mask = _find_special(backend, settings, "mask")
        mask = known_mask or MASK_TOKEN
        self.mask_is_new = known_mask is None
        """Whether the mask token was added in memory, so that no model has seen its id."""
        self._backend = _with_mask_token(backend, mask)
        self._backend.encode_special_tokens = True  # do not look for special tokens in the text
        # a call of transformers with truncation or padding leaves them in the file; they are not part of the tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        eos = _find_special(backend, settings, "eos")
        if eos is None:
            raise UserError(
                f"tokenizer {path} names no end-of-text token; set eos_token in its tokenizer_config.json, "
                f"or name it one of {', '.join(_WELL_KNOWN['eos'])}"
            )
        bos = _find_special(backend, settings, "bos")
        if mask in (eos, bos):
            raise UserError(
                f"tokenizer {path} has {mask!r} both as mask_token and as {'eos' if mask == eos else 'bos'}_token; the "
                f"mask token must stand for nothing else: remove mask_token from its tokenizer_config.json"
            )
        self._special = {"eos": eos, "bos": bos, "mask": mask}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.eos_token_id = vocabulary[eos]
        self.mask_token_id = vocabulary[mask]
        self.bos_token_id = None if bos is None else vocabulary[bos]
        self.vocab_size = _next_id(self._backend)
        """Largest id + 1, mask token included. Ids may have holes, so this is not the number of tokens."""
        added = self._backend.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special} - {self.unk_token_id}
        roles = {vocabulary[token] for token in self._special.values() if token is not None}
        self.control_ids = frozenset(special | roles)
        """IDs of the special tokens, which encoding a text never returns. The unknown token is excluded, unless it is
        also the BOS, EOS or mask token."""
        self.before_text, self.after_text = _written_around(self._backend)

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """Read a folder with a tokenizer.json, a repository of the Hub, or the folder of a run, which keeps its own.

        The files that name its special tokens are optional.

        Raises:
            UserError: If there is none of that name, it cannot be downloaded, or it is damaged.
        """
        folder = _of_run(local_folder(path, "tokenizer", TOKENIZER_FILES))
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"tokenizer {path} has no tokenizer.json; save the tokenizer in the fast format")
        read_json(file)  # the library's own message does not say where it is wrong
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(file))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"cannot read tokenizer {file}: {' '.join(str(error).split())}") from error
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                named = {key: value for key, value in read_json(folder / name).items() if value is not None}
                settings |= {key: _plain(value, key, folder / name) for key, value in named.items()}
        if (folder / _TEMPLATE_FILE).is_file():
            settings["chat_template"] = read_text(folder / _TEMPLATE_FILE)
        return cls(backend, settings, path)

    def __reduce__(self) -> tuple[Any, ...]:
        # written out because the backend forgets encode_special_tokens when it is pickled; by now it has the mask token
        return Tokenizer, (self._backend, self._settings, self.path), {"mask_is_new": self.mask_is_new}

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides the ids of a bare text, and of the mask and end-of-text ids.

        It does not depend on the folder, on the layout of tokenizer.json or on what only matters for decoding.
        """
        content = json.loads(self._backend.to_str())
        deciding = {name: content[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        deciding |= {"eos_token_id": self.eos_token_id, "mask_token_id": self.mask_token_id}
        # settings that are absent, null or false are left out: a later library may write more of them
        canonical = json.dumps(_without_defaults(deciding), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def document_fingerprint(self) -> str:
        """Hex SHA-256 of all that decides the ids of a document; `fingerprint` where only EOS is written around it."""
        around = [self.before_text, self.as_document([])[len(self.before_text) :]]
        if around == [[], [self.eos_token_id]]:
            return self.fingerprint
        return hashlib.sha256(f"{self.fingerprint} {json.dumps(around)}".encode()).hexdigest()

    @cached_property
    def unk_token_id(self) -> int | None:
        """Id that text outside the vocabulary becomes, or None if the tokenizer's model names none."""
        model = self._backend.model
        if hasattr(model, "unk_token"):
            return None if model.unk_token is None else self._backend.token_to_id(model.unk_token)
        return json.loads(self._backend.to_str())["model"].get("unk_id")  # Unigram does not show it

    @property
    def drops_unknown(self) -> bool:
        """Whether text outside the vocabulary becomes no token at all, as with a BPE model without an unknown token."""
        is_bpe = isinstance(self._backend.model, models.BPE) and self._backend.model.unk_token is None
        return is_bpe and self.encode("a\U0010fffda") == self.encode("aa")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` alone: no special token in it or around it.

        Raises:
            UserError: If the vocabulary has no pieces for a part of the text, or only a special token.
        """
        return self._checked(text, self._encoding(self._backend, text).ids)

    def _encoding(self, backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
        with self.explained():
            return backend.encode(text, add_special_tokens=False)

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if type(error) is not Exception:  # the backend has no other class for what a text may cause
                raise
            raise UserError(
                f"tokenizer {self.path} has no token for a part of a text ({error}); give it an unknown token, or use "
                f"another tokenizer"
            ) from error

    def encode_whole(self, text: str) -> list[int]:
        """Return the ids that transformers' tokenizer of the same folder gives `text`, special tokens around it."""
        return [*self.before_text, *self.encode(text), *self.after_text]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of the beginning of a text, for a model to continue; at least one."""
        return [*self.before_text, *self.encode(text)] or [self.start_token_id]

    def as_document(self, ids: Sequence[int]) -> list[int]:
        """Return a document, given the ids of its text from `encode`: as the tokenizer writes it, with one EOS last."""
        document = [*self.before_text, *ids, *self.after_text]
        return document if document[-1:] == [self.eos_token_id] else [*document, self.eos_token_id]

    @property
    def start_token_id(self) -> int:
        """BOS, or EOS if no BOS is named: what a model reads where no text precedes the one that it predicts."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does. Uses all cores unless TOKENIZERS_PARALLELISM is false."""
        # the fast variant leaves out character offsets, which nobody here needs, and saves a fifth of the time
        with self.explained():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._checked(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        """Return `ids`, which the backend gave `text`, or others where a special token is among them."""
        # whatever the model: it may have "</s>" as a piece like any other
        return ids if self.control_ids.isdisjoint(ids) else self._encode_spelled(text)

    def _encode_spelled(self, text: str) -> list[int]:
        """Return the ids of a text that spells a special token, in other pieces of the vocabulary."""
        found, encoding = (self._encoding(backend, text) for backend in (self._backend, self._speller))
        # a model without an unknown token leaves out what it has no piece for
        is_whole = _num_encoded_characters(encoding) >= _num_encoded_characters(found)
        if not (is_whole and self.control_ids.isdisjoint(encoding.ids)):
            self.check_free_of_control(found, text)
        return encoding.ids

    def check_free_of_control(self, encoding: tokenizers.Encoding, text: str) -> None:
        """Raise `UserError` if a part of `text` became the id of a special token."""
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.control_ids:
                raise UserError(
                    f"tokenizer {self.path} can only write {text[start:stop]!r:.60} as the special token "
                    f"{self._backend.id_to_token(token_id)!r}; replace it in the text, or use another tokenizer"
                )

    @cached_property
    def _speller(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but for the pieces of special tokens: no text becomes one of them."""
        content = self.without_control_pieces(json.loads(self._backend.to_str()))
        speller = tokenizers.Tokenizer.from_str(json.dumps(content))
        speller.encode_special_tokens = True
        return speller

    def without_control_pieces(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return `content`, a tokenizer.json of this vocabulary, such that no text becomes a special token.

        Every piece keeps its id. Those of special tokens get names that no text has, and no merge makes them.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        hidden = {piece for piece, token_id in vocabulary.items() if token_id in self.control_ids}
        names = {piece: hashlib.sha256(piece.encode()).hexdigest() for piece in hidden}
        model = dict(content["model"])
        pieces = model["vocab"]
        if isinstance(pieces, dict):
            model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in pieces.items()}
        else:  # Unigram
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in pieces]
        if model.get("merges"):
            pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [
                [left, right]
                for left, right in pairs
                if hidden.isdisjoint((left, right, left + right.removeprefix(prefix)))
            ]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        added = [
            {**token, "content": names.get(token["content"], token["content"])} for token in content["added_tokens"]
        ]
        return {**content, "model": model, "added_tokens": added}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def text_after(self, ids: Sequence[int], new_ids: Sequence[int]) -> str:
        """Return the text that `new_ids` add to `ids`, without special tokens.

        Decoded alone they may lose a space or a character.
        """
        known = list(ids[-16:])  # the end of a long text is enough context
        before = self.decode(known, skip_special_tokens=True)
        return self.decode([*known, *new_ids], skip_special_tokens=True)[len(before) :]

    def text_of(self, token_id: int) -> str:
        """Return the text that a token adds to the text before it, for a person to read.

        A token that only decodes together with others, a part of a character, is its entry in the vocabulary. An id
        without a token is written as `<id N>`.
        """
        piece = self._backend.id_to_token(token_id)
        if piece is None or token_id in self.control_ids:
            return piece or f"<id {token_id}>"
        # some decoders drop a space at the beginning, so the token follows itself
        text = self.decode([token_id, token_id])[len(self.decode([token_id])) :]
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else piece

    @property
    def chat_template(self) -> Any:
        """Jinja source of the tokenizer's chat template, a list of named ones, or None."""
        return self._settings.get("chat_template")

    @chat_template.setter
    def chat_template(self, source: str) -> None:
        self._settings = {**self._settings, "chat_template": source}

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokens that play a role, by the names that chat templates know: `bos_token`, `eos_token` and so on."""
        others = {name: self._settings.get(name) for name in ("unk_token", "pad_token")}
        named = others | {f"{role}_token": token for role, token in self._special.items()}
        return {name: token for name, token in named.items() if token and self._backend.token_to_id(token) is not None}

    def first_difference(self, other: tokenizers.Tokenizer) -> tuple[int, str, str] | None:
        """Find an id with another token in another tokenizer.

        Args:
            other: The other one. Added tokens of both are left out: a mask token is added in memory, and people rename
                reserved tokens.

        Returns:
            A tuple (id, token in this tokenizer, token in `other`) for the smallest id whose tokens differ, or None if
            all shared ids have the same token.
        """
        added = {*self._backend.get_added_tokens_decoder(), *other.get_added_tokens_decoder()}
        here, there = (
            {token_id: token for token, token_id in one.get_vocab(with_added_tokens=True).items()}
            for one in (self._backend, other)
        )
        for token_id in sorted(here.keys() & there.keys() - added):
            if here[token_id] != there[token_id]:
                return token_id, here[token_id], there[token_id]
        return None

    def copy_backend(self) -> tokenizers.Tokenizer:
        """Return a copy of the tokenizer that a caller may change; it finds special tokens in the text."""
        try:
            return tokenizers.Tokenizer.from_str(self._backend.to_str())
        except Exception as error:  # the library raises nothing more special, and not all of it on the first reading
            raise UserError(
                f"tokenizer {self.path} is damaged: {in_one_line(error)}; copy or download it again"
            ) from error

    def ids_without_token(self, num_rows: int) -> list[int]:
        """Return the ids below `num_rows` without a token: holes in the vocabulary, and padding above it."""
        return sorted(set(range(num_rows)) - set(self._backend.get_vocab(with_added_tokens=True).values()))

    def save(self, folder: Path | str, with_mask: bool = True) -> None:
        """Write the tokenizer as a folder that transformers and `load` read.

        The mask token can be left out: it has the last id, so without it the others stay as they are.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        content, roles = self._backend.to_str(pretty=True), dict(self._special)
        if not with_mask:
            assert self.mask_token_id == self.vocab_size - 1, "the mask token was not added to the others"
            content = _without_token(content, str(roles.pop("mask")))
        # written here because the library's own `save` does not say that a disk is full
        write_file(target / "tokenizer.json", content)
        settings = {name: self._settings[name] for name in _KEPT_SETTINGS if name in self._settings}
        settings |= {f"{role}_token": token for role, token in roles.items() if token is not None}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_file(target / "tokenizer_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")

    @staticmethod
    def copy_files(path: str, folder: Path) -> None:
        """Copy a tokenizer's files into a folder as they are; `path` as for `load`."""
        source = _of_run(local_folder(path, "tokenizer", TOKENIZER_FILES))
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", _TEMPLATE_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


_TEMPLATE_FILE = "chat_template.jinja"


def _of_run(folder: Path) -> Path:
    """Return where a run, or its newest version with a checkpoint, keeps its tokenizer; other folders as given."""
    if (folder / "tokenizer.json").is_file():
        return folder
    started = (run for run in reversed(run_versions(folder)) if any((run / "checkpoints").glob("step=*.ckpt")))
    for run in (folder, *started):
        if (run / "tokenizer" / "tokenizer.json").is_file():
            return run / "tokenizer"
    return folder


def id_of_token(folder: Path, token: str) -> int | None:
    """Return the id of a token that was added to the tokenizer.json of a folder; None if none of the name was."""
    added = read_json(folder / "tokenizer.json").get("added_tokens") or []
    return next((entry.get("id") for entry in added if entry.get("content") == token), None)


def _find_special(backend: tokenizers.Tokenizer, settings: dict[str, Any], role: str) -> str | None:
    """Return the token that plays `role` ("eos"), if the vocabulary holds it."""
    candidates = [settings.get(f"{role}_token"), *_WELL_KNOWN[role]]
    if role == "bos" and settings.get("eos_token"):
        # a folder that names its tokens and no BOS has none; "<s>" may be a piece like any other in its vocabulary
        candidates = candidates[:1]
    return next((token for token in candidates if token and backend.token_to_id(token) is not None), None)


def _plain(setting: Any, key: str, file: Path) -> Any:
    """Return the text of a token, which the files may hold as a serialized AddedToken."""
    plain = setting["content"] if isinstance(setting, dict) and "content" in setting else setting
    if key in _TOKEN_SETTINGS and not isinstance(plain, str):
        raise UserError(f"{file}: {key} must be a token such as {json.dumps(END_OF_TEXT)}, got {json.dumps(setting)}")
    return plain


def _with_mask_token(backend: tokenizers.Tokenizer, mask: str) -> tokenizers.Tokenizer:
    """Return `backend` with the special token `mask`: with its old id if it has one, else the largest id + 1."""
    old, expected = backend.token_to_id(mask), _next_id(backend)
    token = AddedToken(mask, special=True, normalized=False)
    backend.add_special_tokens([token])
    if old is not None or backend.token_to_id(mask) == expected:
        return backend
    # The library counts entries to find a free id, and in a vocabulary with holes that id may be taken.
    content = json.loads(backend.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != mask]
    content["model"]["vocab"][mask] = expected
    rebuilt = tokenizers.Tokenizer.from_str(json.dumps(content))
    rebuilt.add_special_tokens([token])
    return rebuilt


def _num_encoded_characters(encoding: tokenizers.Encoding) -> int:
    return len({place for start, stop in encoding.offsets for place in range(start, stop)})


def _without_token(text: str, added: str) -> str:
    """Return a tokenizer.json without the token that `_with_mask_token` added."""
    content = json.loads(text)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != added]
    if isinstance(content["model"]["vocab"], dict):
        content["model"]["vocab"].pop(added, None)
    return json.dumps(content, ensure_ascii=False, indent=2)


def _written_around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor writes before and after a text.

    It alone decides in transformers 5, which ignores `add_bos_token` where there is a tokenizer.json.
    """
    if backend.post_processor is None:
        return [], []
    text_id = 1 << 31  # no vocabulary has it
    probe = tokenizers.Tokenizer(models.WordLevel({"text": text_id}, unk_token="text"))
    probe.post_processor = backend.post_processor
    ids = probe.encode("text").ids
    place = ids.index(text_id)
    return ids[:place], ids[place + 1 :]


def _next_id(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_defaults(entry) for key, entry in value.items() if entry is not None and entry is not False
        }
    if isinstance(value, list):
        return [_without_defaults(entry) for entry in value]
    return value
