"""Memory over the operations as PNG, with matplotlib: one panel for each program."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from ulearn_host.picture import INK, boxes, middle, ticks, title
from ulearn_host.report import Report
from ulearn_host.timeline import Timeline

_LEAST_INCHES, _MOST_INCHES = 7.0, 40.0
_INCHES_A_RECORD = 0.55
_PANEL_INCHES = 4.6
_DPI = 130
_POINTS = 8
_LEAST_SHARE = 0.006  # of the arena: what is smaller is drawn as high as this


def draw(read: Report) -> bytes:
    """The picture of a plan, as the bytes of a PNG file."""
    from matplotlib.figure import Figure

    longest = max(len(t.labels) for t in read.timelines)
    width = min(_MOST_INCHES, max(_LEAST_INCHES, 1.2 + _INCHES_A_RECORD * longest))
    figure = Figure(figsize=(width, _PANEL_INCHES * len(read.timelines)), dpi=_DPI, layout="constrained")
    panels = figure.subplots(len(read.timelines), 1, squeeze=False)[:, 0]
    for panel, timeline in zip(panels, read.timelines, strict=True):
        _panel(panel, timeline, (width - 1.2) * 72 / (len(timeline.labels) + 0.6))
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _panel(panel: Any, timeline: Timeline, points: float) -> None:
    """points: width of a record."""
    count, peak = len(timeline.labels), timeline.peak_record
    panel.axvspan(peak, peak + 1, color="#fde68a", alpha=0.55, zorder=0, linewidth=0)
    panel.axhline(timeline.arena_bytes, color="#6b7280", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for box in boxes(timeline):
        right = min(box.right, count + 0.6)
        _box(panel, box.tensor.name, (box.left, right, box.tensor.offset, box.tensor.end), box.color, points, timeline)
    dots = {"colors": "#92400e", "linewidth": 0.8, "linestyle": (0, (2, 3)), "zorder": 3}
    panel.vlines([peak, peak + 1], 0, timeline.arena_bytes, **dots)
    note = f"peak: {timeline.peak_bytes:,} bytes"
    side = {"ha": "right", "x": peak + 0.94} if peak > count / 2 else {"ha": "left", "x": peak + 0.06}
    panel.text(y=timeline.arena_bytes * 1.015, s=note, va="bottom", color="#92400e", fontsize=_POINTS, **side)
    panel.set_xlim(0, count + 0.6)
    panel.set_ylim(0, timeline.arena_bytes * 1.1)
    panel.set_xticks([at + 0.5 for at in range(count)], [_plain(middle(name, 24)) for name in timeline.labels])
    panel.tick_params(axis="x", rotation=40, labelsize=_POINTS, length=0)
    for label in panel.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    panel.set_yticks(ticks(timeline.arena_bytes))
    panel.tick_params(axis="y", labelsize=_POINTS)
    panel.yaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    panel.set_ylabel("offset in the arena, bytes", fontsize=_POINTS + 1)
    panel.set_title(_plain(title(timeline)), loc="left", fontsize=_POINTS + 2, color=INK, pad=10)
    panel.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    panel.set_axisbelow(True)
    for side_ in ("top", "right"):
        panel.spines[side_].set_visible(False)


def _box(
    panel: Any, name: str, place: tuple[float, float, int, int], color: str, points: float, timeline: Timeline
) -> None:
    from matplotlib.patches import Rectangle

    left, right, low, high = place
    least = timeline.arena_bytes * _LEAST_SHARE
    edge = color if high - low <= 2 * least else "white"
    tall = max(high - low, least)
    patch = Rectangle((left, low), right - left, tall, facecolor=color, edgecolor=edge, linewidth=0.8, zorder=2)
    panel.add_patch(patch)
    height = (high - low) / timeline.arena_bytes * (_PANEL_INCHES - 1.6) * 72
    width = (right - left) * points
    across, upright = int(width / (_POINTS * 0.6)), int(height / (_POINTS * 0.6))
    center = ((left + right) / 2, (low + high) / 2)
    style = {"ha": "center", "va": "center", "fontsize": _POINTS - 1, "color": INK, "zorder": 4}
    if across >= min(len(name), 8) and height >= _POINTS:
        panel.text(*center, _plain(middle(name, across)), **style)
    elif upright >= min(len(name), 8) and width >= _POINTS:
        panel.text(*center, _plain(middle(name, upright)), rotation=90, **style)


def _plain(text: str) -> str:
    """What matplotlib must not take for a formula."""
    return text.replace("$", r"\$")
