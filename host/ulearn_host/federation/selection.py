"""Which boards a round asks, as pure functions: "random", "balanced[:uniform]" and "fast", with a floor of fairness.

Who has no samples or a battery below LOWEST_BATTERY is left out by all three. "random" is uniform and nothing else, to
compare the others with. The others prefer some boards, so a share of their places goes to those that have waited the
longest, and boards that have waited too long come before everybody: `Floor` says how much, `Floor.longest_wait` proves
that nobody is shut out. Being asked is not being counted: where rounds do not wait for slow boards, their updates count
only if the job says `stale` (python tests/bench_selection.py). The order of the candidates does not matter, the state
of `rng` does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError
from ulearn_host.federation.facts import BoardFacts

if TYPE_CHECKING:  # which checks its policy's name here
    from ulearn_host.federation.job import Job

Counts = NDArray[np.float64]

LOWEST_BATTERY = 20  # percent
POOL = 3  # "balanced" looks at this many random boards a place, so that it does not ask the same ones every round
SLOWNESS = 2.0  # α of Oort: a board twice as slow as preferred is asked a quarter as often


@dataclass(frozen=True)
class Candidate:
    """A board that could be asked. rounds_waited: since it was last asked, so that one that never answers does not
    keep a place; rounds_done: its updates in commits; reliability: share of what it was asked that came in time."""

    board: str
    facts: BoardFacts
    rounds_waited: int = 0
    rounds_done: int = 0
    reliability: float = 1.0


@dataclass(frozen=True)
class Floor:
    """What those who wait have a right to. share: of the places; turns: a board is overdue when it has waited for
    this many times the rounds that taking turns would need."""

    share: float = 0.2
    turns: int = 3

    def places(self, wanted: int) -> int:
        """Places for the longest waiting: one at least, where there are two and a share is asked for."""
        return max(int(wanted > 1 and self.share > 0), math.ceil(self.share * wanted * (1 - 2**-50)))

    def overdue(self, boards: int, wanted: int) -> int:
        """Rounds after which a board comes first."""
        return self.turns * math.ceil(boards / max(1, wanted))

    def longest_wait(self, boards: int, wanted: int) -> int:
        """Rounds that no board waits longer than, while it is there all the time: those before it in the queue leave
        it by `places` every round, or by `wanted` once they are overdue."""
        due = self.overdue(boards, wanted) + math.ceil(boards / wanted)
        places = self.places(wanted)
        return min(due, math.ceil(boards / places)) if places else due


@dataclass(frozen=True)
class _Round:
    """What a policy decides from. taken: whom the floor has chosen; others: in an order that rng has drawn."""

    taken: list[Candidate]
    others: list[Candidate]
    places: int
    epochs: int
    moved_bytes: int
    rng: random.Random


_Policy = Callable[[_Round], list[Candidate]]


def choose(
    candidates: Sequence[Candidate],
    wanted: int,
    job: Job,
    rng: random.Random,
    moved_bytes: int = 0,
    floor: Floor | None = None,
) -> list[str]:
    """The boards to ask, at most `wanted`, fewer where not so many can be asked.

    moved_bytes: what a round moves up and down a board's link. A pure function of the set of candidates and the state
    of rng. Raises UserError for an unknown policy, a negative number wanted, or a board that is there twice.
    """
    policy = parse(job.selection)
    if wanted < 0:
        raise UserError(f"boards to ask: {wanted}, expected 0 or more")
    able = sorted((c for c in candidates if _able(c.facts)), key=lambda c: c.board)
    twice = next((a.board for a, b in zip(able, able[1:], strict=False) if a.board == b.board), None)
    if twice is not None:
        raise UserError(f"{twice}: is twice among the candidates, expected each board once")
    rng.shuffle(able)
    if len(able) <= wanted:
        return [c.board for c in able]
    taken: list[Candidate] = []
    if policy is not _random:
        taken = _first(able, wanted, floor or Floor())
    names = {c.board for c in taken}
    others = [c for c in able if c.board not in names]
    asked = _Round(taken, others, wanted - len(taken), job.epochs, moved_bytes, rng)
    return [c.board for c in taken + policy(asked)]


def parse(text: str) -> _Policy:
    """The policy that a name stands for. Raises UserError naming what was expected."""
    if text not in POLICIES:
        raise UserError(f"{text}: no such way to select boards, expected one of {', '.join(POLICIES)}")
    return POLICIES[text]


def _able(facts: BoardFacts) -> bool:
    """Whether a board can be asked at all."""
    return facts.samples > 0 and facts.battery >= LOWEST_BATTERY


def _first(able: Sequence[Candidate], wanted: int, floor: Floor) -> list[Candidate]:
    """Whom the floor takes before any policy, longest waiting first, equals in the order given."""
    queue = sorted(able, key=lambda c: -c.rounds_waited)
    limit = floor.overdue(len(able), wanted)
    overdue = sum(c.rounds_waited >= limit for c in queue)
    return queue[: min(wanted, max(overdue, floor.places(wanted)))]


def _random(asked: _Round) -> list[Candidate]:
    """Uniform without replacement, as in FedAvg (McMahan et al. 2017, algorithm 1)."""
    return asked.others[: asked.places]


def _balanced(asked: _Round, uniform: bool = False) -> list[Candidate]:
    """Boards whose samples together have the fleet's share of each label, or equal shares.

    Greedily, as Yang et al. 2020 (class imbalance reduction), the next board is the one that brings the pooled shares
    nearest to the goal in squared distance; with equal shares that is the QCID of Zhang et al. 2023 (Fed-CBS,
    equation 1), which also shows where greed misses the best set; so members are then exchanged while that helps. It
    chooses among POOL random boards a place. Boards that told no histogram fill the places that are left.
    """
    told = [c for c in asked.others if c.facts.histogram is not None][: POOL * asked.places]
    classes = max((len(c.facts.histogram or ()) for c in (*asked.taken, *asked.others)), default=0)
    if uniform:
        goal = np.full(classes, 1 / max(1, classes))
    else:
        goal = _shares(sum((_counts(c, classes) for c in (*asked.taken, *asked.others)), np.zeros(classes)))
    start = sum((_counts(c, classes) for c in asked.taken), np.zeros(classes))
    rows = np.array([_counts(c, classes) for c in told]).reshape(len(told), classes)
    chosen = _exchanged(_greedy(start, rows, goal, asked.places), start, rows, goal)
    members = [told[i] for i in chosen]
    names = {c.board for c in members}
    rest = [c for c in asked.others if c.board not in names]
    # First those that told nothing: whom the greedy choice left out would only spoil it.
    rest.sort(key=lambda c: c.facts.histogram is not None)
    return members + rest[: asked.places - len(members)]


def _counts(candidate: Candidate, classes: int) -> Counts:
    """A board's samples of each label, [classes]; none where it does not tell."""
    row = np.zeros(classes)
    told = candidate.facts.histogram or ()
    row[: len(told)] = told
    return row


def _shares(counts: Counts) -> Counts:
    """Counts [..., classes] as shares that add up to 1."""
    result: Counts = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return result


def imbalance(counts: Counts, goal: Counts) -> Counts:
    """Squared distance of the shares of counts [..., classes] to the shares in goal [classes]."""
    result: Counts = np.sum((_shares(counts) - goal) ** 2, axis=-1)
    return result


def _greedy(start: Counts, rows: Counts, goal: Counts, places: int) -> list[int]:
    """Indices of rows, each the best to add to those before it."""
    pooled, chosen, left = start, list[int](), list(range(len(rows)))
    while left and len(chosen) < places:
        best = left.pop(int(np.argmin(imbalance(pooled + rows[left], goal))))
        pooled = pooled + rows[best]
        chosen.append(best)
    return chosen


def _exchanged(chosen: list[int], start: Counts, rows: Counts, goal: Counts) -> list[int]:
    """The same with members replaced by others while the distance falls; at most as many exchanges as members."""
    chosen = list(chosen)
    left = [i for i in range(len(rows)) if i not in set(chosen)]
    if not chosen or not left:
        return chosen
    pooled = start + rows[chosen].sum(axis=0)
    for _ in range(len(chosen)):
        distances = imbalance(pooled - rows[chosen][:, None] + rows[left][None], goal)
        out, into = divmod(int(np.argmin(distances)), len(left))
        if not distances[out, into] < imbalance(pooled, goal) - 1e-12:
            break
        pooled = pooled - rows[chosen[out]] + rows[left[into]]
        chosen[out], left[into] = left[into], chosen[out]
    return chosen


def predicted_seconds(facts: BoardFacts, epochs: int, moved_bytes: int) -> float | None:
    """How long a board needs for a round: samples × epochs × step time + bytes / link (Nishio and Yonetani 2019,
    equations 1 to 4, without their shared uplink); None where its step or, with bytes to move, its link is unmeasured.
    """
    if not facts.step_us or (moved_bytes and not facts.link):
        return None
    moving = moved_bytes / facts.link if moved_bytes else 0.0
    return facts.samples * epochs * facts.step_us / 1e6 + moving


def _fast(asked: _Round) -> list[Candidate]:
    """Boards drawn by what they bring a round in its time: samples × reliability × (T / t)^α where t > T.

    The utility of Oort (Lai et al. 2021, equation 1) with all losses taken as equal, t the predicted time, T its lower
    median among the candidates; drawn without replacement by those weights (Efraimidis and Spirakis 2006), so that
    other boards come every round. A board of unknown time counts as one of median time, so that it is measured.
    """
    times = [predicted_seconds(c.facts, asked.epochs, asked.moved_bytes) for c in asked.others]
    preferred = median_low([t for t in times if t is not None] or [1.0])
    keys = []
    for candidate, seconds in zip(asked.others, times, strict=True):
        slow = max(1.0, (seconds or preferred) / preferred) if preferred else 1.0
        weight = candidate.facts.samples * max(candidate.reliability, 0.01) / slow**SLOWNESS
        keys.append(math.log(1.0 - asked.rng.random()) / weight)
    order = sorted(range(len(keys)), key=lambda i: -keys[i])
    return [asked.others[i] for i in order[: asked.places]]


POLICIES: Mapping[str, _Policy] = MappingProxyType(
    {
        "random": _random,
        "balanced": _balanced,
        "balanced:uniform": lambda asked: _balanced(asked, uniform=True),
        "fast": _fast,
    }
)
