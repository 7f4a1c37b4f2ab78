"""Which boards a round asks: determinism, balance, speed, and that nobody is shut out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ulearn_host.errors import UserError
from ulearn_host.federation import selection
from ulearn_host.federation.facts import BoardFacts
from ulearn_host.federation.job import Job
from ulearn_host.federation.selection import Candidate, Floor

POLICIES = tuple(selection.POLICIES)
PREFERRING = tuple(name for name in POLICIES if name != "random")


def told(samples: int = 100, step_us: int = 2000, link: int = 50_000, **more: Any) -> BoardFacts:
    """What a board told."""
    return BoardFacts(bytes(16), bytes(16), samples, 0, step_us, link, **more)


def job(policy: str, epochs: int = 1) -> Job:
    """A job that selects by a policy."""
    return Job("selecting", 1, 1, selection=policy, epochs=epochs)


def fleet(seed: int, boards: int, classes: int = 5) -> list[Candidate]:
    """Boards of all speeds, sizes and mixtures of classes; some tell no histogram or measured nothing."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(boards):
        samples = int(rng.integers(1, 400))
        counts = rng.multinomial(samples, rng.dirichlet(np.full(classes, 0.3)))
        labels = tuple(int(c) for c in counts) if rng.random() < 0.8 else None
        step, link = (int(10 ** rng.uniform(2, 5)) if rng.random() < 0.9 else 0 for _ in range(2))
        facts = told(samples, step, link, histogram=labels)
        result.append(Candidate(f"board-{i}", facts, int(rng.integers(0, 4)), 0, float(rng.uniform(0, 1))))
    return result


def asked(candidates: list[Candidate], wanted: int, policy: str, seed: int = 1) -> list[str]:
    """The choice for a job with that policy."""
    return selection.choose(candidates, wanted, job(policy), random.Random(seed), moved_bytes=2000)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_seed_decides_and_the_order_does_not(policy: str) -> None:
    boards = fleet(3, 40)
    first = asked(boards, 12, policy)
    assert len(first) == len(set(first)) == 12
    for seed in range(5):
        shuffled = random.Random(seed).sample(boards, len(boards))
        assert asked(shuffled, 12, policy) == first
    assert len({tuple(sorted(asked(boards, 12, policy, seed))) for seed in range(10)}) > 5


@pytest.mark.parametrize("policy", POLICIES)
def test_few_boards(policy: str) -> None:
    """None, one, as many as wanted, fewer: all that can be asked, each once."""
    assert asked([], 5, policy) == []
    boards = fleet(1, 4)
    assert asked(boards, 0, policy) == []
    for wanted in (4, 5, 100):
        assert sorted(asked(boards, wanted, policy)) == sorted(c.board for c in boards)


@pytest.mark.parametrize("policy", POLICIES)
def test_who_cannot_is_not_asked(policy: str) -> None:
    """A low battery or no sample, however long they have waited."""
    boards = fleet(2, 10)
    flat = [
        Candidate("flat", told(battery=selection.LOWEST_BATTERY - 1), 1000),
        Candidate("empty", told(samples=0), 1000),
    ]
    enough = Candidate("enough", told(battery=selection.LOWEST_BATTERY))
    assert sorted(asked([*boards, *flat, enough], 100, policy)) == sorted(c.board for c in [*boards, enough])
    for seed in range(20):
        assert not {"flat", "empty"} & set(asked([*boards, *flat], 5, policy, seed))


def test_what_is_refused() -> None:
    boards = fleet(1, 4)
    with pytest.raises(UserError, match="psychic: no such way to select boards, expected one of random, balanced"):
        asked(boards, 2, "psychic")
    with pytest.raises(UserError, match="board-1: is twice"):
        asked([*boards, boards[1]], 2, "random")
    with pytest.raises(UserError, match="-1, expected 0 or more"):
        asked(boards, -1, "random")


def rounds(policy: str, boards: list[Candidate], wanted: int, count: int, floor: Floor) -> tuple[Counter[str], int]:
    """How often each board was asked in `count` rounds, and the longest that one waited."""
    waits = {c.board: 0 for c in boards}
    times: Counter[str] = Counter()
    longest = 0
    for turn in range(count):
        now = [replace(c, rounds_waited=waits[c.board]) for c in boards]
        chosen = selection.choose(now, wanted, job(policy), random.Random(turn), 2000, floor)
        assert len(chosen) == len(set(chosen)) == min(wanted, len(boards))
        times.update(chosen)
        waits = {board: 0 if board in chosen else wait + 1 for board, wait in waits.items()}
        longest = max(longest, *waits.values())
    return times, longest


@pytest.mark.parametrize("policy", PREFERRING)
@pytest.mark.parametrize("seed", range(8))
def test_nobody_is_shut_out(policy: str, seed: int) -> None:
    """In random fleets, with random floors, no board ever waits longer than the floor promises."""
    rng = random.Random(100 + seed)
    boards = fleet(seed, rng.randint(2, 40))
    wanted = rng.randint(1, len(boards))
    floor = Floor(rng.choice([0.0, 0.1, 0.2, 0.5]), rng.randint(1, 5))
    limit = floor.longest_wait(len(boards), wanted)
    _, longest = rounds(policy, boards, wanted, 4 * limit + 10, floor)
    assert longest <= limit


def test_without_the_floor_slow_boards_are_shut_out() -> None:
    """What the floor is for: the same fleet with none, and with the usual one."""
    quick = [Candidate(f"quick-{i}", told(step_us=100)) for i in range(10)]
    slow = [Candidate(f"slow-{i}", told(step_us=1_000_000)) for i in range(10)]
    times, _ = rounds("fast", quick + slow, 5, 60, Floor(0.0, 10**9))
    assert sum(times[c.board] for c in slow) == 0
    times, longest = rounds("fast", quick + slow, 5, 60, Floor())
    assert min(times[c.board] for c in slow) >= 2 and longest <= Floor().longest_wait(20, 5)
    assert sum(times[c.board] for c in quick) >= 2 * sum(times[c.board] for c in slow)


def distance(boards: list[Candidate], chosen: list[str]) -> float:
    """Of the pooled labels of those chosen to the fleet's."""
    counts = {c.board: np.array(c.facts.histogram, float) for c in boards}
    every = sum(counts.values())
    return float(selection.imbalance(sum(counts[b] for b in chosen), every / every.sum()))


def test_balanced_is_nearer_to_the_fleet_than_random() -> None:
    """Over many fleets where every board has few classes: a fourth of the distance, and less."""
    ratios = []
    for seed in range(20):
        boards = [c for c in fleet(seed, 80) if c.facts.histogram is not None]
        near, far = (distance(boards, asked(boards, 8, policy, seed)) for policy in ("balanced", "random"))
        ratios.append(near / far)
    assert np.median(ratios) < 0.25


def test_uniform_is_another_goal_than_the_fleet() -> None:
    """A fleet of which nine in ten boards have one class only."""
    common = [Candidate(f"a-{i}", told(histogram=(100, 0))) for i in range(90)]
    rare = [Candidate(f"b-{i}", told(histogram=(0, 100))) for i in range(10)]
    chosen = {p: sum(b[0] == "b" for b in asked(common + rare, 10, p)) for p in ("balanced", "balanced:uniform")}
    assert chosen["balanced"] == 1
    assert chosen["balanced:uniform"] >= 3


def test_exchanges_mend_greed() -> None:
    """The example of Zhang et al. 2023, figure 3, where greed takes the first, then the second, and misses the best."""
    rows = np.array([[5, 5, 5, 5, 5, 5], [6, 6, 6, 6, 6, 0], [0, 0, 0, 10, 10, 10], [10, 10, 10, 0, 0, 0]], float)
    goal, nothing = np.full(6, 1 / 6), np.zeros(6)
    greedy = selection._greedy(nothing, rows, goal, 3)
    assert sorted(greedy) == [0, 1, 2] or sorted(greedy) == [0, 1, 3]
    assert sorted(selection._exchanged(greedy, nothing, rows, goal)) == [0, 2, 3]


def test_boards_without_a_histogram_are_asked_where_places_are_left() -> None:
    """Nobody opted in: as good as random. Some did: they come first but for the floor."""
    silent = [Candidate(f"silent-{i}", told()) for i in range(20)]
    times, _ = rounds("balanced", silent, 5, 40, Floor())
    assert len(times) == 20
    telling = [Candidate(f"telling-{i}", told(histogram=(1, 1))) for i in range(3)]
    assert sum(b.startswith("telling") for b in asked(silent + telling, 8, "balanced")) == 3


def test_predicted_time() -> None:
    """100 samples × 3 epochs × 2 ms, and 5,000 bytes at 50,000 a second."""
    assert selection.predicted_seconds(told(), 3, 5000) == pytest.approx(0.7)
    assert selection.predicted_seconds(told(link=0), 3, 0) == pytest.approx(0.6)
    assert selection.predicted_seconds(told(link=0), 3, 1) is None
    assert selection.predicted_seconds(told(step_us=0), 3, 0) is None


def test_fast_is_faster_than_random() -> None:
    """The time until four in five of those asked have answered, by the prediction, over many fleets."""
    ratios = []
    for seed in range(30):
        boards = [replace(c, facts=replace(c.facts, step_us=c.facts.step_us or 1000)) for c in fleet(seed, 60)]
        seconds = {c.board: selection.predicted_seconds(c.facts, 1, 0) for c in boards}
        ends = []
        for policy in ("fast", "random"):
            chosen = selection.choose(boards, 10, job(policy), random.Random(seed))
            ends.append(sorted(seconds[b] for b in chosen)[7])
        ratios.append(ends[0] / ends[1])
    assert np.median(ratios) < 0.5


def test_unmeasured_boards_are_tried() -> None:
    """Who has not been measured counts as one of median speed, and who seldom answers as less."""
    known = [Candidate(f"known-{i}", told(step_us=1000)) for i in range(10)]
    new = [Candidate(f"new-{i}", told(step_us=0)) for i in range(10)]
    times = Counter(b.split("-")[0] for seed in range(100) for b in asked(known + new, 6, "fast", seed))
    assert 0.8 < times["new"] / times["known"] < 1.25
    bad = [Candidate(f"bad-{i}", told(step_us=1000), reliability=0.1) for i in range(10)]
    times = Counter(b.split("-")[0] for seed in range(100) for b in asked(known + bad, 6, "fast", seed))
    assert times["bad"] < 0.5 * times["known"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_boards_take_no_time(policy: str) -> None:
    """130 of 1,000: below half a second, so that a server's loop may do it."""
    import time

    boards = fleet(9, 1000, classes=12)
    begun = time.perf_counter()
    assert len(asked(boards, 130, policy)) == 130
    assert time.perf_counter() - begun < 0.5
