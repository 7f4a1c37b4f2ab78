"""PyTorch modules as quantised networks: traced, batch normalisation folded, written as ONNX, imported from there."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.network import Loss, Network

Array = NDArray[Any]
WEIGHTED = ("conv1d", "conv2d", "linear")
CUTTING = ("relu", "relu6", "hardtanh")
MAX_POOLS, MEAN_POOLS = ("maxpool1d", "maxpool2d"), ("avgpool1d", "avgpool2d")
MEANS = ("adaptiveavgpool1d", "adaptiveavgpool2d", "mean")
RESHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze")
PASSES = ("dropout", "dropout1d", "dropout2d", "identity", "contiguous")
JOINS = ("cat", "concat")
FUNCTIONS = ("sigmoid", "tanh", "hardsigmoid", "hardswish", "leakyrelu", "elu")
SHARING = (*MAX_POOLS, *MEAN_POOLS, *RESHAPES, *PASSES, *JOINS)  # one quantisation for what goes in and comes out
FAKE = "fakeactivation"


def needed_torch() -> Any:
    """The torch package. Raises UserError naming the extra when it is missing."""
    try:
        import torch
        import torch.fx
    except ImportError:
        raise UserError("working on PyTorch modules needs the extra: pip install 'ulearn[torch]'") from None
    return torch


def samples_of(x: Array) -> Array:
    """Samples [n, ...] as float32. Raises UserError when there are none, or they are not finite numbers."""
    x = np.asarray(x)
    if x.ndim < 2 or not len(x) or x.dtype.kind not in "fiub" or not np.isfinite(x).all():
        raise UserError(f"samples have shape {list(x.shape)} of {x.dtype}, expected finite numbers [n, ...]")
    return x.astype(np.float32)


def arrange(network: Network, x: Array) -> NDArray[np.int8]:
    """Samples [n, channels, ...] or [n, features] in real units as a module takes them, as codes [n, size] of the
    network made of it, whose images lie as (height, width, channels). Raises UserError when the sizes differ."""
    x = samples_of(x)
    if network.input.shape[:2] != (1, 1):
        x = np.moveaxis(x, 1, -1)
    if x[0].size != network.input.size:
        raise UserError(f"samples have shape {list(x.shape)}, expected {network.input.size} numbers each")
    return network.input.codes(x.reshape(len(x), -1))


def from_module(module: Any, x: Array, *, loss: Loss = "softmax_ce", labels: Sequence[str] = ()) -> Network:
    """Quantise a trained module after training, as `onnx_import.load_onnx` does a float ONNX model.

    module: torch.nn.Module that takes float32 [n, channels, height, width], [n, channels, length] or [n, features] and
    gives [n, outputs]; a softmax at its end is left away. x: such samples in real units, of which 200 decide the
    ranges. loss: what it was trained with. Raises UserError for layers that are not supported.
    """
    return to_network(simplified(module, samples_of(x)), x, loss, labels)


# ---- Tracing ---------------------------------------------------------------------------------------------------------


def traced(module: Any, x: Array) -> Any:
    """A torch.fx.GraphModule over the module's own layers, in inference mode, with shapes for a batch of one.

    x: float32 [n, ...], one sample at least. Raises UserError when it cannot be traced or computed.
    """
    torch = needed_torch()
    from torch.fx.passes.shape_prop import ShapeProp

    try:
        graph = torch.fx.symbolic_trace(module.eval())
        with torch.no_grad():
            ShapeProp(graph).propagate(torch.from_numpy(x[:1].copy()))
    except Exception as fault:  # a module is code, and fails in every way there is
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise UserError(
            f"{type(module).__name__} cannot be traced on samples {list(x.shape[1:])} ({reason}); "
            "expected layers called one after the other, without decisions on values"
        ) from None
    return graph


def shape(node: Any) -> tuple[int, ...] | None:
    """The shape of what a node gives, with a batch of one; None when it gives no tensor."""
    found = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if found is None else tuple(found)


def kind(graph: Any, node: Any) -> str:
    """What a node does: 'conv2d', 'relu', ..., the same for a module, a function and a method."""
    if node.op == "call_module":
        name = type(graph.get_submodule(node.target)).__name__.removeprefix("Parametrized")
    elif node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    else:
        return str(node.op)
    return str(name).lower().replace("_", "")


def option(graph: Any, node: Any, name: str, place: int, default: Any = None) -> Any:
    """A layer's option: a module's attribute, or a call's argument by its name or place."""
    if node.op == "call_module":
        return getattr(graph.get_submodule(node.target), name, default)
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


def simplified(module: Any, x: Array) -> Any:
    """A traced copy with batch normalisation folded into the layer before (Jacob et al. 2018, section 3.2), ReLUs moved
    before max pooling, and no softmax at the end."""
    needed_torch()
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    graph = traced(copy.deepcopy(module), x)
    targets = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    for node in list(graph.graph.nodes):
        before = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if before is None or len(before.users) > 1:
            continue
        what, first = kind(graph, node), kind(graph, before)
        if what.startswith("batchnorm") and node.op == "call_module" and first in WEIGHTED:
            if targets.count(before.target) > 1 or before.op != "call_module":
                continue
            fuse = fuse_linear_bn_eval if first == "linear" else fuse_conv_bn_eval
            parent, _, name = before.target.rpartition(".")
            fused = fuse(graph.get_submodule(before.target), graph.get_submodule(node.target))
            setattr(graph.get_submodule(parent), name, fused)
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
        elif what in CUTTING and first in MAX_POOLS:  # the same numbers, and none below 0 that cost codes
            node.replace_all_uses_with(before)
            node.replace_input_with(before, before.args[0])
            before.replace_input_with(before.args[0], node)
            node.meta["tensor_meta"] = node.args[0].meta["tensor_meta"]
            node.append(before)
        elif node.op == "output" and first in ("softmax", "logsoftmax"):
            node.replace_input_with(before, before.args[0])
            graph.graph.erase_node(before)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def to_network(graph: Any, x: Array | None, loss: Loss, labels: Sequence[str]) -> Network:
    """A simplified module as a network: with the ranges of its fake quantisation, or where there is none with those
    of samples x."""
    name = type(graph).__name__
    try:
        from ulearn_host.onnx_import import load_onnx
        from ulearn_host.torch_onnx import write

        data = write(graph)
    except ImportError:
        raise UserError("working on PyTorch modules needs the extra: pip install 'ulearn[torch]'") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        path.write_bytes(data)
        try:
            network = load_onnx(path, None if x is None else samples_of(x))
        except UserError as error:
            raise UserError(str(error).replace(str(path), name)) from None
    notes = tuple(note.replace("the file", "the module") for note in network.notes)
    return dataclasses.replace(network, loss=loss, labels=tuple(labels), source=name, notes=notes)
