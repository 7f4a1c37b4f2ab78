"""Federated evaluation in the manner of MedPerf (Karargyris et al. 2023): a base is sent out, boards score it on
samples that they hold back, and only counts come back.

Nothing is said of a group smaller than `min_group`, neither the pooled figure nor a board's own: the mean of two is no
secret to either of them. Two evaluations of groups that differ by one board still tell that board's figure to whoever
sees both; a minimum does not prevent that.
"""

from __future__ import annotations

import math
import struct
from binascii import crc32
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ulearn import task as wire
from ulearn_host import display
from ulearn_host.errors import UserError

MIN_GROUP = 5


@dataclass(frozen=True)
class Report:
    """What one board found. loss: the mean over its samples: cross-entropy in nats (or hinge loss), of a regression the
    summed squared difference of int8 codes; None where the plan has no training program. right: 0 of a regression."""

    job: int
    round: int
    base_id: bytes
    classes: int
    samples: int
    right: int
    loss: float | None

    @property
    def accuracy(self) -> float | None:
        """Share of samples that were right; None of a regression."""
        return self.right / self.samples if self.classes else None


@dataclass(frozen=True)
class Spread:
    """How a figure is spread over boards, each counting once. worst_decile: the mean of the worst tenth, which is one
    board at least and the largest tenth where less is better."""

    min: float
    q1: float
    median: float
    q3: float
    max: float
    worst_decile: float


@dataclass(frozen=True)
class Score:
    """A figure pooled over boards, weighted by samples, and its spread."""

    pooled: float
    spread: Spread


@dataclass(frozen=True)
class Evaluation:
    """What a group found of one base. accuracy, loss and boards are None where nothing may be said, and one of the
    first two where the boards do not measure it."""

    base_id: bytes
    round: int
    reported: int
    samples: int
    min_group: int
    accuracy: Score | None
    loss: Score | None
    boards: dict[str, Report] | None

    @property
    def withheld(self) -> str | None:
        """Why nothing is said."""
        if self.boards is not None:
            return None
        return f"{self.reported} boards reported, figures are given from {self.min_group} boards on"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        boards = None
        if self.boards is not None:
            boards = [
                {"board": name, "samples": r.samples, "accuracy": r.accuracy, "loss": r.loss}
                for name, r in self.boards.items()
            ]
        return {
            "base_id": self.base_id.hex(),
            "round": self.round,
            "reported": self.reported,
            "samples": self.samples if self.boards is not None else None,
            "min_group": self.min_group,
            "accuracy": asdict(self.accuracy) if self.accuracy else None,
            "loss": asdict(self.loss) if self.loss else None,
            "boards": boards,
            "withheld": self.withheld,
        }


@dataclass(frozen=True)
class Comparison:
    """Two bases on the boards that scored both, with the same number of samples. before, after and difference (after −
    before, in shares right, of regressions in loss) are pooled by samples; None where too few boards did.

    error: the standard error of the difference, boards being drawn and their samples given (Cochran 1977, ratio
    estimator, §6.4); better, worse, same: boards; left_out: those that scored one alone or on other samples.
    """

    figure: str
    boards: int
    left_out: list[str]
    min_group: int
    before: float | None = None
    after: float | None = None
    difference: float | None = None
    error: float | None = None
    better: int | None = None
    worse: int | None = None
    same: int | None = None

    @property
    def withheld(self) -> str | None:
        """Why nothing is said."""
        if self.difference is not None:
            return None
        return f"{self.boards} boards scored both, figures are given from {self.min_group} boards on"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "withheld": self.withheld}


def parse(data: bytes) -> Report:
    """A report's bytes as the board's task.carry_out gives them. Raises UserError naming the fault."""
    if len(data) != wire.EVALUATION_BYTES + 4:
        raise UserError(f"report: {len(data)} bytes, expected {wire.EVALUATION_BYTES + 4}")
    magic, version, zero, classes, job, turn, base_id, samples, right, loss = struct.unpack_from(wire.EVALUATION, data)
    if magic != wire.EVALUATION_MAGIC:
        raise UserError("report: it does not begin with 'uLEV', expected the answer to an evaluation")
    if struct.unpack_from("<I", data, wire.EVALUATION_BYTES)[0] != crc32(data[: wire.EVALUATION_BYTES]):
        raise UserError("report: damaged: its checksum does not match; ask the board again")
    if version != wire.VERSION or zero:
        raise UserError(f"report: version {version}, expected {wire.VERSION}; deploy ulearn on that board anew")
    if not samples or right > samples or (right and not classes):
        raise UserError(f"report: {right} of {samples} samples right of {classes} classes, expected 1 sample or more")
    mean = None if loss == wire.UNKNOWN else loss / samples / (1000 if classes else 1)
    return Report(job, turn, base_id, classes, samples, right, mean)


def pool(reports: Mapping[str, Report], min_group: int = MIN_GROUP) -> Evaluation:
    """What the boards' reports say together. Raises UserError for none, reports of different jobs, rounds, bases or
    classes (naming a board), or a minimum below 1."""
    _check_group(min_group)
    if not reports:
        raise UserError("no board has reported; expected one report at least")
    ordered = dict(sorted(reports.items()))
    first_name, first = next(iter(ordered.items()))
    for name, report in ordered.items():
        if _subject(report) != _subject(first):
            raise UserError(f"{name}: reports another job, round, base or number of classes than {first_name}")
    samples = sum(r.samples for r in ordered.values())
    if len(ordered) < min_group:
        return Evaluation(first.base_id, first.round, len(ordered), samples, min_group, None, None, None)
    weights = [r.samples for r in ordered.values()]
    accuracy = _score([r.accuracy for r in ordered.values()], weights, most=True)
    loss = _score([r.loss for r in ordered.values()], weights, most=False)
    return Evaluation(first.base_id, first.round, len(ordered), samples, min_group, accuracy, loss, ordered)


def compare(before: Mapping[str, Report], after: Mapping[str, Report], min_group: int = MIN_GROUP) -> Comparison:
    """Two bases by the reports on each. Raises UserError where one is empty or mixed, as `pool` does, where both are
    of other classes, or where boards lack the figure to compare by."""
    pool(before, min_group)
    pool(after, min_group)
    classes = {r.classes for r in (*before.values(), *after.values())}
    if len(classes) > 1:
        raise UserError(f"reports of {min(classes)} and of {max(classes)} classes; expected two bases of one model")
    both = [n for n in sorted(before.keys() & after.keys()) if before[n].samples == after[n].samples]
    left_out = sorted((before.keys() | after.keys()) - set(both))
    figure = "accuracy" if classes.pop() else "loss"
    if len(both) < min_group:
        return Comparison(figure, len(both), left_out, min_group)
    old, new = (np.array([getattr(reports[name], figure) for name in both], float) for reports in (before, after))
    if np.any(np.isnan(old + new)):
        raise UserError("boards without a loss are among them; expected plans with a training program")
    weights = np.array([before[name].samples for name in both], float)
    gains = new - old
    difference = float(np.sum(weights * gains) / np.sum(weights))
    deviations = float(np.sum((weights * (gains - difference)) ** 2))
    n = len(both)
    error = math.sqrt(deviations * n / (n - 1)) / float(np.sum(weights)) if n > 1 else None
    ups, downs = int(np.sum(gains > 0)), int(np.sum(gains < 0))
    better, worse = (ups, downs) if figure == "accuracy" else (downs, ups)
    was, now = (float(np.sum(weights * values) / np.sum(weights)) for values in (old, new))
    same = n - ups - downs
    return Comparison(figure, n, left_out, min_group, was, now, difference, error, better, worse, same)


def spread(values: list[float], most: bool = True) -> Spread:
    """The spread of one figure a board; quartiles between two boards are interpolated. most: whether more is better."""
    ordered = np.sort(np.array(values, float))
    worst = ordered if most else ordered[::-1]
    decile = float(np.mean(worst[: math.ceil(len(worst) / 10)]))
    low, q1, middle, q3, high = (float(v) for v in np.quantile(ordered, (0, 0.25, 0.5, 0.75, 1)))
    return Spread(low, q1, middle, q3, high, decile)


def table(evaluation: Evaluation, title: str) -> None:
    """Print what may be said."""
    if evaluation.boards is None:
        display.console.print(f"{title}: {evaluation.withheld}", markup=False, soft_wrap=True)
        return
    rows = [[display.safe(n), str(r.samples), *_figures(r.accuracy, r.loss)] for n, r in evaluation.boards.items()]
    pooled = [s.pooled if s else None for s in (evaluation.accuracy, evaluation.loss)]
    rows.append(["pooled", str(evaluation.samples), *_figures(*pooled)])
    for name, what in (
        ("lowest", "min"),
        ("lower quartile", "q1"),
        ("median", "median"),
        ("upper quartile", "q3"),
        ("highest", "max"),
        ("worst decile", "worst_decile"),
    ):
        values = [getattr(s.spread, what) if s else None for s in (evaluation.accuracy, evaluation.loss)]
        rows.append([f"· {name}" if display.unicode() else f"- {name}", "", *_figures(*values)])
    display.plain_table(title, ["board", "samples", "accuracy", "loss"], rows, (1, 2, 3), {"board": 40})


def _subject(report: Report) -> tuple[int, int, bytes, int]:
    """What reports of one evaluation have in common."""
    return report.job, report.round, report.base_id, report.classes


def _check_group(min_group: int) -> None:
    """Raises UserError for a minimum below 1."""
    if min_group < 1:
        raise UserError(f"smallest group to give figures of: {min_group}, expected 1 or more")


def _score(values: list[float | None], weights: list[int], most: bool) -> Score | None:
    """Pooled by weights; None unless every board has the figure."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    pooled = math.fsum(v * w for v, w in zip(known, weights, strict=True)) / sum(weights)
    return Score(pooled, spread(known, most))


def _figures(accuracy: float | None, loss: float | None) -> list[str]:
    """Cells of a table."""
    return [display.percent(accuracy) if accuracy is not None else "", f"{loss:.3f}" if loss is not None else ""]
