"""Whole channels taken out of a PyTorch module before it is quantised: a smaller network, not one full of zeros.

The channels whose filters have the smallest norms go (Li et al. 2017, "Pruning filters for efficient convnets", who
take the L1 norm), and with them all that only served them. Train on afterwards (`qat.fit`, `qat.fine_tune`).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.torch_network import (
    CUTTING,
    FUNCTIONS,
    MAX_POOLS,
    MEAN_POOLS,
    MEANS,
    PASSES,
    RESHAPES,
    WEIGHTED,
    kind,
    needed_torch,
    samples_of,
    shape,
    traced,
)

Array = NDArray[Any]
_FOLLOWING = (*CUTTING, *FUNCTIONS, *MAX_POOLS, *MEAN_POOLS, *MEANS, *PASSES, "softmax", "logsoftmax")
_OUTPUT = "it is the output"


@dataclass(frozen=True)
class Comparison:
    """A module before and after: (before, after). accuracy: 0 to 1; parameters: numbers that are trained; macs:
    multiply-accumulates of convolutions and dense layers, a sample."""

    accuracy: tuple[float, float]
    parameters: tuple[int, int]
    macs: tuple[int, int]


@dataclass(eq=False)
class _Channels:
    """The output channels of a layer, and who else holds one number (or several in a row) of each.

    whole: why none of them may go ('': they may). followers: modules with as many channels. readers: (module, numbers
    a channel) with one input for each.
    """

    layer: str
    whole: str = ""
    followers: list[Any] = field(default_factory=list)
    readers: list[tuple[Any, int]] = field(default_factory=list)


def prune(
    module: Any,
    example: Array,
    keep: float | Mapping[str, float] = 0.5,
    *,
    norm: Literal["l1", "l2"] = "l2",
    note: Callable[[str], None] = lambda sentence: None,
) -> Any:
    """A copy of a module without the output channels of hidden layers that have the smallest norms.

    example: float32 [n, ...], samples of the module's own input shape; one is enough. keep: the share of channels,
    above 0 and up to 1, that each hidden convolution and dense layer keeps, or {a layer's name: share}, all others
    whole; at least one stays. Batch normalisation, depthwise convolutions, pooling and the next layer follow. Layers
    that meet in an addition, a product or a concatenation are left whole: note is called with a sentence for each.
    Raises UserError for shares and names that do not fit, and for a module that cannot be traced or whose own code
    fixes its sizes.
    """
    torch, example = needed_torch(), samples_of(example)
    smaller = copy.deepcopy(module)
    training = {name: part.training for name, part in smaller.named_modules()}
    every = _followed(traced(smaller, example))
    free = {c.layer: c for c in every if not c.whole}
    shares = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(free, keep)
    for name, share in shares.items():
        found = next((c for c in every if c.layer == name), None)
        if found is None or found.whole:
            why = f"cannot be pruned: {found.whole}" if found else "is no layer with weights"
            raise UserError(f"'{name}' {why}; expected one of {', '.join(free) or 'none'}")
        if not 0 < share <= 1:
            raise UserError(f"'{name}' is to keep a share of {share:g}, expected more than 0 and at most 1")
    for channels in every:
        if channels.whole not in ("", _OUTPUT) and not isinstance(keep, Mapping):
            note(f"'{channels.layer}' is left whole: {channels.whole}")
        elif channels.layer in shares:
            _shrink(smaller, channels, shares[channels.layer], 1 if norm == "l1" else 2)
    try:
        with torch.no_grad():
            smaller(torch.from_numpy(example[:1].copy()))
    except Exception as fault:  # a module is code, and fails in every way there is
        raise UserError(
            f"{type(module).__name__} does not work with fewer channels ({fault}); "
            "its code must not name sizes: use flatten(1) in place of view(-1, size)"
        ) from None
    for name, part in smaller.named_modules():
        part.training = training[name]
    return smaller


def compare(before: Any, after: Any, x: Array, y: Array) -> Comparison:
    """Two classifiers on samples x, float32 [n, ...], with labels y, int [n]. Raises UserError when they do not fit."""
    x, y = samples_of(x), np.asarray(y)
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise UserError(f"labels have shape {list(y.shape)} of {y.dtype}, expected integers [{len(x)}]")
    first, second = _measured(before, x, y), _measured(after, x, y)
    return Comparison((first[0], second[0]), (first[1], second[1]), (first[2], second[2]))


def _measured(module: Any, x: Array, y: Array) -> tuple[float, int, int]:
    """Accuracy, parameters, multiply-accumulates of one sample."""
    torch = needed_torch()
    model = copy.deepcopy(module).eval()
    macs: list[int] = []

    def count(layer: Any, inputs: Any, output: Any) -> None:
        macs.append(output[0].numel() * layer.weight[0].numel())

    layers = [p for p in model.modules() if type(p).__name__.lower() in WEIGHTED]
    with torch.no_grad():
        hooks = [layer.register_forward_hook(count) for layer in layers]
        model(torch.from_numpy(x[:1].copy()))
        for hook in hooks:
            hook.remove()
        right = [
            (model(torch.from_numpy(part)).argmax(1).numpy() == labels).sum()
            for part, labels in zip(
                np.array_split(x, -(-len(x) // 256)), np.array_split(y, -(-len(y) // 256)), strict=True
            )
        ]
    return float(sum(right)) / len(x), sum(p.numel() for p in model.parameters()), sum(macs)


# ---- Following channels through the module ---------------------------------------------------------------------------


def _followed(graph: Any) -> list[_Channels]:
    """The output channels of every layer with weights, in order."""
    every: list[_Channels] = []
    held: dict[Any, tuple[_Channels, int]] = {}  # node: whose channels it holds, numbers a channel
    uses = Counter(n.target for n in graph.graph.nodes if n.op == "call_module")

    def keep(nodes: Any, why: str) -> None:
        for node in nodes:
            if node in held:
                held[node][0].whole = held[node][0].whole or why

    for node in graph.graph.nodes:
        what, inputs = kind(graph, node), [n for n in node.all_input_nodes if n in held]
        layer = graph.get_submodule(node.target) if node.op == "call_module" else None
        known = held.get(inputs[0]) if len(inputs) == 1 else None
        if what in WEIGHTED and layer is not None:
            groups, repeated = getattr(layer, "groups", 1), uses[node.target] > 1
            if groups > 1 and groups == layer.in_channels == layer.out_channels and known and not repeated:
                known[0].followers.append(layer)
                held[node] = known
                continue
            rows = what == "linear" and len(shape(node) or ()) != 2
            why = "is used twice" if repeated else "has groups" if groups > 1 else "works on rows" if rows else ""
            if why:
                keep(inputs, f"'{node.target}' behind it {why}")
            elif known:
                known[0].readers.append((layer, known[1]))
            held[node] = _Channels(node.target, why and f"it {why}"), 1
            if held[node][0].layer not in [c.layer for c in every]:
                every.append(held[node][0])
        elif known is not None and what.startswith("batchnorm") and layer is not None and uses[node.target] == 1:
            known[0].followers.append(layer)
            held[node] = known
        elif known is not None and what in (*_FOLLOWING, *RESHAPES) and _same_channels(inputs[0], node):
            held[node] = known
        elif known is not None and what in RESHAPES and _flattens(inputs[0], node):
            held[node] = known[0], known[1] * math.prod((shape(inputs[0]) or ())[2:])
        elif node.op == "output":
            keep(inputs, _OUTPUT)
        elif shape(node) is not None and inputs:
            keep(inputs, f"it goes into '{node.name}' ({what})")
            held[node] = held[inputs[0]]
    return every


def _same_channels(before: Any, after: Any) -> bool:
    """Whether an operator leaves channels where they are."""
    return (shape(before) or ())[:2] == (shape(after) or ())[:2]


def _flattens(before: Any, after: Any) -> bool:
    """Whether channels stay in order, each with its numbers in a row."""
    first, second = shape(before) or (), shape(after) or ()
    return len(second) == 2 and second[0] == first[0] == 1


# ---- Shrinking -------------------------------------------------------------------------------------------------------


def _shrink(module: Any, channels: _Channels, share: float, power: int) -> None:
    """Take channels out of a layer, its followers and its readers. power: of the norm."""
    layer = module.get_submodule(channels.layer)
    norms = layer.weight.detach().flatten(1).norm(power, dim=1)
    count = max(1, round(share * len(norms)))
    kept = norms.argsort(descending=True, stable=True)[:count].sort().values
    for part in (layer, *channels.followers):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(part, name, kept, 0)
        for name in ("out_channels", "out_features", "num_features"):
            if hasattr(part, name):
                setattr(part, name, count)
        if getattr(part, "groups", 1) > 1:
            part.groups = part.in_channels = count
    for part, repeat in channels.readers:
        places = (kept[:, None] * repeat + needed_torch().arange(repeat)).flatten()
        _select(part, "weight", places, 1)
        setattr(part, "in_channels" if hasattr(part, "in_channels") else "in_features", len(places))


def _select(part: Any, name: str, places: Any, axis: int) -> None:
    """Keep some rows or columns of a module's parameter or buffer, if it has it."""
    numbers = getattr(part, name, None)
    if numbers is None:
        return
    chosen = numbers.detach().index_select(axis, places).clone()
    parameter = name in part._parameters
    setattr(part, name, needed_torch().nn.Parameter(chosen, numbers.requires_grad) if parameter else chosen)
