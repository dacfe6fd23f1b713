"""One page about one run or several: pictures, results, and where their configs differ.

Made from metrics.jsonl, result.json, plan.json and config.yaml alone (and, of one that was evaluated, from what that
left in it), so that it works for a run that is going on, was killed, or was copied from elsewhere. The page is one
file: pictures are embedded, nothing is loaded from a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bigtrain.confusion import CONFUSION, EVALUATION, METRICS, what_is_counted
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import as_utf8
from bigtrain.held_out import SHARE, WHOLE, latest, sample_name
from bigtrain.hooks.console import HEADLINES, count, duration
from bigtrain.hooks.jsonl import read_metrics
from bigtrain.pages import COLOURS, INK, LARGE, MUTED, SMALL, image, page, picture, table
from bigtrain.plan import preflight
from bigtrain.redact import redact

Series = tuple[np.ndarray, np.ndarray]  # steps, values


@dataclass
class Run:
    name: str
    path: Path
    rows: list[dict[str, Any]]  # of metrics.jsonl
    result: dict[str, Any]  # of result.json, else what the metrics say so far and plan.json
    config: dict[str, Any]  # dotted key -> value, secrets taken out
    evaluation: dict[str, Any]  # of `bigtrain evaluate`: metrics.json, empty if it was not run
    confusion: bytes | None  # and its picture
    tokenizer: str = ""  # a hash of its file; "": not known

    def series(self, metric: str) -> Series:
        """The finite values of a metric and their steps, each (points,)."""
        points = [(row["step"], row[metric]) for row in self.rows if isinstance(row.get(metric), (int, float))]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        finite = np.isfinite(values)
        return steps[finite], values[finite]

    def stretches(self, metric: str) -> list[Series]:
        """The same of a held-out metric, parted where the run went on with other data: those are other numbers."""
        parts: dict[Any, list[dict[str, Any]]] = {}
        for row in self.rows:
            if metric in row:
                parts.setdefault(row.get("data"), []).append(row)
        series = [replace(self, rows=rows).series(metric) for rows in parts.values()]
        return [(steps, values) for steps, values in series if len(steps)]


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Write index.html and the pictures as PNG into `out` and return the page's path.

    `out` is by default RUN/report for one run and ./report for several. Raises ConfigError for what is no run or has
    no metrics, BigtrainError if `out` cannot be written.
    """
    loaded = load_runs(runs)
    directory = out or (loaded[0].path / "report" if len(loaded) == 1 else Path("report"))
    pictures = {name: png for name, draw in PICTURES.items() if (png := draw(loaded)) is not None}
    page = render(loaded, pictures)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            (directory / f"{name}.png").write_bytes(png)
        (directory / "index.html").write_bytes(as_utf8(page))
    except OSError as error:
        raise BigtrainError(f"the report cannot be written: {error}") from None
    return directory / "index.html"


# ------------------------------------------------------------------------------------------------- reading


def load_runs(paths: list[Path]) -> list[Run]:
    """Read the runs, each once, named by as much of the end of their path as tells them apart."""
    if not paths:
        raise ConfigError("RUN", "", "missing", "name at least one run directory")
    unique = {path.resolve(): path for path in paths}
    names = dict(zip(unique, _names(list(unique)), strict=True))
    return [_load_run(path, names[resolved]) for resolved, path in unique.items()]


def _names(paths: list[Path]) -> list[str]:
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _load_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise ConfigError("RUN", str(path), "no such directory")
    try:
        rows = list(read_metrics(path / "metrics.jsonl"))
        text = _read(path / "result.json")
        settings = yaml.safe_load(_read(path / "config.yaml")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("RUN", str(path), f"cannot be read ({str(error).splitlines()[0]})") from None
    if not rows:
        raise ConfigError("RUN", str(path), "holds no metrics (metrics.jsonl)", "name a run that has begun to train")
    try:
        result = json.loads(text) if text else {}
    except ValueError:  # torn by a kill
        result = {}
    config = dict(_flatten(redact(settings))) if isinstance(settings, dict) else {}
    known = _so_far(rows) | preflight.predicted(path) | redact(result)
    return Run(name, path, rows, known, config, *_evaluation(path / EVALUATION), _tokenizer(path))


def _tokenizer(path: Path) -> str:
    try:
        return hashlib.sha256((path / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    except OSError:
        return ""


def _evaluation(directory: Path) -> tuple[dict[str, Any], bytes | None]:
    try:
        found = redact(json.loads((directory / METRICS).read_text(encoding="utf-8")))
        picture = (directory / CONFUSION).read_bytes() if found.get("labels") else None
    except (OSError, ValueError, AttributeError):  # none, of a task without labels, or no longer whole
        return {}, None
    return found, picture


def read_config(path: Path) -> dict[str, Any]:
    """A run's config as dotted keys, secrets taken out; empty if it has none that can be read."""
    try:
        settings = yaml.safe_load(_read(path / "config.yaml"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return dict(_flatten(redact(settings))) if isinstance(settings, dict) else {}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _so_far(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What result.json would hold, as far as the metrics tell; its own values come before these."""
    last = latest(rows)
    peaks = [row["perf/peak_memory_gib"] for row in rows if row.get("perf/peak_memory_gib") is not None]
    times = [row["time"] for row in rows if "time" in row]
    return last | {
        "status": "not finished",
        "train/steps": last["step"],
        "time/total_seconds": max(times) - min(times) if times else None,
        "perf/peak_memory_gib": max(peaks, default=None),
    }


def _flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ------------------------------------------------------------------------------------------------ pictures

BITS = "eval/bits_per_byte"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
HELD_OUT: dict[str, Any] = {
    "linewidth": 1.0,
    "linestyle": ":",
    "marker": "o",
    "markersize": 5.5,
    "markeredgecolor": "white",
    "zorder": 4,
}
# A line each, never one through both: what is the same model gives other numbers on other examples.
OF_A_SAMPLE = HELD_OUT | {"marker": "s", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": None}
Lines = dict[str, tuple[str, dict[str, Any]]]  # metric -> what it is called, how it is drawn
HELD_OUT_LINES, BITS_LINES = (
    {sample_name(whole): ("held-out, a sample", OF_A_SAMPLE), whole: ("held-out", HELD_OUT)}
    for whole in ("eval/loss", BITS)
)


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over about a fortieth of the points, centred, so that a falling curve is not lagged behind.

    The window shrinks towards the first point, where curves are steep, and is cut off at the last.
    """
    index = np.arange(len(values))
    before = np.minimum(index, len(values) // 80)
    after = np.minimum(before, len(values) - 1 - index)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + after + 1] - sums[index - before]) / (after + before + 1)


# What a task's loss is a mean of. A tagger's targets are words, a reader's are windows of a text with a question.
LOSS_UNITS = {
    "causal_lm": "nats per token",
    "masked_lm": "nats per masked token",
    "classification": "nats per text",
    "tagging": "nats per word",
    "question_answering": "nats per window (mean of start and end)",
    "translation": "nats per target token",
    "instruction": "nats per token of the responses",
}
OF_TOKENS = ("causal_lm", "masked_lm", "translation", "instruction")  # whose tokens another tokenizer cuts otherwise


def loss_unit(run: Run) -> str:
    task = run.config.get("task.kind")
    if task == "classification" and run.config.get("task.regression"):
        return "squared error"
    return LOSS_UNITS.get(str(task), "loss")


def not_comparable(runs: list[Run]) -> str:
    """Why the losses of these runs are not to be compared, and what is; "" if they are."""
    units = dict.fromkeys(map(loss_unit, runs))
    if len(units) > 1:
        return f"Different tasks: {', '.join(units)} are not comparable."
    if runs[0].config.get("task.kind") not in OF_TOKENS or len({run.tokenizer for run in runs if run.tokenizer}) < 2:
        return ""
    instead = "; bits per byte of the same text are" if _any(runs, *BITS_LINES) else ""
    return f"Different tokenizers: {next(iter(units))} are not comparable{instead}."


def draw_loss(runs: list[Run]) -> bytes | None:
    """Training loss, faint as it was and smoothed, and held-out loss as points: of all of the set, and of a sample."""
    caution = not_comparable(runs)

    def draw(axes: Any) -> None:
        for run, colour, dash in _styles(runs):
            label = run.name if len(runs) > 1 else "training"
            steps, values = run.series("train/loss")
            if len(steps):
                smoothed = smooth(values)
                axes.plot(*thin(steps, values), color=colour, alpha=0.18, linewidth=0.9)
                axes.plot(*thin(steps, smoothed), color=colour, linestyle=dash, linewidth=1.9, label=label)
            held_out = colour if len(runs) > 1 else COLOURS[1]
            *_, told = [
                "",
                *(metric for metric in HELD_OUT_LINES if len(run.series(metric)[0])),
            ]  # the whole set's last
            for metric, (_, style) in HELD_OUT_LINES.items():
                for steps, values in run.stretches(metric):
                    axes.plot(steps, values, color=held_out, **style)
                if len(runs) == 1 and metric == told:  # say the number where it is
                    axes.annotate(
                        f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(7, 0), textcoords="offset points",
                        va="center", color=held_out, fontweight="bold", fontsize=9.5,
                    )  # fmt: skip
        _cut_start(axes, runs)
        units = list(dict.fromkeys(map(loss_unit, runs)))
        axes.set_ylabel(units[0] if len(units) == 1 else "loss, of each task its own")
        _name_lines(axes, runs, HELD_OUT_LINES, COLOURS[1])
        axes.legend(loc="upper right", fontsize=9.5 if len(runs) < 8 else 8, labelcolor=INK)

    title = f"Loss\n{caution}" if caution else "Loss"
    return _picture(title, LARGE, draw) if _any(runs, "train/loss", *HELD_OUT_LINES) else None


def draw_bits(runs: list[Run]) -> bytes | None:
    """Of all of the held-out set, and of a sample."""

    def draw(axes: Any) -> None:
        for run, colour, dash in _styles(runs):
            for metric, (_, style) in BITS_LINES.items():
                for steps, values in run.stretches(metric):
                    axes.plot(steps, values, color=colour, **style)
            if len(runs) > 1:
                axes.plot([], [], color=colour, linestyle=dash, label=run.name)
        axes.set_ylabel("whatever the tokenizer")
        _name_lines(axes, runs, BITS_LINES, COLOURS[0])
        axes.legend(loc="best", fontsize=8, labelcolor=INK, ncols=1 + (len(runs) - 1) // 5)
        axes.yaxis.set_major_formatter(_tick)

    return _picture("Held-out bits per byte", SMALL, draw) if _any(runs, *BITS_LINES) else None


def draw_lr(runs: list[Run]) -> bytes | None:
    return _draw_metric(runs, "train/lr", "Learning rate", "", smoothed=False)


def draw_grad_norm(runs: list[Run]) -> bytes | None:
    return _draw_metric(runs, "train/grad_norm", "Gradient norm", "before clipping", smoothed=True)


def draw_throughput(runs: list[Run]) -> bytes | None:
    return _draw_metric(runs, "perf/tokens_per_second", "Throughput", "tokens per second", smoothed=True)


def draw_memory(runs: list[Run]) -> bytes | None:
    planned = "plan/peak_memory_gib"
    return _draw_metric(runs, "perf/peak_memory_gib", "Peak memory", "GiB on rank 0", smoothed=False, planned=planned)


def draw_step_time(runs: list[Run]) -> bytes | None:
    planned = "plan/step_seconds"
    return _draw_metric(runs, "perf/step_seconds", "Step time", "seconds", smoothed=True, planned=planned)


PICTURES: dict[str, Callable[[list[Run]], bytes | None]] = {
    "loss": draw_loss,
    "bits_per_byte": draw_bits,
    "lr": draw_lr,
    "grad_norm": draw_grad_norm,
    "throughput": draw_throughput,
    "memory": draw_memory,
    "step_time": draw_step_time,
}


def _name_lines(axes: Any, runs: list[Run], lines: Lines, colour: str) -> None:
    """One entry of the legend for all runs, in `colour` where there is one run."""
    for metric, (label, style) in lines.items():
        if _any(runs, metric):
            axes.plot([], [], color=MUTED if len(runs) > 1 else colour, label=label, **style)


def _draw_metric(
    runs: list[Run], metric: str, title: str, unit: str, smoothed: bool, planned: str = ""
) -> bytes | None:  # fmt: skip
    def draw(axes: Any) -> None:
        tops = []
        for run, colour, dash in _styles(runs):
            steps, values = run.series(metric)
            if not len(steps):
                continue
            line = smooth(values) if smoothed else values
            if smoothed:
                axes.plot(*thin(steps, values), color=colour, alpha=0.18, linewidth=0.8)
            marker = "o" if len(steps) == 1 else None  # a line of one point cannot be seen
            axes.plot(*thin(steps, line), color=colour, linestyle=dash, linewidth=1.7, label=run.name, marker=marker)
            tops.append(max(np.percentile(values, 99), line[len(line) // 20 :].max()))
            if expected := run.result.get(planned):
                axes.axhline(expected, color=colour, linestyle=":", linewidth=1)
                axes.text(steps[0], expected, "planned ", color=colour, fontsize=7, va="bottom")
                tops.append(expected)
        axes.set_ylim(0, 1.15 * max(tops) or None)  # from zero, and a spike does not flatten the rest
        axes.set_ylabel(unit)
        if len(runs) > 1:
            axes.legend(loc="best", fontsize=8, labelcolor=INK, ncols=1 + (len(runs) - 1) // 5)
        axes.yaxis.set_major_formatter(_tick)

    return _picture(title, SMALL, draw) if _any(runs, metric) else None


def _picture(title: str, size: tuple[float, float], draw: Callable[[Any], None]) -> bytes:
    """One whose x axis is the step."""
    from matplotlib.ticker import MaxNLocator

    def with_steps(axes: Any) -> None:
        draw(axes)
        axes.set_xlabel("step")
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.xaxis.set_major_formatter(_tick)

    return picture(title, size, with_steps)


def _tick(value: float, position: float) -> str:
    return "0" if value == 0 else count(value) if abs(value) >= 1 else f"{value:.3g}"


def _styles(runs: list[Run]) -> Iterator[tuple[Run, str, Any]]:
    for index, run in enumerate(runs):
        yield run, COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def _any(runs: list[Run], *metrics: str) -> bool:
    return any(len(run.series(metric)[0]) for run in runs for metric in metrics)


def _cut_start(axes: Any, runs: list[Run]) -> None:
    """A spike must not flatten what comes after: the loss axis ends a little above nearly all points."""
    every = np.concatenate([run.series(metric)[1] for run in runs for metric in ("train/loss", *HELD_OUT_LINES)])
    low, high = every.min(), np.percentile(every, 99.5)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def thin(steps: np.ndarray, values: np.ndarray, points: int = 4000) -> Series:
    """Every n-th point: more than the picture has pixels only takes time."""
    stride = -(-len(steps) // points)
    return steps[:: max(1, stride)], values[:: max(1, stride)]


# ---------------------------------------------------------------------------------------------------- page


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(form: str) -> Callable[[Any], str]:
    return lambda value: form.format(value) if isinstance(value, (int, float)) else _text(value)


def _unit(write: Callable[[float], str]) -> Callable[[Any], str]:
    return lambda value: write(value) if isinstance(value, (int, float)) else _text(value)


# label, key of the result, how to write it, and whether less (-1) or more (1) is better
_Row = tuple[str, str, Callable[[Any], str], int]
_RESULTS: tuple[_Row, ...] = (
    ("Held-out loss", "eval/loss", _number("{:.4f}"), -1),
    ("Held-out bits per byte", "eval/bits_per_byte", _number("{:.4f}"), -1),
    ("gzip -9 bits per byte", "eval/gzip_bits_per_byte", _number("{:.4f}"), 0),
    ("Held-out perplexity", "eval/perplexity", _number("{:.2f}"), -1),
    ("Accuracy", "eval/accuracy", _number("{:.4f}"), 1),
    ("Most frequent label alone", "eval/majority", _number("{:.4f}"), 0),
    ("F1", "eval/f1", _number("{:.4f}"), 1),
    ("Macro F1", "eval/f1_macro", _number("{:.4f}"), 1),
    ("Matthews correlation", "eval/matthews", _number("{:.4f}"), 1),
    ("Pearson correlation", "eval/pearson", _number("{:.4f}"), 1),
    ("Masked accuracy", "eval/masked_accuracy", _number("{:.4f}"), 1),
    ("Sentence accuracy", "eval/sentence_accuracy", _number("{:.4f}"), 1),
    ("Exact match", "eval/exact_match", _number("{:.4f}"), 1),
    ("BLEU", "eval/bleu", _number("{:.2f}"), 1),
    ("BLEU of copying", "eval/copy_bleu", _number("{:.2f}"), 0),
    ("chrF", "eval/chrf", _number("{:.2f}"), 1),
    ("Epsilon (privacy)", "privacy/epsilon", _number("{:.3g}"), -1),
    ("Training loss", "train/loss", _number("{:.4f}"), -1),
    ("Tokens per second", "perf/tokens_per_second", _unit(count), 1),
    ("MFU", "perf/mfu", _number("{:.1%}"), 1),
    ("Peak memory", "perf/peak_memory_gib", _number("{:.2f} GiB"), -1),
    ("Peak memory, planned", "plan/peak_memory_gib", _number("{:.2f} GiB"), 0),
    ("Step", "perf/step_seconds", _number("{:.2f} s"), -1),
    ("Step, planned", "plan/step_seconds", _number("{:.2f} s"), 0),
    ("Training time", "time/train_seconds", _unit(duration), 0),
    ("Total time", "time/total_seconds", _unit(duration), 0),
    ("Steps", "train/steps", _number("{:,}"), 0),
    ("Tokens", "data/tokens", _unit(count), 0),
    ("Parameters", "model/parameters", _unit(count), 0),
    ("Status", "status", _text, 0),
)
_BY_TARGET = ("eval/loss", "eval/perplexity", "eval/masked_accuracy", "train/loss")  # of each token, text or word
BY_TARGET = {*_BY_TARGET, *map(sample_name, _BY_TARGET)}
# Of a run that has not ended, of a sample first.
RESULTS: tuple[_Row, ...] = (
    *((f"{label} (sample)", sample_name(key), write, better) for label, key, write, better in _RESULTS
      if key.startswith(WHOLE)),
    ("The sample's share of the held-out set", SHARE, _number("{:.1%}"), 0),
    *_RESULTS,
)  # fmt: skip
NOT_COMPARED = {"run_dir", "data.prepared_dir", "launch.master_port"}  # another in every run, and says nothing


def render(runs: list[Run], pictures: dict[str, bytes]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [_header(runs, title)]
    if len(runs) == 1:
        sections.append(_cards(runs[0]))
    if "loss" in pictures:
        sections.append(_image("loss", pictures["loss"], runs))
    if caution := not_comparable(runs):
        sections.append(f"<p>{escape(caution)}</p>")
    small = [_image(name, png, runs) for name, png in pictures.items() if name != "loss"]
    sections.append(f'<div class="grid">{"".join(small)}</div>' if small else "")
    sections.append(f"<h2>Results</h2>{_results(runs)}")
    if len(runs) == 1:
        sections.append(_labels(runs[0]))
        rows = [[key, _setting(value)] for key, value in runs[0].config.items()]
        if rows:
            sections.append(f"<details><summary>Config</summary>{table(['key', 'value'], rows)}</details>")
    else:
        sections.append(f"<h2>Where the configs differ</h2>{_differences(runs)}")
    return page(title, "".join(sections))


def _header(runs: list[Run], title: str) -> str:
    if len(runs) > 1:
        about = ", ".join(run.name for run in runs)
    else:
        config, result = runs[0].config, runs[0].result
        size = result.get("model/parameters")
        facts = [
            f"{count(size)} parameters" if size else None,
            f"{config['model.n_layers']} layers of {config['model.dim']}" if "model.dim" in config else None,
            f"ZeRO-{config['engine.stage']}" if "engine.stage" in config else config.get("engine.kind"),
            config.get("optimizer.kind"),
            config.get("train.precision"),
            f"{result['train/steps']:,} steps",
            result.get("status"),
        ]
        about = " · ".join(str(fact) for fact in facts if fact)
    return f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>"


def _cards(run: Run) -> str:
    """The few numbers that one asks for first."""
    wanted = {"eval/loss", "perf/tokens_per_second", "time/train_seconds", *HEADLINES}
    wanted |= {sample_name(key) for key in wanted}
    cards = []
    for label, key, write, _ in RESULTS:
        value = run.result.get(key)
        if key not in wanted or value is None:
            continue
        note = ""
        gzip = run.result.get("eval/gzip_bits_per_byte")
        if key == "eval/bits_per_byte" and gzip:
            note = f"<small>gzip -9: {gzip:.3f}</small>"
        cards.append(f'<div class="card"><span>{escape(label)}</span><b>{escape(write(value))}</b>{note}</div>')
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _image(name: str, png: bytes, runs: list[Run]) -> str:
    unit = f" in {', '.join(dict.fromkeys(map(loss_unit, runs)))}" if name == "loss" else ""
    return image(name, png, f"{name.replace('_', ' ')}{unit} over steps of {', '.join(run.name for run in runs)}")


def _results(runs: list[Run]) -> str:
    """A row for each number that any run has; the best of several is set in bold, where they can be compared."""
    rows, alike = [], not not_comparable(runs)
    for label, key, write, better in RESULTS:
        values = [run.result.get(key) for run in runs]
        if all(value is None for value in values):
            continue
        numbers = [value for value in values if isinstance(value, (int, float))]
        better = better if alike or key not in BY_TARGET else 0
        best = (min if better < 0 else max)(numbers) if better and len(runs) > 1 and len(set(numbers)) > 1 else None
        cells = [escape(write(value)) for value in values]
        rows.append(
            [label, *(f"<b>{cell}</b>" if best is not None and value == best else cell
                      for cell, value in zip(cells, values, strict=True))]
        )  # fmt: skip
    return table(["", *(escape(run.name) for run in runs)] if len(runs) > 1 else [], rows, numeric=True)


def _labels(run: Run) -> str:
    """How well each label is told from the others, as the last `bigtrain evaluate` of the run found it."""
    if run.confusion is None:
        return ""
    counted = what_is_counted(run.evaluation["labels"])
    rows = [
        [escape(row["label"]), *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")), f"{row[counted]:,}"]
        for row in run.evaluation["labels"]
    ]
    data = run.evaluation["data"]
    about = f"{run.evaluation['checkpoint']} on {data if isinstance(data, str) else ', '.join(data)}"
    return (
        f"<h2>Labels</h2><p>{escape(about)}</p>"
        + image("confusion", run.confusion, "confusion matrix", kind="square")
        + table(["", "Precision", "Recall", "F1", counted.capitalize()], rows, numeric=True)
    )


def _differences(runs: list[Run]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in NOT_COMPARED)
    rows = []
    for key in keys:
        values = [_setting(run.config[key]) if key in run.config else "-" for run in runs]
        if len(set(values)) > 1:
            rows.append([escape(key), *values])
    return table(["", *(escape(run.name) for run in runs)], rows) if rows else "<p>They do not.</p>"


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
