"""Memory over the operations as a picture: coloured blocks in a terminal, letters elsewhere; HTML and PNG as files."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

from rich.style import Style
from rich.text import Text

from ulearn_host.errors import UserError
from ulearn_host.prepare import write_bytes
from ulearn_host.report import Operation, Report
from ulearn_host.timeline import ArenaTensor, Timeline

# Light enough for dark writing, told apart by people who see colours less well by the order they come in.
PALETTE = ("#8db9e2", "#f5b26b", "#94cf95", "#ee9191", "#7fcdc4", "#ecd36c", "#c1a5dd", "#f3aecd", "#c9a888", "#b8bfc8")
INK = "#1f2937"
SUFFIXES = (".html", ".png")

_LETTERS = string.ascii_letters + string.digits
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LABEL = 19
_SHORTEST = 9
_MOST_CELLS = 100


@dataclass(frozen=True)
class Box:
    """A tensor as a rectangle: left and right in records, from 0 to their number + 1; its bytes are its height."""

    tensor: ArenaTensor
    left: float
    right: float
    color: str


def boxes(timeline: Timeline) -> list[Box]:
    """The tensors of a program; where one takes over the place of another, they meet in the middle of that record."""
    result = []
    for index, t in enumerate(timeline.tensors):
        inherits = any(_takes_over(t, other) for other in timeline.tensors)
        bequeaths = any(_takes_over(other, t) for other in timeline.tensors)
        left, right = t.first + inherits / 2, t.last + 1 - bequeaths / 2
        result.append(Box(t, left, right, PALETTE[index % len(PALETTE)]))
    return result


def _takes_over(heir: ArenaTensor, before: ArenaTensor) -> bool:
    overlap = heir.offset < before.end and before.offset < heir.end
    return overlap and heir is not before and heir.first == before.last


def shape(numbers: tuple[int, ...]) -> str:
    """25×5×64; of a vector its length alone."""
    significant = numbers[-1:] if all(number == 1 for number in numbers[:-1]) else numbers
    return "×".join(map(str, significant))


def shapes(operation: Operation) -> str:
    """From where to where: a gradient goes from a layer's output to its input."""
    arrow = "←" if operation.role in ("gradient", "masking", "sum") else "→"
    return f"{shape(operation.input_shape)} {arrow} {shape(operation.output_shape)}"


def middle(text: str, length: int, mark: str = "…") -> str:
    """A name cut to a length in its middle: the end often holds the number."""
    if len(text) <= length:
        return text
    tail = (length - len(mark)) // 2
    return text[: length - len(mark) - tail] + mark + text[len(text) - tail :]


def title(timeline: Timeline) -> str:
    """One line above a picture."""
    where = f"{timeline.labels[timeline.peak_record]} (record {timeline.peak_record})"
    return f"{timeline.program}: arena {timeline.arena_bytes:,} bytes; peak {timeline.peak_bytes:,} at {where}"


def ticks(arena: int) -> list[int]:
    """Round numbers of bytes for an axis, and the arena's size in place of what lies next to it."""
    step = next(s * 10**e for e in range(9) for s in (1, 2, 5) if s * 10**e * 6 >= arena)
    return [at for at in range(0, arena, step) if at == 0 or arena - at > arena / 20] + [arena]


def check(path: Path) -> None:
    """Raise UserError where no picture can be drawn into such a file."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: pictures are drawn as {' or '.join(SUFFIXES)}; name such a file")
    if path.suffix == ".png":
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            fault = "drawing PNG needs the extra: pip install 'ulearn[plot]'; or name an .html file"
            raise UserError(fault) from None


def write(path: Path, read: Report) -> None:
    """Draw a plan's memory into a file, by its suffix. Raises UserError where that is not possible."""
    check(path)
    if path.suffix == ".png":
        from ulearn_host import picture_png

        write_bytes(picture_png.draw(read), path)
    else:
        from ulearn_host import picture_html

        write_bytes(picture_html.draw(read).encode(), path)


def lines(timeline: Timeline, width: int, colors: bool) -> list[Text]:
    """A line for each record, the arena from left to right, `width` characters at most.

    colors: coloured blocks with the tensors' names; else ASCII, a letter for each tensor that the record's line names.
    """
    digits = len(str(len(timeline.labels)))
    number = max(len(f"{timeline.arena_bytes:,}"), 5)
    label = min(_LABEL, max(map(len, timeline.labels)))
    around = digits + 1 + label + 1 + (0 if colors else 2) + 2 + 1 + number + 7
    cells = max(8, min(_MOST_CELLS, width - around))
    row = _colored if colors else _plain
    before = digits + 1 + label + 1 + (0 if colors else 2)
    drawn = [_ruler(timeline, before, cells, number, colors)]
    for at, name in enumerate(timeline.labels):
        line = Text(f"{at:>{digits}} {_fit(name, label, colors)} ")
        line.append_text(row(timeline, at, cells))
        line.append(f" {timeline.alive[at]:>{number},}")
        if at == timeline.peak_record:
            line.append(" ◀ peak" if colors else " < peak", "bold")
        drawn.append(line)
    return drawn


def _fit(name: str, length: int, colors: bool) -> str:
    if not colors:
        name = name.encode("ascii", "replace").decode()
    return middle(name, length, "…" if colors else "..").ljust(length)


def _ruler(timeline: Timeline, before: int, cells: int, number: int, colors: bool) -> Text:
    end = f"{timeline.arena_bytes:,}"
    text = "0" + end.rjust(cells - 1)
    middle_ = " arena, bytes "
    if cells >= len(end) + len(middle_) + 6:
        start = (cells - len(middle_)) // 2
        text = text[:start] + middle_ + text[start + len(middle_) :]
    return Text(" " * before + " " + text + " " + " " + "alive".rjust(number), "dim" if colors else "")


def _owners(timeline: Timeline, at: int, steps: int) -> list[int | None]:
    """Which tensor holds each of `steps` equal parts of the arena once record `at` has written; None: nothing does.

    A tensor too small for a part of its own gets one nevertheless.
    """
    result: list[int | None] = [None] * steps
    alive = [(i, t) for i, t in enumerate(timeline.tensors) if t.first <= at <= t.last]
    arena = max(1, timeline.arena_bytes)
    spans = [(t.offset * steps // arena, t.end * steps // arena, i) for i, t in alive]
    for tiny in (False, True):
        for start, end, i in spans:
            if (start == end) == tiny:
                first = min(start, steps - 1)
                result[first : max(end, first + 1)] = [i] * max(end - first, 1)
    return result


def _plain(timeline: Timeline, at: int, cells: int) -> Text:
    born = [i for i, t in enumerate(timeline.tensors) if t.first == at]
    letters = [_LETTERS[i % len(_LETTERS)] for i in range(len(timeline.tensors))]
    bar = "".join("." if i is None else letters[i] for i in _owners(timeline, at, cells))
    return Text(f"{letters[born[-1]] if born else ' '} |{bar}|")


def _colored(timeline: Timeline, at: int, cells: int) -> Text:
    """Cells of eight parts each: a block ends where the tensor does, to an eighth of a cell, and begins nearly so."""
    owners = _owners(timeline, at, 8 * cells)
    names = _names(timeline, at, owners)
    bar = Text()
    bar.append("▕", "dim")
    for cell in range(cells):
        parts = owners[8 * cell : 8 * cell + 8]
        cut = next((k for k in range(1, 8) if parts[k] != parts[0]), 8)
        behind = next((p for p in reversed(parts) if p not in (None, parts[0])), parts[-1])
        left, right = _color(parts[0]), _color(behind)
        if cut == 8:
            bar.append(names.get(cell, " "), Style(bgcolor=left, color=INK if left else None))
        elif left is None:  # there are but two blocks that stand on the right
            bar.append("█" if cut < 3 else "▐" if cut < 6 else "▕", Style(color=right))
        else:
            bar.append(_EIGHTHS[cut], Style(color=left, bgcolor=right))
    bar.append("▏", "dim")
    return bar


def _color(index: int | None) -> str | None:
    return None if index is None else PALETTE[index % len(PALETTE)]


def _names(timeline: Timeline, at: int, owners: list[int | None]) -> dict[int, str]:
    """Letters by cell: in its first line a tensor's name, or the number of that line where there is no room."""
    result: dict[int, str] = {}
    for i, tensor in enumerate(timeline.tensors):
        if tensor.first != at or i not in owners:
            continue
        start, count = owners.index(i), owners.count(i)
        first, room = -(-start // 8), (start + count) // 8 - -(-start // 8)
        name, number = f" {tensor.name}", str(at)
        text = middle(name, room) if room >= min(len(name), _SHORTEST) else number if room >= len(number) else ""
        result |= {first + k: letter for k, letter in enumerate(text)}
    return result
