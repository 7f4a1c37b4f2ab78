"""Rules that make one update of many, and momentum between rounds, on real numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ulearn_host import aggregate, momentum, rules
from ulearn_host.errors import UserError
from ulearn_host.rule_names import RULES, parse

Vector = NDArray[np.float64]
Rows = Sequence[Sequence[float]]
NAMED = ("mean", "clipped-mean", "clipped-mean:1.5", "median", "trimmed-mean:0.2", "krum:1", "multi-krum:1", "krum:2",
         "multi-krum:2:3")  # fmt: skip
EXAMPLE = np.array([[1.0, -2.0], [3.0, 4.0], [5.0, 0.0], [100.0, 6.0], [2.0, -50.0]])


# Independent implementations, in loops.


def plain_mean(updates: Rows, weights: Sequence[float]) -> list[float]:
    """Σ w Δ / Σ w."""
    totals = [0.0] * len(updates[0])
    for row, weight in zip(updates, weights, strict=True):
        for i, value in enumerate(row):
            totals[i] += weight * value
    return [total / sum(weights) for total in totals]


def plain_norm(row: Sequence[float]) -> float:
    """L2."""
    return math.sqrt(sum(value**2 for value in row))


def plain_clip(updates: Rows, bound: float | None = None) -> list[list[float]]:
    """Each row at most as long as the bound or the median norm."""
    lengths = [plain_norm(row) for row in updates]
    limit = plain_median([[length] for length in lengths])[0] if bound is None else bound
    return [
        [value * min(1.0, limit / length) if length else value for value in row]
        for row, length in zip(updates, lengths, strict=True)
    ]


def plain_median(updates: Rows) -> list[float]:
    """Per column."""
    result = []
    for column in zip(*updates, strict=True):
        ordered, half = sorted(column), len(column) // 2
        result.append(ordered[half] if len(column) % 2 else (ordered[half - 1] + ordered[half]) / 2)
    return result


def plain_trimmed(updates: Rows, cut: int) -> list[float]:
    """Per column, without the `cut` largest and smallest."""
    columns = [list(column) for column in zip(*updates, strict=True)]
    for column in columns:
        for _ in range(cut):
            column.remove(max(column))
            column.remove(min(column))
    return [sum(column) / len(column) for column in columns]


def plain_krum(updates: Rows, liars: int, keep: int) -> list[float]:
    """The mean of the `keep` rows nearest to their neighbours."""
    scores = []
    for i, row in enumerate(updates):
        distances = []
        for j, other in enumerate(updates):
            if i != j:
                distances.append(sum((a - b) ** 2 for a, b in zip(row, other, strict=True)))
        scores.append(sum(sorted(distances)[: len(updates) - liars - 2]))
    best = sorted(range(len(updates)), key=lambda i: scores[i])[:keep]
    return plain_mean([updates[i] for i in best], [1.0] * keep)


PLAIN: dict[str, Callable[[Rows, Sequence[float]], list[float]]] = {
    "mean": plain_mean,
    "clipped-mean": lambda u, w: plain_mean(plain_clip(u), w),
    "clipped-mean:1.5": lambda u, w: plain_mean(plain_clip(u, 1.5), w),
    "median": lambda u, _: plain_median(u),
    "trimmed-mean:0.2": lambda u, _: plain_trimmed(u, len(u) // 5),
    "krum:1": lambda u, _: plain_krum(u, 1, 1),
    "krum:2": lambda u, _: plain_krum(u, 2, 1),
    "multi-krum:1": lambda u, _: plain_krum(u, 1, len(u) - 3),
    "multi-krum:2:3": lambda u, _: plain_krum(u, 2, 3),
}


@pytest.mark.parametrize("name", NAMED)
def test_against_loops(name: str) -> None:
    """Every rule is what plain loops make of random updates."""
    rng = np.random.default_rng(3)
    for clients, parameters in itertools.product((7, 8, 10, 13), (1, 2, 17)):
        updates = rng.normal(size=(clients, parameters)) * 10.0 ** rng.integers(-3, 3)
        samples = rng.integers(1, 500, clients).astype(float)
        expected = PLAIN[name](updates.tolist(), samples.tolist())
        np.testing.assert_allclose(parse(name)(updates, samples), expected, rtol=1e-12, atol=1e-12)


def test_many_columns_against_loops() -> None:
    """A mean over more parameters than are taken at a time loses none."""
    updates = np.random.default_rng(4).normal(size=(3, 9001))
    np.testing.assert_allclose(rules.mean(updates, [1, 2, 4]), plain_mean(updates.tolist(), [1, 2, 4]), atol=1e-15)


def bits(values: Vector) -> bytes:
    """To compare by."""
    assert values.dtype == np.float64
    return values.tobytes()


@pytest.mark.parametrize("name", NAMED)
def test_order_of_clients(name: str) -> None:
    """No permutation of the clients changes a bit, with ties, zeros of both signs and 60 decades between values."""
    rng = np.random.default_rng(5)
    spread = rng.normal(size=(7, 4)) * 10.0 ** rng.integers(-30, 30, (7, 4))
    ties = rng.integers(-1, 2, (7, 4)) * rng.choice([-1.0, 1.0], (7, 4)) * 0.1
    square = np.array([[0.1, 0], [-0.1, 0], [0, 0.1], [-0.0, -0.1], [0.1, 0], [0, 0], [-0.0, -0.0]])
    for updates in (spread, ties, square, rng.normal(size=(7, 4))):
        samples = rng.random(7) + 0.01
        orders = [rng.permutation(7) for _ in range(200)]
        assert len({bits(parse(name)(updates[order], samples[order])) for order in orders}) == 1
        assert bits(parse(name)(np.asfortranarray(updates), samples)) == bits(parse(name)(updates, samples))


def test_mean_by_hand() -> None:
    """Weighted by samples; the sum is exact where floats in a row lose 1."""
    assert rules.mean([[1.0, 10.0], [4.0, -2.0]], [1, 2]).tolist() == [3.0, 2.0]
    assert rules.mean([[1e16], [1.0], [-1e16], [1.0]], [1, 1, 1, 1]).tolist() == [0.5]
    assert bits(rules.mean([[-0.0]], [3])) == bits(np.zeros(1))


def test_mean_meets_fedavg() -> None:
    """On stored integers the mean rounds to what aggregate.fedavg sums and divides in int64, halves included."""
    rng = np.random.default_rng(6)
    for samples in ([1, 1], [3, 5, 8], rng.integers(1, 2000, 9).tolist()):
        values = rng.integers(-32767, 32768, (len(samples), 2000))
        updates = [aggregate.Update(b"", b"", s, v) for s, v in zip(samples, values, strict=True)]
        real = rules.mean(values, samples)
        rounded = np.sign(real) * np.floor(np.abs(real) + 0.5)
        assert np.array_equal(rounded, aggregate.fedavg(updates).values)


def test_weights_by_hand() -> None:
    """samples × quality × (1 + staleness)^-exponent."""
    assert rules.client_weights([4, 2]).tolist() == [4.0, 2.0]
    assert rules.client_weights([4, 2], quality=[0.5, 1]).tolist() == [2.0, 2.0]
    assert rules.client_weights([4, 2, 2], staleness=[3, 0, 1], exponent=1).tolist() == [1.0, 2.0, 1.0]
    assert rules.client_weights([4, 2], staleness=[3, 0]).tolist() == [2.0, 2.0]
    assert rules.client_weights([8, 2], [0.25, 0], [1, 9], 2).tolist() == [0.5, 0.0]


def test_clip_by_hand() -> None:
    """Norms 5, 10, 0 and 1: beyond the bound they come down to it, in the same direction."""
    updates = np.array([[3.0, 4.0], [-6.0, 8.0], [0.0, 0.0], [1.0, 0.0]])
    done = rules.clip(updates, 5.0)
    assert done.norms.tolist() == [5.0, 10.0, 0.0, 1.0]
    assert done.clipped.tolist() == [False, True, False, False]
    assert done.updates.tolist() == [[3.0, 4.0], [-3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]
    halves = rules.clip(updates)
    assert (halves.bound, halves.clipped.tolist()) == (3.0, [True, True, False, False])
    assert updates[1].tolist() == [-6.0, 8.0]
    still = rules.clip([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    assert (still.bound, still.clipped.tolist(), np.any(still.updates)) == (0.0, [True, False, False], False)


def test_median_and_trimmed_mean_by_hand() -> None:
    """Each coordinate by itself."""
    assert rules.median(EXAMPLE).tolist() == [3.0, 0.0]
    assert rules.median(EXAMPLE[:4]).tolist() == [4.0, 2.0]
    assert rules.trimmed_mean(EXAMPLE, 0.2).tolist() == [10 / 3, 2 / 3]
    assert rules.trimmed_mean(EXAMPLE, 0.4).tolist() == [3.0, 0.0]
    assert rules.trimmed_mean(EXAMPLE, 0).tolist() == [111 / 5, -42 / 5]
    assert rules.trimmed_mean([[i] for i in range(100)], 0.29).tolist() == [49.5]
    skewed = [[2.0**i] for i in range(100)]
    assert bits(rules.trimmed_mean(skewed, 0.29)) == bits(np.array([sum(2.0**i for i in range(29, 71)) / 42]))
    assert rules.trimmed_mean([[1.0], [2.0], [6.0], [9.0]], math.nextafter(0.5, 0)).tolist() == [4.0]


def test_krum_by_hand() -> None:
    """Of 0, 1, 3, 4.5 and 50 with one liar each score is of two neighbours."""
    updates = [[0.0], [1.0], [3.0], [4.5], [50.0]]
    assert rules.krum_scores(updates, 1).tolist() == [
        1 + 9, 1 + 4, 2.25 + 4, 2.25 + 3.5**2, 45.5**2 + 47**2
    ]  # fmt: skip
    assert rules.krum_selected(updates, 1) == [1, 2]
    assert rules.krum(updates, 1).tolist() == [1.0]
    assert rules.multi_krum(updates, 1).tolist() == [2.0]
    assert rules.multi_krum(updates, 1, 1).tolist() == [1.0]


def test_krum_ties() -> None:
    """At the corners of a square all score the same; the choice goes with the update, not with its place."""
    corners = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [0.0, 30.0]])
    assert len(set(rules.krum_scores(corners, 1)[[1, 3]])) == 1
    chosen = {tuple(rules.krum(corners[list(order)], 1)) for order in itertools.permutations(range(5))}
    assert len(chosen) == 1
    same = np.ones((5, 2))
    assert rules.krum_selected(same, 1, 2) == [0, 1]


def fleet(rng: np.random.Generator, mixed: bool, clients: int = 20) -> tuple[Vector, Vector]:
    """Updates around a common direction, [clients, 50], and that direction; mixed clients each have a bias too."""
    direction = rng.normal(size=50)
    updates = direction + 0.3 * rng.normal(size=(clients, 50))
    if mixed:
        updates += 0.6 * rng.normal(size=(clients, 50)) * (rng.random(50) < 0.5)
    return updates, direction


def attacked(updates: Vector, factor: float) -> Vector:
    """A fifth of the clients send theirs times a factor."""
    bad = updates.copy()
    bad[: len(bad) // 5] *= factor
    return bad


@pytest.mark.parametrize("mixed", [False, True], ids=["iid", "heterogeneous"])
@pytest.mark.parametrize("factor", [100.0, -1.0, -100.0])
def test_liars(factor: float, mixed: bool) -> None:
    """A fifth of the fleet, scaled or turned round, moves the mean far and the robust rules little."""
    for seed in range(20):
        updates, direction = fleet(np.random.default_rng(seed), mixed)
        bad, weights = attacked(updates, factor), np.ones(len(updates))
        length = float(np.linalg.norm(direction))

        def off(name: str, sent: Vector, weights: Vector = weights, true: Vector = direction) -> float:
            return float(np.linalg.norm(parse(name)(sent, weights) - true))

        moved = off("mean", bad) / length
        assert moved > 0.35 if factor == -1 else moved > 15
        for name, most in (("median", 0.3), ("trimmed-mean:0.2", 0.3), ("multi-krum:4", 0.25)):
            assert off(name, bad) / length < most, (name, seed)
            assert off(name, bad) < off("mean", bad) * (0.8 if factor == -1 else 0.02), (name, seed)
            assert off(name, updates) / length < 0.25, (name, seed)
        assert set(rules.krum_selected(bad, 4)).isdisjoint(range(4))
        if factor != -1:
            assert rules.clip(bad).clipped[:4].all()
            assert off("clipped-mean", bad) / length < 0.55


@pytest.mark.parametrize("rate, beta", [(1.0, 0.5), (0.5, 0.75)])
def test_fedavgm_by_hand(rate: float, beta: float) -> None:
    """Three rounds: v ← βv + Δ."""
    state = momentum.momentum_start(2)
    v = [0.0, 0.0]
    for delta in ([1.0, -2.0], [4.0, 0.0], [-1.0, 8.0]):
        step, after = momentum.fedavgm(state, delta, rate, beta)
        v = [beta * old + new for old, new in zip(v, delta, strict=True)]
        assert (step.tolist(), after.velocity.tolist()) == ([rate * value for value in v], v)
        state = after
    assert beta != 0.5 or v == [1.25, 7.5]


def test_fedadam_by_hand() -> None:
    """Two rounds with β₁ = ½, β₂ = ¾ and τ = 2, worked out on paper: m 2 then 4, v 4 → 7 → 14.25; no bias corrected."""
    start = momentum.adam_start(1, tau=2.0)
    assert (start.first.tolist(), start.second.tolist()) == ([0.0], [4.0])
    step, one = momentum.fedadam(start, [4.0], 3.0, 0.5, 0.75, 2.0)
    assert (one.first.tolist(), one.second.tolist()) == ([2.0], [7.0])
    assert step.tolist() == [6.0 / (math.sqrt(7) + 2)]
    step, two = momentum.fedadam(one, [6.0], 3.0, 0.5, 0.75, 2.0)
    assert (two.first.tolist(), two.second.tolist()) == ([4.0], [14.25])
    assert step.tolist() == [12.0 / (math.sqrt(14.25) + 2)]
    assert (start.first.tolist(), start.second.tolist()) == ([0.0], [4.0])


def test_fedadam_of_a_steady_mean() -> None:
    """In the end a step is rate × Δ / (|Δ| + τ)."""
    state = momentum.adam_start(3)
    for _ in range(3000):
        step, state = momentum.fedadam(state, [0.5, -2.0, 0.0], rate=0.01)
    np.testing.assert_allclose(step, [0.01 * 0.5 / 0.501, -0.01 * 2 / 2.001, 0], rtol=1e-9)


def test_client_momentum_by_hand() -> None:
    """u ← βu + Δ is sent and kept; with all clients in every round the mean is FedAvgM's."""
    sent, state = momentum.client_momentum(momentum.momentum_start(1), [8.0], 0.5)
    sent, state = momentum.client_momentum(state, [1.0], 0.5)
    assert (sent.tolist(), state.velocity.tolist()) == ([5.0], [5.0])
    sent[0] = 0.0
    assert state.velocity.tolist() == [5.0]
    rng = np.random.default_rng(8)
    weights = [1.0, 2.0, 5.0]
    held, server = [momentum.momentum_start(4)] * 3, momentum.momentum_start(4)
    for _ in range(5):
        updates = rng.normal(size=(3, 4))
        pairs = [momentum.client_momentum(h, u) for h, u in zip(held, updates, strict=True)]
        held = [after for _, after in pairs]
        step, server = momentum.fedavgm(server, rules.mean(updates, weights))
        np.testing.assert_allclose(rules.mean([u for u, _ in pairs], weights), step, rtol=1e-12)


def test_momentum_that_travels() -> None:
    """Both are averaged with the same weights, in any order of the clients."""
    updates, velocities = np.array([[1.0, 0.0], [5.0, 4.0]]), np.array([[2.0, -4.0], [6.0, 0.0]])
    step, after = momentum.mean_with_momentum(updates, velocities, [1, 3])
    assert (step.tolist(), after.velocity.tolist()) == ([4.0, 3.0], [5.0, -1.0])
    rng = np.random.default_rng(9)
    updates, velocities, weights = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)), rng.random(6)
    seen = set()
    for _ in range(50):
        order = rng.permutation(6)
        step, after = momentum.mean_with_momentum(updates[order], velocities[order], weights[order])
        seen.add((bits(step), bits(after.velocity)))
    assert len(seen) == 1


def test_weight_nothing_is_left_out() -> None:
    """Clients of weight 0 count in no named rule."""
    updates = np.vstack([EXAMPLE, np.full((6, 2), 1e6)])
    for name in ("mean", "clipped-mean", "median", "trimmed-mean:0.2", "krum:1", "multi-krum:1"):
        assert bits(parse(name)(updates, [1] * 5 + [0] * 6)) == bits(parse(name)(EXAMPLE, [1] * 5))


BAD_UPDATES: tuple[Any, ...] = (
    [], [[]], [[], []], np.zeros((0, 3)), np.zeros((3, 0)), [1.0, 2.0], 1.0, [[[1.0]]], [[1.0, 2.0], [3.0]], "text",
    [["a"]], [[math.nan]] * 7, [[0.0]] * 6 + [[math.inf]], [[-math.inf]] * 7, [[1e200]] * 7,
)  # fmt: skip


def one_sentence(what: Callable[[], object]) -> str:
    """What the UserError says: one line, no full stop within or after."""
    with pytest.raises(UserError) as caught:
        what()
    said = str(caught.value)
    assert said and "\n" not in said and ". " not in said and not said.endswith(".")
    return said


@pytest.mark.parametrize("updates", BAD_UPDATES, ids=range(len(BAD_UPDATES)))
def test_bad_updates(updates: Any) -> None:
    """Every function refuses NaN, infinity, other shapes and nothing."""
    for name in NAMED:
        one_sentence(lambda name=name: parse(name)(updates, [1] * 7))
    for do in (rules.norms, rules.clip, rules.median, lambda u: rules.mean(u, [1] * 7)):
        one_sentence(lambda do=do: do(updates))
    for do in (lambda u: rules.trimmed_mean(u, 0.2), lambda u: rules.krum(u, 1), lambda u: rules.multi_krum(u, 1)):
        one_sentence(lambda do=do: do(updates))
    one_sentence(lambda: momentum.mean_with_momentum(updates, [[1.0]] * 7, [1] * 7))
    one_sentence(lambda: momentum.mean_with_momentum([[1.0]] * 7, updates, [1] * 7))


BAD_CALLS: tuple[tuple[str, Callable[[], object]], ...] = (
    ("expected one each", lambda: rules.mean(EXAMPLE, [1, 2])),
    ("all 0", lambda: rules.mean(EXAMPLE, [0] * 5)),
    ("expected 0 or more", lambda: rules.mean(EXAMPLE, [1, 2, 3, -1, 5])),
    ("number 2 of 5", lambda: rules.mean(EXAMPLE, [1, math.nan, 3, 1, 5])),
    ("client 2 of 2", lambda: rules.median([[1.0], [math.inf]])),
    ("samples", lambda: rules.client_weights([1, -2])),
    ("all 0", lambda: rules.client_weights([1, 2], [0, 0])),
    ("quality", lambda: rules.client_weights([1, 2], [1])),
    ("staleness", lambda: rules.client_weights([1, 2], None, [0, -1])),
    ("exponent", lambda: rules.client_weights([1, 2], None, [0, 1], -1)),
    ("exponent", lambda: rules.client_weights([1, 2], None, [0, 1], math.nan)),
    ("bound", lambda: rules.clip(EXAMPLE, 0)),
    ("bound", lambda: rules.clip(EXAMPLE, math.nan)),
    ("below 0.5", lambda: rules.trimmed_mean(EXAMPLE, 0.5)),
    ("at least 0", lambda: rules.trimmed_mean(EXAMPLE, -0.1)),
    ("trims none; expected 10", lambda: rules.trimmed_mean(EXAMPLE, 0.1)),
    ("trims none; expected 3", lambda: rules.trimmed_mean(EXAMPLE[:2], 0.49)),
    ("expected 7", lambda: rules.krum(EXAMPLE, 2)),
    ("expected 3", lambda: rules.krum(EXAMPLE[:2], 0)),
    ("-1", lambda: rules.krum(EXAMPLE, -1)),
    ("expected 1 to 2", lambda: rules.multi_krum(EXAMPLE, 1, 3)),
    ("expected 1 to 2", lambda: rules.multi_krum(EXAMPLE, 1, 0)),
    ("state of 2", lambda: momentum.fedavgm(momentum.momentum_start(2), [1.0])),
    ("number 1 of 1", lambda: momentum.fedavgm(momentum.momentum_start(1), [math.nan])),
    ("beta", lambda: momentum.fedavgm(momentum.momentum_start(1), [1.0], 1.0, 1.0)),
    ("rate", lambda: momentum.fedavgm(momentum.momentum_start(1), [1.0], 0.0)),
    ("beta", lambda: momentum.client_momentum(momentum.momentum_start(1), [1.0], -0.1)),
    ("empty", lambda: momentum.client_momentum(momentum.momentum_start(0), [1.0])),
    ("velocities", lambda: momentum.mean_with_momentum([[1.0]], [[1.0, 2.0]], [1])),
    ("tau", lambda: momentum.adam_start(1, 0)),
    ("tau", lambda: momentum.fedadam(momentum.adam_start(1), [1.0], tau=math.inf)),
    ("beta1", lambda: momentum.fedadam(momentum.adam_start(1), [1.0], beta1=1)),
    ("beta2", lambda: momentum.fedadam(momentum.adam_start(1), [1.0], beta2=math.nan)),
    ("state of 1", lambda: momentum.fedadam(momentum.adam_start(1), [1.0, 2.0])),
    ("below 0", lambda: momentum.fedadam(momentum.Adam(np.ones(1), -np.ones(1)), [1.0])),
)


@pytest.mark.parametrize("said, what", BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(said: str, what: Callable[[], object]) -> None:
    """One sentence that names the fault."""
    assert said in one_sentence(what)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no such rule"), ("bulyan", "multi-krum:LIARS[:KEPT]"), ("Mean", "no such rule"),
        ("mean:1", "expected mean"), ("median:", "expected median"), ("trimmed-mean", "expected trimmed-mean:SHARE"),
        ("trimmed-mean:x", "expected trimmed-mean:SHARE"), ("trimmed-mean:0.5", "below 0.5"),
        ("trimmed-mean:nan", "below 0.5"), ("krum", "krum:LIARS"), ("krum:1.5", "krum:LIARS"), ("krum:-1", "0 or more"),
        ("krum:1:2", "2 parameters"), ("multi-krum:1:2:3", "3 parameters"), ("multi-krum:1:0", "1 or more"),
        ("clipped-mean:0", "above 0"), ("clipped-mean:inf", "above 0"),
    ],
)  # fmt: skip
def test_bad_names(text: str, said: str) -> None:
    """A name that is refused says what was expected, before any round."""
    assert said in one_sentence(lambda: parse(text))


def test_every_rule_is_tested() -> None:
    """The lists above have all of them, and a usage starts with its name."""
    assert {name.split(":")[0] for name in NAMED} == set(RULES)
    assert all(rule.usage.partition(":")[0].partition("[")[0] == name for name, rule in RULES.items())
