"""Encode the text that a chat template writes, and find spans of it among the tokens."""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import tokenizers

from meap_lit.tokenizer.tokenizer import Tokenizer


@dataclass
class Tokens:
    """Tokens of a text, one entry for each."""

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """The character at which it begins, and the one before which it ends."""
    special: list[bool] = field(default_factory=list)

    def extend(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], special: Sequence[bool]) -> None:
        self.ids.extend(ids)
        self.offsets.extend(offsets)
        self.special.extend(special)


class TemplateEncoder:
    """Encodes a template's text, in which special tokens are special, around messages, in which they are not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.copy_backend()
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        # the tokens that play a role are special even where tokenizer.json does not say so, as in transformers
        backend.add_special_tokens([token for token in tokenizer.special_tokens.values() if token not in known])
        backend.post_processor = None  # it may trim white space off the offsets, which hides where a token begins
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._spelling = {id: token.content for id, token in added.items() if token.special}
        self.special_tokens = set(self._spelling.values())
        # the longest first, should one be the beginning of another
        self.special_token = re.compile("|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))))

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Encoders that find no special tokens, for the beginning of a text and for pieces within it."""
        content = self._tokenizer.without_control_pieces(json.loads(self._backend.to_str()))
        first = tokenizers.Tokenizer.from_str(json.dumps(content))
        # a Metaspace of this scheme puts a space in front of a text, but not of a piece within it
        within = tokenizers.Tokenizer.from_str(
            json.dumps(content).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        )
        first.encode_special_tokens = within.encode_special_tokens = True
        return first, within

    def encode(self, text: str, spellings: dict[str, str]) -> Tokens:
        """Return the tokens of a text of a template; `spellings` replace characters of it and are never special.

        Raises:
            UserError: If the vocabulary has no pieces for a part of the text, or only a special token.
        """
        with self._tokenizer.explained():
            encoding = self._backend.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        special = [id in self._spelling for id in ids]
        for number in [number for number, is_special in enumerate(special) if is_special]:
            # a character that the tokenizer does not know may have become the unknown token, which is special too
            start, stop = offsets[number]
            special[number] = text[start:stop].strip() == self._spelling[ids[number]]
        # the vocabulary may have "</s>" as a piece like any other, or a normalizer may make it of other characters
        ordinary = {id for id, is_special in zip(ids, special, strict=True) if not is_special}
        is_clean = ordinary.isdisjoint(
            self._spelling.keys() - {self._tokenizer.unk_token_id} | self._tokenizer.control_ids
        )
        if is_clean and not any(character in text for character in spellings):
            return Tokens(ids, offsets, special)
        # Special tokens cut a text into pieces that the tokenizer encodes one by one. Here it does so with the pieces
        # as they are spelled, and never looks for special tokens in them.
        tokens = Tokens()
        end = 0
        for id, (start, stop), is_special in zip(ids, offsets, special, strict=True):
            if is_special:
                self._encode_piece(text, end, start, spellings, tokens)
                tokens.extend([id], [(start, stop)], [True])
                end = stop
        self._encode_piece(text, end, len(text), spellings, tokens)
        return tokens

    def _encode_piece(self, text: str, start: int, stop: int, spellings: dict[str, str], tokens: Tokens) -> None:
        """Append the tokens of text[start:stop]; their offsets are those of `text`, where a spelling is a character."""
        spelled = [spellings.get(character, character) for character in text[start:stop]]
        origin = [start + number for number, piece in enumerate(spelled) for _ in piece] + [stop]
        with self._tokenizer.explained():
            encoding = self._plain[start > 0].encode("".join(spelled), add_special_tokens=False)
        self._tokenizer.check_free_of_control(encoding, "".join(spelled))
        # a token may stand for no character, such as a space that the tokenizer puts in front
        offsets = [(origin[first], origin[max(first, last - 1)] + 1) for first, last in encoding.offsets]
        tokens.extend(encoding.ids, offsets, [False] * len(offsets))


def to_tokens(span: tuple[int, int], tokens: Tokens, text: str, after: int) -> tuple[int, int, int] | None:
    """Return start, stop and end of an answer, as in `EncodedChat`, given its span of characters; None for no token.

    They are where transformers' assistant mask has them, but without blank tokens after those that close it. The first
    `after` tokens belong to an earlier answer.
    """
    if span[0] == span[1]:
        return None
    starts = [start for start, _ in tokens.offsets]
    start, end = bisect_left(starts, span[0]), bisect_left(starts, span[1])
    # a special token that swallows the space after it is still the template's
    if start > after and tokens.offsets[start - 1][1] > span[0] and not tokens.special[start - 1]:
        start -= 1
    closing = end
    while closing > start and not tokens.special[closing - 1] and not text[slice(*tokens.offsets[closing - 1])].strip():
        closing -= 1
    if closing > start and tokens.special[closing - 1]:
        end = closing
    stop = end
    while stop > start and tokens.special[stop - 1]:
        stop -= 1
    return (start, stop, end) if start < end else None
