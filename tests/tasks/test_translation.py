"""Translation from files to metrics: encoding, batches, what an evaluation writes, `generate` on a run."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain import cli, generate, tasks
from bigtrain.batch import IGNORED, count_tokens
from bigtrain.checkpoint.integrity import seal
from bigtrain.checkpoint.weights import write_weights
from bigtrain.checks import check
from bigtrain.config import Config, dump, from_dict
from bigtrain.data.example_loader import Share
from bigtrain.data.examples import Examples
from bigtrain.data.prepare_examples import prepare_examples
from bigtrain.data.spoken import spoken
from bigtrain.data.tokenizer import find_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.tasks import metrics
from bigtrain.tasks.base import Totals

WORDS = ("rot", "blau", "kalt", "warm", "laut")
PAIRS = [(f"a e i {a} und {b}", f"a e i {a} and {b}") for a in WORDS for b in "abcdefgh"]


def configured(folder: Path, **task: Any) -> Config:
    (folder / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"{s}\t{t}\n" for s, t in PAIRS))
    config = from_dict(
        {
            "model": {"kind": "seq2seq", "dim": 32, "n_heads": 2, "max_seq_len": 32, "init_std": 0.3, "dropout": 0.0},
            "task": {"kind": "translation", "max_new_tokens": 6} | task,
            "data": {
                "kind": "labelled", "path": str(folder / "pairs.tsv"), "held_out": 0.3,
                "cache_dir": str(folder / "cache"), "tokenizer": {"vocab_size": 264},
            },
            "logger": {"progress": False},
        }
    )  # fmt: skip
    check(config)
    prepared = prepare_examples(config)
    return replace(
        config,
        model=replace(config.model, vocab_size=320),
        data=replace(config.data, prepared_dir=str(prepared.directory)),
    )


def test_source_and_target_stand_between_start_and_end(tmp_path: Path) -> None:
    config = configured(tmp_path)
    task: Any = tasks.build(config)
    tokenizer, special = find_tokenizer(str(task.tokenizer_file)), task.special_ids
    examples = Examples(task.data, "held_out")
    for index, record in enumerate(task.data.held_out_records()):
        for field, side in (("tokens", "source"), ("target", "target")):
            ids = examples[index][field].tolist()
            assert ids[0] == special["cls"]
            assert ids[-1] == special["sep"]
            assert tokenizer.decode(ids) == record[side]
    short: Any = tasks.build(configured(tmp_path, max_length=8))
    assert short.data.cut > 0
    assert max(len(Examples(short.data, "train")[i]["target"]) for i in range(10)) == 8
    assert Examples(short.data, "train")[0]["target"][-1] == special["sep"], "what is cut still ends"


def test_batches_read_one_token_and_predict_the_next(tmp_path: Path) -> None:
    task: Any = tasks.build(configured(tmp_path))
    batches = list(task.held_out(Share(0, 1, 8, 8, 0)))
    assert sorted(i for batch in batches for i in batch["index"].tolist() if i >= 0) == list(
        range(task.data.examples["held_out"])
    )
    for batch in batches:
        scored = batch["targets"] != IGNORED
        assert (batch["targets_in"][:, 0] == task.special_ids["cls"]).all()
        assert torch.equal(batch["targets"][:, :-1][scored[:, 1:]], batch["targets_in"][:, 1:][scored[:, 1:]])
        assert not scored[batch["index"] < 0].any(), "filler rows are not scored"
        assert task.count_targets(batch) == int(scored.sum())
        assert count_tokens(batch) == int(batch["attention_mask"].sum() + scored.sum())


@pytest.mark.parametrize("num_beams", [1, 3])
def test_evaluation_writes_a_text_for_each_example(tmp_path: Path, num_beams: int) -> None:
    config = configured(tmp_path, num_beams=num_beams)
    task: Any = tasks.build(config)
    torch.manual_seed(0)
    model = task.build_model(config.model).eval()
    nll, targets, rows = 0.0, 0, {}
    with torch.no_grad():
        for batch in task.held_out(Share(0, 1, 8, 8, 0)):
            found = task.evaluate(model, batch)
            smoothed = task.loss(model, batch)
            torch.testing.assert_close(found.nll, smoothed.nll, rtol=1e-4, atol=1e-4)
            assert smoothed.loss > 0
            nll, targets = nll + float(found.nll), targets + task.count_targets(batch)
            rows |= dict(found.predictions)
    records = list(task.data.held_out_records())
    assert sorted(rows) == list(range(len(records)))
    for index, record in enumerate(records):
        assert rows[index][1:] == (record["source"], record["target"])
        assert task.prediction(rows[index]) == {"prediction": rows[index][0]}
    scores = task.metrics(Totals(nll, targets, {}, rows))
    assert scores["eval/loss"] == pytest.approx(nll / targets)
    assert scores["eval/bleu"] < scores["eval/copy_bleu"] < 100, "the model is a random one"
    perfect = {index: (target, source, target) for index, (_, source, target) in rows.items()}
    assert task.metrics(Totals(nll, targets, {}, perfect))["eval/bleu"] == pytest.approx(100)


def test_metrics_are_sacrebleu_s() -> None:
    true = ["the cat sat on the mat today", "a dog barked at me"]
    found = metrics.translation(["the cat sat on the mat", "a dog barked at us"], true, true)
    # 11 words for 12: 9 of 11, 7 of 9, 5 of 7 and 3 of 5 n-grams are right (the first text is one word short).
    precision = (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25
    assert found["eval/bleu"] == pytest.approx(100 * precision * 2.718281828 ** (1 - 12 / 11))
    assert found["eval/copy_bleu"] == pytest.approx(100)
    assert 0 < found["eval/chrf"] < 100


def test_generate_writes_the_translation_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path)
    run, task = tmp_path / "run", tasks.build(config)
    torch.manual_seed(1)
    model: Any = task.build_model(config.model).eval()
    checkpoint = run / "checkpoints" / "step-00000001"
    (run / "tokenizer").mkdir(parents=True)
    (run / "tokenizer" / "tokenizer.json").write_text(task.tokenizer_file.read_text())
    (run / "config.yaml").write_text(dump(config))
    checkpoint.mkdir(parents=True)
    write_weights(checkpoint, ((name, weight.detach()) for name, weight in model.named_parameters()))
    seal(checkpoint, {"step": 1})
    texts = ["a e rot und a", "blau", "a laut und h"]
    together = generate.run(run, texts, max_new_tokens=6)
    assert together == [generate.run(run, [text], max_new_tokens=6)[0] for text in texts]
    batch: Any = next(iter(task.held_out(Share(0, 1, 1, 1, 0))))
    with torch.no_grad():
        ((_, (expected, source, _)),) = task.evaluate(model, batch).predictions
    assert generate.run(run, [source], max_new_tokens=6) == [expected]

    # a source a line on stdin, with beams
    beams = generate.run(run, texts, max_new_tokens=6, num_beams=3)
    lines = "".join(f"{text}\n" for text in ["", *texts, " "])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    capsys.readouterr()
    assert cli._run(["generate", str(run), "--prompt", "-", "--max-new-tokens", "6", "--num-beams", "3"]) == 0
    assert capsys.readouterr().out == "\n".join(["", *beams, ""]) + "\n", "as many lines as sacrebleu -i expects"


def test_only_an_encoder_decoder_translates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a model of kind seq2seq; take model=transformer_tiny"):
        check(from_dict({"model": {"kind": "encoder"}, "task": {"kind": "translation"}}))
    with pytest.raises(ConfigError, match=r"task\.num_beams"):
        configured(tmp_path, num_beams=0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("count += 1", "add 1 to count"),
        ("self.x = other.y.z", "set x of self to z of y of other"),
        ("if not a or b in c:", "if not a or b is in c"),
        ("elif x >= 2:", "otherwise if x is at least 2"),
        ("return f(a, b, key=1)", "return the result of f with a, b and key being 1"),
        ("items[1:n].sort()", "call sort of the part from 1 up to n of items"),
        ("raise ValueError('no name')", "raise ValueError with the text no name"),
        ("from os import path, sep", "take path and sep from os"),
        ("x = [i for i in y]", None),  # has no words here
        ("def f(a,", None),  # not whole
        ("# x = 1", None),
        ("'''", None),
    ],
)
def test_python_in_words(line: str, words: str | None) -> None:
    assert spoken(line) == words
