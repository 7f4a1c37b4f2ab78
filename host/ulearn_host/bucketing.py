"""Bucketing before a robust rule, for fleets whose boards see different things: a pure function on real numbers."""

from __future__ import annotations

import math
from hashlib import sha256

import numpy as np
from numpy.typing import ArrayLike

from ulearn_host import rules
from ulearn_host.errors import UserError
from ulearn_host.rules import Vector


def buckets(updates: ArrayLike, size: int) -> tuple[Vector, Vector]:
    """Plain means of `size` clients each, drawn by chance, [⌈clients / size⌉, parameters], and of how many each is.

    Karimireddy, He and Jaggi 2022 (Byzantine-robust learning on heterogeneous datasets via bucketing, algorithm 1).
    Honest means differ less than honest updates do, so a median or Krum takes less of an honest difference for a lie;
    in return a liar spoils its whole bucket: what follows must bear `size` times the share of liars.

    What is drawn is a function of all updates together: their order changes no bit, and nobody who does not know the
    others' updates chooses its bucket. Raises UserError unless size >= 1, and as `rules` does.
    """
    rows = rules.checked(updates)
    if size < 1:
        raise UserError(f"buckets of {size} clients, expected 1 or more")
    digests = [sha256(row.tobytes()).digest() for row in rows]
    key = sha256(b"".join(sorted(digests))).digest()
    order = sorted(range(len(rows)), key=lambda i: (sha256(key + digests[i]).digest(), rows[i].tobytes()))
    groups = [rows[part] for part in np.array_split(order, math.ceil(len(rows) / size))]
    means = np.stack([rules.mean(group, np.ones(len(group))) for group in groups])
    return means, np.array([len(group) for group in groups], np.float64)
