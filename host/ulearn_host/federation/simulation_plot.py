"""Runs of a simulated fleet as a picture: score and bytes over rounds, as HTML that needs nothing else, or as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from ulearn_host.federation.simulation import Result
from ulearn_host.picture import INK, check
from ulearn_host.prepare import write_bytes

# Okabe and Ito: told apart by people who see colours less well.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DPI = 130
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 330, 64, 18, 34, 44
_GREY, _LINE = "#6b7280", "#e5e7eb"

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 2rem auto; max-width: 1240px; padding: 0 1.5rem; background: #fff; color: {INK};
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .2rem; }}
p {{ margin: .2rem 0 1rem; color: #4b5563; }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
svg {{ display: block; font-size: 11px; }}
svg text {{ fill: {INK}; }}
.axis {{ fill: {_GREY} !important; }}
.dot {{ fill-opacity: 0; }}
.dot:hover {{ fill-opacity: 1; }}
.name {{ margin-right: 1.4em; white-space: nowrap; }}
.swatch {{ display: inline-block; width: 1.4em; height: 3px; vertical-align: middle; margin-right: .4em; }}
table {{ border-collapse: collapse; margin: 1.4rem 0; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid {_LINE}; }}
th {{ color: {_GREY}; font-weight: 600; }}
"""


@dataclass(frozen=True)
class Curve:
    """One run. scores: in percent, or for a regression mean squared errors, the first of the frozen plan; bytes: up and
    down, of all boards, added up from the first round on; all have an entry for round 0."""

    name: str
    scores: tuple[float, ...]
    up: tuple[int, ...]
    down: tuple[int, ...]


def curve(name: str, result: Result) -> Curve:
    """A run as a curve."""
    scale = 100.0 if result.labelled else 1.0
    up, down = [0], [0]
    for r in result.rounds:
        up.append(up[-1] + r.bytes_up)
        down.append(down[-1] + r.bytes_down)
    return Curve(
        name, tuple(scale * s for s in (result.before, *(r.score for r in result.rounds))), tuple(up), tuple(down)
    )


def write(path: Path, curves: Sequence[Curve], title: str, labelled: bool = True) -> None:
    """Draw runs into a file, by its suffix. Raises UserError where that is not possible."""
    check(path)
    data = png(curves, title, labelled) if path.suffix == ".png" else html(curves, title, labelled).encode()
    write_bytes(data, path)


def _what(labelled: bool) -> str:
    return "held-out samples right, %" if labelled else "mean squared error on held-out samples"


# ---- PNG -------------------------------------------------------------------------------------------------------------


def png(curves: Sequence[Curve], title: str, labelled: bool = True) -> bytes:
    """The picture, as the bytes of a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, c in zip(_colors(len(curves)), curves, strict=True):
        left.plot(range(len(c.scores)), c.scores, color=color, linewidth=1.8, label=c.name)
        right.plot(range(len(c.up)), [b / 1e6 for b in c.up], color=color, linewidth=1.8, label=f"{c.name}, up")
        right.plot(range(len(c.down)), [b / 1e6 for b in c.down], color=color, linewidth=1.4, linestyle=(0, (4, 2)))
    left.axhline(curves[0].scores[0], color=_GREY, linestyle=(0, (2, 3)), linewidth=1.2, label="frozen plan")
    right.plot([], [], color=_GREY, linewidth=1.8, label="up (from the boards)")
    right.plot([], [], color=_GREY, linewidth=1.4, linestyle=(0, (4, 2)), label="down (to the boards)")
    left.legend(frameon=False, fontsize="small")
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[-2:], labels[-2:], frameon=False, fontsize="small")
    for panel, what in ((left, _what(labelled)), (right, "MB moved so far, all boards")):
        _bare(panel, what)
    figure.suptitle(title, fontsize="medium", color=INK)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _bare(panel: Any, what: str) -> None:
    panel.set_xlabel("round")
    panel.set_ylabel(what)
    panel.grid(color=_LINE, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlim(left=0)
    panel.xaxis.get_major_locator().set_params(integer=True)


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


# ---- HTML ------------------------------------------------------------------------------------------------------------


def html(curves: Sequence[Curve], title: str, labelled: bool = True) -> str:
    """The page: two drawings, and the numbers below."""
    colors = _colors(len(curves))
    names = "".join(
        f'<span class="name"><span class="swatch" style="background:{color}"></span>{escape(c.name)}</span>'
        for color, c in zip(colors, curves, strict=True)
    )
    scores = _Panel([c.scores for c in curves], _what(labelled), floor=None)
    moved = _Panel([[b / 1e6 for b in row] for c in curves for row in (c.up, c.down)], "MB moved so far, all boards", 0)
    first = scores.drawn(colors, [c.name for c in curves], (), curves[0].scores[0])
    twice = [color for color in colors for _ in range(2)]
    ways = [f"{c.name}, {way}" for c in curves for way in ("up", "down")]
    second = moved.drawn(twice, ways, range(1, len(twice), 2), None)
    note = "Dotted: the frozen plan on the same samples. Dashed: bytes down to the boards; solid: up from them."
    head = f'<meta charset="utf-8"/><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{escape(title)}</h1><p>{note}</p><p>{names}</p>"
    body += f'<div class="pictures">{first}{second}</div>{_numbers(curves)}'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _numbers(curves: Sequence[Curve]) -> str:
    columns = "".join(f"<th>{escape(c.name)}</th><th>bytes up</th><th>bytes down</th>" for c in curves)
    rows = []
    for turn in range(max(len(c.scores) for c in curves)):
        cells = "".join(
            f"<td>{c.scores[turn]:.2f}</td><td>{c.up[turn]:,}</td><td>{c.down[turn]:,}</td>"
            if turn < len(c.scores)
            else "<td></td>" * 3
            for c in curves
        )
        rows.append(f"<tr><td>{turn}</td>{cells}</tr>")
    return f"<table><thead><tr><th>round</th>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


class _Panel:
    """One drawing: lines of numbers over rounds. floor: where the axis begins; None: a little below the least."""

    def __init__(self, lines: Sequence[Sequence[float]], what: str, floor: float | None) -> None:
        self.lines, self.what = lines, what
        values = [v for line in lines for v in line]
        low, high = (min(values) if floor is None else floor), max(values)
        room = max(high - low, 1e-9) * 0.06
        self.low, self.high = (low - room if floor is None else low), high + room
        self.last = max(1, max(len(line) for line in lines) - 1)

    def x(self, turn: float) -> float:
        """Pixels from the left."""
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * turn / self.last, 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * (value - self.low) / (self.high - self.low), 1)

    def drawn(self, colors: Sequence[str], names: Sequence[str], dashed: Sequence[int], level: float | None) -> str:
        """As an SVG. dashed: which of the lines are; level: where a dotted line lies."""
        parts = [*self._axes()]
        if level is not None:
            y = self.y(level)
            parts.append(_rule(_LEFT, y, _WIDTH - _RIGHT, y, _GREY, "2 3"))
        for i, (line, color, name) in enumerate(zip(self.lines, colors, names, strict=True)):
            points = [(self.x(turn), self.y(value)) for turn, value in enumerate(line)]
            path = " ".join(f"{x},{y}" for x, y in points)
            dash = ' stroke-dasharray="5 3"' if i in dashed else ""
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"{dash}/>')
            for turn, ((x, y), value) in enumerate(zip(points, line, strict=True)):
                tip = f"<title>{escape(name)}\nround {turn}: {value:.4g}</title>"
                parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="4" fill="{color}">{tip}</circle>')
        size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        return f'<svg {size} role="img"><title>{escape(self.what)} over rounds</title>{"".join(parts)}</svg>'

    def _axes(self) -> list[str]:
        parts = [f'<text x="{_LEFT}" y="18" font-weight="600">{escape(self.what)}</text>']
        for mark in marks(self.low, self.high):
            y = self.y(mark)
            parts.append(_rule(_LEFT, y, _WIDTH - _RIGHT, y, _LINE))
            parts.append(f'<text class="axis" x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{mark:g}</text>')
        for mark in marks(0, self.last):
            if mark == int(mark):
                x = self.x(mark)
                parts.append(
                    f'<text class="axis" x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{mark:g}</text>'
                )
        y, middle = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(_rule(_LEFT, y, _WIDTH - _RIGHT, y, _GREY))
        parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">round</text>')
        return parts


def _rule(x1: float, y1: float, x2: float, y2: float, color: str, dashes: str = "") -> str:
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}"{dash}/>'


def marks(low: float, high: float) -> list[float]:
    """Round numbers for an axis, about five of them."""
    span = high - low
    step = next(s * 10.0**e for e in range(-9, 16) for s in (1, 2, 5) if s * 10.0**e * 7 >= span)
    first = -int(-low // step) if low > 0 else int(low // step)
    return [round(k * step, 12) for k in range(first, int(high // step) + 1) if low <= k * step <= high]
