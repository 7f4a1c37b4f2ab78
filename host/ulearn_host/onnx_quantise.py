"""From a draft to a network: one quantisation a tensor, shared where an operator asks for it, int8 weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ulearn_host.errors import UserError
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
    Quantisation,
    Reshape,
    Softmax,
    Table,
    Tensor,
    Window,
)
from ulearn_host.onnx_calibrate import Progress, Seen, watch
from ulearn_host.onnx_draft import (
    DraftConcat,
    DraftElementwise,
    DraftMean,
    DraftOp,
    DraftPad,
    DraftPool,
    DraftReshape,
    DraftSoftmax,
    DraftTable,
    DraftTensor,
    DraftWeighted,
    Numbers,
)
from ulearn_host.onnx_lower import Draft
from ulearn_host.quantise import span, weight_scales

_BIAS_MAX = 2**30 - 1
_HEADROOM = 1.5  # training moves the logits
_SHARING = (DraftPool, DraftPad, DraftReshape, DraftConcat)


class Groups:
    """Which tensors share a quantisation, and which one."""

    def __init__(self) -> None:
        """No tensor yet."""
        self._parent: dict[DraftTensor, DraftTensor] = {}
        self.fixed: dict[DraftTensor, Quantisation] = {}
        self.seen: dict[DraftTensor, list[DraftTensor]] = {}

    def find(self, tensor: DraftTensor) -> DraftTensor:
        """The tensor that stands for the group."""
        if tensor not in self._parent:
            self._parent[tensor] = tensor
            self.seen[tensor] = [tensor]
            if tensor.fixed is not None:
                self.fixed[tensor] = tensor.fixed
        while self._parent[tensor] is not tensor:
            self._parent[tensor] = self._parent[self._parent[tensor]]
            tensor = self._parent[tensor]
        return tensor

    def quantisation(self, tensor: DraftTensor) -> Quantisation | None:
        """What the group has, if it is known."""
        return self.fixed.get(self.find(tensor))

    def join(self, a: DraftTensor, b: DraftTensor) -> bool:
        """Make one group of two; False when both have a quantisation and they differ."""
        a, b = self.find(a), self.find(b)
        if a is b:
            return True
        first, second = self.fixed.get(a), self.fixed.get(b)
        if first is not None and second is not None and first != second:
            return False
        self._parent[b] = a
        self.seen[a] += self.seen.pop(b)
        known = first or second
        if known is not None:
            self.fixed[a] = known
        return True


def quantise(draft: Draft, calibration: NDArray[Any] | None, progress: Progress, source: str) -> Network:
    """Give every tensor a quantisation and every layer its int8 weights.

    Raises UserError when numbers have to be seen on samples and there are none, or they do not fit.
    """
    ops, groups = _shared(draft)
    for op in ops:
        for tensor in (*op.inputs, op.output):
            groups.find(tensor)
    seen = _seen(draft, ops, groups, calibration, progress)
    _settle(draft, groups, seen)
    tensors: dict[DraftTensor, Tensor] = {}
    names: set[str] = set()

    def tensor_of(draft_tensor: DraftTensor) -> Tensor:
        if draft_tensor not in tensors:
            known = groups.quantisation(draft_tensor)
            assert known is not None
            name = draft_tensor.name
            while name in names:
                name += "'"
            names.add(name)
            tensors[draft_tensor] = Tensor(known.scale, known.zero, name, draft_tensor.shape)
        return tensors[draft_tensor]

    made: list[Op] = []
    for op in ops:
        if isinstance(op, DraftWeighted):
            energy = None if op.codes is not None else _energy(op, seen[op.input.source])
            made.append(_weighted(op, tensor_of(op.input), tensor_of(op.output), energy))
        else:
            made.append(_plain(op, tuple(map(tensor_of, op.inputs)), tensor_of(op.output)))
    loss = "softmax_ce" if draft.softmax else "none"
    return Network(tuple(made), loss, (), source, tuple(draft.notes))  # type: ignore[arg-type]


# ---- Sharing ---------------------------------------------------------------------------------------------------------


def _shared(draft: Draft) -> tuple[list[DraftOp], Groups]:
    """Operators with requantisations where the file gives two scales to what must have one, and the groups."""
    groups = Groups()
    ops: list[DraftOp] = []
    for op in draft.ops:
        if isinstance(op, DraftConcat):
            _share_concat(op, groups, ops)
        elif isinstance(op, _SHARING) and not groups.join(op.input, op.output):
            wanted = op.output
            op.output = _copy(wanted, groups.quantisation(op.input))
            groups.join(op.input, op.output)
            ops.extend((op, _requantisation(op.name, op.output, wanted)))
            continue
        ops.append(op)
    return ops, groups


def _share_concat(op: DraftConcat, groups: Groups, ops: list[DraftOp]) -> None:
    if groups.quantisation(op.output) is None:
        known = [q for q in map(groups.quantisation, op.inputs) if q is not None]
        if len(set(known)) > 1:
            ends = np.array([q.real(np.array([-128, 127])) for q in known])
            groups.fixed[groups.find(op.output)] = span(ends)
    for i, tensor in enumerate(op.inputs):
        if not groups.join(op.output, tensor):
            moved = _copy(tensor, groups.quantisation(op.output))
            groups.join(op.output, moved)
            ops.append(_requantisation(f"{op.name}/{i}", tensor, moved))
            op.inputs[i] = moved


def _copy(tensor: DraftTensor, fixed: Quantisation | None) -> DraftTensor:
    return DraftTensor(f"{tensor.name}/requantised", tensor.shape, tensor.source, tensor.order, fixed)


def _requantisation(name: str, before: DraftTensor, after: DraftTensor) -> DraftTable:
    return DraftTable(f"{name}/requantise", [before], after, "requantise", [])


# ---- Ranges ----------------------------------------------------------------------------------------------------------


def _seen(
    draft: Draft, ops: Iterable[DraftOp], groups: Groups, calibration: NDArray[Any] | None, progress: Progress
) -> dict[str, Seen]:
    """What has to be known from samples; nothing for a model that is quantised throughout."""
    names = {
        tensor.source
        for root, members in groups.seen.items()
        if root not in groups.fixed
        for tensor in members
        if tensor.source and _bounds(tensor) is None
    }
    energies = {op.input.source for op in ops if isinstance(op, DraftWeighted) and op.codes is None}
    if not names | energies:
        return {}
    if calibration is None:
        raise UserError(
            f"'{min(names | energies)}' is not quantised in the file: pass calibration samples like those the board "
            "will see (npz with x, a hundred are enough), or a model quantised to int8 (QDQ)"
        )
    return watch(draft, names, energies, calibration, progress)


def _bounds(tensor: DraftTensor) -> tuple[float, float] | None:
    return tensor.producer.bounds if isinstance(tensor.producer, DraftTable) else None


def _settle(draft: Draft, groups: Groups, seen: dict[str, Seen]) -> None:
    """A quantisation for every group that has none: it spans what its tensors were seen to hold."""
    logits = draft.ops[-1].input if draft.softmax else draft.output
    for root, members in groups.seen.items():
        if root in groups.fixed:
            continue
        ends: list[float] = []
        for tensor in members:
            known = _bounds(tensor)
            if known is not None:
                ends += known
            elif tensor.source in seen:
                ends += (seen[tensor.source].low, seen[tensor.source].high)
        widen = _HEADROOM if groups.find(logits) is root and _bounds(logits) is None else 1.0
        groups.fixed[root] = span(np.array(ends), widen)


# ---- Weights ---------------------------------------------------------------------------------------------------------


def _energy(op: DraftWeighted, seen: Seen) -> Numbers:
    """The mean square of what each weight of an output channel meets: [the weights' summed dimensions]."""
    assert seen.energy is not None
    image = op.input.arranged(seen.energy)
    if op.kind == "dense":
        return np.asarray(image.reshape(-1, op.weights.shape[1]).mean(axis=0))
    window, shape = op.window, op.output.shape
    assert window is not None
    windows = _windows(image.reshape(op.input.shape), window, shape[:2])
    mean = windows.mean(axis=(0, 1)).transpose(1, 2, 0)  # kernel rows, kernel columns, channels
    return np.asarray((mean if op.kind == "conv" else mean.mean(axis=2)).ravel())


def _windows(image: Numbers, window: Window, out: tuple[int, int]) -> Numbers:
    """Windows [h, w, c, kernel_h, kernel_w] of an image [h, w, c] with zeros around it."""
    ends = [(n - 1) * s + k for n, s, k in zip(out, window.stride, window.kernel, strict=True)]
    after = [max(0, e - p - size) for e, p, size in zip(ends, window.pad, image.shape, strict=False)]
    padded = np.pad(image, [*zip(window.pad, after, strict=True), (0, 0)])
    every = sliding_window_view(padded, window.kernel, axis=(0, 1))  # type: ignore[call-overload]
    result: Numbers = every[: ends[0] - window.kernel[0] + 1 : window.stride[0], :: window.stride[1]][:, : out[1]]
    return result


def _weighted(op: DraftWeighted, x: Tensor, y: Tensor, energy: Numbers | None) -> Op:
    """A layer with int8 weights and int32 biases; energy: where the weights are not quantised yet."""
    if energy is not None:
        scales, codes = _weight_codes(op, x, energy)
    else:
        assert op.codes is not None and op.scales is not None
        scales, codes = op.scales, op.codes
    units = x.scale * scales
    known = op.bias_codes is not None and op.bias_scales is not None and np.allclose(op.bias_scales, units, 1e-5, 0)
    bias = op.bias_codes if known else np.rint(op.bias / units)
    assert bias is not None
    if (np.abs(bias) > _BIAS_MAX).any():
        raise UserError(f"layer '{op.name}' has a bias too large for its weights' scale; quantise the model again")
    parts = (np.ascontiguousarray(codes), bias.astype(np.int32), scales, _activation(op, y))
    if op.kind == "dense":
        return Dense(op.name, (x,), y, *parts)
    assert op.window is not None
    return (Conv if op.kind == "conv" else Depthwise)(op.name, (x,), y, *parts, op.window)


def _weight_codes(op: DraftWeighted, x: Tensor, energy: Numbers) -> tuple[Numbers, NDArray[np.int8]]:
    flat = op.weights.reshape(len(op.weights), -1)
    scales = weight_scales(flat, energy)
    # A channel whose weights are all but nothing still needs a scale in which its bias has 31 bits.
    scales = np.maximum(scales, np.abs(op.bias) / (x.scale * _BIAS_MAX) * 1.001)
    scales = scales.astype(np.float32).astype(np.float64)
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise UserError(f"layer '{op.name}' has weights beyond what float32 holds; train the network again")
    codes = np.clip(np.rint(flat / scales[:, None]), -127, 127).astype(np.int8)
    return scales, codes.reshape(op.weights.shape)


# ---- The other operators ---------------------------------------------------------------------------------------------


def _activation(op: Any, y: Quantisation) -> tuple[int, int]:
    """The lowest and the highest code that an operator gives."""
    low, high = (int(y.codes(np.array(v))) if np.isfinite(v) else None for v in (op.low, op.high))
    return -128 if low is None else low, 127 if high is None else high


def _plain(op: DraftOp, inputs: tuple[Tensor, ...], y: Tensor) -> Op:
    """An operator without weights."""
    if isinstance(op, DraftPool):
        return Pool(op.name, inputs, y, op.kind, op.window, _activation(op, y))
    if isinstance(op, DraftMean):
        return Mean(op.name, inputs, y)
    if isinstance(op, DraftElementwise):
        return _elementwise(op, inputs, y)
    if isinstance(op, DraftPad):
        return Pad(op.name, inputs, y, op.before, y.zero)
    if isinstance(op, DraftConcat):
        return Concat(op.name, inputs, y, op.axis)
    if isinstance(op, DraftReshape):
        return Reshape(op.name, inputs, y)
    if isinstance(op, DraftTable):
        return Table(op.name, inputs, y, op.function, _table(op, inputs[0], y))
    assert isinstance(op, DraftSoftmax)
    return Softmax(op.name, inputs, y)


def _elementwise(op: DraftElementwise, inputs: tuple[Tensor, ...], y: Tensor) -> Op:
    activation = _activation(op, y)
    if op.constant is None:
        second = Quantisation(inputs[1].scale, inputs[1].zero)
        return Elementwise(op.name, inputs, y, op.kind, activation, second)
    second = op.second or span(op.constant)
    codes = op.constant if op.second else second.codes(op.constant)
    return Elementwise(op.name, inputs, y, op.kind, activation, second, codes.astype(np.int8))


def _table(op: DraftTable, x: Tensor, y: Tensor) -> NDArray[np.int8]:
    with np.errstate(all="ignore"):
        values = op.compute(x.real(np.arange(-128, 128)))
    if not np.isfinite(values).all():
        raise UserError(f"layer '{op.name}' ({op.function}) is not finite everywhere in the range of its input")
    if op.function == "requantise":  # as QuantizeLinear rounds: half to even
        return np.clip(np.rint(values / y.scale) + y.zero, -128, 127).astype(np.int8)
    return y.codes(values)
