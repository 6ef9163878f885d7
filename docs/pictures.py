"""Draw the pictures of the method, with masks that the package draws.

    python docs/pictures.py

writes docs/pretraining.svg and docs/finetuning.svg. Tokens have backgrounds of their own and all other text is gray, so
that the pictures can be read on a white page and on a dark one.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

from meap_lit.masking import mask_inputs
from meap_lit.masking.duplication import Answer, Duplication, concatenate, masked_copy, original
from meap_lit.model import IGNORE_INDEX

FOLDER = Path(__file__).parent
TEXT = "In Oslo Anna sings . In Lima Hugo sings . In Oslo sings Anna ."
PROMPT, ANSWER = "Who sings ?", "In Oslo Anna sings , in Lima Hugo sings ."
MASK = "[MASK]"
CELL, GAP, HEIGHT = 62, 4, 30
LEFT = 92
GRAY = "#76808b"
COLORS = {  # fill and text
    "token": ("#dde5ee", "#1f2328"),
    "masked": ("#b5179e", "#ffffff"),
    "label": ("#c9ecd3", "#0b4f27"),
}


def pretraining() -> str:
    """Draw a row of text: what it says, the masked input, and the targets."""
    words = TEXT.split()
    vocabulary = [*dict.fromkeys(words), MASK]
    ids = torch.tensor([[vocabulary.index(word) for word in words]])
    masked, input_mask = mask_inputs(
        ids[:, :-1],
        torch.tensor([0]),  # the first sample
        mask_token_id=vocabulary.index(MASK),
        mask_ratio=0.15,
        seed=71,
        step=0,
    )
    inputs = [vocabulary[token_id] for token_id in masked[0].tolist()]
    kinds = ["masked" if is_masked else "token" for is_masked in input_mask[0].tolist()]
    num_columns = len(inputs)
    body = [
        *_row(0, "text", words[:-1], ["token"] * num_columns),
        *_row(42, "input", inputs, kinds),
        *_arrows(42 + HEIGHT, num_columns),
        *_row(96, "target", words[1:], ["label"] * num_columns),
        _text(LEFT, 156, f"P = 15%: {sum(input_mask[0].tolist())} of the {num_columns} inputs become {MASK}."),
        _text(LEFT, 178, "The targets are the next tokens of the clean text. All of them count in the loss."),
    ]
    return _picture("MEAP in pretraining", num_columns, 190, body)


def finetuning() -> str:
    """Draw a conversation: the original with its labels, and its masked copy with its own."""
    prompt, answer = PROMPT.split(), ANSWER.split()
    words = [*prompt, *answer, "</s>"]
    vocabulary = [*dict.fromkeys(words), MASK]
    ids = torch.tensor([vocabulary.index(word) for word in words])
    answers = [Answer(len(prompt), len(prompt) + len(answer), len(words))]
    first = original(ids, answers)
    copy = masked_copy(
        ids,
        answers,
        Duplication(mask_ratio=0.10, min_copied=0),
        mask_token_id=vocabulary.index(MASK),
        seed=4,
        sample_id=0,
        visit=0,
    )
    document = concatenate(first, copy, "continued")
    num_columns = len(words)
    body = [
        _text(LEFT, 14, "prompt"),
        _text(LEFT + len(prompt) * CELL, 14, "answer"),
    ]
    for number, name in enumerate(("original", "copy")):
        part = slice(number * num_columns, (number + 1) * num_columns)
        inputs = [vocabulary[token_id] for token_id in document.input_ids[part].tolist()]
        labels = ["" if label == IGNORE_INDEX else vocabulary[label] for label in document.labels[part].tolist()]
        top = 26 + number * 120
        body += [
            *_row(top, name, inputs, ["masked" if token == MASK else "token" for token in inputs]),
            *_arrows(top + HEIGHT, num_columns, [bool(label) for label in labels]),
            *_row(top + 54, "label", labels, ["label" if label else "" for label in labels]),
        ]
    num_masked = int((document.input_ids == vocabulary.index(MASK)).sum())
    body += [
        _text(LEFT, 256, f"P = 10%: {num_masked} of the {len(answer)} answer tokens becomes {MASK} in the copy."),
        _text(LEFT, 278, "The copy follows the original in the same row and attends to it."),
        _text(LEFT, 300, "The loss counts the answer of the original and the masked tokens of the copy."),
    ]
    return _picture("MEAP in fine-tuning", num_columns, 312, body)


def _row(top: int, name: str, texts: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Return the cells of a row; one of kind "" is an ignored label."""
    parts = [_text(LEFT - 12, top + 20, name, anchor="end")]
    for column, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        left, width = LEFT + column * CELL, CELL - GAP
        if not kind:
            parts.append(_text(left + width // 2, top + 20, "–", anchor="middle"))  # noqa: RUF001
            continue
        fill, color = COLORS[kind]
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{HEIGHT}" rx="4" fill="{fill}"/>')
        parts.append(_text(left + width // 2, top + 20, text, anchor="middle", color=color, mono=True))
    return parts


def _arrows(top: int, num_columns: int, shown: Sequence[bool] | None = None) -> list[str]:
    """Return an arrow from each input down to the target that is predicted there."""
    centers = [LEFT + column * CELL + (CELL - GAP) // 2 for column in range(num_columns)]
    return [
        f'<path d="M{x} {top + 4}v12m-4 -5l4 5l4 -5" fill="none" stroke="{GRAY}" stroke-width="1.5"/>'
        for x, is_shown in zip(centers, shown or [True] * num_columns, strict=True)
        if is_shown
    ]


def _text(x: int, y: int, text: str, *, anchor: str = "start", color: str = GRAY, mono: bool = False) -> str:
    font = ' class="token"' if mono else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}"{font}>{escape(text)}</text>'


def _picture(title: str, num_columns: int, height: int, body: Sequence[str]) -> str:
    width = LEFT + num_columns * CELL + 8
    style = "text{font:15px system-ui,sans-serif}.token{font:13px ui-monospace,Menlo,Consolas,monospace}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -8 {width} {height + 8}" role="img" width="{width}">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style>",
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


PICTURES = {"pretraining.svg": pretraining, "finetuning.svg": finetuning}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(FOLDER / name)
