"""Write the questions of the study on a real model (plan.md): test questions and conversations for fine-tuning.

    python docs/study/questions.py FILE OUTPUT

FILE is nq-open-oracle.jsonl.gz of nelson-liu/lost-in-the-middle. The folder OUTPUT gets

- test.jsonl: rows 1,801 to 2,655, without those whose passage is also in an earlier row;
- rest.jsonl: rows 1 to 1,800;
- train.jsonl: conversations about rows 61 to 500. A prompt is that of the evaluation, with three passages; the other
  two are of rows 1 to 1,800, and the position of the right one is drawn. The reply is the answer, and below it the
  passage.
"""

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

from meap_lit.evaluation.tasks.multi_document_qa import MultiDocumentQA, normalize_answer
from meap_lit.files import new_folder

NUM_REST, FIRST, LAST = 1800, 60, 500
NUM_DOCUMENTS = 3
Row = dict[str, Any]


def gold(row: Row) -> Row:
    """Return the passage of a row that contains an answer."""
    return next(passage for passage in row["ctxs"] if passage["isgold"])


def unseen(rows: list[Row], num_rest: int) -> list[Row]:
    """Return the rows after the first `num_rest` whose passage is in none of these."""
    known = {normalize_answer(gold(row)["text"]) for row in rows[:num_rest]}
    return [row for row in rows[num_rest:] if normalize_answer(gold(row)["text"]) not in known]


def conversations(rows: list[Row], rest_file: str, first: int = FIRST, last: int = LAST) -> list[dict[str, str]]:
    """Return a conversation about each row from `first` to `last` - 1 of `rest_file`, in Alpaca's fields."""
    task = MultiDocumentQA(
        file=rest_file,
        num_documents=NUM_DOCUMENTS,
        gold=tuple(range(NUM_DOCUMENTS)),
        distractors="synthetic",
        bounds=(),
        num_questions=last,
    )
    prompts = {prompt.id: prompt.text for prompt in task.prompts()}
    rng = random.Random(0)
    return [
        _conversation(row, prompts[f"gold_at_{place}/{number}"], place)
        for number, row in enumerate(rows[first:last], start=first)
        for place in [rng.randrange(NUM_DOCUMENTS)]
    ]


def _conversation(row: Row, prompt: str, place: int) -> dict[str, str]:
    passage = gold(row)
    text = normalize_answer(passage["text"])
    answer = next((answer for answer in row["answers"] if normalize_answer(answer) in text), row["answers"][0])
    reply = f"{answer}\nDocument [{place + 1}](Title: {passage['title']}) {passage['text']}"
    return {"instruction": prompt, "input": "", "output": reply}


def main(file: Path, output: Path) -> None:
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    with new_folder(output) as folder:
        write(folder / "rest.jsonl", rows[:NUM_REST])
        write(folder / "test.jsonl", unseen(rows, NUM_REST))
        write(folder / "train.jsonl", conversations(rows, str(folder / "rest.jsonl")))


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    main(arguments.file, arguments.output)
