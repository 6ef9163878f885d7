"""Judges that decide whether a summary is free of hallucination: language models behind an endpoint, or people.

The prompt and the verdict are those of voidism/Lookback-Lens (arXiv 2407.07071, step02_eval_gpt4o.py).
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from meap_lit.errors import UserError
from meap_lit.evaluation.judging.chat_endpoint import ChatEndpoint
from meap_lit.evaluation.rows import append_records, read_records, read_rows
from meap_lit.evaluation.task import Record

# The prompt of the source, without its request for the problematic spans.
SYSTEM = "You are a helpful assistant."
_CONCLUSION = (
    "give your final conclusion as **Conclusion: True** if the proposed summary is completely accurate based on the "
    "document, or **Conclusion: False** if it contains any incorrect or unsupported information."
)
_BEFORE = (
    "You will be provided with a document and a proposed summary. Your task is to determine if the proposed summary "
    "can be directly inferred from the document. If the summary contains any information not found in the document, "
    "it is considered false. Even if the summary is different from a ground truth summary, it might still be true, as "
    "long as it doesn't contain false information.\n"
    "For each proposed summary, explain why it is true or false based on the information from the document. Focus only "
    "on the original document's content, disregarding any external context.\n"
    f"After your explanation, {_CONCLUSION}"
)
_AFTER = f"Write your explanation first, and then {_CONCLUSION}"


def judge_prompt(document: str, summary: str, response: str) -> str:
    """Return the prompt about `response`, given its document and the summary that the data set has of it."""
    return (
        f"{_BEFORE}\n\n#Document#: {document}\n\n#Ground Truth Summary#: {summary}\n\n"
        f"#Proposed Summary#: {response}\n\n{_AFTER}"
    )


def parse_verdict(text: str) -> bool | None:
    """Return True if an answer concludes that the summary is free of hallucination, None if it has no conclusion."""
    _, found, rest = text.partition("Conclusion: ")
    conclusion = rest.split("Conclusion: ")[0].split("**")[0] if found else ""
    return True if "True" in conclusion else False if "False" in conclusion else None


class Judgement(NamedTuple):
    """The verdict, True if a summary is free of hallucination and None if undecided, and the judge's explanation."""

    verdict: bool | None
    explanation: str


class Cost(NamedTuple):
    """An estimate of what judging takes.

    `output_tokens` is None if an answer has no limit; `price` is None then, and if the price of a token is not known.
    """

    num_requests: int
    input_tokens: int
    output_tokens: int | None
    price: float | None


class Judge(ABC):
    """A judge of summaries; a recipe names a subclass and its arguments."""

    def cost(self, records: Sequence[Record]) -> Cost:
        """Return a high estimate of the cost of `judge`.

        Raises:
            UserError: If an option of the judge is wrong.
        """
        return Cost(0, 0, 0, 0.0)

    @abstractmethod
    def judge(self, records: Sequence[Record]) -> list[Judgement]:
        """Return a judgement of the `model_answer` of each record, given its `document` and `summary`.

        Raises:
            UserError: If a judgement fails. Answers received before are kept.
        """


@dataclass(kw_only=True)
class ChatJudge(ChatEndpoint, Judge):
    """A model behind an OpenAI-compatible endpoint; its further options are those of `ChatEndpoint`.

    Answers are kept on disk by the hash of address, model and request, and no request is sent twice: an interrupted run
    continues, and another run over the same summaries costs nothing.

    Args:
        cache: File of answers, shared by all judges that name it.
        max_tokens: Maximum number of tokens of an answer.
        options: Further fields of the request, such as {temperature: 0}; null removes a field, for models that know
            `max_completion_tokens` but not `max_tokens`.
        input_price: Price of a million tokens that the model reads; unknown by default.
        output_price: Price of a million tokens that it writes; unknown by default.
    """

    cache: str = "evaluations/judge_answers.jsonl"
    max_tokens: int = 1024
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})
    input_price: float | None = None
    output_price: float | None = None

    def cost(self, records: Sequence[Record]) -> Cost:
        known = self._answers()
        unknown = [body for key, body in self._bodies(records).items() if key not in known]
        if not unknown:
            return Cost(0, 0, 0, 0.0)
        self.key()  # a missing key is reported before anything is asked
        texts = [message["content"] for body in unknown for message in body["messages"]]
        num_read = sum(math.ceil(len(text) / 4) for text in texts)  # about four characters to a token of English
        limits = [body.get("max_tokens") or body.get("max_completion_tokens") for body in unknown]
        num_written = None if None in limits else sum(filter(None, limits))
        if self.input_price is None or self.output_price is None or num_written is None:
            return Cost(len(unknown), num_read, num_written, None)
        price = (num_read * self.input_price + num_written * self.output_price) / 1e6
        return Cost(len(unknown), num_read, num_written, price)

    def judge(self, records: Sequence[Record]) -> list[Judgement]:
        answers = self._answers()
        unknown = {key: body for key, body in self._bodies(records).items() if key not in answers}
        keys = list(unknown)
        with tqdm(total=len(unknown), desc=self.model, disable=not unknown) as bar:

            def keep(index: int, answer: str) -> None:
                append_records(Path(self.cache), [{"key": keys[index], "answer": answer}])
                answers[keys[index]] = answer
                bar.update()

            self.ask_all(list(unknown.values()), keep)
        texts = [answers[self._key_of(self._body(record))] for record in records]
        return [Judgement(parse_verdict(text), text) for text in texts]

    def _answers(self) -> dict[str, str]:
        return {row["key"]: row["answer"] for row in read_records(Path(self.cache), ("key", "answer"), "a judge")}

    def _bodies(self, records: Sequence[Record]) -> dict[str, dict[str, Any]]:
        """Return the requests by their hash; equal summaries share one."""
        return {self._key_of(body): body for body in map(self._body, records)}

    def _body(self, record: Record) -> dict[str, Any]:
        prompt = judge_prompt(record["document"], record["summary"], record["model_answer"])
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        body = {"messages": messages, "max_tokens": self.max_tokens, **self.options}
        return {name: value for name, value in body.items() if value is not None}

    def _key_of(self, body: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self.url.rstrip("/"), self.model, body], sort_keys=True).encode()).hexdigest()


@dataclass(kw_only=True)
class RecordedJudge(Judge):
    """Verdicts that exist already, for example those of people.

    Args:
        file: Lines of JSON with the `id` of a record, `model_answer` (its summary), `verdict` (true if free of
            hallucination, false, or null for undecided) and, optionally, `explanation`.
    """

    file: str

    def judge(self, records: Sequence[Record]) -> list[Judgement]:
        known: dict[tuple[str, str], Judgement] = {}
        for row in read_rows(self.file):
            verdict = row.value("verdict")
            if verdict is not None and not isinstance(verdict, bool):
                raise row.error(f"verdict must be true, false or null, got {json.dumps(verdict)}")
            explanation = row.text("explanation") if "explanation" in row.fields else ""
            key = row.text("id"), row.text("model_answer")
            if known.setdefault(key, Judgement(verdict, explanation)).verdict != verdict:
                raise row.error(  # ids of two datasets may be equal
                    f"another verdict on the same summary of {key[0]} is above; use one file for each dataset, or "
                    f"remove one of the lines"
                )
        judgements = []
        for record in records:
            judgement = known.get((record["id"], record["model_answer"]))
            if judgement is None:
                raise UserError(f"{self.file} has no verdict on the summary of {record['id']}; judge it and add a line")
            judgements.append(judgement)
        return judgements
