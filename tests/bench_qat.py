"""What quantization-aware training and pruning cost and keep on scikit-learn's digits, as a table.

    python tests/bench_qat.py        (PyTorch, scikit-learn and onnx installed; about a minute)

Accuracy of int8 networks is that of the executor that a board has too.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import ulearn
from ulearn_host import pruning, qat, torch_network
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.network import Network

SEEDS = (0, 1, 2, 3, 4)
EPOCHS, RATE = 10, 1e-3


def digits(seed: int) -> tuple[np.ndarray, ...]:
    """Images float32 [n, 1, 8, 8] from 0 to 1 and labels: to train on, to test on."""
    x, y = load_digits(return_X_y=True)
    images = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return tuple(train_test_split(images, y, test_size=0.3, random_state=seed, stratify=y))


def small(width: int = 16) -> Any:
    """Convolution, a depthwise separable one, the mean over the image, a dense layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, 2, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    )


def apart(model: Any) -> Any:
    """The same function with the channels of two activations scaled apart by up to 64, as happens where nothing holds
    weights together: one scale a tensor then leaves the small ones few codes (Nagel et al. 2019)."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for norm, after, axis in ((model[1], model[3], 0), (model[4], model[6], 1)):
            factor = 2.0 ** torch.linspace(0, -6, norm.num_features)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            after.weight.div_(factor[:, None, None, None] if axis == 0 else factor[None, :, None, None])
    return model


def accuracy(network: Network, x: np.ndarray, y: np.ndarray) -> float:
    """Of an int8 network in the executor, 0 to 1."""
    model = ulearn.load(compile_plan(network, Options("none")).data)
    codes = torch_network.arrange(network, x)
    answers = [np.frombuffer(bytes(model.output(c.tobytes())), dtype=np.int8).argmax() for c in codes]
    return float(np.mean(np.array(answers) == y))


def measured(seed: int, width: int) -> dict[str, tuple[float, int, int]]:
    """Accuracy, parameters and multiply-accumulates of every variant."""
    x, test_x, y, test_y = digits(seed)
    torch.manual_seed(seed)
    model = small(width)
    qat.fit(model, x, y, epochs=60, learning_rate=1e-2, seed=seed)
    uneven = apart(model)
    pruned = pruning.prune(model, x)
    raw = pruning.compare(model, pruned, test_x, test_y)
    tuned = pruning.prune(model, x)
    qat.fit(tuned, x, y, epochs=60, learning_rate=1e-2, seed=seed)
    again = pruning.compare(model, tuned, test_x, test_y)
    torch.manual_seed(seed)
    narrow = small(width // 2)
    qat.fit(narrow, x, y, epochs=120, learning_rate=1e-2, seed=seed)
    scratch = pruning.compare(model, narrow, test_x, test_y)
    whole, part = (raw.parameters[0], raw.macs[0]), (raw.parameters[1], raw.macs[1])

    def after(module: Any, epochs: int = 0) -> float:
        longer = copy.deepcopy(module)
        if epochs:
            qat.fit(longer, x, y, epochs=epochs, learning_rate=RATE, seed=seed)
        return accuracy(torch_network.from_module(longer, x), test_x, test_y)

    def under(module: Any) -> float:
        network = qat.fine_tune(module, x, y, epochs=EPOCHS, learning_rate=RATE, seed=seed)
        return accuracy(network, test_x, test_y)

    return {
        "float": (raw.accuracy[0], *whole),
        "int8 after training": (after(model), *whole),
        f"{EPOCHS} more epochs, int8 after training": (after(model, EPOCHS), *whole),
        f"{EPOCHS} more epochs of QAT": (under(model), *whole),
        "channels apart, float": (pruning.compare(uneven, uneven, test_x, test_y).accuracy[0], *whole),
        "  int8 after training": (after(uneven), *whole),
        f"  {EPOCHS} more epochs, int8 after training": (after(uneven, EPOCHS), *whole),
        f"  {EPOCHS} more epochs of QAT": (under(uneven), *whole),
        "pruned 50 %, float": (raw.accuracy[1], *part),
        "pruned 50 %, 60 more epochs, float": (again.accuracy[1], *part),
        "  then int8 after training": (after(tuned), *part),
        f"  then {EPOCHS} more epochs, int8 after training": (after(tuned, EPOCHS), *part),
        f"  then {EPOCHS} more epochs of QAT": (under(tuned), *part),
        "half as wide, 120 epochs, float": (scratch.accuracy[1], scratch.parameters[1], scratch.macs[1]),
    }


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)  # more are slower on tensors as small as these
    start = time.monotonic()
    every = [measured(seed, 16) for seed in SEEDS]
    print(f"accuracy on 540 digits, of {len(SEEDS)} seeds")
    print(f"{'':46} {'mean':>7} {'least':>7} {'most':>7} {'parameters':>11} {'MACs':>8}")
    for name in every[0]:
        found = [100 * result[name][0] for result in every]
        _, parameters, macs = every[0][name]
        numbers = f"{np.mean(found):6.2f}% {min(found):6.2f}% {max(found):6.2f}%"
        print(f"{name:46} {numbers} {parameters:11} {macs:8}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
