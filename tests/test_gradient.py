"""The integer backward pass points where float32 back-propagation points: on digits, on keywords, by operator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier, MLPRegressor

import speakers
import ulearn
from float_network import FloatNetwork
from ulearn import update as wire
from ulearn_host import numbers as n
from ulearn_host.compiler import GradientType, Options, Plan, compile_plan
from ulearn_host.importers import from_sklearn
from ulearn_host.network import (
    Concat,
    Conv,
    Dense,
    Depthwise,
    Elementwise,
    Loss,
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
from ulearn_host.prepare import calibrated_state, from_network, prepare, target_codes
from ulearn_host.schemes import aliases
from ulearn_host.tflite_import import load_tflite

COSINE = 0.97  # at least, of every trainable tensor, with gradients of 12 bits
LENGTH = 0.05  # at most so far from 1


# ---- Dense layers, on digits -----------------------------------------------------------------------------------------


def float_gradients(network: Network, x: np.ndarray, target: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """d loss / d (weights, bias) of every layer, in float64, of the dequantised network at one real sample."""
    weights = [d.weights * d.weight_scales[:, None] for d in network.layers]
    biases = [d.bias * d.weight_scales * d.input.scale for d in network.layers]
    inputs = [x]
    for d, w, b in zip(network.layers, weights, biases, strict=True):
        y = w @ inputs[-1] + b
        inputs.append(np.maximum(y, 0) if d.masked else y)
    y = inputs[-1]
    if network.loss == "softmax_ce":
        p = np.exp(y - y.max())
        g = p / p.sum() - target
    else:
        g = 2 * (y - target) / len(y)
    result = []
    for i in reversed(range(len(weights))):
        result.append((np.outer(g, inputs[i]), g))
        g = (weights[i].T @ g) * (inputs[i] > 0)
    return result[::-1]


@pytest.mark.parametrize("loss", ["softmax_ce", "mse"])
def test_gradients_match_float(loss: str) -> None:
    """Cosine with float of every tensor's step at least 0.97, and the length within 3 %, over 50 samples."""
    images, y = load_digits(return_X_y=True)
    images = images / 16
    kind = MLPClassifier if loss == "softmax_ce" else MLPRegressor
    onehot = np.eye(10)[y]
    model = kind(hidden_layer_sizes=(40, 24), max_iter=12, random_state=0).fit(
        images[:900], y[:900] if loss == "softmax_ce" else onehot[:900]
    )
    layers, found, labels = from_sklearn(model)
    assert found == loss
    targets = y if loss == "softmax_ce" else onehot
    plan = prepare(layers, images[:300], targets[:300], loss=found, labels=labels, options=Options("full"))
    network = plan.network
    codes = network.layers[0].input.codes(images[900:950])
    wanted = target_codes(network, targets[900:950])
    rate = 0.05 if loss == "softmax_ce" else 0.5
    sums: list[list[np.ndarray]] = [[], []]
    for i, x in enumerate(codes):
        model = ulearn.load(plan.data)
        trainer = ulearn.Trainer(model, learning_rate=rate, skip=0)
        before = bytes(model.train_blob)
        trainer.step(x, int(wanted[i]) if wanted.ndim == 1 else wanted[i].tobytes())
        real = network.layers[0].input.real(x)
        last = network.layers[-1].output
        target = np.eye(10)[y[900 + i]] if loss == "softmax_ce" else last.real(wanted[i])
        floats = [g for pair in float_gradients(network, real, target) for g in pair]
        for j, (dtype, count, offset) in enumerate(wire.tensors(model.tensors)):
            code = "<i4" if dtype == 3 else "<i2"
            step = np.frombuffer(before, code, count, offset) - np.frombuffer(
                bytes(model.train_blob), code, count, offset
            ).astype(np.float64)
            scales = np.repeat(plan.tensors[j].scales, count // plan.tensors[j].shape[0])
            sums[0].append(step * scales / rate)
            sums[1].append(floats[j].ravel())
    tensors = len(plan.tensors)
    for j in range(tensors):
        a, b = np.concatenate(sums[0][j::tensors]), np.concatenate(sums[1][j::tensors])
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        length = np.linalg.norm(a) / np.linalg.norm(b)
        print(plan.tensors[j].name, f"cosine {cosine:.4f}, length {length:.4f}")
        assert cosine >= COSINE, plan.tensors[j].name
        assert abs(length - 1) < LENGTH, plan.tensors[j].name


# ---- Any network -----------------------------------------------------------------------------------------------------

Found = dict[str, tuple[float, float]]  # cosine and length, board to float, by trainable tensor


class Board:
    """A plan on the C core: one step at a time, each from the plan's weights and first state."""

    def __init__(self, plan: Plan) -> None:
        """plan: one training program, all of whose tensors are whole."""
        self.plan, self.network = plan, plan.network
        self.model = ulearn.load(plan.data)
        self.trainer = ulearn.Trainer(self.model, skip=0)
        self.base = bytes(self.model.train_blob)
        self.first = bytes(self.model.state)
        self.alias = aliases(self.network)

    def step(self, x: np.ndarray, target: Any, exponent: int) -> dict[str, np.ndarray]:
        """What a step at the rate 2^exponent takes off each tensor, in real units, divided by the rate."""
        self.model.train_blob[:], self.model.state[:] = self.base, self.first
        self.trainer.set_rate(1024, exponent - 10)
        self.trainer.step(x, int(target) if np.ndim(target) == 0 else target.tobytes())
        changes = {}
        for tensor, (dtype, count, offset) in zip(self.plan.tensors, wire.tensors(self.model.tensors), strict=True):
            code = {n.DTYPE_INT32: "<i4", n.DTYPE_INT16: "<i2"}[dtype]
            before, after = (
                np.frombuffer(bytes(blob), code, count, offset).astype(np.float64)
                for blob in (self.base, self.model.train_blob)
            )
            scales = np.repeat(tensor.scales.astype(np.float64), count // tensor.shape[0])
            changes[tensor.name] = (before - after) * scales / 2.0**exponent
        return changes

    def activations(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """The codes of every activation of the training program's forward pass, by tensor."""
        program = self.plan.programs[1]
        table = list(self.model.table)
        table[n.BUF_INPUT], table[n.BUF_TARGET] = x.tobytes(), bytes(program_target(self.plan))
        sizes = {op.output.name: op.output.size for op in self.network.ops}
        found = {self.network.input.name: x}
        for i, record in enumerate(program.records):
            if record.op in (n.OP_SOFTMAX_CE, n.OP_MSE, n.OP_HINGE):
                break
            assert self.model.run(self.model.training, table, i, 1) == 1
            name = record.writes[0].removeprefix("act ")
            if name in sizes:
                at = program.offsets[record.writes[0]]
                found[name] = np.frombuffer(bytes(self.model.arena[at : at + sizes[name]]), np.int8)
        return found


def program_target(plan: Plan) -> int:
    """Bytes of a target."""
    return plan.network.logits.size if plan.network.loss == "mse" else 2


def forward_at(net: FloatNetwork, codes: dict[str, np.ndarray], alias: dict[str, str]) -> None:
    """A forward pass that sees, operator by operator, the board's activations: its backward pass takes the board's ReLU
    masks, largest cells and logits."""

    def real(tensor: Tensor) -> np.ndarray:
        values = tensor.real(codes[alias.get(tensor.name, tensor.name)]).astype(net.dtype)
        return values.reshape(1, *tensor.shape)

    for node in net.nodes:
        node.forward([real(tensor) for tensor in node.op.inputs])
        if node.low is not None:
            low = getattr(node.op, "activation", (-128,))[0]
            mine = codes[alias.get(node.op.output.name, node.op.output.name)]
            node.passes = (mine != low).reshape(1, *node.op.output.shape)
    net.logits = real(net.network.logits).reshape(1, -1)


def compare(plan: Plan, inputs: np.ndarray, targets: np.ndarray, own_forward: bool = False) -> Found:
    """Of every trainable tensor the cosine and the length of the steps of all samples, beside float32's gradients.

    own_forward: whether float32 runs forward by itself, in place of taking the board's quantised activations. Every
    tensor's rate is a power of two at which its largest change takes about 2,000 to 4,000 steps of the integer that it
    is: the gradient is what is judged, not that small changes are rounded to whole steps.
    """
    board, network = Board(plan), plan.network
    margin = round(1 / network.logits.scale) * network.logits.scale
    net = FloatNetwork(network, margin=margin)
    wanted: list[dict[str, np.ndarray]] = []
    for x, target in zip(inputs, targets, strict=True):
        if own_forward:
            net.forward(network.input.real(x).astype(np.float32))
        else:
            forward_at(net, board.activations(x), board.alias)
        goal = network.logits.real(target) if network.loss == "mse" else int(target)
        wanted.append({k: g.ravel().astype(np.float64) for k, g in net.backward(goal).items()})
    exponents: dict[int, list[str]] = defaultdict(list)
    for tensor in plan.tensors:
        step = float(np.median(tensor.scales))
        largest = max(float(np.abs(w[tensor.name]).max()) for w in wanted)
        exponents[math.floor(math.log2(4096 * step / largest))].append(tensor.name)
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for x, target in zip(inputs, targets, strict=True):
        for exponent, names in exponents.items():
            changes = board.step(x, target, exponent)
            for name in names:
                found[name].append(changes[name])
    result = {}
    for tensor in plan.tensors:
        a, b = np.concatenate(found[tensor.name]), np.concatenate([w[tensor.name] for w in wanted])
        size = np.linalg.norm(a), np.linalg.norm(b)
        result[tensor.name] = float(a @ b / max(size[0] * size[1], 1e-30)), float(size[0] / size[1])
    return result


# ---- Spoken keywords -------------------------------------------------------------------------------------------------

CLIPS = 30


@pytest.fixture(scope="module")
def keywords(shared_data: Path) -> tuple[Network, speakers.Clips]:
    """The keyword network and its clips."""
    return load_tflite(shared_data / speakers.MODEL_FILE), speakers.load(shared_data / speakers.CLIP_FILE)


@pytest.mark.parametrize(("gradients", "least", "off"), [("int16", COSINE, LENGTH), ("int8", 0.75, 0.15)])
def test_keyword_gradients_match_float(
    keywords: tuple[Network, speakers.Clips], gradients: GradientType, least: float, off: float
) -> None:
    """Every layer of the keyword network, over 30 clips, with gains calibrated on others."""
    network, clips = keywords
    rng = np.random.default_rng(0)
    order = rng.permutation(len(clips.labels))
    mine, others = order[:CLIPS], order[CLIPS : CLIPS + 64]
    options = Options("full", gradients=gradients)
    plan = from_network(network, clips.codes[others], clips.labels[others], options=options)
    found = compare(plan, clips.codes[mine], clips.labels[mine])
    alone = compare(plan, clips.codes[mine], clips.labels[mine], own_forward=True)
    print(f"\n{gradients + ' gradients':56} cosine  length   float alone: cosine  length")
    for name, (cosine, length) in found.items():
        print(f"{name[-56:]:56} {cosine:.4f}  {length:.4f}                {alone[name][0]:.4f}  {alone[name][1]:.4f}")
    for name, (cosine, length) in found.items():
        assert cosine >= least and abs(length - 1) <= off, (name, cosine, length)


# ---- Operator by operator --------------------------------------------------------------------------------------------

SAMPLES = 24
CLASSES = 6
SAME = Window((3, 3), (1, 1), (1, 1))
POINT = Window((1, 1))
LINEAR = (-128, 127)


def pictures(rng: np.random.Generator, count: int, height: int, width: int, channels: int) -> np.ndarray:
    """Smooth images, as sums of a few waves, with some noise."""
    i, j = np.mgrid[:height, :width]
    result = rng.normal(0, 0.2, (count, height, width, channels))
    for _ in range(5):
        f, g = rng.uniform(-2.5, 2.5, (2, count, 1, 1, channels))
        phase, strength = rng.uniform(0, 2 * np.pi, (count, 1, 1, channels)), rng.normal(size=(count, 1, 1, channels))
        result += strength * np.sin(f * i[None, ..., None] / 2 + g * j[None, ..., None] / 2 + phase)
    return result


class Builder:
    """Makes networks whose quantisation fits the data that it carries along; every method returns the new tensor."""

    def __init__(self, shape: tuple[int, int, int] = (12, 10, 3), seed: int = 0) -> None:
        """shape: of the input."""
        self.rng = np.random.default_rng(seed)
        self.ops: list[Op] = []
        real = pictures(self.rng, 64 + SAMPLES, *shape)
        self.input = Tensor(float(np.abs(real).max()) / 128, 0, "input", shape)
        self.codes = self.input.codes(real)
        self.values = {"input": self.input.real(self.codes).astype(np.float32)}

    def add(self, op: Op, relu: bool = False, keeps: Tensor | None = None) -> Tensor:
        """Take an operator on, with an output that fits. keeps: the tensor whose quantisation it must have."""
        wide = Tensor(1e6, 0, f"t{len(self.ops)}", op.output.shape)
        (node,) = FloatNetwork(Network((replace(op, output=wide),), "none")).nodes
        y = node.forward([self.values[tensor.name] for tensor in op.inputs])
        if keeps:
            scale, zero = keeps.scale, keeps.zero
        else:
            low, high = (0.0 if relu else float(np.quantile(y, 0.0005))), float(np.quantile(y, 0.9995))
            scale = (high - low) / 255
            zero = int(np.clip(round(-128 - low / scale), -128, 127))
        tensor = Tensor(scale, zero, wide.name, wide.shape)
        self.ops.append(replace(op, output=tensor))
        self.values[tensor.name] = tensor.real(tensor.codes(y)).astype(np.float32)
        return tensor

    def _weighted(
        self, kind: type[Weighted], x: Tensor, out: Any, shape: tuple[int, ...], relu: bool, **how: Any
    ) -> Tensor:
        real = self.rng.normal(size=shape) * np.sqrt(2 / math.prod(shape[1:]))
        scales = np.abs(real.reshape(shape[0], -1)).max(axis=1) / 127
        weights = np.rint(real / scales.reshape(-1, *[1] * (len(shape) - 1))).astype(np.int8)
        bias = np.rint(self.rng.normal(0, 0.1, shape[0]) / (scales * x.scale)).astype(np.int32)
        scales = scales.astype(np.float32).astype(np.float64)
        name = f"{kind.__name__.lower()}_{1 + sum(isinstance(op, kind) for op in self.ops)}"
        y = Tensor(1.0, 0, "", out)
        return self.add(kind(name, (x,), y, weights, bias, scales, LINEAR, **how), relu)

    def conv(self, x: Tensor, channels: int, window: Window = SAME, size: Any = None, relu: bool = True) -> Tensor:
        """size: of the output, the input's where it is None."""
        out = (*(size or x.shape[:2]), channels)
        return self._weighted(Conv, x, out, (channels, *window.kernel, x.shape[2]), relu, window=window)

    def depthwise(self, x: Tensor, multiplier: int = 1, window: Window = SAME, size: Any = None) -> Tensor:
        """A depthwise convolution and a ReLU."""
        channels = multiplier * x.shape[2]
        out = (*(size or x.shape[:2]), channels)
        return self._weighted(Depthwise, x, out, (channels, *window.kernel, 1), True, window=window)

    def dense(self, x: Tensor, outputs: int, relu: bool = False, rows: int = 1) -> Tensor:
        """A fully connected layer, of several rows where that is asked for."""
        return self._weighted(Dense, x, (1, rows, outputs), (outputs, x.size // rows), relu)

    def pool(self, x: Tensor, kind: Any, window: Window, size: tuple[int, int]) -> Tensor:
        """A pooling."""
        y = Tensor(1.0, 0, "", (*size, x.shape[2]))
        return self.add(Pool("pool", (x,), y, kind, window, LINEAR), keeps=x)

    def sum(self, a: Tensor, b: Tensor, relu: bool = False) -> Tensor:
        """Two branches meet."""
        return self.add(Elementwise("sum", (a, b), Tensor(1.0, 0, "", a.shape), "add", LINEAR, b), relu)

    def constant(self, x: Tensor, kind: Any, shape: tuple[int, ...]) -> Tensor:
        """A sum or product with a constant."""
        values = self.rng.uniform(0.3, 2, shape) * self.rng.choice([-1, 1], shape)
        second = replace(x, scale=2 / 127, zero=0)
        op = Elementwise(kind, (x,), Tensor(1.0, 0, "", x.shape), kind, LINEAR, second, second.codes(values))
        return self.add(op)

    def concat(self, a: Tensor, b: Tensor, axis: int) -> Tensor:
        """Side by side; b takes a's quantisation."""
        b = self.requantised(b, a)
        shape = list(a.shape)
        shape[axis] += b.shape[axis]
        return self.add(Concat("concat", (a, b), Tensor(1.0, 0, "", (shape[0], shape[1], shape[2])), axis), keeps=a)

    def requantised(self, x: Tensor, like: Tensor) -> Tensor:
        """The tensor made last, in another one's quantisation."""
        op = self.ops.pop()
        assert op.output is x
        return self.add(op, keeps=like)

    def pad(self, x: Tensor, before: tuple[int, int, int], after: tuple[int, int, int]) -> Tensor:
        """Zeros around it."""
        h, w, c = (size + b + a for size, b, a in zip(x.shape, before, after, strict=True))
        return self.add(Pad("pad", (x,), Tensor(1.0, 0, "", (h, w, c)), before, x.zero), keeps=x)

    def mean(self, x: Tensor) -> Tensor:
        """Over the image."""
        return self.add(Mean("mean", (x,), Tensor(1.0, 0, "", (1, 1, x.shape[2]))))

    def reshape(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The same numbers."""
        return self.add(Reshape(f"reshape_{len(self.ops)}", (x,), Tensor(1.0, 0, "", shape)), keeps=x)

    def network(self, loss: Loss, x: Tensor) -> Network:
        """A dense layer at the end; under cross-entropy a softmax."""
        logits = self.dense(x, CLASSES)
        if loss == "softmax_ce":
            self.ops.append(Softmax("softmax", (logits,), Tensor(1 / 256, -128, "p", logits.shape)))
        return Network(tuple(self.ops), loss)


def _concat(axis: int) -> Callable[[Builder, Tensor], Tensor]:
    return lambda b, x: b.concat(b.conv(x, 5, POINT), b.conv(x, 5), axis)


def _crossing(b: Builder, x: Tensor) -> Tensor:
    """Three branches from one tensor: a shortcut, a convolution, a pool."""
    left = b.conv(x, x.shape[2], relu=False)
    right = b.pool(x, "average", SAME, x.shape[:2])
    return b.sum(b.sum(x, left, relu=True), right)


# Each stands behind a first convolution and its ReLU, whose gradient passes through it.
OPERATORS: dict[str, Callable[[Builder, Tensor], Tensor]] = {
    "conv 3x3": lambda b, x: b.conv(x, 9),
    "conv 3x3, stride 2": lambda b, x: b.conv(x, 9, Window((3, 3), (2, 2), (1, 0)), (6, 4)),
    "conv 4x2, stride 3x1, valid": lambda b, x: b.conv(x, 9, Window((4, 2), (3, 1)), (3, 9)),
    "conv 1x1": lambda b, x: b.conv(x, 9, POINT),
    "conv 1x1, in place": lambda b, x: b.conv(x, 8, POINT),
    "conv without a ReLU": lambda b, x: b.conv(x, 9, relu=False),
    "depthwise": lambda b, x: b.depthwise(x),
    "depthwise, stride 2": lambda b, x: b.depthwise(x, 1, Window((3, 3), (2, 2), (1, 1)), (6, 5)),
    "depthwise, multiplier 2": lambda b, x: b.depthwise(x, 2),
    "average pool": lambda b, x: b.pool(x, "average", Window((2, 2), (2, 2)), (6, 5)),
    "average pool, overlapping, padded": lambda b, x: b.pool(x, "average", SAME, (12, 10)),
    "average pool, 3x3 at stride 2, padded": lambda b, x: b.pool(x, "average", Window((3, 3), (2, 2), (1, 1)), (6, 5)),
    "average pool, of all": lambda b, x: b.pool(x, "average", Window((12, 10)), (1, 1)),
    "max pool": lambda b, x: b.pool(x, "max", Window((2, 2), (2, 2)), (6, 5)),
    "max pool, overlapping, padded": lambda b, x: b.pool(x, "max", SAME, (12, 10)),
    "mean": lambda b, x: b.mean(x),
    "sum of branches": lambda b, x: b.sum(x, b.conv(x, 8, relu=False), relu=True),
    "sum with itself": lambda b, x: b.sum(x, x),
    "three branches": _crossing,
    "plus a constant": lambda b, x: b.constant(x, "add", x.shape),
    "times a number": lambda b, x: b.constant(x, "mul", (1, 1, 1)),
    "times a constant a channel": lambda b, x: b.constant(x, "mul", (1, 1, 8)),
    "times a constant each": lambda b, x: b.constant(x, "mul", x.shape),
    "concat of rows": _concat(0),
    "concat of columns": _concat(1),
    "concat of channels": _concat(2),
    "pad": lambda b, x: b.pad(x, (1, 2, 1), (2, 0, 3)),
    "reshape": lambda b, x: b.conv(b.reshape(x, (10, 12, 8)), 5),
    "dense over rows": lambda b, x: b.dense(x, 7, relu=True, rows=12),
    "dense": lambda b, x: b.dense(x, 16, relu=True),
}


def operator_case(name: str, loss: Loss, gradients: GradientType) -> tuple[Plan, np.ndarray, np.ndarray]:
    """A calibrated plan with the operator between the first convolution and the loss; inputs, targets."""
    b = Builder(seed=len(name))
    x = OPERATORS[name](b, b.conv(b.input, 8))
    network = b.network(loss, b.reshape(x, (1, 1, x.size)))
    codes = b.codes.reshape(len(b.codes), -1)
    targets: np.ndarray = b.rng.integers(0, CLASSES, len(codes))
    if loss == "mse":
        logits = b.values[network.logits.name].reshape(len(codes), -1)
        targets = logits + b.rng.normal(0, float(logits.std()), logits.shape)
    options = Options("full", gradients=gradients)
    wanted = target_codes(network, targets) if loss == "mse" else targets
    state = calibrated_state(compile_plan(network, options), codes[SAMPLES:], wanted[SAMPLES:])
    return compile_plan(network, options, state), codes[:SAMPLES], wanted[:SAMPLES]


def cases_of_operators() -> Iterator[tuple[str, Loss]]:
    """Every operator with cross-entropy; convolutions with the other losses, too."""
    for name in OPERATORS:
        yield name, "softmax_ce"
    yield "conv 3x3", "mse"
    yield "conv 3x3", "hinge"


@pytest.mark.parametrize(("gradients", "least", "off"), [("int16", COSINE, LENGTH), ("int8", 0.9, 0.2)])
@pytest.mark.parametrize(("name", "loss"), list(cases_of_operators()))
def test_operator_gradients_match_float(
    name: str, loss: Loss, gradients: GradientType, least: float, off: float
) -> None:
    """The gradient of the first convolution, which has passed the operator, and of everything behind it."""
    found = compare(*operator_case(name, loss, gradients))
    cosine, length = found["conv_1/weights"]
    worst = min(found, key=lambda tensor: found[tensor][0])
    print(
        f"\n{name:40} {loss:10} {gradients:5} {cosine:.4f} {length:.4f}   worst {worst:20} {found[worst][0]:.4f}",
        end="",
    )
    for tensor, (cosine, length) in found.items():
        assert cosine >= least and abs(length - 1) <= off, (tensor, cosine, length)


def test_plans_shrink_where_they_can() -> None:
    """Buffers of different lives share the arena: a deep network needs no more than its two widest neighbours."""
    from ulearn_host.memory import Life, lower_bound, plan

    rng = np.random.default_rng(1)
    for _ in range(50):
        sizes = rng.integers(1, 200, 12)
        lives = [Life(str(i), int(s), i, i + 1) for i, s in enumerate(sizes)]
        offsets, need = plan(lives)
        assert need <= lower_bound(lives) * 1.34
        for a, b in pairwise(lives):
            low, high = sorted((a, b), key=lambda t: offsets[t.name])
            assert offsets[low.name] + low.size <= offsets[high.name]
