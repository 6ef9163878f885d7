"""Against a local server that misbehaves in the ways that servers do."""

import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.judging.chat_endpoint import ChatEndpoint, Pace, Stopped
from tests.support.chat_server import answer, error, serving

KEY = "sk-very-secret-0123456789"
BODY = {"messages": [{"role": "user", "content": "?"}]}


def closes(handler):
    handler.close_connection = True
    handler.connection.close()


def breaks_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": ')
    handler.close_connection = True


def hangs(handler):
    time.sleep(1.5)
    handler.close_connection = True


def trickles(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(30):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass
    handler.close_connection = True


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def endpoint(url, **options):
    return ChatEndpoint(url, "judge-1", "TEST_KEY", **{"backoff": 0.01, "timeout": 30.0, **options})


def test_request():
    with serving(answer("fine")) as (url, asked):
        assert endpoint(url + "/").ask({**BODY, "temperature": 0}) == "fine"
        assert ChatEndpoint(url, "judge-1").ask(BODY) == "fine"
    assert asked[0]["path"] == "/v1/chat/completions"
    assert asked[0]["key"] == f"Bearer {KEY}"
    assert asked[0]["body"] == {"model": "judge-1", **BODY, "temperature": 0}
    assert asked[1]["key"] is None


@pytest.mark.parametrize(
    ("trouble", "options"),
    [
        (error(429), {}),
        (error(500), {}),
        (error(503), {}),
        ((502, {}, b"<html>bad gateway"), {}),
        ((200, {}, b"{not json"), {}),
        ((200, {}, b"[]"), {}),
        ((200, {}, b'{"choices": []}'), {}),
        ((200, {}, b'{"choices": [{"message": {"content": 3}}]}'), {}),
        ((200, {}, b""), {}),
        (closes, {}),
        (breaks_off, {}),
        (hangs, {"timeout": 0.5}),
        (trickles, {"timeout": 0.5}),
    ],
)
def test_what_may_pass_is_tried_again(trouble, options):
    with serving(trouble, trouble, answer("fine")) as (url, asked):
        assert endpoint(url, **options).ask(BODY) == "fine"
        assert len(asked) == 3 or options  # a short timeout may also hit the answer


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (error(429, "slow down"), r"judge-1 at http://.*/chat/completions failed 3 times, .*: status 429, slow down$"),
        ((503, {}, b""), "status 503, Service Unavailable"),
        ((200, {}, b"{not json"), "no answer in '{not json'"),
        (closes, "failed 3 times, the last time: (Remote end closed|.*[Cc]onnection)"),
        (breaks_off, "IncompleteRead"),
    ],
)
def test_what_does_not_pass_ends(trouble, message):
    with serving(trouble) as (url, asked):
        with pytest.raises(UserError, match=message) as caught:
            endpoint(url, max_retries=2).ask(BODY)
        assert len(asked) == 3
    assert "\n" not in str(caught.value)


def test_nobody_there():
    with serving(answer("")) as (url, _):
        pass
    with pytest.raises(UserError, match=r"failed 2 times, the last time: .*refused"):
        endpoint(url, max_retries=1).ask(BODY)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 301])
def test_a_refusal_is_not_repeated(status):
    # a server may repeat the key, and a redirect would take it elsewhere
    with serving(error(status, f"Incorrect API key provided: {KEY}\nsee", Location="http://127.0.0.1:9/")) as (
        url,
        asked,
    ):
        with pytest.raises(UserError) as caught:
            endpoint(url).ask(BODY)
        assert len(asked) == 1
    assert str(caught.value) == (
        f"judge-1 at {url}/chat/completions refuses: status {status}, Incorrect API key provided: *** see"
    )


def test_a_refused_content_may_count_as_no_answer():
    with serving(error(400, "content risk")) as (url, _):
        assert endpoint(url, on_refusal="undecided").ask(BODY) == ""
    with serving((200, {}, b'{"choices": [{"message": {"content": null, "refusal": "I cannot"}}]}')) as (url, _):
        assert endpoint(url).ask(BODY) == ""
    with serving(error(401)) as (url, _), pytest.raises(UserError, match="status 401"):
        endpoint(url, on_refusal="undecided").ask(BODY)


def test_retry_after_is_honoured():
    for value, seconds in (("0.4", 0.4), ("soon", 0), ("-5", 0), ("nan", 0)):
        with serving(error(429, Retry_After=value), answer("fine")) as (url, asked):
            assert endpoint(url).ask(BODY) == "fine"
            assert asked[1]["time"] - asked[0]["time"] >= seconds
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=80_500), usegmt=True)
    for value, seconds in (("86400", "86400"), (date, r"80\d\d\d")):
        with serving(error(429, "quota", Retry_After=value)) as (url, asked):
            with pytest.raises(UserError, match=rf"asks to wait {seconds} s \(status 429, quota\); try again then"):
                endpoint(url).ask(BODY)
            assert len(asked) == 1


def test_many_at_once():
    barrier = threading.Barrier(3)

    def meets(handler):
        barrier.wait(timeout=60)  # passes only if three are under way together
        return answer("fine")

    found = {}
    with serving(meets, meets, meets, error(429), answer("fine")) as (url, asked):
        endpoint(url, max_in_flight=3).ask_all([{**BODY, "n": n} for n in range(8)], found.__setitem__)
        assert sorted(each["body"]["n"] for each in asked[:3]) == [0, 1, 2]
        assert len(asked) == 9
    assert found == dict.fromkeys(range(8), "fine")


def test_the_first_failure_ends_all():
    found = {}
    with serving(answer("fine"), error(401, "wrong key")) as (url, asked):
        with pytest.raises(UserError, match="status 401, wrong key"):
            endpoint(url, max_in_flight=2).ask_all([BODY] * 50, found.__setitem__)
        assert len(asked) < 10
    assert list(found.values()) == ["fine"]


def test_rate_limit():
    with serving(answer("fine")) as (url, asked):
        endpoint(url, requests_per_minute=300, max_in_flight=4).ask_all([BODY] * 4, lambda *_: None)
    times = sorted(each["time"] for each in asked)
    assert times[-1] - times[0] >= 0.5  # 0.6, less what a request may take to arrive


def test_pace_stops_those_who_wait():
    pace = Pace()
    pace.rest(60)
    threading.Timer(0.05, pace.stop).start()
    with pytest.raises(Stopped):
        pace.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "api.openai.com/v1"}, "url must be one such as https://api.openai.com/v1, got 'api.openai.com/v1'"),
        ({"url": "ftp://x/v1"}, "url must be one such as"),
        ({"url": "https://me:pass@x/v1"}, "^url must not hold a password; put the key into an environment variable"),
        ({"timeout": 0}, "timeout must be above 0, got 0"),
        ({"max_in_flight": 0}, "max_in_flight must be above 0, got 0"),
        ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
        ({"backoff": -0.5}, "backoff must be at least 0, got -0.5"),
        ({"requests_per_minute": 0}, "requests_per_minute must be above 0, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        ChatEndpoint(**{"url": "http://127.0.0.1:9", "model": "x", **options})


def test_keys_that_cannot_be_sent(monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(UserError, match=r"^the environment variable TEST_KEY is not set; put the key of http"):
        endpoint("http://127.0.0.1:9").key()
    for key in ("sk-\nsecret", "sk-sécret"):
        monkeypatch.setenv("TEST_KEY", key)
        with pytest.raises(UserError, match=r"^the environment variable TEST_KEY holds characters that no key has$"):
            endpoint("http://127.0.0.1:9").ask(BODY)
    monkeypatch.setenv("TEST_KEY", f"{KEY}\n")  # as from a file
    with serving(answer("fine")) as (url, asked):
        assert endpoint(url).ask(BODY) == "fine"
    assert asked[0]["key"] == f"Bearer {KEY}"
    assert KEY not in repr(vars(endpoint(url)))
