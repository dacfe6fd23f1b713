"""The page and the pictures of `bigtrain compress`: quality against size and time. One file, nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from bigtrain.files import write_atomic
from bigtrain.pages import COLOURS, LARGE, image, page, picture, table

SMALLER_IS_BETTER = ("eval/perplexity", "eval/loss")


QUALITY, REMOVED = "quality", "removed"  # columns: the one that is named after the task's metric, and the last one


def write_page(found: dict[str, Any], out: Path) -> Path:
    """Write quality_size.png, quality_latency.png, and index.html which shows them over the tables; the page's path."""
    pictures = {"quality_size": draw_size(found), "quality_latency": draw_latency(found)}
    for name, png in pictures.items():
        (out / f"{name}.png").write_bytes(png)
    write_atomic(out / "index.html", render(found, pictures))
    return out / "index.html"


def quality_of(row: dict[str, Any]) -> str:
    name: str = row["quality_name"]
    return name.removeprefix("eval/")


def draw_size(found: dict[str, Any]) -> bytes:
    """A point for each recipe: megabytes across, quality up (perplexity and loss: better is lower)."""
    values = [row["disk_bytes"] / 1e6 for row in found["rows"]]
    return _draw(found, "Quality against size", "MB of weights on the disk", values, None)


def draw_latency(found: dict[str, Any]) -> bytes:
    """The same with milliseconds of a batch of 1 across: the median, and a line from quartile to quartile."""
    times = [[row[f"batch_1_seconds{part}"] * 1e3 for part in ("_q1", "", "_q3")] for row in found["rows"]]
    spread = [[median - low for low, median, _ in times], [high - median for _, median, high in times]]
    label = "ms, batch of 1: median, and quartiles as a line"
    return _draw(found, "Quality against latency", label, [median for _, median, _ in times], spread)


def _draw(
    found: dict[str, Any], title: str, label: str, values: list[float], spread: list[list[float]] | None
) -> bytes:
    rows, name = found["rows"], found["quality"]

    def points(axes: Any) -> None:
        for index, (row, value) in enumerate(zip(rows, values, strict=True)):
            colour, mark = COLOURS[index % len(COLOURS)], "os^DvPX*"[index // len(COLOURS) % 8]
            axes.scatter(value, row["quality"], s=46, color=colour, marker=mark, zorder=3, label=row["recipe"])
            if spread is not None:
                ends = [[spread[0][index]], [spread[1][index]]]
                axes.errorbar(value, row["quality"], xerr=ends, color=colour, linewidth=1.2, capsize=3, zorder=2)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
        axes.axhline(rows[0]["quality"], color="#999999", linewidth=0.8, linestyle="--")
        axes.set_xlabel(label)
        axes.set_ylabel(name.removeprefix("eval/"))
        if name in SMALLER_IS_BETTER:
            axes.invert_yaxis()
        axes.margins(x=0.12, y=0.12)

    return picture(f"{title}: up and to the left is better", LARGE, points)


def render(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
    machine, rows = found["machine"], found["rows"]
    title = f"What compression does to {Path(found['source']).name}"
    trained = f"{found['recover_steps']} steps of recovery" if found["recover_steps"] else "one shot, no training"
    quality = quality_of(rows[0])
    return page(
        title,
        f"<header><h1>{escape(title)}</h1><p>{escape(found['task'])}; {trained}; sizes and quality are of the files on"
        " the disk.</p></header>"
        + image("quality_size", pictures["quality_size"], f"{quality} of each recipe against its megabytes on the disk")
        + _table(SIZE_COLUMNS, rows)
        + image("quality_latency", pictures["quality_latency"], f"{quality} of each recipe against its milliseconds")
        + _table(TIME_COLUMNS, rows)
        + f"<p>{escape(machine['processor'])}, {machine['threads']} threads"
        f"{', compiled' if machine['compiled'] else ''}."
        f" Median (quartiles) of {rows[0]['batch_1_repeats']} or more batches of 1, in turns with the others; energy is"
        f" time by {rows[0]['batch_1_watts']:.1f} W ({escape(rows[0]['batch_1_watts_source'])}).</p>",
    )


def _table(columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]]) -> str:
    names = [quality_of(rows[0]) if name == QUALITY else name for name in columns]
    cells = [[escape(row["recipe"]), *(escape(write(row)) for write in columns.values())] for row in rows]
    return table(["recipe", *names], cells, numeric=True)


def _spread(key: str) -> Callable[[dict[str, Any]], str]:
    """The median, and the quartiles, of a thousandth of a unit."""

    def write(row: dict[str, Any]) -> str:
        low, median, high = (row[key + part] * 1e3 for part in ("_q1", "", "_q3"))
        return f"{_short(median)} ({_short(low)} to {_short(high)})"

    return write


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# Of the file on the disk: {column: how a row is written there}.
SIZE_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters": lambda row: f"{row['parameters']:,}",
    "non-zero": lambda row: f"{row['nonzeros']:,}",
    "MB": lambda row: f"{row['disk_bytes'] / 1e6:.2f}",
    "bits each": lambda row: f"{row['bits']:.1f}",
    "loss": lambda row: f"{row['metrics'].get('eval/loss', float('nan')):.4f}",
    QUALITY: lambda row: f"{row['quality']:.4f}",
    REMOVED: lambda row: str(row["removed"]),
}
TIME_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms, batch 1 (quartiles)": _spread("batch_1_seconds"),
    "ms, batch 32 (quartiles)": _spread("batch_32_seconds"),
    "mJ, batch 1 (quartiles)": _spread("batch_1_joules"),
    "mJ, batch 32 (quartiles)": _spread("batch_32_joules"),
}
