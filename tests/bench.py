"""The README's tables, measured: `make bench`, or `make bench ARGS=--write` to put them into README.md.

A 64-32-10 perceptron with seeded weights, every scheme, on the emulated Cortex-M0 with an RP2040's heap; kernels and
whole models on the emulated Cortex-M0 and Cortex-M3 and on x64 (tests/bench_tables.py); accuracies on recordings
(tests/adaptation.py). Instruction counts come from the emulator and repeat exactly.

`make bench ARGS=--fit` measures what host/ulearn_host/costs.json is fitted to instead (tests/bench_fit.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "device")]

import bench_tables  # noqa: E402
import bench_training  # noqa: E402
import code_heap  # noqa: E402
from conftest import data_folder  # noqa: E402
from ulearn import plan as plan_file  # noqa: E402
from ulearn_host import costs, deploy, emulate, report  # noqa: E402
from ulearn_host import numbers as n  # noqa: E402
from ulearn_host.compiler import Options, compile_plan  # noqa: E402
from ulearn_host.schemes import NAMED_SCHEMES  # noqa: E402

README = HERE.parent / "README.md"


def rows() -> list[list[str]]:
    """One row a scheme: sizes from the plan, heap and instructions from the board."""
    result = []
    with TemporaryDirectory() as temporary, emulate.start("QEMU_CORTEX_M0") as board:
        folder = Path(temporary)
        for scheme in NAMED_SCHEMES:
            (folder / f"{scheme}.ulm").write_bytes(compile_plan(code_heap.perceptron(), Options(scheme)).data)
        deploy.deploy(board.port, folder / "last.ulm")
        files = [str(folder / f"{scheme}.ulm") for scheme in NAMED_SCHEMES]
        files += [str(HERE / "device" / name) for name in ("memory.py", "speed.py")]
        deploy.mpremote(board.port, "fs", "cp", *files, ":")
        for scheme in NAMED_SCHEMES:
            path = f"{scheme}.ulm"
            heap = _line(board.port, f"import memory; memory.heap('{path}')", "heap")[0]
            inference, step = _line(board.port, f"import speed; speed.main('{path}')", "speed")
            plan = report.read(folder / path)
            macs = _macs(folder / path, n.KIND_FORWARD), _macs(folder / path, n.KIND_TRAIN)
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


def _macs(path: Path, kind: int) -> int:
    """Multiply-accumulates of the program of a kind."""
    programs = plan_file.read(str(path)).programs
    return costs.macs(costs.records_of(next(bytes(p) for p in programs if p[n.P_KIND] == kind)))


def _line(port: str, code: str, word: str) -> list[int]:
    # After a reset: what else has been on the heap costs an allocation up to 5 % of a small network's instructions.
    for line in deploy.mpremote(port, "soft-reset", "exec", code).splitlines():
        if line.startswith(word + " "):
            return [int(v) for v in line.split()[1:]]
    raise RuntimeError(f"the board printed no line beginning with {word}")


@cache
def text() -> str:
    """The table as the README has it."""
    columns = ["scheme", "trainable bytes", "plan bytes", "heap bytes", "instructions per inference", "per MAC",
               "instructions per training step", "per MAC"]  # fmt: skip
    lines = [" | ".join(columns), " | ".join(["---"] + ["---:"] * (len(columns) - 1))]
    lines += [" | ".join(row) for row in rows()]
    lines = [f"| {line} |" for line in lines]
    lines += ["", "Heap that package and native module take (armv6m; the plan and its samples not counted):", ""]
    lines += [code_heap.table()]
    return "\n".join(lines)


def accuracy() -> str:
    """The table of tests/adaptation.py over all subjects, as the README has it."""
    import adaptation

    settings = adaptation.Settings()
    rows = adaptation.summarise(adaptation.run(adaptation.load(adaptation.data_file()), settings), settings)
    return f"```\n{adaptation.table(rows)}\n```"


def in_readme(name: str) -> str:
    """What stands between the markers of a table: bench, kernels, models or accuracy."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    match = re.search(re.escape(begin) + r"\n(.*)\n" + re.escape(end), README.read_text(), re.S)
    if not match:
        raise RuntimeError(f"README.md has no markers for the table '{name}'")
    return match.group(1)


def put_into_readme(name: str, table: str) -> None:
    """Replace what stands between the markers of a table."""
    begin = f"<!-- {name}: begin -->\n"
    old = in_readme(name)
    README.write_text(README.read_text().replace(begin + old, begin + table))


def measure_all() -> None:
    """Measure what `text` and bench_tables need, side by side; they find it done."""
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(text), *(pool.submit(bench_tables.measured, a) for a in bench_tables.PROCESSORS)]:
            done.result()


def tables() -> dict[str, str]:
    """Every table by the name of its markers; those that need the shared data only where it is."""
    import adaptation

    measure_all()
    found = {"bench": text(), "kernels": bench_tables.kernel_text()}
    if data_folder():
        found["models"] = bench_tables.model_text()
        found["training"] = bench_training.text()
        found["accuracy"] = accuracy()
    else:
        print(f"{adaptation.data_file()} is missing: no tables of models and accuracies", file=sys.stderr)
    return found


def main() -> None:
    """Print the tables, or write them into the README, or fit the costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--fit", action="store_true", help="measure single records and write costs.json instead")
    arguments = parser.parse_args()
    if arguments.fit:
        import bench_fit

        bench_fit.main()
        return
    for name, table in tables().items():
        if arguments.write:
            put_into_readme(name, table)
        print(table, end="\n\n")
    if data_folder():
        import speakers

        print(f"Keywords, {speakers.SHORT_SPEAKERS} speakers (all of them: python tests/speakers.py):")
        print(speakers.short())


if __name__ == "__main__":
    main()
