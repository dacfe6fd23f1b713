"""Every engine against the others: the same data gives the same loss curve, and a resumed run the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.checks import check
from bigtrain.errors import ConfigError
from bigtrain.hardware import Placement, check_precision, cpu_has_fp16
from bigtrain.launch import ops
from tests.distributed.curves import ENGINES, NVME, STEPS, ZERO, make
from tests.distributed.ranks import run_ranks

DEEPSPEED = {name: choice for name, choice in ENGINES.items() if choice["kind"] == "deepspeed"}  # offload included
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}  # relative


def curves(world_size: int, precision: str, choices: dict[str, Any], **more: Any) -> dict[str, list[float]]:
    arguments = {"choices": choices, "precision": precision} | more
    return run_ranks("tests.distributed.curves:curves", world_size, arguments)[0]


def check_refused(precision: str) -> None:
    """On hardware that cannot compute in it."""
    with pytest.raises(ConfigError, match=r"train\.precision"):
        check_precision(make(ENGINES["zero2"], precision), Placement("cpu", 1, 1, ()))


@pytest.fixture(scope="module")
def reference() -> list[float]:
    """The plain single process under Accelerate, fp32: what everything is held to."""
    curve = curves(1, "fp32", {"ddp": ENGINES["ddp"]})["ddp"]
    assert curve[-1] < 0.6 * curve[0], "the reference learns nothing: agreement with it would prove nothing"
    return curve


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_same_loss_curve(world_size: int, precision: str, reference: list[float]) -> None:
    choices = ENGINES
    if precision == "fp16" and not cpu_has_fp16():
        check_refused("fp16")
        return
    if precision == "fp16":  # Accelerate keeps no fp32 master weights; stage 0 skips steps until its loss scale fits
        choices = {name: ZERO[name] for name in ("zero1", "zero2", "zero3")}
    for name, curve in curves(world_size, precision, choices).items():
        assert curve == pytest.approx(reference, rel=TOLERANCE[precision]), f"{name} at {world_size} ranks"


@pytest.fixture(scope="module")
def async_io() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs the Debian package libaio-dev")
    for name in ops.missing(["async_io"], ops.extensions_dir()):  # or each rank would wait for the other's build
        ops.build(name, ops.extensions_dir(), "cpu")


@pytest.mark.soak  # DeepSpeed's async_io takes minutes to compile
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("async_io")
def test_nvme_offload(reference: list[float]) -> None:
    (curve,) = curves(2, "fp32", {"zero_infinity": NVME}).values()
    assert curve == pytest.approx(reference, rel=TOLERANCE["fp32"])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("async_io")
def test_resume_with_nvme_offload(tmp_path: Path) -> None:
    """Bit-identical with as many ranks, refused in a line with fewer. Each session is a process of its own, for
    DeepSpeed names the files on the disk by how many parameters the process has made before."""
    choice = NVME | {"nvme_path": str(tmp_path)}

    def session(name: str, first: int, save_at: int, end: int) -> list[dict[str, Any]]:
        given = {"choice": choice, "precision": "bf16", "folder": f"{tmp_path}/{name}"}
        return run_ranks(
            "tests.distributed.curves:session", 2, given | {"first": first, "save_at": save_at, "end": end}
        )

    whole = session("none", 0, 0, STEPS)
    assert session("on_the_way", 0, STEPS // 2, STEPS) == whole  # a save changes nothing
    half = session("zero_infinity", 0, STEPS // 2, STEPS // 2)
    rest = session("zero_infinity", STEPS // 2, 0, STEPS)
    for uninterrupted, before, after in zip(whole, half, rest, strict=True):
        assert before["curve"] + after["curve"] == uninterrupted["curve"]
        assert after["weights"] == uninterrupted["weights"]
    arguments = {"choices": {"zero_infinity": choice}, "precision": "bf16", "folder": str(tmp_path)}
    (refused,) = run_ranks("tests.distributed.curves:refused", 1, arguments)
    assert "saved under nvme offload, whose states cannot be cut anew" in refused["zero_infinity"]
    assert "continue as it was saved (2 ranks" in refused["zero_infinity"]


@pytest.mark.parametrize(
    ("world_size", "precision", "choices"),
    [(2, "fp32", ENGINES), (1, "fp32", ZERO), (2, "bf16", DEEPSPEED), (2, "fp16", {"zero2": ZERO["zero2"]})],
)
def test_resume_is_bit_identical(world_size: int, precision: str, choices: dict[str, Any], tmp_path: Path) -> None:
    if precision == "fp16" and not cpu_has_fp16():
        check_refused("fp16")
        return
    arguments = {"choices": choices, "precision": precision, "folder": str(tmp_path)}
    for result in run_ranks("tests.distributed.curves:resumed", world_size, arguments):
        for name, run in result.items():
            assert run["resumed"] == run["whole"], name
            assert run["same_weights"], name


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lion": {"kind": "lion", "lr": 2e-3},
    "muon": {"kind": "muon", "lr": 2e-2, "adam_lr": 1e-2},
    "adafactor": {"kind": "adafactor", "lr": 0.2},
    "adamw8bit": {"kind": "adamw8bit", "lr": 1e-2},
}
NOT_OFFERED = {  # what config.check refuses
    "lion": {"fsdp2"},
    "muon": {"fsdp2"},
    "adafactor": set(ENGINES) - {"zero0", "ddp"},
    "adamw8bit": set(),
}


# Of the others CI moves checkpoints between engines (tests/checkpoint/test_reshard.py), which trains them too.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] * (name in ("muon", "adamw8bit"))) for name in OPTIMIZERS]
)
def test_every_optimizer_learns(name: str) -> None:
    choices = {key: choice for key, choice in ENGINES.items() if key not in NOT_OFFERED[name]}
    found = curves(2, "fp32", choices, optimizer=OPTIMIZERS[name])
    first = next(iter(found.values()))
    assert first[-1] < 0.6 * first[0]
    for engine, curve in found.items():
        assert curve == pytest.approx(first, rel=2e-2), engine


@pytest.mark.parametrize(
    ("name", "engine"), [(name, e) for name, engines in NOT_OFFERED.items() for e in sorted(engines)]
)
def test_what_is_not_offered_is_refused(name: str, engine: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.kind"):
        check(make(ENGINES[engine], "fp32", OPTIMIZERS[name]))
