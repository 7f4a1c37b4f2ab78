"""What of a network trains: named schemes, or a choice for every layer; and what gradients that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from ulearn_host.errors import UserError
from ulearn_host.network import (
    Concat,
    Elementwise,
    Mean,
    Network,
    Op,
    Pad,
    Pool,
    Reshape,
    Softmax,
    Tensor,
    Weighted,
)

Scheme = Literal["last", "bias", "last+bias", "sparse", "full", "none"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
TRAINING_SCHEMES = tuple(scheme for scheme in SCHEMES if scheme != "none")
# Those that need nothing but the network to be known.
NAMED_SCHEMES = tuple(scheme for scheme in TRAINING_SCHEMES if scheme != "sparse")


class Part(NamedTuple):
    """What of a layer trains: the weights of its last `rows` output channels, and all its biases if `bias`."""

    rows: int
    bias: bool

    @property
    def any(self) -> bool:
        """Whether anything trains."""
        return self.rows > 0 or self.bias


Selection = tuple[Part, ...]
NOTHING = Part(0, False)


def selection(network: Network, scheme: Scheme, chosen: Sequence[tuple[int, bool]] | None = None) -> Selection:
    """A Part for each of network.layers. chosen: what the scheme 'sparse' consists of, one pair a layer.

    Raises UserError where a choice is missing, has the wrong length, or names more channels than there are.
    """
    layers = network.layers
    if scheme == "sparse":
        if chosen is None:
            raise UserError("the scheme 'sparse' needs a choice of layers; let `ulearn prepare --ram` search one")
        if len(chosen) != len(layers):
            raise UserError(f"the choice names {len(chosen)} layers, the network has {len(layers)}")
        for (rows, _), layer in zip(chosen, layers, strict=True):
            if not 0 <= rows <= len(layer.weights):
                raise UserError(f"{layer.name}: {rows} channels chosen, it has {len(layer.weights)}")
        return tuple(Part(int(rows), bool(bias)) for rows, bias in chosen)
    everything = tuple(Part(len(layer.weights), True) for layer in layers)
    logits = network.logits
    alias = aliases(network)
    reached = upstream(network, everything)[alias.get(logits.name, logits.name)]
    parts = []
    for i, layer in enumerate(layers):
        weights, bias = named_part(i, len(layers), scheme) if i in reached else NOTHING
        parts.append(Part(len(layer.weights) if weights else 0, bool(bias)))
    return tuple(parts)


def named_part(index: int, count: int, scheme: str) -> tuple[bool, bool]:
    """Whether layer `index` of `count` trains its weights and its biases by a named scheme."""
    if scheme == "none":
        return False, False
    last = index == count - 1
    return scheme == "full" or (last and scheme != "bias"), scheme != "last" or last


def aliases(network: Network) -> dict[str, str]:
    """Tensors that a reshape renames: the name of the one whose memory they are."""
    alias: dict[str, str] = {}
    for op in network.ops:
        if isinstance(op, Reshape):
            alias[op.output.name] = alias.get(op.input.name, op.input.name)
    return alias


def upstream(network: Network, parts: Selection) -> dict[str, frozenset[int]]:
    """Of each tensor the trained layers (indices in network.layers) that its value depends on. Aliases are left out."""
    alias = aliases(network)
    index = {id(layer): i for i, layer in enumerate(network.layers)}
    found: dict[str, frozenset[int]] = {network.input.name: frozenset()}
    for op in network.ops:
        if isinstance(op, Reshape):
            continue
        layers = frozenset[int]().union(*(found[alias.get(x.name, x.name)] for x in activations(op)))
        i = index.get(id(op))
        if i is not None and parts[i].any:
            layers |= {i}
        found[op.output.name] = layers
    return found


def live(network: Network) -> set[int]:
    """The operators (by id) that the loss depends on."""
    wanted, found = {network.logits.name}, set()
    for op in reversed(network.ops):
        if op.output.name in wanted:
            found.add(id(op))
            wanted |= {x.name for x in op.inputs}
    return found


def activations(op: Op) -> list[Tensor]:
    """The inputs of an operator that are no constants."""
    if isinstance(op, Concat) and op.constants:
        return [x for x, constant in zip(op.inputs, op.constants, strict=True) if constant is None]
    return list(op.inputs)


def is_masked(op: Op, network: Network) -> bool:
    """Whether no gradient passes where the output is at its lower end: a ReLU, or for want of codes below 0."""
    logits = network.logits.name
    cut = isinstance(op, Weighted | Elementwise) and op.output.zero == -128
    return lowest(op) > -128 or (cut and op.output.name != aliases(network).get(logits, logits))


def lowest(op: Op) -> int:
    """The lowest code that an operator's activation lets through."""
    return op.activation[0] if isinstance(op, Weighted | Elementwise | Pool) else -128


def _obstacle(op: Op, deeper: Mapping[str, frozenset[int]], alias: Mapping[str, str]) -> str | None:
    """Why no gradient passes an operator, if so."""
    if isinstance(op, Weighted | Pool | Pad | Concat | Reshape):
        return None
    if isinstance(op, Mean):
        return "means over more than 255 rows or columns" if max(op.input.shape[:2]) > 255 else None
    if isinstance(op, Elementwise):
        if op.constant is not None:
            return None
        if op.kind == "mul":
            return "products of two activations"
        second = op.inputs[1]
        if second.size != op.inputs[0].size and deeper[alias.get(second.name, second.name)]:
            return "sums in which the trained part repeats"
        return None
    return {"Softmax": "a softmax in the middle", "Table": "tables"}.get(type(op).__name__, type(op).__name__.lower())


def check(network: Network, parts: Selection, scheme: str) -> None:
    """Raise UserError, with the layer's name, where gradients would have to pass what they cannot."""
    if not any(part.any for part in parts):
        if scheme == "none":
            return
        what = "has a way to the loss" if network.layers else "has weights"
        raise UserError(f"no layer that the scheme '{scheme}' would train {what}; choose another, or 'none'")
    if network.loss == "none":
        raise UserError(
            "the network has no loss to train with; name one (--loss softmax_ce, mse or hinge), or choose --scheme none"
        )
    deeper, alias = upstream(network, parts), aliases(network)
    ways = live(network)
    for op in network.ops:
        if id(op) not in ways or (op is network.ops[-1] and isinstance(op, Softmax)):
            continue
        if any(deeper[alias.get(x.name, x.name)] for x in activations(op)):
            obstacle = _obstacle(op, deeper, alias)
            if obstacle:
                raise UserError(
                    f"{op.name}: the scheme '{scheme}' needs gradients through {obstacle}, which are not supported; "
                    f"train only what comes behind it ('last', or --layers), or choose 'none'"
                )
    logits = network.logits
    reached = deeper[alias.get(logits.name, logits.name)]
    for i, part in enumerate(parts):
        if part.any and i not in reached:
            raise UserError(f"{network.layers[i].name}: it has no way to the loss, so it cannot train; leave it out")
