"""Contribution analysis: what each part of a network adds to accuracy when it trains on a user's data.

After Lin et al. 2022, "On-Device Training Under 256KB Memory", section 3.2: biases of the last k layers, and each
layer's weights at several shares of its output channels, one at a time, against training the last layer alone. They
measure by fine-tuning in float on a downstream task; here the host repeats the board's own integer training to the bit
(simulate.py), adapting to each of several groups (users, machines) from the same start. What is measured is appended to
a file, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ulearn_host import simulate
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.network import Depthwise, Network
from ulearn_host.schemes import Selection, selection
from ulearn_host.simulate import Progress, Samples, Settings, Simulation, by_unit

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
DEPTHS = 12  # bias depths that are measured at most


@dataclass(frozen=True)
class Candidate:
    """What trains beside the last layer. kind 'bias': the biases of the last `amount` layers that can train;
    'weights': the last `amount` output channels of layer `layer` (an index in network.layers)."""

    kind: Literal["bias", "weights"]
    layer: int
    amount: int


@dataclass(frozen=True)
class Contribution:
    """A candidate's. accuracy: 0 to 1 on held-out samples, or the mean squared error; gain: how much better than the
    last layer alone, in accuracy, or as the share of the error that is gone; error: its standard error over groups;
    rate: the learning rate that both numbers were reached at."""

    candidate: Candidate
    accuracy: float
    gain: float
    error: float
    rate: float


@dataclass(frozen=True)
class Contributions:
    """All of them. before, last: accuracy (or mean squared error) untrained and with the last layer trained, the
    latter at last_rate; last_gain, last_error: of training the last layer; units: groups that were adapted to."""

    before: float
    last: float
    last_gain: float
    last_error: float
    last_rate: float
    items: tuple[Contribution, ...]
    units: int
    settings: Settings
    regression: bool

    def as_json(self) -> dict[str, Any]:
        """For `--json` and for keeping."""
        return asdict(self)


def last_only(network: Network) -> Selection:
    """The last layer's weights and biases: what every choice holds. Raises UserError where nothing can train."""
    parts = selection(network, "last")
    if not any(part.any for part in parts):
        raise UserError("the last layer cannot be trained, so no choice of layers can be searched; see --scheme")
    return parts


def trainable(network: Network) -> list[int]:
    """Layers with a way to the loss, the last one first."""
    parts = selection(network, "full")
    return [i for i in reversed(range(len(parts))) if parts[i].any]


def candidates(network: Network) -> list[Candidate]:
    """All that are to be measured and can be compiled. Depthwise weights train all or none."""
    layers, order, last = network.layers, trainable(network), last_only(network)
    depths = sorted({round(2 + (len(order) - 2) * i / (DEPTHS - 1)) for i in range(DEPTHS)}) if len(order) > 1 else []
    found = [Candidate("bias", order[k - 1], k) for k in depths]
    for i in order:
        if last[i].rows:
            continue
        count = len(layers[i].weights)
        shares = (1.0,) if isinstance(layers[i], Depthwise) else SHARES
        found += [Candidate("weights", i, rows) for rows in sorted({max(1, round(s * count)) for s in shares})]
    return [c for c in found if _trains(network, with_candidates(network, [c]))]


def with_candidates(network: Network, chosen: Sequence[Candidate]) -> Selection:
    """The last layer and these."""
    parts = list(last_only(network))
    order = trainable(network)
    for c in chosen:
        if c.kind == "weights":
            parts[c.layer] = parts[c.layer]._replace(rows=c.amount)
    depth = max((c.amount for c in chosen if c.kind == "bias"), default=0)
    for i in order[:depth]:
        parts[i] = parts[i]._replace(bias=True)
    return tuple(parts)


def options_for(network: Network, parts: Selection, template: Options | None = None) -> Options:
    """The choice as the compiler takes it, with gradients of 16 bits where they are proved to fit, else of 8."""
    options = replace(template or Options(), scheme="sparse", selection=tuple((p.rows, p.bias) for p in parts))
    try:
        compile_plan(network, options)
    except UserError:
        options = replace(options, gradients="int8")
        compile_plan(network, options)
    return options


def _trains(network: Network, parts: Selection) -> bool:
    try:
        options_for(network, parts)
    except UserError:
        return False
    return True


def analyse(
    network: Network,
    samples: Samples,
    settings: Settings | None = None,
    *,
    template: Options | None = None,
    only: Sequence[Candidate] | None = None,
    progress: Progress = lambda done, total: None,
    cache: Path | None = None,
    processes: int | None = None,
) -> Contributions:
    """Measure every candidate, on the same samples in the same order as the last layer alone.

    template: how all of them are trained in all else. only: in place of candidates(network). cache: a file of JSON
    lines that a stopped run goes on from. processes: at most so many; None: as many as there are cores, if it takes
    long enough. Raises UserError where the data do not do.
    """
    _check(network, samples)
    simulation = Simulation(network, samples, settings or Settings())
    found = tuple(candidates(network) if only is None else only)
    base = _named("last", template)
    choices = {base: options_for(network, last_only(network), template)}
    for c in found:
        choices[_named(name_of(c), template)] = options_for(network, with_candidates(network, [c]), template)
    scores = simulate.run(simulation, choices, progress=progress, cache=cache, processes=processes)
    last_score = scores[base]
    last_gain, last_error = gain_of(simulation, last_score.before, last_score.after)
    items = []
    for c in found:
        score = scores[_named(name_of(c), template)]
        gain, error = gain_of(simulation, last_score.after, score.after)
        items.append(Contribution(c, _mean(simulation, score.after), gain, error, score.rate))
    before, last = _mean(simulation, last_score.before), _mean(simulation, last_score.after)
    return Contributions(
        *(before, last, last_gain, last_error, last_score.rate, tuple(items)),
        *(len(set(simulation.units)), simulation.settings, simulation.error),
    )


@dataclass(frozen=True)
class Measured:
    """A whole choice, as a Contribution is of a candidate. before: as accuracy, untrained."""

    before: float
    accuracy: float
    gain: float
    error: float
    rate: float


def measure(
    network: Network,
    samples: Samples,
    choices: Sequence[Options],
    settings: Settings | None = None,
    *,
    progress: Progress = lambda done, total: None,
    cache: Path | None = None,
    processes: int | None = None,
) -> list[Measured]:
    """What whole choices gain over the last layer alone: contributions need not add up. As analyse in all else."""
    _check(network, samples)
    simulation = Simulation(network, samples, settings or Settings())
    last = options_for(network, last_only(network))
    names = ["last" if options == last else json.dumps(asdict(options)) for options in choices]
    named = {"last": last} | dict(zip(names, choices, strict=True))
    scores = simulate.run(simulation, named, progress=progress, cache=cache, processes=processes)
    result = []
    for name in names:
        found = scores[name]
        gain, error = gain_of(simulation, scores["last"].after, found.after)
        before, after = _mean(simulation, found.before), _mean(simulation, found.after)
        result.append(Measured(before, after, gain, error, found.rate))
    return result


def name_of(c: Candidate) -> str:
    """A candidate in the file of what is done."""
    return f"{c.kind} {c.layer} {c.amount}"


def _named(name: str, template: Options | None) -> str:
    return f"{name} layerwise" if template and template.layerwise else name


def _check(network: Network, samples: Samples) -> None:
    if network.loss == "none":
        raise UserError("the network has no loss to train with; name one (--loss softmax_ce, mse or hinge)")
    if samples.x.size != len(samples.x) * network.input.size or not len(samples.x):
        raise UserError(f"samples have shape {samples.x.shape}, expected [n, {network.input.size}]")
    outputs = network.logits.size
    if network.loss != "mse" and (samples.y.ndim != 1 or samples.y.min() < 0 or samples.y.max() >= outputs):
        raise UserError(f"labels run from {samples.y.min()} to {samples.y.max()}, expected 0 to {outputs - 1}")


def _mean(simulation: Simulation, values: list[float]) -> float:
    return float(by_unit(values, simulation.units).mean())


def gain_of(simulation: Simulation, before: list[float], after: list[float]) -> tuple[float, float]:
    """How much better, and the standard error over units: of paired differences, in accuracy, or for a regression of
    the share of the error that is gone."""
    was, now = (by_unit(values, simulation.units) for values in (before, after))
    gains = now - was
    if simulation.error:
        gains = np.where(was > 0, (was - now) / np.where(was > 0, was, 1), 0.0)
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return float(gains.mean()), error
