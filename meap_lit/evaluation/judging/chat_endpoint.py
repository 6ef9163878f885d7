"""A chat endpoint with the interface of OpenAI's `chat/completions`, which most providers and local servers have.

What may pass (too many requests, an error of the server, a lost connection, an answer that is no JSON) is tried again
after a wait; what will not (a wrong key, an unknown model) ends the run. The key is read from the environment at each
request and is not kept; where a server repeats it in a message, it is blotted out.
"""

import email.utils
import http.client
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.message import Message
from typing import Any, Literal
from urllib.parse import urlsplit

from meap_lit.errors import UserError

LONGEST_WAIT = 600.0
"""Seconds; an endpoint that asks for a longer rest (a quota of the day) ends the run."""

PASSING = (408, 425, 429)
"""Statuses that may be gone at the next attempt, beside all from 500 on."""

REFUSALS = (400, 413, 422)
"""Statuses of a request that the endpoint refuses for its own sake, such as its content or its length."""


class ChatEndpoint:
    """Asks one model.

    Args:
        url: What stands before `/chat/completions`, such as "https://api.openai.com/v1".
        model: Its name there.
        key_variable: Environment variable that holds the key; none for a server that wants none.
        timeout: Seconds that one request may take.
        max_retries: Attempts after the first.
        backoff: Seconds before the second attempt; doubled at each further one.
        requests_per_minute: Most requests in a minute; no limit if not given.
        max_in_flight: Most requests at once.
        on_refusal: What comes of a request that is refused by one of `REFUSALS`: an error, or an empty answer.

    Raises:
        UserError: If an option is wrong.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        *,
        timeout: float = 120.0,
        max_retries: int = 6,
        backoff: float = 1.0,
        requests_per_minute: float | None = None,
        max_in_flight: int = 4,
        on_refusal: Literal["stop", "empty"] = "stop",
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"url must be one such as https://api.openai.com/v1, got {url!r}")
        if parts.username or parts.password:
            raise UserError("url must not hold a password; put the key into an environment variable for key_variable")
        for name, value in (("timeout", timeout), ("max_in_flight", max_in_flight)):
            if not value > 0:
                raise UserError(f"{name} must be more than 0, got {value:g}")
        for name, value in (("max_retries", max_retries), ("backoff", backoff)):
            if not value >= 0:
                raise UserError(f"{name} must be at least 0, got {value:g}")
        if requests_per_minute is not None and not requests_per_minute > 0:
            raise UserError(f"requests_per_minute must be more than 0, got {requests_per_minute:g}")
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.model = model
        self.key_variable = key_variable
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.max_in_flight = max_in_flight
        self.on_refusal = on_refusal
        self._pace = Pace(requests_per_minute)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check_key(self) -> None:
        """Raises UserError if the environment has no key that can be sent."""
        self._key()

    def ask_all(self, requests: Sequence[Mapping[str, Any]], on_answer: Callable[[int, str], None]) -> None:
        """Ask several requests at once, see `ask`.

        Args:
            requests: Bodies.
            on_answer: Called with the index of the request and its answer as soon as that is there, one call at a
                time but in any order.

        Raises:
            UserError: The first failure; requests that have not been sent then are not, those under way are answered.
        """
        lock = threading.Lock()

        def work(index: int) -> None:
            try:
                answer = self.ask(requests[index])
                with lock:
                    on_answer(index, answer)
            except BaseException:
                self._pace.stop()
                raise

        pool = ThreadPoolExecutor(self.max_in_flight)
        try:
            futures = [pool.submit(work, index) for index in range(len(requests))]
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C
            self._pace.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        failures = [future.exception() for future in futures if not future.cancelled()]
        for failure in failures:
            if failure is not None and not isinstance(failure, Stopped):  # those only came after it
                raise failure

    def ask(self, body: Mapping[str, Any]) -> str:
        """The answer to one request.

        Args:
            body: The JSON of the request without `model`, as the interface defines it.

        Raises:
            UserError: If the endpoint refuses, or all attempts failed.
        """
        data = json.dumps({"model": self.model, **body}).encode()
        attempt = 0
        while True:
            self._pace.wait()
            try:
                return self._attempt(data)
            except Passing as trouble:
                attempt += 1
                if attempt > self.max_retries:
                    times = "once" if attempt == 1 else f"{attempt} times"
                    raise UserError(f"{self.model} at {self.url} failed {times}, the last time: {trouble}") from None
                if trouble.wait > LONGEST_WAIT:
                    raise UserError(
                        f"{self.model} at {self.url} asks to wait {trouble.wait:.0f} s ({trouble}); try again then"
                    ) from None
                # a little more or less than the others who failed with it; the endpoint as a whole gets the rest
                growing = self.backoff * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
                self._pace.rest(max(trouble.wait, min(growing, 60.0)))

    def _attempt(self, data: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        key = self._key()
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                raw = _read(response, time.monotonic() + self.timeout)
        except urllib.error.HTTPError as error:
            problem = self._clean(f"status {error.code}, {_message(error)}")
            if error.code in PASSING or error.code >= 500:
                raise Passing(problem, _retry_after(error.headers)) from None
            if error.code in REFUSALS and self.on_refusal == "empty":
                return ""
            raise UserError(f"{self.model} at {self.url} refuses: {problem}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise Passing(self._clean(str(reason) or type(reason).__name__)) from None
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = 0
        if content is None:  # a model that refuses to answer
            return ""
        if not isinstance(content, str):
            raise Passing(self._clean(f"no answer in {raw[:500].decode(errors='replace')!r}"))
        return content

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise UserError(f"the environment variable {self.key_variable} is not set; put the key of {self.url} there")
        if not key.isascii() or not key.isprintable():  # http.client would name it in its complaint
            raise UserError(f"the environment variable {self.key_variable} holds characters that no key has")
        return key

    def _clean(self, text: str) -> str:
        key = self._key()
        if key is not None:
            text = text.replace(key, "***")
        line = " ".join(text.split())
        return line if len(line) <= 200 else f"{line[:200]}..."


class Passing(Exception):
    """What may be gone at the next attempt, after `wait` seconds at least."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class Stopped(Exception):
    """Another request has failed for good."""


class Pace:
    """Lets threads through at a limited rate, and none while the endpoint rests.

    Args:
        per_minute: How many a minute; no limit if None.
    """

    def __init__(self, per_minute: float | None = None) -> None:
        self._interval = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = 0.0  # when the next may go, by the monotonic clock
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Return when it is the caller's turn; raises Stopped if that will not come."""
        while True:
            with self._lock:
                now = time.monotonic()
                ahead = self._next - now
                if ahead <= 0:
                    self._next = now + self._interval
            if self._stopped.wait(max(ahead, 0)):
                raise Stopped
            if ahead <= 0:
                return

    def rest(self, seconds: float) -> None:
        """Let nobody through for that long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def stop(self) -> None:
        """Send away all who wait and who will come."""
        self._stopped.set()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on, to whatever host the server names, and make a GET of the request."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body; a server that sends it byte by byte has no more time than one that sends nothing."""
    pieces = []
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    if response.length:  # what Content-Length promised and did not come; `read1` says nothing of it
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says of an error: the message of the interface's JSON, or the beginning of any other body."""
    try:
        with error:
            raw = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return raw or str(error.reason)


def _retry_after(headers: Message) -> float:
    """Seconds to wait: the header holds a number or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
