"""Before ranks start: can this run fit into the machine at all? What cannot is refused in one line, with what would.

Only what is certain counts: an estimate that leaves out what it does not know, and the whole memory of the machine.
A run that fits is never refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from bigtrain.config import LABELLED_TASKS, Config, DeepSpeedConfig, HuggingFaceConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import write_atomic
from bigtrain.hardware import Placement
from bigtrain.plan import clusters, memory, planner, sizes, units
from bigtrain.plan.result import GIB

FILE = "plan.json"  # in the run directory
CERTAIN = 0.95  # of an estimate that is held to real runs within 3 %
ON_A_GPU = 0.9  # where it is not


def check(config: Config, placement: Placement) -> None:
    """Raises BigtrainError for a run that cannot fit into the nodes, as far as they are known before the ranks start,
    unless launch.preflight=false."""
    least = least_gib(config, placement) if config.launch.preflight else None
    if least is None:
        return
    if placement.device == "cuda":
        there = min((gpu.memory_gib for gpu in placement.gpus), default=None)
        needed, where = least, "each GPU has"
    else:
        there = placement.memory_gib and placement.memory_gib + placement.swap_gib
        needed = least * placement.ranks
        where = "this machine has" if placement.nodes == 1 else "each node has"
    if there is None or needed <= there:
        return
    found = planner.nearest_fit(config, clusters.of(placement))
    way_out = "take a smaller model, shorter sequences or a larger machine"
    if found is not None:
        way_out = f"what fits: {' '.join(found[0])} ({units.size(found[1].memory['peak'])})"
    raise BigtrainError(
        f"the run needs at least {units.size(least)} on each of {placement.world_size} ranks, {where}"
        f" {units.size(there)} (bigtrain plan shows what for); {way_out}; launch.preflight=false starts it all the same"
    )


def least_gib(config: Config, placement: Placement) -> float | None:
    """What one rank certainly needs of the memory it computes in; None where that is not known."""
    engine = config.engine
    if isinstance(config.model, HuggingFaceConfig) or not isinstance(engine, DeepSpeedConfig) or engine.deepspeed:
        return None
    config = sizes.with_vocabulary(config)
    found = memory.estimate(config, placement.world_size, sizes.of_run(config), placement.device)
    train = config.train
    shorter = isinstance(config.task, LABELLED_TASKS)  # examples may be shorter than the longest that is allowed
    if shorter or train.compile or train.lora.rank or found.assumptions:
        certain = sum(found.states.values())
    else:
        certain = found.certain.total
    return certain * (CERTAIN if placement.device == "cpu" else ON_A_GPU) / GIB


def write(config: Config, run_dir: Path, placement: Placement) -> None:
    """Leave the plan of a run in its directory, for the log and the report; nothing for what has no closed form, or
    where the GPUs are not known."""
    if placement.device == "cuda" and not placement.gpus:
        return
    try:
        plan = planner.make(config, clusters.of(placement))
    except ConfigError:
        return
    write_atomic(run_dir / FILE, plan.to_json() + "\n")


def predicted(run_dir: Path) -> dict[str, float]:
    """What is logged beside the measured numbers: `plan/peak_memory_gib` and `plan/step_seconds`."""
    try:
        plan = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        return {"plan/peak_memory_gib": plan["memory"]["peak"], "plan/step_seconds": plan["step_seconds"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
