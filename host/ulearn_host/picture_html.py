"""Memory over the operations as one HTML file that needs nothing else: SVG drawings, tables below."""

from __future__ import annotations

from html import escape

from ulearn_host.picture import INK, Box, boxes, middle, shape, shapes, ticks, title
from ulearn_host.report import Operation, Report
from ulearn_host.timeline import Timeline

_LEFT, _TOP, _HEIGHT = 84, 30, 380
_LONGEST = 22
_LEAST_HEIGHT = 3.0
_WIDEST, _LEAST_RECORD, _MOST_RECORD = 1080, 26, 96
_LETTER = 6.3

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 2rem auto; max-width: 1240px; padding: 0 1.5rem; background: #fff; color: {INK};
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .2rem; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .4rem; }}
p {{ margin: .2rem 0; color: #4b5563; }}
.picture {{ overflow-x: auto; }}
svg {{ display: block; font-size: 11px; }}
svg text {{ fill: {INK}; }}
.tensor rect {{ stroke: #fff; }}
.tensor:hover rect {{ stroke: {INK}; stroke-width: 2; }}
svg .inside {{ pointer-events: none; }}
.axis {{ fill: #6b7280 !important; }}
.peak {{ fill: #92400e !important; font-weight: 600; }}
.edge {{ stroke: #92400e; stroke-dasharray: 2 3; pointer-events: none; }}
table {{ border-collapse: collapse; margin: .6rem 0; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e5e7eb; }}
th {{ color: #6b7280; font-weight: 600; }}
.n {{ text-align: right; }}
.swatch {{ display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }}
tr.top td {{ background: #fef3c7; }}
"""


def draw(read: Report) -> str:
    """The page of a plan."""
    name = escape(read.path.rpartition("/")[2])
    facts = [
        f"{read.flash_bytes:,} bytes of flash",
        f"{read.ram_bytes:,} bytes of RAM on a 32-bit board, code apart",
        f"{read.macs('forward'):,} multiply-accumulates an inference",
    ]
    facts += [f"{read.macs(name):,} a step of {escape(name)}" for name in read.programs if name != "forward"]
    parts = [_program(timeline, read.of(timeline.program)) for timeline in read.timelines]
    head = f'<meta charset="utf-8"/><title>{name}: memory</title><style>{_STYLE}</style>'
    body = f"<h1>{name}</h1><p>{'; '.join(facts)}</p><p>model {read.model_id}</p>" + "".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _program(timeline: Timeline, operations: list[Operation]) -> str:
    drawn = boxes(timeline)
    note = (
        "Each block is a tensor in the arena: its height its bytes, its width the operations during which it lives. "
        "Point at one for its shape and lifetime."
    )
    head = f"<h2>{escape(title(timeline))}</h2><p>{note}</p>"
    return head + f'<div class="picture">{_svg(timeline, drawn)}</div>' + _operations(timeline, operations)


class _Scale:
    """From records and bytes to pixels."""

    def __init__(self, timeline: Timeline) -> None:
        self.count, self.arena = len(timeline.labels), max(1, timeline.arena_bytes)
        self.record = max(_LEAST_RECORD, min(_MOST_RECORD, (_WIDEST - _LEFT) / (self.count + 0.6)))
        self.width = round(_LEFT + self.record * (self.count + 0.6)) + 12
        self.bottom = _TOP + _HEIGHT
        # The names below lean at 40 degrees.
        self.height = self.bottom + 26 + round(0.65 * _LETTER * min(_LONGEST, max(map(len, timeline.labels))))

    def x(self, record: float) -> float:
        """Pixels from the left."""
        return round(_LEFT + self.record * min(record, self.count + 0.6), 1)

    def y(self, offset: float) -> float:
        """Pixels from the top; offset 0 is at the bottom."""
        return round(self.bottom - _HEIGHT * offset / self.arena, 1)


def _svg(timeline: Timeline, drawn: list[Box]) -> str:
    scale = _Scale(timeline)
    peak = timeline.peak_record
    x, y = scale.x(peak), _TOP - 6
    band = (
        f'<rect x="{x}" y="{y}" width="{scale.record:.1f}" height="{_HEIGHT + 6}" fill="#fde68a" fill-opacity="0.6"/>'
    )
    parts = [band, *_ticks(scale), *(_tensor(scale, box) for box in drawn)]
    for y in (_TOP, scale.bottom):
        dashes = ' stroke-dasharray="5 4"' if y == _TOP else ""
        parts.append(f'<line x1="{_LEFT}" x2="{scale.width}" y1="{y}" y2="{y}" stroke="#6b7280"{dashes}/>')
    for edge in (peak, peak + 1):
        x = scale.x(edge)
        parts.append(f'<line class="edge" x1="{x}" x2="{x}" y1="{_TOP - 6}" y2="{scale.bottom}"/>')
    parts += [_inscription(scale, box) for box in drawn]
    end = peak > scale.count / 2
    parts.append(
        f'<text class="peak" x="{scale.x(peak + end)}" y="{_TOP - 12}" text-anchor="{"end" if end else "start"}">'
        f"peak: {timeline.peak_bytes:,} bytes at {escape(timeline.labels[peak])}</text>"
    )
    for at, name in enumerate(timeline.labels):
        x, y = scale.x(at + 0.5), scale.bottom + 14
        label = f"<title>{escape(name)}</title>{escape(middle(name, _LONGEST))}"
        parts.append(f'<text x="{x}" y="{y}" text-anchor="end" transform="rotate(-40 {x} {y})">{label}</text>')
    size = f'width="{scale.width}" height="{scale.height}" viewBox="0 0 {scale.width} {scale.height}"'
    return f'<svg {size} role="img">' + "".join(parts) + "</svg>"


def _ticks(scale: _Scale) -> list[str]:
    """Lines at round numbers of bytes, and the arena's size."""
    parts = []
    for mark in ticks(scale.arena):
        y = scale.y(mark)
        parts.append(f'<line x1="{_LEFT}" x2="{scale.width}" y1="{y}" y2="{y}" stroke="#e5e7eb"/>')
        parts.append(f'<text class="axis" x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{mark:,}</text>')
    y = _TOP + _HEIGHT / 2
    axis = f'<text class="axis" x="16" y="{y}" text-anchor="middle" transform="rotate(-90 16 {y})">'
    return [*parts, axis + "offset in the arena, bytes</text>"]


def _place(scale: _Scale, box: Box) -> tuple[float, float, float, float]:
    """Left, top, width and height of a tensor in pixels."""
    bottom = scale.y(box.tensor.offset)
    height = max(_LEAST_HEIGHT, round(bottom - scale.y(box.tensor.end), 1))
    x = scale.x(box.left)
    return x, round(bottom - height, 1), round(scale.x(box.right) - x, 1), height


def _tensor(scale: _Scale, box: Box) -> str:
    t = box.tensor
    x, y, width, height = _place(scale, box)
    until = "after the end" if t.last >= scale.count else f"record {t.last}"
    tip = f"{t.name}\n{t.kind} {shape(t.shape)}\n{t.size:,} bytes at offset {t.offset:,}\nrecord {t.first} to {until}"
    edge = f'stroke-width="{1 if height > 4 else 0}" rx="{min(3, height / 4):.1f}"'
    block = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{box.color}" {edge}/>'
    return f'<g class="tensor"><title>{escape(tip)}</title>{block}</g>'


def _inscription(scale: _Scale, box: Box) -> str:
    """Name and bytes where there is room, across or upright; the tooltip has them in any case."""
    x, y, width, height = _place(scale, box)
    name = box.tensor.name
    across, upright = int((width - 8) / _LETTER), int((height - 8) / _LETTER)
    center, half = round(x + width / 2, 1), round(y + height / 2, 1)
    if across >= min(len(name), 8) and height >= 14:
        rows = [middle(name, across)] + ([f"{box.tensor.size:,}"] if height >= 32 else [])
        first = half + 4 - 7 * (len(rows) - 1)
        return "".join(_text(row, center, first + 14 * i) for i, row in enumerate(rows))
    if upright >= min(len(name), 8) and width >= 13:
        return _text(middle(name, upright), center, half, f' transform="rotate(-90 {center} {half})" dy="4"')
    return ""


def _text(row: str, x: float, y: float, more: str = "") -> str:
    return f'<text class="inside" x="{x}" y="{y}" text-anchor="middle"{more}>{escape(row)}</text>'


def _operations(timeline: Timeline, operations: list[Operation]) -> str:
    columns = (
        ("", "n"),
        ("operation", ""),
        ("layer", ""),
        ("shape", ""),
        ("kernel", ""),
        ("stride", ""),
        ("weights", ""),
        ("multiply-accumulates", "n"),
        ("arena alive, bytes", "n"),
    )
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in columns)
    rows = []
    for o in operations:
        cells = (
            str(o.record),
            o.op,
            o.name,
            shapes(o),
            "×".join(map(str, o.kernel)),
            "×".join(map(str, o.stride)),
            f"{o.weight_bytes:,} bytes, {o.weights}" if o.weights else "",
            f"{o.macs:,}" if o.macs else "",
            f"{o.alive_bytes:,}",
        )
        mark = ' class="top"' if o.record == timeline.peak_record else ""
        row = "".join(f'<td class="{kind}">{escape(cell)}</td>' for (_, kind), cell in zip(columns, cells, strict=True))
        rows.append(f"<tr{mark}>{row}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{_tensors(timeline)}"


def _tensors(timeline: Timeline) -> str:
    """What the colours stand for."""
    head = "<th>tensor</th><th>shape</th>"
    head += "".join(f'<th class="n">{name}</th>' for name in ("bytes", "offset", "from record", "to"))
    rows = []
    for box in boxes(timeline):
        t = box.tensor
        until = "after the end" if t.last >= len(timeline.labels) else str(t.last)
        first = f'<td><span class="swatch" style="background:{box.color}"></span>{escape(t.name)}</td>'
        numbers = (f"{t.size:,}", f"{t.offset:,}", str(t.first), until)
        cells = f"<td>{shape(t.shape)}</td>" + "".join(f'<td class="n">{number}</td>' for number in numbers)
        rows.append(f"<tr>{first}{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
