"""The steps of `ulearn prepare` that take samples of a user: what trains, within how much RAM, at which rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.markup import escape

from ulearn_host import contribution, display, placement, report, search
from ulearn_host.budget import PLACES, Place, buffer_bytes
from ulearn_host.compiler import GradientType, Options, Plan
from ulearn_host.contribution import Contributions
from ulearn_host.emulate import NATIVE_MODULES
from ulearn_host.errors import UserError
from ulearn_host.network import Network
from ulearn_host.parameters import WeightType
from ulearn_host.schemes import check, selection
from ulearn_host.search import ARITHMETIC, Choice
from ulearn_host.simulate import RATES, Progress, Samples, Settings, Simulation

# ---- What trains, by name --------------------------------------------------------------------------------------------


def named_layers(network: Network, text: str) -> tuple[tuple[int, bool], ...]:
    """A choice as a user writes it, 'conv_5=32+bias,dense_1=all+bias', for Options.selection. Raises UserError."""
    names = [layer.name for layer in network.layers]
    chosen = [(0, False)] * len(names)
    for item in text.split(","):
        name, equals, what = (part.strip() for part in item.rpartition("="))
        if not equals:
            raise UserError(f"--layers: '{item.strip()}' does not say what trains; expected e.g. {names[-1]}=all+bias")
        if name not in names:
            raise UserError(f"--layers: there is no layer '{name}'; this network has {', '.join(names)}")
        at = names.index(name)
        if chosen[at] != (0, False):
            raise UserError(f"--layers names {name} twice")
        count = len(network.layers[at].weights)
        rows, plus, more = what.partition("+")
        if what == "bias":
            rows, more = "0", "bias"
        elif plus and more != "bias":
            rows = ""
        rows = str(count) if rows == "all" else rows
        if not rows.isascii() or not rows.isdigit() or not (int(rows) or more):
            raise UserError(f"--layers: '{what}' is not what trains of {name}; expected e.g. all+bias, all, 16 or bias")
        if int(rows) > count:
            raise UserError(f"--layers: {name} has {count} output channels, not {rows}")
        chosen[at] = (int(rows), bool(more))
    check(network, selection(network, "sparse", chosen), "sparse")
    return tuple(chosen)


# ---- The learning rate -----------------------------------------------------------------------------------------------

_LEAST = 24  # samples from which on a rate can be measured: half of them judge
_TUNING = Settings(groups=6, pilots=6, most=48)
_WORK = 3.6e10  # multiply-accumulates of trying rates, of which this host does some 2.5e9 a second
_FEWEST = 8
# A gain must be so large, and so many standard errors, to tell one rate from another: where a network knows its samples
# already, the least rate often wins by chance, and a board would hardly learn with it.
_LEAST_GAIN = 0.02
_ERRORS = 2


@dataclass(frozen=True)
class Tuned:
    """The learning rate a board starts with. source: 'measured', 'given' or 'scheme'; before, after: mean accuracy (or
    mean squared error) of adapting to some samples and judging on others at that rate, where it was measured; note:
    why it was not."""

    rate: float | None
    source: str
    before: float | None = None
    after: float | None = None
    gain: float | None = None
    error: float | None = None
    groups: int | None = None
    note: str = ""


def tune(network: Network, samples: Samples, options: Options, plan: Plan, progress: Progress) -> Tuned:
    """Measure the best learning rate for a plan's scheme on labelled samples, by training as the board will."""
    labelled = network.loss != "mse"
    classes = len(np.unique(samples.y)) if labelled else 1
    if len(samples.x) < max(_LEAST, 2 * classes):
        few = f"{len(samples.x)} samples are too few to measure the learning rate on"
        return Tuned(None, "scheme", note=f"{few}; expected {max(_LEAST, 2 * classes)} or more")
    if labelled and classes < 2:
        return Tuned(None, "scheme", note="samples of one class alone cannot show the best learning rate")
    runs = len(RATES) * _TUNING.groups * _TUNING.epochs
    most = int(_WORK / runs / _step_macs(plan))
    settings = replace(_TUNING, most=min(_TUNING.most, max(_FEWEST, most)))
    try:
        simulation = Simulation(network, samples, settings)
    except UserError:  # its groups are too small
        simulation = Simulation(network, replace(samples, group=None), settings)
    scores = simulation.measure(options, progress=progress)
    progress(1, 1)
    before, after = float(np.mean(scores.before)), float(np.mean(scores.after))
    gain, error = contribution.gain_of(simulation, scores.before, scores.after)
    if not gain > max(_LEAST_GAIN, _ERRORS * error):
        note = "training on some of the samples gained too little on the others to tell one rate from another"
        return Tuned(None, "scheme", before, after, gain, error, len(set(simulation.units)), note)
    return Tuned(scores.rate, "measured", before, after, gain, error, len(set(simulation.units)))


def rate_sentence(rate: float, tuned: Tuned) -> str:
    """What the board starts with, and why."""
    if tuned.source == "measured" and tuned.before is not None and tuned.after is not None:
        numbers = f"{tuned.before:.4g} before, {tuned.after:.4g} after"
        if tuned.before <= 1 and tuned.after <= 1:
            numbers = f"{display.percent(tuned.before)} before training, {display.percent(tuned.after)} after it"
        return f"learning rate {rate:.3g}, the best of {RATES[0]:g} to {RATES[-1]:g} on the samples: {numbers}"
    why = {"measured": "measured", "given": "as given", "scheme": "the scheme's own"}[tuned.source]
    return f"learning rate {rate:.3g}, {why}"


def _step_macs(plan: Plan) -> int:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.ulm"
        path.write_bytes(plan.data)
        read = report.read(path)
    return max(1, *(read.macs(name) for name in read.programs))


# ---- The choice within a budget --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a search has to keep to. ram: bytes of the whole heap; buffer: samples that the board keeps; place: None
    for the better of ram and stream; weights, gradients: None for what fits best; learning_rate: None to measure it."""

    ram: int
    buffer: int
    place: Place | None = None
    weights: WeightType | None = None
    gradients: GradientType | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Found:
    """What a search found, and out of what."""

    contributions: Contributions
    choice: Choice

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return self.choice.as_json() | {"contributions": self.contributions.as_json()}


def searched(
    network: Network, samples: Samples, budget: Budget, template: Options, cache: Path, steps: display.Steps
) -> Found:
    """The best that trains within a budget, measured: what each part gains, what fits, what that gains as a whole."""
    arithmetic = tuple((g, w) for g, w in ARITHMETIC if budget.gradients in (None, g) and budget.weights in (None, w))
    places = (budget.place,) if budget.place else PLACES[:2]
    code = {p: placement.BASE_BYTES + placement.code_bytes(NATIVE_MODULES[-1], True, p == "stream") for p in places}
    terms: dict[str, Any] = {
        "data_buffer_bytes": buffer_bytes(network, budget.buffer),
        "code_bytes": code,
        "options": template,
        "arithmetic": arithmetic,
    }
    _check_room(network, budget, places, terms)
    settings = Settings(learning_rate=budget.learning_rate)
    tick = steps.bar("measuring what each part adds")
    found = contribution.analyse(network, samples, settings, template=template, progress=tick, cache=cache)
    tick = steps.bar(f"searching what fits in {budget.ram:,} bytes")
    choice = search.search_places(network, found, budget.ram, places, progress=tick, **terms)
    tick = steps.bar("measuring the best choices as a whole")
    choice = search.settle(network, samples, choice, settings, template=template, progress=tick, cache=cache)
    return Found(found, choice)


def _check_room(network: Network, budget: Budget, places: Sequence[Place], terms: dict[str, Any]) -> None:
    """Before minutes of measuring: whether the last layer alone fits. Raises UserError."""
    nothing = Contributions(0, 0, 0, 0, 0, (), 0, Settings(), False)
    search.search_places(network, nothing, budget.ram, places, **terms)


def advice(choice: Choice, path: Path, free: bool) -> str:
    """How to load the plan, so that its frozen weights lie where the budget has them. free: whether that was chosen."""
    how = {
        "ram": f'ulearn.load("{path.name}", frozen="ram")',
        "stream": f'ulearn.load("{path.name}", frozen="stream")',
        "in-place": f'ulearn.load("/rom/{path.name}")',
    }
    what = {
        "ram": "frozen weights are copied into RAM",
        "stream": "frozen weights stay in the plan's file and are read as they are needed",
        "in-place": "frozen weights stay in flash: the plan lies in a ROMFS",
    }
    if free and choice.place == "stream":
        held = [c for c in choice.alternatives if c.place == "ram"]
        best = max((c.gain or 0.0 for c in held), default=None)
        why = "there is no room for them in RAM"
        if best is not None and choice.gain is not None:
            why = f"that gains {100 * (choice.gain - best):.1f} points more than holding them in RAM would"
        return f"{what[choice.place]}, since {why}: load it with {how[choice.place]}"
    return f"{what[choice.place]}: load it with {how[choice.place]}"


def show(network: Network, found: Found) -> None:
    """Print what trains and why, what else was measured, and the RAM by part."""
    choice, regression = found.choice, found.contributions.regression
    unit = "%" if regression else "points"
    rows = [
        [row.layer, row.trains, _gain(row.gain), _error(row.error), f"{row.bytes:,}", row.note]
        for row in choice.explain()
    ]
    taken = [row for row in rows if not row[5]]
    left = [row for row in rows if row[5]]
    columns = ["layer", "trains", f"gain, {unit}", "±", "bytes"]
    _table("what trains on the board", columns, [row[:5] for row in taken], (2, 3, 4))
    if left:
        heads = ["layer", "trains", f"gain, {unit}", "±", "bytes", "why not"]
        _table("what does not", heads, left, (2, 3, 4))
    settled = [choice, *choice.alternatives]
    lines = [_summary(network, c) for c in settled]
    heads = ["trains beside the last layer", "weights, gradients", "frozen", f"gain, {unit}", "±", "RAM, bytes"]
    _table("choices, measured as a whole; the first is taken", heads, lines, (3, 4, 5))
    ram = [[name, f"{size:,}"] for name, size in choice.ram.parts().items()]
    ram.append(["in all", f"{choice.ram.total:,}"])
    ram.append(["of", f"{choice.budget:,}"])
    _table("RAM of the board", ["part", "bytes"], ram, (1,))


def expectation(found: Found) -> Iterator[str]:
    """Sentences: accuracy before and after, over whom."""
    choice, c = found.choice, found.contributions
    assert choice.before is not None and choice.accuracy is not None
    after = choice.accuracy
    last = after - (choice.gain or 0)
    shown = f"{c.units} groups" if c.units > 1 else "the samples"
    if c.regression:
        yield f"expected mean squared error: {choice.before:.4g} before training, {after:.4g} after it, over {shown}"
    else:
        alone = f" ({display.percent(last)} with the last layer alone)" if choice.candidates else ""
        yield (
            f"expected accuracy: {display.percent(choice.before)} before training, "
            f"{display.percent(after)} after it{alone}, over {shown}"
        )
    if not choice.complete:
        yield "note: the search ended at its limit; a better choice may fit"


def _summary(network: Network, choice: Choice) -> list[str]:
    names = []
    for c in choice.candidates:
        layer = network.layers[c.layer]
        whole = len(layer.weights)
        names.append(
            f"last {c.amount} biases" if c.kind == "bias" else f"{layer.name} {c.amount if c.amount < whole else 'all'}"
        )
    gain, error = choice.gain or 0.0, choice.error or 0.0
    kinds = f"{choice.weights}, {choice.gradients}"
    return [", ".join(names) or "nothing", kinds, choice.place, _gain(gain), _error(error), f"{choice.ram.total:,}"]


def _gain(share: float) -> str:
    return f"{100 * share:+.1f}"


def _error(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f}"


def _table(title: str, columns: list[str], rows: list[list[str]], numeric: tuple[int, ...]) -> None:
    wrapped = {"layer": None, "trains": None, "why not": None, "trains beside the last layer": None}
    display.plain_table(title, columns, [[escape(cell) for cell in row] for row in rows], numeric, wrapped)
