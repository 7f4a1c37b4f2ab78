"""Momentum and adaptive steps between rounds, on the server or with the clients, as pure functions on real numbers:
state and this round's mean in, step and new state out.

Everything is float64 [parameters] in the unit of the weights, and points as the updates of `rules` do, "trained −
base": a step is added to the base. Every function raises UserError, in one sentence, for unequal lengths, NaN,
infinity, numbers beyond rules.LARGEST and coefficients out of range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ulearn_host import rules
from ulearn_host.errors import UserError
from ulearn_host.rules import Vector, positive


@dataclass(frozen=True, eq=False)
class Momentum:
    """A velocity, float64 [parameters], in the unit of the weights."""

    velocity: Vector


@dataclass(frozen=True, eq=False)
class Adam:
    """Moments of the means of rounds, float64 [parameters]: first in the unit of the weights, second in its square."""

    first: Vector
    second: Vector


def momentum_start(parameters: int) -> Momentum:
    """At rest."""
    return Momentum(np.zeros(parameters))


def adam_start(parameters: int, tau: float = 1e-3) -> Adam:
    """First moment 0, second τ²: the least that Reddi et al. 2021, algorithm 2, allow for v₋₁."""
    return Adam(np.zeros(parameters), np.full(parameters, positive(tau, "tau") ** 2))


def _pair(state: Vector, update: ArrayLike) -> tuple[Vector, Vector]:
    """State and update, checked to be of one length."""
    held, new = rules.numbers(state, "state"), rules.numbers(update, "update")
    if len(held) != len(new):
        raise UserError(f"state of {len(held)} numbers for an update of {len(new)}; expected the same model's")
    return held, new


def fedavgm(state: Momentum, mean: ArrayLike, rate: float = 1.0, beta: float = 0.9) -> tuple[Vector, Momentum]:
    """FedAvgM: v ← βv + Δ, step = rate × v (Hsu, Qi and Brown 2019, where rate is 1).

    mean: Δ of this round, of any rule. Δ is not damped by 1 − β, so a steady Δ ends at rate × Δ / (1 − β). 0 <= β < 1.
    """
    held, new = _pair(state.velocity, mean)
    velocity = rules.within(beta, "beta", 0, 1) * held + new
    return positive(rate, "rate") * velocity, Momentum(velocity)


def client_momentum(state: Momentum, update: ArrayLike, beta: float = 0.9) -> tuple[Vector, Momentum]:
    """One client's own momentum: u ← βu + Δ, and u is what it sends in place of Δ.

    The momentum correction of Lin et al. 2018 (Deep Gradient Compression) on differences of a round in
    place of gradients. With equal weights in every round and all clients in each, the mean of what they send is
    FedAvgM's velocity; a client that misses a round keeps its own. 0 <= β < 1.
    """
    held, new = _pair(state.velocity, update)
    velocity = rules.within(beta, "beta", 0, 1) * held + new
    return velocity.copy(), Momentum(velocity)


def mean_with_momentum(updates: ArrayLike, velocities: ArrayLike, weights: ArrayLike) -> tuple[Vector, Momentum]:
    """Momentum that travels with the update: the weighted means of both, and all start the next round from both.

    Yu, Jin and Yang 2019 (parallel restarted SGD with momentum), with FedAvg's weights in place of equal
    ones. updates and velocities: [clients, parameters]; a velocity is the buffer of a client's local momentum SGD after
    its last step, in whatever unit its optimiser keeps it. The order of the clients changes no bit.
    """
    rows, moving = rules.numbers(updates, "updates", 2), rules.numbers(velocities, "velocities", 2)
    if rows.shape != moving.shape:
        raise UserError(
            f"{moving.shape[0]} × {moving.shape[1]} velocities for {rows.shape[0]} × {rows.shape[1]} updates; expected "
            f"as many"
        )
    return rules.mean(rows, weights), Momentum(rules.mean(moving, weights))


def fedadam(
    state: Adam, mean: ArrayLike, rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> tuple[Vector, Adam]:
    """FedAdam: m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ², step = rate × m / (√v + τ).

    Reddi et al. 2021, algorithm 2, with its convention for the bias: **none is corrected**. Where Kingma and Ba 2015
    start from 0 and divide by 1 − βᵗ, m starts from 0, so that first steps are short, and v from τ² (adam_start).
    tau: in the unit of the weights, bounds how much a small Δ is enlarged. rate: in the unit of the weights, the length
    of a step of a steady Δ far above τ. 0 <= β₁, β₂ < 1.
    """
    first, new = _pair(state.first, mean)
    second, _ = _pair(state.second, mean)
    if np.any(second < 0):
        raise UserError("state: a second moment below 0; expected one of adam_start or of fedadam")
    one, two = rules.within(beta1, "beta1", 0, 1), rules.within(beta2, "beta2", 0, 1)
    first = one * first + (1 - one) * new
    second = two * second + (1 - two) * new * new
    step = positive(rate, "rate") * first / (np.sqrt(second) + positive(tau, "tau"))
    return step, Adam(first, second)
