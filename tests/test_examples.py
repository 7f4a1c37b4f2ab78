"""firmware/examples/: the loop learns from a recording on emulated boards; the drivers do their arithmetic right."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neural_network import MLPClassifier

from conftest import HERE, ON_DEBIAN, Device
from test_bits import FIRMWARE, micropython
from ulearn_host import emulate
from ulearn_host.compiler import Options
from ulearn_host.importers import from_sklearn
from ulearn_host.prepare import prepare

EXAMPLES = FIRMWARE / "examples"
CLASSES, SHAPE = 4, (16, 6)
# Which code a chip's firmware runs: what uses native code is compiled for it.
CHIPS = {"RPI_PICO": "armv6m", "RPI_PICO2": "armv7emsp", "ESP32_GENERIC": "xtensawin", "ESP32_GENERIC_C3": "rv32imc"}


def movements(count: int, turned: float, rng: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
    """Made-up windows in counts: every class swings at a pace of its own, `turned` is how the board is worn."""
    y = rng.integers(0, CLASSES, count)
    t = np.arange(SHAPE[0]) * 0.08
    phase = rng.uniform(0, 2 * np.pi, (count, 1))
    swing = np.sin(2 * np.pi * (0.6 + 0.7 * y[:, None]) * t + phase) * rng.uniform(0.6, 1.2, (count, 1))
    angle = turned + 0.5 * y[:, None]
    axes = [swing * np.cos(angle), swing * np.sin(angle), 0.3 * swing**2]
    x = np.stack([a * s for s in (4000, 3000) for a in axes], axis=-1) + rng.normal(0, 300, (count, *SHAPE))
    x[..., 0] += 6000 * np.cos(turned)
    x[..., 1] += 6000 * np.sin(turned)
    return np.clip(np.rint(x), -32768, 32767).astype(np.int16), y.astype(np.uint16)


def plan_of(x: NDArray[np.int16], y: NDArray[np.int64], hidden: tuple[int, ...]) -> bytes:
    """A network that was trained on counts, as the sensor gives them."""
    real = x.reshape(len(x), -1).astype(np.float64)
    network = MLPClassifier(hidden, max_iter=60, random_state=1).fit(real / 8192, y)
    network.coefs_[0] /= 8192
    layers, loss, _ = from_sklearn(network)
    return prepare(layers, real[:200], y[:200], loss=loss, options=Options("last+bias")).data


@pytest.fixture(scope="module")
def board_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is on a board: a network that knows a board worn straight, and a recording of one worn askew."""
    folder = tmp_path_factory.mktemp("imu")
    rng = np.random.default_rng(5)
    x, y = movements(1200, 0.0, rng)
    (folder / "imu.ulm").write_bytes(plan_of(x, y.astype(np.int64), hidden=(24,)))
    x, y = movements(160, 0.9, rng)
    write_tape(folder / "sensor.bin", x, y)
    shutil.copy(EXAMPLES / "sensor_recorded.py", folder / "sensor.py")
    for name in ("learn_imu.py", "codes.py"):
        shutil.copy(EXAMPLES / name, folder)
    return folder


RUN = "import learn_imu; learn_imu.main(steps={steps})"
LOCKED = """
import learn_imu as l, micropython, gc
for _ in range(3): l.step()
gc.collect(); micropython.heap_lock()
try:
    for _ in range(30): l.step()
finally: micropython.heap_unlock()
print('locked', l.trainer.counters()[0])
"""


def percents(line: str) -> tuple[int, int]:
    """Before and after, of what the example prints at its end."""
    words = line.replace(",", "").split()
    assert words[:2] == ["right", "of"], line
    return int(words[words.index("before") + 1]), int(words[words.index("after") + 1])


def learns(device: Device, files: Path) -> None:
    """Run the loop twice, the second time from the checkpoint of the first."""
    device.put(*files.iterdir())
    first = device.fresh(RUN.format(steps=100))
    assert first[0] == "imu.ckpt: there is no such checkpoint"
    before, after = percents(first[-1])
    print(device.board.name, first[-1])
    assert after >= before + 15
    again = device.fresh(RUN.format(steps=10))
    assert len(again) == 1 and percents(again[0])[0] == after
    assert device.fresh(LOCKED)[-1].startswith("locked")


def test_learns_on_the_unix_board(unix_board: Device, board_files: Path) -> None:
    """The loop as it is, from a recording."""
    learns(unix_board, board_files)


def test_learns_on_a_cortex_m0(cortex_m0: Device, board_files: Path) -> None:
    """The same on 32 bits: an integer too large for a word would be allocated."""
    learns(cortex_m0, board_files)


def test_words_are_learned(tmp_path: Path) -> None:
    """The microphone's loop, from a recording of band energies: rounds of all words, to judge and to train on."""
    rng = np.random.default_rng(2)
    words, size = 3, 490
    spoken = rng.normal(0, 12, (words, size))
    plan = speaker_plan(spoken, rng)
    (tmp_path / "mic.ulm").write_bytes(plan)
    accent = 0.4 * spoken + 0.5 * np.roll(spoken, 1, axis=0) + rng.normal(0, 8, (words, size))
    x = np.concatenate([accent] * 12) + rng.normal(0, 6, (words * 12, size))
    write_tape(tmp_path / "sensor.bin", np.clip(np.rint(x), -128, 127).astype(np.int8), np.arange(words * 12) % words)
    source = (EXAMPLES / "sensor_recorded.py").read_text()
    for old, new in (
        ("(16, 6)", "(49, 10)"),
        ("int16", "int8"),
        ("_label =", "SCALE = 0.7526\nZERO_POINT = -64\n_label ="),
    ):
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "sensor.py").write_text(source)
    lines = micropython(
        kernels(), tmp_path, [tmp_path, EXAMPLES, FIRMWARE], "import learn_mic; learn_mic.main(judges=4)"
    )
    print(lines[-1])
    before, after = percents(lines[-1])
    assert after > before and (tmp_path / "mic.ckpt").exists()


def speaker_plan(spoken: NDArray[np.float64], rng: np.random.Generator) -> bytes:
    """A network that knows a few words, on energies in decibels."""
    y = rng.integers(0, len(spoken), 300)
    x = (np.rint(spoken[y] + rng.normal(0, 10, (300, spoken.shape[1]))) + 64) * 0.7526
    network = MLPClassifier((16,), max_iter=40, random_state=1).fit(x / 40, y)
    network.coefs_[0] /= 40
    layers, loss, _ = from_sklearn(network)
    return prepare(layers, x[:150], y[:150], loss=loss, labels=("on", "off", "stop"), options=Options("last+bias")).data


def write_tape(path: Path, x: NDArray[np.generic], y: NDArray[np.integer]) -> None:
    """Samples, each with its label behind it."""
    rows = [np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8), y.astype("<u2")[:, None].view(np.uint8)]
    path.write_bytes(np.concatenate(rows, axis=1).tobytes())


def test_codes_are_the_models_own(board_files: Path) -> None:
    """Quantised in integers as the package quantises in floats, but for a tie here and there."""
    code = """
import learn_imu as l
off = n = 0
for _ in range(40):
    l.sample()
    a, b = l.codes.of(l.x), l.model.quantise(l.x)
    for i in range(len(a)):
        n += 1
        off += a[i] != b[i]
        assert min(a[i] - b[i] & 255, b[i] - a[i] & 255) <= 1
print(off, n)
"""
    off, count = map(int, micropython(kernels(), board_files, [board_files, FIRMWARE], code)[0].split())
    assert count == 40 * 96 and off <= count / 100


def kernels() -> Path:
    """The Unix port with the kernels."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the interpreter cannot be built")
    return emulate.find_micropython(user_module=True)


@pytest.mark.parametrize("board", CHIPS)
def test_compiles_for(board: str, tmp_path: Path) -> None:
    """Every file, with its native code."""
    arch = emulate.board_facts(board)["arch"]
    assert arch == CHIPS[board]
    compiler = emulate.cache_dir() / "bin" / "mpy-cross"
    if not compiler.exists():
        pytest.skip("not a Debian system: MicroPython's compiler is not built")
    for source in sorted(EXAMPLES.glob("*.py")):
        done = subprocess.run(
            [compiler, f"-march={arch}", "-o", tmp_path / "out.mpy", source], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_examples_are_short() -> None:
    """A loop is read in one look."""
    for source in EXAMPLES.glob("learn_*.py"):
        assert len(source.read_text().splitlines()) <= 60, source.name


# ---- Drivers, on the Unix port with a machine.py that plays what was on the wire -------------------------------------


def on_a_fake_machine(name: str, folder: Path, code: str) -> list[str]:
    """Import a sensor file as sensor.py, with tests/device/fake_machine.py as machine.py and `folder` to work in."""
    shutil.copy(EXAMPLES / name, folder / "sensor.py")
    shutil.copy(HERE / "device" / "fake_machine.py", folder / "machine.py")
    return micropython(emulate.find_micropython(), folder, [folder, EXAMPLES], code)


def test_mpu6050(tmp_path: Path) -> None:
    """Big-endian registers, the temperature in the middle left out, means of four rounded to the nearest."""
    rng = np.random.default_rng(3)
    raw = rng.integers(-32768, 32768, (2, 64, 7)).astype(">i2")
    raw[0, :4], raw[0, 4:8] = -32768, 32767
    (tmp_path / "wire.bin").write_bytes(raw.tobytes())
    code = """
import sensor
from codes import buffer
x = buffer(sensor)
sensor.read(x); print(list(x))
sensor.read(x); print(list(x))
print(sensor._i2c.written)
"""
    first, second, written = (eval(line) for line in on_a_fake_machine("sensor_mpu6050.py", tmp_path, code))
    axes = raw[:, :, [0, 1, 2, 4, 5, 6]].astype(np.float64).reshape(2, 16, 4, 6)
    wanted = np.floor(axes.mean(axis=2) + 0.5).reshape(2, -1)
    assert [first, second] == wanted.tolist()
    assert written == [(0x68, 0x6B, 1), (0x68, 0x1A, 4), (0x68, 0x19, 4), (0x68, 0x1B, 8), (0x68, 0x1C, 8)]


def voice(rng: np.random.Generator) -> NDArray[np.int64]:
    """A second of a tone that rises and swells, in noise that falls towards high pitches, as a microphone's 24 bits."""
    t = np.arange(16000) / 16000
    noise = np.convolve(rng.normal(0, 1, len(t)), np.exp(-np.arange(64) / 16), "same")
    sound = (np.sin(2 * np.pi * (150 * t + 900 * t**2)) + noise / 4) * 300000 * t
    return np.clip(np.rint(sound), -(2**23), 2**23 - 1).astype(np.int64)


def energies(sound: NDArray[np.int64]) -> NDArray[np.float64]:
    """In float what spectrum.py does: 16 bits four times as loud, Hann window, energies of bands, codes."""
    edges = [4, 8, 13, 19, 26, 35, 46, 60, 77, 100, 128]
    loud = np.clip(sound >> 6, -32768, 32767)
    window = np.hanning(513)[:512]
    rows = []
    for frame in range(49):
        end = 320 * (frame + 2)
        part = np.concatenate([np.zeros(512), loud[:end]])[-512:] * window
        power = np.abs(np.fft.fft(part) / 512) ** 2
        rows.append([power[a:b].sum() for a, b in zip(edges, edges[1:], strict=False)])
    return 4 * np.log2(np.maximum(rows, 1e-9)) - 64


def heard(sound: NDArray[np.int64]) -> bytes:
    """As I2S brings it: 24 bits at the top of 32, behind them noise that is not sound."""
    return ((sound << 8) | 0x5A).astype("<i4").tobytes()


MIC = """
import sensor
from codes import buffer
x = buffer(sensor)
sensor.read(x); print(list(x))
"""


def test_inmp441(tmp_path: Path) -> None:
    """Band energies in integers are those of numpy's transform, to a quarter of an octave where there is sound."""
    sound = voice(np.random.default_rng(1))
    backlog = 16384 // 1280 + 1
    (tmp_path / "wire.bin").write_bytes(b"\xff\xff\xff\x7f" * 320 * backlog + heard(sound))
    found = np.array(eval(on_a_fake_machine("sensor_inmp441.py", tmp_path, MIC)[0])).reshape(49, 10)
    wanted = energies(sound)
    loud = wanted > wanted.max(axis=1, keepdims=True) - 40  # within 30 dB of a frame's loudest band
    assert loud.mean() > 0.5 and np.abs(found - wanted)[loud].max() <= 1.5
