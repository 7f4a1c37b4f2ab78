"""Rules that make one update of many, as pure functions on real numbers; `rule_names` has them by name.

`updates` is float64 [clients, parameters] of differences "weights trained − base" in real units, `weights` float64
[clients] says how much each counts, a result is float64 [parameters]: what to add to the base. The order of the
clients changes no bit of a result: sums over clients are `math.fsum`, which rounds the exact sum once, medians and
trimming sort, Krum breaks ties by content. -0.0 becomes 0.0.

`aggregate.fedavg` is the mean over stored integers, an int64 sum and one rounding, for boards that must end a round
with the same bits. `mean` of the same integers, weighted by the same sample counts and then rounded with halves away
from zero, is the same while Σ |difference| × samples stays below 2^52. To make a result here an update there, divide
by each tensor's unit and round.

Every function raises UserError, in one sentence, for no updates, unequal lengths, NaN, infinity or numbers beyond
LARGEST. Median, trimmed mean and Krum take no weights on purpose: who lies in an update lies about its samples too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ulearn_host.errors import UserError

Vector = NDArray[np.float64]

LARGEST = 2.0**400  # of a number given: squares and products of two still sum within float64
_COLUMNS = 4096  # made Python numbers at a time


@dataclass(frozen=True, eq=False)
class Clipped:
    """Updates after clipping, [clients, parameters]; norms before and which were cut, [clients]; the bound."""

    updates: Vector
    norms: Vector
    clipped: NDArray[np.bool_]
    bound: float


def numbers(values: ArrayLike, what: str, dimensions: int = 1) -> Vector:
    """A float64 copy of `values`, checked. Raises UserError for another shape, none, NaN, infinity, beyond LARGEST."""
    try:
        array: Vector = np.array(values, dtype=np.float64, order="C") + 0.0
    except (TypeError, ValueError):
        raise UserError(f"{what}: no array of numbers, or rows of unequal lengths; expected one length") from None
    if array.ndim != dimensions:
        raise UserError(f"{what}: {array.ndim} dimensions, expected {dimensions}")
    if not array.size:
        raise UserError(f"{what}: empty, expected at least one number")
    wrong = np.nonzero(~(np.abs(array) <= LARGEST))[0]
    if len(wrong):
        whose = f"{'number' if dimensions == 1 else 'client'} {wrong[0] + 1} of {len(array)}"
        raise UserError(f"{what}: {whose} has NaN, infinity or beyond 2^400; expected finite numbers")
    return array


def within(value: float, what: str, low: float, high: float) -> float:
    """value, checked to be low <= value < high. Raises UserError otherwise."""
    if not low <= value < high:
        raise UserError(f"{what}: {value}, expected at least {low} and below {high}")
    return value


def positive(value: float, what: str) -> float:
    """value, checked to be above 0 and finite. Raises UserError otherwise."""
    if not 0 < value <= LARGEST:
        raise UserError(f"{what}: {value}, expected a number above 0")
    return value


def checked(updates: ArrayLike) -> Vector:
    """The updates, checked."""
    return numbers(updates, "updates", 2)


def _not_negative(values: ArrayLike, what: str, clients: int | None = None) -> Vector:
    """Numbers of 0 and more, one a client. Raises UserError for others."""
    array = numbers(values, what)
    if clients is not None and len(array) != clients:
        raise UserError(f"{what}: {len(array)} numbers for {clients} clients, expected one each")
    if np.any(array < 0):
        raise UserError(f"{what}: {np.min(array)}, expected 0 or more")
    return array


def counted(weights: ArrayLike, clients: int) -> Vector:
    """The weights, checked: one a client, not all of them 0."""
    array = _not_negative(weights, "weights", clients)
    if not np.any(array):
        raise UserError("weights: all 0, expected one client at least that counts")
    return array


def _sums(rows: Vector) -> Iterator[float]:
    """The exact sum of each column, rounded once."""
    for at in range(0, rows.shape[1], _COLUMNS):
        yield from map(math.fsum, rows[:, at : at + _COLUMNS].T.tolist())


def _average(rows: Vector, total: float) -> Vector:
    """Sum of the rows / total."""
    result: Vector = np.fromiter(_sums(rows), np.float64, rows.shape[1]) / total
    return result + 0.0


def client_weights(
    samples: ArrayLike, quality: ArrayLike | None = None, staleness: ArrayLike | None = None, exponent: float = 0.5
) -> Vector:
    """How much each client counts, [clients]: samples × quality × (1 + staleness)^-exponent.

    samples: n_k of FedAvg (McMahan et al. 2017, algorithm 1). quality: a factor a device, 0 and more, all 1 when not
    given. staleness: rounds since the base a client started from, 0 and more; its factor is the polynomial s_a(t − τ)
    of FedAsync (Xie, Koyejo and Gupta 2019), there on the mixing rate, here on the weight within a mean, so that
    clients equally stale count as if none were. Raises UserError when nobody counts.
    """
    weights = _not_negative(samples, "samples")
    if quality is not None:
        weights = weights * _not_negative(quality, "quality", len(weights))
    if staleness is not None:
        late = _not_negative(staleness, "staleness", len(weights))
        weights = weights * (1.0 + late) ** -within(exponent, "exponent of staleness", 0, math.inf)
    return counted(weights, len(weights))


def mean(updates: ArrayLike, weights: ArrayLike) -> Vector:
    """The weighted mean, [parameters]: Σ w_k Δ_k / Σ w_k, each product, each sum and the quotient rounded once.

    FedAvg (McMahan et al. 2017, algorithm 1) where Δ_k is the difference after local epochs; FedSGD (there, too)
    where it is −learning rate × gradient of one pass over all of a client's samples.
    """
    rows = checked(updates)
    shares = counted(weights, len(rows))
    return _average(rows * shares[:, None], math.fsum(shares.tolist()))


def norms(updates: ArrayLike) -> Vector:
    """L2 norm of each client's update, [clients], in the unit of the updates."""
    return np.array([math.sqrt(float(np.sum(row * row))) for row in checked(updates)])


def clip(updates: ArrayLike, bound: float | None = None) -> Clipped:
    """Each update scaled down to L2 norm `bound` where it is longer: Δ_k · min(1, bound / ‖Δ_k‖).

    McMahan et al. 2018 (differentially private language models, FlatClip), against attackers Sun et al. 2019 (norm
    thresholding). Without a bound it is the median of the norms, which is 0, and so every update, when more than half
    of the clients did not move. A clipped norm may pass the bound by a rounding.
    """
    rows = checked(updates)
    lengths = norms(rows)
    bound = float(_middle(lengths[:, None])[0]) if bound is None else positive(bound, "bound of the norm")
    over = lengths > bound
    rows[over] *= (bound / lengths[over])[:, None]
    return Clipped(rows + 0.0, lengths, over, bound)


def side(share: float) -> float:
    """A share to trim, checked."""
    return within(share, "share to trim on each side", 0, 0.5)


def _middle(rows: Vector) -> Vector:
    """The median of each column, of an even number the mean of the middle two."""
    ordered = np.sort(rows, axis=0)
    result: Vector = (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
    return result


def median(updates: ArrayLike) -> Vector:
    """The median of each coordinate, [parameters] (Yin et al. 2018, definition 1); holds against fewer than half."""
    return _middle(checked(updates))


def trimmed_mean(updates: ArrayLike, share: float) -> Vector:
    """The mean of each coordinate without its largest and its smallest ⌊share × clients⌋ values, [parameters].

    Yin et al. 2018, definition 2; 0 <= share < 1/2 must be no less than the share of clients that lie. Raises UserError
    when a share above 0 would trim nobody: that would be the plain mean under a robust name.
    """
    rows = checked(updates)
    cut = math.floor(side(share) * len(rows) * (1 + 2**-50))  # 0.29 × 100 is 29, not 28.999999999999996
    cut = min(cut, (len(rows) - 1) // 2)
    if share and not cut:
        raise UserError(f"{share} of {len(rows)} clients trims none; expected {math.ceil(max(3, 1 / share))} or more")
    kept = np.sort(rows, axis=0)[cut : len(rows) - cut]
    return _average(kept, len(kept))


def krum_scores(updates: ArrayLike, liars: int) -> Vector:
    """Krum's score of each client, [clients]: the sum of squared distances to its n − liars − 2 nearest others.

    Blanchard et al. 2017. Unit: that of the updates, squared. Raises UserError unless n >= 2 liars + 3.
    Takes n² / 2 passes over the parameters.
    """
    rows = checked(updates)
    n = len(rows)
    if liars < 0 or n < 2 * liars + 3:
        raise UserError(f"Krum against {liars} liars among {n} clients: expected {max(3, 2 * liars + 3)} or more")
    distances = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            between = rows[i] - rows[j]
            distances[i, j] = distances[j, i] = np.sum(between * between)
    nearest = [sorted(np.delete(distances[i], i).tolist())[: n - liars - 2] for i in range(n)]
    return np.array([math.fsum(near) for near in nearest])


def krum_selected(updates: ArrayLike, liars: int, keep: int | None = None) -> list[int]:
    """Indices of the `keep` clients with the lowest Krum scores, best first; without keep it is n − liars − 2.

    Equal scores go by the bytes of the updates, where the paper takes the first client, so that the order of clients
    does not matter. Raises UserError unless 1 <= keep <= n − liars − 2.
    """
    rows = checked(updates)
    scores = krum_scores(rows, liars)
    most = len(rows) - liars - 2
    keep = most if keep is None else keep
    if not 1 <= keep <= most:
        raise UserError(f"multi-Krum keeping {keep} of {len(rows)} clients against {liars}: expected 1 to {most}")
    return sorted(range(len(rows)), key=lambda i: (scores[i], rows[i].tobytes()))[:keep]


def krum(updates: ArrayLike, liars: int) -> Vector:
    """The one update with the lowest Krum score, [parameters] (Blanchard et al. 2017)."""
    return multi_krum(updates, liars, 1)


def multi_krum(updates: ArrayLike, liars: int, keep: int | None = None) -> Vector:
    """The plain mean of the `keep` updates with the lowest Krum scores, [parameters].

    Blanchard et al. 2017. Errors and default as of krum_selected.
    """
    kept = checked(updates)[krum_selected(updates, liars, keep)]
    return _average(kept, len(kept))
