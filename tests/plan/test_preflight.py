"""What cannot fit is refused before anything starts; what fits never is."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain import cli, hardware
from bigtrain.compress_config import CompressConfig, DistilConfig
from bigtrain.config import Config, LaunchConfig, from_dict
from bigtrain.errors import BigtrainError
from bigtrain.hardware import Gpu, Placement
from bigtrain.plan import preflight, sizes


def run(**train: Any) -> Config:
    """GPT-2 large: 12.4 GB of weights, master weights and Adam states, half of it on each of two ranks in ZeRO-2."""
    model = {"kind": "decoder", "dim": 1280, "n_layers": 36, "n_heads": 20, "vocab_size": 50257, "max_seq_len": 1024}
    launch = {"ranks": 2, "device": "cpu"} | train.pop("launch", {})
    return from_dict({"model": model, "launch": launch, "train": {"global_batch": 32} | train})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def has(gib: float) -> Placement:
        monkeypatch.setattr(hardware, "memory_bytes", lambda: int(gib * 2**30))
        monkeypatch.setattr(hardware, "swap_bytes", lambda: 0)
        return hardware.place(LaunchConfig(ranks=2, device="cpu"))

    return has


def test_what_cannot_fit_is_refused_with_what_would(machine: Any) -> None:
    two = machine(24)
    with pytest.raises(BigtrainError) as caught:
        preflight.check(run(), two)
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
    preflight.check(smaller, two)


def test_it_can_be_told_otherwise_and_fits_elsewhere(machine: Any) -> None:
    preflight.check(run(launch={"preflight": False}), machine(24))
    preflight.check(run(), machine(512))


def test_nothing_would_fit(machine: Any) -> None:
    two = machine(2)
    with pytest.raises(BigtrainError, match="take a smaller model"):
        preflight.check(run(), two)


def test_each_of_many_nodes_holds_its_share(machine: Any) -> None:
    """Four ranks of two nodes hold a quarter each; the smallest node counts."""
    two = machine(24)
    with pytest.raises(BigtrainError, match=r"on each of 4 ranks, each node has 4.0 GiB"):
        preflight.check(run(micro_batch=1), replace(two, nodes=2, memory_gib=4.0))
    preflight.check(run(micro_batch=1), replace(two, nodes=2))
    with pytest.raises(BigtrainError, match="on each of 2 ranks, this machine has"):
        preflight.check(run(micro_batch=1), replace(two, memory_gib=16.0))


def test_gpus_of_nodes_that_nobody_has_asked_are_not_known(tmp_path: Path) -> None:
    """As from a login node: Slurm finds the nodes later."""
    unknown = Placement("cuda", 8, 8, (), nodes=2)
    preflight.check(run(), unknown)
    preflight.write(run(), tmp_path, unknown)
    assert not list(tmp_path.iterdir())
    small = Gpu(0, "GPU-0", "NVIDIA A100 80GB PCIe", (8, 0), 8.0)
    known = replace(unknown, ranks=2, gpus=(replace(small, memory_gib=79.0), small))
    with pytest.raises(BigtrainError, match=r"on each of 4 ranks, each GPU has 8.0 GiB"):
        preflight.check(run(micro_batch=8), known)
    preflight.write(run(micro_batch=8), tmp_path, known)
    plan = json.loads((tmp_path / preflight.FILE).read_text())
    assert (plan["ranks"], plan["fits"]) == (4, False)


def test_train_refuses_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=llama_405b", "engine=zero2", "launch.device=cpu", f"run_dir={tmp_path}/run"]
    assert cli._run(["train", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the run needs at least" in error
    assert not (tmp_path / "run").exists()


def test_it_takes_no_time(machine: Any) -> None:
    two = machine(24)
    began = time.perf_counter()
    with pytest.raises(BigtrainError):
        preflight.check(run(), two)
    assert time.perf_counter() - began < 3  # a tenth of it on a quiet machine


def test_what_is_not_known_is_not_refused(machine: Any) -> None:
    two = machine(1)
    passed_through = from_dict(
        {"engine": {"kind": "deepspeed", "deepspeed": {"zero_optimization": {}}}, "model": {"kind": "decoder"}}
    )
    assert preflight.least_gib(passed_through, two) is None
    assert preflight.least_gib(from_dict({"model": {"kind": "hf"}, "task": {"kind": "causal_lm"}}), two) is None
    labelled = {"model": {"kind": "encoder"}, "task": {"kind": "tagging"}, "data": {"kind": "labelled", "path": "x"}}
    least = preflight.least_gib(from_dict(labelled), two)
    assert least is not None
    assert least < 0.1  # texts may be short: its states alone


def test_a_distillations_teacher_counts(tmp_path: Path) -> None:
    """On each rank whole, in 16 bits."""
    student = run()
    (tmp_path / "config.yaml").write_text(json.dumps({"model": dataclasses.asdict(student.model)}))
    taught = replace(student, compress=CompressConfig(distil=DistilConfig(teacher=str(tmp_path))))
    placement = Placement("cpu", ranks=2, threads_per_rank=1, gpus=())
    alone, together = (preflight.least_gib(config, placement) for config in (student, taught))
    assert alone is not None
    assert together is not None
    beside = 2 * sizes.of_run(student).total / 2**30
    assert together - alone == pytest.approx(preflight.CERTAIN * beside)
