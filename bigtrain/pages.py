"""What our pages and pictures look like. A page is one file: pictures are embedded, nothing comes from a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from datetime import datetime
from html import escape
from typing import Any

from bigtrain import __version__

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
# Okabe and Ito's palette, which people with any colour vision can tell apart; then again with another dash or mark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "lines.solid_capstyle": "round",
}
LARGE, SMALL, DPI = (10.0, 4.6), (4.9, 3.2), 180  # inches, inches, dots per inch
CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --paper: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px clamp(12px, 3vw, 24px) 56px; }
h1 { font-size: 28px; letter-spacing: -0.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 12px; }
header p { color: var(--muted); margin: 4px 0 24px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 16px; margin-bottom: 16px; }
.card, figure, .scroll { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 18px; display: flex; flex-direction: column; }
.card span, .card small { color: var(--muted); font-size: 13px; }
.card b { font-size: 25px; font-weight: 650; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 16px; padding: 14px 16px 10px; }
figure img { display: block; width: 100%; height: auto; }
figure.square { max-width: 640px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 16px; }
.grid figure { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 14px; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { font-size: 13px; color: var(--muted); font-weight: 600; }
thead th:empty { padding: 0; }
tbody th { font-weight: 400; color: var(--muted); white-space: nowrap; }
.numeric td { white-space: nowrap; }
.numeric td, .numeric thead th:not(:first-child) { text-align: right; }
details { margin-top: 36px; }
summary { font-size: 17px; font-weight: 700; cursor: pointer; margin-bottom: 12px; }
footer { color: var(--muted); font-size: 13px; margin-top: 32px; }
@media print { body { background: #fff; } }
"""


def png(size: tuple[float, float], draw: Callable[[Any], None], dpi: int = DPI, formulas: bool = True) -> bytes:
    """A PNG of what `draw` draws on a matplotlib figure of (width, height) inches.

    formulas: whether a text between two $ is one, as the numbers of logarithmic axes are.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE | {"text.parse_math": formulas}):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
        figure = Figure(figsize=size, dpi=dpi, layout=layout, facecolor="white")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def picture(title: str, size: tuple[float, float], draw: Callable[[Any], None]) -> bytes:
    """A PNG of what `draw` draws on matplotlib axes."""

    def with_title(figure: Any) -> None:
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)

    return png(size, with_title)


def page(title: str, body: str, css: str = "") -> str:
    """A self-contained HTML page; `body` is HTML already, `css` comes after our own."""
    made = f"bigtrain {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · bigtrain</title><style>{CSS}{css}</style></head><body><main>"
        f"{body}<footer>{escape(made)}</footer></main></body></html>\n"
    )


def image(name: str, drawn: bytes, alt: str, kind: str = "") -> str:
    """A picture of the page, its id and what it shows; kind: square, if it is."""
    figure = f'<figure class="{kind}">' if kind else "<figure>"
    data = base64.b64encode(drawn).decode()
    return f'{figure}<img id="{name}" alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def table(head: list[str], rows: list[list[str]], numeric: bool = False) -> str:
    """Cells are HTML already."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    kind = ' class="numeric"' if numeric else ""
    return f'<div class="scroll"><table{kind}>{top}<tbody>{body}</tbody></table></div>'
