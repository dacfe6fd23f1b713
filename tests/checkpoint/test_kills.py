"""A run that is killed, anywhere, goes on from a whole checkpoint to the very bits of one that never was."""

from __future__ import annotations

import random
import shutil
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml

from bigtrain.checkpoint import checkpoints
from bigtrain.checkpoint.integrity import damaged
from bigtrain.checkpoint.weights import read_weights
from bigtrain.config import Config, dump
from bigtrain.launch import train
from tests.checkpoint.sessions import DISK_FULL, POINTS, STOP, doing, end, start
from tests.runs import TINY, bigtrain, losses, metrics, result

STEPS, EVERY, RANKS = 12, 3, 2
# What rank 0 does for all, and what the victim must have a part in: rank 1 may have no file to hash.
OF_RANK_0 = {"before staging", "before the manifest", "half a manifest", "before the rename", "after the rename",
             "while old ones are removed"}  # fmt: skip


@pytest.fixture(scope="module")
def config(data_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The tiny recipe with dropout, accumulation and a save every few steps, on little text: no second goes to what a
    run does at its end."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(40):
        words = ("".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(2000))
        (folder / f"{number}.txt").write_text(" ".join(words))
    overrides = [
        *TINY, "data=text", f"data.path={folder}", "data.held_out=0.2", f"train.steps={STEPS}",
        f"train.save_every={EVERY}", "train.micro_batch=2", "train.eval_every=0", "train.eval_batches=1",
        "model.dropout=0.1", "launch.ranks=2", "launch.device=cpu", "logger=quiet", "launch.timeout_seconds=60",
        f"data.cache_dir={data_cache}",
    ]  # fmt: skip
    composed = bigtrain("train", *overrides, "--cfg", "job", "--resolve")
    return train.prepare_data(train.checked(yaml.safe_load(composed)))


def make(config: Config, run: Path, later: bool = True) -> Path:
    """A run directory as the command leaves it for the ranks; its config file. `later`: saves in the background."""
    run.mkdir()
    train = replace(config.train, async_save=later)
    (run / "config.yaml").write_text(dump(replace(config, run_dir=str(run), train=train)))
    return run / "config.yaml"


@dataclass(frozen=True)
class Whole:
    """The run that nothing has happened to."""

    run: Path
    seconds: float  # from the fork of its ranks to their end


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("kills")
    assert end(start(make(config, folder / "first"), RANKS)) == [0] * RANKS  # the fork server is there from here on
    began = time.perf_counter()
    assert end(start(make(config, folder / "whole"), RANKS)) == [0] * RANKS
    return Whole(folder / "whole", time.perf_counter() - began)


def check_same(run: Path, whole: Whole) -> None:
    assert losses(run) == losses(whole.run)
    mine, theirs = (checkpoints(path)[-1] for path in (run, whole.run))
    assert (mine.step, damaged(mine.path)) == (STEPS, {})
    expected = read_weights(theirs.path)
    assert all(torch.equal(expected[name], tensor) for name, tensor in read_weights(mine.path).items())
    assert not list((run / "checkpoints").glob("*.bad*")), "a kill must not leave what looks like a checkpoint"


@pytest.mark.parametrize(
    ("victim", "point"),
    [(0, point) for point in POINTS]
    + [pytest.param(1, point, marks=pytest.mark.soak) for point in POINTS if point not in OF_RANK_0],
)
def test_killed_inside_a_save(victim: int, point: str, config: Config, whole: Whole, tmp_path: Path) -> None:
    file = make(config, tmp_path / "run")
    assert -9 in end(start(file, RANKS, kill_at=point, kill_step=3 * EVERY, victim=victim))
    left = checkpoints(file.parent)
    assert left, "the checkpoint before this one is gone"
    assert left[-1].step >= 2 * EVERY
    assert damaged(left[-1].path) == {}
    assert end(start(file, RANKS)) == [0] * RANKS
    check_same(file.parent, whole)


def test_a_manifest_says_all_that_a_resume_compares(whole: Whole) -> None:
    (one,) = checkpoints(whole.run)[-1:]
    manifest = one.manifest
    assert (manifest["step"], manifest["world_size"], manifest["engine"], manifest["stage"]) == (12, 2, "deepspeed", 2)
    assert (manifest["precision"], manifest["global_batch"]) == ("fp32", 8)
    assert (manifest["sequences"], manifest["tokens"]) == (12 * 8, 12 * 8 * 64)
    assert {len(manifest["fingerprints"][name]) for name in ("config", "tokenizer", "code")} == {64}
    assert manifest["fingerprints"]["corpus"] == Path(manifest["config"]["data"]["prepared_dir"]).name
    assert {"python", "torch", "deepspeed"} <= manifest["versions"].keys()
    assert {"random-00000.pt", "random-00001.pt", "model.safetensors"} <= manifest["files"].keys()


@dataclass
class Tally:
    """What came of killing at random."""

    kills: int = 0
    sessions: int = 0
    runs: int = 0
    seconds: float = 0.0
    phases: Counter[str] = field(default_factory=Counter)  # in which the victims were
    lost: list[int] = field(default_factory=list)  # steps that had been logged and were taken again

    def __str__(self) -> str:
        phases = ", ".join(f"{count} {phase}" for phase, count in self.phases.most_common())
        return (
            f"{self.kills} kills in {self.sessions} sessions of {self.runs} runs, {self.seconds:.0f} s: {phases};"
            f" steps lost: {statistics.mean(self.lost):.1f} in the mean, {max(self.lost)} at most; an interval: {EVERY}"
        )


def kill_at_random(kills: int, seed: int, config: Config, whole: Whole, folder: Path) -> Tally:
    """Kill one run again and again, a random rank after a random while, and let it go on; when it has finished, the
    next one. Every other one saves in the background."""
    draw, tally, began = random.Random(seed), Tally(), time.perf_counter()
    while tally.kills < kills:
        later = tally.runs % 2 == 0
        file = make(config, folder / str(tally.runs), later)
        tally.runs += 1
        finished = False
        while not finished:
            reached = max((one.step for one in checkpoints(file.parent)), default=0)
            shutil.rmtree(file.parent / "heartbeats", ignore_errors=True)  # of the session before
            processes = start(file, RANKS)
            tally.sessions += 1
            kills_it = tally.kills < kills
            victim = draw.randrange(RANKS)
            if kills_it:
                time.sleep(draw.uniform(0, whole.seconds))
                processes[victim].kill()
            codes = end(processes)
            finished = codes == [0] * RANKS
            if finished:
                break
            said = {log.name: log.read_text()[-2000:] for log in (file.parent / "logs").glob("*.log")}
            assert kills_it, (codes, said)
            assert codes[victim] == -signal.SIGKILL, (codes, said)
            tally.kills += 1
            tally.phases[doing(file, victim)] += 1
            saved = max((one.step for one in checkpoints(file.parent)), default=0)
            seen = max(losses(file.parent), default=0) if (file.parent / "metrics.jsonl").exists() else 0
            assert saved >= reached, "a kill cost a checkpoint that was there"
            tally.lost.append(max(0, seen - saved))
            assert tally.lost[-1] <= (2 if later else 1) * EVERY, "one more while the save is being written"
        check_same(file.parent, whole)
        shutil.rmtree(file.parent)
    tally.seconds = time.perf_counter() - began
    return tally


@pytest.mark.parametrize(("kills", "seed"), [(12, 1), pytest.param(200, 2, marks=pytest.mark.soak)])
@pytest.mark.timeout(3600)
def test_killed_at_random(kills: int, seed: int, config: Config, whole: Whole, tmp_path: Path) -> None:
    tally = kill_at_random(kills, seed, config, whole, tmp_path)
    print(tally)
    assert len(tally.phases) >= 3, tally  # of starting, building, restoring, the steps, saving, evaluating


def test_asked_to_stop_while_the_finished_model_is_evaluated(config: Config, whole: Whole, tmp_path: Path) -> None:
    """The stop is seen between two batches, by all ranks; the next session has only the evaluation left to do."""
    file = make(config, tmp_path / "run")
    processes = start(file, RANKS, kill_at=STOP, kill_step=STEPS, victim=1)
    assert end(processes) == [0] * RANKS
    stopped = result(file.parent)
    assert (stopped["status"], stopped["train/steps"]) == ("stopped", STEPS)
    assert "eval/loss" not in stopped
    assert checkpoints(file.parent)[-1].step == STEPS
    assert end(start(file, RANKS)) == [0] * RANKS
    check_same(file.parent, whole)
    finished, expected = result(file.parent), result(whole.run)
    assert finished["status"] == "finished"
    assert finished["eval/loss"] == expected["eval/loss"]


def test_a_full_disk_costs_a_checkpoint_and_a_warning_not_the_run(config: Config, whole: Whole, tmp_path: Path) -> None:
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
