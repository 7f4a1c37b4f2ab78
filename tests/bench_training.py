"""What training a real network costs on the emulated Cortex-M0: kws01, by scheme and option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from conftest import HERE, data_folder
from ulearn_host import deploy, emulate, report
from ulearn_host.compiler import Options
from ulearn_host.network import Network
from ulearn_host.prepare import from_network
from ulearn_host.tflite_import import load_tflite

_FEW = 100_000  # multiply-accumulates of which an average says nothing about the kernels
_CALL = 5000  # instructions of MicroPython for the call of a single record; a step has two or three calls in all


@dataclass(frozen=True)
class Cost:
    """Instructions of an inference and of a training step, of that the backward part, and its multiply-accumulates."""

    name: str
    read: report.Report
    inference: int
    step: int
    backward: int
    macs: int

    @property
    def each(self) -> float:
        """Instructions a multiply-accumulate of everything but the forward pass."""
        return self.backward / self.macs


def network() -> Network:
    """kws01 with its loss."""
    folder = data_folder()
    assert folder is not None
    return replace(load_tflite(folder / "models" / "kws01_dscnn_int8.tflite"), loss="softmax_ce")


def choices(network: Network) -> Iterator[tuple[str, Options]]:
    """What is measured, by the name that a table shows."""
    rows = [0] * len(network.layers)
    rows[-2:] = [len(network.layers[-2].weights) // 2, len(network.layers[-1].weights)]
    sparse = tuple((r, i >= len(rows) - 5) for i, r in enumerate(rows))
    yield "last", Options("last")
    yield "bias", Options("bias", gradients="int8")
    yield "last+bias", Options("last+bias", gradients="int8")
    yield "sparse: half of conv_5, 5 biases, last", Options("sparse", selection=sparse, gradients="int8")
    yield "the same, layer by layer", Options("sparse", selection=sparse, gradients="int8", layerwise=True)
    yield "full, recomputed", Options("full", gradients="int8", recompute=True)


def measure(name: str, options: Options) -> Cost:
    """Train it on a board of its own."""
    with TemporaryDirectory() as temporary, emulate.start("QEMU_CORTEX_M0") as board:
        path = Path(temporary) / "plan.ulm"
        path.write_bytes(from_network(network(), options=options).data)
        deploy.deploy(board.port, path)
        deploy.mpremote(board.port, "fs", "cp", str(HERE / "device" / "record_times.py"), ":")
        code = "import record_times; record_times.main('plan.ulm')"
        lines = deploy.mpremote(board.port, "soft-reset", "exec", code).splitlines()
        read = report.read(path)
    step, inference = ([int(t) - _CALL for t in line.split()] for line in lines[-2:])
    records = read.of(read.programs[1])
    loss = next(i for i, o in enumerate(records) if o.name == "loss")
    backward = [i for i, o in enumerate(records) if i >= loss or o.role == "mask"]
    macs = sum(records[i].macs for i in backward)
    return Cost(name, read, sum(inference), sum(step), sum(step[i] for i in backward), macs)


@cache
def measured() -> list[Cost]:
    """All of them."""
    return [measure(name, options) for name, options in choices(network())]


def text() -> str:
    """The table as the README has it."""
    columns = ["kws01", "trainable bytes", "plan bytes", "arena", "heap", "streamed", "instructions per step",
               "of an inference", "backward, per MAC"]  # fmt: skip
    lines = [" | ".join(columns), " | ".join(["---"] + ["---:"] * (len(columns) - 1))]
    for c in measured():
        sizes = (sum(t["bytes"] for t in c.read.tensors), c.read.flash_bytes, c.read.buffers["arena"])
        heaps = (c.read.ram_bytes, c.read.frozen.ram_streamed)
        each = f"{c.each:.2f}" if c.macs > _FEW else ""
        cells = [c.name, *(f"{v:,}" for v in (*sizes, *heaps, c.step)), f"{c.step / c.inference:.2f}", each]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)
