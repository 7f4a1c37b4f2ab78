"""The commands around boards: what is plugged in, firmware, emulated boards, samples from a board's sensor."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ulearn_host import display
from ulearn_host.errors import UserError
from ulearn_host.link import LinkError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def paragraphs(command: Callable[..., Any]) -> str:
    """A docstring's paragraphs, each in one line: typer would keep the line ends."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n"))


def register(app: typer.Typer) -> None:
    """Add the commands to the `ulearn` command."""
    app.command(
        epilog="Examples:  ulearn boards   |   ulearn boards --port /dev/ttyACM0 --port /dev/pts/3   |   "
        "ulearn boards --json",
    )(boards)
    app.command(
        epilog="Examples:  ulearn flash --board ESP32_GENERIC_S3 --port /dev/ttyUSB0 ESP32_GENERIC_S3.bin   |   "
        "ulearn flash --board RPI_PICO --port /dev/ttyACM0 RPI_PICO.uf2   |   "
        "ulearn flash --board RPI_PICO2 --drive /media/me/RP2350 RPI_PICO2.uf2",
    )(flash)
    app.command(
        name="emulate",
        epilog="Examples:  ulearn emulate UNIX --count 3   |   ulearn emulate QEMU_CORTEX_M0 --json   |   "
        "and in another terminal:  ulearn boards",
    )(emulate_boards)
    app.command(
        epilog="Examples:  ulearn collect -p /dev/ttyACM0 --labels rest,walk,run --out steps.npz --count 50 --rate 2   "
        "|   ulearn collect -p /dev/ttyACM0 --labels jump --out steps.npz --append   |   "
        "ulearn collect -p /dev/pts/3 --playback steps.npz",
    )(collect)


def boards(
    port: Annotated[
        list[str] | None,
        typer.Option(
            "--port", "-p", help="Ask only there; may be repeated. Without it: all USB ports, emulated boards."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.5, max=60, help="Seconds that a port may take to answer.")] = 3.0,
    as_json: Json = False,
) -> None:
    """List the boards that are plugged in, and what is on them.

    A program that runs on a board is interrupted (its prompt is used), and the list says so; a soft reset starts it
    again. A board that serves ulearn's agent goes on serving. Nothing is written or erased. Bytes go to every USB
    serial port: where something else than a board must not be disturbed, name the boards with --port.
    """
    from ulearn_host import boards as asking

    places = asking.named(port) if port else asking.find()
    with display.steps() as steps:
        if places:
            asked = sum(place.state != "bootloader" for place in places)
            asking.probe(places, timeout, steps.counter(f"asking {asked} port{'s' * (asked != 1)}", asked))
    if as_json:
        print(json.dumps([place.as_json() for place in places]))
        return
    if not places:
        display.errors.print("no board is plugged in or emulated; a port that is no USB port is named by --port")
        return
    width = max(len(place.port) for place in places)
    for place in places:
        for i, line in enumerate(asking.lines(place)):
            display.console.print(f"{'' if i else place.port:{width}}  {line}", markup=False, soft_wrap=True)
    for place in places:
        if place.interrupted:
            display.errors.print(
                f"note: {place.port}: a running program was interrupted; reset the board to start it again",
                markup=False,
                soft_wrap=True,
            )


def flash(
    firmware: Annotated[Path, typer.Argument(help="MicroPython for the board: .bin for ESP32, .uf2 for RP2.")],
    board: Annotated[str, typer.Option("--board", help="Name as on micropython.org, e.g. RPI_PICO, ESP32_GENERIC_S3.")],
    port: Annotated[
        str | None,
        typer.Option("--port", "-p", help="Serial port; on an RP2 one where MicroPython runs, else use BOOTSEL."),
    ] = None,
    drive: Annotated[
        Path | None, typer.Option(help="Where an RP2's bootloader is mounted; default: found by its INFO_UF2.TXT.")
    ] = None,
    erase: Annotated[
        bool, typer.Option("--erase", help="ESP32: erase all of the flash first, the board's files included.")
    ] = False,
    baud: Annotated[int, typer.Option(min=9600, max=4_000_000, help="ESP32: bits a second while writing.")] = 460800,
    timeout: Annotated[float, typer.Option(min=1, max=300, help="Seconds for the board to answer or appear.")] = 20.0,
    as_json: Json = False,
) -> None:
    """Put MicroPython on a board, after a check of the file and of the chip.

    ESP32: by esptool, which asks the chip first. RP2: the file is copied to the drive of the bootloader, which a board
    with MicroPython is brought to by --port, any other by holding BOOTSEL while it is plugged in.
    """
    from ulearn_host import firmware_file, flash_drive
    from ulearn_host import flash as flashing

    facts = flashing.board_named(board)
    chip = facts.chip
    checked = firmware_file.read(firmware, chip, facts.flash_bytes)
    if isinstance(chip, firmware_file.EspChip):
        if drive:
            raise UserError(f"--drive is for RP2 boards, and {board} has an {chip.name}; give --port")
        if not port:
            raise UserError(f"{board} is flashed over a serial port; give --port, e.g. --port /dev/ttyUSB0")
        with display.steps() as steps:
            flashing.flash_esp(checked, chip, port, erase=erase, baud=baud, timeout_s=timeout, bar=steps.bar)
        where = port
    else:
        if erase:
            raise UserError(f"--erase is for ESP32 boards; on a {chip.name} the file says what is written")
        with display.steps() as steps:
            place = None
            if port:
                flashing.to_bootloader(port, chip, drive, timeout)
                steps.bar(f"waiting for the drive of {chip.name}")
            else:
                place = flashing.find_drive(chip, drive)
            place = place or flashing.wait_for_drive(chip, drive, timeout if port else 0)
            flash_drive.copy(checked.data, place, firmware.name, steps.bar(f"writing {firmware.name} to {place.path}"))
        where = str(place.path)
    if as_json:
        print(json.dumps({"board": board, "chip": chip.name, "where": where, "bytes": len(checked.data)}))
        return
    display.console.print(
        f"{where}: {firmware.name} is there ({len(checked.data):,} bytes)", markup=False, soft_wrap=True
    )


def emulate_boards(
    board: Annotated[list[str], typer.Argument(metavar="BOARD...", help="UNIX, QEMU_CORTEX_M0, QEMU_CORTEX_M3, ...")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=64, help="How many of each.")] = 1,
    as_json: Json = False,
) -> None:
    """Start emulated boards and print a port for each; Ctrl-C or SIGTERM ends them.

    Every other command works on such a port as on that of a plugged-in board, from another terminal or a script, and
    `ulearn boards` lists them. With --json: one object a line, as soon as all boards answer.
    """
    from ulearn_host import running

    names = [name for name in running.check(board) for _ in range(count)]

    def ready(started: Any) -> None:
        for one in started:
            if as_json:
                print(json.dumps(vars(one)), flush=True)
            else:
                print(f"{one.board}  {one.port}", flush=True)
        if not as_json:
            display.errors.print("Ctrl-C ends them; `ulearn boards` shows what is on them")

    with display.steps() as steps:
        tick = steps.counter("starting", len(names))
        running.keep(names, ready, tick)


def collect(
    port: Annotated[str, typer.Option("--port", "-p", help="Serial port of the board, e.g. /dev/ttyACM0.")],
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Names of the classes to record, one after the other.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="NPZ", help="Where to write the samples.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1_000_000, help="Samples of each label.")] = 20,
    rate: Annotated[
        float | None, typer.Option(min=0.01, max=10000, help="Samples a second; default: as fast as they come.")
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Add to the samples that the file has.")] = False,
    countdown: Annotated[int, typer.Option(min=0, max=60, help="Seconds before each label begins.")] = 3,
    module: Annotated[str, typer.Option(metavar="NAME", help="The board's module with read(x).")] = "sensor",
    playback: Annotated[
        Path | None,
        typer.Option(metavar="NPZ", help="Put this recording on the board instead, as a module that plays it."),
    ] = None,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", min=0, help="With --playback: in another order than recorded.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, max=300, help="Seconds that one sample may take.")] = 15.0,
    as_json: Json = False,
) -> None:
    """Record labelled samples from a board's own sensor code into an npz, or play such a recording back.

    The board has a module (sensor.py) with SHAPE, e.g. (64,) or (16, 6); DTYPE: int8, uint8, int16, int32 or float32;
    and read(x), which fills x, an array of that type that is made once. With SCALE (and ZERO_POINT) there, x is kept in
    real units: (code - ZERO_POINT) * SCALE. The program that runs on the board is interrupted and its heap emptied by a
    soft reset. The file goes into `ulearn prepare --calibration` and `ulearn train --data` as it is; Ctrl-C keeps what
    is recorded.

    --playback puts a sensor.py on the board that gives a recording's samples in its place, again and again: read(x)
    fills x and returns the label's number, read() returns both.
    """
    from ulearn_host import collect as recording

    if playback:
        given = {"--labels": labels, "--out": out, "--append": append, "--rate": rate}
        for name, value in given.items():
            if value:
                raise UserError(f"{name} belongs to recording and --playback plays; give one of the two")
        played = recording.tape(playback, shuffle)
        with display.steps() as steps:
            tick = steps.bar(f"putting {len(played.raw)} samples on {port}")
            size = recording.play_back(port, module, played, timeout, tick)
        if as_json:
            print(json.dumps({"port": port, "module": module, "samples": len(played.raw), "bytes": size}))
            return
        display.console.print(
            f"{port}: {module}.py plays {len(played.raw)} samples ({size:,} bytes)", markup=False, soft_wrap=True
        )
        return
    if shuffle is not None:
        raise UserError("--shuffle belongs to --playback; a recording keeps the order it was made in")
    names = _names(labels)
    if out is None:
        raise UserError("where to write the samples is missing; give --out, e.g. --out samples.npz")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no such folder")
    if out.is_dir():
        raise UserError(f"{out}: is a folder, expected a file, e.g. samples.npz")
    if out.exists() and not append:
        raise UserError(f"{out}: is there already; add to it with --append, or name another file with --out")
    old = recording.read(out) if out.exists() else None
    _record(port, names, out, old, count, rate, countdown, module, timeout, as_json)


def _names(labels: str | None) -> list[str]:
    names = [name.strip() for name in (labels or "").split(",")]
    if not labels or not all(names):
        raise UserError("the classes to record are missing; give their names, e.g. --labels rest,walk,run")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--labels has {twice} twice, expected each name once")
    return names


def _record(
    port: str,
    names: list[str],
    out: Path,
    old: Any,
    count: int,
    rate: float | None,
    countdown: int,
    module: str,
    timeout: float,
    as_json: bool,
) -> None:
    import numpy as np

    from ulearn_host import collect as recording

    raw: list[Any] = []
    y: list[int] = []
    rates: list[float] = []
    stopped: BaseException | None = None
    with recording.Recorder(port, module, rate, timeout) as board:
        sensor = board.sensor
        if old:
            recording.check_same(old, out, sensor)
        board.begin()
        try:
            with display.steps() as steps:
                for index, name in enumerate(names):
                    _count_down(name, countdown)
                    tick = steps.bar(f"recording {name}", count)
                    begun = 0.0
                    for done in range(count):
                        raw.append(board.sample())
                        y.append(index)
                        begun = begun or time.monotonic()
                        tick(done + 1, count)
                    rates.append((count - 1) / max(1e-9, time.monotonic() - begun))
        except (KeyboardInterrupt, UserError) as fault:
            stopped = fault
    if raw:
        x = sensor.real(np.stack(raw))
        new = recording.Recording(x, np.array(y, np.int64), tuple(names), sensor, rate or 0.0)
        whole = recording.joined(old, out, names, new)
        recording.write(out, whole)
    kept = f"{len(raw)} samples were kept in {out}" if raw else "nothing was recorded"
    if isinstance(stopped, UserError):
        raise (
            type(stopped)(f"{stopped}; {kept}")
            if not isinstance(stopped, LinkError)
            else UserError(f"{stopped}; {kept}")
        )
    if stopped is not None:
        display.errors.print(f"interrupted: {kept}", markup=False, soft_wrap=True)
        raise typer.Exit(130)
    achieved = min(rates)
    if rate and count > 2 and achieved < 0.95 * rate:
        display.errors.print(
            f"note: {achieved:.3g} samples a second came, {rate:g} were asked for: the sensor or the line is slower",
            markup=False,
            soft_wrap=True,
        )
    if as_json:
        facts = {"file": str(out), "shape": list(sensor.shape), "dtype": sensor.dtype, "recorded": len(raw)}
        print(json.dumps({**facts, "samples": len(whole.x), "labels": whole.counts(), "rate": achieved}))
        return
    rows = [
        [name, str(y.count(names.index(name)) if name in names else 0), str(n)] for name, n in whole.counts().items()
    ]
    title = f"{out}: {len(whole.x)} samples of {' × '.join(map(str, sensor.shape))} numbers, {sensor.dtype}"
    display.plain_table(title, ["label", "new", "all"], rows, (1, 2), {})


def _count_down(name: str, seconds: int) -> None:
    for left in range(seconds, 0, -1):
        if left == seconds or display.errors.is_terminal:
            display.errors.print(f"{name} in {left} s", markup=False)
        time.sleep(1)
