"""Write questions on several passages as conversations to fine-tune on: the second setting of plan.md.

    python docs/study/questions.py FILE --num_questions 600 --num_documents 3 --output OUTPUT.jsonl

FILE has rows in the format of nelson-liu/lost-in-the-middle. Prompts are those of the evaluation
(`meap_lit/evaluation/tasks/multi_document_qa.py`), with synthetic distractors. The position of the right passage is
drawn for each question, and the answer is the first one of the row.
"""

import argparse
import json
import random
from pathlib import Path

from meap_lit.evaluation.tasks.multi_document_qa import MultiDocumentQA


def records(file: str, num_questions: int, num_documents: int, seed: int = 0) -> list[dict[str, str]]:
    """Return a conversation for each of the first questions of a file, in Alpaca's fields."""
    task = MultiDocumentQA(
        file=file,
        num_documents=num_documents,
        gold=tuple(range(num_documents)),
        distractors="synthetic",
        bounds=(),
        num_questions=num_questions,
        seed=seed,
    )
    prompts = {prompt.id: prompt for prompt in task.prompts()}
    rng = random.Random(seed)
    chosen = [prompts[f"gold_at_{rng.randrange(num_documents)}/{number}"] for number in range(num_questions)]
    return [{"instruction": prompt.text, "input": "", "output": prompt.fields["answers"][0]} for prompt in chosen]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--num_questions", type=int, required=True)
    parser.add_argument("--num_documents", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lines = records(arguments.file, arguments.num_questions, arguments.num_documents)
    arguments.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
