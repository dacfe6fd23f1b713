"""The page and the pictures of an inspection. The page is one file: pictures are embedded, nothing is loaded."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigtrain import pages
from bigtrain.files import write_atomic
from bigtrain.pages import COLOURS

if TYPE_CHECKING:
    from bigtrain.inspect import Inspection

FOR, AGAINST = COLOURS[0], COLOURS[1]
MOST_BARS = 20  # words
MOST_LAYERS, MOST_HEADS = 12, 16  # in the grid of maps
MOST_NAMES = 60  # tokens along a map
DPI = 130


def write_page(found: Inspection, about: str, out: Path) -> Path:
    """Write attribution.png, attention.png and index.html, which shows both, into `out`; the page's path."""
    pictures = {"attribution": draw_attribution(found), "attention": draw_attention(found)}
    for name, png in pictures.items():
        (out / f"{name}.png").write_bytes(png)
    write_atomic(out / "index.html", render(found, about, pictures))
    return out / "index.html"


def render(found: Inspection, about: str, pictures: dict[str, bytes]) -> str:
    attribution = found.attribution
    answers = "".join(
        f'<tr><th scope="row">{escape(_visible(answer))}</th><td>{share:.4f}</td></tr>'
        for answer, share in found.answers
    )
    figures = "".join(
        f"<h2>{title}</h2>{pages.image(name, pictures[name], title)}"
        for name, title in (("attribution", "What the words contribute"), ("attention", "Where the heads look"))
    )
    title = f"Why {found.question}?"
    body = (
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>"
        f'<figure class="text">{_coloured(found)}</figure>'
        f'<p class="note"><mark style="background:{FOR}55">speaks for it</mark> '
        f'<mark style="background:{AGAINST}55">speaks against it</mark> '
        f"Integrated gradients sum to {float(attribution.tokens.sum()):.4f}: the score went from "
        f"{attribution.baseline:.4f} without the text's content to {attribution.score:.4f}; convergence delta "
        f"{attribution.delta:+.4f} after {attribution.steps} steps.</p>"
        f'<h2>What the model says</h2><div class="scroll"><table class="numeric"><tbody>{answers}</tbody></table></div>'
        f"{figures}"
    )
    return pages.page(title, body, TEXT_CSS)


def _coloured(found: Inspection) -> str:
    """The text, each token on a ground that is the stronger the more it contributes; the number is its tooltip."""
    values = found.attribution.tokens.tolist()
    most = max(map(abs, values)) or 1.0
    spans = []
    for i, (piece, special, value) in enumerate(zip(found.text.pieces, found.text.special, values, strict=True)):
        alpha = round(255 * 0.75 * abs(value) / most)
        kind = " ".join(name for name, is_so in (("special", special), ("at", i == found.at)) if is_so)
        spans.append(
            f'<span class="{kind}" title="{value:+.4f}" style="background:{FOR if value > 0 else AGAINST}{alpha:02x}">'
            f"{escape(piece)}</span>" + (" " if special else "")
        )
    return "".join(spans)


TEXT_CSS = """
.text { font-size: 18px; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { border-radius: 4px; padding: 2px 0; }
.text .special { color: var(--muted); font-size: 13px; }
.text .at { outline: 2px solid var(--ink); }
.note { color: var(--muted); font-size: 14px; }
.note mark { color: var(--ink); border-radius: 4px; padding: 1px 6px; margin-right: 6px; }
"""


def _visible(text: str) -> str:
    """Spaces and line breaks shown as signs where a token is nothing else."""
    return text.replace("\n", "⏎").replace("\t", "⇥") if text.strip() else text.replace("\n", "⏎").replace(" ", "␣")


def draw_attribution(found: Inspection) -> bytes:
    """The words that contribute most, in the order of the text, as bars."""
    words = list(enumerate(found.by_word()))
    strongest = sorted(sorted(words, key=lambda entry: -abs(entry[1][1]))[:MOST_BARS])
    names = [_visible(word)[:30] for _, (word, _) in strongest]
    values = [value for _, (_, value) in strongest]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.barh(range(len(values)), values, color=[FOR if value > 0 else AGAINST for value in values], height=0.7)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.axvline(0, color="#616e7c", linewidth=0.8)
        axes.grid(visible=False, axis="y")
        few = f" (the strongest {MOST_BARS} of {len(words)} words)" if len(words) > MOST_BARS else ""
        axes.set_title(f"For and against {found.question}{few}")
        axes.set_xlabel(f"attribution; convergence delta {found.attribution.delta:+.4f}")

    return pages.png((9.0, 1.6 + 0.32 * len(values)), draw, DPI, formulas=False)


def draw_attention(found: Inspection) -> bytes:
    """The mean of all maps with the tokens' names, and beside it a small map for every layer and head."""
    maps = found.attention.numpy()
    n_layers, n_heads, length, _ = maps.shape
    layers = _spread(n_layers, MOST_LAYERS)
    heads = _spread(n_heads, MOST_HEADS)
    names = [_visible(piece.strip() or piece)[:16] for piece in found.text.pieces]
    shown = _spread(length, MOST_NAMES)

    def draw(figure: Any) -> None:
        left, right = figure.subfigures(1, 2, width_ratios=(8.0, max(3.0, len(heads))))
        axes = left.add_subplot()
        image = axes.imshow(maps.mean((0, 1)), cmap="Blues", vmin=0, interpolation="nearest")
        left.colorbar(image, ax=axes, shrink=0.6)
        axes.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=8)
        axes.set_yticks(shown, [names[i] for i in shown], fontsize=8)
        axes.grid(visible=False)
        axes.set_title("Mean of all layers and heads")
        axes.set_ylabel("the token that looks")
        axes.set_xlabel("what it looks at")
        grid = right.subplots(len(layers), len(heads), squeeze=False)
        for row, layer in zip(grid, layers, strict=True):
            for cell, head in zip(row, heads, strict=True):
                cell.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
                cell.set(xticks=[], yticks=[])
                cell.grid(visible=False)
                if layer == layers[0]:
                    cell.set_title(f"head {head}", fontsize=8, pad=3, loc="center", fontweight="normal")
                if head == heads[0]:
                    cell.set_ylabel(f"layer {layer}", fontsize=8)

    return pages.png((8.0 + max(3.0, len(heads)), max(7.0, 1.05 * len(layers))), draw, DPI, formulas=False)


def _spread(count: int, most: int) -> list[int]:
    """At most that many of 0 .. count - 1, from the first to the last."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})
