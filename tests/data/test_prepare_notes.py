"""What is said of labelled data when it is prepared, and kept for the run's record; conversations in whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from bigtrain.config import Config, from_dict
from bigtrain.data.examples import PreparedExamples
from bigtrain.data.prepare_examples import prepare_examples
from bigtrain.data.tokenizer import CHATML, train_tokenizer
from bigtrain.errors import ConfigError


def config(
    folder: Path, task: dict[str, Any], rows: list[dict[str, Any]], model: str = "encoder", **data: Any
) -> Config:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "path": str(path),
        "cache_dir": str(folder / "cache"),
        "held_out": 0.3,
        "tokenizer": {"vocab_size": 300},
    }
    return from_dict(
        {
            "model": {"kind": model, "dim": 32, "n_heads": 2, "max_seq_len": 24},
            "task": task,
            "data": {"kind": "labelled"} | settings | data,
            "logger": {"progress": False},
        }
    )


def ids(prepared: PreparedExamples, field: str) -> list[int]:
    found: list[int] = np.fromfile(prepared.directory / f"train.{field}.bin", dtype="<i4").tolist()
    return found


@pytest.mark.parametrize(
    ("task", "label", "said"),
    [
        ({"kind": "classification"}, "spam", "all training examples have the one label 'spam'"),
        (
            {"kind": "classification", "regression": True},
            2.5,
            "all training examples have the one number to predict 2.5",
        ),
        ({"kind": "tagging"}, "O", "all training examples have the one tag 'O'"),
    ],
)
def test_one_class_alone_deserves_a_word(
    task: dict[str, Any], label: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tagged = task["kind"] == "tagging"
    rows = [
        {"words": ["red", str(n)], "tags": [label] * 2} if tagged else {"text": f"red {n}", "label": label}
        for n in range(20)
    ]
    prepared = prepare_examples(config(tmp_path, task, rows))
    first = capsys.readouterr().out
    assert first.startswith(f"warning: {said}")
    assert prepared.notes == [first.removeprefix("warning: ").rstrip("\n")]
    prepare_examples(config(tmp_path, task, rows))  # from the cache
    assert capsys.readouterr().out == first


def test_labels_that_training_has_not_are_named(tmp_path: Path) -> None:
    rows = [{"text": f"red {n}", "label": f"class {n}"} for n in range(12)]
    (note,) = prepare_examples(config(tmp_path, {"kind": "classification"}, rows)).notes
    assert note.startswith("no training example has what held-out ones have, and none can be right: class ")
    rows = [{"text": f"red {n}", "label": "ab"[n % 2]} for n in range(20)]
    assert prepare_examples(config(tmp_path, {"kind": "classification"}, rows)).notes == []


def test_control_tokens_in_texts_are_text(tmp_path: Path) -> None:
    spelled = "BERT puts [SEP] between, <|endoftext|> ends"
    long = {"max_seq_len": 200}
    rows: dict[str, list[dict[str, Any]]] = {
        "classification": [{"text": f"{n} {spelled}", "label": n % 2} for n in range(20)],
        "tagging": [{"words": [str(n), *spelled.split()], "tags": list("ABABABA")} for n in range(20)],
        "translation": [{"source": f"{n} {spelled}", "target": spelled} for n in range(20)],
        "question_answering": [
            {"question": f"{n} [SEP]?", "context": spelled, "answers": [{"text": "ends", "answer_start": 39}]}
            for n in range(20)
        ],
    }
    for kind, records in rows.items():
        for number, record in enumerate(records):
            if kind == "question_answering":
                record["context"] = f"{record['context']} {number}"
        settings = config(tmp_path, {"kind": kind}, records, "seq2seq" if kind == "translation" else "encoder")
        settings.model.max_seq_len = long["max_seq_len"]
        prepared = prepare_examples(settings)
        marks = 2 if kind == "question_answering" else 1
        assert ids(prepared, "tokens").count(prepared.special_ids["sep"]) == marks * prepared.examples["train"], kind
        assert prepared.special_ids["eos"] not in ids(prepared, "tokens"), kind


# ---------------------------------------------------------------------------------------------- conversations


def questions(count: int = 20, ask: str = "why", answer: str = "so") -> list[dict[str, Any]]:
    return [{"prompt": f"{ask} {n}?", "response": f"{answer} {n}"} for n in range(count)]


def test_chatml_makes_its_marks_tokens_where_it_may(tmp_path: Path) -> None:
    chatml = {"kind": "instruction", "template": "chatml"}
    settings = config(tmp_path, chatml, questions(answer="<|im_end|>"), "decoder")
    settings.model.max_seq_len = 64
    trained = prepare_examples(settings)
    tokenizer = Tokenizer.from_file(str(trained.tokenizer_file))
    end = tokenizer.token_to_id(CHATML[1])
    assert trained.notes == []
    assert trained.vocab_size <= 300
    assert ids(trained, "targets").count(end) == trained.examples["train"]
    plain = prepare_examples(config(tmp_path, chatml | {"template": "plain"}, questions(), "decoder"))
    assert Tokenizer.from_file(str(plain.tokenizer_file)).token_to_id(CHATML[1]) is None
    train_tokenizer(["why so"] * 9, 280).save(str(tmp_path / "own.json"))
    given = config(tmp_path, chatml, questions(), "decoder", tokenizer={"path": str(tmp_path / "own.json")})
    grown = prepare_examples(given)
    assert Tokenizer.from_file(str(grown.tokenizer_file)).token_to_id(CHATML[1]) == grown.vocab_size - 1
    given.init_from = "run"  # whose embedding has no rows for them
    spelled = prepare_examples(given)
    assert spelled.vocab_size == grown.vocab_size - 2
    assert "the tokenizer has no tokens <|im_start|> and <|im_end|>" in spelled.notes[0]


def test_what_was_cut_of_conversations_is_counted_by_what_they_lost(tmp_path: Path) -> None:
    rows = [
        *questions(10), *questions(6, ask="the cold red green blue dark loud fox says why and again"),
        *questions(4, answer="the cold red green blue dark loud fox is so and again and again"),
    ]  # fmt: skip
    prepared = prepare_examples(config(tmp_path, {"kind": "instruction", "max_length": 16}, rows, "decoder"))
    (note,) = prepared.notes
    assert prepared.cut == 10
    assert note.startswith(
        "10 of 20 conversations are longer than 16 tokens: 6 lost the beginning of their prompt and 4 lost their end"
    )


@pytest.mark.parametrize("places", [[7], [3, 1200]])
def test_a_conversation_that_the_template_refuses_is_named_by_its_line(tmp_path: Path, places: list[int]) -> None:
    tokenizer = train_tokenizer(["why so"] * 9, 280)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = refusing + "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    rows: list[dict[str, Any]] = []
    for number in range(max(places) + 5):
        turns = [{"role": "user", "content": f"why {number}"}, {"role": "assistant", "content": "so"}]
        first = [{"role": "system", "content": "be brief"}] if number + 1 in places else []
        rows.append({"messages": first + turns})
    data = {"tokenizer": {"path": str(tmp_path)}}
    settings = config(tmp_path, {"kind": "instruction", "template": "tokenizer"}, rows, "decoder", **data)
    with pytest.raises(ConfigError, match=rf"a\.jsonl: line {places[0]}: .* of system, .* \(no system\); give"):
        prepare_examples(settings)
