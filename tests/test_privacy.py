"""What a private run promises: epsilon, draws, noise, what does not go together; and a run that resumes."""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bigtrain import checks, privacy, verify
from bigtrain import config as schema
from bigtrain.checkpoint import changes, checkpoints
from bigtrain.checkpoint.weights import read_weights
from bigtrain.config import Config, from_dict, to_dict
from bigtrain.data.prepare_examples import prepare_examples
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch.local import free_port
from bigtrain.launch.train import prepare_data
from bigtrain.model_card import model_card
from bigtrain.plan import memory, sizes
from bigtrain.privacy import Guarantee, KeyStream, Privacy
from bigtrain.reproduce import reproduce
from tests.distributed.ranks import run_ranks
from tests.runs import bigtrain, losses, metrics, result
from tests.test_config import composed

PROMISE = Guarantee(1.1, 1.0, 0.05, 1e-5, "rdp", 4000, True)


# ------------------------------------------------------------------------------------------- the accounting


@pytest.mark.parametrize(("noise", "steps"), [(4.0, 1), (20.0, 30), (60.0, 400)])
def test_epsilon_of_whole_batches_is_a_bound_on_the_exact_one(noise: float, steps: int) -> None:
    """With every example in every step it is the Gaussian mechanism, whose delta is known (arXiv 1805.06530, th. 8)."""
    epsilon = replace(PROMISE, noise_multiplier=noise, sampling_rate=1.0).epsilon(steps)

    def delta(epsilon: float) -> float:
        mu = math.sqrt(steps) / noise
        upper, lower = stats.norm.cdf(mu / 2 - epsilon / mu), stats.norm.cdf(-mu / 2 - epsilon / mu)
        return float(upper - math.exp(epsilon) * lower)

    assert delta(epsilon) < 1e-5 < delta(0.7 * epsilon)


def test_epsilon_grows_with_steps_and_shrinks_with_noise() -> None:
    assert PROMISE.epsilon(0) == 0
    assert 0 < PROMISE.epsilon(1) < PROMISE.epsilon(100) < PROMISE.epsilon(1000)
    assert replace(PROMISE, noise_multiplier=2.0).epsilon(100) < PROMISE.epsilon(100)
    assert replace(PROMISE, accountant="prv").epsilon(100) < PROMISE.epsilon(100)  # more tightly


def test_epsilon_as_published() -> None:
    """MNIST in TensorFlow Privacy's tutorial: batches of 256 of 60,000, noise 1.3, 15 epochs: 1.18 there, by a looser
    conversion than today's (Balle et al., arXiv 1905.09982)."""
    mnist = Guarantee(1.3, 1.5, 256 / 60_000, 1e-5, "rdp", 60_000, True)
    assert 0.8 < mnist.epsilon(15 * 60_000 // 256) <= 1.19


# ---------------------------------------------------------------------------------------------------- draws


def test_every_example_is_drawn_by_itself() -> None:
    made = Privacy(PROMISE, b"k" * 32, 400)
    drawn = [made.draw(step) for step in range(400)]
    sizes = np.array([len(rows) for rows in drawn])
    assert sizes.mean() == pytest.approx(200, abs=4 * math.sqrt(200 / 400))
    assert sizes.var() == pytest.approx(4000 * 0.05 * 0.95, rel=0.3)  # binomial: not all alike
    often = np.bincount(np.concatenate(drawn), minlength=4000)
    assert stats.chisquare(np.bincount(often, minlength=60)[10:32], _binomial(often)[10:32]).pvalue > 1e-4
    assert all(np.all(np.diff(rows) > 0) for rows in drawn)
    assert np.array_equal(made.draw(7), Privacy(PROMISE, b"k" * 32, 400).draw(7))  # a function of the step
    assert not np.array_equal(made.draw(7), Privacy(PROMISE, b"l" * 32, 400).draw(7))  # and of the secret


def _binomial(often: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many of 4,000 examples are drawn so often in 400 steps, scaled to what the bins hold."""
    wanted = 4000 * stats.binom.pmf(np.arange(60), 400, 0.05)
    counted = np.bincount(often, minlength=60)
    return wanted * counted[10:32].sum() / wanted[10:32].sum()


def test_a_batch_may_be_empty() -> None:
    rare = Privacy(replace(PROMISE, sampling_rate=1e-4), b"k" * 32, 10)
    assert min(len(rare.draw(step)) for step in range(20)) == 0


def test_noise_is_normal() -> None:
    one, other = (KeyStream(key * 32).normal(torch.empty(201, 301)).flatten() for key in (b"a", b"b"))
    for found in (one, other):
        assert stats.kstest(found.numpy(), "norm").pvalue > 1e-3
        assert float(found.abs().max()) > 3.8
    assert abs(stats.pearsonr(one, other).statistic) < 0.02


# ----------------------------------------------------------------------------------------- bad combinations


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return to_dict(composed("experiment=private"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train.privacy.noise_multiplier": 1}, "train.privacy.target_epsilon=8.0: the noise follows from it"),
        ({"train.privacy.target_epsilon": -1}, "train.privacy.target_epsilon=-1.0: must be above 0"),
        ({"train.privacy.target_epsilon": None, "train.privacy.noise_multiplier": 0}, "noise_multiplier=0.0: must be"),
        ({"train.privacy.delta": 1}, "train.privacy.delta=1.0: must be above 0 and below 1"),
        ({"train.privacy.max_grad_norm": 0}, "train.privacy.max_grad_norm=0.0: must be above 0"),
        ({"train.privacy.accountant": "gdp"}, "train.privacy.accountant='gdp': not a valid choice"),
        ({"train.privacy.target_epsilom": 1}, "did you mean train.privacy.target_epsilon?"),
        ({"engine": {"kind": "deepspeed"}}, "take engine=accelerate"),
        ({"launch.ranks": 2}, "launch.ranks=2: differential privacy"),
        ({"launch.ranks": None}, "set launch.ranks=1"),
        ({"launch.nodes": 2, "launch.kind": "torchrun"}, "set launch.nodes=1"),
        ({"train.precision": "bf16"}, "train.precision='bf16': rounds the norms"),
        ({"task": {"kind": "masked_lm"}}, "task.kind='masked_lm': packs many documents"),
        ({"task": {"kind": "causal_lm"}, "model": {"kind": "decoder"}}, "task.kind='causal_lm': packs many"),
        ({"task": {"kind": "question_answering"}}, "several windows of one context"),
        ({"task": {"kind": "translation"}, "model": {"kind": "seq2seq"}}, "task.kind='translation': shares one table"),
        ({"train.guard.spike": "skip"}, "train.guard.spike='skip': would leave out"),
        ({"train.guard.spike": "rollback", "train.save_every": 5}, "train.guard.spike='rollback'"),
        ({"train.guard.replay_every": 2, "train.deterministic": True}, "train.guard.replay_every=2"),
        ({"train.activation_checkpointing": True}, "train.activation_checkpointing=True: runs a layer twice"),
        ({"train.compile": True}, "train.compile=True: compiles"),
        ({"train.lora.rank": 2, "train.lora.dropout": 0.1, "init_from": "x"}, "train.lora.dropout=0.1: hides"),
        ({"compress.prune": {}}, "compress.prune='on': learns from the examples beside the noise"),
        ({"compress.quantize": {}}, "compress.quantize='on'"),
        ({"task": {"kind": "classification", "adversarial": "fgm"}}, "task.adversarial='fgm': an example's gradient"),
        ({"model.unpadded": True}, "model.unpadded=True: packs"),
        ({"data": {"kind": "labelled", "path": "a.tsv"}}, "data.tokenizer.path=None: a tokenizer that is trained on"),
    ],
)
def test_what_would_break_the_promise_is_refused(recipe: dict[str, Any], changed: dict[str, Any], said: str) -> None:
    data = copy.deepcopy(recipe)
    for path, value in changed.items():
        *sections, key = path.split(".")
        place = data
        for name in sections:
            place = place[name]
        place[key] = value
    with pytest.raises(ConfigError) as error:
        checks.check(from_dict(data))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_without_its_packages_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.privacy=.*opacus.*pip install 'bigtrain\[private\]'"):
        composed("experiment=private")
    composed("experiment=classification")  # which needs none of them


def prepared(folder: Path, texts: list[str], **train: Any) -> Config:
    for name in ("train", "held_out"):
        lines = [f"{text}\t{'ab'[number % 2]}\n" for number, text in enumerate(texts)]
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + "".join(lines))
    made = from_dict(
        {
            "model": {"kind": "encoder", "dim": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 16, "vocab_size": 300},
            "task": {"kind": "classification"},
            "data": {
                "kind": "labelled", "path": str(folder / "train.tsv"), "held_out_path": str(folder / "held_out.tsv"),
                "cache_dir": str(folder / "cache"), "tokenizer": {"vocab_size": 300},
            },
            "train": {"global_batch": 4, "steps": 10, "privacy": {"noise_multiplier": 1.0}} | train,
            "logger": {"progress": False},
        }
    )  # fmt: skip
    made.data.prepared_dir = str(prepare_examples(made).directory)
    return made


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return prepared(tmp_path_factory.mktemp("forty"), [f"text number {number}" for number in range(40)])


def test_what_the_data_say(forty: Config) -> None:
    made = privacy.guarantee(forty)
    assert (made.examples, made.sampling_rate, made.noise_multiplier) == (40, 0.1, 1.0)
    line = made.line(10)
    assert f"epsilon {made.epsilon(10):.3g} at delta 1e-05 after 10 steps" in line
    assert "each of 40 examples" in line

    target = _with(forty, target_epsilon=2.0, noise_multiplier=None)
    assert 1.9 < privacy.guarantee(target).epsilon(10) <= 2.0
    assert privacy.guarantee(target).noise_multiplier > 1
    for accountant in ("rdp", "prv"):
        with pytest.raises(ConfigError, match="no noise gives that after 10 steps"):
            privacy.guarantee(_with(target, target_epsilon=1e-9, accountant=accountant))
    with pytest.raises(ConfigError, match=r"train\.privacy\.delta=0\.025: not below 1 / 40"):
        privacy.guarantee(_with(forty, delta=0.025))
    crowd = replace(forty, train=replace(forty.train, global_batch=64))
    with pytest.raises(ConfigError, match=r"train\.global_batch=64: more than the 40 training examples"):
        privacy.guarantee(crowd)


def _with(config: Config, **fields: Any) -> Config:
    return replace(config, train=replace(config.train, privacy=replace(config.train.privacy, **fields)))


def test_a_text_in_several_parts_is_refused(tmp_path: Path) -> None:
    sentences = "".join(f"word{i}\tO\n" * (40 if i == 3 else 4) + "\n" for i in range(12))
    for name in ("train.conll", "held_out.conll"):
        (tmp_path / name).write_text(sentences)
    config = prepared(tmp_path, ["a", "b", "c"])
    config.task = from_dict({"task": {"kind": "tagging"}}).task
    config.data = replace(
        config.data, path=str(tmp_path / "train.conll"), held_out_path=str(tmp_path / "held_out.conll")
    )
    config.data.prepared_dir = str(prepare_examples(config).directory)
    with pytest.raises(ConfigError, match="texts are too long and were cut into several examples"):
        privacy.guarantee(config)


# --------------------------------------------------------------------------------------------- the secret


def test_the_secret_is_its_owners_and_lasts_as_long_as_the_run(forty: Config, tmp_path: Path) -> None:
    first, again = (privacy.begin(forty, tmp_path) for _ in range(2))
    assert first is not None
    assert again is not None
    assert first.secret == again.secret
    path = tmp_path / privacy.SECRET
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"half")  # killed while it was written: nothing was drawn from it yet
    mended = privacy.begin(forty, tmp_path)
    assert mended is not None
    assert len(mended.secret) == 32
    assert mended.secret != first.secret
    privacy.forget(tmp_path)
    assert not path.exists()

    known = privacy.begin(_with(forty, seed=3), tmp_path)
    assert known is not None
    assert not path.exists()
    assert known.guarantee.facts(1)["privacy/noise"] == "known: follows from train.privacy.seed"
    assert privacy.begin(_with(forty, noise_multiplier=None), tmp_path) is None


def test_a_private_run_cannot_be_repeated_but_its_stack_can_be_verified(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = from_dict(recipe)
    (tmp_path / "config.yaml").write_text(schema.dump(config))
    with pytest.raises(BigtrainError, match="nobody can compute them again"):
        reproduce(tmp_path, tmp_path / "again", None, 0.0, False, print)
    assert verify.shortened(config).train.privacy == replace(config.train.privacy, seed=0)


def test_the_plan_counts_a_gradient_for_each_example(recipe: dict[str, Any]) -> None:
    config = from_dict(recipe)
    config.model.vocab_size = 1024
    size, plain = sizes.of_run(config), _with(config, target_epsilon=None)
    with_them, without = (memory.estimate(each, 1, size, "cpu").peak for each in (config, plain))
    assert with_them.parts["gradients"] == 4 * size.trained * (config.train.micro_batch + 1)
    assert with_them.total > without.total + 4 * size.trained * 30


# ------------------------------------------------------------------------------------------- what may change


@pytest.mark.parametrize(
    ("fields", "train", "said"),
    [
        ({"noise_multiplier": 0.5}, {}, "train.privacy.noise_multiplier is 1.0 there, 0.5 here"),
        ({"max_grad_norm": 2.0}, {}, "train.privacy.max_grad_norm"),
        ({}, {"global_batch": 8}, "train.global_batch"),
    ],
)
def test_what_an_epsilon_is_of_may_not_change(
    forty: Config, fields: dict[str, Any], train: dict[str, Any], said: str
) -> None:
    now = _with(replace(forty, train=replace(forty.train, **train), resume_allow=["train", "data"]), **fields)
    with pytest.raises(ConfigError, match=said):
        changes.check(forty, now)


def test_more_steps_are_more_epsilon_unless_that_was_the_target(forty: Config) -> None:
    def longer(config: Config) -> Config:
        return replace(config, train=replace(config.train, steps=20))

    assert not changes.check(forty, longer(forty))
    target = _with(forty, target_epsilon=3.0, noise_multiplier=None)
    with pytest.raises(ConfigError, match=r"train\.privacy \(train\.steps\) is 10 there, 20 here"):
        changes.check(target, longer(target))
    other = replace(forty, data=replace(forty.data, prepared_dir="/elsewhere/other"), resume_allow=["data"])
    with pytest.raises(ConfigError, match=r"train\.privacy \(examples\)"):
        changes.check(forty, other)


# ----------------------------------------------------------------------------------------------------- runs

SMALL = [
    "experiment=private", "task=classification", "model.dim=32", "model.n_layers=1", "model.max_seq_len=32",
    "model.dropout=0.1", "data.tokenizer.vocab_size=300", "train.steps=6", "train.global_batch=12",
    "train.micro_batch=4", "train.eval_every=0", "train.eval_batches=1", "train.save_every=3", "logger.progress=false",
]  # fmt: skip


def uninterrupted_and_resumed(folder: str) -> list[int]:
    """The same run twice in this process, as a rank runs it: to its end, and from its checkpoint at step 3 on."""
    from accelerate.state import AcceleratorState

    from bigtrain import worker

    whole, cut = Path(folder) / "whole", Path(folder) / "cut"
    for run in (whole, cut):
        if run is cut:
            shutil.copytree(whole, cut)
            (cut / "result.json").unlink()
            shutil.rmtree(checkpoints(cut)[-1].path)
            os.environ["MASTER_PORT"] = str(free_port())
            AcceleratorState._reset_state(True)
        worker.run(schema.load(whole / "config.yaml"), run, sys.stdout, threading.Event(), time.time())
    return [found.step for found in checkpoints(cut)]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, data_cache: Path) -> None:
    """Draws, noise, dropout, weights and epsilon."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config = prepare_data(composed(*SMALL, "train.privacy.seed=5", f"data.cache_dir={data_cache}", f"run_dir={whole}"))
    whole.mkdir()
    (whole / "config.yaml").write_text(schema.dump(config))
    assert run_ranks(f"{__name__}:uninterrupted_and_resumed", 1, {"folder": str(tmp_path)}) == [[3, 6]]

    assert losses(whole) == losses(cut)
    assert len(set(losses(whole).values())) == 6
    before, after = (read_weights(checkpoints(run)[-1].path) for run in (whole, cut))
    assert all(torch.equal(before[name], after[name]) for name in before)
    found, again = (
        {key: value for key, value in result(run).items() if key.startswith("privacy/")} for run in (whole, cut)
    )
    assert found == again
    assert 7.9 < found["privacy/epsilon"] <= 8
    assert (found["privacy/steps"], found["privacy/sampling"]) == (6, "poisson")
    spent = [row["privacy/epsilon"] for row in metrics(cut) if "privacy/epsilon" in row]
    assert len(spent) == 6
    assert spent == sorted(spent)
    assert spent[-1] == found["privacy/epsilon"]
    card = model_card(whole, "x", config, checkpoints(whole)[-1].path)
    assert f"| Privacy | epsilon {found['privacy/epsilon']:.3g} at delta 1e-05" in card


@pytest.mark.soak  # some minutes
def test_the_recipe_learns_within_its_epsilon(tmp_path: Path, data_cache: Path) -> None:
    """Stopped on the way and continued: the secret lasts until then, and not longer."""
    settings = ["experiment=private", f"data.cache_dir={data_cache}", f"run_dir={tmp_path}", "logger.progress=false"]
    said = bigtrain("train", *settings, "train.stop_at=10", timeout=900)
    assert "privacy: epsilon 8 at delta 1e-05" in said.replace("7.99", "8")
    assert (tmp_path / privacy.SECRET).stat().st_mode & 0o777 == 0o600
    bigtrain("train", *settings, timeout=900)
    assert not (tmp_path / privacy.SECRET).exists()
    done = result(tmp_path)
    assert done["privacy/epsilon"] <= 8
    assert done["privacy/noise"] == "secret"
    assert done["eval/f1"] > 0.3  # of the names' roles, none of which is found by saying always the same
    assert done["eval/accuracy"] > 0.7
