"""Those who say whether a summary is free of hallucination: language models behind an endpoint, or people.

Models are asked as voidism/Lookback-Lens asks them (arXiv 2407.07071, step02_eval_gpt4o.py); every answer is kept.
"""

import hashlib
import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from meap_lit.errors import UserError
from meap_lit.evaluation.judging.chat_endpoint import ChatEndpoint
from meap_lit.evaluation.rows import read_rows
from meap_lit.evaluation.task import Record

# Prompt and verdict of the source, without the spans it asks for.
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
    """What a judge is asked about `response`, given the document and the summary that its source has."""
    return (
        f"{_BEFORE}\n\n#Document#: {document}\n\n#Ground Truth Summary#: {summary}\n\n"
        f"#Proposed Summary#: {response}\n\n{_AFTER}"
    )


def parse_verdict(text: str) -> bool | None:
    """Whether a judge's answer concludes that the summary is free of hallucination; None if it does not conclude."""
    _, found, rest = text.partition("Conclusion: ")
    conclusion = rest.split("Conclusion: ")[0].split("**")[0] if found else ""
    return True if "True" in conclusion else False if "False" in conclusion else None


# --------------------------------------------------------------------------------------------------- judges


class Judgement(NamedTuple):
    """True if a summary is free of hallucination, None if undecided; and what the judge said."""

    verdict: bool | None
    explanation: str


class Cost(NamedTuple):
    """What judging will take; tokens are estimated and `price` is None where a price is not known."""

    num_requests: int
    input_tokens: int
    output_tokens: int
    price: float | None


class Judge(ABC):
    """Somebody who judges summaries; a recipe names a subclass and its arguments."""

    @abstractmethod
    def cost(self, records: Sequence[Record]) -> Cost:
        """An estimate, on the high side, of what `judge` will cost.

        Raises:
            UserError: If an option of the judge is wrong.
        """

    @abstractmethod
    def judge(self, records: Sequence[Record]) -> list[Judgement]:
        """A judgement of each record's `model_answer`, given its `document` and `summary`.

        Raises:
            UserError: If one cannot be had. Those that were paid for are not lost.
        """


@dataclass(kw_only=True)
class ChatJudge(Judge):
    """A model behind an OpenAI-compatible endpoint.

    Its answers are kept on disk, by the hash of what was asked, and asked for once: a run that was broken off goes on
    where it was, and another run over the same summaries costs nothing.

    Args:
        url: What stands before `/chat/completions`, such as "https://api.openai.com/v1".
        model: Name of the model there.
        key_variable: Environment variable that holds the key; none for a server that wants none.
        cache: File of answers, shared by all judges that name it.
        max_tokens: Most tokens of an answer.
        options: Further fields of the request, such as {temperature: 0}; null takes a field out, for models that know
            `max_completion_tokens` but not `max_tokens`.
        input_price: Price of a million tokens that the model reads; unknown if not given.
        output_price: Price of a million tokens that it writes.
        requests_per_minute: Most requests in a minute; no limit if not given.
        max_in_flight: Most requests at once.
        timeout: Seconds that one request may take.
        max_retries: Attempts after the first, for failures that may pass.
        backoff: Seconds before the second attempt; doubled at each further one.
        on_refusal: What to do when the endpoint refuses a single request, for its content or its length: stop, or
            count that summary as undecided.
    """

    url: str
    model: str
    key_variable: str | None = None
    cache: str = "evaluations/judge_answers.jsonl"
    max_tokens: int = 1024
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})
    input_price: float | None = None
    output_price: float | None = None
    requests_per_minute: float | None = None
    max_in_flight: int = 4
    timeout: float = 120.0
    max_retries: int = 6
    backoff: float = 1.0
    on_refusal: Literal["stop", "undecided"] = "stop"

    def cost(self, records: Sequence[Record]) -> Cost:
        known = AnswerCache(Path(self.cache)).answers
        bodies = {self._key_of(body): body for body in map(self._body, records)}  # equal summaries are asked once
        unknown = [body for key, body in bodies.items() if key not in known]
        if unknown:
            self._endpoint().check_key()
        texts = [message["content"] for body in unknown for message in body["messages"]]
        num_read = sum(math.ceil(len(text) / 4) for text in texts)  # about four characters to a token of English
        num_written = sum(body.get("max_tokens") or body.get("max_completion_tokens", 0) for body in unknown)
        if not unknown:
            return Cost(0, 0, 0, 0.0)
        if self.input_price is None or self.output_price is None:
            return Cost(len(unknown), num_read, num_written, None)
        price = (num_read * self.input_price + num_written * self.output_price) / 1e6
        return Cost(len(unknown), num_read, num_written, price)

    def judge(self, records: Sequence[Record]) -> list[Judgement]:
        bodies = [self._body(record) for record in records]
        keys = [self._key_of(body) for body in bodies]
        cache = AnswerCache(Path(self.cache))
        unknown = {key: body for key, body in zip(keys, bodies, strict=True) if key not in cache.answers}
        if unknown:
            open_keys = list(unknown)
            with tqdm(total=len(unknown), desc=self.model) as bar:

                def keep(index: int, answer: str) -> None:
                    cache.add(open_keys[index], answer)
                    bar.update()

                self._endpoint().ask_all(list(unknown.values()), keep)
        texts = [cache.answers[key] for key in keys]
        return [Judgement(parse_verdict(text), text) for text in texts]

    def _body(self, record: Record) -> dict[str, Any]:
        prompt = judge_prompt(record["document"], record["summary"], record["model_answer"])
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        body = {"messages": messages, "max_tokens": self.max_tokens, **self.options}
        return {name: value for name, value in body.items() if value is not None}

    def _key_of(self, body: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self.model, body], sort_keys=True).encode()).hexdigest()

    def _endpoint(self) -> ChatEndpoint:
        return ChatEndpoint(
            self.url,
            self.model,
            self.key_variable,
            timeout=self.timeout,
            max_retries=self.max_retries,
            backoff=self.backoff,
            requests_per_minute=self.requests_per_minute,
            max_in_flight=self.max_in_flight,
            on_refusal="stop" if self.on_refusal == "stop" else "empty",
        )


@dataclass(kw_only=True)
class RecordedJudge(Judge):
    """Verdicts that were given before, by people for instance.

    Args:
        file: Lines of JSON with `model_answer`, the summary that was judged, `id` of its record, `verdict` (true if
            free of hallucination, false, or null for undecided) and, if wanted, `explanation`.
    """

    file: str

    def cost(self, records: Sequence[Record]) -> Cost:
        return Cost(0, 0, 0, 0.0)

    def judge(self, records: Sequence[Record]) -> list[Judgement]:
        known = {}
        for row in read_rows(self.file):
            verdict = row.value("verdict")
            if verdict is not None and not isinstance(verdict, bool):
                raise row.error(f"verdict must be true, false or null, got {json.dumps(verdict)}")
            explanation = row.text("explanation") if "explanation" in row.fields else ""
            known[row.text("id"), row.text("model_answer")] = Judgement(verdict, explanation)
        judgements = []
        for record in records:
            judgement = known.get((record["id"], record["model_answer"]))
            if judgement is None:
                raise UserError(f"{self.file} has no verdict on the summary of {record['id']}; judge it and add a line")
            judgements.append(judgement)
        return judgements


class AnswerCache:
    """Answers of judges in a file, one JSON line each, written as they come.

    Args:
        file: Made when there is something to write.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.answers: dict[str, str] = {}
        self._lock = threading.Lock()
        if file.is_file():
            whole = file.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]  # a kill may have cut the last line
            os.truncate(file, len(whole))
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    row = json.loads(line)
                    self.answers[row["key"]] = row["answer"]
                except (ValueError, LookupError, TypeError) as error:
                    raise UserError(f"{file}:{number} is no answer of a judge; remove that line") from error

    def add(self, key: str, answer: str) -> None:
        """Keep an answer; it is on the disk when this returns."""
        with self._lock:
            self.answers[key] = answer
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as opened:
                opened.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
                opened.flush()
                os.fsync(opened.fileno())
