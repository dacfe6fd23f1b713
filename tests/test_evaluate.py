"""A run measured on the user's own files: which columns, which split, what is said of a file that does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from bigtrain import evaluate, models
from bigtrain.config import (
    ClassificationConfig,
    Config,
    InstructionConfig,
    LabelledDataConfig,
    TaggingConfig,
    TextDataConfig,
    TokenizerConfig,
    dump,
)
from bigtrain.data import hub
from bigtrain.data.prepare import prepare
from bigtrain.errors import ConfigError
from tests.test_export import BERT, GPT, WithHeads, make_run

TSV = "text\tlabel\ndef main\tO\nreturn 0\tPER\nmain\tLOC\n"


def encoder_run(run: Path, kind: str, **data: Any) -> Path:
    task = TaggingConfig() if kind == "tagging" else ClassificationConfig()
    config = Config(model=BERT, task=task, data=LabelledDataConfig(path="a", **data))
    model = WithHeads(kind)
    if kind == "tagging":
        del model.backbone.pooler  # which it has no use for
    make_run(run, config, model)
    (run / "labels.json").write_text('["O", "PER", "LOC"]')
    return run


def measured(run: Path, data: str, **columns: str | int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    metrics, out = evaluate.run(run, data=[data], columns=columns)
    return metrics, [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_the_columns_are_those_that_the_run_was_trained_on(tmp_path: Path) -> None:
    run = encoder_run(tmp_path / "run", "tagging", columns={"words": 1, "tags": 2})
    (tmp_path / "a.conll").write_text("1\tmain\tPER\t_\n2\treturn\tO\t_\n\n")
    _, (row,) = measured(run, str(tmp_path / "a.conll"))
    assert (row["words"], row["tags"]) == (["main", "return"], ["PER", "O"])
    (tmp_path / "b.conll").write_text("1\tmain\t_\tPER\n2\treturn\t_\tO\n\n")
    _, (row,) = measured(run, str(tmp_path / "b.conll"), tags=3)
    assert (row["words"], row["tags"]) == (["main", "return"], ["PER", "O"])


def test_whether_there_is_a_header_is_what_the_run_was_told(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tPER\ndef main\tO\nreturn 0\tLOC\n")  # which looks like one
    run = encoder_run(tmp_path / "run", "classification", columns={"text": 0, "label": 1}, header=False)
    metrics, rows = measured(run, str(tmp_path / "a.tsv"))
    assert metrics["examples"] == len(rows) == 3


def test_what_is_cut_or_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.tsv").write_text("text\tlabel\nmain\tO\n" + "return " * 2000 + "\tLOC\n")
    (folder / "b.pdf").write_bytes(b"%PDF-1.7")
    metrics, rows = measured(encoder_run(tmp_path / "run", "classification"), str(folder))
    assert len(rows) == 2
    assert metrics["data/examples_cut"] == 1
    assert "1 texts longer than" in metrics["data/notes"][0]
    assert str(folder / "b.pdf") in json.dumps(metrics["data/left_out"])
    said = capsys.readouterr()
    assert said.out == ""  # which is of the numbers alone
    assert "1 texts longer than" in said.err
    assert "b.pdf" in said.err


def test_of_a_hub_dataset_the_held_out_split_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: Any, **options: Any) -> Any:
        asked.append(names)
        splits = {"train": "def", "test": "return"}
        return datasets.IterableDatasetDict({
            split: datasets.Dataset.from_dict({"text": [text], "label": ["O"]}).to_iterable_dataset()
            for split, text in splits.items()
        })  # fmt: skip

    monkeypatch.setattr(hub, "_revision", lambda kind, name, key: "abc")
    monkeypatch.setattr(datasets, "load_dataset", load)
    _, (row,) = measured(encoder_run(tmp_path / "run", "classification", name="small"), "org/set")
    assert row["text"] == "return"
    assert asked == [("org/set", "small")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no record"),
        ("text\tlabel\n", "holds no record"),
        (TSV + "d\tDOG\n", "line 5: 'DOG': a label that no training example has; known are O, PER, LOC"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_that_names_it(text: str, said: str, tmp_path: Path) -> None:
    run = encoder_run(tmp_path / "run", "classification")
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(ConfigError) as raised:
        measured(run, str(tmp_path / "a.tsv"))
    assert str(raised.value) == f"--data={str(tmp_path / 'a.tsv')!r}: {said}"


def test_of_an_unknown_tag_the_sentence_is_named(tmp_path: Path) -> None:
    run = encoder_run(tmp_path / "run", "tagging")
    (tmp_path / "a.conll").write_text("def O\n\nmain PER\nreturn DOG\n\n")
    with pytest.raises(ConfigError, match=r"a\.conll': line 3: 'DOG': a label that no training example has"):
        measured(run, str(tmp_path / "a.conll"))


def test_the_loss_of_responses_has_an_interval(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = make_run(tmp_path / "run", Config(model=GPT, task=InstructionConfig()), models.build(GPT))
    rows = [{"prompt": "def main", "response": "return 0\n" * number} for number in range(1, 6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics, _ = measured(run, str(tmp_path / "a.jsonl"))
    for name in ("eval/loss", "eval/perplexity"):
        assert metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"]
    assert f"[{metrics['eval/loss_low']:.4f}, " in evaluate.table(metrics)


def test_a_language_model_is_measured_on_text_of_the_users(tmp_path: Path) -> None:
    """The same loss as on the same text held out while training."""
    run = make_run(tmp_path / "run", Config(model=GPT), models.build(GPT))
    (tmp_path / "a.txt").write_text("def main():\n    return 0\n" * 40)
    (tmp_path / "b.txt").write_text("import os\n\nclass A:\n    pass\n" * 40)
    data = TextDataConfig(
        path=str(tmp_path / "a.txt"), held_out_path=str(tmp_path / "b.txt"), cache_dir=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(path=str(run / "tokenizer")),
    )  # fmt: skip
    prepared = prepare(Config(model=GPT, data=data))
    trained = Config(model=GPT, data=dataclasses.replace(data, prepared_dir=str(prepared.directory)))
    (run / "config.yaml").write_text(dump(trained))
    known, _ = evaluate.run(run, data=[], columns={})
    asked, _ = evaluate.run(run, data=[str(tmp_path / "b.txt")], columns={})
    for name in ("eval/loss", "eval/perplexity", "eval/bits_per_byte"):
        assert asked[name] == pytest.approx(known[name]), name
    other, _ = evaluate.run(run, data=[str(tmp_path / "a.txt")], columns={})
    assert other["eval/loss"] != asked["eval/loss"]
    (tmp_path / "short.txt").write_text("def")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, said in (
        ("short.txt", "shorter than one sequence"),
        ("empty.txt", "give more text"),
        ("none", "no such file"),
    ):
        with pytest.raises(ConfigError, match=f"{name}.*{said}"):
            evaluate.run(run, data=[str(tmp_path / name)], columns={})
