"""The table of what goes together: refused cells say why, before anything starts; allowed ones train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.checks import check
from bigtrain.compress.compatibility import RULES, TRANSFORMS, Cell, cells, refusal, used
from bigtrain.config import from_dict
from bigtrain.errors import ConfigError
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, bigtrain, result

PRUNES = {
    "prune.magnitude": {"method": "magnitude"},
    "prune.wanda": {"method": "wanda", "scope": "layer"},
    "prune.movement": {"method": "movement"},
}
SAMPLE = [  # of the allowed cells, for the usual suite; `make soak` trains every one
    Cell("prune.magnitude", "zero3", "cpu", False),
    Cell("prune.movement", "zero2", "cpu", False),
    Cell("prune.wanda", "zero1", "none", False),
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


def walk(chosen: list[Cell]) -> None:
    assert all(refusal(cell) is None for cell in chosen)
    cases = {"-".join(map(str, cell)): sections(cell) | {"compress": PRUNES[cell.transform]} for cell in chosen}
    arguments = {"cases": {name: [case["engine"], case["train"], case["compress"]] for name, case in cases.items()}}
    for found in run_ranks("tests.compress.sparse:walk", 2, arguments):
        assert found == {name: [] for name in cases}


def test_some_allowed_cells_train() -> None:
    walk(SAMPLE)


@pytest.mark.soak
@pytest.mark.parametrize("compiled", [False, True])
def test_every_allowed_cell_trains(compiled: bool) -> None:
    walk([cell for cell in allowed("prune.") if cell.compile == compiled])


@pytest.mark.soak
@pytest.mark.parametrize("cell", allowed("quantize") + allowed("distil"), ids=lambda cell: "-".join(map(str, cell)))
def test_every_allowed_cell_of_the_other_transforms_trains(
    cell: Cell, tmp_path: Path, data_cache: Path, trained_run: Path
) -> None:
    run = tmp_path / "run"
    engine = sections(cell)["engine"] | ({"nvme_path": str(tmp_path)} if cell.offload == "nvme" else {})
    chosen = {"quantize": ["compress=[qat_int4]"], "distil": ["compress=[distil]"]}[cell.transform]
    chosen += [f"compress.distil.teacher={trained_run}"] if cell.transform == "distil" else []
    bigtrain(
        "train", *TINY, f"run_dir={run}", f"data.cache_dir={data_cache}", "train.steps=4",
        "train.stop_at=3", "train.eval_every=0",
        "engine=zero2" if engine["kind"] == "deepspeed" else "engine=accelerate", *chosen,
        *(f"engine.{key}={value}" for key, value in engine.items()), f"train.compile={str(cell.compile).lower()}",
        timeout=500,
    )  # fmt: skip
    assert result(run)["train/steps"] == 3
