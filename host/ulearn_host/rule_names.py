"""The rules by name, as a command line gives them: "mean", "trimmed-mean:0.2", "bucketed:2:median"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from numpy.typing import ArrayLike

from ulearn_host import bucketing, rules
from ulearn_host.errors import UserError
from ulearn_host.rules import Vector

Combine = Callable[[ArrayLike, ArrayLike], Vector]


@dataclass(frozen=True)
class Rule:
    """A rule that can be named. apply(updates, weights, *parameters) does it; `required` parameters must be given."""

    usage: str
    apply: Callable[..., Vector]
    parameters: tuple[Callable[[str], Any], ...] = ()
    required: int = 0


def _share(text: str) -> float:
    """A share to trim."""
    return rules.side(float(text))


def _bound(text: str) -> float:
    """A bound of a norm."""
    return rules.positive(float(text), "bound of the norm")


def _liars(text: str) -> int:
    """A number of clients that may lie."""
    if int(text) < 0:
        raise UserError(f"liars: {text}, expected 0 or more")
    return int(text)


def _kept(text: str) -> int:
    """A number of clients to keep."""
    if int(text) < 1:
        raise UserError(f"clients to keep: {text}, expected 1 or more")
    return int(text)


def _clipped_mean(updates: Vector, weights: Vector, bound: float | None = None) -> Vector:
    """The weighted mean of clipped updates."""
    return rules.mean(rules.clip(updates, bound).updates, weights)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "mean": Rule("mean", rules.mean),
        "clipped-mean": Rule("clipped-mean[:BOUND]", _clipped_mean, (_bound,)),
        "median": Rule("median", lambda updates, _: rules.median(updates)),
        "trimmed-mean": Rule(
            "trimmed-mean:SHARE", lambda updates, _, *p: rules.trimmed_mean(updates, *p), (_share,), 1
        ),
        "krum": Rule("krum:LIARS", lambda updates, _, *p: rules.krum(updates, *p), (_liars,), 1),
        "multi-krum": Rule(
            "multi-krum:LIARS[:KEPT]", lambda updates, _, *p: rules.multi_krum(updates, *p), (_liars, _kept), 1
        ),
    }
)


def parse(text: str) -> Combine:
    """The rule that "trimmed-mean:0.2", "krum:2", "multi-krum:2:5", "median", … names: (updates, weights) → update.

    "bucketed:2:median" and the like give another rule the means of so many clients each (bucketing.buckets).

    Clients of weight 0 are left out before any rule, so that they do not pull a median to nothing. Raises UserError
    naming what was expected, at once for the name and its numbers, from the rule for what depends on the clients.
    """
    name, *given = text.split(":")
    if name == "bucketed":
        return _bucketed(text, given)
    rule = RULES.get(name)
    if rule is None:
        usages = ", ".join([*(r.usage for r in RULES.values()), _BUCKETED])
        raise UserError(f"{text}: no such rule, expected one of {usages}")
    if not rule.required <= len(given) <= len(rule.parameters):
        raise UserError(f"{text}: {len(given)} parameters, expected {rule.usage}")
    try:
        parameters = [read(word) for read, word in zip(rule.parameters, given, strict=False)]
    except ValueError:
        raise UserError(f"{text}: not the numbers it takes, expected {rule.usage}") from None
    except UserError as fault:
        raise UserError(f"{text}: {fault}") from None

    def combine(updates: ArrayLike, weights: ArrayLike) -> Vector:
        rows = rules.checked(updates)
        shares = rules.counted(weights, len(rows))
        return rule.apply(rows[shares > 0], shares[shares > 0], *parameters)

    return combine


_BUCKETED = "bucketed:SIZE:RULE"


def _bucketed(text: str, given: list[str]) -> Combine:
    """Another rule, of the means of buckets of clients, each of which counts by its clients."""
    if len(given) < 2 or not given[0].isdecimal() or given[1] == "bucketed":
        raise UserError(f"{text}: expected {_BUCKETED}, e.g. bucketed:2:median")
    size, rule = rules.positive(int(given[0]), f"{text}: clients of a bucket"), parse(":".join(given[1:]))

    def combine(updates: ArrayLike, weights: ArrayLike) -> Vector:
        rows = rules.checked(updates)
        shares = rules.counted(weights, len(rows))
        return rule(*bucketing.buckets(rows[shares > 0], int(size)))

    return combine
