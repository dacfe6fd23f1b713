"""`report=true`: a plan on one page that is a file by itself, in the style of a run's report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from bigtrain.config import Config, DeepSpeedConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.pages import COLOURS, INK, LARGE, MUTED, SMALL, image, page, picture
from bigtrain.plan import money, recommend, simulate, step_time, units
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.recommend import Recommendation
from bigtrain.plan.sizes import Sizes

Parts = dict[str, float]  # part -> GiB, and `peak`
Memory = Callable[[Config, Cluster, int], Parts]


@dataclass(frozen=True)
class Subject:
    """What the page is about."""

    config: Config
    cluster: Cluster
    ranks: int
    sizes: Sizes
    title: str = ""
    tokens: float | None = None
    recommendation: Recommendation | None = None
    peak_gib: tuple[float, float, float] | None = None  # of a rank: planned, least, most
    notes: tuple[str, ...] = ()  # of the plan


def write_report(subject: Subject, memory: Memory, out: Path) -> Path:
    """Write the page into the directory `out` and return its path. Raises BigtrainError if that cannot be done."""
    time = step_time.estimate(subject.config, subject.cluster, subject.ranks, subject.sizes)
    found = subject.recommendation or _searched(subject)
    pictures = {
        "memory": draw_memory(memory_by_stage(subject, memory), subject.cluster.device.memory_gib),
        "step": draw_step(time),
        "scaling": draw_scaling(subject),
        "checkpoints": draw_checkpoints(subject, time),
        "days": draw_days(subject, time),
        "timeline": draw_timeline(simulate.step(subject.config, subject.cluster, subject.ranks, subject.sizes)),
    }
    if found is not None:
        pictures["front"] = draw_front(found)
    html = render(subject, time, {name: png for name, png in pictures.items() if png is not None})
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.html").write_text(html, encoding="utf-8")
    except OSError as error:
        raise BigtrainError(f"the report cannot be written: {error}") from None
    return out / "plan.html"


def _searched(subject: Subject) -> Recommendation | None:
    try:
        return recommend.search(subject.config, subject.cluster, "time", subject.tokens or 0.0)
    except ConfigError:  # nothing fits, or the tokens are not known
        return None


# ------------------------------------------------------------------------------------------------ pictures


def memory_by_stage(subject: Subject, memory: Memory) -> dict[str, Parts]:
    """Of the same run at ZeRO stages 0 to 3: label -> parts. The planned stage is marked with a star."""
    engine = subject.config.engine
    if not isinstance(engine, DeepSpeedConfig):
        return {"*": memory(subject.config, subject.cluster, subject.ranks)}
    found = {}
    for stage in range(4):
        offload = engine if stage == engine.stage else replace(
            engine, offload_optimizer="none" if stage == 0 else engine.offload_optimizer,
            offload_parameters="none" if stage < 3 else engine.offload_parameters,
        )  # fmt: skip
        other = replace(subject.config, engine=replace(offload, stage=stage))
        try:
            found[f"stage {stage}{' *' if stage == engine.stage else ''}"] = memory(
                other, subject.cluster, subject.ranks
            )
        except ConfigError:  # what this optimizer or offload cannot do at that stage
            continue
    return found


def draw_memory(stages: dict[str, Parts], room_gib: float) -> bytes | None:
    """Stacked bars of a rank's memory at its fullest, and the line that none may cross."""
    if not stages:
        return None
    names = list(dict.fromkeys(name for parts in stages.values() for name in parts if name != "peak"))
    names = [name for name in names if any(parts.get(name, 0) > 0 for parts in stages.values())]
    unit, scale = ("GiB", 1) if max(parts.get("peak", 0.0) for parts in stages.values()) >= 1 else ("MiB", 1024)
    stages = {label: {name: scale * gib for name, gib in parts.items()} for label, parts in stages.items()}
    shown, room = units.size(room_gib), scale * room_gib

    def draw(axes: Any) -> None:
        labels = list(stages)
        left = [0.0] * len(labels)
        for index, name in enumerate(names):
            widths = [max(0.0, stages[label].get(name, 0.0)) for label in labels]
            colour = COLOURS[index % len(COLOURS)]
            hatch = "//" if index >= len(COLOURS) else None
            axes.barh(labels, widths, left=left, color=colour, hatch=hatch, height=0.62, label=name.replace("_", " "))
            left = [before + width for before, width in zip(left, widths, strict=True)]
        peaks = [stages[label].get("peak", total) for label, total in zip(labels, left, strict=True)]
        far = max([*left, *peaks, room if room < 5 * max(peaks) else 0])  # a small model's bars are to be seen
        for place, (total, peak) in enumerate(zip(left, peaks, strict=True)):
            too_much = peak > room
            text = units.size(peak / scale) + ("  does not fit" if too_much else "")
            axes.text(
                max(total, peak) + far * 0.012, place, text, va="center", fontsize=9.5,
                color=COLOURS[1] if too_much else INK, fontweight="bold" if "*" in labels[place] else "normal",
            )  # fmt: skip
        if room <= far:
            axes.axvline(room, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(
                shown, (room, 1), xycoords=("data", "axes fraction"), xytext=(4, 2),
                textcoords="offset points", fontsize=9, color=INK, va="bottom",
            )  # fmt: skip
        axes.invert_yaxis()
        axes.set_xlim(0, far * 1.2)
        axes.set_xlabel(f"{unit} of the fullest rank" + ("" if room <= far else f", which has {shown}"))
        axes.grid(visible=False, axis="y")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize=9, labelcolor=INK)

    return picture("Memory by ZeRO stage", LARGE, draw)


def draw_step(time: step_time.StepTime) -> bytes:
    """What a step's seconds go to."""

    def draw(axes: Any) -> None:
        names = [name for name, seconds in time.parts.items() if seconds > 0]
        unit, per_unit = _axis(max(time.parts.values()))
        seconds = [time.parts[name] / per_unit for name in names]
        axes.barh(names, seconds, color=[COLOURS[index % len(COLOURS)] for index in range(len(names))], height=0.62)
        for place, value in enumerate(seconds):
            axes.text(
                value + max(seconds) * 0.015, place,
                f"{_short(value * per_unit)}  {value * per_unit / time.seconds:.0%}",
                va="center", fontsize=9, color=INK,
            )  # fmt: skip
        axes.invert_yaxis()
        axes.set_xlim(0, max(seconds) * 1.35)
        axes.set_xlabel(f"{unit} of a step: {_short(time.seconds)} ({_short(time.low)} to {_short(time.high)})")
        axes.grid(visible=False, axis="y")

    return picture("Where a step's time goes", SMALL, draw)


def draw_scaling(subject: Subject) -> bytes | None:
    """Tokens per second over devices at constant work for each, simulated, beside perfect scaling."""
    counts = simulate.counts(subject.cluster, subject.ranks)
    if len(counts) < 2 or subject.config.train.global_batch < subject.ranks:
        return None

    def draw(axes: Any) -> None:
        for jitter, colour, label in ((0.0, COLOURS[0], "all ranks alike"), (0.05, COLOURS[1], "ranks differ by 5%")):
            found = simulate.scaling(
                subject.config, subject.cluster, subject.ranks, subject.sizes, counts, jitter=jitter
            )
            axes.plot(
                [ranks for ranks, _, _ in found], [speed for _, speed, _ in found], color=colour, marker="o",
                markersize=4.5, linewidth=1.7, label=label,
            )  # fmt: skip
            if jitter == 0:
                first = found[0]
                axes.plot(
                    counts, [first[1] / first[0] * size for size in counts], color=MUTED, linewidth=1, linestyle=":",
                    label="linear",
                )  # fmt: skip
        axes.axvline(subject.ranks, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k" if value > 9999 else f"{value:,.0f}")
        axes.set_xlabel("devices, the same work for each")
        axes.set_ylabel("tokens per second")
        axes.legend(fontsize=9, labelcolor=INK)

    return picture("Scaling", SMALL, draw)


def draw_checkpoints(subject: Subject, time: step_time.StepTime) -> bytes:
    """Goodput over the time between checkpoints, with the failures of so many devices."""
    saved = _checkpoint(subject)
    curve = list(
        simulate.intervals(subject.ranks, time.seconds, saved.stall_seconds, write_seconds=saved.write_seconds)
    )
    best = max(curve, key=lambda point: point[1])
    told = f"best: {best[0] / 60:,.3g}" if best[1] else "none gets ahead"

    def draw(axes: Any) -> None:
        axes.plot([x / 60 for x, _ in curve], [100 * y for _, y in curve], color=COLOURS[2], marker="o", linewidth=1.7)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.3g}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_xlabel(f"minutes between checkpoints ({told})")
        axes.set_ylabel("% of the time that counts")

    return picture("Time between checkpoints", SMALL, draw)


def _checkpoint(subject: Subject) -> money.CheckpointCost:
    return money.checkpoint(subject.config, subject.cluster, subject.ranks, subject.sizes)


def draw_days(subject: Subject, time: step_time.StepTime) -> bytes | None:
    """The run until its tenth failure, saved as train.save_every says, or as often as is best where that says nothing;
    None where it never gets ahead."""
    if not subject.tokens:
        return None
    saved, every = _checkpoint(subject), subject.config.train.save_every
    hours = money.hours_for(subject.tokens, time.tokens_per_second)
    enough = 1000 * simulate.FAILURE_YEARS * simulate.YEAR / subject.ranks / 3600  # in the longest of runs
    try:
        run = simulate.goodput(
            min(hours, enough), subject.ranks, time.seconds, saved.stall_seconds,
            interval_seconds=every * time.seconds or None, write_seconds=saved.write_seconds,
        )  # fmt: skip
    except ConfigError:
        return None
    restarts = [index for index, each in enumerate(run.periods) if each.kind == "restart"]
    periods = run.periods[: restarts[9] + 1] if len(restarts) > 9 else run.periods
    unit, per_unit = units.axis_of_hours(periods[-1].end)
    colours = {"work": COLOURS[0], "save": COLOURS[2], "lost": COLOURS[1], "restart": COLOURS[3]}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in colours}
    every_nth = max(1, sum(each.saves for each in periods) // 1500)  # no more than there are pixels
    for each in periods:
        spans[each.kind].append((each.start / per_unit, (each.end - each.start) / per_unit))
        for save in range(every_nth, each.saves + 1, every_nth):
            end = each.start + save * (each.end - each.start) / each.saves
            stall = saved.stall_seconds / 3600
            spans["save"].append(((end - stall) / per_unit, stall / per_unit))

    def draw(axes: Any) -> None:
        for lane, (name, colour) in enumerate(colours.items()):
            edge = 0.0 if name == "work" else min(0.5, 100 / (1 + len(spans[name])))  # shorter than a pixel, still seen
            axes.broken_barh(spans[name], (lane - 0.36, 0.72), color=colour, linewidth=edge)
        axes.set_yticks(range(len(colours)), ["steps", "save", "steps lost", "restart"])
        axes.set_ylim(len(colours) - 0.5, -0.5)
        axes.set_xlim(0, periods[-1].end / per_unit)
        shown = "to the tenth failure" if len(restarts) > 9 else f"the whole run, {run.failures:,} failures"
        axes.set_xlabel(
            f"{unit}: {shown}; a checkpoint every {units.seconds(run.interval_seconds)}; "
            f"{units.percent(run.fraction)} of the run's time counts"
        )
        axes.grid(visible=False, axis="y")

    return picture("Days of the run", (LARGE[0], 3.1), draw)


def draw_front(recommendation: Recommendation) -> bytes:
    """Hours against cost of everything on the Pareto front; the recommended one is marked."""

    def draw(axes: Any) -> None:
        free = not any(each.bill.cost for each in recommendation.front)

        front = recommendation.front
        unit, per_unit = units.axis_of_hours(max(each.bill.hours for each in front))
        device_unit, per_device_unit = units.axis_of_hours(max(each.bill.device_hours for each in front))
        cents = not free and max(each.bill.cost for each in front) < 1

        def paid(bill: money.Bill) -> float:
            return bill.device_hours / per_device_unit if free else bill.cost * (100 if cents else 1)

        sizes = [18 + 90 * each.peak_gib / each.cluster.device.memory_gib for each in front]
        stages = [getattr(each.config.engine, "stage", 0) for each in front]
        for stage in sorted(set(stages)):
            chosen = [index for index, found in enumerate(stages) if found == stage]
            axes.scatter(
                [front[index].bill.hours / per_unit for index in chosen], [paid(front[index].bill) for index in chosen],
                s=[sizes[index] for index in chosen], color=COLOURS[stage], alpha=0.75, label=f"stage {stage}",
                edgecolors="white", linewidths=0.7,
            )  # fmt: skip
        best = recommendation.best
        place = (best.bill.hours / per_unit, paid(best.bill))
        axes.scatter([place[0]], [paid(best.bill)], s=260, facecolors="none", edgecolors=INK, linewidths=1.6)
        axes.annotate(
            best.short, place, xytext=(14, -18), textcoords="offset points", fontsize=9,
            color=INK, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}, zorder=5,
        )  # fmt: skip
        axes.set_xscale("log")
        spread = [each.bill.hours for each in front]
        few = max(spread) < 5 * min(spread)  # then none of the powers of ten may be among them
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,.3g}" if few else "")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.set_xlabel(f"{unit} (a larger dot takes more memory)")
        axes.set_ylabel(f"{device_unit} of devices" if free else "US cents" if cents else "US dollars")
        axes.margins(0.12)
        axes.legend(fontsize=9, labelcolor=INK)

    return picture("What cannot be beaten in time, money and memory at once", LARGE, draw)


def draw_timeline(timeline: simulate.Timeline) -> bytes:
    """The last micro-batch of a step on one rank: its computing stream above, its network stream below."""
    events = _last_micro_batch(timeline.events)
    unit, per_unit = _axis(max((event.end for event in events), default=1.0))
    colours = {"forward": COLOURS[0], "backward": COLOURS[1], "gather": COLOURS[2], "reduce": COLOURS[3],
               "optimizer": COLOURS[4]}  # fmt: skip

    def kind(name: str) -> str:
        return name.split()[0]

    def draw(axes: Any) -> None:
        lanes = {simulate.COMPUTE: 1.0, simulate.NETWORK: 0.0}
        seen: set[str] = set()
        for event in events:
            name = kind(event.name)
            axes.barh(
                lanes[event.stream], (event.end - event.start) / per_unit, left=event.start / per_unit, height=0.72,
                edgecolor="white",
                linewidth=0.4, color=colours.get(name, MUTED), label=None if name in seen else name,
            )  # fmt: skip
            seen.add(name)
        shown = {event.stream for event in events}
        axes.set_yticks([lanes[stream] for stream in lanes if stream in shown], [s for s in lanes if s in shown])
        axes.set_xlabel(
            f"{unit}; the whole step is {_short(timeline.seconds)}, "
            f"{_short(timeline.exposed)} of it waiting for the network"
        )
        axes.grid(visible=False, axis="y")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=5, fontsize=9, labelcolor=INK)

    return picture("Timeline of one rank", (LARGE[0], 3.1), draw)


def _last_micro_batch(events: list[simulate.Event]) -> list[simulate.Event]:
    start = max((event.start for event in events if event.name == "forward 0"), default=0.0)
    return sorted((event for event in events if event.end > start), key=lambda event: event.start)


def _axis(seconds: float) -> tuple[str, float]:
    """(unit of an axis that ends at so many seconds, seconds in one of it)."""
    return ("seconds", 1.0) if seconds >= 0.5 else ("milliseconds", 1e-3)


_short = units.seconds


# ---------------------------------------------------------------------------------------------------- page

LARGE_ONES = ("memory", "front", "timeline", "days")


def render(subject: Subject, time: step_time.StepTime, pictures: dict[str, bytes]) -> str:
    title = subject.title or "Plan"
    about = (
        f"{subject.sizes.total:,} parameters on {subject.ranks} x {subject.cluster.device.name} "
        f"({subject.cluster.name}), {subject.config.train.precision}"
    )
    shorter, longer = time.low / time.seconds, time.high / time.seconds
    rate = time.tokens_per_second
    cards = [
        ("Step", _short(time.seconds), f"{_short(time.low)} to {_short(time.high)}"),
        ("Tokens per second", units.number(rate), f"{units.number(rate / longer)} to {units.number(rate / shorter)}"),
        ("MFU", units.percent(time.mfu), f"HFU {units.percent(time.hfu)}"),
    ]
    if subject.peak_gib:
        middle, low, high = map(units.size, subject.peak_gib)
        cards.append(
            ("Memory of a rank", middle, f"{low} to {high}, of {units.size(subject.cluster.device.memory_gib)}")
        )
    if subject.tokens:
        hours = money.hours_for(subject.tokens, time.tokens_per_second)
        bill = money.bill(hours, subject.ranks, subject.cluster)

        def to(shown: Callable[[float], str], value: float) -> str:
            return f"{shown(value * shorter)} to {shown(value * longer)}"

        priced = f"{to(units.dollars, bill.cost)}, " if bill.cost else "the cluster has no price, "
        steps = f"{to(units.hours, hours)}, all steps of {units.number(subject.tokens)} tokens"
        cards += [
            ("Time", units.hours(hours), steps),
            ("Cost", units.dollars(bill.cost), f"{priced}{units.hours(bill.device_hours)} of devices"),
            (
                "Energy", units.energy(bill.energy_kwh),
                f"{to(units.energy, bill.energy_kwh)}, {units.mass(bill.kg_co2)} CO2",
            ),
        ]  # fmt: skip
    boxes = "".join(
        f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for name, value, note in cards
    )
    body = [f'<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header><div class="cards">{boxes}</div>']
    if subject.recommendation is not None:
        body.append(_recommended(subject.recommendation))
    if "memory" in pictures:
        body.append(image("memory", pictures["memory"], "memory"))
    small = "".join(image(name, png, name) for name, png in pictures.items() if name not in LARGE_ONES)
    body.append(f'<div class="grid">{small}</div><p></p>')
    body += [image(name, pictures[name], name) for name in LARGE_ONES[1:] if name in pictures]
    notes = list(dict.fromkeys([*time.notes, *subject.notes]))
    if notes:
        body.append("<h2>How sure</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return page(title, "".join(body))


def _recommended(found: Recommendation) -> str:
    rows = [
        (f"Best for {found.goal}", found.best.short),
        ("What binds", found.binds),
        ("Next", found.next_change),
        ("Override", found.best.line),
        ("Also", found.best.to_add),
    ]
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows if text
    )
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div><p></p>'
