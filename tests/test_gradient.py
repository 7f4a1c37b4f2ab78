"""The integer backward pass points where float32 back-propagation points, on real digits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier, MLPRegressor

import ulearn
from ulearn import update as wire
from ulearn_host.compiler import Options
from ulearn_host.importers import from_sklearn
from ulearn_host.network import Network
from ulearn_host.prepare import prepare, target_codes


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
        assert cosine >= 0.97, plan.tensors[j].name
        assert abs(length - 1) < 0.05, plan.tensors[j].name


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
