"""What `ulearn inspect` shows of a plan, part by part."""

from __future__ import annotations

from collections.abc import Callable

from rich.markup import escape

from ulearn_host import display, picture, placement
from ulearn_host.report import Operation, Report, printable

_OPERATION = 20  # letters: update_depthwise 3×3; what is longer goes on in the next line
_GAP = 2
_SHORTEST, _LONG = 9, 22  # letters of a layer's name
_COLUMNS = ["", "layer", "operation", "shape", "weights", "MACs", "alive"]


def show(read: Report) -> None:
    """Print every part."""
    parts: list[Callable[[Report], None]] = [summary, programs, work, trainable, frozen, memory, predicted, identity]
    for part in parts:
        part(read)


def summary(read: Report) -> None:
    """One line: what it is, and what goes in and out."""
    scheme = printable(str(read.meta.get("scheme", "")))
    input_, output = (picture.shape(tuple(end["shape"])) for end in (read.input, read.output))
    loss = f", {read.loss}" if read.trains else ""
    trains = f"trains '{scheme}'{loss}" if read.trains else "inference only"
    name = read.path.rpartition("/")[2]
    display.text(f"[bold]{escape(name)}[/bold]  int8 {input_} → {output}, {escape(trains)}")


def programs(read: Report) -> None:
    """Each program's operations, and its memory over them; of a training program what comes behind the forward pass."""
    for timeline in read.timelines:
        operations = read.of(timeline.program)
        ahead = 0
        if timeline.program != "forward":
            ahead = next((i for i, o in enumerate(operations) if o.name == "loss"), 0)
        rows = [_ahead(operations[:ahead])] if ahead else []
        rows += [_operation(o) for o in operations[ahead:]]
        rows.append(["", "in all", "", "", "", f"{read.macs(timeline.program):,}", f"{timeline.peak_bytes:,}"])
        columns = _narrowed(rows, [_rows(o) for o in operations[ahead:]])
        _table(timeline.program, columns, [[escape(cell) for cell in row] for row in rows], numeric=(0, 5, 6))
        display.text(f"[bold]memory[/bold] {escape(picture.title(timeline))}")
        console = display.console
        colors = console.is_terminal and console.color_system is not None and not console.no_color and display.unicode()
        for line in picture.lines(timeline, console.width, colors):
            console.print(line, no_wrap=True, overflow="crop")
        console.print()


def _ahead(operations: list[Operation]) -> list[str]:
    """One row for the forward pass of a training program."""
    masks = sum(o.role == "mask" for o in operations)
    shape = "" if not masks else "1 mask" if masks == 1 else f"{masks} masks"
    macs, alive = sum(o.macs for o in operations), max(o.alive_bytes for o in operations)
    return ["", "forward", f"records 0–{len(operations) - 1}", shape, "", f"{macs:,}", f"{alive:,}"]


def _operation(o: Operation) -> list[str]:
    stride = "×".join(map(str, o.stride[:1] if len(set(o.stride)) == 1 else o.stride))
    strides = stride not in ("", "1") and o.output_shape[:2] != (1, 1)
    name = f"{o.op} {'×'.join(map(str, o.kernel))}".rstrip() + (f" /{stride}" if strides else "")
    weights = o.weights.replace(" in ", " ").replace(", ", "\n")
    macs = f"{o.macs:,}" if o.macs else ""
    return [str(o.record), o.name, name, picture.shapes(o), weights, macs, f"{o.alive_bytes:,}"]


def _rows(o: Operation) -> str:
    """Which output channels an operation is about, where these are not all."""
    first, last, whole = o.rows
    return "" if last - first == whole else f" [{first}:{last}]"


def _narrowed(rows: list[list[str]], behind: list[str]) -> list[str]:
    """The columns that fit the console. Names of layers are cut where they must be, but not below 9 letters; the last
    column goes first: the picture shows it, too. behind: what is added to the names of the last rows but one."""
    added = [""] * (len(rows) - 1 - len(behind)) + behind + [""]
    longest = max(len(row[1] + more) for row, more in zip(rows, added, strict=True))
    for keep in (7, 6):
        widths = [max(len(line) for row in [_COLUMNS, *rows] for line in row[i].split("\n")) for i in range(keep)]
        widths[2] = min(widths[2], _OPERATION)
        room = display.console.width - sum(widths[:1] + widths[2:]) - _GAP * (keep - 1)
        if room >= min(longest, _LONG):
            break
    for row, more in zip(rows, added, strict=True):
        row[1] = picture.middle(row[1], max(_SHORTEST, room - len(more))) + more
        del row[keep:]
    return _COLUMNS[:keep]


def work(read: Report) -> None:
    """What a training step costs beside an inference."""
    if not read.trains:
        return
    rows = []
    for timeline in read.timelines:
        program, ratio = timeline.program, read.ratio(timeline.program)
        times = f"{ratio:.2f} ×" if ratio and program != "forward" else ""
        counts = f"{len(timeline.labels):,}", f"{read.macs(program):,}", times, f"{timeline.arena_bytes:,}"
        rows.append([escape(program), *counts])
    columns = ["program", "records", "MACs", "of an inference", "arena, bytes"]
    _table("a training step, beside an inference", columns, rows, numeric=(1, 2, 3, 4))


def trainable(read: Report) -> None:
    """What a board trains."""
    rows = [
        [
            escape(t["name"]),
            t["dtype"],
            picture.shape(tuple(t["shape"])) if t["dtype"] != "int32" else str(t["shape"][0]),
            _channels(t["first_row"], t["shape"][0], t["layer_rows"]),
            display.size(t["bytes"]),
        ]
        for t in read.tensors
    ]
    if rows:
        rows.append(["in all", "", "", "", display.size(sum(t["bytes"] for t in read.tensors))])
        _table("trainable", ["tensor", "kept as", "shape", "channels of the layer", "bytes"], rows, numeric=(4,))


def _channels(first: int | None, count: int, whole: int | None) -> str:
    if first is None or whole is None:
        return "none"
    return f"all {whole}" if count == whole else f"{first}–{first + count - 1} of {whole}"


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
    window = f"streaming needs a window of {f.window_bytes:,} bytes, for record {f.window_record}"
    display.console.print(display.plain(window))
    display.console.print()


def memory(read: Report) -> None:
    """RAM by part, and flash."""
    rows = [[name, display.size(value)] for name, value in read.buffers.items()]
    module = read.modules[0]
    code = placement.code_bytes(module, read.trains, False)
    rows += [["RAM in all, code apart", display.size(read.ram_bytes)]]
    rows += [[f"code on an RP2040: package, {module}", display.size(code)], ["flash", display.size(read.flash_bytes)]]
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
    display.console.print(display.plain(f"cuts: {cuts or 'none'}"))
    display.text(f"model {read.model_id}")


def _table(title: str, columns: list[str], rows: list[list[str]], numeric: tuple[int, ...]) -> None:
    display.plain_table(title, columns, rows, numeric, {"operation": _OPERATION})
