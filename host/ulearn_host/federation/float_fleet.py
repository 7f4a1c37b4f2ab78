"""The same job in float32: what an integer fleet is judged by. Who trained in which round, from which seed and on how
many samples is the integer run's; what is trained is a network of the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ulearn_host import rule_names
from ulearn_host.errors import UserError
from ulearn_host.federation.job import Job
from ulearn_host.federation.simulation import Round, name_of

Weights = NDArray[np.float32]


class Learner(Protocol):
    """A float network that stands in for one board after the other."""

    def weights(self) -> Weights:
        """What trains, [parameters], as a copy."""

    def load(self, weights: Weights) -> None:
        """Put weights in their place."""

    def learn(self, board: int, seed: int) -> None:
        """Train on a board's samples in the order of the seed, as the job says."""


def run(learner: Learner, job: Job, rounds: Sequence[Round], samples: Sequence[int]) -> Iterator[Weights]:
    """The fleet's weights [parameters] after each committed round, which the learner holds then.

    rounds: of simulation.run. samples: of each board. The updates are put together by the job's rule in float64 and
    added in float32. Raises UserError for a job whose server holds a state, which is not repeated here.
    """
    if job.server != "none" or job.stale or job.quality:
        raise UserError("a float fleet has no server momentum, staleness or quality; expected a job without")
    rule = rule_names.parse(job.rule)
    numbers = {name_of(i): i for i in range(len(samples))}
    base = learner.weights()
    for turn in rounds:
        if turn.state != "committed":
            continue
        rows = []
        for name in turn.boards:
            learner.load(base)
            learner.learn(numbers[name], job.training_seed(turn.round, name))
            rows.append(learner.weights().astype(np.float64) - base)
        step = rule(np.stack(rows), np.array([samples[numbers[name]] for name in turn.boards], np.float64))
        base = (base + step).astype(np.float32)
        learner.load(base)
        yield base
