"""A run that is killed, anywhere, goes on from a whole checkpoint to the very bits of one that never was."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from bigtrain.checkpoint import checkpoints
from bigtrain.checkpoint.integrity import damaged
from bigtrain.checkpoint.weights import read_weights
from bigtrain.config import Config, dump
from bigtrain.launch import train
from tests.checkpoint.sessions import DISK_FULL, POINTS, end, start
from tests.runs import TINY, bigtrain, losses, metrics, result

STEPS, EVERY, RANKS = 12, 3, 2


@pytest.fixture(scope="module")
def config(data_cache: Path) -> Config:
    """The tiny recipe with dropout, accumulation and a save every few steps."""
    overrides = [
        *TINY, f"train.steps={STEPS}", f"train.save_every={EVERY}", "train.micro_batch=2", "train.eval_every=0",
        "train.eval_batches=1", "model.dropout=0.1", "launch.ranks=2", "launch.device=cpu", "logger=quiet",
        "launch.timeout_seconds=60", f"data.cache_dir={data_cache}",
    ]  # fmt: skip
    composed = bigtrain("train", *overrides, "--cfg", "job", "--resolve")
    return train.prepare_data(train.checked(yaml.safe_load(composed)))


def make(config: Config, run: Path) -> Path:
    """A run directory as the command leaves it for the ranks; its config file."""
    run.mkdir()
    (run / "config.yaml").write_text(dump(replace(config, run_dir=str(run))))
    return run / "config.yaml"


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kills") / "whole"
    assert end(start(make(config, run), RANKS)) == [0] * RANKS
    return run


def check_same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    mine, theirs = (checkpoints(path)[-1] for path in (run, whole))
    assert (mine.step, damaged(mine.path)) == (STEPS, {})
    expected = read_weights(theirs.path)
    assert all(torch.equal(expected[name], tensor) for name, tensor in read_weights(mine.path).items())
    assert not list((run / "checkpoints").glob("*.bad*")), "a kill must not leave what looks like a checkpoint"


# Of a minute's worth of sessions the commonest; `make soak` has them all.
QUICK = {"half written", "before the manifest", "after the rename"}


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in QUICK else pytest.mark.soak) for point in POINTS]
)
def test_killed_inside_a_save(point: str, config: Config, whole: Path, tmp_path: Path) -> None:
    file = make(config, tmp_path / "run")
    assert -9 in end(start(file, RANKS, kill_at=point, kill_step=3 * EVERY))
    left = checkpoints(file.parent)
    assert left, "the checkpoint before this one is gone"
    assert left[-1].step >= 2 * EVERY
    assert damaged(left[-1].path) == {}
    assert end(start(file, RANKS)) == [0] * RANKS
    check_same(file.parent, whole)


def kill_at_random(kills: int, seed: int, config: Config, whole: Path, run: Path) -> None:
    """Kill one run again and again, a random rank after a random while; then let it finish.

    A session may finish before its kill comes: then the next run begins.
    """
    draw = random.Random(seed)
    number, done = 0, 0
    file = make(config, run / "0")
    while done < kills:
        processes = start(file, RANKS)
        reached = checkpoints(file.parent)[-1].step if checkpoints(file.parent) else 0
        time.sleep(draw.uniform(0, 4))
        victim = draw.choice(processes)
        victim.kill()
        if -9 in end(processes):
            done += 1
            found = checkpoints(file.parent)
            seen = max(losses(file.parent), default=0) if (file.parent / "metrics.jsonl").exists() else 0
            saved = found[-1].step if found else 0
            assert saved >= reached, "a kill cost a checkpoint that was there"
            assert seen - saved <= 2 * EVERY, "an interval, and one more while the save is being written"
        else:
            check_same(file.parent, whole)
            number += 1
            file = make(config, run / str(number))
    assert end(start(file, RANKS)) == [0] * RANKS
    check_same(file.parent, whole)


@pytest.mark.parametrize(("kills", "seed"), [(2, 0), pytest.param(20, 1, marks=pytest.mark.soak),
                                             pytest.param(200, 2, marks=pytest.mark.soak)])  # fmt: skip
@pytest.mark.timeout(3600)
def test_killed_at_random(kills: int, seed: int, config: Config, whole: Path, tmp_path: Path) -> None:
    kill_at_random(kills, seed, config, whole, tmp_path)


def test_a_full_disk_costs_a_checkpoint_and_a_warning_not_the_run(config: Config, whole: Path, tmp_path: Path) -> None:
    file = make(config, tmp_path / "run")
    assert end(start(file, RANKS, kill_at=DISK_FULL, kill_step=2 * EVERY)) == [0] * RANKS
    check_same(file.parent, whole)
    assert [one.step for one in checkpoints(file.parent)] == [3 * EVERY, STEPS]
    assert result(file.parent)["checkpoint/failed"] == 1
    (warning,) = [line["warning"] for line in metrics(file.parent) if "warning" in line]
    assert f"checkpoint of step {2 * EVERY} was not written: rank 0" in warning
    assert "No space left on device" in warning


def test_a_last_save_that_fails_fails_the_run(config: Config, tmp_path: Path) -> None:
    file = make(config, tmp_path / "run")
    assert 1 in end(start(file, RANKS, kill_at=DISK_FULL, kill_step=STEPS))
    assert checkpoints(file.parent)[-1].step == STEPS - EVERY
    failures = [path.read_text() for path in (file.parent / "failures").iterdir()]
    assert any("No space left on device" in text for text in failures)
