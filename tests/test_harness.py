"""A run under lm-evaluation-harness, on a task of our own: no network, and scores that a sum by hand gives too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from bigtrain import cli, harness
from bigtrain.config import Config, MaskedLMConfig, dump
from tests.test_export import GPT, decoder_run

pytest.importorskip("lm_eval")

ROWS = [  # text, choices, the right one
    ("def", [" main", " return", " class"], 0),
    ("import", [" os", " lambda lambda", " def def"], 2),
    ("x =", [" 1", " ["], 1),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a model that has learned nothing, and a folder with a task."""
    folder = tmp_path_factory.mktemp("harness")
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "ours.yaml").write_text(TASK.format(name="ours_choose", data=folder / "rows.jsonl"))
    (tasks / "gone.yaml").write_text(TASK.format(name="ours_gone", data=folder / "gone.jsonl"))
    run, _ = decoder_run(folder / "run", GPT)
    return run, tasks


def best_by_hand(run: Path) -> list[int]:
    """The choice whose tokens the model gives the highest probability, of each row."""
    _, model = decoder_run(run.with_name("again"), GPT)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer" / "tokenizer.json"))
    best = []
    for text, choices, _ in ROWS:
        scores = []
        for choice in choices:
            start, whole = len(tokenizer.encode(text).ids), tokenizer.encode(text + choice).ids
            with torch.no_grad():
                logits = model(torch.tensor([whole]))[0].float().log_softmax(-1)
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole))))
        best.append(max(range(len(choices)), key=scores.__getitem__))
    return best


def test_the_harness_scores_a_run(asked: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, tasks = asked
    asks = ["evaluate", str(run), "--include-path", str(tasks), "--device", "cpu", "--lm-eval"]
    assert cli._run([*asks, "ours_choose"]) == 0
    said = capsys.readouterr().out
    found = json.loads((run / "evaluation" / harness.RESULTS).read_text())
    right = [best == label for best, (_, _, label) in zip(best_by_hand(run), ROWS, strict=True)]
    assert found["results"]["ours_choose"]["acc"] == pytest.approx(sum(right) / len(ROWS))
    assert found["examples"] == {"ours_choose": len(ROWS)}
    assert f"ours_choose  acc  {sum(right) / len(ROWS):.4f}" in said
    assert {"ours_choose", "lm_eval"} <= found["versions"].keys()

    assert cli._run([*asks, "ours_gone"]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bigtrain: ")]
    assert len(error) == 1
    assert "--lm-eval=ours_gone: the harness gave up" in error[0]
    assert "gone.jsonl" in error[0]

    assert cli._run([*asks, "ours_chose"]) == 2
    assert "--lm-eval='ours_chose': the harness has no such task; did you mean ours_choose?" in capsys.readouterr().err


def test_what_cannot_be_asked(
    asked: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = asked
    for arguments, words in (
        (["--limit", "3"], "--include-path and --limit need --lm-eval"),
        (["--lm-eval", ",", "--limit", "3"], "--lm-eval names no task"),
        (["--lm-eval", "arc_easy", "--data", "a.tsv"], "--lm-eval brings its own data"),
    ):
        assert cli._run(["evaluate", str(run), *arguments]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it was not installed
    assert cli._run(["evaluate", str(run), "--lm-eval", "arc_easy"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'bigtrain[lm-eval]'" in said
    (tmp_path / "config.yaml").write_text(dump(Config(task=MaskedLMConfig())))
    assert cli._run(["evaluate", str(tmp_path), "--lm-eval", "arc_easy"]) == 2
    assert "RUN's task is masked_lm; the harness asks models that write on" in capsys.readouterr().err
