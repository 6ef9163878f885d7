"""A client of endpoints with OpenAI's `chat/completions` interface, which most providers and local servers offer.

A failure that may pass (too many requests, an error of the server, a lost connection, an answer that is not JSON) is
retried after a wait; a failure that will not (a wrong key, an unknown model) ends the run. The key is read from the
environment at each request and not kept. Where a server repeats it in a message, it is replaced.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from typing import Any, Literal
from urllib.parse import urlsplit

from meap_lit.errors import UserError, check_range, shorten

LONGEST_WAIT = 600.0
"""Seconds; an endpoint that demands a longer wait (a quota of the day) ends the run."""

TEMPORARY = (408, 425, 429)
"""Statuses that may pass, besides all from 500 on."""

REFUSALS = (400, 413, 422)
"""Statuses of a request that is refused for its own content or length."""


@dataclass
class ChatEndpoint:
    """A model behind an endpoint.

    Args:
        url: Address before `/chat/completions`, such as "https://api.openai.com/v1".
        model: Name of the model there.
        key_variable: Environment variable that holds the key; none for a server without keys.
        timeout: Seconds that one request may take in all.
        max_retries: Attempts after the first, for failures that may pass.
        backoff: Seconds before the second attempt; doubled at each further one.
        requests_per_minute: Maximum number of requests in a minute; no limit by default.
        max_in_flight: Maximum number of requests at the same time.
        on_refusal: Reaction to a request that is refused with one of `REFUSALS`: an error that stops the run, or an
            empty answer, which decides nothing.

    Raises:
        UserError: If an option is wrong.
    """

    url: str
    model: str
    key_variable: str | None = None
    timeout: float = 120.0
    max_retries: int = 6
    backoff: float = 1.0
    requests_per_minute: float | None = None
    max_in_flight: int = 4
    on_refusal: Literal["stop", "undecided"] = "stop"

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"url must be one such as https://api.openai.com/v1, got {self.url!r}")
        if parts.username or parts.password:
            raise UserError("url must not hold a password; put the key into an environment variable for key_variable")
        for name in ("timeout", "max_in_flight", "requests_per_minute"):
            check_range(name, getattr(self, name), "(0, inf)")
        for name in ("max_retries", "backoff"):
            check_range(name, getattr(self, name), "[0, inf)")
        self._address = f"{self.url.rstrip('/')}/chat/completions"
        self._name = f"{self.model} at {self._address}"
        self._pace = Pace(self.requests_per_minute)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def key(self) -> str | None:
        """Return the key from the environment, None for a server without keys.

        Raises:
            UserError: If the variable is not set or holds characters that cannot be sent.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise UserError(
                f"the environment variable {self.key_variable} is not set; put the key of {self._address} there"
            )
        if not key.isascii() or not key.isprintable():  # http.client would quote it in its message
            raise UserError(f"the environment variable {self.key_variable} holds characters that no key has")
        return key

    def ask_all(self, requests: Sequence[Mapping[str, Any]], on_answer: Callable[[int, str], None]) -> None:
        """Send several requests at the same time, see `ask`.

        Args:
            requests: Bodies.
            on_answer: Called with the index of a request and its answer as soon as it arrives, in any order.

        Raises:
            UserError: The first failure. Requests under way are answered, no further ones are sent.
        """
        self._pace = Pace(self.requests_per_minute)  # an earlier failure stopped the last one
        failure: BaseException | None = None
        with ThreadPoolExecutor(self.max_in_flight) as pool:
            indices = {pool.submit(self.ask, body): index for index, body in enumerate(requests)}
            try:
                for future in as_completed(indices):
                    error = future.exception()
                    if error is None:
                        on_answer(indices[future], future.result())
                    elif failure is None:  # those after it are `Stopped`
                        failure = error
                        self._pace.stop()
            except BaseException:  # Ctrl-C
                self._pace.stop()
                raise
        if failure is not None:
            raise failure

    def ask(self, body: Mapping[str, Any]) -> str:
        """Return the answer to one request.

        Args:
            body: JSON of the request without `model`, as the interface defines it.

        Raises:
            UserError: If the endpoint refuses, or all attempts fail.
        """
        data = json.dumps({"model": self.model, **body}).encode()
        attempt = 0
        while True:
            self._pace.wait()
            try:
                return self._attempt(data)
            except TemporaryFailure as problem:
                attempt += 1
                if attempt > self.max_retries:
                    times = "once" if attempt == 1 else f"{attempt} times"
                    raise UserError(f"{self._name} failed {times}, the last time: {problem}") from None
                if problem.wait > LONGEST_WAIT:
                    raise UserError(
                        f"{self._name} asks to wait {problem.wait:.0f} s ({problem}); try again then"
                    ) from None
                # a random factor, so that requests that failed together do not return together
                growing = self.backoff * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
                self._pace.rest(max(problem.wait, min(growing, 60.0)))

    def _attempt(self, data: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if (key := self.key()) is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._address, data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                raw = _read(response, time.monotonic() + self.timeout)
        except urllib.error.HTTPError as error:
            problem = self._clean(f"status {error.code}, {_message(error)}")
            if error.code in TEMPORARY or error.code >= 500:
                raise TemporaryFailure(problem, _retry_after(error.headers)) from None
            if error.code in REFUSALS and self.on_refusal == "undecided":
                return ""
            raise UserError(f"{self._name} refuses: {problem}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise TemporaryFailure(self._clean(str(reason) or type(reason).__name__)) from None
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = 0
        if content is None:  # the model refuses to answer
            return ""
        if not isinstance(content, str):
            raise TemporaryFailure(self._clean(f"no answer in {raw[:500].decode(errors='replace')!r}"))
        return content

    def _clean(self, text: str) -> str:
        key = self.key()
        return shorten(" ".join((text if key is None else text.replace(key, "***")).split()), 200)


class TemporaryFailure(Exception):
    """A failure that may be gone at the next attempt, after at least `wait` seconds."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class Stopped(Exception):
    """Another request has failed for good."""


class Pace:
    """Let threads through at a limited rate, and none while the endpoint rests.

    Args:
        per_minute: Number of threads a minute; no limit if None.
    """

    def __init__(self, per_minute: float | None = None) -> None:
        self._interval = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = 0.0  # time of the next thread, by the monotonic clock
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Return when it is the caller's turn; raise `Stopped` after `stop`."""
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
        """Let no thread through for that long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def stop(self) -> None:
        """Make `wait` raise from now on."""
        self._stopped.set()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: urllib would send the key to whatever host the server names."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Return the body, which must be whole at `deadline` even if the server sends it byte by byte."""
    pieces = []
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    if response.length:  # part of the Content-Length is missing, which `read1` does not report
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def _message(error: urllib.error.HTTPError) -> str:
    """Return the server's own words: the message of the interface's JSON, or the beginning of any other body."""
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
    """Return the seconds to wait: the header holds a number or a date (RFC 9110, section 10.2.3)."""
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
