"""How the loss falls with size and data: loss = E + A / N^a + B / D^b, fitted to the runs of a ladder.

The fit is approach 3 of Hoffmann et al. (arXiv 2203.15556, section 3.3 and appendix D.3): L-BFGS from a grid of starts
on the Huber loss of the logarithms, log A, log B and log E being what is searched for. Intervals are bootstrapped over
the runs. N is the number of parameters, D of tokens trained on, the loss that of the held-out text in nats per token.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain import pages, report
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import write_atomic
from bigtrain.hooks.console import count
from bigtrain.launch.run_dir import read_result
from bigtrain.law import Law

HUBER = 1e-3  # the paper's delta
STARTS = tuple(itertools.product((0, 5, 10, 15, 20), (0, 5, 10, 15, 20), (-1, 0, 1), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)))
TRIED = 20  # of the starts, the best ones, are searched from
BOOTSTRAPS = 100
INTERVAL = (5.0, 95.0)  # percentiles
LEAST_POINTS, LEAST_SIZES, LEAST_RATIOS = 6, 3, 2
NEXT = 2.0  # the next size has so many times the parameters of the largest
BOUNDS = ((-10, 60), (-10, 60), (-10, 5), (0.01, 3), (0.01, 3))


@dataclass(frozen=True)
class Point:
    """A run of a ladder."""

    parameters: float
    tokens: float
    loss: float
    name: str = ""

    @property
    def ratio(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Fit:
    law: Law
    resampled: list[Law]  # bootstraps

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """Of a predicted loss."""
        return _percentiles([law.loss(parameters, tokens) for law in self.resampled] or [math.nan])

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {
            name: _percentiles([getattr(law, name) for law in self.resampled] or [math.nan])
            for name in ("E", "A", "a", "B", "b")
        }


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(np.asarray(values, dtype=float), INTERVAL)
    return float(low), float(high)


def fit(points: Sequence[Point], bootstraps: int = BOOTSTRAPS, seed: int = 0) -> Fit:
    """Raises BigtrainError for points that cannot tell the five constants apart."""
    sizes = {round(math.log(point.parameters), 2) for point in points}
    ratios = {round(math.log(point.ratio), 1) for point in points}
    if len(points) < LEAST_POINTS or len(sizes) < LEAST_SIZES or len(ratios) < LEAST_RATIOS:
        raise BigtrainError(
            f"a scaling law needs {LEAST_POINTS} runs of {LEAST_SIZES} sizes at {LEAST_RATIOS} ratios of tokens to"
            f" parameters; these are {len(points)} of {len(sizes)} at {len(ratios)}"
        )
    n, d, loss = (
        np.log([getattr(point, name) for point in points]) for name in ("parameters", "tokens", "loss")
    )  # fmt: skip
    starts = sorted(STARTS, key=lambda start: _huber(np.array(start, dtype=float), n, d, loss)[0])[:TRIED]
    found = sorted((_search(start, n, d, loss) for start in starts), key=lambda pair: pair[0])
    best = found[0][1]
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(bootstraps):
        chosen = generator.integers(len(points), size=len(points))
        if len(set(n[chosen].round(2))) < LEAST_SIZES - 1:
            continue  # says nothing of sizes
        resampled.append(_law(_search(best, n[chosen], d[chosen], loss[chosen], iterations=200)[1]))
    return Fit(_law(best), resampled)


def _search(
    start: Any, n: np.ndarray, d: np.ndarray, loss: np.ndarray, iterations: int = 1000
) -> tuple[float, np.ndarray]:
    from scipy.optimize import minimize

    found = minimize(
        _huber, np.array(start, dtype=float), (n, d, loss), "L-BFGS-B", jac=True, bounds=BOUNDS,
        options={"maxiter": iterations, "ftol": 1e-12, "gtol": 1e-9},
    )  # fmt: skip
    return float(found.fun), found.x


def _huber(x: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean Huber loss of log(predicted) - log(measured), in units of its delta, and its gradient (5,)."""
    log_a, log_b, log_e, a, b = x
    terms = np.stack([log_a - a * n, log_b - b * d, np.full_like(n, log_e)])  # (3, points)
    top = terms.max(axis=0)
    total = np.exp(terms - top).sum(axis=0)
    residual = (top + np.log(total) - loss) / HUBER
    inside = np.abs(residual) <= 1
    value = np.where(inside, residual**2 / 2, np.abs(residual) - 0.5).mean()
    slope = np.where(inside, residual, np.sign(residual)) / HUBER / len(n)
    weight = np.exp(terms - top) / total * slope  # (3, points)
    gradient = np.array(
        [weight[0].sum(), weight[1].sum(), weight[2].sum(), -(weight[0] * n).sum(), -(weight[1] * d).sum()]
    )
    return float(value), gradient


def _law(x: np.ndarray) -> Law:
    log_a, log_b, log_e, a, b = map(float, x)
    return Law(math.exp(log_e), math.exp(log_a), a, math.exp(log_b), b)


# --------------------------------------------------------------------------------------------- a ladder


@dataclass(frozen=True)
class Prediction:
    parameters: float
    tokens: float
    predicted: float
    interval: tuple[float, float]
    measured: float | None = None

    @property
    def error(self) -> float | None:
        """Relative: (predicted - measured) / measured."""
        return None if self.measured is None else (self.predicted - self.measured) / self.measured


@dataclass(frozen=True)
class Ladder:
    points: list[Point]
    fit: Fit  # of all points
    checks: list[Prediction]  # of the largest size, by a fit that has not seen it
    next: list[Prediction]  # of a size that nobody has trained, at the ratios of the ladder


def climb(points: Sequence[Point], bootstraps: int = BOOTSTRAPS) -> Ladder:
    """Fit, check, predict. Raises BigtrainError where there are too few points even without the largest size."""
    points = sorted(points, key=lambda point: (point.parameters, point.tokens))
    largest = points[-1].parameters if points else 0.0
    seen = [point for point in points if point.parameters < 0.95 * largest]
    blind = fit(seen, bootstraps)
    checks = [
        Prediction(point.parameters, point.tokens, blind.law.loss(point.parameters, point.tokens),
                   blind.interval(point.parameters, point.tokens), point.loss)
        for point in points if point not in seen
    ]  # fmt: skip
    whole = fit(points, bootstraps)
    ahead = [(NEXT * point.parameters, NEXT * point.parameters * point.ratio) for point in points if point not in seen]
    coming = [Prediction(n, d, whole.law.loss(n, d), whole.interval(n, d)) for n, d in ahead]
    return Ladder(points, whole, checks, coming)


def load(paths: Sequence[Path]) -> list[Point]:
    """The finished runs among `paths`, which may be sweeps. Raises ConfigError for runs that cannot be compared."""
    runs = [run for path in paths for run in ([path] if (path / "result.json").is_file() else _trials(path))]
    points: list[Point] = []
    data: dict[Path, str] = {}
    for run in dict.fromkeys(runs):
        result = read_result(run) or {}
        values = [result.get(key) for key in ("model/parameters", "data/tokens", "eval/loss")]
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        if result.get("status") != "finished" or len(numbers) < len(values):
            continue
        points.append(Point(numbers[0], numbers[1], numbers[2], run.name))
        settings = report.read_config(run)
        data[run] = Path(str(settings.get("data.prepared_dir"))).name  # named by corpus and tokenizer
    if len(set(data.values())) > 1:
        one, other = (next(run for run in data if data[run] == name) for name in sorted(set(data.values()))[:2])
        raise ConfigError("RUNS", str(other), f"other data or another tokenizer than {one}: losses cannot be compared")
    if not points:
        raise ConfigError("RUNS", " ".join(map(str, paths)), "no finished language model among them")
    return points


def _trials(sweep: Path) -> list[Path]:
    return sorted((path for path in sweep.iterdir() if (path / "result.json").is_file()), key=lambda path: path.name)


def write(paths: Sequence[Path], out: Path | None = None, bootstraps: int = BOOTSTRAPS) -> tuple[Path, Ladder]:
    """Fit the runs; write index.html, ladder.png and ladder.json into `out` (by default PATH/ladder of one path, else
    ./ladder). Where the page is, and what it shows. Raises ConfigError, BigtrainError."""
    ladder = climb(load(paths), bootstraps)
    directory = out or (paths[0] / "ladder" if len(paths) == 1 else Path("ladder"))
    png = draw(ladder)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "ladder.png").write_bytes(png)
        write_atomic(directory / "ladder.json", json.dumps(as_json(ladder), indent=1) + "\n")
        write_atomic(directory / "index.html", render(ladder, png))
    except OSError as error:
        raise BigtrainError(f"the ladder cannot be written: {error}") from None
    return directory / "index.html", ladder


def as_json(ladder: Ladder) -> dict[str, Any]:
    """What planning reads: the constants first. Losses are in nats per token."""

    def written(prediction: Prediction) -> dict[str, Any]:
        return asdict(prediction) | {"error": prediction.error}

    return {
        **asdict(ladder.fit.law),
        "form": "loss = E + A / parameters^a + B / tokens^b",
        "intervals": ladder.fit.intervals(),
        "interval_percentiles": INTERVAL,
        "held_out": [written(check) for check in ladder.checks],
        "next": [written(prediction) for prediction in ladder.next],
        "points": [asdict(point) for point in ladder.points],
    }


def lines(ladder: Ladder) -> list[str]:
    """For the terminal."""
    law, intervals = ladder.fit.law, ladder.fit.intervals()
    found = [
        f"loss = {law.E:.4g} + {law.A:.4g} / N^{law.a:.3f} + {law.B:.4g} / D^{law.b:.3f}, of {len(ladder.points)} runs"
    ]
    found.append("  " + ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in intervals.items()))
    if math.log(law.E) < BOUNDS[2][0] + 0.01:
        found.append("  E is at the end of its search: runs as small as these do not show where the loss would stay")
    for check in ladder.checks:
        assert check.error is not None
        assert check.measured is not None
        found.append(
            f"held out: {count(check.parameters)} parameters, {count(check.tokens)} tokens: predicted"
            f" {check.predicted:.4f} ({check.interval[0]:.4f} to {check.interval[1]:.4f}), measured"
            f" {check.measured:.4f}: {100 * check.error:+.2f}%"
        )
    for ahead in ladder.next:
        found.append(
            f"next: {count(ahead.parameters)} parameters, {count(ahead.tokens)} tokens: {ahead.predicted:.4f}"
            f" ({ahead.interval[0]:.4f} to {ahead.interval[1]:.4f})"
        )
    return found


def draw(ladder: Ladder) -> bytes:
    """Loss over parameters, a line for each ratio of tokens to parameters; the largest size as it was predicted too."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    groups = by_ratio(ladder.points)
    sizes = np.array(sorted({point.parameters for point in ladder.points}))
    grid = np.geomspace(sizes.min(), NEXT * sizes.max(), 80)

    def lines(axes: Any) -> None:
        for at, (ratio, mine) in enumerate(groups):
            colour = pages.COLOURS[at % len(pages.COLOURS)]
            axes.plot([point.parameters for point in mine], [point.loss for point in mine], "o", color=colour,
                      label=f"{ratio:g} tokens per parameter")  # fmt: skip
            axes.plot(grid, [ladder.fit.law.loss(n, n * ratio) for n in grid], color=colour, linewidth=1.4)
        for prediction, mark in [*((check, "x") for check in ladder.checks), *((one, "*") for one in ladder.next)]:
            low, high = prediction.interval
            axes.plot([prediction.parameters] * 2, [low, high], color=pages.MUTED, linewidth=1)
            axes.plot([prediction.parameters], [prediction.predicted], mark, color=pages.INK, markersize=8, zorder=5)
        axes.plot([], [], "x", color=pages.INK, label="predicted without this size")
        axes.plot([], [], "*", color=pages.INK, label="predicted, not trained")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [count(size) for size in sizes])
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel("parameters")
        axes.set_ylabel("held-out loss, nats per token")
        axes.legend(fontsize=9, labelcolor=pages.INK)

    return pages.picture("Scaling ladder", pages.LARGE, lines)


def by_ratio(points: Sequence[Point]) -> list[tuple[float, list[Point]]]:
    """(tokens per parameter, its points), the lowest first. Steps are whole numbers: what is within 5% is one ratio."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.ratio):
        if groups and point.ratio < 1.05 * groups[-1][0].ratio:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [
        (float(f"{np.median([point.ratio for point in group]):.2g}"), sorted(group, key=lambda point: point.parameters))
        for group in groups
    ]


def render(ladder: Ladder, png: bytes) -> str:
    law, intervals = ladder.fit.law, ladder.fit.intervals()
    constants = [
        [name, f"{getattr(law, name):.4g}", f"{low:.4g} to {high:.4g}"] for name, (low, high) in intervals.items()
    ]
    largest = max(ladder.points, key=lambda point: point.parameters * point.tokens)
    best = law.best_split(6 * largest.parameters * largest.tokens)
    rows = [
        [escape(point.name), count(point.parameters), count(point.tokens), f"{point.ratio:.2g}", f"{point.loss:.4f}",
         f"{law.loss(point.parameters, point.tokens):.4f}"]
        for point in ladder.points
    ]  # fmt: skip
    checked = "".join(f"<p>{escape(line)}</p>" for line in lines(ladder))
    split = (
        f"<p>For the work of the largest run (6 N D = {6 * largest.parameters * largest.tokens:.3g} FLOPs) the law's"
        f" lowest loss is at {count(best[0])} parameters and {count(best[1])} tokens.</p>"
    )
    percent = f"{INTERVAL[0]:g}% to {INTERVAL[1]:g}% of bootstraps"
    head = ["run", "parameters", "tokens", "tokens per parameter", "loss", "the law's"]
    sections = [
        "<header><h1>Scaling ladder</h1></header>", pages.image("ladder", png, "loss over parameters"), checked, split,
        "<h2>Constants</h2>", pages.table(["", "fit", percent], constants),
        "<h2>Runs</h2>", pages.table(head, rows, numeric=True),
    ]  # fmt: skip
    return pages.page("Scaling ladder", "".join(sections))
