"""Quantization-aware training of PyTorch modules: they learn under the board's own int8 arithmetic.

The scheme of Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
inference": batch normalisation folded first; weights int8, symmetric (-127 to 127), one scale an output channel;
activations int8, asymmetric, one scale a tensor, by moving averages of each batch's smallest and largest number that
freeze for the last third of the training; ReLUs fused; gradients straight through the rounding. PyTorch is an extra.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.network import Loss, Network, Quantisation
from ulearn_host.quantise import span
from ulearn_host.torch_network import (
    CUTTING,
    FAKE,
    JOINS,
    MEAN_POOLS,
    SHARING,
    WEIGHTED,
    kind,
    needed_torch,
    samples_of,
    shape,
    simplified,
    to_network,
)

Array = NDArray[Any]
Progress = Callable[[int, int], None]
_MOMENTUM = 0.05  # of the moving averages, a batch
_FREEZE = 2 / 3  # of all steps are done when the ranges freeze
_HEADROOM = 1.5  # training on the board moves the logits, as in quantise
_LEAST = 1e-4  # of a layer's largest weight: what a channel's scale holds at least
_CALIBRATION = 1024  # samples that decide the first ranges


def fine_tune(
    module: Any,
    x: Array,
    y: Array,
    *,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch: int = 64,
    loss: Loss = "softmax_ce",
    labels: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Network:
    """Train a trained module on under fake quantisation; the answer is the int8 network it has become.

    module: torch.nn.Module from float32 [n, channels, height, width], [n, channels, length] or [n, features] to
    [n, outputs]; it stays as it is. x: such samples in real units; y: int labels [n] (softmax_ce) or float targets
    [n, outputs] (mse). learning_rate: Adam's, falling to 0 along a cosine. labels: what the classes are called.
    progress: called with (steps done, steps to do). `torch_network.arrange` brings samples to the network's order.
    Raises UserError for shapes that do not fit, layers that are not supported, a loss that is not finite, and when the
    extra 'torch' is missing.
    """
    model = quantisable(module, x)
    options: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "batch": batch, "loss": loss}
    fit(model, x, y, **options, seed=seed, progress=progress)
    return export(model, loss=loss, labels=labels)


def quantisable(module: Any, x: Array) -> Any:
    """A copy of a module with fake quantisation, for a training loop of your own: a torch.fx.GraphModule.

    x: float32 [n, ...], of which 1024 decide the first ranges. Call `freeze` when about a third of the training is
    left, and `export` at its end. Raises UserError for layers that are not supported.
    """
    torch, x = needed_torch(), samples_of(x)
    model = simplified(module, x)
    _insert(model)
    chosen = x[np.linspace(0, len(x) - 1, min(len(x), _CALIBRATION)).astype(int)]
    with torch.no_grad():
        for start in range(0, len(chosen), 64):
            model(torch.from_numpy(chosen[start : start + 64]))
    _set_mode(model, "train")
    return model


def freeze(model: Any) -> None:
    """Keep the ranges of all activations of a quantisable module as they are from now on."""
    _set_mode(model, "frozen")


def export(model: Any, *, loss: Loss = "softmax_ce", labels: Sequence[str] = ()) -> Network:
    """The int8 network that answers as a quantisable module does in inference mode, but for ties of rounding.

    Raises UserError for layers that are not supported.
    """
    freeze(model.eval())
    return to_network(model, None, loss, labels)


def fit(
    model: Any,
    x: Array,
    y: Array,
    *,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch: int = 64,
    loss: Loss = "softmax_ce",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> None:
    """Train a module in place, one of `quantisable` or any other; arguments as of `fine_tune`."""
    torch, x, y = needed_torch(), samples_of(x), np.asarray(y)
    if loss not in ("softmax_ce", "mse"):
        raise UserError(f"the loss '{loss}' does not train; expected 'softmax_ce' or 'mse'")
    if len(y) != len(x) or epochs < 1 or batch < 1:
        raise UserError(f"{len(x)} samples, {len(y)} targets, {epochs} epochs of batches of {batch}: nothing to train")
    if loss == "softmax_ce" and (y.ndim != 1 or y.dtype.kind not in "iu"):
        raise UserError(f"labels have shape {list(y.shape)} of {y.dtype}, expected integers [{len(x)}]")
    goals = torch.from_numpy(y.astype(np.int64 if loss == "softmax_ce" else np.float32))
    inputs = torch.from_numpy(x)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    total = epochs * -(-len(x) // batch)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    compare = torch.nn.functional.cross_entropy if loss == "softmax_ce" else torch.nn.functional.mse_loss
    done = 0
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for chosen in torch.randperm(len(x)).split(batch):
                if done >= total * _FREEZE:
                    freeze(model)
                answer = model(inputs[chosen])
                _check(answer, goals[chosen], loss)
                error = compare(answer, goals[chosen])
                if not torch.isfinite(error):
                    raise UserError(f"the loss is not finite after {done} steps; take a smaller learning_rate")
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
                decay.step()
                done += 1
                progress(done, total)
    model.eval()


def _check(answer: Any, goals: Any, loss: Loss) -> None:
    """Raise UserError when targets do not fit what the module gives."""
    given, wanted = list(answer.shape), list(goals.shape)
    if len(given) != 2 or (loss == "mse" and given != wanted):
        raise UserError(f"the module gives {given} for a batch, targets are {wanted}; expected [n, outputs] of both")
    if loss == "softmax_ce" and not 0 <= int(goals.min()) <= int(goals.max()) < given[1]:
        raise UserError(
            f"labels reach from {int(goals.min())} to {int(goals.max())}, the module has {given[1]} outputs"
        )


# ---- Fake quantisation -----------------------------------------------------------------------------------------------


@cache
def _fakes() -> tuple[Any, Any]:
    """The two modules that round: of weights, and of activations."""
    torch = needed_torch()

    class FakeWeight(torch.nn.Module):  # type: ignore[misc, name-defined]
        """A layer's weights rounded to int8 codes, as a parametrization of the weights in float."""

        def scales(self, weights: Any) -> Any:
            """float32 [channels]: what one step of each output channel is."""
            largest = weights.detach().abs().flatten(1).amax(1)
            floor = float(largest.max()) * _LEAST or 1.0
            return largest.clamp(min=floor) / 127

        def forward(self, weights: Any) -> Any:
            scales = self.scales(weights)
            zeros = torch.zeros(len(scales), dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(weights, scales, zeros, 0, -127, 127)

    class FakeActivation(torch.nn.Module):  # type: ignore[misc, name-defined]
        """Activations rounded to int8 codes of a range that follows what it sees.

        mode: 'watch' widens the range and does not round, 'train' averages, 'frozen' keeps the range.
        """

        def __init__(self, widen: float) -> None:
            super().__init__()
            self.widen, self.mode = widen, "watch"
            self.ends: Any
            self.register_buffer("ends", torch.zeros(2))
            self.sharing: list[Any] = [self]  # all that have one quantisation

        def quantisation(self) -> Quantisation:
            """What it rounds to."""
            return span(np.array([float(e) * s.widen for s in self.sharing for e in s.ends]))

        def forward(self, x: Any, observe: bool = True) -> Any:
            if observe and self.mode != "frozen" and (self.training or self.mode == "watch"):
                seen = torch.stack(torch.aminmax(x.detach()))
                if self.mode == "watch":
                    self.ends = torch.stack((torch.minimum(self.ends, seen)[0], torch.maximum(self.ends, seen)[1]))
                else:
                    self.ends = self.ends + _MOMENTUM * (seen - self.ends)
            if self.mode == "watch":
                return x
            known = self.quantisation()
            return torch.fake_quantize_per_tensor_affine(x, known.scale, known.zero, -128, 127)

    return FakeWeight, FakeActivation


def _set_mode(model: Any, mode: str) -> None:
    for part in model.modules():
        if type(part).__name__.lower() == FAKE:
            part.mode = mode


def _insert(model: Any) -> None:
    """Put fake quantisation into a simplified module, where the board's operators round."""
    from torch.nn.utils import parametrize

    fake_weight, fake_activation = _fakes()
    fakes: dict[Any, Any] = {}  # node: what holds its range
    nodes = list(model.graph.nodes)
    for node in nodes:
        what = kind(model, node)
        if shape(node) is None or what in ("output", "get_attr"):
            continue
        if what.startswith("batchnorm"):
            raise UserError(f"'{node.name}' follows no convolution or dense layer that it alone reads; move it there")
        if what in WEIGHTED and node.op == "call_module":
            layer = model.get_submodule(node.target)
            if not parametrize.is_parametrized(layer):
                parametrize.register_parametrization(layer, "weight", fake_weight())
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        shared = what in SHARING or (what in CUTTING and _open(model, first) and kind(model, first) in MEAN_POOLS)
        if shared:
            fakes[node] = fakes[first]
            for other in node.all_input_nodes if what in JOINS else ():
                _share(fakes[first], fakes[other])
        elif not _open(model, node):
            last = any(user.op == "output" for user in node.users)
            fakes[node] = fake_activation(_HEADROOM if last else 1.0)
        if not _open(model, node) and (not shared or what in (*MEAN_POOLS, *CUTTING)):
            name = f"fake_{node.name}"
            model.add_submodule(name, fakes[node])
            with model.graph.inserting_after(node):
                made = model.graph.call_module(name, (node,), {} if not shared else {"observe": False})
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made, lambda user, made=made: user is not made)
            fakes[made] = fakes[node]
    model.graph.lint()
    model.recompile()


def _open(model: Any, node: Any) -> bool:
    """Whether a node gives its numbers to a ReLU or the like alone, which the board computes in one with it."""
    users = list(node.users)
    fusing = (*WEIGHTED, *MEAN_POOLS, "add", "iadd", "mul", "imul")
    return len(users) == 1 and kind(model, users[0]) in CUTTING and kind(model, node) in fusing


def _share(a: Any, b: Any) -> None:
    """Make one quantisation of two."""
    if b not in a.sharing:
        a.sharing += b.sharing
        for fake in b.sharing:
            fake.sharing = a.sharing
