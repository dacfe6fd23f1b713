"""The table of what goes together: refused cells say why, before anything starts; allowed ones train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.checks import check
from bigtrain.compress.compatibility import RULES, TRANSFORMS, Cell, cells, refusal, used
from bigtrain.config import from_dict, load, to_dict
from bigtrain.errors import ConfigError
from tests.distributed.ranks import run_ranks

PRUNES = {
    "prune.magnitude": {"method": "magnitude"},
    "prune.wanda": {"method": "wanda", "scope": "layer"},
    "prune.movement": {"method": "movement"},
}
SAMPLE = [  # of the allowed cells, for the usual suite; `make soak` trains every one
    Cell("prune.magnitude", "zero3", "cpu", False),
    Cell("prune.movement", "zero2", "cpu", False),
    Cell("prune.wanda", "zero1", "none", False),
    Cell("prune.magnitude", "zero2", "none", True),
    Cell("prune.movement", "zero3", "none", True),
]


def sections(cell: Cell) -> dict[str, Any]:
    """The config of a cell, but for the model and what it learns."""
    engine: dict[str, Any] = {"kind": "accelerate", "parallel": cell.engine}
    if cell.engine.startswith("zero"):
        engine = {"kind": "deepspeed", "stage": int(cell.engine[-1]), "offload_optimizer": cell.offload}
        if cell.engine == "zero3":
            engine["offload_parameters"] = cell.offload
        if cell.offload == "nvme":
            engine["nvme_path"] = "/nvme"
    part, _, _ = cell.transform.partition(".")
    settings: dict[str, Any] = PRUNES.get(cell.transform, {"teacher": "runs/teacher"} if part == "distil" else {})
    return {"engine": engine, "train": {"compile": cell.compile}, "compress": {part: settings}}


def allowed(prefix: str) -> list[Cell]:
    return [cell for cell in cells() if cell.transform.startswith(prefix) and refusal(cell) is None]


def test_the_table_holds_every_transform_and_every_rule_refuses_something() -> None:
    assert {cell.transform for cell in cells()} == set(TRANSFORMS)
    for rule in RULES:
        assert any(refusal(cell) is rule for cell in cells()), rule


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: "-".join(map(str, cell)))
def test_a_cell_is_refused_with_its_reason_or_passes(cell: Cell) -> None:
    config = from_dict(sections(cell))
    assert used(config) == [cell]
    rule = refusal(cell)
    if rule is None:
        check(config)
        return
    with pytest.raises(ConfigError, match=r"^compress\.\w+.*does not go with") as raised:
        check(config)
    assert rule.reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pruning_does_not_go_with_lora() -> None:
    with pytest.raises(ConfigError, match=r"compress\.prune: does not go with train\.lora.*set train\.lora\.rank=0"):
        check(from_dict({"compress": {"prune": {}}, "train": {"lora": {"rank": 4}}, "init_from": "runs/some"}))


def walk(chosen: list[Cell], backend: str | None = None) -> None:
    """Train each cell through its whole schedule; `backend`: of torch.compile."""
    assert all(refusal(cell) is None for cell in chosen)
    cases = {"-".join(map(str, cell)): sections(cell) | {"compress": PRUNES[cell.transform]} for cell in chosen}
    arguments = {
        "cases": {
            name: [case["engine"], case["train"] | {"backend": backend}, case["compress"]]
            for name, case in cases.items()
        }
    }
    for found in run_ranks("tests.compress.sparse:walk", 2, arguments, timeout=900):
        assert found == {name: [] for name in cases}


def test_some_allowed_cells_train() -> None:
    walk(SAMPLE, "aot_eager")  # what the compiler sees of the model, without what it takes to make machine code


@pytest.mark.soak
@pytest.mark.parametrize("compiled", [False, True])
def test_every_allowed_cell_of_pruning_trains(compiled: bool) -> None:
    walk([cell for cell in allowed("prune.") if cell.compile == compiled])


SETTINGS: dict[str, dict[str, Any]] = {
    "distil": {"hidden": 0.1},
    "quantize": {"bits": 4, "group_size": 32, "start": 1, "freeze": 3},
    "float8": {},  # torchao emulates the numbers where there is no GPU
}
STEPS = 4


@pytest.mark.soak
@pytest.mark.parametrize(
    ("transform", "compiled"),
    sorted(
        {(cell.transform, cell.compile) for cell in cells() if cell.transform in SETTINGS and refusal(cell) is None}
    ),
)
def test_every_allowed_cell_of_the_other_transforms_trains(
    transform: str, compiled: bool, trained_run: Path, tmp_path: Path
) -> None:
    """And learns what every other cell of it does: the same losses, whatever the engine."""
    chosen = [cell for cell in allowed(transform) if cell.compile == compiled]
    base = to_dict(load(trained_run / "config.yaml"))
    settings = SETTINGS[transform] | ({"teacher": str(trained_run)} if transform == "distil" else {})
    cases = {
        "-".join(map(str, cell)): base
        | {
            "engine": sections(cell)["engine"] | ({"nvme_path": str(tmp_path)} if cell.offload == "nvme" else {}),
            "train": base["train"] | {"compile": compiled},
            "compress": {transform: settings},
        }
        for cell in chosen
    }
    first, second = run_ranks("tests.compress.composed:walk", 2, {"cases": cases, "steps": STEPS}, timeout=900)
    assert {
        name: seen["problem"] for found in (first, second) for name, seen in found.items() if "problem" in seen
    } == {}
    curves = {name: [line["loss"] for line in seen["told"]] for name, seen in first.items()}
    example = next(iter(curves.values()))
    for name, seen in first.items():
        assert seen["finite"], name
        assert seen["moved"], name
        assert curves[name] == pytest.approx(example, rel=1e-2), name
        assert seen["told"] == second[name]["told"], name
        if transform == "distil":
            assert all(line["train/distil_loss"] > 0 for line in seen["told"]), name
        if transform == "quantize":
            assert [line.get("compress/weight_bits") for line in seen["told"]] == [4.0] * STEPS, name
