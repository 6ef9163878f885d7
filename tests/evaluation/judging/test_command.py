import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from meap_lit import cli
from meap_lit.errors import UserError
from meap_lit.evaluation.judging.command import JudgeSummaries
from meap_lit.evaluation.judging.judges import ChatJudge, RecordedJudge, judge_prompt
from tests.support.chat_server import answer, error, serving

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server(monkeypatch):
    """A judge that accepts text copied verbatim from the document; it fails from request `fail_from` on."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", KEY)

    def judge(handler):
        if len(server.asked) > server.fail_from:
            return error(server.fail_status, f"bad key {handler.headers['Authorization']}")
        prompt = handler.body["messages"][1]["content"]
        document = prompt.split("#Document#: ")[1].split("\n\n#Ground Truth")[0]
        response = prompt.split("#Proposed Summary#: ")[1].split("\n\nWrite your")[0]
        return answer(f"I read it. **Conclusion: {response in document}**")

    with serving(judge) as (url, asked):
        server = SimpleNamespace(url=url, asked=asked, fail_from=math.inf, fail_status=401)
        yield server


@pytest.fixture
def folder(tmp_path):
    """Six summaries as `evaluate` leaves them; those of odd number are in their document."""
    folder = tmp_path / "evaluations"
    folder.mkdir()
    records = [
        {
            "id": str(number),
            "cell": {"dataset": "xsum"},
            "document": f"Lantern {number} is old. It hangs.",
            "summary": f"A lantern ({number}).",
            "model_answer": f"Lantern {number} is {'old' if number % 2 else 'new'}.",
        }
        for number in range(6)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def read(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def chat(server, folder, **options):
    cache = str(folder / "cache.jsonl")
    return ChatJudge(url=server.url, model="m", key_variable="TEST_KEY", cache=cache, backoff=0.01, **options)


def test_command(server, folder, capsys):
    lines = [{"id": str(n), "model_answer": r["model_answer"], "verdict": None} for n, r in enumerate(read(folder))]
    recorded = folder / "people.jsonl"
    recorded.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judges = {"chat": chat(server, folder), "people": RecordedJudge(file=str(recorded))}
    before = read(folder)
    JudgeSummaries(predictions=[str(folder)], judges=judges).run()
    after = read(folder)
    assert [record["verdicts"] for record in after] == [
        {"chat": bool(number % 2), "people": None} for number in range(6)
    ]
    assert after[1]["explanations"] == {"chat": "I read it. **Conclusion: True**", "people": ""}
    assert [{k: v for k, v in r.items() if k not in ("verdicts", "explanations")} for r in after] == before
    body = server.asked[0]["body"]
    assert {name: body[name] for name in ("model", "max_tokens", "temperature")} == {
        "model": "m",
        "max_tokens": 1024,
        "temperature": 0,
    }
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == "You are a helpful assistant."
    printed = capsys.readouterr()
    assert "chat: 6 requests, about " in printed.out
    assert "  chat: 50.00 ± 20.41 % free of hallucination, 0 of 6 undecided\n" in printed.out
    assert "  people: 0.00 ± 0.00 % free of hallucination, 6 of 6 undecided\n" in printed.out
    assert "  chat and people: 50.00 % equal, kappa 0.000\n" in printed.out
    JudgeSummaries(predictions=[str(folder / "predictions.jsonl")], judges={"again": chat(server, folder)}).run()
    assert len(server.asked) == 6  # all known
    assert read(folder)[1]["verdicts"] == {"chat": True, "people": None, "again": True}


def test_what_was_paid_for_is_kept_and_the_key_is_nowhere(server, folder, capfd, caplog):
    server.fail_from = 3
    judge = chat(server, folder, max_in_flight=1)
    with pytest.raises(UserError, match=r"m at http.* refuses: status 401, bad key Bearer \*\*\*$") as caught:
        JudgeSummaries(predictions=[str(folder)], judges={"chat": judge}).run()
    assert "verdicts" not in read(folder)[0]
    assert len((folder / "cache.jsonl").read_text().splitlines()) == 3
    with open(folder / "cache.jsonl", "a") as file:
        file.write('{"key": "cut by a kill')
    server.fail_from = math.inf
    num_asked = len(server.asked)
    JudgeSummaries(predictions=[str(folder)], judges={"chat": judge}).run()
    assert len(server.asked) == num_asked + 3
    assert [record["verdicts"]["chat"] for record in read(folder)] == [False, True] * 3
    captured = capfd.readouterr()
    written = "".join(file.read_text() for file in folder.rglob("*") if file.is_file())
    for text in (written, captured.out, captured.err, caplog.text, str(caught.value), repr(judge)):
        assert KEY not in text
        assert "secret" not in text
    assert len((folder / "cache.jsonl").read_text().splitlines()) == 6


def test_cost(server, folder, capsys):
    judge = chat(server, folder, input_price=2.0, output_price=10.0, max_tokens=100)
    records = read(folder)
    cost = judge.cost(records)
    prompts = [judge_prompt(r["document"], r["summary"], r["model_answer"]) for r in records]
    num_read = sum(math.ceil(len(prompt) / 4) + 7 for prompt in prompts)  # 28 characters of the system's message
    assert cost == (6, num_read, 600, pytest.approx((2 * num_read + 10 * 600) / 1e6))
    assert judge.cost(records * 2) == cost  # equal ones are asked once
    with pytest.raises(UserError, match=r"judging may cost 0.01, more than max_cost 0.001; nothing was asked"):
        JudgeSummaries(predictions=[str(folder)], judges={"a": judge}, max_cost=0.001).run()
    assert (
        f"a: 6 requests, about {num_read:,} tokens read, at most 600 written, at most 0.01\n" in capsys.readouterr().out
    )
    unknown = chat(server, folder)
    with pytest.raises(UserError, match="max_cost 1 needs input_price, output_price and max_tokens of judge a; give"):
        JudgeSummaries(predictions=[str(folder)], judges={"a": unknown}, max_cost=1).run()
    assert server.asked == []
    JudgeSummaries(predictions=[str(folder)], judges={"a": judge}, max_cost=1).run()
    assert judge.cost(records) == (0, 0, 0, 0)
    assert unknown.cost(records).num_requests == 6  # another max_tokens is another question


def test_an_answer_without_limit_has_no_price(server, folder, capsys):
    judge = chat(server, folder, input_price=2.0, output_price=10.0, options={"max_tokens": None})
    assert judge.cost(read(folder))[2:] == (None, None)
    with pytest.raises(UserError, match="max_cost 5 needs input_price, output_price and max_tokens of judge a"):
        JudgeSummaries(predictions=[str(folder)], judges={"a": judge}, max_cost=5).run()
    assert "without limit written, price unknown" in capsys.readouterr().out
    assert server.asked == []


def test_endpoints_that_name_their_models_alike_do_not_share_answers(server, folder):
    judge = chat(server, folder)
    judge.judge(read(folder)[:1])
    assert judge.cost(read(folder)[:1]).num_requests == 0
    assert dataclasses.replace(judge, url=f"{judge.url}/").cost(read(folder)[:1]).num_requests == 0
    assert dataclasses.replace(judge, url=f"{judge.url}2").cost(read(folder)[:1]).num_requests == 1


def test_options_of_the_request(server, folder):
    judge = chat(server, folder, options={"max_tokens": None, "max_completion_tokens": 9, "top_p": 0.5})
    assert judge.cost(read(folder)).output_tokens == 6 * 9
    judge.judge(read(folder)[:1])
    assert sorted(server.asked[0]["body"]) == ["max_completion_tokens", "messages", "model", "top_p"]


def test_refused_contents(server, folder):
    server.fail_from, server.fail_status = 4, 400
    judge = chat(server, folder, max_in_flight=1, on_refusal="undecided")
    assert [verdict for verdict, _ in judge.judge(read(folder))] == [False, True, False, True, None, None]
    with pytest.raises(UserError, match="refuses: status 400"):
        chat(server, folder, max_tokens=5).judge(read(folder))


def test_recipe(server, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "judge", "meap_lit.evaluation.judging.command.JudgeSummaries")
    for name in ("OPENAI_API_KEY", "DEEPSEEK_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    words = ["judge", "--config", "recipes/eval/judge.yaml", "--predictions", str(folder), "--max_cost", "0.5"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("error: the environment variable OPENAI_API_KEY is not set; ")
    recipe = tmp_path / "judge.yaml"
    recipe.write_text(
        f"judges:\n  local:\n    class_path: meap_lit.evaluation.judging.judges.ChatJudge\n    init_args:\n"
        f"      url: {server.url}\n      model: m\n      cache: {folder}/cache.jsonl\n"
    )
    assert cli.main(["judge", "--config", str(recipe), "--predictions", str(folder)]) == 0
    assert [record["verdicts"] for record in read(folder)] == [{"local": bool(number % 2)} for number in range(6)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "predictions.jsonl, line 2"),
        ("[]", "predictions.jsonl, line 2"),
        ('{"id": "1"}', "predictions.jsonl, line 2: no field 'document', only 'id'"),
        ('{"id": "1", "document": "d", "summary": "s"}', "predictions.jsonl, line 2: no field 'model_answer'"),
        (
            '{"id": "1", "document": "d", "summary": "s", "model_answer": 1}',
            "predictions.jsonl, line 2: .*model_answer",
        ),
    ],
)
def test_wrong_predictions(folder, line, message):
    file = folder / "predictions.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        JudgeSummaries(predictions=[str(folder)], judges={"people": RecordedJudge(file="x.jsonl")}).run()


def test_other_wrong_input(folder, server, monkeypatch):
    with pytest.raises(UserError, match="judges is empty"):
        JudgeSummaries(predictions=[str(folder)], judges={}).run()
    with pytest.raises(UserError, match="no summaries; name the folder"):
        JudgeSummaries(predictions=[], judges={"a": chat(server, folder)}).run()
    with pytest.raises(UserError, match=r"none.jsonl does not exist; evaluate writes it"):
        JudgeSummaries(predictions=["none.jsonl"], judges={"a": chat(server, folder)}).run()
    (folder / "cache.jsonl").write_text('{"key": "x"}\n')
    with pytest.raises(UserError, match=r"cache.jsonl:1 is not an answer of a judge .'answer'.; remove that line"):
        JudgeSummaries(predictions=[str(folder)], judges={"a": chat(server, folder)}).run()
    (folder / "cache.jsonl").unlink()
    monkeypatch.delenv("TEST_KEY")  # known before anything is asked
    with pytest.raises(UserError, match="the environment variable TEST_KEY is not set"):
        JudgeSummaries(predictions=[str(folder)], judges={"a": chat(server, folder)}).run()
    assert server.asked == []
