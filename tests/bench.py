"""The README's tables, measured: `make bench`, or `make bench ARGS=--write` to put them into README.md.

A 64-32-10 perceptron with seeded weights, every scheme, on the emulated Cortex-M0 with an RP2040's heap. Instruction
counts come from the emulator and repeat exactly; they include MicroPython's share of a call.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "device")]

from ulearn_host import deploy, emulate, report  # noqa: E402
from ulearn_host.compiler import SCHEMES, Options, compile_plan  # noqa: E402
from ulearn_host.quantise import FloatDense, quantise  # noqa: E402

README = HERE.parent / "README.md"
_IMPORT = (
    "import gc;gc.collect();gc.collect();a=gc.mem_alloc()\n"
    "import ulearn,ulearn.model{more}\n"
    "ulearn.executor;gc.collect();gc.collect();print('import',gc.mem_alloc()-a)"
)


def network():  # type: ignore[no-untyped-def]
    """A 64-32-10 perceptron of seeded numbers: the same bytes on every machine."""
    rng = np.random.default_rng(0)
    layers = [
        FloatDense(rng.normal(0, 0.2, (o, i)), np.zeros(o), relu) for i, o, relu in ((64, 32, True), (32, 10, False))
    ]
    return quantise(layers, rng.uniform(0, 1, (100, 64)), "softmax_ce")


def rows() -> list[list[str]]:
    """One row a scheme: sizes from the plan, heap and instructions from the board."""
    result = []
    with TemporaryDirectory() as temporary, emulate.start("QEMU_CORTEX_M0") as board:
        folder = Path(temporary)
        for scheme in SCHEMES:
            (folder / f"{scheme}.ulm").write_bytes(compile_plan(network(), Options(scheme)).data)
        deploy.deploy(board.port, folder / "last.ulm")
        files = [str(folder / f"{scheme}.ulm") for scheme in SCHEMES]
        files += [str(HERE / "device" / name) for name in ("memory.py", "speed.py")]
        deploy.mpremote(board.port, "fs", "cp", *files, ":")
        for scheme in SCHEMES:
            path = f"{scheme}.ulm"
            heap = _line(board.port, f"import memory; memory.heap('{path}')", "heap")[0]
            inference, step = _line(board.port, f"import speed; speed.main('{path}')", "speed")
            plan = report.read(folder / path)
            macs = plan.macs("forward"), plan.macs("train")
            trains = sum(t["bytes"] for t in plan.tensors)
            result.append(
                [
                    scheme,
                    f"{trains:,}",
                    f"{plan.flash_bytes:,}",
                    f"{heap:,}",
                    f"{inference:,}",
                    f"{inference / macs[0]:.1f}",
                    f"{step:,}",
                    f"{step / macs[1]:.1f}",
                ]
            )
    return result


def code_sizes() -> dict[str, int]:
    """Bytes of heap that importing takes on a freshly started board, for inference and with the trainer."""
    sizes = {}
    for name, more in (("inference", ""), ("inference and training", ",ulearn.trainer")):
        with TemporaryDirectory() as temporary, emulate.start("QEMU_CORTEX_M0") as board:
            path = Path(temporary) / "last.ulm"
            path.write_bytes(compile_plan(network(), Options("last")).data)
            deploy.deploy(board.port, path)
            deploy.mpremote(board.port, "soft-reset")
            sizes[name] = _line(board.port, _IMPORT.format(more=more), "import")[0]
    sizes["native module"] = emulate.find_native("armv6m").stat().st_size
    return sizes


def _line(port: str, code: str, word: str) -> list[int]:
    for line in deploy.mpremote(port, "exec", code).splitlines():
        if line.startswith(word + " "):
            return [int(v) for v in line.split()[1:]]
    raise RuntimeError(f"the board printed no line beginning with {word}")


def text() -> str:
    """The table as the README has it."""
    columns = ["scheme", "trainable bytes", "plan bytes", "heap bytes", "instructions per inference", "per MAC",
               "instructions per training step", "per MAC"]  # fmt: skip
    lines = [" | ".join(columns), " | ".join(["---"] + ["---:"] * (len(columns) - 1))]
    lines += [" | ".join(row) for row in rows()]
    sizes = code_sizes()
    lines = [f"| {line} |" for line in lines]
    lines += ["", f"Code on the heap (armv6m): {sizes['inference']:,} bytes imported for inference, "]
    lines[-1] += f"{sizes['inference and training']:,} with the trainer; the native module's file has "
    lines[-1] += f"{sizes['native module']:,}."
    return "\n".join(lines)


def accuracy() -> str:
    """The table of tests/adaptation.py over all subjects, as the README has it."""
    import adaptation

    settings = adaptation.Settings()
    rows = adaptation.summarise(adaptation.run(adaptation.load(adaptation.data_file()), settings), settings)
    return f"```\n{adaptation.table(rows)}\n```"


def in_readme(name: str) -> str:
    """What stands between the markers of a table: bench or accuracy."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    match = re.search(re.escape(begin) + r"\n(.*)\n" + re.escape(end), README.read_text(), re.S)
    if not match:
        raise RuntimeError(f"README.md has no markers for the table '{name}'")
    return match.group(1)


def main() -> None:
    """Print the tables, or write them into the README."""
    import adaptation

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    write = parser.parse_args().write
    tables = {"bench": text()}
    if adaptation.data_file().is_file():
        tables["accuracy"] = accuracy()
    else:
        print(f"{adaptation.data_file()} is missing: no table of accuracies", file=sys.stderr)
    for name, table in tables.items():
        if write:
            README.write_text(README.read_text().replace(in_readme(name), table))
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
