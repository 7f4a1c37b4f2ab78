"""What of a network trains within a RAM budget: the choice with the largest summed contribution that fits.

Lin et al. 2022, "On-Device Training Under 256KB Memory", section 3.2, maximise the sum of contributions (bias depth,
and for each layer a share of its weights) under a memory constraint by evolutionary search. Contributions add and a
plan compiles in milliseconds, so here the optimum is found by branch and bound: a branch ends where its compiled plan
does not fit, or where all that could still be added would not beat the best choice so far. Every size is that of a
compiled plan, the arena's interactions included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ulearn_host.budget import PLACES, Footprint, Heap, Place, heap
from ulearn_host.compiler import GradientType, Options, Plan, compile_plan
from ulearn_host.contribution import Candidate, Contribution, Contributions, last_only, measure, with_candidates
from ulearn_host.errors import UserError
from ulearn_host.network import Network
from ulearn_host.parameters import WeightType
from ulearn_host.prepare import from_network
from ulearn_host.schemes import Selection
from ulearn_host.simulate import Progress, Samples, Settings

LIMIT = 800  # plans compiled for each kind of arithmetic; kws01 needs fewer
Arithmetic = tuple[GradientType, WeightType]
# In order of preference among equals: what costs no accuracy first (numerics.md).
ARITHMETIC: tuple[Arithmetic, ...] = (("int16", "int16"), ("int8", "int16"), ("int16", "int8"), ("int8", "int8"))
_EQUAL = 1e-9
_LEFT_OUT, _NO_GAIN = "left out of the whole", "no gain in the whole"


@dataclass(frozen=True)
class Row:
    """A line of the explanation. gain, error: of a part's contribution; bytes: what it takes in this choice, or would
    take if it were added; note: why it was left out, '' where it was not."""

    layer: str
    trains: str
    gain: float
    error: float
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """What trains. place: of the frozen weights; summed: contributions in it; complete: whether the search ended before
    its limit; alternatives: the best with other arithmetic or in another place, and the last layer alone. Once settled:
    gain, error: of the whole choice over the last layer alone; before, accuracy: untrained and trained, as in
    Contributions; learning_rate: at which that was."""

    selection: Selection
    gradients: GradientType
    weights: WeightType
    place: Place
    ram: Footprint
    budget: int
    summed: float
    complete: bool
    candidates: tuple[Candidate, ...]
    rows: tuple[Row, ...] = field(default=(), repr=False)
    alternatives: tuple[Choice, ...] = field(default=(), repr=False)
    gain: float | None = None
    error: float | None = None
    before: float | None = None
    accuracy: float | None = None
    learning_rate: float | None = None

    def options(self, template: Options | None = None) -> Options:
        """As the compiler takes it."""
        parts = tuple((part.rows, part.bias) for part in self.selection)
        base = template or Options()
        return replace(base, scheme="sparse", selection=parts, gradients=self.gradients, weights=self.weights)

    @property
    def expected_gain(self) -> float:
        """Over the last layer alone: measured if it was, else the sum of contributions."""
        return self.summed if self.gain is None else self.gain

    def explain(self) -> list[Row]:
        """What trains, then what does not and why."""
        return list(self.rows)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        result = asdict(replace(self, alternatives=())) | {"selection": [list(part) for part in self.selection]}
        result["alternatives"] = [c.as_json() for c in self.alternatives]
        return result | {"ram": asdict(self.ram) | {"total": self.ram.total}, "expected_gain": self.expected_gain}


@dataclass(frozen=True)
class _Terms:
    """What a search has to keep to."""

    place: Place
    code: int
    data: int
    total: int
    caution: float

    @property
    def room(self) -> int:
        """For the plan."""
        return self.total - self.code - self.data


class _Sizes:
    """Heap of choices, each compiled once, for one kind of arithmetic."""

    def __init__(self, network: Network, template: Options, place: Place, path: Path) -> None:
        self.network, self.template, self.place, self.path = network, template, place, path
        self.known: dict[frozenset[Candidate], Heap | None] = {}
        self.compiled = 0

    def of(self, chosen: Sequence[Candidate]) -> Heap | None:
        """As heap() has it; None where the compiler cannot prove that sums do not overflow."""
        key = frozenset(chosen)
        if key not in self.known:
            parts = tuple((p.rows, p.bias) for p in with_candidates(self.network, chosen))
            self.compiled += 1
            try:
                plan = compile_plan(self.network, replace(self.template, scheme="sparse", selection=parts))
            except UserError:
                self.known[key] = None
            else:
                self.known[key] = heap(plan, self.path, self.place)
        return self.known[key]

    def fits(self, chosen: Sequence[Candidate], room: int) -> bool:
        """Whether it takes no more than so many bytes."""
        size = self.of(chosen)
        return size is not None and size.needed <= room


Levels = list[Contribution]  # of one layer, or of the bias depth: the largest gain first


def _variables(contributions: Contributions, caution: float) -> list[Levels]:
    """What there is to decide: gains above 0 alone, and of two that differ in size the larger only if it gains more."""
    groups: dict[tuple[str, int], list[Contribution]] = {}
    for item in contributions.items:
        c = item.candidate
        groups.setdefault((c.kind, c.layer if c.kind == "weights" else -1), []).append(item)
    result = []
    for group in groups.values():
        useful: Levels = []
        for item in sorted(group, key=lambda item: item.candidate.amount):
            if item.gain > (useful[-1].gain if useful else caution * item.error):
                useful.append(item)
        if useful:
            result.append(useful[::-1])
    return sorted(result, key=lambda levels: -levels[0].gain)


class _Branches:
    """Depth-first branch and bound over the variables, the best level of each first."""

    def __init__(self, sizes: _Sizes, variables: list[Levels], room: int, limit: int, tick: Progress) -> None:
        self.sizes, self.variables, self.room = sizes, variables, room
        self.limit, self.tick = limit, tick
        self.best: list[Contribution] = []
        self.value = 0.0

    @property
    def complete(self) -> bool:
        """Whether nothing was left undone for want of time."""
        return self.sizes.compiled < self.limit

    def run(self, start: list[Contribution]) -> None:
        """Search on from a choice that is known to fit."""
        self.best, self.value = start, sum(item.gain for item in start)
        self._branch(0, [])

    def _fits(self, chosen: list[Contribution]) -> bool:
        self.tick(min(self.sizes.compiled, self.limit), self.limit)
        return self.sizes.fits([item.candidate for item in chosen], self.room)

    def _branch(self, at: int, chosen: list[Contribution]) -> None:
        value = sum(item.gain for item in chosen)
        if value > self.value + _EQUAL:
            self.best, self.value = chosen, value
        if not self.complete or self._bound(at, chosen, value) <= self.value + _EQUAL:
            return
        for item in self.variables[at]:
            if self.complete and self._fits([*chosen, item]):
                self._branch(at + 1, [*chosen, item])
        self._branch(at + 1, chosen)

    def _bound(self, at: int, chosen: list[Contribution], value: float) -> float:
        """What the branch cannot surpass: the rest's best levels that fit beside what is chosen, each by itself."""
        for levels in self.variables[at:]:
            if value + sum(v[0].gain for v in self.variables[at:]) <= self.value + _EQUAL:
                break  # not even if everything fitted
            value += next((item.gain for item in levels if self._fits([*chosen, item])), 0.0)
            at += 1
        else:
            return value
        return self.value


def search(
    network: Network,
    contributions: Contributions,
    ram_bytes: int,
    *,
    data_buffer_bytes: int,
    code_bytes: int,
    options: Options | None = None,
    arithmetic: Sequence[Arithmetic] = ARITHMETIC,
    place: Place = "ram",
    caution: float = 0.0,
    limit: int = LIMIT,
    progress: Progress = lambda done, total: None,
) -> Choice:
    """The choice with the largest summed contribution; of equals that with the widest arithmetic.

    ram_bytes: the whole heap. options: a template, whose scheme, selection, gradients and weights are not looked at.
    code_bytes: placement.BASE_BYTES and what the code takes. arithmetic: those kinds of it that may be taken.
    caution: only gains above so many standard errors are looked at. limit: plans compiled at most for each kind of
    arithmetic. The best choices of the other kinds, and the last layer alone, are its alternatives. Raises UserError
    where not even the last layer fits.
    """
    terms = _Terms(place, code_bytes, data_buffer_bytes, ram_bytes, caution)
    variables = _variables(contributions, caution)
    found: list[Choice] = []
    bare: list[Choice] = []  # the last layer alone
    start: list[Contribution] = []
    all_sizes = []
    total = len(arithmetic) * limit
    with TemporaryDirectory() as folder:
        for i, (gradients, weights) in enumerate(arithmetic):
            template = replace(options or Options(), gradients=gradients, weights=weights)
            sizes = _Sizes(network, template, place, Path(folder) / "plan.ulm")
            all_sizes.append(sizes)
            if not sizes.fits([], terms.room):
                continue
            branches = _Branches(sizes, variables, terms.room, limit, _shifted(progress, i * limit, total))
            if not bare:
                bare.append(_choice(branches, contributions, terms, gradients, weights))
            # What fits with wider arithmetic fits with narrower, or nearly always does.
            branches.run(start if sizes.fits([item.candidate for item in start], terms.room) else [])
            start = branches.best
            found.append(_choice(branches, contributions, terms, gradients, weights))
    progress(total, total)
    if not found:
        raise _too_small(all_sizes, terms)
    found.sort(key=lambda choice: -round(choice.summed, 9))
    return replace(found[0], alternatives=(*found[1:], *(bare if found[-1].candidates else ())))


def search_places(
    network: Network,
    contributions: Contributions,
    ram_bytes: int,
    places: Sequence[Place],
    *,
    code_bytes: Mapping[Place, int],
    progress: Progress = lambda done, total: None,
    **more: Any,
) -> Choice:
    """As search, over several places of the frozen weights; of equal choices that in the first of them.

    code_bytes: for each place. What the first one has room for altogether, is not searched in the others. Raises
    UserError where nothing fits, for the place that takes least.
    """
    found: list[Choice] = []
    faults = []
    for i, place in enumerate(places):
        try:
            choice = search(
                network,
                contributions,
                ram_bytes,
                code_bytes=code_bytes[place],
                place=place,
                progress=lambda done, total, i=i: progress(i * total + done, len(places) * total),  # type: ignore[misc]
                **more,
            )
        except TooSmall as fault:
            faults.append(fault)
            continue
        known = [c.options() for c in found]
        found += [c for c in (replace(choice, alternatives=()), *choice.alternatives) if c.options() not in known]
        best = sum(levels[0].gain for levels in _variables(contributions, more.get("caution", 0.0)))
        if choice.summed >= best - _EQUAL and (choice.gradients, choice.weights) == ARITHMETIC[0]:
            break
    progress(1, 1)
    if not found:
        raise min(faults, key=lambda fault: fault.needed)
    first, *rest = sorted(found, key=lambda choice: -round(choice.summed, 9))
    return replace(first, alternatives=tuple(rest))


def _shifted(progress: Progress, by: int, total: int) -> Progress:
    return lambda done, _: progress(by + done, total)


def _footprint(size: Heap, terms: _Terms) -> Footprint:
    plan = size.total - size.frozen - size.weights - size.arena
    return Footprint(terms.code, plan, size.frozen, size.weights, size.arena, terms.data, size.margin)


class TooSmall(UserError):
    """Not even the last layer fits: that needs so many bytes."""

    def __init__(self, sentence: str, needed: int) -> None:
        super().__init__(sentence)
        self.needed = needed


def _too_small(sizes: Sequence[_Sizes], terms: _Terms) -> UserError:
    known = [size for size in (s.of([]) for s in sizes) if size]
    if not known:
        return UserError("the last layer cannot be compiled for training, so nothing can be chosen")
    needed = _footprint(min(known, key=lambda size: size.needed), terms)
    where = {"ram": "", "stream": " with its frozen weights streamed", "in-place": " with its frozen weights in flash"}
    return TooSmall(
        f"{terms.total:,} bytes of RAM are {needed.total - terms.total:,} too few even to train the last layer alone"
        f"{where[terms.place]}, which takes {needed.total:,}: {needed}",
        needed.total,
    )


def _choice(
    branches: _Branches,
    contributions: Contributions,
    terms: _Terms,
    gradients: GradientType,
    weights: WeightType,
) -> Choice:
    sizes, chosen = branches.sizes, [item.candidate for item in branches.best]
    size = sizes.of(chosen)
    assert size is not None
    complete = branches.complete  # before the explanation's own compilations
    return Choice(
        selection=with_candidates(sizes.network, chosen),
        gradients=gradients,
        weights=weights,
        place=terms.place,
        ram=_footprint(size, terms),
        budget=terms.total,
        summed=branches.value,
        complete=complete,
        candidates=tuple(chosen),
        rows=tuple(_rows(sizes, branches, contributions, terms)),
    )


def _rows(sizes: _Sizes, branches: _Branches, contributions: Contributions, terms: _Terms) -> Iterator[Row]:
    complete = branches.complete
    layers = sizes.network.layers
    chosen = [item.candidate for item in branches.best]
    whole, alone = sizes.of(chosen), sizes.of([])
    assert whole is not None and alone is not None
    last = next(i for i, part in enumerate(last_only(sizes.network)) if part.any)
    yield Row(layers[last].name, "weights, bias", contributions.last_gain, contributions.last_error, alone.total)
    for item in branches.best:
        less = sizes.of([c for c in chosen if c != item.candidate])
        spent = whole.needed - less.needed if less else 0
        yield _row(sizes.network, item, spent)
    taken = {(c.kind, c.layer if c.kind == "weights" else -1) for c in chosen}
    groups: dict[tuple[str, int], Contribution] = {}
    for item in contributions.items:
        key = (item.candidate.kind, item.candidate.layer if item.candidate.kind == "weights" else -1)
        if key not in taken and (key not in groups or item.gain > groups[key].gain):
            groups[key] = item
    for item in sorted(groups.values(), key=lambda item: -item.gain):
        more = sizes.of([*chosen, item.candidate])
        if item.gain <= terms.caution * item.error:
            note = "no gain" if item.gain <= 0 else "too uncertain a gain"
        elif more is None:
            note = "sums could overflow with this arithmetic"
        elif more.needed > terms.room:
            note = f"{more.needed - terms.room:,} bytes too many beside the rest"
        else:
            note = _LEFT_OUT if complete else "not reached before the search's limit"
        yield _row(sizes.network, item, more.needed - whole.needed if more else 0, note)


def _row(network: Network, item: Contribution, size: int, note: str = "") -> Row:
    c, layer = item.candidate, network.layers[item.candidate.layer]
    if c.kind == "bias":
        return Row(f"{layer.name} and later", f"biases of the last {c.amount}", item.gain, item.error, size, note)
    channels = f"weights of {c.amount} of {len(layer.weights)} channels" if c.amount < len(layer.weights) else "weights"
    return Row(layer.name, channels, item.gain, item.error, size, note)


def settle(
    network: Network,
    samples: Samples,
    choice: Choice,
    settings: Settings | None = None,
    *,
    template: Options | None = None,
    progress: Progress = lambda done, total: None,
    cache: Path | None = None,
    processes: int | None = None,
) -> Choice:
    """The best of a choice and its alternatives once each has been measured as a whole, with its learning rate.

    Contributions were measured one at a time, the largest are large by luck too, and what 8 bits cost is in none of
    them; so each is measured once more, on other halves of the samples. The last layer alone takes part as well.
    settings, cache, processes: as for analyse.
    """
    settings = settings or Settings()
    everyone = [choice, *choice.alternatives]
    options = [c.options(template) for c in everyone]
    other = replace(settings, split=settings.split + 1)
    found = measure(network, samples, options, other, progress=progress, cache=cache, processes=processes)
    settled = [
        replace(
            c, gain=m.gain, error=m.error, before=m.before, accuracy=m.accuracy, learning_rate=m.rate, alternatives=()
        )
        for c, m in zip(everyone, found, strict=True)
    ]
    settled = [
        replace(c, rows=tuple(replace(r, note=_NO_GAIN) if r.note == _LEFT_OUT else r for r in c.rows)) for c in settled
    ]
    first, *rest = sorted(settled, key=lambda c: (-round(c.gain or 0.0, 9), PLACES.index(c.place), c.ram.total))
    return replace(first, alternatives=tuple(rest))


def finish(network: Network, choice: Choice, samples: Samples, template: Options | None = None) -> Plan:
    """The plan of a choice: gains calibrated with the samples, and in STATE the learning rate that was measured."""
    options = choice.options(template)
    x = samples.x.reshape(len(samples.x), -1)
    return from_network(network, x, samples.y, options=options, learning_rate=choice.learning_rate)
