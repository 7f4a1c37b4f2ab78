"""From an ONNX graph to a draft: layouts resolved, views dissolved, constants folded, activations fused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.network import Shape, Window
from ulearn_host.onnx_draft import (
    DraftOp,
    DraftReshape,
    DraftSoftmax,
    DraftTable,
    DraftTensor,
    Function,
    Value,
)
from ulearn_host.onnx_file import MAX_NUMBERS, Graph, Node
from ulearn_host.onnx_fold import Constant, fold

_MAX_TOTAL = 1 << 25  # numbers of all activations and constants
_LONGEST_NAME = 80
_MAX_WORK = 1 << 30  # multiply-accumulates a sample

Handler = Callable[["Lowering", Node], None]
HANDLERS: dict[str, tuple[Handler, frozenset[str], int]] = {}


def operator(*names: str, options: str = "", inputs: int = 1) -> Callable[[Handler], Handler]:
    """Register what lowers an operator; options: the attributes that it knows; inputs: how many it has at most."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler, frozenset(options.split()), inputs
        return handler

    return register


@dataclass(frozen=True)
class Places:
    """Where a pooling's windows lie: window, padding below and to the right as in the file, output (height, width)."""

    window: Window
    after: tuple[int, int]
    size: tuple[int, int]


@dataclass
class Draft:
    """What lowering gives. constants, nodes: what is left of the file to compute activations with. places: of pooling
    operators, by output."""

    ops: list[DraftOp]
    input: DraftTensor
    output: DraftTensor
    softmax: bool
    notes: list[str]
    graph: Graph
    nodes: list[Node]
    constants: dict[str, Constant]
    places: dict[str, Places]


class Lowering:
    """The state of one pass over the nodes."""

    def __init__(self, graph: Graph) -> None:
        """Start with the constants and the input."""
        self.graph = graph
        self.constants = {name: Constant(array) for name, array in graph.constants.items()}
        self.values: dict[str, Value] = {}
        self.ops: list[DraftOp] = []
        self.nodes: list[Node] = []
        self.places: dict[str, Places] = {}
        self.notes = list(graph.notes)
        self.readers = Counter(name for node in graph.nodes for name in node.inputs)
        self.readers[graph.output] += 1
        self._names: set[str] = set()
        self._total = self._work = 0
        self._reshaped: dict[tuple[int, Shape], DraftTensor] = {}
        self.input = self._make_input()

    def _make_input(self) -> DraftTensor:
        dims, order = self.graph.dims, memory_order(self.graph)
        shape, index = arranged_index(dims, order)
        tensor = DraftTensor(self.unique(self.graph.input), shape, self.graph.input, index)
        codes = self.graph.dtype if self.graph.dtype.kind in "iu" else None
        if codes == np.uint8:
            self.notes.append("the input's uint8 codes are int8 on the board: subtract 128")
        if order != sorted(order) and math.prod(dims[2:]) > 1 and dims[1] > 1:
            kind = "height, width, channels" if len(dims) == 4 else "length, channels"
            self.notes.append(f"the board takes the input as {kind}; the file has channels first")
        self.values[self.graph.input] = Value(tensor, index, codes=codes)
        return tensor

    # ---- What handlers ask for ---------------------------------------------------------------------------------------

    def value(self, node: Node, i: int = 0) -> Value:
        """Input i as real numbers that the network computes. sole: whether this node alone reads it."""
        value = self.any_value(node, i)
        if value.codes is not None:
            raise node.refuse(
                "works on int8 codes; only DequantizeLinear before it and QuantizeLinear behind it is known"
            )
        if isinstance(value.tensor.producer, DraftSoftmax):
            raise node.refuse(
                "comes behind the softmax, which is only supported at the end; export the model without it"
            )
        return value

    def any_value(self, node: Node, i: int = 0) -> Value:
        """Input i, codes or real."""
        name = node.inputs[i] if i < len(node.inputs) else ""
        if name in self.constants:
            raise node.refuse(f"has a constant '{name}' for its input {i}; simplify the model first (onnxsim)")
        if name not in self.values:
            raise node.refuse(f"reads '{name}', which is missing or a second output of a node; that is not supported")
        value = self.values[name]
        return replace(value, sole=value.sole and self.readers[name] == 1)

    def constant(self, node: Node, i: int) -> Constant | None:
        """Input i as a constant; None when it is left out. Raises UserError when it is computed."""
        name = node.inputs[i] if i < len(node.inputs) else ""
        if name and name not in self.constants:
            raise node.refuse(f"has an input '{name}' that is computed; expected a constant")
        return self.constants.get(name)

    def given(self, node: Node, i: int) -> Constant:
        """Input i as a constant that must be there."""
        found = self.constant(node, i)
        if found is None:
            raise node.refuse(f"lacks its input {i}; the file is damaged")
        return found

    # ---- What handlers make ------------------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """The name, or one like it that is free."""
        while name in self._names:
            name += "'"
        self._names.add(name)
        return name

    def tensor(self, node: Node, shape: Shape, index: NDArray[np.int32]) -> DraftTensor:
        """The output of a node in memory; it becomes the node's value."""
        self.hold(node, math.prod(shape))
        name = node.outputs[0] if node.outputs else ""
        tensor = DraftTensor(self.unique(name), shape, name, index)
        self.values[name] = Value(tensor, index)
        return tensor

    def emit(self, op: DraftOp) -> None:
        """Add an operator."""
        op.output.producer = op
        self.ops.append(op)

    def hold(self, node: Node, count: int) -> None:
        """Count numbers that are kept, before they are made, so that no file takes all memory."""
        self._total += count
        if count > MAX_NUMBERS or self._total > _MAX_TOTAL:
            raise node.refuse(f"gives {count} numbers; that is more than any board holds")

    def work(self, node: Node, count: int) -> None:
        """Count multiply-accumulates, so that no file makes the calibration run for ever."""
        self._work += count
        if self._work > _MAX_WORK:
            raise node.refuse(f"takes {count} multiply-accumulates; the model is too much for any board")

    def again(self, node: Node, value: Value) -> None:
        """The node's output is what its input's operator gives from now on, as for a fused activation."""
        value.tensor.source = node.outputs[0]
        value.tensor.order = value.index
        self.values[node.outputs[0]] = value

    def reshaped(self, node: Node, tensor: DraftTensor, shape: Shape) -> DraftTensor:
        """The same memory in another shape."""
        if tensor.shape == shape:
            return tensor
        key = id(tensor), shape
        if key not in self._reshaped:
            made = DraftTensor(self.unique(f"{tensor.name}/shape"), shape, tensor.source, tensor.order, tensor.fixed)
            self.emit(DraftReshape(f"{node.name}/reshape", [tensor], made))
            self._reshaped[key] = made
        return self._reshaped[key]

    def image(self, node: Node, value: Value) -> DraftTensor:
        """The value as an image [1, c, h, w] or a series [1, c, length] that lies as (h, w, c) in memory."""
        dims = value.index.shape
        if len(dims) not in (3, 4) or dims[0] != 1:
            raise node.refuse(f"takes {list(dims)}; expected one image [1, c, h, w] or one series [1, c, length]")
        self.work(node, value.index.size)
        order = [0, *range(2, len(dims)), 1]
        if not in_order(value.index.transpose(order)):
            raise node.refuse(
                "would need its input's numbers moved in memory, which is not supported; "
                "let the model take its input as [1, channels, height, width] and keep it so"
            )
        h, w = (1, *dims[2:])[-2:]
        return self.reshaped(node, value.tensor, (h, w, dims[1]))

    def image_out(self, node: Node, value: Value, shape: Shape) -> DraftTensor:
        """The output of an operator on images, with as many dimensions as the input's value."""
        h, w, c = shape
        dims = (1, c, h, w) if value.index.ndim == 4 else (1, c, w)
        self.hold(node, math.prod(dims))
        _, index = arranged_index(dims, [0, *range(2, len(dims)), 1])
        return self.tensor(node, shape, index)

    def table(
        self, node: Node, x: Value, function: str, compute: Function, bounds: tuple[float, float] | None = None
    ) -> None:
        """A function of every number; one that follows another, which nothing else reads, becomes one with it."""
        before = x.tensor.producer
        if isinstance(before, DraftTable) and x.sole and x.tensor.fixed is None:
            joined = f"{before.function}, {function}"
            before.function = joined if len(joined) < _LONGEST_NAME else "several functions"
            before.bounds = bounds
            before.steps.append(compute)
            self.again(node, x)
            return
        output = self.tensor(node, x.tensor.shape, x.index)
        self.emit(DraftTable(node.name, [x.tensor], output, function, [compute], bounds))


# ---- Layout ----------------------------------------------------------------------------------------------------------


def in_order(index: NDArray[np.int32]) -> bool:
    """Whether numbers lie one behind the other."""
    return bool((index.ravel() == np.arange(index.size, dtype=np.int32)).all())


def arranged_index(dims: tuple[int, ...], order: Sequence[int]) -> tuple[Shape, NDArray[np.int32]]:
    """The memory shape (h, w, c), and where each number of a tensor `dims` lies when its axes lie in `order`."""
    inner = [dims[i] for i in order]
    index = np.arange(math.prod(dims), dtype=np.int32).reshape(inner).transpose(np.argsort(order))
    padded = [1, 1, *inner[1:]][-3:]
    return (padded[0], padded[1], padded[2]), index


_THROUGH = {"QuantizeLinear", "DequantizeLinear", "Identity", "Cast", "Dropout", "Add", "Sub", "Mul", "Div"}
_CHANNELS_FIRST = [[0, 1], [0, 2, 1], [0, 2, 3, 1]]


def memory_order(graph: Graph) -> list[int]:
    """How the input's axes lie on the board. Files have channels first, unless the first thing they do is to move
    them there, as Keras exports do, or nothing shows it and the last axis alone can be channels."""
    rank = len(graph.dims)
    first = _first_structural(graph)
    if rank == 2:
        return [0, 1]
    plain = list(range(rank))
    if first is None or first.op in ("Reshape", "Flatten", "MatMul", "Gemm", "Squeeze", "Unsqueeze"):
        return plain if rank == 3 or (graph.dims[3] <= 4 < graph.dims[1]) else _CHANNELS_FIRST[rank - 2]
    if first.op == "Transpose" and first.attributes.get("perm") in ([0, 3, 1, 2], [0, 2, 1]):
        return plain
    return _CHANNELS_FIRST[rank - 2]


def _first_structural(graph: Graph) -> Node | None:
    """The first operator on the way from the input that looks at the layout."""
    names = {graph.input}
    for node in graph.nodes:
        if names & set(node.inputs):
            if node.op not in _THROUGH:
                return node
            names.update(node.outputs)
    return None


# ---- The pass --------------------------------------------------------------------------------------------------------


def lower(graph: Graph) -> Draft:
    """Lower a graph. Raises UserError, with the node's name, for everything that is not supported."""
    for name in ("views", "layers", "elementwise", "functions", "images"):  # they register their operators
        import_module(f"ulearn_host.onnx_{name}")

    state = Lowering(graph)
    for node in graph.nodes:
        _lower_node(state, node)
    return _finished(state)


def _lower_node(state: Lowering, node: Node) -> None:
    if not node.outputs or not node.outputs[0]:
        raise node.refuse("has no output; the file is damaged")
    if node.op == "Shape" and node.inputs and node.inputs[0] in state.values:
        shape = np.asarray(state.values[node.inputs[0]].index.shape, dtype=np.int64)
        whole = shape[node.integer("start", 0) : node.integer("end", len(shape))]
        state.constants[node.outputs[0]] = Constant(whole)
    elif all(name == "" or name in state.constants for name in node.inputs) and node.op != "Dropout":
        given = [state.constants.get(name) for name in node.inputs]
        folded = fold(node, given, state.graph.opset)
        state.hold(node, folded.values.size)
        state.constants[node.outputs[0]] = folded
    elif node.op in HANDLERS:
        handler, options, most = HANDLERS[node.op]
        if len(node.inputs) > most:
            raise node.refuse(f"has {len(node.inputs)} inputs, expected {most} at most; the file is damaged")
        unknown = sorted(set(node.attributes) - options)
        if unknown:
            raise node.refuse(f"has the option {unknown[0]}, which is not supported; export the model without it")
        state.nodes.append(node)
        handler(state, node)
    else:
        raise node.refuse(f"is not supported; {_ADVICE.get(node.op, 'replace it by layers that the manual lists')}")


_ADVICE = {
    **dict.fromkeys(
        ("GRU", "LSTM", "RNN"), "recurrent layers do not run on the board; use convolutions over time instead"
    ),
    **dict.fromkeys(
        ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm"),
        "quantise with QuantFormat.QDQ instead of QOperator",
    ),
    **dict.fromkeys(("ArgMax", "TopK"), "export the model up to the class scores; the board takes the largest itself"),
    **dict.fromkeys(
        ("ConvTranspose", "Resize", "Upsample"), "the board has no upsampling; use strides and pooling only"
    ),
    "DynamicQuantizeLinear": "quantise the model statically, with calibration samples",
}


def _finished(state: Lowering) -> Draft:
    graph = state.graph
    value = state.values.get(graph.output)
    if value is None:
        raise UserError(f"the output '{graph.output}' does not depend on the input; the file is damaged")
    output = value.tensor
    dims = value.index.shape
    orders = [list(range(len(dims)))]
    if len(dims) in (3, 4):
        orders.append([0, *range(2, len(dims)), 1])
    fits = [in_order(value.index.transpose(order)) for order in orders]
    if not any(fits):
        raise UserError(
            f"the output '{graph.output}' would need its numbers moved in memory, which is not supported; "
            "export the model up to the layer before"
        )
    if not fits[0]:
        state.notes.append("the board gives the output with channels last; the file has them first")
    if not state.ops:
        raise UserError("the model computes nothing; expected at least one layer")
    softmax = isinstance(output.producer, DraftSoftmax)
    if output.producer is not state.ops[-1]:
        raise UserError(f"the output '{graph.output}' is not what the last layer gives; export it as the only end")
    return Draft(
        state.ops, state.input, output, softmax, state.notes, graph, state.nodes, state.constants, state.places
    )
