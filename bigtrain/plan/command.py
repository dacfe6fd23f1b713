"""`bigtrain plan`: from the composed config and the command's own keys to what is printed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from bigtrain.config import Config
from bigtrain.plan import answers, clusters, lengths, planner, simulation, table
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.options import Options, split
from bigtrain.plan.result import Plan
from bigtrain.plan.units import size

__all__ = ["run", "split"]


def run(config: Config, options: Options, say: Callable[[str], None]) -> float:
    """Plan a config and print it. Returns the objective of a sweep over plans: seconds of a step.

    Raises ConfigError for a config, cluster or option that makes no sense, BigtrainError if the trace fails.
    """
    cluster = clusters.here(config.launch) if options.cluster == "here" else clusters.find(options.cluster)
    found = answers.answer(options, lengths.located(config), cluster)
    plan = planner.make(found.config, found.cluster, found.tokens)
    told = list(found.lines)
    if not plan.fits:
        told.append(_way_out(found.config, found.cluster))
    if options.simulate:
        lines, found.data["simulation"] = simulation.of(
            found.config, found.cluster, plan.steps or 0, options.jitter, options.mtbf_hours
        )
        told += lines
    if options.verify:
        from bigtrain.plan import traced

        compared = traced.compare(found.config, found.cluster)
        found.data["verify"] = compared.to_dict()
        told.append(str(compared))
    if options.report:
        page: Path = answers.write_page(found, plan, Path(options.out))
        found.data["report"] = str(page)
        told.append(str(page))
    if options.output == "json":
        say(json.dumps(plan.to_dict(options.explain) | found.data, indent=1))
    else:
        say("\n".join([table.show(plan, options.explain), *told]))
    return plan.step_seconds if plan.step_seconds is not None else math.nan


def _way_out(config: Config, cluster: Cluster) -> str:
    found = planner.nearest_fit(config, cluster)
    if found is None:
        return f"no setting fits into {cluster.name}: take more devices, a smaller model or shorter sequences"
    overrides, plan = found
    return f"the nearest that fits: {' '.join(overrides)} ({described(plan)})"


def described(plan: Plan) -> str:
    return f"{size(plan.memory['peak'])} of {size(plan.device_memory_gib)} a rank"
