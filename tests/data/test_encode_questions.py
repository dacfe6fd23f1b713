"""Questions on contexts become windows, and their tokens lead back to the context's characters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from bigtrain.checks import check
from bigtrain.config import Config, QuestionAnsweringConfig, from_dict
from bigtrain.data.encode_questions import QuestionEncoder
from bigtrain.data.examples import Example, Examples
from bigtrain.data.prepare_examples import prepare_examples
from bigtrain.data.tokenizer import train_tokenizer
from bigtrain.errors import ConfigError

CONTEXT = "The red house stands by the old mill. " * 6 + "Its owner is Zoë Quartz, 47. " + "Birds sing in it. " * 8
QUESTION = "Who is the owner of the house?"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made: Tokenizer = train_tokenizer([CONTEXT, QUESTION], 320, for_encoder=True)
    return made


def record(answer: str | None = "Zoë Quartz", question: str = QUESTION, context: str = CONTEXT) -> dict[str, Any]:
    answers = [] if answer is None else [{"text": answer, "start": context.index(answer)}]
    return {"id": "q", "question": question, "context": context, "answers": answers}


def encode(tokenizer: Tokenizer, asked: dict[str, Any], length: int, stride: int) -> tuple[list[Example], int]:
    encoder = QuestionEncoder(QuestionAnsweringConfig(max_length=length, stride=stride), tokenizer, 4096)
    (examples,) = encoder.encode([asked], {})
    return examples, encoder.cut


def text_of(window: Example, first: int, last: int, context: str = CONTEXT) -> str:
    """Of the window's tokens first to last."""
    at = window["context_at"]
    return context[window["char_begins"][first - at] : window["char_ends"][last - at]]


def test_a_pair_that_fits_is_the_tokenizers_own(tokenizer: Tokenizer) -> None:
    (window,), cut = encode(tokenizer, record(), 4000, 64)
    whole = tokenizer.encode(QUESTION, CONTEXT)
    assert window["tokens"] == whole.ids
    assert window["token_types"] == whole.type_ids
    assert window["context_at"] == whole.type_ids.index(1)
    assert len(window["char_begins"]) == len(window["char_ends"]) == len(tokenizer.encode(CONTEXT).ids) - 2
    assert text_of(window, window["start"], window["end"]).strip(" ,") == "Zoë Quartz"
    assert cut == 0


def test_windows_overlap_by_the_stride_and_cover_the_context(tokenizer: Tokenizer) -> None:
    windows, cut = encode(tokenizer, record(), 64, 12)
    assert cut == 1
    assert len(windows) > 2
    context = tokenizer.encode(CONTEXT, add_special_tokens=False).ids
    question = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    found: list[int] = []
    for window in windows:
        at = window["context_at"]
        assert window["tokens"][:at] == [cls, *question, sep]
        assert window["tokens"][-1] == sep
        assert window["token_types"] == [0] * at + [1] * (len(window["tokens"]) - at)
        part = window["tokens"][at:-1]
        assert len(window["char_begins"]) == len(part)
        assert len(window["tokens"]) == 64 or window is windows[-1]
        if found:
            assert found[-12:] == part[:12]
        found += part[12:] if found else part
    assert found == context


def test_the_answer_is_where_the_window_holds_the_whole_of_it(tokenizer: Tokenizer) -> None:
    windows, _ = encode(tokenizer, record(), 64, 12)
    holding = [window for window in windows if window["start"]]
    assert 1 <= len(holding) < len(windows)
    for window in holding:
        assert text_of(window, window["start"], window["end"]).strip(" ,") == "Zoë Quartz"
    for window in windows:
        if not window["start"]:
            at = window["context_at"]
            assert "Zoë Quartz" not in text_of(window, at, at + len(window["char_begins"]) - 1)
            assert window["end"] == 0  # [CLS]


def test_no_answer_is_cls(tokenizer: Tokenizer) -> None:
    windows, _ = encode(tokenizer, record(None), 64, 12)
    assert {(window["start"], window["end"]) for window in windows} == {(0, 0)}


def test_of_several_answers_the_first_that_the_window_holds(tokenizer: Tokenizer) -> None:
    asked = record()
    asked["answers"] = [{"text": CONTEXT, "start": 0}, *asked["answers"]]  # no window holds the first
    windows, _ = encode(tokenizer, asked, 64, 12)
    assert any(window["start"] for window in windows)


def test_an_answer_longer_than_a_window_is_an_error_and_not_taught_as_none(tokenizer: Tokenizer) -> None:
    room = 64 - 3 - len(tokenizer.encode(QUESTION, add_special_tokens=False).ids)
    length = len(tokenizer.encode(CONTEXT, add_special_tokens=False).ids)
    said = rf"task\.max_length=64: q: its answer has {length} tokens, and a window has room for {room} .*raise"
    with pytest.raises(ConfigError, match=said):
        encode(tokenizer, record(CONTEXT), 64, 12)
    (window,), _ = encode(tokenizer, record(CONTEXT), length + 100, 12)
    assert window["end"] - window["start"] + 1 == length


def test_an_answer_of_the_overlap_and_a_token_is_whole_in_some_window_wherever_it_stands(tokenizer: Tokenizer) -> None:
    """... and one that is a token longer is not: to the windows it falls between there is no answer."""
    context = CONTEXT.replace("ë", "e")  # each token is of its own characters
    offsets = tokenizer.encode(context, add_special_tokens=False).offsets
    encoder = QuestionEncoder(QuestionAnsweringConfig(max_length=64, stride=12), tokenizer, 4096)

    def windows(first: int, length: int) -> list[Example]:
        begin, end = offsets[first][0], offsets[first + length - 1][1]
        asked = record(None, context=context) | {"answers": [{"text": context[begin:end], "start": begin}]}
        (examples,) = encoder.encode([asked], {})
        for window in examples:
            if window["start"]:
                assert text_of(window, window["start"], window["end"], context) == context[begin:end]
        return examples

    for first in range(len(offsets) - 13):
        assert any(window["start"] for window in windows(first, 13)), first
    assert encoder.torn == 0
    room = len(windows(0, 1)[0]["char_begins"])
    between = room - 12 - 1  # the last token that the first window alone holds, of 14
    assert {(window["start"], window["end"]) for window in windows(between, 14)} == {(0, 0)}
    assert encoder.torn == 1
    assert any(window["start"] for window in windows(between + 1, 14))
    assert any(window["start"] for window in windows(between - 1, 14))
    assert encoder.torn == 1


@pytest.mark.parametrize("short_of_the_stride", [0, 1, 5])
def test_a_pair_that_fits_is_one_window_however_long_its_question(
    tokenizer: Tokenizer, short_of_the_stride: int
) -> None:
    context = "The red house."
    n_tokens = len(tokenizer.encode(context, add_special_tokens=False).ids)
    whole = tokenizer.encode(QUESTION, context).ids
    asked = record("red", context=context)
    (window,), cut = encode(tokenizer, asked, len(whole), n_tokens + short_of_the_stride)
    assert window["tokens"] == whole
    assert text_of(window, window["start"], window["end"], context).strip() == "red"
    assert cut == 0


def test_an_overlong_question_loses_its_end(tokenizer: Tokenizer) -> None:
    question = QUESTION * 30
    windows, cut = encode(tokenizer, record(question=question), 64, 12)
    assert cut == 1
    most = (64 - 3 - 12) // 2
    kept = tokenizer.encode(question, add_special_tokens=False).ids[:most]
    assert all(window["tokens"][1 : 1 + most] == kept for window in windows)
    assert all(window["context_at"] == most + 2 and len(window["tokens"]) <= 64 for window in windows)
    assert any(window["start"] for window in windows)


def test_a_context_without_tokens_is_one_window() -> None:
    from tokenizers import models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "who": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    (window,), _ = encode(words, record(None, "who", " \n "), 32, 8)
    assert window["tokens"] == [1, 3, 2, 2]
    assert window["char_begins"] == []


# -------------------------------------------------------------------------------------------------- on disk


def config(folder: Path, **task: Any) -> Config:
    return from_dict(
        {
            "model": {"kind": "encoder", "dim": 32, "n_heads": 2, "max_seq_len": 48},
            "task": {"kind": "question_answering", "stride": 8} | task,
            "data": {
                "kind": "labelled", "path": str(folder / "a.jsonl"), "cache_dir": str(folder / "cache"),
                "tokenizer": {"vocab_size": 300}, "held_out": 0.4,
            },
            "logger": {"progress": False},
        }
    )  # fmt: skip


def test_a_record_is_kept_once_and_its_windows_name_it(tmp_path: Path) -> None:
    rows = []
    for number in range(30):
        context = f"{number} " + CONTEXT[: 400 if number % 2 else 40]
        rows.append(
            {"question": "Which?", "context": context, "answers": [{"text": "red", "start": context.index("red")}]}
        )
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare_examples(config(tmp_path))
    records = list(prepared.held_out_records())
    examples = Examples(prepared, "held_out")
    numbers = examples.records()
    assert np.unique(numbers).tolist() == list(range(len(records)))
    assert (np.diff(numbers) >= 0).all()
    assert len(numbers) > len(records)
    for index, number in enumerate(numbers):
        window = examples[index]
        if window["start"]:
            at = window["context_at"]
            begin, end = window["char_begins"][window["start"] - at], window["char_ends"][window["end"] - at]
            assert "red" in records[number]["context"][begin:end]
    assert prepare_examples(config(tmp_path, stride=4)).directory != prepared.directory


def test_answers_between_two_windows_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A length at which the answer ends a token after the first window, which holds all of it with a longer overlap."""
    rows = []
    for words in range(1, 41):
        before = "so " * words
        context = before + "the red fox and the brown dog slept there all day. " + "so " * 40
        rows.append({"question": "Who?", "context": context,
                     "answers": [{"text": "the red fox and the brown dog", "start": len(before)}]})  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_examples(config(tmp_path, stride=1))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert re.search(r"warning: no window holds the whole answer to \d+ of the questions.*task\.stride=1\)", said)
    prepare_examples(config(tmp_path, stride=16))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"stride": 25}, r"task\.stride=25: more than half of a window \(model\.max_seq_len=48\); take at most 24"),
        ({"max_length": 32, "stride": 17}, r"task\.stride=17: .*task\.max_length=32"),
        ({"stride": -1}, r"task\.stride=-1"),
        ({"max_answer_length": 0}, r"task\.max_answer_length=0"),
        ({"max_length": 16}, r"task\.max_length=16: too short"),
    ],
)
def test_windows_that_cannot_be(task: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        check(config(tmp_path, **task))
