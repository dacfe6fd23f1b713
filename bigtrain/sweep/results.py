"""What came out of a sweep: a table on the terminal, a page with pictures, and the best config as a recipe.

Made from the trials' records alone. SWEEP/report/index.html is the page, SWEEP/experiment/best.yaml the recipe:
`bigtrain train --config-dir SWEEP experiment=best`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain import pages
from bigtrain.errors import ConfigError
from bigtrain.files import write_atomic
from bigtrain.hooks.console import count, duration
from bigtrain.launch.run_dir import readable_errors
from bigtrain.sweep import trials
from bigtrain.sweep.trials import Trial, key_of

LEFT_OUT = (
    "run_dir",
    "resume",
    "resume_allow",
    "data.cache_dir",
    "logger",
    "hydra",
)  # of the recipe: not what, but where


def show(sweep: Path, command: str, say: Callable[[str], None]) -> bool:
    """Print the table, write page and recipe. Whether all the trials of this command are finished or pruned."""
    every = trials.read(sweep)
    mine = [trial for trial in every if trial.command == command]
    if not mine:
        return True
    finished = sum(trial.status == "finished" for trial in mine)
    pruned = sum(trial.status == "pruned" for trial in mine)
    say(f"sweep: {finished} of {len(mine)} jobs finished" + (f", {pruned} pruned" if pruned else ""))
    for line in table(every):
        say(line)
    front = best(every)
    if front:
        recipe, page = write(sweep, every, front)
        found = ", ".join(f"{_shown(name)} {_value(name, value)}" for name, value in front[0].objectives.items())
        way = f"; to train it: bigtrain train --config-dir {sweep} experiment=best" if recipe else ""
        say(f"best: trial {front[0].number} ({found}){way}")
        say(f"report: {page}")
    return all(trial.status in ("finished", "pruned") for trial in mine)


def table(every: Sequence[Trial]) -> list[str]:
    """Aligned lines, a header first: number, what is varied, steps, time, objectives or what went wrong."""
    keys, names = _keys(every), _names(every)
    rows = [["trial", *keys, "steps", "time", *(map(_shown, names) if names else ["result"])]]
    for trial in every:
        cells = [
            str(trial.number), *(trial.varied.get(key, "-") for key in keys), _text(trial.steps),
            "-" if trial.seconds is None else duration(trial.seconds), *_outcome(trial, names),
        ]  # fmt: skip
        rows.append(cells + [""] * (len(rows[0]) - len(cells)))
    # What went wrong stands in the columns of the objectives and does not widen them.
    plain = [[*row[: len(keys) + 3], *(row[len(keys) + 3 :] if row[-1] else [])] for row in rows]
    wide = [max(len(row[at]) for row in plain if at < len(row)) for at in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(wide[at]) for at, cell in enumerate(row)).rstrip() for row in rows]


def best(every: Sequence[Trial]) -> list[Trial]:
    """Of the finished trials those that no other is better than in all objectives (the Pareto front), the best by the
    first objective first: with one objective, the best."""
    judged = [
        trial for trial in every
        if trial.status == "finished" and trial.objectives
        and all(value is not None and math.isfinite(value) for value in trial.objectives.values())
    ]  # fmt: skip
    names = list(judged[-1].objectives) if judged else []
    judged = [trial for trial in judged if list(trial.objectives) == names]  # of an earlier command, by other names
    front = [trial for trial in judged if not any(_dominates(other, trial) for other in judged)]
    return sorted(front, key=lambda trial: tuple(_numbers(trial)))


def _numbers(trial: Trial) -> list[float]:
    return [math.inf if value is None else value for value in trial.objectives.values()]


def _dominates(one: Trial, other: Trial) -> bool:
    pairs = list(zip(_numbers(one), _numbers(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def write(sweep: Path, every: Sequence[Trial], front: Sequence[Trial]) -> tuple[Path | None, Path]:
    """Write recipe and page; where they are. No recipe if a file cannot say what was typed."""
    pictures = draw(every, front)
    directory, recipe = sweep / "report", sweep / "experiment" / "best.yaml"
    with readable_errors(sweep):
        directory.mkdir(exist_ok=True)
        recipe.parent.mkdir(exist_ok=True)
        for name, png in pictures.items():
            (directory / f"{name}.png").write_bytes(png)
        write_atomic(directory / "index.html", render(sweep, every, front, pictures))
        try:
            write_atomic(recipe, experiment(sweep, front[0]))
        except ConfigError:
            recipe.unlink(missing_ok=True)
            return None, directory / "index.html"
    return recipe, directory / "index.html"


def experiment(sweep: Path, trial: Trial) -> str:
    """The trial as an experiment's file. Raises ConfigError if one cannot say what was typed."""
    from bigtrain import compose

    kept = [text for text in trial.overrides if not key_of(text).startswith(LEFT_OUT)]
    secret = [key_of(text) for text in kept if "***" in text]
    body = compose.experiment([text for text in kept if key_of(text) not in secret])
    found = ", ".join(f"{_shown(name)} {_value(name, value)}" for name, value in trial.objectives.items())
    lines = ["# @package _global_", f"# Trial {trial.number} of {sweep.name}: {found}."]
    lines += [f"# {key} held a secret: it is not here." for key in secret]
    return "\n".join(lines) + "\n" + body


# ------------------------------------------------------------------------------------------------ words


def _keys(every: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(key for trial in every for key in trial.varied))


def _names(every: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(name for trial in every for name in trial.objectives))


def _shown(name: str) -> str:
    return name.lstrip("-")


def _value(name: str, value: float | None) -> str:
    return "-" if value is None else f"{-value if name.startswith('-') else value:.6g}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _outcome(trial: Trial, names: list[str]) -> list[str]:
    if trial.status != "finished":
        return [f"{trial.status}: {trial.problem}" if trial.problem else trial.status]
    return [_value(name, trial.objectives.get(name)) for name in names] or [trial.status]


# --------------------------------------------------------------------------------------------- pictures


def draw(every: Sequence[Trial], front: Sequence[Trial]) -> dict[str, bytes]:
    """PNGs by name: the parameters against the first objective, and of several objectives the first two."""
    names = list(front[0].objectives)
    judged = [trial for trial in every if trial.status == "finished" and list(trial.objectives) == names]
    judged = [trial for trial in judged if all(map(math.isfinite, _numbers(trial)))]
    keys = [key for key in _keys(judged) if len({trial.varied.get(key) for trial in judged}) > 1]
    pictures = {}
    if len(keys) >= 2:
        pictures["parallel"] = _parallel(judged, keys, names[0], front[0])
    elif keys:
        pictures["scatter"] = _scatter(judged, keys[0], names[0], front[0])
    if len(names) > 1:
        pictures["tradeoff"] = _tradeoff(judged, names, front)
    return pictures


def _objective(trial: Trial, name: str) -> float:
    value = trial.objectives[name]
    return math.nan if value is None else -value if name.startswith("-") else value


class _Scale:
    """Places the values of a parameter on [0, 1]: numbers by size (in the logarithm where they span it), else names."""

    def __init__(self, values: list[str]) -> None:
        self.ticks: list[tuple[float, str]]
        try:
            numbers = [float(value) for value in values]
            if not all(map(math.isfinite, numbers)):
                raise ValueError
        except ValueError:
            order = sorted(set(values))
            self.place = {value: (order.index(value) + 0.5) / len(order) for value in values}
            self.ticks = [(self.place[value], value) for value in order]
            return
        log = min(numbers) > 0 and max(numbers) / min(numbers) >= 20
        sizes = [math.log(number) if log else number for number in numbers]
        low, span = min(sizes), (max(sizes) - min(sizes)) or 1.0
        self.place = {value: (size - low) / span for value, size in zip(values, sizes, strict=True)}
        marks = np.linspace(low, low + span, 5)
        distinct = sorted(set(numbers))
        if len(distinct) <= 5:
            self.ticks = [((size - low) / span, f"{number:.3g}") for size, number in
                          sorted(set(zip(sizes, numbers, strict=True)))]  # fmt: skip
        else:
            self.ticks = [((mark - low) / span, f"{math.exp(mark) if log else mark:.3g}") for mark in marks]


def _parallel(judged: Sequence[Trial], keys: list[str], name: str, winner: Trial) -> bytes:
    """An axis for each parameter and the objective, a line for each trial, the better the darker; the best one red."""
    columns = [[trial.varied.get(key, "-") for trial in judged] for key in keys]
    columns.append([f"{_objective(trial, name):.8g}" for trial in judged])
    scales = [_Scale(column) for column in columns]
    ranks = np.argsort(np.argsort([_numbers(trial)[0] for trial in judged])) / max(1, len(judged) - 1)

    def lines(axes: Any) -> None:
        from matplotlib import colormaps

        for at, trial in enumerate(judged):
            heights = [scale.place[column[at]] for scale, column in zip(scales, columns, strict=True)]
            best_one = trial is winner
            axes.plot(
                range(len(heights)), heights, color=pages.COLOURS[1] if best_one else colormaps["viridis"](ranks[at]),
                linewidth=2.6 if best_one else 1.3, alpha=1.0 if best_one else 0.75, zorder=5 if best_one else 3,
            )  # fmt: skip
        for at, scale in enumerate(scales):
            axes.axvline(at, color="#cbd2d9", linewidth=1, zorder=1)
            for height, text in scale.ticks:
                axes.annotate(text, (at, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
        axes.set_xticks(range(len(scales)), [*keys, _shown(name)])
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(scales) - 0.6)
        axes.grid(visible=False)

    return pages.picture(f"{len(judged)} trials, the best in red", pages.LARGE, lines)


def _scatter(judged: Sequence[Trial], key: str, name: str, winner: Trial) -> bytes:
    values = [trial.varied.get(key, "-") for trial in judged]
    scale = _Scale(values)

    def points(axes: Any) -> None:
        for trial, value in zip(judged, values, strict=True):
            colour = pages.COLOURS[1] if trial is winner else pages.COLOURS[0]
            axes.plot([scale.place[value]], [_objective(trial, name)], "o", color=colour)
        axes.set_xticks(*map(list, zip(*scale.ticks, strict=True)))
        axes.set_xlabel(key)
        axes.set_ylabel(_shown(name))

    return pages.picture(f"{_shown(name)} over {key}", pages.LARGE, points)


def _tradeoff(judged: Sequence[Trial], names: list[str], front: Sequence[Trial]) -> bytes:
    def points(axes: Any) -> None:
        for trial in judged:
            colour = pages.COLOURS[1] if trial in front else pages.MUTED
            place = (_objective(trial, names[1]), _objective(trial, names[0]))
            axes.plot(*place, "o", color=colour)
            axes.annotate(str(trial.number), place, xytext=(5, 3), textcoords="offset points", fontsize=8)
        edge = sorted((_objective(trial, names[1]), _objective(trial, names[0])) for trial in front)
        axes.plot(*zip(*edge, strict=True), color=pages.COLOURS[1], linewidth=1.2)
        axes.set_xlabel(_shown(names[1]))
        axes.set_ylabel(_shown(names[0]))

    return pages.picture("What no other trial is better than in both", pages.LARGE, points)


def render(sweep: Path, every: Sequence[Trial], front: Sequence[Trial], pictures: dict[str, bytes]) -> str:
    keys, names = _keys(every), _names(every)
    head = ["trial", *keys, "parameters", "steps", "time", *map(_shown, names), "status"]
    rows = []
    for trial in every:
        cells = [
            *(trial.varied.get(key, "-") for key in keys),
            "-" if trial.parameters is None else count(trial.parameters), _text(trial.steps),
            "-" if trial.seconds is None else duration(trial.seconds),
            *(_value(name, trial.objectives.get(name)) for name in names),
            f"{trial.status}: {trial.problem}" if trial.problem else trial.status,
        ]  # fmt: skip
        bold = trial in front
        rows.append([str(trial.number), *(f"<b>{escape(cell)}</b>" if bold else escape(cell) for cell in cells)])
    counts = {status: sum(trial.status == status for trial in every) for status in ("finished", "pruned", "failed")}
    about = " · ".join(f"{number} {status}" for status, number in counts.items() if number)
    return pages.page(
        sweep.name,
        f"<header><h1>{escape(sweep.resolve().name)}</h1><p>{escape(about)}</p></header>"
        + "".join(pages.image(name, png, f"{name} of the trials") for name, png in pictures.items())
        + f"<h2>Trials</h2>{pages.table([escape(cell) for cell in head], rows)}",
    )
