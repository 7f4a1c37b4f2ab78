"""Where a plan keeps each layer's weights and biases, and which of them are trainable tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ulearn_host import numbers as n
from ulearn_host import scales
from ulearn_host.errors import UserError
from ulearn_host.lowering import Blob, Lowering, Record, folded_bias
from ulearn_host.network import Dense, Depthwise, Weighted
from ulearn_host.schemes import Part

WeightType = Literal["int16", "int8"]
FINER_MAX = 3  # measured: a fourth bit gains nothing (python tests/speakers.py)


@dataclass
class Trainable:
    """A trainable tensor as TENSORS describes it. scales: float32 [channels], real units of one step of the integer."""

    name: str
    dtype: int
    fraction: int
    shape: tuple[int, int, int, int]
    operand: int
    scales: NDArray[np.float32]


@dataclass
class Kept:
    """A layer's parameters: operands in FROZEN or TRAIN.

    rows: how many of the last channels have trained weights; weights: theirs; biases: (operand, first channel,
    channels) of every trained bias tensor; records: the layer's forward records.
    """

    rows: int
    weights: int
    dtype: int
    fraction: int
    biases: list[tuple[int, int, int]]
    records: list[Record]
    tables: dict[tuple[int, int], tuple[int, int]]  # (first channel, channels): reciprocals and their exponent
    scales: tuple[int, int] | None = None  # what gradients are multiplied by on their way down, and its exponent

    @property
    def kind(self) -> dict[str, int]:
        """How trained weights are kept, as a backward record's fields."""
        return {"w_dtype": self.dtype, "fraction": self.fraction} if self.rows else {}

    def seen(self, taps: int) -> dict[str, int]:
        """How they are kept, as the fields of a forward record that sums up `taps` products."""
        return self.kind | {"fraction": self.fraction + n.FINER * finer(self.dtype, self.fraction, taps)}


def largest(dtype: int, fraction: int) -> int:
    """The largest absolute value that a weight can have in a sum, over all that training may do to it."""
    return n.WEIGHT_MAX >> fraction if dtype == n.DTYPE_INT16 else 128


def finer(dtype: int, fraction: int, taps: int) -> int:
    """How many fraction bits forward sums of so many products keep: as many as fit, up to FINER_MAX."""
    if dtype != n.DTYPE_INT16:
        return 0
    fitting = (z for z in range(min(fraction, FINER_MAX), 0, -1) if taps <= _most_taps(largest(dtype, fraction - z)))
    return next(fitting, 0)


def _most_taps(weight: int) -> int:
    """How many products of an input and a weight of this size fit into a sum, with room for a bias."""
    return 2**30 // (255 * weight)


class Parameters:
    """Puts parameters into FROZEN and TRAIN and makes the forward records that use them."""

    def __init__(self, lowering: Lowering, train: Blob, weights: WeightType, fraction: int) -> None:
        """weights: the type of trained ones; fraction: fraction bits of int16."""
        self.lowering, self.train = lowering, train
        wide = weights == "int16"
        self.dtype, self.fraction = (n.DTYPE_INT16, fraction) if wide else (n.DTYPE_INT8, 0)
        self.tensors: list[Trainable] = []

    def keep(self, layer: Weighted, part: Part, passes: bool) -> Kept:
        """Place a layer's parameters, and beside them what its backward records read, so that a board can stream them.

        passes: whether gradients pass through to its input. Raises UserError where its sums are not proved to fit.
        """
        kept = self._keep(layer, part)
        if passes:
            table, exponent = scales.channel_scales(layer.weight_scales)
            # Never shared: beside the layer's other constants, so that a window of a few holds them all.
            kept.scales = self.lowering.frozen.add(table, shared=False), exponent
        spans = [(first, count) for _, first, count in kept.biases]
        if part.rows:
            spans.append((len(layer.weights) - part.rows, part.rows))
        for first, count in dict.fromkeys(spans):
            table, exponent = scales.reciprocals(layer.weight_scales[first : first + count])
            kept.tables[first, count] = self.lowering.frozen.add(table, shared=False), exponent
        return kept

    def _keep(self, layer: Weighted, part: Part) -> Kept:
        count = len(layer.weights)
        first = count - part.rows
        self._check(layer, part)
        kept = Kept(part.rows, 0, self.dtype, self.fraction, [], [], {})
        if part.rows:
            values: NDArray[Any] = layer.weights[first:]
            if self.dtype == n.DTYPE_INT16:
                values = values.astype(np.int16) << self.fraction
            kept.weights = self.train.add(values, shared=False)
            shape = values.shape if values.ndim == 4 else (part.rows, 1, 1, values[0].size)
            steps = layer.weight_scales[first:] / 2**self.fraction
            self._tensor(layer.name + "/weights", self.dtype, self.fraction, shape, kept.weights, steps)
        folded = folded_bias(layer)
        if first:
            operand = self._bias(kept, layer, folded[:first], 0, part) if part.bias else None
            if operand is not None:
                self.lowering.biases[layer.output.name] = operand
            if part.rows == 0:
                kept.records = self.lowering.records(layer)
                return kept
            if isinstance(layer, Depthwise):
                raise UserError(f"{layer.name}: a depthwise layer's weights train all or none of them, not {part.rows}")
            kept.records.append(self.lowering.first_rows(layer, first))  # type: ignore[arg-type]
        bias = layer.bias[first:]
        operand = self._bias(kept, layer, bias, first, part) if part.bias else self.lowering.frozen.add(bias)
        operands: dict[int, int | str] = {2: kept.weights, 3: operand}
        kept.records.append(self.lowering.trained(layer, part.rows, operands, kept.seen(layer.weights[0].size)))
        return kept

    def _bias(self, kept: Kept, layer: Weighted, values: NDArray[np.int32], first: int, part: Part) -> int:
        operand = self.train.add(values, shared=False)
        kept.biases.append((operand, first, len(values)))
        steps = layer.weight_scales[first : first + len(values)] * layer.input.scale
        split = 0 < part.rows < len(layer.weights)
        name = layer.name + ("/bias" if not split or first else "/bias of frozen weights")
        self._tensor(name, n.DTYPE_INT32, 0, (len(values), 1, 1, 1), operand, steps)
        return operand

    def _tensor(
        self, name: str, dtype: int, fraction: int, shape: tuple[int, ...], operand: int, steps: NDArray[np.float64]
    ) -> None:
        o, h, w, i = shape
        self.tensors.append(Trainable(name, dtype, fraction, (o, h, w, i), operand, steps.astype(np.float32)))

    def _check(self, layer: Weighted, part: Part) -> None:
        limit = _most_taps(largest(self.dtype, self.fraction)) if part.rows else 2**30 // (1 << 14)
        taps = layer.weights[0].size
        if taps > limit:
            raise UserError(f"{layer.name}: {taps} inputs could overflow the accumulator, at most {limit} cannot")


def is_vector_dense(layer: Weighted, rows: int) -> bool:
    """Whether a layer runs as DENSE: all rows are trained and applied once."""
    return isinstance(layer, Dense) and layer.rows == 1 and rows == len(layer.weights)
