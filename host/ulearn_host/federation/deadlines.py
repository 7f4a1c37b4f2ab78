"""How long a round waits, drawn from measured times, and when boards are told to come back."""

from __future__ import annotations

import random
from collections.abc import Sequence

QUANTILE = 0.9
MARGIN = 1.5
SPREAD = 10.0  # times the median: beyond, an answer tells of a board that slept, not of one that works
MEASURED_LEAST = 3  # answers, before which nothing is known
MEASURED_ROUNDS = 5  # answers to so many are looked at, so that a fleet that has become slower is noticed
LONGEST_S = 86400.0
JITTER = 0.25


def deadline_s(times: Sequence[float], first_s: float, least_s: float, failures: int) -> float:
    """Seconds that a round waits for its updates.

    times: seconds from the opening of a round to a board's answer, late answers included: without these the deadline
    would be drawn from those who met it, and creep down. It is MARGIN times their QUANTILE, or times SPREAD medians if
    that is less; at least `least_s`; `first_s` while fewer than MEASURED_LEAST are known. failures: rounds given up in
    a row; each doubles it, since whoever gets no answer in time measures nothing. At most LONGEST_S.
    """
    wanted = first_s
    if len(times) >= MEASURED_LEAST:
        ordered = sorted(times)
        high, middle = ordered[int(QUANTILE * len(ordered))], ordered[len(ordered) // 2]
        wanted = max(least_s, MARGIN * min(high, SPREAD * middle))
    return min(LONGEST_S, wanted * 2.0 ** min(failures, 20))


def retry_ms(retry_s: float, rng: random.Random) -> int:
    """When to ask again: ± JITTER, so that boards that were told together do not come together for ever."""
    return max(1, round(1000 * retry_s * rng.uniform(1 - JITTER, 1 + JITTER)))
