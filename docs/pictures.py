"""Draw the pictures of the method, with masks that the package draws, and the curves of the quickstart.

    python docs/pictures.py

writes docs/pretraining.svg, docs/finetuning.svg, docs/quickstart.svg and docs/smollm2.svg. Tokens have backgrounds of
their own and all other text is gray, so that the pictures can be read on a white page and on a dark one. The curves are
those of docs/smollm2.csv and docs/quickstart.csv. The second is made again from runs by

    python docs/pictures.py --runs runs/quickstart_MEAP_1 runs/quickstart_NTP_1 ...     # ..._ARM_SEED
"""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
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
COLORS_OF_CURVES = ("#b5179e", "#3a86c8", "#2a9d5c")
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
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in _table(CURVES):
        curves.setdefault((row["arm"], row["seed"]), []).append((float(row["tokens"]) / 1e6, float(row["accuracy"])))
    most = max(tokens for curve in curves.values() for tokens, _ in curve)
    names = []
    for arm, color in ARMS.items():
        seeds = sorted(seed for name, seed in curves if name == arm)
        named = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
        names.append((f"{arm}, {named}", color))
    return _chart(
        "Retrieval accuracy in the quickstart",
        "Retrieval accuracy: who sings in a place, of four people in the context",
        [(ARMS[arm], curve) for (arm, _), curve in curves.items()],
        x_ticks={tokens: str(tokens) for tokens in range(int(most) + 1)},
        x_name="millions of tokens",
        y_ticks={percent / 100: f"{percent}%" for percent in (0, 25, 50, 75, 100)},
        names=names,
        line=(0.25, "guessing"),
    )


def smollm2() -> str:
    """Draw the clean validation loss of the fine-tuning tutorial over optimizer steps."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in _table(FOLDER / "smollm2.csv"):
        curves.setdefault(row["arm"], []).append((float(row["step"]), float(row["loss"])))
    colors = dict(zip(curves, COLORS_OF_CURVES, strict=True))
    return _chart(
        "Fine-tuning SmolLM2-135M",
        "Clean validation loss of 41 held-out conversations",
        [(colors[arm], curve) for arm, curve in curves.items()],
        x_ticks={step: str(step) for step in range(0, 61, 10)},
        x_name="optimizer steps of 1,024 tokens",
        y_ticks={loss: f"{loss:.2f}" for loss in (1.65, 1.70, 1.75, 1.80, 1.85)},
        names=list(colors.items()),
    )


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _chart(
    title: str,
    heading: str,
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    x_ticks: Mapping[float, str],
    x_name: str,
    y_ticks: Mapping[float, str],
    names: Sequence[tuple[str, str]],
    line: tuple[float, str] | None = None,
) -> str:
    """Draw curves: color and points of each. The ticks of the second axis are its ends; `names` are text and color."""
    left, right, top, bottom = 60, 600, 30, 270
    end = max([*x_ticks, *(x for _, curve in curves for x, _ in curve)])
    low, high = min(y_ticks), max(y_ticks)

    def place(x: float, y: float) -> tuple[int, int]:
        return round(left + (right - left) * x / end), round(bottom - (bottom - top) * (y - low) / (high - low))

    body = [_text(left, 10, heading)]
    for value, text in y_ticks.items():
        _, y = place(0, value)
        body.append(f'<path d="M{left} {y}H{right}" stroke="{GRAY}" stroke-opacity="0.3"/>')
        body.append(_text(left - 8, y + 5, text, anchor="end"))
    body += [_text(place(value, low)[0], bottom + 22, text, anchor="middle") for value, text in x_ticks.items()]
    body.append(_text((left + right) // 2, bottom + 46, x_name, anchor="middle"))
    if line is not None:
        body.append(_text(right - 4, place(0, line[0])[1] - 6, line[1], anchor="end"))
    for color, curve in curves:
        points = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve))
        body.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-opacity="0.8"/>')
    for number, (text, color) in enumerate(names):
        body.append(_text(right + 16, top + 16 + 24 * number, text, color=color))
    return _svg(title, 780, bottom + 60, body)


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


PICTURES = {
    "pretraining.svg": pretraining,
    "finetuning.svg": finetuning,
    "quickstart.svg": quickstart,
    "smollm2.svg": smollm2,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--runs"]:
        with open(CURVES, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([("arm", "seed", "tokens", "accuracy"), *read_curves(sys.argv[2:])])
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(FOLDER / name)
