"""Which transform goes with which engine, offload and compilation: one table, asked before anything starts.

A cell is allowed unless a rule says why not; tests/compress/test_compatibility.py walks all of them, and trains the
allowed ones. Nothing here needs torch.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bigtrain.config import AccelerateConfig, Config, DeepSpeedConfig
from bigtrain.errors import NO_VALUE, ConfigError

ENGINES = ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2")
OFFLOADS = {
    "zero0": ("none",), "zero1": ("none", "cpu"), "zero2": ("none", "cpu"), "zero3": ("none", "cpu", "nvme"),
    "ddp": ("none",), "fsdp2": ("none",),
}  # fmt: skip
TRANSFORMS = ("prune.magnitude", "prune.wanda", "prune.movement", "distil", "quantize", "float8")


class Cell(NamedTuple):
    transform: str  # one of TRANSFORMS
    engine: str  # one of ENGINES
    offload: str  # none, cpu, nvme: of optimizer states, at stage 3 of parameters too
    compile: bool


@dataclass(frozen=True)
class Rule:
    """Refuses the cells that match all of it: patterns, or True for compiled ones only."""

    reason: str
    way_out: str
    transform: str = "*"
    engine: str = "*"
    offload: str = "*"
    compiled: bool = False

    def refuses(self, cell: Cell) -> bool:
        named = zip(cell[:3], (self.transform, self.engine, self.offload), strict=True)
        return all(fnmatch.fnmatch(*pair) for pair in named) and (cell.compile or not self.compiled)


RULES = (
    Rule(
        "weights are held at zero in the optimizer's own memory, and there they are on a disk",
        "take engine.offload_optimizer=cpu", "prune.*", offload="nvme",
    ),
    Rule(
        "weights are held at zero in the optimizer's own memory, which FSDP2 cuts in a way of its own",
        "take engine=zero3", "prune.*", engine="fsdp2",
    ),
    Rule(
        "it listens to what layers are given at the steps that prune, which a compiled graph does not notice",
        "set train.compile=false", "prune.wanda", compiled=True,
    ),
    Rule(
        "ZeRO-3 would keep every layer's whole weight for the backward pass", "take engine=zero2", "float8",
        engine="zero3",
    ),
    Rule("the teacher's part goes through hooks", "set train.compile=false", "distil", compiled=True),
)  # fmt: skip


def cells() -> Iterator[Cell]:
    """The whole table."""
    for transform, engine, compiled in itertools.product(TRANSFORMS, ENGINES, (False, True)):
        for offload in OFFLOADS[engine]:
            yield Cell(transform, engine, offload, compiled)


def refusal(cell: Cell) -> Rule | None:
    """Why a cell does not compose; None: it does."""
    return next((rule for rule in RULES if rule.refuses(cell)), None)


def used(config: Config) -> list[Cell]:
    """The cells that a run is in: one for each of its transforms."""
    engine, compress = config.engine, config.compress
    if isinstance(engine, AccelerateConfig):
        name, offload = str(engine.parallel), "none"
    else:
        assert isinstance(engine, DeepSpeedConfig)
        name, offloads = f"zero{engine.stage}", (engine.offload_optimizer, engine.offload_parameters)
        offload = next((kind for kind in ("nvme", "cpu") if kind in offloads), "none")
    transforms = [f"prune.{compress.prune.method}"] if compress.prune is not None else []
    transforms += [part for part in ("distil", "quantize", "float8") if getattr(compress, part) is not None]
    return [Cell(transform, name, offload, config.train.compile) for transform in transforms]


def check(config: Config) -> None:
    """Raises ConfigError for the first cell that does not compose, or transforms that do not with each other."""
    for cell in used(config):
        if rule := refusal(cell):
            name, _, method = cell.transform.partition(".")
            raise ConfigError(
                f"compress.{name}" + (".method" if method else ""), method or NO_VALUE,
                f"does not go with {_where(cell)}: {rule.reason}", rule.way_out,
            )  # fmt: skip
    if config.compress.prune is not None and config.train.lora.rank:
        raise ConfigError(
            "compress.prune", NO_VALUE, "does not go with train.lora: the weights it would prune are not trained, and"
            " the learned change fills them again", "set train.lora.rank=0",
        )  # fmt: skip


def _where(cell: Cell) -> str:
    parts = [cell.engine, f"{cell.offload} offload" if cell.offload != "none" else "", "compile" * cell.compile]
    return " + ".join(part for part in parts if part)
