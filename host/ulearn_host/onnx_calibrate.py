"""What a draft's activations do on calibration samples, computed by ONNX's own reference evaluator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.onnx_lower import Draft, Places

MAX_SAMPLES = 200
_LARGEST = 1e15
Progress = Callable[[int, int], None]


@dataclass
class Seen:
    """Of one tensor of the file: its range, and where it is asked for, of each number the mean of its squares."""

    low: float
    high: float
    energy: NDArray[np.float64] | None = None


def shaped_samples(draft: Draft, calibration: NDArray[Any]) -> NDArray[Any]:
    """Samples [n, ...] as [n, *the input's shape in the file]. Raises UserError when they do not fit."""
    samples = np.asarray(calibration)
    dims = draft.graph.dims[1:]
    if samples.ndim < 1 or not len(samples) or samples[0].size != int(np.prod(dims)):
        raise UserError(
            f"calibration samples have shape {list(samples.shape)}, expected [n, {', '.join(map(str, dims))}]"
        )
    if samples.dtype.kind not in "fiub" or not np.isfinite(samples).all():
        raise UserError("calibration samples hold what is no finite number")
    return samples.reshape(len(samples), *dims)


def watch(
    draft: Draft, ranges: set[str], energies: set[str], calibration: NDArray[Any], progress: Progress
) -> dict[str, Seen]:
    """Run at most 200 samples and look at the named tensors of the file: at all for the range, at some for energy.

    Raises UserError when samples do not fit or a tensor is not finite on them.
    """
    samples = shaped_samples(draft, calibration)
    if len(samples) > MAX_SAMPLES:  # spread over all: files are often sorted by class
        samples = samples[np.linspace(0, len(samples) - 1, MAX_SAMPLES).astype(int)]
    wanted = sorted(ranges | energies)
    computed = [name for name in wanted if name != draft.graph.input]
    evaluator = _evaluator(draft, computed)
    seen: dict[str, Seen] = {}
    for i, sample in enumerate(samples):
        fed = _fed(draft, sample)
        try:
            with np.errstate(all="ignore"):
                results = evaluator.run(computed, {draft.graph.input: fed}) if computed else []
        except Exception as fault:  # the evaluator raises whatever its operators meet
            raise UserError(f"the model cannot be computed on the calibration samples ({fault})") from None
        values = dict(zip(computed, results, strict=True)) | {draft.graph.input: _real(draft, fed)}
        for name in wanted:
            _look(seen, name, values[name], len(samples) if name in energies else 0)
        progress(i + 1, len(samples))
    return seen


def _look(seen: dict[str, Seen], name: str, value: Any, count: int) -> None:
    """Take one sample in. count: of all samples, 0 where no energy is wanted."""
    numbers = np.asarray(value, dtype=np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    if not (low > -_LARGEST and high < _LARGEST):  # nor NaN
        raise UserError(f"'{name}' is not finite on the calibration samples; check the samples' units and the weights")
    entry = seen.setdefault(name, Seen(low, high))
    entry.low, entry.high = min(low, entry.low), max(high, entry.high)
    if count:
        if entry.energy is None:
            entry.energy = np.zeros(numbers.shape)
        entry.energy += numbers**2 / count


def _fed(draft: Draft, sample: NDArray[Any]) -> NDArray[Any]:
    """A sample as the file takes it; an integer input is given in real units and quantised here."""
    dtype, fixed = draft.graph.dtype, draft.input.fixed
    if dtype.kind not in "iu" or fixed is None:
        return sample[None].astype(dtype)
    shift = 128 if dtype == np.uint8 else 0
    return (fixed.codes(sample[None].astype(np.float64)).astype(np.int16) + shift).astype(dtype)


def _real(draft: Draft, fed: NDArray[Any]) -> NDArray[Any]:
    dtype, fixed = draft.graph.dtype, draft.input.fixed
    if dtype.kind not in "iu" or fixed is None:
        return fed
    return fixed.real(fed.astype(np.int16) - (128 if dtype == np.uint8 else 0))


def _evaluator(draft: Draft, outputs: list[str]) -> Any:
    """An evaluator of what is left of the file after folding, with the tensors wanted as its outputs."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = draft.graph
    needed = {name for node in draft.nodes for name in node.inputs} & draft.constants.keys()
    initializers = [onnx.numpy_helper.from_array(draft.constants[n].values, n) for n in sorted(needed)]
    number = onnx.helper.np_dtype_to_tensor_dtype(graph.dtype)
    made = onnx.helper.make_graph(
        [node.proto for node in draft.nodes],
        "calibration",
        [onnx.helper.make_tensor_value_info(graph.input, number, graph.dims)],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs],
        initializers,
    )
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.imports]
    try:
        return ReferenceEvaluator(
            onnx.helper.make_model(made, opset_imports=imports), new_ops=_quick_operators(draft.places)
        )
    except Exception as fault:  # the evaluator raises whatever its operators meet
        raise UserError(f"the model cannot be computed ({fault})") from None


# ---- Operators in place of the evaluator's: pooling, where it loops over every cell in Python for minutes, and -------
# ---- quantisation, which it lacks below opset 19 ---------------------------------------------------------------------


def _windows(x: NDArray[Any], place: Places, outside: float) -> NDArray[Any]:
    """Of x [1, c, (h,) w]: every window [1, c, (h,) w, kernel_h, kernel_w].

    outside: what counts in the padding; beyond it, where only a last window reaches, it is NaN.
    """
    image = x.reshape(*x.shape[:2], 1, -1) if x.ndim == 3 else x
    (top, left), (bottom, right) = place.window.pad, place.after
    image = np.pad(image, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=outside)
    (h, w), kernel, (dy, dx) = place.size, place.window.kernel, place.window.stride
    beyond = [
        max(0, (n - 1) * s + k - image.shape[2 + i])
        for i, (n, s, k) in enumerate(((h, dy, kernel[0]), (w, dx, kernel[1])))
    ]
    image = np.pad(image, ((0, 0), (0, 0), (0, beyond[0]), (0, beyond[1])), constant_values=np.nan)
    every: NDArray[Any] = sliding_window_view(image, kernel, axis=(2, 3))[  # type: ignore[call-overload]
        :, :, : (h - 1) * dy + 1 : dy, : (w - 1) * dx + 1 : dx
    ]
    return every[:, :, 0] if x.ndim == 3 else every


def _quick_operators(places: dict[str, Places]) -> list[Any]:
    """Operators with numpy's windows and plain arithmetic. places: of pooling, by output."""
    from onnx.reference.op_run import OpRun

    class MaxPool(OpRun):
        op_domain = ""

        def _run(self, x: NDArray[Any], **options: Any) -> tuple[NDArray[Any]]:
            windows = _windows(x, places[self.output[0]], np.nan)
            return (np.nanmax(windows, axis=(-2, -1)).astype(x.dtype),)

    class AveragePool(OpRun):
        op_domain = ""

        def _run(self, x: NDArray[Any], **options: Any) -> tuple[NDArray[Any]]:
            windows = _windows(x, places[self.output[0]], 0.0 if options.get("count_include_pad") else np.nan)
            return (np.nanmean(windows, axis=(-2, -1)).astype(x.dtype),)

    class QuantizeLinear(OpRun):
        op_domain = ""

        def _run(
            self, x: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any] | None = None, **options: Any
        ) -> tuple[NDArray[Any]]:
            dtype = np.uint8 if zero is None else zero.dtype
            low, high = (0, 255) if dtype == np.uint8 else (-128, 127)
            steps = np.rint(x / scale) + (0 if zero is None else zero.astype(np.float32))
            return (np.clip(steps, low, high).astype(dtype),)

    class DequantizeLinear(OpRun):
        op_domain = ""

        def _run(
            self, x: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any] | None = None, **options: Any
        ) -> tuple[NDArray[Any]]:
            start = 0 if zero is None else zero.astype(np.float32)
            return ((x.astype(np.float32) - start) * scale.astype(np.float32),)

    return [MaxPool, AveragePool, QuantizeLinear, DequantizeLinear]
