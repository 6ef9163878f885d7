"""What a judge is asked and what its answer means; tests that ask a server are in test_judge.py."""

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.judging.judges import RecordedJudge, judge_prompt, parse_verdict


def test_prompt_is_the_one_of_the_protocol():
    """Word for word from voidism/Lookback-Lens, without what it asks on problematic spans."""
    assert judge_prompt("{DOC}", "{GOLD}", "{OURS}") == (
        "You will be provided with a document and a proposed summary. Your task is to determine if the proposed summary can be directly inferred from the document. If the summary contains any information not found in the document, it is considered false. Even if the summary is different from a ground truth summary, it might still be true, as long as it doesn't contain false information.\n"  # noqa: E501
        "For each proposed summary, explain why it is true or false based on the information from the document. Focus only on the original document's content, disregarding any external context.\n"  # noqa: E501
        "After your explanation, give your final conclusion as **Conclusion: True** if the proposed summary is completely accurate based on the document, or **Conclusion: False** if it contains any incorrect or unsupported information.\n\n"  # noqa: E501
        "#Document#: {DOC}\n\n#Ground Truth Summary#: {GOLD}\n\n#Proposed Summary#: {OURS}\n\n"
        "Write your explanation first, and then give your final conclusion as **Conclusion: True** if the proposed summary is completely accurate based on the document, or **Conclusion: False** if it contains any incorrect or unsupported information."  # noqa: E501
    )


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("It is. **Conclusion: True**", True),
        ("It is not. **Conclusion: False**", False),
        ("**Conclusion: False** True it is not", False),
        ("**Conclusion: True** **Conclusion: False**", True),  # the first counts
        ("Conclusion: True", True),  # without the stars
        ("Conclusion: False, for True would be wrong", True),  # True is looked for first
        ("**Conclusion: true**", None),
        ("**Conclusion: unclear** True", None),
        ("**Conclusion:** True", None),  # no space after the colon
        ("**Conclusion: ** True", None),
        ("True", None),
        ("", None),
    ],
)
def test_verdict(text, verdict):
    assert parse_verdict(text) is verdict


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "0", "verdict": true}', "people.jsonl, line 1: no field 'model_answer'"),
        ('{"id": "0", "model_answer": "x"}', "people.jsonl, line 1: no field 'verdict'"),
        (
            '{"id": "0", "model_answer": "x", "verdict": "yes"}',
            'line 1: verdict must be true, false or null, got "yes"',
        ),
        ('{"id": "0", "model_answer": "x", "verdict": 1}', "line 1: verdict must be true, false or null, got 1"),
        ('{"id": "0", "model_answer": "x", "verdict": true}', "people.jsonl has no verdict on the summary of 0; judge"),
    ],
)
def test_wrong_recorded_verdicts(tmp_path, line, message):
    (tmp_path / "people.jsonl").write_text(line + "\n")
    judge = RecordedJudge(file=str(tmp_path / "people.jsonl"))
    with pytest.raises(UserError, match=message):
        judge.judge([{"id": "0", "model_answer": "A lantern."}])
