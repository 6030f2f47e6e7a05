#!/usr/bin/env python
"""Draw a step of APART for the README, as docs/pictures/two-passes.svg; it reads on dark and light pages.

Where a page shows it narrower than 600 pixels, as telephones do, fewer and larger words take the place of the others.

python scripts/draw_scheme.py
python scripts/draw_scheme.py --output FILE.svg
"""

from __future__ import annotations

import argparse
import math
from html import escape
from pathlib import Path

from apart_hf.utils.command_line import Parser, run_command
from apart_hf.utils.files import write_whole

PICTURE = Path(__file__).parents[1] / "docs/pictures/two-passes.svg"
LIGHT = {
    "page": "#ffffff",
    "panel": "#f3f5f9",
    "line": "#9aa3b5",
    "text": "#1b2333",
    "clean": "#1c5fb0",
    "shifted": "#b3261e",
}
DARK = {
    "page": "#171b22",
    "panel": "#232933",
    "line": "#6f7a8d",
    "text": "#e9edf4",
    "clean": "#8ab8f5",
    "shifted": "#ff9c94",
}
WIDTH, HEIGHT, MARGIN, GAP = 760, 470, 16, 28
PANEL = (WIDTH - 2 * MARGIN - 2 * GAP) / 3, 196
TOP, BELOW = MARGIN, HEIGHT - MARGIN - PANEL[1]
NARROW, LARGE = 600, 26  # pixels of a page below which words of `brief` are shown, and their size
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def text(x: float, y: float, words: str, kind: str = "", size: float = 15, anchor: str = "start") -> str:
    """Write words at a point; `kind` is classes of colour, and `detail` or `brief` for one of the two layouts."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def column(place: int) -> float:
    """Return the left edge of a column."""
    return MARGIN + place * (PANEL[0] + GAP)


def panel(left: float, top: float, width: float, title: str, brief: str) -> str:
    """Draw the frame of one stage, with its title for either layout."""
    frame = f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{PANEL[1]}" rx="10" class="panel"/>'
    return frame + text(left + 14, top + 26, title, "title detail", 16) + short(left + 14, top + 36, brief, "title")


def detail(x: float, y: float, words: str, kind: str = "", size: float = 14, anchor: str = "start") -> str:
    """Write words that only a wide picture shows."""
    return text(x, y, words, f"{kind} detail".strip(), size, anchor)


def short(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Write large words that only a narrow picture shows."""
    return text(x, y, words, f"{kind} brief".strip(), LARGE, anchor)


def arrow(*points: tuple[float, float]) -> str:
    """Draw a line through points, with a head at the last one."""
    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="{path}" class="arrow" marker-end="url(#head)"/>'


def bell(middle: float, base: float, mean: float, scale: float, kind: str) -> str:
    """Draw how one channel is distributed after BN: 30 units of the picture are one standard deviation."""
    places = [-3.2 + 0.1 * k for k in range(65)]
    heights = [math.exp(-(((x - mean) / scale) ** 2) / 2) / scale for x in places]
    points = " ".join(f"{middle + 30 * x:.1f},{base - 62 * y:.1f}" for x, y in zip(places, heights))
    return f'<polyline points="{points}" class="curve {kind}"/>'


def axis(middle: float, base: float) -> str:
    """Draw the line that a bell stands on."""
    return f'<path d="M{middle - 98:.1f} {base:.1f} H{middle + 98:.1f}" class="axis"/>'


def batch(left: float, top: float) -> str:
    """Draw the samples, in two groups by colour."""
    kinds = ("one", "two")
    return "".join(
        f'<rect x="{left + 46 * (k % 4):.1f}" y="{top + 46 * (k // 4):.1f}" width="38" height="38" rx="5" '
        f'class="sample {kinds[k % 2]}"/>'
        for k in range(8)
    )


def drawn() -> str:
    """Return the picture."""
    first, second, third = (column(place) for place in range(3))
    width, half = PANEL[0], TOP + PANEL[1] / 2
    middle, right = second + width / 2, third + width / 2
    wide = 2 * width + GAP
    sigma = "\N{GREEK SMALL LETTER SIGMA}"
    parts = [
        panel(first, TOP, width, "1  A batch of M images", "1  Batch"),
        batch(first + 22, TOP + 52),
        detail(first + 14, TOP + 178, "in n groups, here two"),
        short(first + 14, TOP + 180, "in n groups"),
        arrow((first + width + 3, half), (second - 6, half)),
        panel(second, TOP, width, "2  Clean pass", "2  Clean"),
        axis(middle, TOP + 116),
        bell(middle, TOP + 116, 0, 1, "clean"),
        detail(middle, TOP + 134, f"BN by the batch's μ and {sigma}", anchor="middle"),
        detail(second + 14, TOP + 158, "gives the gradient g", "clean"),
        detail(second + 14, TOP + 178, f"and those for all μ and {sigma}"),
        short(second + 14, TOP + 162, "gradient g", "clean"),
        arrow((second + width + 3, half), (third - 6, half)),
        panel(third, TOP, width, "3  Attack", "3  Attack"),
        detail(right, TOP + 70, "δμ = ε sign(∂L/∂δμ)", "shifted", 17, "middle"),
        detail(right, TOP + 102, "δσ = ε sign(∂L/∂δσ)", "shifted", 17, "middle"),
        detail(third + 14, TOP + 138, "on mean and deviation of"),
        detail(third + 14, TOP + 158, "every channel and BN layer;"),
        detail(third + 14, TOP + 178, "the weights stay"),
        short(third + 14, TOP + 90, f"shifts μ and {sigma}", "shifted"),
        short(third + 14, TOP + 126, "by ε, up the", "shifted"),
        short(third + 14, TOP + 162, "loss", "shifted"),
        arrow((right, TOP + PANEL[1] + 3), (right, BELOW - 6)),
        panel(third, BELOW, width, "4  Second pass", "4  Shifted"),
        axis(right, BELOW + 116),
        bell(right, BELOW + 116, 0, 1, "clean faint"),
        bell(right, BELOW + 116, -0.75, 1.25, "shifted"),
        detail(right, BELOW + 134, "BN shifted by δ, by group", anchor="middle"),
        detail(third + 14, BELOW + 158, "gives the gradient h", "shifted"),
        detail(third + 14, BELOW + 178, "and leaves no trace"),
        short(third + 14, BELOW + 162, "gradient h", "shifted"),
        arrow((third - 3, BELOW + PANEL[1] / 2), (first + wide + 6, BELOW + PANEL[1] / 2)),
        panel(first, BELOW, wide, "5  One step of the optimizer", "5  One step"),
        detail(first + wide / 2, BELOW + 82, "along  M/(M+N) g  +  N/(M+N) h", "", 22, "middle"),
        detail(first + 14, BELOW + 138, "N of the M images are seen twice; N = M costs two passes."),
        detail(first + 14, BELOW + 158, "Then δ is gone. The model, its running statistics and its"),
        detail(first + 14, BELOW + 178, "checkpoint are those of an ordinary timm model."),
        short(first + 14, BELOW + 90, "along M/(M+N) g + N/(M+N) h"),
        short(first + 14, BELOW + 144, "It leaves an ordinary model."),
    ]
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="{FONT}">
<title>A step of APART</title>
<desc>A batch passes the network as usual, which gives the gradient g, and that of the mean and deviation of every BN
layer. Both are shifted by epsilon along the sign of that gradient. A second pass with shifted statistics gives the
gradient h. The optimizer makes one step along the weighted mean of g and h.</desc>
<style>
{_colours(LIGHT)}
@media (prefers-color-scheme: dark) {{
{_colours(DARK)}
}}
.brief {{ display: none }}
@media (max-width: {NARROW - 1}px) {{ .brief {{ display: inline }} .detail {{ display: none }} }}
</style>
<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L10 5 L0 10 z" class="head"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="12" class="page"/>
{body}
</svg>
"""


def _colours(of: dict[str, str]) -> str:
    return f"""text {{ fill: {of["text"]} }} .title {{ font-weight: 600 }}
text.clean {{ fill: {of["clean"]} }} text.shifted {{ fill: {of["shifted"]} }}
.page {{ fill: {of["page"]} }} .panel {{ fill: {of["panel"]}; stroke: {of["line"]} }}
.arrow, .axis {{ fill: none; stroke: {of["line"]}; stroke-width: 2 }} .head {{ fill: {of["line"]} }}
.curve {{ fill: none; stroke-width: 3 }}
.curve.clean {{ stroke: {of["clean"]} }} .curve.shifted {{ stroke: {of["shifted"]} }}
.curve.faint {{ stroke-dasharray: 5 5; stroke-width: 2 }}
.sample {{ stroke: {of["line"]}; fill: {of["clean"]} }} .one {{ fill-opacity: 0.75 }} .two {{ fill-opacity: 0.25 }}"""


def main(prog: str) -> None:
    """Write the picture."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="FILE", help="[docs/pictures/two-passes.svg]")
    write_whole(parser.parse_args().output, drawn())


if __name__ == "__main__":
    run_command(main)
