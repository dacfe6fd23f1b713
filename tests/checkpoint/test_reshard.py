"""State saved at one number of ranks and ZeRO stage is the same, bit for bit, at any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint import checkpoints, reshard, store
from bigtrain.engine import shards
from bigtrain.errors import BigtrainError
from tests.distributed.curves import ENGINES, STEPS, build, join, make, train
from tests.distributed.ranks import run_ranks
from tests.engine.test_shards import whole

OPEN = {name: choice for name, choice in ENGINES.items() if name != "fsdp2"}
HALF = STEPS // 2
Pairs = list[tuple[str, str]]  # (folder and name of a saved one, engine to continue under)


def saving(choices: list[str], precision: str, folder: str, **more: Any) -> dict[str, list[float]]:
    """In each rank: train half-way under each engine, save, note the state; then on, for the curve to expect."""
    host, curves = join(), {}
    for name in choices:
        config = make(ENGINES[name], precision, more.get("optimizer"))
        engine = build(config, dropout=more.get("dropout", 0.0))
        train(engine, config, host, 0, HALF)
        store.save(Path(folder) / name, HALF, engine, host, {}, keep=1)
        if name != "fsdp2":
            state = whole(engine, host)
            if host.rank == 0:
                torch.save(state | {"steps": _steps(engine)}, Path(folder) / f"{name}.pt")
        curves[name] = train(engine, config, host, HALF, STEPS)
    return curves


def continuing(pairs: Pairs, precision: str, folder: str, **more: Any) -> dict[str, Any]:
    """In each rank: load what others saved, say what differs, save it again, and train on."""
    host, found = join(), {}
    for source, target in pairs:
        config = make(ENGINES[target], precision, more.get("optimizer"))
        engine = build(config, dropout=more.get("dropout", 0.0))
        (checkpoint,) = checkpoints(Path(folder) / source)
        try:
            resharded = reshard.needed(checkpoint, engine)
            store.load(checkpoint, engine)
        except BigtrainError as error:
            if not more.get("refused"):
                raise
            found[f"{source} -> {target}"] = {"error": str(error)}
            continue
        expected = torch.load(Path(folder) / f"{Path(source).name}.pt")
        steps = expected.pop("steps")
        state = whole(engine, host)
        wrong = [f"{name} missing" for name in set(expected) ^ set(state)]
        for name in set(expected) & set(state):
            keys = set(expected[name]) | set(state[name])
            wrong += [f"{name} {key}" for key in keys if not _same(expected[name].get(key), state[name].get(key))]
        wrong += [f"steps {_steps(engine)} not {steps}"] if _steps(engine) != steps else []
        for name, weights in engine.weights():
            if host.rank == 0 and not torch.equal(weights, expected[name]["master"].to(weights.dtype)):
                wrong.append(f"working weights of {name}")
        again = f"{host.world_size}/{target}"
        store.save(Path(folder) / again / Path(source).name, HALF, engine, host, {}, keep=1)
        curve = train(engine, config, host, HALF, STEPS)
        found[f"{source} -> {target}"] = {"wrong": wrong, "curve": curve, "resharded": resharded}
    return found


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _steps(engine: Any) -> list[float]:
    return sorted({float(shards.state_of(engine, flat).get("step", -1)) for flat in shards.flats(engine)})


def check(pairs: Pairs, world_size: int, precision: str, folder: Path, curves: dict[str, list[float]]) -> None:
    """Each continues with the state that was saved, on the curve of the uninterrupted run."""
    arguments = {"pairs": pairs, "precision": precision, "folder": str(folder)}
    for result in run_ranks(f"{__name__}:continuing", world_size, arguments):
        assert len(result) == len(pairs)
        for name, found in result.items():
            assert not found["wrong"], f"{name} at {world_size}"
            source = Path(name.split(" -> ")[0]).name
            tolerance = 1e-4 if precision == "fp32" else 1e-2
            assert found["curve"] == pytest.approx(curves[source], rel=tolerance), f"{name} at {world_size}"


def test_from_two_ranks_to_one_to_four(tmp_path: Path) -> None:
    """bf16; from each kind of layout to another, and on from there."""
    names = ["zero0", "zero1", "zero3", "zero2_offload"]
    arguments = {"choices": names, "precision": "bf16", "folder": str(tmp_path)}
    curves = run_ranks(f"{__name__}:saving", 2, arguments)[0]
    there = ["zero3_offload", "zero0", "zero2", "zero3"]
    check(list(zip(names, there, strict=True)), 1, "bf16", tmp_path, curves)
    back = [
        (f"1/{one}/{name}", other)
        for (name, one), other in zip(zip(names, there, strict=True), reversed(there), strict=True)
    ]
    check(back, 4, "bf16", tmp_path, curves)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_pair_of_engines_at_every_number_of_ranks(precision: str, tmp_path: Path) -> None:
    arguments = {"choices": list(OPEN), "precision": precision, "folder": str(tmp_path)}
    curves = run_ranks(f"{__name__}:saving", 2, arguments)[0]
    everything = [(name, target) for name in OPEN for target in OPEN]
    for world_size in (1, 2, 4):
        check(everything, world_size, precision, tmp_path, curves)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("lion", marks=pytest.mark.soak)])
def test_other_optimizers(optimizer: str, tmp_path: Path) -> None:
    chosen = {"lion": {"kind": "lion", "lr": 2e-3}, "muon": {"kind": "muon", "lr": 2e-2, "adam_lr": 1e-2}}[optimizer]
    pairs = [("zero2", "zero3"), ("zero3", "zero1"), ("zero0", "zero2"), ("zero1", "zero0")]
    arguments = {"precision": "fp32", "folder": str(tmp_path), "optimizer": chosen}
    curves = run_ranks(f"{__name__}:saving", 2, arguments | {"choices": sorted({name for name, _ in pairs})})[0]
    (result,) = run_ranks(f"{__name__}:continuing", 1, arguments | {"pairs": pairs})
    for name, found in result.items():
        wrong = [one for one in found["wrong"] if optimizer == "lion" or "momentum_buffer" not in one]
        assert not wrong, name
        assert found["curve"] == pytest.approx(curves[name.split(" -> ")[0]], rel=1e-3), name


def test_what_cannot_be_cut_anew_is_refused_in_a_line(tmp_path: Path) -> None:
    arguments = {"precision": "fp32", "folder": str(tmp_path)}
    run_ranks(f"{__name__}:saving", 2, arguments | {"choices": ["fsdp2", "zero2"]})
    arguments |= {"refused": True, "optimizer": {"kind": "lion", "lr": 1e-3}}
    pairs = [("fsdp2", "zero2"), ("fsdp2", "fsdp2"), ("zero2", "zero3")]
    (found,) = run_ranks(f"{__name__}:continuing", 1, arguments | {"pairs": pairs})
    for target in ("zero2", "fsdp2"):
        assert "saved under fsdp2, whose states cannot be cut anew" in found[f"fsdp2 -> {target}"]["error"]
        assert "continue as it was saved (2 ranks" in found[f"fsdp2 -> {target}"]["error"]
    assert "its optimizer states are of AdamW, this run steps with" in found["zero2 -> zero3"]["error"]


def test_moments_in_8_bits_move_as_they_are_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    arguments: dict[str, Any] = {"precision": "fp32", "folder": str(tmp_path), "refused": True}
    arguments |= {"optimizer": {"kind": "adamw8bit", "lr": 1e-2}}
    run_ranks(f"{__name__}:saving", 2, arguments | {"choices": ["zero2", "zero0"]})
    pairs = [("zero2", "zero2"), ("zero2", "zero3"), ("zero0", "ddp")]  # from two ranks to one
    (found,) = run_ranks(f"{__name__}:continuing", 1, arguments | {"pairs": pairs})
    for target in ("zero2", "zero3"):
        assert "quantised in blocks, which cannot be cut anew" in found[f"zero2 -> {target}"]["error"]
    assert found["zero0 -> ddp"]["wrong"] == []
