"""The page and the picture of `bigtrain compress`: quality against size. One file, nothing is loaded."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from bigtrain.files import write_atomic
from bigtrain.pages import COLOURS, LARGE, image, page, picture, table

SMALLER_IS_BETTER = ("eval/perplexity", "eval/loss")


def write_page(found: dict[str, Any], out: Path) -> Path:
    """Write quality_size.png, and index.html which shows it over the table, into `out`; the page's path."""
    png = draw(found)
    (out / "quality_size.png").write_bytes(png)
    write_atomic(out / "index.html", render(found, png))
    return out / "index.html"


def size(row: dict[str, Any]) -> float:
    """Megabytes on the disk; of what no format takes, those of its parameters in bfloat16."""
    stored = row["disk_bytes"]
    return float(stored if stored is not None else 2 * row["parameters"]) / 1e6


def draw(found: dict[str, Any]) -> bytes:
    """A point for each recipe: megabytes across, quality up (perplexity and loss: better is lower)."""
    rows, name = found["rows"], found["quality"]

    def points(axes: Any) -> None:
        for index, row in enumerate(rows):
            colour, mark = COLOURS[index % len(COLOURS)], "os^DvPX*"[index // len(COLOURS) % 8]
            name_of = row["recipe"] if row["disk_bytes"] is not None else f"{row['recipe']} (not written)"
            axes.scatter(size(row), row["quality"], s=46, color=colour, marker=mark, zorder=3, label=name_of)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
        axes.axhline(rows[0]["quality"], color="#999999", linewidth=0.8, linestyle="--")
        axes.set_xlabel("MB of weights on the disk")
        axes.set_ylabel(name.removeprefix("eval/"))
        if name in SMALLER_IS_BETTER:
            axes.invert_yaxis()
        axes.margins(x=0.12, y=0.12)

    return picture("Quality against size: up and to the left is better", LARGE, points)


def render(found: dict[str, Any], png: bytes) -> str:
    quality = found["quality"].removeprefix("eval/")
    head = [
        "recipe", "parameters", "non-zero", "MB on disk", "held-out loss", quality, "ms, batch 1", "ms, batch 32",
        "mJ, batch 1", "mJ, batch 32",
    ]  # fmt: skip
    rows = [[escape(row["recipe"]), *cells(row)] for row in found["rows"]]
    machine, first = found["machine"], found["rows"][0]
    title = f"What compression does to {Path(found['source']).name}"
    trained = f"{found['recover_steps']} steps of recovery" if found["recover_steps"] else "one shot, no training"
    return page(
        title,
        f"<header><h1>{escape(title)}</h1><p>{escape(found['task'])}; {trained}; {escape(machine['processor'])},"
        f" {machine['threads']} threads{', compiled' if machine['compiled'] else ''}; energy is time by"
        f" {first['batch_1_watts']:.1f} W ({escape(first['batch_1_watts_source'])}).</p></header>"
        + image("quality_size", png, "Quality against size")
        + table(head, rows, numeric=True),
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    stored = row["disk_bytes"]
    return (
        f"{row['parameters']:,}",
        f"{row['nonzeros']:,}",
        "-" if stored is None else f"{stored / 1e6:.2f}",
        f"{row['metrics'].get('eval/loss', float('nan')):.4f}",
        f"{row['quality']:.4f}",
        f"{row['batch_1_seconds'] * 1e3:.2f}",
        f"{row['batch_32_seconds'] * 1e3:.2f}",
        f"{row['batch_1_joules'] * 1e3:.1f}",
        f"{row['batch_32_joules'] * 1e3:.1f}",
    )
