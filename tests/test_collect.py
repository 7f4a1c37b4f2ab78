"""`ulearn collect` on real boards over real ports: what a sensor gave is what the file holds, and what plays back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import bench
import code_heap
from conftest import Device
from test_cli import run
from ulearn_host import cli, collect, deploy, emulate
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError

COMMAND = [sys.executable, "-m", "ulearn_host.cli", "collect"]


@pytest.fixture(scope="module")
def unix() -> Iterator[emulate.EmulatedBoard]:
    with emulate.start("UNIX") as board:
        yield board


def put_sensor(port: str, folder: Path, code: str, name: str = "sensor") -> None:
    """The user's own module on a board, in the place of any other."""
    (folder / f"{name}.py").write_text(code)
    deploy.mpremote(port, "fs", "cp", str(folder / f"{name}.py"), ":")


COUNTING = """
SHAPE = (4, 3)
DTYPE = "int16"
n = 0
def read(x):
    global n
    print("reading", n)
    for i in range(12):
        x[i] = 100 * n + i - 50
    n += 1
"""


def counted(first: int, count: int) -> np.ndarray:
    return (100 * np.arange(first, first + count)[:, None] + np.arange(12) - 50).reshape(-1, 4, 3)


def quick(*arguments: object) -> str:
    """A command that works, run in this process; what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["ulearn", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return printed.getvalue()


def record(port: str, out: Path, *arguments: object, labels: str = "rest,walk", count: int = 5) -> dict[str, object]:
    command = ["collect", "-p", port, "--labels", labels, "-o", out, "-n", count, "--countdown", 0, "--json"]
    facts: dict[str, object] = json.loads(quick(*command, *arguments))
    return facts


def test_samples_are_recorded(unix: emulate.EmulatedBoard, tmp_path: Path) -> None:
    """In order, by label, in its type; a print in read() does no harm; --append adds labels and samples."""
    put_sensor(unix.port, tmp_path, COUNTING)
    out = tmp_path / "steps.npz"
    facts = record(unix.port, out)
    assert facts["labels"] == {"rest": 5, "walk": 5} and facts["shape"] == [4, 3] and facts["dtype"] == "int16"
    with np.load(out) as data:
        assert data["x"].dtype == np.int16 and np.array_equal(data["x"], counted(0, 10))
        assert data["y"].tolist() == [0] * 5 + [1] * 5 and data["labels"].tolist() == ["rest", "walk"]
    facts = record(unix.port, out, "--append", labels="walk,run", count=2)
    assert facts["labels"] == {"rest": 5, "walk": 7, "run": 2} and facts["recorded"] == 4
    with np.load(out) as data:
        assert data["y"].tolist() == [0] * 5 + [1] * 5 + [1] * 2 + [2] * 2
        assert np.array_equal(data["x"][10:], counted(0, 4))  # a soft reset has begun the module anew
    assert [path.name for path in tmp_path.glob("steps*")] == ["steps.npz"]


def test_at_a_rate(unix: emulate.EmulatedBoard, tmp_path: Path) -> None:
    put_sensor(unix.port, tmp_path, COUNTING)
    with collect.Recorder(unix.port, "sensor", 20, 15) as board:
        board.begin()
        board.sample()
        begun = time.monotonic()
        for _ in range(40):
            board.sample()
        assert 1.8 < time.monotonic() - begun < 3


TYPES = {
    "int8": (np.int8, (70,), ""),
    "uint8": (np.uint8, (5, 6, 3), ""),
    "int16": (np.int16, (16, 6), ""),
    "int32": (np.int32, (3,), ""),
    "float32": (np.float32, (9, 2), ""),
    "int16 of two frames and a half": (np.int16, (1280,), ""),
    "int8 of just one frame": (np.int8, (32, 32), ""),
    "int8 with a scale": (np.int8, (20,), "SCALE = 0.05\nZERO_POINT = -7\n"),
    "int16 with a scale": (np.int16, (16, 3), "SCALE = 0.00390625\n"),
}


ON_CORTEX_M0 = ("int16 of two frames and a half", "float32", "int8 with a scale")


@pytest.mark.parametrize(
    ("device", "name"), [*(("UNIX", name) for name in TYPES), *(("QEMU_CORTEX_M0", name) for name in ON_CORTEX_M0)]
)
def test_what_was_recorded_plays(
    request: pytest.FixtureRequest, unix: emulate.EmulatedBoard, tmp_path: Path, device: str, name: str
) -> None:
    """A sensor's signal is recorded, the recording is put on a board, recorded again there, and is the same."""
    port = unix.port if device == "UNIX" else request.getfixturevalue("cortex_m0").port
    dtype, shape, scale = TYPES[name]
    rng = np.random.default_rng(7)
    if dtype == np.float32:
        raw = rng.normal(size=(6, *shape)).astype(np.float32)
    else:
        limits = np.iinfo(dtype)
        raw = rng.integers(limits.min, limits.max, (6, *shape), endpoint=True).astype(dtype)
    (tmp_path / "signal.bin").write_bytes(raw.tobytes())
    sensor = f"f = open('signal.bin', 'rb')\nSHAPE = {shape}\nDTYPE = '{np.dtype(dtype).name}'\n{scale}"
    put_sensor(port, tmp_path, sensor + "def read(x):\n f.readinto(x)\n", "own")
    deploy.mpremote(port, "fs", "cp", str(tmp_path / "signal.bin"), ":")
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    record(port, first, "--module", "own", count=3)
    quick("collect", "-p", port, "--playback", first, "--module", "tape")
    record(port, second, "--module", "tape", count=3)
    a, b = collect.read(first), collect.read(second)
    assert np.array_equal(a.x, b.x) and a.x.dtype == b.x.dtype and np.array_equal(a.y, b.y) and a.sensor == b.sensor
    if not scale:
        assert np.array_equal(a.x, raw) and a.x.dtype == dtype
    else:
        zero, step = a.sensor.zero_point, a.sensor.scale
        assert a.x.dtype == np.float32 and step
        assert np.allclose(a.x, (raw.astype(float) - zero) * step, rtol=1e-6)
        assert np.array_equal(collect.tape(first).raw, raw)


@contextmanager
def bad_line(port: str) -> Iterator[tuple[str, threading.Event]]:
    """A port that leads to a board; with the event set, it damages and loses bytes in both directions."""
    master, slave = os.openpty()
    tty.setraw(slave)
    far = os.open(port, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(far)
    damaging, ending = threading.Event(), threading.Event()
    rng = np.random.default_rng(5)

    def relay() -> None:
        while not ending.is_set():
            for source in select.select([master, far], [], [], 0.05)[0]:
                data = bytearray(os.read(source, 4096))
                if damaging.is_set():
                    for i in np.flatnonzero(rng.random(len(data)) < (0.001 if source == far else 0.01)):
                        data[i] ^= int(rng.integers(1, 256)) if source == far else 0x40
                    if rng.random() < 0.03:
                        del data[: len(data) // 2]
                target = far if source == master else master
                while data:
                    data = data[os.write(target, data) :]

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        yield os.ttyname(slave), damaging
    finally:
        ending.set()
        thread.join()
        for descriptor in (master, slave, far):
            os.close(descriptor)


def test_a_bad_line_loses_nothing(unix: emulate.EmulatedBoard, tmp_path: Path) -> None:
    """Damaged and lost bytes cost repetitions; every sample is read once, and right."""
    put_sensor(unix.port, tmp_path, COUNTING.replace('    print("reading", n)\n', ""))
    with bad_line(unix.port) as (port, damaging):
        with collect.Recorder(port, "sensor", None, 30) as board:
            board.begin()
            damaging.set()
            got = np.stack([board.sample() for _ in range(100)])
            damaging.clear()
            assert board.repeats > 3
        assert np.array_equal(got, counted(0, 100))
    assert deploy.mpremote(unix.port, "exec", "print(1)").strip() == "1"


@pytest.mark.parametrize("device", ["UNIX", "QEMU_CORTEX_M0"])
def test_ctrl_c_keeps_what_is_there(
    request: pytest.FixtureRequest, unix: emulate.EmulatedBoard, tmp_path: Path, device: str
) -> None:
    port = unix.port if device == "UNIX" else request.getfixturevalue("cortex_m0").port
    put_sensor(port, tmp_path, COUNTING)
    out = tmp_path / "cut.npz"
    command = [
        *COMMAND,
        "-p",
        port,
        "--labels",
        "a,b",
        "-o",
        str(out),
        "-n",
        "1000",
        "--countdown",
        "0",
        "--rate",
        "20",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr and "recording a" in process.stderr.readline()
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "Traceback" not in said
    kept = collect.read(out)
    assert 3 < len(kept.x) < 100 and np.array_equal(kept.x, counted(0, len(kept.x)))
    assert f"{len(kept.x)} samples were kept" in said and kept.labels == ("a", "b")
    assert deploy.mpremote(port, "exec", "print(1)").strip() == "1"  # the board is at its prompt


def test_a_sensor_that_fails_midway(unix: emulate.EmulatedBoard, tmp_path: Path) -> None:
    """The board's own words are told, and what came before is kept."""
    put_sensor(unix.port, tmp_path, COUNTING + "    if n == 5: raise OSError(19)\n")
    out = tmp_path / "some.npz"
    done = run("collect", "-p", unix.port, "--labels", "a", "-o", out, "--countdown", 0, fails=True)
    assert "sensor.read(x) failed: OSError" in done.stderr and f"4 samples were kept in {out}" in done.stderr
    assert len(collect.read(out).x) == 4
    assert deploy.mpremote(unix.port, "exec", "print(1)").strip() == "1"


BAD_SENSORS = {
    "read": "SHAPE = (3,)\nDTYPE = 'int8'\n",
    "SHAPE, DTYPE": "def read(x): pass\n",
    "DTYPE is int64": "SHAPE = (3,)\nDTYPE = 'int64'\ndef read(x): pass\n",
    "SHAPE is (0,)": "SHAPE = (0,)\nDTYPE = 'int8'\ndef read(x): pass\n",
    "SHAPE is (2000000,)": "SHAPE = 2000000\nDTYPE = 'int8'\ndef read(x): pass\n",
    "SCALE is 0": "SHAPE = 3\nDTYPE = 'int8'\nSCALE = 0\ndef read(x): pass\n",
    "IndentationError": "def read(x):\n",
    "broken at import": "raise ValueError('broken at import')\n",
}


@pytest.mark.parametrize("word", BAD_SENSORS)
def test_a_sensor_that_is_none(
    unix: emulate.EmulatedBoard, tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put_sensor(unix.port, tmp_path, BAD_SENSORS[word])
    out = tmp_path / "never.npz"
    line = told(capsys, "collect", "-p", unix.port, "--labels", "a", "-o", out, "--countdown", 0)
    assert word in line.replace("SyntaxError", "IndentationError") and line.startswith("error: "), line
    assert not out.exists()


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The last line of a command that cannot work, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ulearn", *map(str, arguments)])
        assert cli.main() == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_mistakes_are_answered_in_one_sentence(
    unix: emulate.EmulatedBoard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with what to do, and no file changed."""
    put_sensor(unix.port, tmp_path, COUNTING)
    out, there, other, wide = (tmp_path / name for name in ("new.npz", "there.npz", "other.npz", "wide.npz"))
    record(unix.port, there)
    np.savez(other, x=np.zeros((3, 4)))
    put_sensor(unix.port, tmp_path, COUNTING.replace("(4, 3)", "(12,)"), "flat")
    np.savez(wide, x=np.zeros((2, 3)), y=np.zeros(5, int))
    port = ("-p", unix.port)
    recording = (*port, "--countdown", 0, "-o", out)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for command, word in (
        ((*port, "-o", out), "--labels"),
        ((*recording, "--labels", "a,,b"), "--labels"),
        ((*recording, "--labels", "a,a"), "a twice"),
        ((*port, "--labels", "a"), "--out"),
        ((*port, "--labels", "a", "-o", tmp_path / "none" / "x.npz"), "no such folder"),
        ((*port, "--labels", "a", "-o", tmp_path), "a folder"),
        ((*port, "--labels", "a", "-o", there), "--append"),
        ((*port, "--labels", "a", "-o", other, "--append"), "lacks y"),
        ((*port, "--labels", "a", "-o", there, "--append", "--module", "flat"), "have shape (4, 3), the board's (12,)"),
        ((*recording, "--labels", "a", "--module", "nothing"), "no module named 'nothing'"),
        ((*recording, "--labels", "a", "--module", "a b"), "--module"),
        ((*recording, "--labels", "a", "--shuffle", 1), "--playback"),
        (("-p", "/dev/ttyNOWHERE", "--labels", "a", "-o", out), "/dev/ttyNOWHERE"),
        ((*port, "--playback", there), "sensor.py on the board is your own"),
        ((*port, "--playback", there, "--labels", "a"), "--labels"),
        ((*port, "--playback", tmp_path / "missing.npz"), "no such file"),
        ((*port, "--playback", wide), "as many of both"),
        ((*port, "--playback", there, "--module", "a.b"), "--module"),
    ):
        line = told(capsys, "collect", *command)
        assert word in line and line.startswith("error: "), (command, line)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_silent_port(tmp_path: Path) -> None:
    master, slave = os.openpty()
    begun = time.monotonic()
    command = ("collect", "-p", os.ttyname(slave), "--labels", "a", "-o", tmp_path / "x.npz", "--timeout", 2)
    assert "no MicroPython prompt answers within 2 s" in run(*command, fails=True).stderr
    assert time.monotonic() - begun < 10
    os.close(master)
    os.close(slave)


def test_a_file_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sensor = collect.Sensor((2,), "int8")
    recording = collect.Recording(np.ones((3, 2), np.int8), np.zeros(3, np.int64), ("a",), sensor)
    path = tmp_path / "s.npz"
    collect.write(path, recording)
    before = path.read_bytes()

    def full(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError):
        collect.write(path, recording)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_any_npz_plays(tmp_path: Path) -> None:
    """Of whole numbers in the smallest type, of others as float; words are labels; vectors are none; order by seed."""
    path = tmp_path / "any.npz"
    np.savez(path, x=np.arange(12).reshape(6, 2), y=np.array(["b", "a", "a", "b", "c", "a"]))
    tape = collect.tape(path)
    assert tape.raw.dtype == np.int8 and tape.labels == ("a", "b", "c") and tape.y.tolist() == [1, 0, 0, 1, 2, 0]
    mixed = collect.tape(path, shuffle=3)
    assert not np.array_equal(mixed.raw, tape.raw)
    order = mixed.raw[:, 0] // 2
    assert np.array_equal(mixed.y, tape.y[order]) and sorted(order) == list(range(6))
    for x, y, dtype in (
        (np.array([[200, 0]]), np.array([[0.5]]), "uint8"),
        (np.array([[-200, 0]]), None, "int16"),
        (np.array([[70000, 0]]), None, "int32"),
        (np.array([[0.5, 0]]), None, "float32"),
    ):
        np.savez(path, x=x, **({} if y is None else {"y": y}))
        assert collect.tape(path).raw.dtype == dtype and collect.tape(path).y.tolist() == [65535]
    with pytest.raises(UserError, match="scalar|shape"):
        np.savez(path, x=np.float64(3))
        collect.tape(path)


def test_the_same_loop_learns_from_a_recording(cortex_m0: Device, tmp_path: Path) -> None:
    """The README's MicroPython, unchanged, on the Cortex-M0, from samples that are played back."""
    x, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "digits.npz", x=(x[:40] * 8 - 64).astype(int), y=y[:40])
    run("collect", "-p", cortex_m0.port, "--playback", tmp_path / "digits.npz", "--module", "player", "--shuffle", 1)
    code = re.search(r"```python\n(import ulearn\n.*?)```", bench.README.read_text(), re.S)
    assert code
    (tmp_path / "digits.ulm").write_bytes(compile_plan(code_heap.perceptron(), Options("last+bias")).data)
    lines = code.group(1).replace("import sensor", "import player as sensor").replace("range(200)", "range(60)")
    (tmp_path / "lines.py").write_text(lines)
    cortex_m0.put(tmp_path / "digits.ulm", tmp_path / "lines.py")
    assert cortex_m0.fresh("import lines")[-1].isdigit()
    ask = (
        "import player\nx = bytearray(64)\nprint([player.read(x) for _ in range(41)])\nprint(list(x)[:8], player.COUNT)"
    )
    labels, last = cortex_m0.fresh(ask)[-2:]
    played = collect.tape(tmp_path / "digits.npz", shuffle=1)
    assert json.loads(labels) == [*played.y.tolist(), int(played.y[0])]
    assert last == f"{played.raw[0].view(np.uint8)[:8].tolist()} 40"


def test_a_recording_prepares_and_trains(unix: emulate.EmulatedBoard, tmp_path: Path) -> None:
    """The file goes into `prepare --calibration`, `train --data` and `evaluate --data` as it is."""
    x, y = load_digits(return_X_y=True)
    order = np.argsort(y[:200], kind="stable")
    np.savez(tmp_path / "source.npz", x=(x[:200] / 16)[order], y=y[:200][order])
    quick("collect", "-p", unix.port, "--playback", tmp_path / "source.npz", "--module", "digits")
    counts = np.bincount(y[:200])
    mine = tmp_path / "mine.npz"
    facts = record(unix.port, mine, "--module", "digits", labels="zero", count=int(counts[0]))
    assert facts["dtype"] == "float32"
    with collect.Recorder(unix.port, "digits", None, 15) as board:
        board.begin()
        whole = np.stack([board.sample() for _ in range(200)])
    assert np.array_equal(whole, ((x[:200] / 16)[order]).astype(np.float32))
    names = tuple(str(i) for i in range(10))
    collect.write(mine, collect.Recording(whole, y[:200][order], names, collect.Sensor((64,), "float32")))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "net.npz", w0=rng.normal(size=(64, 10)) / 8, b0=np.zeros(10))
    run("prepare", tmp_path / "net.npz", "--calibration", mine, "--labels", ",".join(names))
    run("deploy", tmp_path / "net.ulm", "--port", unix.port)
    learned = json.loads(run("train", tmp_path / "net.ulm", "-p", unix.port, "--data", mine, "--json").stdout)
    assert learned["after"] > learned["before"] + 0.3
    score = json.loads(run("evaluate", tmp_path / "net.ulm", "-p", unix.port, "--data", mine, "--json").stdout)
    assert score["samples"] == 200
