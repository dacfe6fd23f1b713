"""The rules of a run directory, without starting anything."""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config import Config, DeepSpeedConfig, StdlibDataConfig, TrainConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch import run_dir


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with run_dir.claim(path), pytest.raises(BigtrainError, match=f"in use by process {os.getpid()}"):  # noqa: SIM117
        with run_dir.claim(path):
            pass
    with run_dir.claim(path):
        pass
    with open(path / run_dir.LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_claim_made_goes_again_if_nothing_came_of_it(tmp_path: Path) -> None:
    (tmp_path / "was here").mkdir()
    with pytest.raises(RuntimeError), run_dir.claim(tmp_path / "was here" / "a" / "b"):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["was here"]
    started = tmp_path / "was here" / "a" / "config.yaml"
    with contextlib.suppress(RuntimeError), run_dir.claim(started.parent):
        started.touch()
        raise RuntimeError
    assert started.exists()


def config(**changes: object) -> Config:
    return replace(Config(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": TrainConfig(seed=1)}, "train.seed is 0 there, 1 here"),
        ({"train": TrainConfig(global_batch=64)}, "train.global_batch is 32 there, 64 here"),
        ({"engine": DeepSpeedConfig(stage=3)}, "engine.stage is 2 there, 3 here"),
        ({"data": StdlibDataConfig(held_out=0.1)}, "data.held_out is 0.05 there, 0.1 here"),
        ({"train": TrainConfig(seed=1, global_batch=64, micro_batch=4, grad_clip=2.0, precision="fp32")}, "and 1 more"),
    ],
)
def test_another_run_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_dir.check_same_run(config(), config(**changes))
    assert named in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_dir": "elsewhere", "resume": "required"},
        {"train": TrainConfig(steps=9999, micro_batch=1, eval_every=3, save_every=3, keep_checkpoints=9)},
        {"data": StdlibDataConfig(cache_dir="/elsewhere", workers=3)},
    ],
)
def test_what_may_change_may_change(changes: dict[str, object]) -> None:
    run_dir.check_same_run(config(), config(**changes))


def test_changed_data_are_another_run() -> None:
    before, now = (config(data=StdlibDataConfig(prepared_dir=f"/{name}")) for name in ("x/aaaa", "y/bbbb"))
    same = config(data=StdlibDataConfig(prepared_dir="/moved/aaaa"))
    run_dir.check_same_run(before, same)
    with pytest.raises(ConfigError, match=r"fingerprint.*aaaa there, bbbb here"):
        run_dir.check_same_run(before, now)


def test_the_last_step_of_a_torn_file(tmp_path: Path) -> None:
    assert run_dir.last_step(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert run_dir.last_step(tmp_path) == 2
