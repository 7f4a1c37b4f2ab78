"""Cycles an instruction of the kernels on a Cortex-M0+, modelled: python tests/bench_cycles.py (needs the shared data).

QEMU logs every block of instructions that an inference of kws01 runs on a bare emulated Cortex-M0; each instruction
then costs what a Cortex-M0+ takes for it: load and store 2, of several registers 1 and 1 each, a taken branch 2, a call
or a return by pop 3, multiply 1, all others 1. It is a model of memory without wait states: an RP2040 takes longer
where its other core or DMA uses the same memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import bench_board
import bench_tables
from ulearn_host import emulate

_HOT = ("ul_conv", "ul_depthwise", "ul_four", "ul_mask", "ul_runs", "ul_sums")  # as in ulab_kernels/Makefile
_LINK = "SECTIONS { .text 0 : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } .bss 0x20000000 : { *(.bss*) *(COMMON) } }"
_FLAGS = ["-mcpu=cortex-m0", "-mthumb", "-std=c99", "-ffreestanding", "-fno-jump-tables",
          "-fno-tree-loop-distribute-patterns", f"-I{bench_board.CORE}"]  # fmt: skip
_LINE = re.compile(r"^0x([0-9a-f]+):\s+((?:[0-9a-f]{4,8} ?)+)\s+(\S+)\s*(.*)$")
_TRACE = re.compile(r"^Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/")


def build(folder: Path) -> Path:
    """The inference as a firmware of its own."""
    session = folder / "session.bin"
    session.write_bytes(bench_board.session(bench_tables.models()["kws01_dscnn_int8"]))
    objects = []
    sources = [*sorted(bench_board.CORE.glob("ul_*.c")), *sorted(bench_board.CORE.glob("*.S"))]
    for source in [*sources, bench_board.HERE / "bench_cycles.c"]:
        made = folder / f"{source.stem}.o"
        level = "-O2" if source.stem in _HOT else "-Os"
        line = ["arm-none-eabi-gcc", *_FLAGS, level, f'-DSESSION="{session}"', "-c", str(source), "-o", str(made)]
        subprocess.run(line, check=True)
        objects.append(str(made))
    (folder / "link.ld").write_text(_LINK)
    made = folder / "run.elf"
    line = ["arm-none-eabi-gcc", *_FLAGS[:2], "-nostdlib", "-T", str(folder / "link.ld"), *objects, "-lgcc"]
    subprocess.run([*line, "-o", str(made)], check=True)
    return made


def cycles(name: str, operands: str) -> int:
    """Of an instruction whose branch, if it is one, is not taken."""
    name = name.split(".")[0]
    if name in ("push", "pop", "ldm", "stm", "ldmia", "stmia"):
        registers = operands[operands.index("{") + 1 : operands.index("}")].split(",")
        many = sum(_span(r.strip()) for r in registers)
        return 1 + many
    if name.startswith(("ldr", "str")):
        return 2
    return 3 if name in ("mrs", "msr", "dmb", "dsb", "isb") else 1


def _span(registers: str) -> int:
    ends = [int(r) for r in re.findall(r"r(\d+)", registers)]
    return ends[-1] - ends[0] + 1 if "-" in registers else 1


def extra_if_taken(name: str) -> int:
    """What leaving the straight line adds: 1, 2 for a call or a return that pops the program counter."""
    return 2 if name in ("bl", "pop") else 1


def trace(firmware: Path, log: Path) -> tuple[int, int]:
    """Instructions and modelled cycles of the whole run."""
    facts = emulate.board_facts("QEMU_CORTEX_M0")
    line = ["qemu-system-arm", *facts["qemu"], "-serial", "null", "-kernel", str(firmware)]
    subprocess.run([*line, "-d", "in_asm,exec,nochain", "-D", str(log)], check=True, timeout=300)
    blocks: dict[int, tuple[int, int, int, int]] = {}  # by address: instructions, cycles, where it ends, extra if left
    block: list[tuple[int, int, str, str]] = []
    ways: Counter[tuple[int, int]] = Counter()
    last = None
    with log.open() as lines:
        for text in lines:
            if found := _TRACE.match(text):
                here = int(found[1], 16)
                if last is not None:
                    ways[last, here] += 1
                last = here
            elif found := _LINE.match(text):
                size = len(found[2].replace(" ", "")) // 2
                block.append((int(found[1], 16), size, found[3], found[4]))
            elif block:
                address, size, name, _ = block[-1]
                took = sum(cycles(what, of) for _, _, what, of in block)
                blocks[block[0][0]] = (len(block), took, address + size, extra_if_taken(name.split(".")[0]))
                block = []
    instructions = total = 0
    for (at, to), times in ways.items():
        count, took, end, extra = blocks[at]
        instructions += count * times
        total += (took + (extra if to != end else 0)) * times
    return instructions, total


def main() -> None:
    """Measure and say."""
    if not bench_tables.models():
        sys.exit("the shared data is missing: set ULEARN_DATA or put it at ../shared/data")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        instructions, total = trace(build(folder), folder / "log")
    print(f"{instructions:,} instructions, {total:,} cycles: {total / instructions:.3f} cycles an instruction")


if __name__ == "__main__":
    main()
