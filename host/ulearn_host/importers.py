"""Trained networks from where users have them: .tflite and .onnx files, scikit-learn and plain npz files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host import tflite_import
from ulearn_host.errors import UserError
from ulearn_host.network import Loss, Network
from ulearn_host.quantise import FloatDense

# What holds a network that is quantised, or that its own importer quantises.
GRAPHS = (".tflite", ".onnx")


def from_npz(path: Path) -> list[FloatDense]:
    """A multi-layer perceptron from an npz of w0, b0, w1, b1, ... (float).

    wI: [inputs, outputs] as in x @ w + b; a transposed one is recognised by its bias (a square one cannot be).
    bI: [outputs]. Every layer but the last is followed by a ReLU. Raises UserError when something is missing.
    """
    arrays = load_arrays(path)
    layers: list[FloatDense] = []
    count = sum(1 for name in arrays if name.startswith("w") and name[1:].isdigit())
    if not count:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}, expected weights w0, b0, w1, b1, ...")
    for i in range(count):
        if f"w{i}" not in arrays or f"b{i}" not in arrays:
            raise UserError(f"{path}: w{i} or b{i} is missing; expected w0, b0, ... w{count - 1}, b{count - 1}")
        if arrays[f"w{i}"].dtype.kind not in "fiu" or arrays[f"b{i}"].dtype.kind not in "fiu":
            raise UserError(f"{path}: w{i} or b{i} does not hold numbers")
        w, b = arrays[f"w{i}"].astype(np.float64), arrays[f"b{i}"].astype(np.float64)
        if w.ndim != 2 or b.ndim != 1 or len(b) not in w.shape:
            raise UserError(
                f"{path}: w{i} has shape {w.shape} and b{i} {b.shape}, expected (inputs, outputs), (outputs,)"
            )
        layers.append(FloatDense(w.T if w.shape[1] == len(b) else w, b, relu=i < count - 1))
    return layers


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file by name. Raises UserError when it is none."""
    try:
        data = np.load(path, allow_pickle=False)
        if isinstance(data, np.ndarray):
            raise ValueError("it holds one bare array")
        with data:
            return {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as fault:  # numpy raises half a dozen kinds on a damaged archive
        raise UserError(f"{path}: not a readable npz file ({fault})") from None


def load_samples(path: Path) -> tuple[NDArray[np.float64], NDArray[Any] | None]:
    """Samples from an npz: x [n, ...] in real units, and y [n] or [n, outputs] if there."""
    arrays = load_arrays(path)
    if "x" not in arrays:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}, expected samples under the name x")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim < 2 or x.dtype.kind not in "fiub" or not np.isfinite(x).all():
        raise UserError(f"{path}: x has shape {x.shape} of {x.dtype}, expected finite numbers [n, ...]")
    if y is not None and (y.ndim < 1 or y.dtype.kind not in "fiubU"):
        raise UserError(f"{path}: y has shape {y.shape} of {y.dtype}, expected labels [n] or targets [n, outputs]")
    if y is not None and y.dtype.kind == "f" and not np.isfinite(y).all():
        raise UserError(f"{path}: y holds numbers that are not finite")
    if not len(x) or (y is not None and len(y) != len(x)):
        raise UserError(
            f"{path}: {len(x)} samples x and {0 if y is None else len(y)} targets y, expected as many of both"
        )
    return x.astype(np.float64), y


def load_groups(path: Path, count: int) -> NDArray[Any] | None:
    """Whose each of `count` samples is (a speaker, a machine), from the same npz: group [n], None where it has none."""
    group = load_arrays(path).get("group")
    if group is not None and (group.ndim != 1 or len(group) != count or group.dtype.kind not in "iubUS"):
        found = f"group has shape {group.shape} of {group.dtype}"
        raise UserError(f"{path}: {found}, expected a number or name for each of {count} samples")
    return group


def rows(x: NDArray[np.floating], shape: Sequence[int], source: str) -> NDArray[np.floating]:
    """Samples [n, ...] as a network of the input shape (height, width, channels) takes them: [n, inputs].

    Images with channels first, as PyTorch has them, are turned; flat samples are taken as they are. Raises UserError
    when the sizes differ.
    """
    height, width, channels = shape
    if x.shape[1:] == (channels, height, width) and x.shape[1:] != tuple(shape):
        x = x.transpose(0, 2, 3, 1)
    flat = np.ascontiguousarray(x.reshape(len(x), -1))
    if flat.shape[1] != height * width * channels:
        given = "×".join(str(d) for d in x.shape[1:])
        wanted = "×".join(str(d) for d in shape if d > 1) or "1"
        raise UserError(f"{source}: samples of {given} numbers, expected {wanted}")
    return flat


def from_sklearn(model: Any) -> tuple[list[FloatDense], Loss, list[str]]:
    """Layers, loss and labels of a fitted MLPClassifier or MLPRegressor, or a Pipeline of StandardScaler and one.

    The scaler is folded into the first layer. Raises UserError for other estimators and activations but relu and
    identity.
    """
    mean: NDArray[np.float64] | float = 0.0
    spread: NDArray[np.float64] | float = 1.0
    if type(model).__name__ == "Pipeline":
        *before, model = [step for _, step in model.steps]
        if [type(step).__name__ for step in before] not in ([], ["StandardScaler"]):
            names = ", ".join(type(step).__name__ for step in before)
            raise UserError(f"the pipeline has {names} before the network; only a StandardScaler can be folded in")
        if before:
            mean = before[0].mean_ if before[0].mean_ is not None else 0.0
            spread = before[0].scale_ if before[0].scale_ is not None else 1.0
    kind = type(model).__name__
    if kind not in ("MLPClassifier", "MLPRegressor"):
        raise UserError(f"{kind} is not supported; expected a fitted MLPClassifier or MLPRegressor")
    if not hasattr(model, "coefs_"):
        raise UserError(f"the {kind} is not fitted; call fit() before preparing it")
    if model.activation not in ("relu", "identity"):
        raise UserError(f"activation '{model.activation}' is not supported; train the {kind} with activation='relu'")
    weights = [np.asarray(w, dtype=np.float64).T for w in model.coefs_]
    biases = [np.asarray(b, dtype=np.float64) for b in model.intercepts_]
    biases[0] = biases[0] - (weights[0] * (mean / spread)).sum(axis=1)
    weights[0] = weights[0] / spread
    labels: list[str] = []
    if kind == "MLPClassifier":
        labels = [str(c) for c in model.classes_]
        if model.out_activation_ == "logistic":
            if len(labels) != 2:
                raise UserError("multi-label classifiers are not supported; expected one class a sample")
            # One logit z against none: softmax over (0, z) is the same probability.
            weights[-1] = np.vstack([np.zeros_like(weights[-1]), weights[-1]])
            biases[-1] = np.concatenate([np.zeros_like(biases[-1]), biases[-1]])
    relu = model.activation == "relu"
    last = len(weights) - 1
    layers = [FloatDense(w, b, relu and i < last) for i, (w, b) in enumerate(zip(weights, biases, strict=True))]
    return layers, "softmax_ce" if kind == "MLPClassifier" else "mse", labels


def quantised(
    path: Path, calibration: NDArray[np.floating] | None, tick: Callable[[int, int], None]
) -> tuple[Network, NDArray[np.int8] | None]:
    """The network in a .tflite or .onnx file, and the calibration samples [n, ...] as codes of its input [n, inputs].

    A float ONNX network is quantised here, for which it needs the samples. tick(done, total) is called while it works.
    Raises UserError naming the file and the fault.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".tflite":
        network = tflite_import.load_tflite(path)
    else:
        from ulearn_host import onnx_import

        network = onnx_import.load_onnx(path, calibration, tick)
        if calibration is not None:
            return network, network.input.codes(onnx_import.arrange_samples(path, calibration))
    if calibration is None:
        return network, None
    return network, network.input.codes(rows(calibration, network.input.shape, "the calibration samples"))


def load_model(path: Path) -> tuple[list[FloatDense], Loss, list[str]]:
    """A network from a file: .npz, or a pickled scikit-learn estimator (.pkl, .joblib).

    A pickle runs code when it is opened: only open your own. Raises UserError when the file is of another kind.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".npz":
        return from_npz(path), "softmax_ce", []
    if path.suffix not in (".pkl", ".pickle", ".joblib"):
        raise UserError(f"{path}: '{path.suffix}' is not a model file; expected .tflite, .onnx, .npz, .pkl or .joblib")
    try:
        import joblib
    except ImportError:
        raise UserError("reading scikit-learn models needs the extra: pip install 'ulearn[sklearn]'") from None
    try:
        model = joblib.load(path)
    except Exception as fault:  # unpickling fails in every way there is
        raise UserError(f"{path}: not a readable scikit-learn model ({fault})") from None
    return from_sklearn(model)
