"""The examples that every machine has: enough of them, balanced, true to the source, split by file."""

from __future__ import annotations

import ast
import json
import sysconfig
import time
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import StdlibDataConfig
from bigtrain.data.records import open_records
from bigtrain.data.spoken import spoken
from bigtrain.data.stdlib_records import FAMILIES, LINE_TOKENS, SNIPPET_LINES
from bigtrain.errors import ConfigError

TASKS = ("classification", "tagging", "question_answering", "seq2seq", "docstring", "instruction")


@cache
def examples(task: str) -> list[tuple[dict[str, Any], bool]]:
    if task == "docstring":
        return list(open_records(StdlibDataConfig(pairs="docstring"), "seq2seq", Path()))
    return list(open_records(StdlibDataConfig(), task, Path()))


@pytest.mark.parametrize("task", TASKS)
def test_enough_records_each_once_about_a_twentieth_held_out(task: str) -> None:
    start = time.process_time()
    found = examples(task)
    assert time.process_time() - start < 15  # about 2 s where nothing else runs
    assert 1000 <= len(found) <= (20_000 if task == "seq2seq" else 6000)
    assert 0.7 * 0.05 < sum(held_out for _, held_out in found) / len(found) < 1.6 * 0.05
    assert len({json.dumps(record) for record, _ in found}) == len(found)


def test_another_fraction_gives_the_same_records(tmp_path: Path) -> None:
    records = open_records(StdlibDataConfig(held_out=0.2), "question_answering", tmp_path)
    found = list(records)
    assert [record for record, _ in found] == [record for record, _ in examples("question_answering")]
    assert 0.15 < sum(held_out for _, held_out in found) / len(found) < 0.3


def test_identity_is_content_not_place(tmp_path: Path) -> None:
    one, two = (open_records(StdlibDataConfig(), task, tmp_path).identity() for task in ("tagging", "tagging"))
    assert json.dumps(one) == json.dumps(two)
    assert sysconfig.get_path("stdlib") not in json.dumps(one)
    assert one != open_records(StdlibDataConfig(held_out=0.2), "tagging", tmp_path).identity()


def test_families_are_balanced_and_not_named() -> None:
    found = examples("classification")
    counts = Counter(record["label"] for record, _ in found)
    assert set(counts) == set(FAMILIES)
    assert min(counts.values()) > 0.6 * max(counts.values())
    held_out = Counter(record["label"] for record, out in found if out)
    assert set(held_out) == set(FAMILIES), "every family is tested"
    least, most = SNIPPET_LINES
    for record, _ in found:
        text = record["text"]
        assert least <= len(text.splitlines()) <= most
        assert text.startswith(("def ", "async def "))
        first = ast.parse(text).body[0]
        assert not ast.get_docstring(first), "the docstring is gone"
        assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(first))
        assert FAMILIES[record["label"]][0] not in text.replace("(", " ").replace(".", " ").split()


def test_tags_are_whole_spans_of_every_role() -> None:
    roles: Counter[str] = Counter()
    least, most = LINE_TOKENS
    for record, _ in examples("tagging"):
        words, tags = record["words"], record["tags"]
        assert len(words) == len(tags)
        assert least <= len(words) <= most
        assert all(word and not any(character.isspace() for character in word) for word in words)
        for number, tag in enumerate(tags):
            if tag.startswith("I-"):
                assert tags[number - 1][2:] == tag[2:], "I- goes on with a span"
            roles[tag[2:]] += tag.startswith("B-")
            if tag == "B-FUNCTION":
                assert words[number - 1] == "def"
            elif tag == "B-CLASS":
                assert words[number - 1] == "class"
            elif tag == "B-CALL":
                assert words[number].isidentifier()
                assert words[number + 1] in ("(", ")")
            elif tag == "B-ATTRIBUTE":
                assert words[number - 1] == "."
    assert {role for role, count in roles.items() if count > 100} == {
        "FUNCTION", "CLASS", "PARAMETER", "CALL", "ATTRIBUTE", "MODULE"
    }  # fmt: skip


def test_a_dotted_module_is_one_span() -> None:
    lines = {" ".join(record["words"]): record["tags"] for record, _ in examples("tagging")}
    assert lines["from concurrent . futures import _base"] == ["O", "B-MODULE", "I-MODULE", "I-MODULE", "O", "O"]
    assert lines["from . import tasks"] == ["O", "B-MODULE", "O", "O"]


def test_answers_stand_where_they_are_said_to() -> None:
    found = examples("question_answering")
    for record, _ in found:
        parameter = record["question"].split()[6]
        assert parameter in record["context"]
        for answer in record["answers"]:
            start, text = answer["start"], answer["text"]
            assert record["context"][start : start + len(text)] == text
            assert record["context"][:start].rstrip().endswith("=")
            ast.parse(text, mode="eval")
    without = sum(not record["answers"] for record, _ in found)
    assert 0.15 < without / len(found) < 0.5
    assert len({record["id"] for record, _ in found}) == len(found)
    files = defaultdict(set)
    for record, held_out in found:
        files[record["id"].split(":")[0]].add(held_out)
    assert all(len(sides) == 1 for sides in files.values()), "split by file"


def test_docstrings_are_told_from_the_code_without_them() -> None:
    for record, _ in examples("docstring"):
        assert record["target"] not in record["source"] or len(record["target"]) < 30
        assert 3 <= len(record["target"].split()) <= 25
        assert not ast.get_docstring(ast.parse(record["source"]).body[0])
    for record, _ in examples("instruction"):
        signature, _, rest = record["prompt"].rpartition("\n")
        assert rest == "Write the docstring's first line."
        ast.parse(signature + " pass")
        assert record["response"].strip() == record["response"] != ""


def test_lines_in_words_are_each_line_once_and_no_copy() -> None:
    found = examples("seq2seq")
    assert len({record["source"] for record, _ in found}) == len(found) == 20_000
    for record, _ in found:
        assert record["target"] == spoken(record["source"]) != record["source"]


def test_regression_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no examples of regression; data=labelled data\.path=FILE"):
        open_records(StdlibDataConfig(), "regression", tmp_path)
