"""`simulate=true`: a step, its scaling curve and the run's days as the simulator has them, for people and for JSON."""

from __future__ import annotations

from typing import Any

from bigtrain.config import Config
from bigtrain.errors import ConfigError
from bigtrain.plan import money, simulate, step_time, units
from bigtrain.plan import sizes as parameter_sizes
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.simulate import FAILURE_YEARS, YEAR, Goodput


def of(
    config: Config, cluster: Cluster, steps: int, jitter: float, mtbf_hours: float | None
) -> tuple[list[str], dict[str, Any]]:
    """What is said, and the same for JSON, of `steps` steps on all devices of `cluster`.

    jitter: of a rank's computing, as simulate.step takes it. mtbf_hours: of one device; None: simulate.FAILURE_YEARS.
    """
    ranks, sizes = cluster.devices, parameter_sizes.of_run(config)
    closed = step_time.estimate(config, cluster, ranks, sizes)
    even = simulate.step(config, cluster, ranks, sizes).seconds
    seconds = simulate.step(config, cluster, ranks, sizes, jitter).seconds
    # As in the closed form: what communication adds to computing, in waiting and in slowing it down.
    exposed = max(0.0, even - (closed.seconds - closed.parts["communication"]))
    curve = simulate.scaling(config, cluster, ranks, sizes, simulate.counts(cluster, ranks), jitter)
    lines = [
        f"simulated step: {units.seconds(seconds)} (closed form, without stragglers: {units.seconds(closed.seconds)}); "
        f"of it exposed communication {units.seconds(exposed)} ({units.seconds(closed.parts['communication'])}), "
        f"stragglers {units.seconds(seconds - even)}",
        "scaling, the same work for each device (tokens/s, of linear):",
        *(f"  {devices:>9,}: {units.number(speed)}, {units.percent(share)}" for devices, speed, share in curve),
    ]
    run_lines, run = _days(config, cluster, sizes, steps, seconds, mtbf_hours or FAILURE_YEARS * YEAR / 3600)
    return lines + run_lines, {
        "jitter": jitter,
        "step": {
            "seconds": seconds, "closed_form_seconds": closed.seconds, "exposed_communication_seconds": exposed,
            "closed_form_exposed_communication_seconds": closed.parts["communication"],
            "stragglers_seconds": seconds - even,
        },
        "scaling": [
            {"ranks": devices, "tokens_per_second": speed, "of_linear": share} for devices, speed, share in curve
        ],
        "run": run,
    }  # fmt: skip


def _days(
    config: Config, cluster: Cluster, sizes: parameter_sizes.Sizes, steps: int, step_seconds: float, mtbf_hours: float
) -> tuple[list[str], dict[str, Any]]:
    hours, between = steps * step_seconds / 3600, mtbf_hours / cluster.devices
    saved = money.checkpoint(config, cluster, cluster.devices, sizes)

    def kept(interval: float | None) -> Goodput | None:
        """None for a run that never gets ahead."""
        years = mtbf_hours * 3600 / YEAR
        try:
            return simulate.expected(
                hours, cluster.devices, step_seconds, saved.stall_seconds, years, interval, saved.write_seconds
            )
        except ConfigError:
            return None

    asked, best = kept(simulate.interval_of(config, step_seconds, hours)), kept(None)
    every = config.train.save_every
    lines = [
        f"{hours / between:,.3g} failures in {units.hours(hours)} of steps, one every {units.hours(between)} "
        f"(mtbf_hours={mtbf_hours:,.0f} of a device)",
        f"  saving {f'every {every:,} steps' if every else 'only at the end'} (train.save_every): {_said(asked)}",
        f"  saving every {_steps(best, step_seconds):,} steps (best): {_said(best)}"
        if best
        else "  saving as often as is best: never gets ahead",
    ]
    data = {
        "steps": steps, "hours": hours, "mtbf_hours": mtbf_hours, "failures_expected": hours / between,
        "checkpoint_stall_seconds": saved.stall_seconds, "at_save_every": _plain(asked, step_seconds),
        "at_best": _plain(best, step_seconds),
    }  # fmt: skip
    return lines, data


def _steps(found: Goodput, step_seconds: float) -> int:
    return round(found.interval_seconds / step_seconds)


def _said(found: Goodput | None) -> str:
    if found is None:
        return "never gets ahead"
    return (
        f"goodput {units.percent(found.fraction)}, {units.hours(found.hours)} with failures "
        f"({units.hours(found.lost_hours)} of steps done again, {units.hours(found.checkpoint_hours)} of saving, "
        f"{units.hours(found.restart_hours)} of restarting)"
    )


def _plain(found: Goodput | None, step_seconds: float) -> dict[str, float] | None:
    return None if found is None else {
        "save_every": _steps(found, step_seconds), "interval_seconds": found.interval_seconds,
        "goodput": found.fraction, "hours": found.hours, "failures": found.failures, "lost_hours": found.lost_hours,
        "checkpoint_hours": found.checkpoint_hours, "restart_hours": found.restart_hours,
    }  # fmt: skip
