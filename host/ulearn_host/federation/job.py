"""What a fleet is to do together: a job, as it stands in a journal and in a JSON file."""

from __future__ import annotations

import json
import math
import re
import struct
from binascii import crc32
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ulearn import task as wire
from ulearn.rates import rate
from ulearn_host import aggregate, rule_names, rules
from ulearn_host.aggregate import ENCODINGS
from ulearn_host.errors import UserError
from ulearn_host.federation import selection, split

DOWN = ("full", "difference", "int8")
FIT_LARGEST = 65535  # samples of one training, the host's over activations
SAMPLES_LARGEST = 2**20  # of one board: who claims more must not be able to spoil the exact sum of all
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,63}")
_DAY_S = 86400.0
_RULE_TRIED = 64  # updates that a rule is tried with before a job is taken: Krum takes their square


@dataclass(frozen=True)
class Job:
    """A job of federated training. Raises UserError, in one sentence, for what cannot be done.

    Rounds: rounds: commits until it is done; 0: the plan is only evaluated. goal: updates a
    commit takes, at most. over: boards asked, as a multiple
    of the goal. quorum: share of the goal that a deadline needs to commit. deadline_s: seconds from the opening of a
    round; None: measured, and first_deadline_s until something was. retry_s: after so long, more or less, a board that
    has nothing to do asks again.

    On the board: epochs, learning_rate, skip as Trainer has them; seed: of orders and rounding; proximal: μ of FedProx
    (Li et al. 2020), in 1 / learning rate; up: how an update is encoded: "dense", "int8", "random-k:K", "top-k:K";
    error_feedback: what that leaves out is sent later; personal: the last layer stays on the board.

    On the host: rule: of rule_names; "mean" is aggregate.fedavg, exact. server: "none", "momentum:BETA[:RATE]" (Hsu et
    al. 2019) or "adam:RATE[:TAU]" (Reddi et al. 2021), in real units. quality: weigh by what `Federation.weigh` said of
    a board. stale: commits that an update may be late by and still count, in a later round. stale_exponent: of
    (1 + commits late)^-exponent (Xie et al. 2019). down: how boards get a new base: "full", "difference" or "int8", a
    quantised difference whose rest the host keeps for the next round. selection: of selection.POLICIES. evaluate_every:
    commits between evaluations, the first before any, the last after all; 0: none. min_group: boards that must have
    reported before a figure is told. histogram: ask for label histograms, which owners may refuse.
    """

    name: str
    rounds: int
    goal: int
    over: float = 1.3
    quorum: float = 0.8
    deadline_s: float | None = None
    first_deadline_s: float = 600.0
    retry_s: float = 10.0
    epochs: int = 4
    learning_rate: float = 0.03
    seed: int = 1
    skip: float = 1 / 16
    proximal: float = 0.0
    up: str = "dense"
    error_feedback: bool = False
    personal: bool = False
    rule: str = "mean"
    server: str = "none"
    quality: bool = False
    stale: int = 0
    stale_exponent: float = 0.5
    down: str = "difference"
    selection: str = "random"
    evaluate_every: int = 0
    min_group: int = 5
    histogram: bool = False

    def __post_init__(self) -> None:
        """Check every field, then what they mean together."""
        for field in fields(self):
            object.__setattr__(
                self, field.name, _typed(self.name, field.name, str(field.type), getattr(self, field.name))
            )
        if not _NAME.fullmatch(self.name):
            raise UserError(f"job {self.name!r}: expected a name of 1 to 64 letters, digits, spaces, '.', '_' or '-'")
        for what, low, high in _RANGES:
            value = getattr(self, what)
            if value is not None and not low <= value <= high:
                raise UserError(f"job {self.name}: {what} {value}, expected {low} to {high}")
        if self.down not in DOWN:
            raise UserError(f"job {self.name}: down {self.down!r}, expected one of {', '.join(DOWN)}")
        if not (self.rounds or self.evaluate_every):
            raise UserError(f"job {self.name}: neither rounds nor evaluations; expected rounds, or evaluate_every 1")
        self._check_names()
        self._check_rule()
        self._check_split()
        if self.error_feedback and self.encoding == ENCODINGS["dense"]:
            raise UserError(
                f"job {self.name}: error feedback with dense updates, which leave nothing out; switch it off"
            )
        if self.proximal_step > 65535:
            raise UserError(
                f"job {self.name}: proximal × learning_rate is {self.proximal * self.learning_rate:g}, expected below 1"
            )

    def _check_names(self) -> None:
        """Fields that are small languages, each read by what will use it."""
        readers: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("rule", lambda: rule_names.parse(self.rule)),
            ("server", lambda: server_step(self.server)),
            ("up", lambda: up(self.up)),
            ("selection", lambda: selection.parse(self.selection)),
            ("learning_rate", lambda: rate(self.learning_rate)),
        )
        for what, read in readers:
            try:
                read()
            except (UserError, ValueError) as fault:
                raise UserError(f"job {self.name}: {what}: {fault}") from None

    def _check_split(self) -> None:
        """What has no meaning where activations go up: nothing is averaged, and every board has the same last layer."""
        unused = ("personal", "error_feedback", "proximal", "rule", "server", "quality", "stale")
        changed = [name for name in unused if getattr(self, name) != getattr(type(self), name)]
        if self.split and changed:
            raise UserError(
                f"job {self.name}: {changed[0]} with up {self.up!r}, for which boards do not train; leave it as it is"
            )
        if self.split and self.goal * self.kept > FIT_LARGEST:
            raise UserError(
                f"job {self.name}: {self.goal} boards with {self.kept} samples each, expected at most {FIT_LARGEST} "
                f"together, as a training counts in 16 bits"
            )

    def _check_rule(self) -> None:
        """A rule that needs more updates than a quorum gives would give up round after round."""
        if self.least > _RULE_TRIED:
            return
        try:
            rule_names.parse(self.rule)(np.zeros((self.least, 1)), np.ones(self.least))
        except UserError as fault:
            raise UserError(
                f"job {self.name}: rule {self.rule} with a quorum of {self.least} updates: {fault}"
            ) from None

    @property
    def number(self) -> int:
        """The job as a task and a report name it, unsigned 32 bits: the same on every host that runs it."""
        return crc32(self.name.encode())

    @property
    def asked(self) -> int:
        """Boards to ask in a round: ⌈goal × over⌉."""
        return _ceil(self.goal * self.over)

    @property
    def least(self) -> int:
        """Updates that a deadline needs to commit: ⌈quorum × goal⌉."""
        return max(1, _ceil(self.goal * self.quorum))

    @property
    def present_s(self) -> float:
        """A board that was heard of within so many seconds is there: it may miss two of its turns to ask."""
        return 3 * 1.25 * self.retry_s

    @property
    def encoding(self) -> int:
        """The number of the `up` encoding in a task."""
        return up(self.up)[0]

    @property
    def split(self) -> bool:
        """Whether boards send activations, and the host trains what lies above them (federation.split)."""
        return self.encoding in split.WAYS.values()

    @property
    def kept(self) -> int:
        """Values that a sparse update keeps, or samples whose activations are sent; 0 of others."""
        return up(self.up)[1]

    @property
    def proximal_step(self) -> int:
        """μ × learning rate, in 65536ths."""
        return round(self.proximal * self.learning_rate * 65536)

    @property
    def flags(self) -> int:
        """The flags of a task."""
        told = ((self.personal, wire.PERSONAL), (self.error_feedback, wire.FEEDBACK), (self.histogram, wire.HISTOGRAM))
        return sum(int(flag) for wanted, flag in told if wanted)

    @property
    def samples_largest(self) -> int:
        """Samples that a board may claim: `goal` boards' stay within the exact sum."""
        return min(SAMPLES_LARGEST, (aggregate.SAMPLES_MAX - 1) // self.goal)

    def training_seed(self, turn: int, board: str) -> int:
        """Of all that is drawn while `board` trains in round `turn`: a function of job, round and board alone."""
        return crc32(struct.pack("<III", self.number, self.seed & 0xFFFFFFFF, turn) + board.encode())

    def to_json(self) -> str:
        """One line of JSON; the same job gives the same text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job of a JSON object with the fields above; those with a default may be left out."""
        try:
            given = json.loads(text)
        except ValueError as fault:
            raise UserError(f"job: no JSON: {fault}; expected an object with name, rounds and goal") from None
        if not isinstance(given, dict):
            raise UserError("job: expected a JSON object with name, rounds and goal")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UserError(f"job: no field {unknown[0]!r}, expected some of {', '.join(known)}")
        missing = [name for name in ("name", "rounds", "goal") if name not in given]
        if missing:
            raise UserError(f"job: {missing[0]} is missing; expected name, rounds and goal")
        return cls(**given)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("rounds", 0, 1_000_000),
    ("goal", 1, 100_000),
    ("over", 1.0, 10.0),
    ("quorum", 0.0, 1.0),
    ("deadline_s", 0.001, 30 * _DAY_S),
    ("first_deadline_s", 0.001, 30 * _DAY_S),
    ("retry_s", 0.001, _DAY_S),
    ("epochs", 1, 65535),
    ("seed", 0, 2**32 - 1),
    ("skip", 0.0, 1.0),
    ("proximal", 0.0, 1e9),
    ("stale", 0, 1000),
    ("stale_exponent", 0.0, 100.0),
    ("evaluate_every", 0, 1_000_000),
    ("min_group", 1, 100_000),
)


def up(text: str) -> tuple[int, int]:
    """(number of the encoding, how many are kept) of "dense", "int8", "random-k:K", "top-k:K", "features:K",
    "random-features:K". Raises UserError."""
    name, *given = text.split(":")
    numbers = {**ENCODINGS, **split.WAYS}
    if name not in numbers or len(given) != (name not in ("dense", "int8")):
        raise UserError(f"{text}: expected dense, int8, random-k:K, top-k:K, features:K or random-features:K")
    if not given:
        return numbers[name], 0
    if not given[0].isdecimal() or not 1 <= int(given[0]) <= 65535:
        raise UserError(f"{text}: keeps {given[0]} values, expected 1 to 65535")
    return numbers[name], int(given[0])


def server_step(text: str) -> tuple[str, tuple[float, ...]]:
    """(name, its numbers) of "none", "momentum:BETA[:RATE]", "adam:RATE[:TAU]". Raises UserError."""
    name, *given = text.split(":")
    try:
        numbers = tuple(float(word) for word in given)
    except ValueError:
        numbers = ()
    if name == "none" and not given:
        return name, ()
    if name not in ("momentum", "adam") or not 1 <= len(numbers) <= 2:
        raise UserError(f"{text}: expected none, momentum:BETA[:RATE] or adam:RATE[:TAU]")
    if name == "momentum":
        rules.within(numbers[0], "beta", 0, 1)
    for number in numbers[name == "momentum" :]:
        rules.positive(number, "rate or tau")
    return name, numbers


def _ceil(value: float) -> int:
    """⌈value⌉, where 10 × 1.1 is 11 and not 11.000000000000002."""
    return math.ceil(value * (1 - 2**-50))


def _typed(job: str, what: str, kind: str, value: Any) -> Any:
    """A value of the type that a field's annotation names: JSON knows neither int from bool nor 1.0 from 1."""
    expected = {"str": (str,), "bool": (bool,), "int": (int,)}.get(kind, (int, float))
    if value is None and kind.endswith("None"):
        return None
    if not isinstance(value, expected) or (kind != "bool" and isinstance(value, bool)):
        raise UserError(f"job {job}: {what} is {value!r}, expected {_KINDS.get(kind, 'a number')}")
    if float in expected and not math.isfinite(value):
        raise UserError(f"job {job}: {what} is {value!r}, expected a finite number")
    return float(value) if float in expected else value


_KINDS = {"str": "text", "bool": "true or false", "int": "a whole number"}
