"""What cannot fit is refused before anything starts; what fits never is."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bigtrain import hardware
from bigtrain.config import Config, from_dict
from bigtrain.errors import BigtrainError
from bigtrain.hardware import Placement
from bigtrain.plan import preflight

TWO = Placement("cpu", 2, 1, ())


def run(**train: Any) -> Config:
    """GPT-2 large: 12.4 GB of weights, master weights and Adam states, half of it on each of two ranks in ZeRO-2."""
    model = {"kind": "decoder", "dim": 1280, "n_layers": 36, "n_heads": 20, "vocab_size": 50257, "max_seq_len": 1024}
    launch = {"ranks": 2, "device": "cpu"} | train.pop("launch", {})
    return from_dict({"model": model, "launch": launch, "train": {"global_batch": 32} | train})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def has(gib: float) -> None:
        monkeypatch.setattr(hardware, "memory_bytes", lambda: int(gib * 2**30))
        monkeypatch.setattr(preflight.psutil, "swap_memory", lambda: type("Swap", (), {"total": 0}))

    return has


def test_what_cannot_fit_is_refused_with_what_would(machine: Any) -> None:
    machine(24)
    with pytest.raises(BigtrainError) as caught:
        preflight.check(run(), TWO)
    line = str(caught.value)
    assert "the run needs at least" in line
    assert "on each of 2 ranks, this machine has 24.0 GiB" in line
    assert "what fits: " in line
    assert "train.micro_batch=" in line
    overrides = dict(part.split("=") for part in line.split("what fits: ")[1].split(" (")[0].split())
    train = {"micro_batch": int(overrides["train.micro_batch"])}
    train["activation_checkpointing"] = overrides.get("train.activation_checkpointing") == "true"
    smaller = run(**train)
    smaller.engine.stage = int(overrides.get("engine.stage", 2))  # type: ignore[union-attr]
    preflight.check(smaller, TWO)


def test_it_can_be_told_otherwise_and_fits_elsewhere(machine: Any) -> None:
    machine(24)
    preflight.check(run(launch={"preflight": False}), TWO)
    machine(512)
    preflight.check(run(), TWO)


def test_nothing_would_fit(machine: Any) -> None:
    machine(2)
    with pytest.raises(BigtrainError, match="take a smaller model"):
        preflight.check(run(), TWO)


def test_it_takes_no_time(machine: Any) -> None:
    machine(24)
    began = time.perf_counter()
    with pytest.raises(BigtrainError):
        preflight.check(run(), TWO)
    assert time.perf_counter() - began < 3  # a tenth of it on a quiet machine


def test_what_is_not_known_is_not_refused(machine: Any) -> None:
    machine(1)
    passed_through = from_dict(
        {"engine": {"kind": "deepspeed", "deepspeed": {"zero_optimization": {}}}, "model": {"kind": "decoder"}}
    )
    assert preflight.least_gib(passed_through, TWO) is None
    assert preflight.least_gib(from_dict({"model": {"kind": "hf"}, "task": {"kind": "causal_lm"}}), TWO) is None
    labelled = {"model": {"kind": "encoder"}, "task": {"kind": "tagging"}, "data": {"kind": "labelled", "path": "x"}}
    least = preflight.least_gib(from_dict(labelled), TWO)
    assert least is not None
    assert least < 0.1  # texts may be short: its states alone
