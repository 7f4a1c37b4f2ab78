"""LiteRT's reference kernels as the judge of an imported model: the interpreter, one thread, no optimised kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType


@dataclass(frozen=True)
class Border:
    """An input or an output of the model."""

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: float
    zero_point: int

    @classmethod
    def of(cls, details: dict[str, Any]) -> Border:
        """The border that the interpreter describes; a float border has scale 0."""
        scale, zero_point = details["quantization"]
        shape = tuple(int(size) for size in details["shape"])
        return cls(int(details["index"]), shape, np.dtype(details["dtype"]), float(scale), int(zero_point))


@dataclass(frozen=True)
class Details:
    """The one input and the one output."""

    input: Border
    output: Border


class Oracle:
    """A model run by LiteRT's reference kernels."""

    def __init__(self, model: bytes | Path | str, intermediates: bool = False) -> None:
        """Load a model; with `intermediates` the interpreter keeps every tensor from the start."""
        self._model = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._plain = None if intermediates else self._load(False)
        self._keeping = self._load(True) if intermediates else None
        interpreter = self._plain or self._keeping
        self.details = Details(
            Border.of(interpreter.get_input_details()[0]), Border.of(interpreter.get_output_details()[0])
        )

    def _load(self, keep: bool) -> Any:
        interpreter = Interpreter(
            model_content=self._model,
            experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
            num_threads=1,
            experimental_preserve_all_tensors=keep,
        )
        interpreter.allocate_tensors()
        return interpreter

    def _invoke(self, interpreter: Any, x: np.ndarray) -> np.ndarray:
        border = self.details.input
        values = np.asarray(x)
        if values.dtype != border.dtype:
            raise TypeError(f"the model takes {border.dtype}, not {values.dtype}")
        interpreter.set_tensor(border.index, values.reshape(border.shape))
        interpreter.invoke()
        return interpreter.get_tensor(self.details.output.index)

    def run(self, x: np.ndarray) -> np.ndarray:
        """The raw output for one sample of the model's own dtype, with or without the batch axis."""
        return self._invoke(self._plain or self._keeping, x)

    def intermediate(self, x: np.ndarray) -> dict[int, np.ndarray]:
        """Every tensor of the graph after one sample, by tensor index, constants included."""
        if self._keeping is None:
            self._keeping = self._load(True)
        self._invoke(self._keeping, x)
        values = {}
        for details in self._keeping.get_tensor_details():
            try:
                values[int(details["index"])] = self._keeping.get_tensor(details["index"])
            except ValueError:  # a temporary of a kernel that was never filled
                continue
        return values
