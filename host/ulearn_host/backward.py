"""Automatic differentiation at compile time: from the forward operators to the records of a backward pass.

Reverse-mode differentiation over the operators in reverse order. A branch that leads to nothing trained is dropped; a
weight is updated as soon as its gradient exists and has been passed on; gradients share the arena with activations, and
records that may write in place say so. Gradients are with respect to real values: an operator's own quantisation has no
say but in its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ulearn_host import memory, scales
from ulearn_host import numbers as n
from ulearn_host import scratch as share
from ulearn_host.errors import UserError
from ulearn_host.lowering import Blob, Record, concat_slices, conv_geometry, dimensions, shapes, vector_shape, walk
from ulearn_host.network import (
    Concat,
    Conv,
    Dense,
    Depthwise,
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
    Window,
)
from ulearn_host.parameters import Kept, is_vector_dense, largest
from ulearn_host.schemes import Selection, activations, aliases, is_masked, live, lowest, upstream

# Gradients of at least so many numbers are narrow where a plan asks for narrow ones: what is smaller saves no memory.
NARROW_FROM = 256


@dataclass(frozen=True)
class Gradient:
    """A gradient in the arena: its name there, and whether its mantissas have 8 bits."""

    name: str
    narrow: bool

    @property
    def top(self) -> int:
        """The largest mantissa."""
        return n.NARROW_MAX if self.narrow else n.MANTISSA_MAX


@dataclass
class Slots:
    """Gains and gates of STATE, numbered as they are asked for. gates: (layer, 'weight' or 'bias')."""

    gains: list[int] = field(default_factory=list)
    gates: list[tuple[int, str]] = field(default_factory=list)

    def gain(self, layer: int) -> int:
        """The gain of a layer's gradient: its offset in STATE."""
        if layer not in self.gains:
            self.gains.append(layer)
        return n.STATE_BYTES + n.GAIN_BYTES * self.gains.index(layer)

    @property
    def first_gate(self) -> int:
        """Where the gates begin, once all gains are known."""
        return n.STATE_BYTES + n.GAIN_BYTES * len(self.gains)


@dataclass
class Context:
    """What a backward pass is made from. sizes: bytes of every arena tensor, to be added to; kept: by layer."""

    network: Network
    frozen: Blob
    sizes: dict[str, int]
    place: Callable[[Tensor], int | str]
    kept: dict[int, Kept]
    slots: Slots
    narrow: bool
    gated: bool


def saved(network: Network, parts: Selection) -> set[str]:
    """The activations that the backward pass reads as they are: inputs of trained weights and of largest-of pools."""
    deeper, alias = upstream(network, parts), aliases(network)
    index, ways = {id(layer): i for i, layer in enumerate(network.layers)}, live(network)
    found = set()
    for op in network.ops:
        if id(op) not in ways:
            continue
        trains = isinstance(op, Weighted) and parts[index[id(op)]].rows > 0
        name = alias.get(op.input.name, op.input.name)
        if trains or (isinstance(op, Pool) and op.kind == "max" and deeper[name]):
            found.add(name)
    return found


def masks(network: Network, parts: Selection) -> list[Op]:
    """The operators whose outputs the backward pass knows by one bit a number, because the numbers are not kept."""
    deeper, alias, kept, ways = upstream(network, parts), aliases(network), saved(network, parts), live(network)
    return [
        op
        for op in network.ops
        if id(op) in ways
        and not isinstance(op, Reshape)
        and is_masked(op, network)
        and deeper[op.output.name]
        and alias.get(op.output.name, op.output.name) not in kept
    ]


def mask_name(op: Op) -> str:
    """The arena tensor of an operator's mask."""
    return "mask " + op.output.name


class Backward:
    """Builds the records; see the module."""

    def __init__(self, context: Context, parts: Selection) -> None:
        """parts: what is trained by this pass; parameters may be kept for more."""
        self.c, self.parts = context, parts
        self.network = context.network
        self.alias = aliases(self.network)
        self.deeper = upstream(self.network, parts)
        self.kept_activations = saved(self.network, parts)
        self.index = {id(layer): i for i, layer in enumerate(self.network.layers)}
        self.gradients: dict[str, Gradient] = {}
        self.out: list[Record] = []
        self.gates: list[tuple[Record, int]] = []
        logits = self.network.logits
        last = self.network.ops[-1]
        self.beta = last.beta if isinstance(last, Softmax) else 1.0
        # What the loss's own derivative leaves out.
        self.unit = {"softmax_ce": self.beta, "mse": 2 * logits.scale / logits.size}.get(self.network.loss, 1.0)
        # What is not larger than the logits stays as wide as the loss makes them.
        self.narrow_from = max(NARROW_FROM, logits.size + 1)

    def records(self) -> list[Record]:
        """The loss, then everything down to the deepest trained layer."""
        self._loss()
        for op in reversed(self.network.ops):
            if isinstance(op, Reshape) or (isinstance(op, Softmax) and op is self.network.ops[-1]):
                continue
            name = op.output.name
            if not self.deeper[name] or name not in self.gradients:
                continue
            if is_masked(op, self.network):
                self._relu(op)
            self._through(op, self.gradients[name])
        return self.out

    # Names.

    def _name(self, tensor: Tensor) -> str:
        return self.alias.get(tensor.name, tensor.name)

    def _wanted(self, tensor: Tensor) -> bool:
        return bool(self.deeper[self._name(tensor)])

    def _narrow(self, tensor: Tensor) -> bool:
        """Whether the gradient at a tensor has mantissas of 8 bits."""
        return self.c.narrow and tensor.size >= self.narrow_from

    def _new(self, tensor: Tensor) -> Gradient:
        """A fresh gradient at a tensor."""
        base = "grad " + self._name(tensor)
        name, i = base, 2
        while name in self.c.sizes:
            name, i = f"{base} ({i})", i + 1
        narrow = self._narrow(tensor)
        self.c.sizes[name] = n.GRADIENT_HEADER + (1 if narrow else 2) * tensor.size
        return Gradient(name, narrow)

    # Records.

    def _emit(self, record: Record, gradient: Gradient | None, result: Gradient | None, layers: frozenset[int]) -> None:
        """Append a record. layers: those that it is needed for; with gates, it runs while any of theirs is on."""
        flags = record.fields.get("flags", 0)
        if gradient and gradient.narrow:
            flags |= n.FLAG_NARROW_OUT
        if result and result.narrow:
            flags |= n.FLAG_NARROW_IN
        if self.c.gated and layers:
            gates = [i for i, (layer, _) in enumerate(self.c.slots.gates) if layer in layers]
            self.gates.append((record, min(gates)))
            flags |= n.FLAG_GATE_DEEPER
        record.fields["flags"] = flags
        self.out.append(record)

    def _pass(
        self,
        op: Op,
        kind: int,
        gradient: Gradient,
        to: Tensor,
        fields: dict[str, int],
        operands: dict[int, int | str] | None = None,
        **rest: object,
    ) -> None:
        """A record that makes a gradient at `to` out of the one at the operator's output."""
        result = self._new(to)
        every: dict[int, int | str] = {0: gradient.name, 1: result.name, **(operands or {})}
        record = Record(kind, f"gradient of {op.name}", every, (result.name,), dimensions(op) | fields, **rest)  # type: ignore[arg-type]
        self._emit(record, gradient, result, self.deeper[self._name(to)])
        self._contribute(op, to, result)

    def _contribute(self, op: Op, tensor: Tensor, gradient: Gradient) -> None:
        """Add a gradient to what other consumers of the tensor have left."""
        name = self._name(tensor)
        known = self.gradients.get(name)
        if known is None:
            self.gradients[name] = gradient
            return
        result = self._new(tensor)
        operands: dict[int, int | str] = {0: known.name, 1: result.name, 4: gradient.name}
        shape = shapes(tensor.shape, tensor.shape)
        places = (known.name,) if known.name == gradient.name else (known.name, gradient.name)
        record = Record(n.OP_SUM, f"gradients behind {op.name}", operands, (result.name,), shape, in_place=places)
        self._emit(record, known, result, self.deeper[name])
        self.gradients[name] = result

    def _loss(self) -> None:
        network, logits = self.network, self.network.logits
        gradient = self._new(logits)
        self.gradients[self._name(logits)] = gradient
        operands: dict[int, int | str] = {0: self.c.place(logits), 1: gradient.name, 3: n.BUF_TARGET << 28}
        fields = {"out_c": logits.size}
        kinds = {"mse": (n.OP_MSE, "mean squared error"), "hinge": (n.OP_HINGE, "hinge loss")}
        kind, name = kinds.get(network.loss, (n.OP_SOFTMAX_CE, "softmax cross-entropy"))
        if network.loss == "softmax_ce":
            table = scales.exponentials(logits.scale * self.beta)
            operands[2] = self.c.frozen.add(table)
            fields["extra"] = len(table)
        elif network.loss == "hinge":
            fields["extra"] = min(max(1, round(1 / logits.scale)), 65535)  # a margin of 1
        self.out.append(Record(kind, name, operands, (gradient.name,), fields))

    def _relu(self, op: Op) -> None:
        name = op.output.name
        gradient, result = self.gradients[name], self._new(op.output)
        fields = shapes(op.output.shape, op.output.shape) | {"act_max": 127}
        if name in self.kept_activations:
            fields["act_min"] = lowest(op)
            source: int | str = self.c.place(op.output)
        else:
            source, fields["flags"] = mask_name(op), n.FLAG_BITS
        operands: dict[int, int | str] = {0: gradient.name, 1: result.name, 4: source}
        title = f"mask of {op.name}"
        record = Record(n.OP_RELU_BACK, title, operands, (result.name,), fields, in_place=(gradient.name,))
        self._emit(record, gradient, result, self.deeper[name])
        self.gradients[name] = result

    def _through(self, op: Op, gradient: Gradient) -> None:
        if isinstance(op, Weighted):
            self._layer(op, gradient)
        elif isinstance(op, Pool | Mean):
            self._pool(op, gradient)
        elif isinstance(op, Elementwise) and op.kind == "mul":
            self._scale(op, gradient)
        elif isinstance(op, Elementwise):
            for x in activations(op):
                if self._wanted(x):
                    self._contribute(op, x, gradient)
        elif isinstance(op, Pad):
            top, left, front = op.before
            self._pass(op, n.OP_CROP, gradient, op.input, {"pad_top": top, "pad_left": left, "extra": front})
        elif isinstance(op, Concat):
            for i, (x, (shape, at)) in enumerate(zip(op.inputs, concat_slices(op), strict=True)):
                if not (op.constants and op.constants[i] is not None) and self._wanted(x):
                    self._pass(op, n.OP_CROP, gradient, x, shape | {"extra": at})

    # Layers with weights.

    def _layer(self, op: Weighted, gradient: Gradient) -> None:
        i = self.index[id(op)]
        part, kept = self.parts[i], self.c.kept[i]
        if part.bias:
            for operand, first, count in kept.biases:
                self._update_bias(op, i, gradient, operand, first, count)
        if self._wanted(op.input):
            self._layer_back(op, i, kept, gradient)
        if part.rows:
            self._update_weights(op, i, kept, gradient)

    def _bounded(self, op: Op, size: int, what: str) -> None:
        if size >= 2**31:
            narrower = not self.c.narrow and size * n.NARROW_MAX // n.MANTISSA_MAX < 2**31
            advice = "choose gradients of 8 bits (--gradients int8), or " if narrower else ""
            raise UserError(
                f"{op.name}: {what} could overflow the accumulator ({size / 2**31:.1f} times its range); {advice}"
                f"let the layer be"
            )

    def _table(self, op: Weighted, first: int, count: int, unit: float) -> tuple[int, dict[str, int]]:
        """The reciprocals of the channels' scales, and the step's scale as fields."""
        table, exponent = self.c.kept[self.index[id(op)]].tables[first, count]
        mantissa, e = scales.mantissa11(self.unit * unit)
        return table, {"scale_mant": mantissa, "scale_exp": e + exponent}

    def _update_bias(self, op: Weighted, i: int, gradient: Gradient, operand: int, first: int, count: int) -> None:
        table, fields = self._table(op, first, count, 1 / op.input.scale)
        height, width, channels = op.output.shape
        self._bounded(op, gradient.top * height * width, f"the bias's gradient over {height * width} positions")
        fields |= {"in_c": first, "out_h": height, "out_w": width, "out_c": count, "extra": channels}
        operands: dict[int, int | str] = {0: gradient.name, 2: operand, 3: table}
        record = Record(n.OP_UPDATE_BIAS, f"update {op.name}/bias", operands, (), fields)
        self._emit_update(record, gradient, i, "bias")

    def _emit_update(self, record: Record, gradient: Gradient, layer: int, kind: str) -> None:
        self._emit(record, gradient, None, frozenset())
        if self.c.gated:
            self.gates.append((record, self.c.slots.gates.index((layer, kind))))

    def _update_weights(self, op: Weighted, i: int, kept: Kept, gradient: Gradient) -> None:
        total = len(op.weights)
        table, fields = self._table(op, total - kept.rows, kept.rows, op.input.scale * 2.0**kept.fraction)
        height, width, channels = op.output.shape
        self._bounded(op, gradient.top * 255 * height * width, f"weight gradients over {height * width} positions")
        fields = dimensions(op) | kept.kind | fields | {"zero_in": op.input.zero, "out_c": kept.rows}
        operands: dict[int, int | str] = {0: gradient.name, 1: self.c.place(op.input), 2: kept.weights, 3: table}
        kind, size = n.OP_UPDATE_CONV, 0
        if is_vector_dense(op, kept.rows):
            kind = n.OP_UPDATE_WEIGHT
            fields |= vector_shape(op) | {"extra": channels}
        elif isinstance(op, Depthwise):
            kind = n.OP_UPDATE_DEPTHWISE
            fields |= conv_geometry(op) | {"extra": channels}
        else:
            band, size = share.update(op.output, op.weights[0].size)
            fields |= conv_geometry(op) | {"extra": channels | band << 16}
        record = Record(kind, f"update {op.name}/weights", operands, (), fields, scratch=size)
        self._emit_update(record, gradient, i, "weight")

    def _layer_back(self, op: Weighted, i: int, kept: Kept, gradient: Gradient) -> None:
        """Passes the gradient through a layer's frozen rows, then its trained ones."""
        total = len(op.weights)
        assert kept.scales is not None
        table, exponent = kept.scales
        window = op.window if isinstance(op, Conv | Depthwise) else Window((1, 1))
        meeting = _meeting(op, window)
        across = op.multiplier if isinstance(op, Depthwise) else total
        reach = 128 * (across - min(kept.rows, across)) + largest(kept.dtype, kept.fraction) * min(kept.rows, across)
        self._bounded(op, gradient.top * meeting * reach, f"the gradient that {across * meeting} products meet in")
        fields = kept.kind | {"scale_exp": exponent, "extra": kept.rows, "gain": self.c.slots.gain(i)}
        operands: dict[int, int | str] = {3: table}
        if kept.rows < total:
            operands[2] = kept.records[0].operands[2]  # where the forward pass has them
        if kept.rows:
            operands[5] = kept.weights
        if isinstance(op, Depthwise):
            kind, size = n.OP_DEPTHWISE_BACK, share.depthwise_back(op)
            same = op.input.shape == op.output.shape and window.stride == (1, 1)
        elif isinstance(op, Dense) and op.rows == 1:
            kind, size, same = n.OP_DENSE_BACK, memory.aligned(2 * total), False
        else:
            assert isinstance(op, Conv | Dense)
            kind, size = n.OP_CONV_BACK, share.conv_back(op)
            same = window == Window((1, 1)) and op.weights.shape[-1] <= total
        places = (gradient.name,) if same and self._narrow(op.input) == gradient.narrow else ()
        if kind == n.OP_DENSE_BACK:
            fields |= vector_shape(op)
        else:
            fields |= conv_geometry(op)
        self._pass(op, kind, gradient, op.input, fields, operands, in_place=places, scratch=size)

    # Operators without weights.

    def _pool(self, op: Pool | Mean, gradient: Gradient) -> None:
        window = op.window if isinstance(op, Pool) else Window((op.input.shape[0], op.input.shape[1]))
        fields = walk(window)
        meeting = _meeting(op, window)
        top = n.NARROW_MAX if self._narrow(op.input) else n.MANTISSA_MAX
        operands: dict[int, int | str] = {}
        if isinstance(op, Pool) and op.kind == "max":
            kind, extra, largest_sum = n.OP_MAX_BACK, 0, gradient.top * meeting
            operands[4] = self.c.place(op.input)
        else:
            least = _fewest_inside(op, window)
            kind, extra = n.OP_AVERAGE_BACK, min(30, 10 + (least - 1).bit_length())
            largest_sum = gradient.top * meeting * (2**extra // least + 1)
        self._bounded(op, largest_sum, f"the gradient of {meeting} windows that meet")
        shift = max(0, math.ceil(math.log2(largest_sum / top)))
        fields |= {"extra": extra, "scale_mant": shift}
        self._pass(op, kind, gradient, op.input, fields, operands)

    def _scale(self, op: Elementwise, gradient: Gradient) -> None:
        assert op.constant is not None
        real = (op.constant.ravel().astype(np.float64) - op.second.zero) * op.second.scale
        exponent = max(-8000, math.frexp(float(np.abs(real).max()) or 1.0)[1] - 11)
        table = np.clip(np.rint(real * 2.0**-exponent), -2047, 2047).astype(np.int16)
        fields = {"extra": len(table), "scale_exp": exponent}
        places = (gradient.name,)
        self._pass(op, n.OP_SCALE_BACK, gradient, op.input, fields, {2: self.c.frozen.add(table)}, in_place=places)


def _meeting(op: Op, window: Window) -> int:
    """How many windows hold a cell at most."""
    places = zip(op.output.shape[:2], window.kernel, window.stride, strict=True)
    return math.prod(min(out, -(-kernel // stride)) for out, kernel, stride in places)


def _fewest_inside(op: Op, window: Window) -> int:
    """The least number of cells inside the image that any window has."""
    least = 1
    for size, out, kernel, stride, pad in zip(
        op.input.shape[:2], op.output.shape[:2], window.kernel, window.stride, window.pad, strict=True
    ):
        starts = [o * stride - pad for o in range(out)]
        least *= min(min(start + kernel, size) - max(start, 0) for start in starts)
    return least
