"""What `ulearn inspect` shows of a plan, part by part."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.markup import escape
from rich.table import Table

from ulearn_host import display, picture, placement
from ulearn_host.report import Operation, Report, printable

_OPERATION = 17  # letters: average_pool 25×5; what is longer goes on in the next line
_GAP = 2
_BESIDES_TERMINALS = str.maketrans({"×": "x", "→": ">", "▕": "|", "▏": "|", "…": "~"})


def show(read: Report) -> None:
    """Print every part."""
    parts: tuple[Callable[[Report], None], ...] = (summary, programs, trainable, frozen, memory, predicted, identity)
    for part in parts:
        part(read)


def summary(read: Report) -> None:
    """One line: what it is, and what goes in and out."""
    scheme = printable(str(read.meta.get("scheme", "")))
    input_, output = (picture.shape(tuple(end["shape"])) for end in (read.input, read.output))
    loss = f", {read.loss}" if len(read.programs) > 1 else ""
    trains = f"trains '{scheme}'{loss}" if len(read.programs) > 1 else "inference only"
    name = read.path.rpartition("/")[2]
    _print(f"[bold]{escape(name)}[/bold]  int8 {input_} → {output}, {escape(trains)}")


def programs(read: Report) -> None:
    """Each program's operations, and its memory over them."""
    for timeline in read.timelines:
        rows = [_operation(o) for o in read.of(timeline.program)]
        rows.append(["", "in all", "", "", "", f"{read.macs(timeline.program):,}"])
        columns = ["", "layer", "operation", "shape", "weights", "MACs"]
        _narrowed(rows, columns)
        _table(timeline.program, columns, [[escape(cell) for cell in row] for row in rows], numeric=(0, 5))
        _print(f"[bold]memory[/bold] {escape(picture.title(timeline))}")
        console = display.console
        colors = console.is_terminal and console.color_system is not None and not console.no_color and _unicode()
        for line in picture.lines(timeline, console.width, colors):
            console.print(line, no_wrap=True, overflow="crop")
        console.print()


def _operation(o: Operation) -> list[str]:
    stride = "×".join(map(str, o.stride[:1] if len(set(o.stride)) == 1 else o.stride))
    name = f"{o.op} {'×'.join(map(str, o.kernel))}".rstrip() + (f" /{stride}" if stride not in ("", "1") else "")
    shapes = picture.shape(o.input_shape), picture.shape(o.output_shape)
    weights = o.weights.replace(" in", "")
    return [str(o.record), o.name, name, " → ".join(shapes), weights, f"{o.macs:,}" if o.macs else ""]


def _narrowed(rows: list[list[str]], columns: list[str]) -> None:
    """Cut names of layers so that the table fits the console, but not below 9 letters."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    widths[2] = min(widths[2], _OPERATION)
    room = max(9, display.console.width - sum(widths[:1] + widths[2:]) - _GAP * (len(columns) - 1))
    for row in rows:
        row[1] = picture.middle(row[1], room)


def trainable(read: Report) -> None:
    """What a board trains."""
    rows = [
        [escape(t["name"]), t["dtype"], picture.shape(tuple(t["shape"])), display.size(t["bytes"])]
        for t in read.tensors
    ]
    if rows:
        _table("trainable", ["tensor", "kept as", "shape", "bytes"], rows, numeric=(3,))


def frozen(read: Report) -> None:
    """Where the frozen weights may lie, and what that costs."""
    f = read.frozen
    if not f.size:
        return
    rows = [
        ["held in RAM", "a file of a writable file system", f"{f.ram_held:,}", "0"],
        ["in place", "ROMFS, frozen bytes, a buffer", f"{f.ram_in_place:,}", "0"],
        ["streamed", 'a file, with frozen="stream"', f"{f.ram_streamed:,}", f"{f.streamed_bytes:,}"],
    ]
    columns = ["", "where the plan is", "RAM, bytes", "read per inference"]
    _table(f"frozen weights: {f.size:,} bytes", columns, rows, numeric=(2, 3))
    training = "; it serves inference only: training holds them in RAM or in place" if len(read.programs) > 1 else ""
    window = f"streaming needs a window of {f.window_bytes:,} bytes, for record {f.window_record}{training}"
    display.console.print(_plain(window))
    display.console.print()


def memory(read: Report) -> None:
    """RAM by part, and flash."""
    rows = [[name, display.size(value)] for name, value in read.buffers.items()]
    rows += [["RAM in all, code apart", display.size(read.ram_bytes)], ["flash", display.size(read.flash_bytes)]]
    _table("memory (32-bit board, plan loaded from a file)", ["part", "bytes"], rows, numeric=(1,))


def predicted(read: Report) -> None:
    """Of each board: whether the plan fits into its RAM, and how long an inference takes."""
    rows = [
        [
            p.board,
            p.fits,
            "" if p.left_bytes is None else display.size(p.left_bytes),
            "" if p.instructions is None else f"{p.instructions:,}",
            _time(p),
        ]
        for p in placement.predictions(read)
    ]
    columns = ["board", "frozen weights", "RAM left", "instructions", "time"]
    title = "an inference on boards, predicted (--json says where each figure comes from)"
    _table(title, columns, rows, (2, 3, 4))


def _time(p: placement.Prediction) -> str:
    if p.fits == "too large":
        return ""
    if p.instructions is None:
        return "unmeasured"
    reading = " + reading" if p.fits == "streamed" else ""
    return "" if p.seconds is None else display.duration(p.seconds) + reading


def identity(read: Report) -> None:
    """Model id and cuts."""
    cuts = ", ".join(f"{escape(c['name'])} ({c['bytes']:,} bytes)" for c in read.cuts)
    display.console.print(_plain(f"cuts: {cuts or 'none'}"))
    _print(f"model {read.model_id}")


def _table(title: str, columns: list[str], rows: list[list[str]], numeric: tuple[int, ...]) -> None:
    """A table without frames. numeric: columns that are right-aligned."""
    _print(f"[bold]{escape(title)}[/bold]")
    frame = box.SIMPLE_HEAD if _unicode() else box.ASCII
    result = Table(box=frame, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        most = _OPERATION if column == "operation" else None
        result.add_column(column, justify="right" if i in numeric else "left", no_wrap=not most, max_width=most)
    for row in rows:
        result.add_row(*(_plain(cell) for cell in row))
    display.console.print(result)
    display.console.print()


def _print(text: str) -> None:
    display.console.print(_plain(text), soft_wrap=True)


def _unicode() -> bool:
    return display.console.encoding.lower().startswith("utf")


def _plain(text: str) -> str:
    """Text that the output's encoding can hold."""
    if _unicode():
        return text
    return text.translate(_BESIDES_TERMINALS).encode("ascii", "replace").decode()
