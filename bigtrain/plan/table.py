"""A plan for people: a table on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import StringIO

from bigtrain.plan.result import Plan
from bigtrain.plan.units import dollars, energy, hours, mass, number, percent, seconds, sent, size


def show(plan: Plan, explain: bool = False) -> str:
    """The plan as text. explain: every number's formula and source below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=StringIO(), width=None if sys.stdout.isatty() else 120, force_terminal=sys.stdout.isatty())
    table = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_row(
        "parameters", f"{plan.parameters:,}", _parts({k: f"{v:,}" for k, v in plan.parameters_by_part.items()})
    )
    batch = f"{plan.micro_batch} sequences x {plan.accumulation} a step, on each of {plan.ranks} ranks"
    table.add_row("micro-batch", f"{plan.micro_batch} x {plan.accumulation}", batch)
    length = plan.sequence_length
    table.add_row("tokens of a text", f"{length['mean']:,.0f}", f"at most {length['longest']:,.0f}, padding counted")
    parts = sorted((k for k in plan.memory if k != "peak" and plan.memory[k]), key=lambda k: -plan.memory[k])
    colour = "green" if plan.fits else "red"
    low, high = plan.intervals["memory.peak"]
    fits = "fits" if plan.fits else f"DOES NOT FIT: {plan.binding}"
    table.add_row(
        "[bold]memory of a rank[/]", f"[bold {colour}]{size(plan.memory['peak'])}[/]",
        f"{size(low)} to {size(high)}, of {size(plan.device_memory_gib)}: {fits}",
    )  # fmt: skip
    for name in parts:
        table.add_row(f"  {name}", size(plan.memory[name]), _bar(plan.memory[name] / plan.memory["peak"]))
    saved = plan.activations
    table.add_row(
        "  activations saved", size(saved["without_checkpointing"]),
        f"{size(saved['per_layer'])} a layer; {size(saved['with_checkpointing'])} with activation checkpointing",
    )  # fmt: skip
    table.add_row("host memory", size(plan.host_memory_gib), "of a node")
    if plan.disk_gib:
        table.add_row("NVMe", size(plan.disk_gib), "of a node")
    if plan.step_seconds is not None:
        low, high = plan.intervals["step_seconds"]
        table.add_row("[bold]step[/]", f"[bold]{seconds(plan.step_seconds)}[/]", f"{seconds(low)} to {seconds(high)}")
        for name, value in plan.time.items():
            if value:
                table.add_row(f"  {name}", seconds(value), _bar(value / plan.step_seconds))
        for name, gb in plan.communication.items():
            table.add_row("  sent", sent(gb), name)
        table.add_row(
            "tokens/s", number(plan.tokens_per_second or 0),
            f"{_range(plan, 'tokens_per_second', number)}; MFU {percent(plan.mfu or 0)}, HFU {percent(plan.hfu or 0)}",
        )  # fmt: skip
        table.add_row(
            "run", hours(plan.hours or 0),
            f"{_range(plan, 'hours', hours)}: {plan.steps:,} steps, {plan.tokens:,.0f} tokens; "
            "start, evaluations and saves come on top",
        )  # fmt: skip
        priced = _range(plan, "cost", dollars) if plan.cost else "the cluster has no price"
        table.add_row("cost", dollars(plan.cost or 0), priced)
        table.add_row(
            "energy", energy(plan.energy_kwh or 0),
            f"{_range(plan, 'energy_kwh', energy)}; {mass(plan.co2_kg or 0)} CO2e",
        )  # fmt: skip
        stall = f"training waits about {seconds(plan.checkpoint_stall_seconds or 0)} for each"
        table.add_row("checkpoint", size(plan.checkpoint_gib), stall)
    if plan.inference:
        use = plan.inference
        held = f"{size(use['weights_gib'])} in 16 bits, {size(use['kv_cache_gib'])} of cache"
        table.add_row(
            "using the model",
            f"{number(use['tokens_per_second'])} tokens/s",
            f"at best: {held}, {use['devices']:.0f} device(s); first token after {seconds(use['prefill_seconds'])}",
        )
    console.print(f"[bold]{plan.cluster}[/]")
    console.print(table)
    for warning in plan.warnings:
        console.print(f"note: {warning}", markup=False, highlight=False)
    if explain:
        lines = Table(box=None, pad_edge=False)
        for heading in ("number", "value", "formula", "source"):
            lines.add_column(heading, overflow="fold")
        for line in plan.lines:
            lines.add_row(line.name, f"{line.value:,.6g} {line.unit}".strip(), line.formula, line.source)
        console.print(lines)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().rstrip("\n")


def _range(plan: Plan, name: str, shown: Callable[[float], str]) -> str:
    low, high = plan.intervals[name]
    return f"{shown(low)} to {shown(high)}"


def _bar(share: float) -> str:
    return "█" * max(1, round(24 * share)) + (f" {share:.0%}" if share >= 0.005 else " <1%")


def _parts(parts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parts.items())
