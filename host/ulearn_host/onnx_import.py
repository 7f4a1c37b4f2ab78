"""ONNX models, float (quantised here from calibration samples) or int8 in QDQ form, as a quantised network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.network import Network
from ulearn_host.onnx_calibrate import Progress, shaped_samples
from ulearn_host.onnx_file import read_graph
from ulearn_host.onnx_lower import Draft, lower
from ulearn_host.onnx_quantise import quantise

_Result = TypeVar("_Result")
_UNFORESEEN = "damaged in a way that was not foreseen"


def load_onnx(
    path: Path, calibration: NDArray[Any] | None = None, progress: Progress = lambda done, total: None
) -> Network:
    """An ONNX model of opset 11 to 22 as a quantised network.

    calibration: samples [n, ...] in the model's own input layout or flattened, in real units; a float model needs them,
    one in QDQ form does not; 200 of them are looked at. progress: called with (samples done, samples to do).
    The network's input lies as (height, width, channels): `arrange_samples` brings a model's samples into that order.
    loss is 'softmax_ce' when the model ends in a softmax, else 'none'. Raises UserError, and nothing else, for a file
    that is damaged or hostile and for every operator or option that is not supported, with the node's name.
    """
    return _guarded(path, lambda draft: quantise(draft, calibration, progress, str(path)))


def arrange_samples(path: Path, samples: NDArray[Any]) -> NDArray[Any]:
    """Samples [n, ...] of the model's own input layout as the network of `load_onnx` takes them: [n, size].

    Raises UserError as `load_onnx` does, and when the samples do not fit.
    """

    def arrange(draft: Draft) -> NDArray[Any]:
        flat = shaped_samples(draft, samples).reshape(len(samples), -1)
        return np.ascontiguousarray(flat[:, np.argsort(draft.input.order.ravel())])

    return _guarded(path, arrange)


def _guarded(path: Path, function: Callable[[Draft], _Result]) -> _Result:
    """Apply a function to the draft of a file. A file may be damaged in more ways than anybody lists."""
    try:
        return function(lower(read_graph(path)))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except Exception as fault:
        raise UserError(f"{path}: {_UNFORESEEN} ({type(fault).__name__}: {fault}); export it again") from fault
