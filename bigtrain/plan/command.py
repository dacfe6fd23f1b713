"""`bigtrain plan`: from the composed config and the command's own keys to what is printed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bigtrain.config import Config
from bigtrain.launch.train import checked
from bigtrain.plan import clusters, planner, table
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.options import Options, split
from bigtrain.plan.result import Plan

__all__ = ["run", "split"]


def run(data: dict[str, Any], options: Options, say: Callable[[str], None]) -> float:
    """Plan a composed config and print it. Returns the objective of a sweep over plans: seconds of a step.

    Raises ConfigError for a config, cluster or option that makes no sense.
    """
    config = checked(data)
    cluster = clusters.here(config.launch) if options.cluster == "here" else clusters.find(options.cluster)
    plan = planner.make(config, cluster, options.tokens)
    say(plan.to_json(options.explain) if options.output == "json" else table.show(plan, options.explain))
    if options.output == "table" and not plan.fits:
        say(_way_out(config, cluster))
    if options.verify:
        from bigtrain.plan import traced

        say(traced.compare(config, cluster, plan))
    return plan.step_seconds if plan.step_seconds is not None else math.nan


def _way_out(config: Config, cluster: Cluster) -> str:
    found = planner.nearest_fit(config, cluster)
    if found is None:
        return f"no setting fits into {cluster.name}: take more devices, a smaller model or shorter sequences"
    overrides, plan = found
    return f"the nearest that fits: {' '.join(overrides)} ({described(plan)})"


def described(plan: Plan) -> str:
    return f"{table.size(plan.memory['peak'])} of {table.size(plan.device_memory_gib)} a rank"
