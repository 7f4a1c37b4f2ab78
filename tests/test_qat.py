"""Quantization-aware training and pruning of PyTorch modules.

What is marked torch needs PyTorch, which CI leaves out for its size: run `pytest -m torch tests/test_qat.py` by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ulearn
from ulearn_host import pruning, qat, torch_network
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.network import Concat, Conv, Dense, Depthwise, Mean, Network, Weighted

Array = np.ndarray
needs_torch = pytest.mark.torch
UNTRAINED = {"epochs": 1, "batch": 16}


def samples(shape: tuple[int, ...], count: int = 96, seed: int = 0) -> Array:
    """Normal numbers [count, *shape]."""
    return np.random.default_rng(seed).normal(0.2, 1, (count, *shape)).astype(np.float32)


def separable() -> Any:
    from torch import nn

    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )


def tutorial() -> Any:
    """As PyTorch's tutorial writes them: pooling before the ReLU, functions, a view."""
    import torch
    from torch import nn
    from torch.nn import functional as f

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding="same")
            self.fc1, self.fc2 = nn.Linear(8 * 2 * 1, 10), nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = f.relu(f.max_pool2d(self.conv1(x), 2))
            x = f.avg_pool2d(self.conv2(x), 2, 1, padding=0).relu()
            x = x.view(x.size(0), -1)
            return f.log_softmax(self.fc2(torch.relu(self.fc1(x))), dim=1)

    return Net()


def branches() -> Any:
    """Additions, concatenations and functions of a number."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
            self.pool, self.act, self.head = nn.AvgPool2d(2), nn.Hardswish(), nn.Linear(10, 4)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(self.norm(self.stem(x)))
            x = torch.relu(x + self.left(x))
            x = torch.cat([self.pool(x), torch.sigmoid(self.right(self.pool(x)))], dim=1)
            return self.head(x.mean([2, 3]))

    return Net()


def perceptron() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4))


def flat_first() -> Any:
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 7 * 6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Softmax(1))


def series() -> Any:
    from torch import nn

    return nn.Sequential(
        *(nn.Conv1d(3, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(8, 6, 3, padding=1), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(36, 4)),
    )


NETS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "separable": (separable, (3, 8, 7)),
    "tutorial": (tutorial, (3, 8, 7)),
    "branches": (branches, (3, 8, 7)),
    "perceptron": (perceptron, (12,)),
    "flat first": (flat_first, (3, 7, 6)),
    "series": (series, (3, 28)),
}


def lively(name: str) -> tuple[Any, Array]:
    """A module whose batch normalisation has numbers in use, and samples for it."""
    import torch

    build, shape = NETS[name]
    torch.manual_seed(1)
    module = build()
    for part in module.modules():
        if type(part).__name__.startswith("BatchNorm"):
            for numbers, low in (
                (part.weight, 0.5),
                (part.running_var, 0.5),
                (part.bias, -0.5),
                (part.running_mean, -0.5),
            ):
                torch.nn.init.uniform_(numbers, low, low + 1)
    return module.eval(), samples(shape)


def answers(network: Network, x: Array) -> Array:
    """The executor's codes [n, outputs]."""
    model = ulearn.load(compile_plan(network, Options("none")).data)
    codes = torch_network.arrange(network, x)
    return np.array([np.frombuffer(bytes(model.output(c.tobytes())), dtype=np.int8) for c in codes]).astype(int)


def computed(module: Any, x: Array) -> Array:
    """The module's answers in real numbers."""
    import torch

    with torch.no_grad():
        return np.asarray(module.eval()(torch.from_numpy(x)).numpy())


# ---- Without PyTorch -------------------------------------------------------------------------------------------------


def test_a_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    x, y = samples((4,)), np.zeros(96, int)
    calls: list[Callable[[], Any]] = [
        lambda: qat.fine_tune(object(), x, y),
        lambda: qat.quantisable(object(), x),
        lambda: qat.fit(object(), x, y),
        lambda: torch_network.from_module(object(), x),
        lambda: pruning.prune(object(), x),
        lambda: pruning.compare(object(), object(), x, y),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"needs the extra: pip install 'ulearn\[torch\]'$"):
            call()


def test_samples_are_checked_before_anything() -> None:
    for x in (np.zeros((0, 4)), np.zeros(4), np.full((2, 4), np.nan), np.array([["a"]])):
        with pytest.raises(UserError, match="expected finite numbers"):
            torch_network.samples_of(x)


# ---- Training --------------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("name", NETS)
def test_networks_answer_as_their_fake_quantised_module(name: str) -> None:
    """Weights, scales and zero points are the same, so only roundings differ: a tie, a fixed-point multiplier, and what
    later layers make of it. At most 2 codes, and seldom."""
    module, x = lively(name)
    y = np.random.default_rng(0).integers(0, 4, len(x))
    model = qat.quantisable(module, x)
    qat.fit(model, x, y, **UNTRAINED)
    network = qat.export(model, labels=("a", "b", "c", "d"))
    assert network.loss == "softmax_ce" and network.labels == ("a", "b", "c", "d")
    other = samples(x.shape[1:], 200, seed=5) * 1.2  # beyond the ranges, too
    wanted = np.rint(computed(model, other) / network.output.scale) + network.output.zero
    apart = np.abs(answers(network, other) - wanted)
    assert apart.max() <= 2 and apart.mean() < 0.2, f"{apart.max()} at most, {apart.mean():.3f} in the mean"


@needs_torch
@pytest.mark.parametrize("name", NETS)
def test_modules_are_quantised_after_training_too(name: str) -> None:
    """The int8 network against the float module: 4 % of the range of the answers, rms."""
    module, x = lively(name)
    network = torch_network.from_module(module, x)
    wanted = computed(torch_network.simplified(module, x), x)
    error = network.output.real(answers(network, x)) - wanted
    assert np.sqrt(np.mean(error**2)) < 0.04 * np.ptp(wanted)


@needs_torch
def test_the_scheme_is_the_boards() -> None:
    module, x = lively("separable")
    network = qat.export(qat.quantisable(module, x))
    assert [type(op) for op in network.ops] == [Conv, Depthwise, Conv, Mean, Dense]
    for op in network.ops:
        if isinstance(op, Weighted):
            assert op.weights.min() >= -127 and len(op.weight_scales) == len(op.weights)
            assert (np.abs(op.weights.astype(int)).reshape(len(op.weights), -1).max(1) == 127).all()
    assert network.ops[0].output.zero == network.ops[1].output.zero == -128  # of a ReLU
    network = qat.export(qat.quantisable(*lively("branches")))
    joined = next(op for op in network.ops if isinstance(op, Concat))
    assert len({(t.scale, t.zero) for t in (*joined.inputs, joined.output)}) == 1
    assert "requantise" not in " ".join(getattr(op, "function", "") for op in network.ops)


@needs_torch
def test_training_learns_and_repeats() -> None:
    import torch

    module, x = lively("separable")
    y = (computed(module, x)[:, :4] + samples((4,), seed=3)).argmax(1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    steps: list[tuple[int, int]] = []
    options: dict[str, Any] = {"epochs": 30, "learning_rate": 1e-2, "batch": 32}
    torch.manual_seed(5)
    network = qat.fine_tune(module, x, y, **options, progress=lambda *step: steps.append(step))
    torch.manual_seed(6)  # of the caller's: not looked at
    again = qat.fine_tune(module, x, y, **options)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert steps[-1] == (90, 90) and len(steps) == 90
    assert (answers(network, x) == answers(again, x)).all()
    untrained = answers(qat.export(qat.quantisable(module, x)), x).argmax(1)
    assert np.mean(answers(network, x).argmax(1) == y) > np.mean(untrained == y) + 0.1


@needs_torch
def test_targets_are_learnt_and_boards_train_on() -> None:
    module, x = lively("perceptron")
    goal = x[:, :4] * 0.5
    network = qat.fine_tune(module, x, goal, loss="mse", epochs=60, learning_rate=1e-2, batch=32)
    error = network.output.real(answers(network, x)) - goal
    assert network.loss == "mse" and np.mean(error**2) < 0.3 * np.mean(goal**2)
    model = ulearn.load(compile_plan(network, Options("last")).data)
    trainer = ulearn.Trainer(model, learning_rate=0.01)
    trainer.step(torch_network.arrange(network, x)[0], network.output.codes(goal[0].astype(float)).tobytes())


@needs_torch
def test_faults_of_modules_and_samples_are_told() -> None:
    from torch import nn

    module, x = lively("perceptron")
    y = np.zeros(len(x), int)

    class Deciding(nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum() > 0 else -x

    for call, message in (
        (lambda: qat.fit(module, x, y[:5]), "96 samples, 5 targets"),
        (lambda: qat.fit(module, x, y + 0.5), "expected integers"),
        (lambda: qat.fit(module, x, y + 4), "labels reach from 4 to 4, the module has 4 outputs"),
        (lambda: qat.fit(module, x, x, loss="mse"), r"the module gives \[64, 4\]"),
        (lambda: qat.fit(module, x, y, loss="none"), "the loss 'none' does not train"),
        (lambda: qat.quantisable(module, samples((5,))), "cannot be traced on samples"),
        (lambda: qat.quantisable(Deciding(), x), "Deciding cannot be traced"),
        (lambda: qat.quantisable(nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 2)), x), "follows no convolution"),
        (
            lambda: torch_network.from_module(nn.Sequential(nn.Linear(12, 2), nn.CELU()), x),
            "'_1' .celu. is not supported",
        ),
        (lambda: qat.export(qat.quantisable(nn.Sequential(nn.Linear(12, 2), nn.CELU()), x)), "is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            call()


# ---- Pruning ---------------------------------------------------------------------------------------------------------


def silence(module: Any, keep: float) -> dict[str, list[int]]:
    """Make all but some channels of the layers with weights give 0 whatever comes; which stay, by layer."""
    import torch

    rng = np.random.default_rng(2)
    kept: dict[str, list[int]] = {}
    parts = list(module.named_modules())
    with torch.no_grad():
        for i, (name, part) in enumerate(parts):
            if hasattr(part, "weight") and part.weight.ndim > 1 and getattr(part, "groups", 1) == 1:
                count = len(part.weight)
                kept[name] = sorted(rng.choice(count, max(1, round(count * keep)), replace=False).tolist())
                gone = [c for c in range(count) if c not in kept[name]]
                norms = [p for _, p in parts[i + 1 : i + 2] if type(p).__name__.startswith("BatchNorm")]
                for numbers in (part.weight, part.bias, *(n for p in norms for n in (p.bias, p.running_mean))):
                    if numbers is not None:
                        numbers[gone] = 0
            elif getattr(part, "groups", 1) > 1:  # the depthwise layer and its normalisation behind it give 0 for 0
                for numbers in (part.bias, parts[i + 1][1].bias, parts[i + 1][1].running_mean):
                    numbers[:] = 0
    return kept


@needs_torch
@pytest.mark.parametrize("name", ["separable", "tutorial", "perceptron", "series"])
def test_silent_channels_go_and_nothing_changes(name: str) -> None:
    import torch

    module, x = lively(name)
    last = [n for n, p in module.named_modules() if hasattr(p, "weight") and p.weight.ndim > 1][-1]
    saved = {k: v.clone() for k, v in module.get_submodule(last).state_dict().items()}
    kept = silence(module, 0.5)
    module.get_submodule(last).load_state_dict(saved)
    notes: list[str] = []
    smaller = pruning.prune(module, x, 0.5, note=notes.append)
    assert not notes
    assert np.allclose(computed(smaller, x), computed(module, x), atol=1e-5)
    for layer, channels in kept.items():
        if layer != last:
            assert len(smaller.get_submodule(layer).weight) == len(channels) < len(module.get_submodule(layer).weight)
    qat.fine_tune(smaller, x, np.zeros(len(x), int), **UNTRAINED)
    assert type(smaller) is type(module) and not any(isinstance(p, torch.fx.GraphModule) for p in smaller.modules())


@needs_torch
def test_layers_that_meet_are_left_whole() -> None:
    module, x = lively("branches")
    notes: list[str] = []
    smaller = pruning.prune(module, x, note=notes.append)
    assert np.allclose(computed(smaller, x), computed(module, x))
    assert len(notes) == 3 and "'left' is left whole: it goes into 'add' (add)" in notes
    assert any(n.startswith("'right' is left whole: it goes into 'cat'") for n in notes)
    with pytest.raises(UserError, match="'left' cannot be pruned: it goes into 'add'"):
        pruning.prune(module, x, {"left": 0.5})


@needs_torch
def test_the_smallest_filters_go() -> None:
    import torch
    from torch import nn

    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[3.0, 0, 0], [2, 2, 0], [0.1, 0, 0], [1.6, 1.5, 0]]))
    x = samples((3,))
    first = {n: pruning.prune(module, x, {"0": 0.5}, norm=n)[0].weight[:, 0].tolist() for n in ("l1", "l2")}
    assert first["l1"] == pytest.approx([2, 1.6])
    assert first["l2"] == pytest.approx([3, 2])
    assert len(pruning.prune(module, x, 0.01)[0].weight) == 1
    for keep, message in (
        ({"9": 0.5}, "'9' is no layer with weights; expected one of 0$"),
        (0.0, "'0' is to keep a share of 0, expected more than 0"),
        ({"2": 0.5}, "'2' cannot be pruned: it is the output"),
    ):
        with pytest.raises(UserError, match=message):
            pruning.prune(module, x, keep)


@needs_torch
def test_code_that_names_sizes_is_told() -> None:
    from torch import nn

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 5, 2)

        def forward(self, x: Any) -> Any:
            return self.head(self.conv(x).relu().view(-1, 120))

    with pytest.raises(UserError, match="Fixed does not work with fewer channels .* use flatten"):
        pruning.prune(Fixed(), samples((3, 8, 7)))


@needs_torch
def test_modules_are_compared() -> None:
    module, x = lively("separable")
    y = computed(module, x).argmax(1)
    module.train()
    smaller = pruning.prune(module, x)
    assert module.training and all(p.training for p in smaller.modules())
    found = pruning.compare(module, smaller, x, y)
    assert found.accuracy[0] == 1.0 and found.accuracy[1] < 1.0
    # 8 by 7 pixels, then 4 by 4; 3 → 8 channels by 3×3, 8 by 3×3, 8 → 12, 12 → 4
    assert found.macs == (56 * 8 * 27 + 16 * 8 * 9 + 16 * 8 * 12 + 48, 56 * 4 * 27 + 16 * 4 * 9 + 16 * 4 * 6 + 24)
    assert found.parameters == (
        8 * 27 + 16 + 8 * 9 + 8 + 16 + 8 * 12 + 12 + 24 + 52,
        4 * 27 + 8 + 4 * 9 + 4 + 8 + 4 * 6 + 6 + 12 + 28,
    )
    with pytest.raises(UserError, match="expected integers"):
        pruning.compare(module, smaller, x, y[:4])
