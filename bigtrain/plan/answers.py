"""What `bigtrain plan` answers beyond the plan of one config: the best way to run it, what a budget buys, what a loss
costs, and the page of pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain import checks
from bigtrain.config import Config, EncoderConfig, Seq2SeqConfig
from bigtrain.errors import ConfigError
from bigtrain.plan import budget, flops, money, recommend, simulate, step_time, units
from bigtrain.plan import sizes as parameter_sizes
from bigtrain.plan.budget import FittedLaw, Optimum
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.options import Options
from bigtrain.plan.recommend import Candidate, Recommendation
from bigtrain.plan.result import Plan


@dataclass
class Answers:
    """`config` on `cluster` is what is to be planned: as it was given, or as it was recommended."""

    config: Config
    cluster: Cluster
    tokens: float | None
    lines: list[str] = field(default_factory=list)  # for the reader
    data: dict[str, Any] = field(default_factory=dict)  # the same for JSON
    recommendation: Recommendation | None = None


def answer(options: Options, config: Config, cluster: Cluster) -> Answers:
    """Everything that `options` asks beside the plan itself. Raises ConfigError."""
    config = parameter_sizes.with_vocabulary(config)
    found = Answers(config, cluster, options.tokens)
    law = budget.read_law(Path(options.ladder)) if options.ladder else budget.CHINCHILLA
    if any(asked is not None for asked in (options.target_loss, options.hours, options.budget)):
        checks.check_batch(config, cluster.devices)  # they are answered for all of the cluster
        found.lines += _warnings(config, law, fitted=options.ladder is not None)
    if options.target_loss is not None:
        _target(found, options.target_loss, law, fitted=options.ladder is not None)
    if options.hours is not None or options.budget is not None:
        if options.hours is not None and options.budget is not None:
            raise ConfigError("budget", options.budget, "there is a budget of hours already", "leave one of them out")
        _purchase(found, options.hours, options.budget, law)
    if options.goal != "none":
        _recommend(found, options.goal)
    return found


def write_page(found: Answers, plan: Plan, out: Path) -> Path:
    """The pictures, and of `plan` its memory and notes. Raises BigtrainError if they cannot be written."""
    from bigtrain.plan import pictures

    config, cluster = found.config, found.cluster
    sizes = parameter_sizes.of_run(config)

    def memory(other: Config, on: Cluster, ranks: int) -> dict[str, float]:
        return recommend.room(other, on, ranks, sizes).parts

    title = f"{_count(sizes.total)} parameters on {cluster.devices} x {cluster.device.name}"
    subject = pictures.Subject(
        config, cluster, cluster.devices, sizes, title, found.tokens or _run_tokens(config), found.recommendation,
        (plan.memory["peak"], *plan.intervals["memory.peak"]), tuple(plan.warnings),
    )  # fmt: skip
    return pictures.write_report(subject, memory, out)


# --------------------------------------------------------------------------------------------- the answers


def _recommend(found: Answers, goal: recommend.Goal) -> None:
    tokens = found.tokens or _run_tokens(found.config)
    best = recommend.search(found.config, found.cluster, goal, tokens)
    found.recommendation, found.tokens = best, tokens
    found.config, found.cluster = best.best.config, best.best.cluster
    found.lines += [
        f"best for {goal}: {best.best.short}",
        f"  {_figures(best.best)}",
        f"what binds: {best.binds}",
        f"next: {best.next_change}",
        f"train with: {best.best.line}",
        *([f"  {best.best.to_add}"] if best.best.to_add else []),
        "as conf/experiment/NAME.yaml:",
        *(f"  {line}" for line in best.best.yaml.splitlines()),
        f"not to be beaten in time, money and memory at once ({best.fitting} of {best.tried} ways fit):",
        *(f"  {_figures(each)}: {each.short}" for each in _spread(best.front)),
    ]
    found.data["recommendation"] = _plain(best.best) | {
        "goal": goal,
        "binds": best.binds,
        "next_change": best.next_change,
        "overrides": best.best.line,
        "yaml": best.best.yaml,
        "tried": best.tried,
        "fitting": best.fitting,
        "pareto": [_plain(each) for each in best.front],
    }


def _spread(front: list[Candidate], most: int = 12) -> list[Candidate]:
    """Some of a long front, evenly, its ends among them."""
    if len(front) <= most:
        return front
    return [front[round(index * (len(front) - 1) / (most - 1))] for index in range(most)]


def _warnings(config: Config, law: FittedLaw, fitted: bool) -> list[str]:
    """Where a law is not of what it is used for, and what its intervals are."""
    lines = []
    if not fitted and isinstance(config.model, (EncoderConfig, Seq2SeqConfig)):
        lines.append(
            f"Chinchilla's is a law of decoders' causal loss: of an {_NAMES[config.model.kind]} it says little"
        )
    if law.known:
        lines.append("intervals (A to B) are of one standard error of the law's constants")
    else:
        lines.append("the ladder holds no intervals: bigtrain report --ladder writes one that does")
    return lines


_NAMES = {"encoder": "encoder's masked tokens", "seq2seq": "encoder-decoder's target"}


def _purchase(found: Answers, hours: float | None, dollars: float | None, law: FittedLaw) -> None:
    if hours is None:
        assert dollars is not None
        hours = budget.hours_for_dollars(dollars, found.cluster)
    bought = budget.buy(found.config, found.cluster, hours, law)
    model, optimum = flops.our_model(bought.config.model), bought.optimum
    ranks, sizes = found.cluster.devices, parameter_sizes.of_run(bought.config)
    fits = recommend.room(bought.config, found.cluster, ranks, sizes).fits
    found.lines += [
        f"{units.hours(hours)} of {found.cluster.devices} devices ({units.dollars(bought.cost)}) are "
        f"{optimum.flops:.3g} FLOPs at an MFU of {units.percent(bought.time.mfu)}",
        f"compute-optimal: {_optimum(optimum, law.known)}, loss {optimum.loss:.3f} nats per token",
        f"  as {budget.overrides(bought.config)}: {_count(bought.parameters)} parameters"
        + ("" if fits else ", which do not fit with these settings: goal=time finds others"),
    ]
    largest = budget.largest_model(found.config, found.cluster)
    wide, total = flops.our_model(largest.config.model), parameter_sizes.of_run(largest.config).total
    found.lines.append(
        f"the largest of this shape that fits: {_count(total)} ({budget.overrides(largest.config)}; {largest.short})"
    )
    found.data["purchase"] = {
        "hours": hours, "cost": bought.cost, "flops": optimum.flops, "loss": optimum.loss,
        "parameters": optimum.parameters, "parameters_interval": optimum.parameters_interval if law.known else None,
        "tokens": optimum.tokens, "tokens_interval": optimum.tokens_interval if law.known else None,
        "overrides": budget.overrides(bought.config), "dim": model.dim, "n_layers": model.n_layers, "fits": fits,
        "largest_overrides": budget.overrides(largest.config), "largest_parameters": total, "largest_dim": wide.dim,
        "largest_n_layers": wide.n_layers,
    }  # fmt: skip


def _target(found: Answers, target: float, law: FittedLaw, fitted: bool) -> None:
    sizes = parameter_sizes.of_run(found.config)
    tokens = budget.tokens_to_loss(target, sizes.total, law)
    ends = budget.tokens_interval(target, sizes.total, law)
    time = step_time.estimate(found.config, found.cluster, found.cluster.devices, sizes)

    def bill(of_tokens: float) -> money.Bill:
        return money.bill(money.hours_for(of_tokens, time.tokens_per_second), found.cluster.devices, found.cluster)

    paid, least, most = bill(tokens), bill(ends[0]), bill(ends[1])
    kept = simulate.goodput_of(found.config, found.cluster, sizes, time, paid.hours)
    found.lines.append(
        f"a loss of {target:g} nats per token takes {_count(tokens)} tokens: {units.hours(paid.hours)} "
        f"({units.hours(paid.hours / kept)} with failures), {units.dollars(paid.cost)}, {units.energy(paid.energy_kwh)}"
    )
    if law.known:
        never = "" if math.isfinite(ends[1]) else "; the law does not exclude that this size never reaches it"
        found.lines.append(
            f"  ({_count(ends[0])} to {_count(ends[1])} tokens, "
            f"{units.hours(least.hours)} to {units.hours(most.hours)}, "
            f"{units.dollars(least.cost)} to {units.dollars(most.cost)}{never})"
        )
    if not fitted:
        found.lines.append(
            "  by Chinchilla's law for its own data and tokenizer (arXiv 2404.10102): "
            "fit yours with bigtrain report --ladder, then ladder=FILE"
        )
    found.tokens = found.tokens or tokens
    found.data["target"] = {
        "loss": target, "tokens": tokens, "hours": paid.hours, "hours_with_failures": paid.hours / kept,
        "cost": paid.cost, "energy_kwh": paid.energy_kwh, "fitted": fitted,
    } | {
        f"{name}_interval": (low, high if math.isfinite(high) else None) if law.known else None  # JSON has no infinity
        for name, low, high in (
            ("tokens", *ends), ("hours", least.hours, most.hours), ("cost", least.cost, most.cost),
        )
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- writing


def _run_tokens(config: Config) -> float:
    """Of train.steps steps."""
    texts = 2 if isinstance(config.model, Seq2SeqConfig) else 1
    return float(config.train.steps * config.train.global_batch * flops.sequence_length(config) * texts)


def _figures(candidate: Candidate) -> str:
    bill, time = candidate.bill, candidate.time
    paid = units.dollars(bill.cost) if bill.cost else f"{units.hours(bill.device_hours)} of devices"
    return f"{units.hours(bill.hours)}, {paid}, {units.size(candidate.peak_gib)} a rank, MFU {units.percent(time.mfu)}"


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {
        "ranks": candidate.ranks, "hours": candidate.bill.hours, "cost": candidate.bill.cost,
        "energy_kwh": candidate.bill.energy_kwh, "peak_gib": candidate.peak_gib,
        "step_seconds": candidate.time.seconds, "mfu": candidate.time.mfu, "settings": candidate.overrides,
    }  # fmt: skip


def _optimum(optimum: Optimum, known: bool) -> str:
    least, most = optimum.parameters_interval
    few, many = optimum.tokens_interval
    return (
        f"{_count(optimum.parameters)} parameters{f' ({_count(least)} to {_count(most)})' if known else ''} on "
        f"{_count(optimum.tokens)} tokens{f' ({_count(few)} to {_count(many)})' if known else ''}"
    )


def _count(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
