"""Instructions of a training step on the emulated Cortex-M0, by record: kws01, whatever of it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conftest import HERE, Device
from ulearn_host import report
from ulearn_host.compiler import Options
from ulearn_host.network import Network
from ulearn_host.prepare import from_network
from ulearn_host.tflite_import import load_tflite

LIMIT = 8.0  # instructions a multiply-accumulate, everything behind the forward pass counted
_OVERHEAD = 5000  # of one call for one record, about; a training step is two calls


def _options(network: Network, name: str) -> Options:
    last = len(network.layers) - 1
    if name != "sparse":
        return Options(name, gradients="int8")  # type: ignore[arg-type]
    rows = [0] * len(network.layers)
    rows[-2:] = [len(network.layers[-2].weights) // 2, len(network.layers[-1].weights)]
    return Options("sparse", selection=tuple((r, i >= last - 4) for i, r in enumerate(rows)), gradients="int8")


@pytest.mark.parametrize("name", ["sparse", "bias", "last+bias"])
def test_backward(own_cortex_m0: Device, shared_data: Path, tmp_path: Path, name: str) -> None:
    """At most LIMIT instructions a multiply-accumulate; the ratio of a step to an inference is printed."""
    network = replace(load_tflite(shared_data / "models" / "kws01_dscnn_int8.tflite"), loss="softmax_ce")
    path = tmp_path / "keywords.ulm"
    path.write_bytes(from_network(network, options=_options(network, name)).data)
    own_cortex_m0.put(path, HERE / "device" / "record_times.py")
    lines = own_cortex_m0.fresh("import record_times; record_times.main('keywords.ulm')")
    step, inference = ([int(t) - _OVERHEAD for t in line.split()] for line in lines)
    records = report.read(path).of("train")
    loss = next(i for i, o in enumerate(records) if o.name == "loss")
    backward = [i for i, o in enumerate(records) if i >= loss or o.role == "mask"]
    macs = sum(records[i].macs for i in backward)
    each = sum(step[i] for i in backward) / macs
    print(f"{name}: {each:.2f} instructions a MAC, a step takes {sum(step) / sum(inference):.2f} inferences")
    assert each <= LIMIT
