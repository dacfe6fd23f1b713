"""From a column's value to a field's: what is no label, what is one label, and what a message says."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import pytest

from bigtrain.data.fields import record
from bigtrain.errors import ConfigError


def fail(problem: str, way_out: str) -> ConfigError:
    return ConfigError("data.path", "a.jsonl", f"line 7: {problem}", way_out)


def convert(task: str, row: dict[str, Any], **columns: str) -> dict[str, Any]:
    return record(task, row, columns or {name: name for name in row}, "1", fail)


def said(task: str, row: dict[str, Any], **columns: str) -> str:
    with pytest.raises(ConfigError) as raised:
        convert(task, row, **columns)
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith("data.path='a.jsonl': line 7: ")
    return line.removeprefix("data.path='a.jsonl': line 7: ")


@pytest.mark.parametrize("gap", [None, math.nan, Decimal("NaN"), "", " \t", json.loads("NaN")])
def test_a_gap_is_no_value_of_any_field(gap: Any) -> None:
    for task in ("classification", "regression"):
        assert said(task, {"t": "red", "gold": gap}, text="t", label="gold") == (
            "no gold (label); remove the row, or fill it in"
        )
        assert said(task, {"text": gap, "label": 1}) == "no text; remove the row, or fill it in"
    assert convert("classification", {"text": "a", "text_pair": gap, "label": 1}) == {"text": "a", "label": "1"}
    assert convert("instruction", {"prompt": "a", "input": gap, "response": "b"}) == {"prompt": "a", "response": "b"}
    assert "id" not in convert("seq2seq", {"source": "a", "target": "b"})
    assert said("tagging", {"words": ["a", "b"], "ner_tags": [1, gap]}, words="words", tags="ner_tags").startswith(
        "ner_tags (tags): tag 2 is "
    )


@pytest.mark.parametrize("endless", [math.inf, -math.inf])
def test_infinity_is_no_label(endless: float) -> None:
    assert "which is no label" in said("classification", {"text": "a", "label": endless})
    assert "a number is wanted" in said("regression", {"text": "a", "label": endless})


@pytest.mark.parametrize(
    ("label", "spellings"),
    {
        "1": [1, 1.0, "1", "1.0", " 1.00 ", Decimal("1.0")],
        "0": [0, -0.0, "0.0", "-0", "-0.0"],
        "-1": [-1, -1.0, "-1.0"],
        "True": [True, "True", "true", "TRUE"],
        "False": [False, "false"],
        "1.5": [1.5, "1.5", Decimal("1.5")],
        "01": ["01"],
        "01.0": ["01.0"],
        "1.0.0": ["1.0.0"],
        "v1.0": ["v1.0"],
        "Yes": ["Yes"],
        "yes": ["yes"],
    }.items(),
)
def test_a_label_is_one_in_every_format(label: str, spellings: list[Any]) -> None:
    for spelling in spellings:
        assert convert("classification", {"text": "a", "label": spelling})["label"] == label
        assert convert("tagging", {"words": ["a"], "tags": [spelling]})["tags"] == [label]


def test_a_message_names_the_users_column() -> None:
    assert said("classification", {"0": 5, "1": "x"}, text="0", label="1") == (
        'column 0 (text) is int, text is wanted; write it in quotes: "5"'
    )
    chat = [{"role": "user", "content": "hi"}]
    assert "data.columns={messages: COLUMN}" in said("instruction", {"prompt": chat, "response": "b"})
    lengths = said("tagging", {"tokens": ["a", "b"], "pos": [1]}, words="tokens", tags="pos")
    assert lengths == "2 in tokens (words), 1 in pos (tags); each word needs one tag"
    assert "tokens (words): word 2 is int" in said(
        "tagging", {"tokens": ["a", 2], "pos": [1, 2]}, words="tokens", tags="pos"
    )


# ------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([{"text": "red", "answer_start": None}], "answers has answer_start null, the number of a character is wanted"),
        ([{"text": "red", "answer_start": math.nan}], "answers has answer_start nan"),
        ([{"text": "red", "answer_start": "0"}], "answers has answer_start '0'"),
        ([{"text": "red", "start": None}], "answers has start null"),
        ([{"text": "red"}], "answers has no answer_start"),
        ([{"answer_start": 0}], "answers has no text"),
        ([{"text": None, "answer_start": 0}], "answers has text null"),
        ([{"text": "red", "answer_start": 0}, {"text": "r"}], "answers: answer 2 has no answer_start"),
        ({"text": ["red"], "answer_start": [None]}, "answers has answer_start null"),
        ({"text": ["red"], "answer_start": []}, "answers has 1 of text and 0 of answer_start"),
        ({"text": ["red"]}, "answers has 1 of text and no list answer_start"),
        ("red", "answers is no list of answers as JSON"),
        (["red"], "answers is str, an object with text and answer_start is wanted"),
        ([{"text": "", "answer_start": 0}], "the text of an answer is empty; answers is [] where there is no answer"),
    ],
)
def test_what_is_wrong_with_answers_is_said_in_the_files_own_words(answers: Any, problem: str) -> None:
    line = said("question_answering", {"question": "what?", "context": "red sky", "answers": answers})
    assert line.startswith(problem)


def test_an_answers_start_may_be_a_whole_float() -> None:
    asked = {"question": "what?", "context": "a red sky", "answers": {"text": ["red"], "answer_start": [2.0]}}
    assert convert("question_answering", asked)["answers"] == [{"text": "red", "start": 2}]


# --------------------------------------------------------------------------------------------------- conversations


def chat(**last: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant"} | last]}


@pytest.mark.parametrize(
    "content",
    [
        "one\ntwo",
        [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        [{"type": "text", "text": "one", "image_url": None}, {"type": "output_text", "text": "two"}],
        ["one", "two"],
        [{"text": "one"}, {"text": "two"}],
        {"type": "text", "text": "one\ntwo"},
    ],
)
def test_content_may_come_in_parts(content: Any) -> None:
    found = convert("instruction", chat(content=content, tool_calls=None, weight=1))["messages"]
    assert found == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "one\ntwo"}]


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        ({"content": None, "tool_calls": [{"id": "1"}]}, "message 2 has tool_calls, which is not read"),
        ({"content": "I look", "tool_calls": [{"id": "1"}]}, "message 2 has tool_calls, which is not read"),
        ({"content": "", "function_call": {"name": "get"}}, "message 2 has function_call"),
        ({"content": "4", "reasoning_content": "2+2"}, "message 2 has reasoning_content"),
        ({"content": "4", "weight": 0}, "message 2 is not to be learned"),
        (
            {"content": [{"type": "image_url", "image_url": {}}]},
            "message 2: its content has a part of the type 'image_url'",
        ),
        ({"content": [{"type": "text", "text": None}]}, "message 2: its content is neither text nor a list of parts"),
        ({"content": []}, "message 2 has no content"),
        ({"content": 4}, "message 2: its content is neither text"),
        ({"value": " "}, "message 2 has no value"),
        ({}, "message 2 has no content"),
        ({"role": "narrator", "content": "4"}, "message 2 has the role 'narrator'"),
    ],
)
def test_what_would_be_lost_of_a_message_is_refused(last: dict[str, Any], problem: str) -> None:
    assert said("instruction", chat(**last)).startswith(f"messages: {problem}")


def test_roles_of_other_formats() -> None:
    turns = [
        {"role": "developer", "content": "be brief"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"},
        {"role": "function", "content": "4"},
    ]  # fmt: skip
    roles = [message["role"] for message in convert("instruction", {"messages": turns})["messages"]]
    assert roles == ["system", "user", "assistant", "tool"]
