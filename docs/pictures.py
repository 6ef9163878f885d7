"""Draw the pictures of the method, with masks that the package draws, and the curves of the quickstart.

    python docs/pictures.py

writes docs/pretraining.svg, docs/finetuning.svg and docs/quickstart.svg. Tokens have backgrounds of their own and all
other text is gray, so that the pictures can be read on a white page and on a dark one. The curves are those of
docs/quickstart.csv, which is made again from runs by

    python docs/pictures.py --runs runs/quickstart_MEAP_1 runs/quickstart_NTP_1 ...     # ..._ARM_SEED
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import torch

from meap_lit.callbacks.metrics import read_metrics
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
ARMS = {"MEAP": "#b5179e", "NTP": "#3a86c8"}
CURVES = FOLDER / "quickstart.csv"
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


def quickstart() -> str:
    """Draw retrieval accuracy over tokens for the seeds of each arm."""
    with open(CURVES, encoding="utf-8") as file:
        rows = [
            (row["arm"], row["seed"], float(row["tokens"]) / 1e6, float(row["accuracy"]))
            for row in csv.DictReader(file)
        ]
    left, right, top, bottom = 60, 600, 30, 270
    most = max(tokens for _, _, tokens, _ in rows)

    def x(tokens: float) -> int:
        return round(left + (right - left) * tokens / most)

    def y(accuracy: float) -> int:
        return round(bottom - (bottom - top) * accuracy)

    body = [_text(left, 10, "Retrieval accuracy: who sings in a place, of four people in the context")]
    for percent in (0, 25, 50, 75, 100):
        body.append(f'<path d="M{left} {y(percent / 100)}H{right}" stroke="{GRAY}" stroke-opacity="0.3"/>')
        body.append(_text(left - 8, y(percent / 100) + 5, f"{percent}%", anchor="end"))
    for tokens in range(int(most) + 1):
        body.append(_text(x(tokens), bottom + 22, str(tokens), anchor="middle"))
    body.append(_text((left + right) // 2, bottom + 46, "millions of tokens", anchor="middle"))
    body.append(_text(right - 4, y(0.25) - 6, "guessing", anchor="end"))
    for (arm, _), curve in groupby(rows, key=lambda row: row[:2]):
        points = " ".join(f"{x(tokens)},{y(accuracy)}" for _, _, tokens, accuracy in curve)
        body.append(
            f'<polyline points="{points}" fill="none" stroke="{ARMS[arm]}" stroke-width="2" stroke-opacity="0.8"/>'
        )
    for number, (arm, color) in enumerate(ARMS.items()):
        seeds = sorted({seed for name, seed, _, _ in rows if name == arm})
        named = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
        body.append(_text(right + 16, top + 16 + 24 * number, f"{arm}, {named}", color=color))
    return _svg("Retrieval accuracy in the quickstart", 740, bottom + 60, body)


def read_curves(runs: Sequence[str]) -> Iterator[tuple[str, str, int, str]]:
    """Yield arm, seed, tokens and accuracy at each validation of runs whose names end in _ARM_SEED."""
    for run in runs:
        *_, arm, seed = Path(run).name.split("_")
        curves = read_metrics(max(Path(run).glob("version_*")))
        tokens = {step: int(value) for step, value in curves["throughput/tokens_seen"]}
        for step, accuracy in curves["val/retrieval_accuracy"]:
            yield arm, seed, tokens[step], f"{accuracy:.4f}"


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
    return _svg(title, LEFT + num_columns * CELL + 8, height, body)


def _svg(title: str, width: int, height: int, body: Sequence[str]) -> str:
    style = "text{font:15px system-ui,sans-serif}.token{font:13px ui-monospace,Menlo,Consolas,monospace}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -8 {width} {height + 8}" role="img" width="{width}">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style>",
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


PICTURES = {"pretraining.svg": pretraining, "finetuning.svg": finetuning, "quickstart.svg": quickstart}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--runs"]:
        with open(CURVES, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([("arm", "seed", "tokens", "accuracy"), *read_curves(sys.argv[2:])])
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(FOLDER / name)
