"""Trials that run at once: no core and no GPU is given to two."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from bigtrain import hardware
from bigtrain.errors import ConfigError
from bigtrain.hardware import Gpu
from bigtrain.sweep import slots


def test_parts_are_disjoint_and_whole() -> None:
    for things in (2, 3, 7, 16):
        for parts in range(1, things + 1):
            found = [slots.part(list(range(things)), number, parts) for number in range(parts)]
            assert [thing for part in found for thing in part] == list(range(things))
            assert max(map(len, found)) - min(map(len, found)) <= 1


def test_how_many_run_at_once() -> None:
    joblib = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    assert slots.count({"_target_": joblib, "n_jobs": 3}) == 3
    assert slots.count({"_target_": joblib, "n_jobs": -1}) == hardware.cores()
    assert slots.count({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}) == 1
    assert slots.count({"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"}) == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_slot_keeps_its_process_to_its_cores(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    with slots.take(tmp_path, 2, use_gpus=False):
        first = os.sched_getaffinity(0)
        pid = os.fork()
        if pid == 0:  # another process of the pool, which was not kept to anything
            os.sched_setaffinity(0, before)
            with slots.take(tmp_path, 2, use_gpus=False):
                os._exit(0 if not first & os.sched_getaffinity(0) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert first < before
    assert os.sched_getaffinity(0) == before


def test_the_third_trial_waits_for_a_slot(tmp_path: Path) -> None:
    taken = [slots._free_slot(tmp_path, 2) for _ in range(2)]
    assert [number for _, number in taken] == [0, 1]
    waited: list[float] = []

    def third() -> None:
        began = time.monotonic()
        lock, _ = slots._free_slot(tmp_path, 2)
        waited.append(time.monotonic() - began)
        os.close(lock)

    thread = threading.Thread(target=third)
    thread.start()
    time.sleep(0.5)
    assert not waited
    os.close(taken[1][0])
    thread.join(timeout=10)
    assert waited[0] >= 0.4
    os.close(taken[0][0])


def test_gpus_are_shared_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tuple(Gpu(index, f"GPU-{index}", "H100", (9, 0), 80.0) for index in range(4))
    monkeypatch.setattr(hardware, "installed_gpus", lambda: installed)
    monkeypatch.setattr(hardware, "torch_is_cpu_build", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    with slots.take(tmp_path, 2, use_gpus=True):
        assert [gpu.index for gpu in hardware.gpus()] == [0, 1]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    with pytest.raises(ConfigError, match="4 GPUs"), slots.take(tmp_path, 5, use_gpus=True):
        pass
    with slots.take(tmp_path, 5, use_gpus=False):
        pass


def starts_a_process(folder: Path) -> int | None:
    with slots.take(folder, 2, use_gpus=False):
        process = multiprocessing.get_context("spawn").Process(target=time.time)  # as the preparation of data does
        process.start()
        process.join(60)
    return process.exitcode


def test_a_trial_in_joblibs_processes_can_start_processes_of_its_own(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    assert joblib.Parallel(n_jobs=2)(joblib.delayed(starts_a_process)(tmp_path) for _ in range(2)) == [0, 0]
