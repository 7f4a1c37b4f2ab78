"""Jobs and what boards tell of themselves: what is taken, what is refused, and numbers that must never change."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import training
import ulearn
from test_trainer import plan as small_plan
from ulearn import task as wire
from ulearn_host.errors import UserError
from ulearn_host.federation import facts
from ulearn_host.federation.job import Job

JOB = Job("keys", 30, 10)
SEEDS = [3122058584, 589268194, 4256608136]  # of board "a" and "b" in round 1, of "a" in round 2


def test_a_job_survives_as_json() -> None:
    assert Job.from_json('{"name": "keys", "rounds": 30, "goal": 10}') == JOB
    changed = replace(JOB, deadline_s=30, up="top-k:12", error_feedback=True, rule="multi-krum:1", server="adam:0.01")
    assert Job.from_json(changed.to_json()) == changed and changed.deadline_s == 30.0
    assert json.loads(changed.to_json()) == asdict(changed)


def test_numbers_that_boards_and_hosts_agree_on() -> None:
    """A seed or a number that changed would make another job of one that is under way."""
    assert JOB.number == 0xB48E44EC
    assert [JOB.training_seed(*of) for of in ((1, "a"), (1, "b"), (2, "a"))] == SEEDS
    assert replace(JOB, seed=2).training_seed(1, "a") not in SEEDS
    assert (JOB.asked, JOB.least) == (13, 8)
    assert [(replace(JOB, goal=g).asked, replace(JOB, goal=g).least) for g in (1, 3, 4, 5, 20)] == [
        (2, 1), (4, 3), (6, 4), (7, 4), (26, 16)]  # fmt: skip
    assert replace(JOB, over=1.1).asked == 11
    assert replace(JOB, goal=100_000).samples_largest * 100_000 < 2**31


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"name": ""}, "expected a name of 1 to 64"),
        ({"name": "a\n"}, "expected a name of 1 to 64"),
        ({"name": 3}, "name is 3, expected text"),
        ({"rounds": 0}, "neither rounds nor evaluations"),
        ({"rounds": -1}, "rounds -1, expected 0 to"),
        ({"rounds": 1.5}, "rounds is 1.5, expected a whole number"),
        ({"rounds": True}, "rounds is True, expected a whole number"),
        ({"goal": "ten"}, "goal is 'ten', expected a whole number"),
        ({"over": 0.9}, "over 0.9, expected 1.0 to"),
        ({"quorum": 1.1}, "quorum 1.1, expected 0.0 to 1.0"),
        ({"over": float("nan")}, "expected a finite number"),
        ({"deadline_s": 0}, "deadline_s 0.0, expected 0.001"),
        ({"retry_s": None}, "retry_s is None, expected a number"),
        ({"learning_rate": -1}, "learning_rate: learning rate -1"),
        ({"epochs": 70000}, "epochs 70000, expected 1 to 65535"),
        ({"up": "float32"}, "up: float32: expected dense"),
        ({"up": "top-k"}, "up: top-k: expected dense"),
        ({"up": "top-k:0"}, "keeps 0 values, expected 1 to 65535"),
        ({"up": "int8:3"}, "up: int8:3: expected dense"),
        ({"down": "half"}, "down 'half', expected one of full, difference, int8"),
        ({"rule": "best"}, "rule: best: no such rule"),
        ({"rule": "multi-krum:4"}, "rule multi-krum:4 with a quorum of 8 updates"),
        ({"rule": "trimmed-mean:0.05"}, "with a quorum of 8 updates: 0.05 of 8 clients trims none"),
        ({"server": "momentum"}, "server: momentum: expected none, momentum:BETA"),
        ({"server": "momentum:1"}, "server: beta"),
        ({"server": "adam:0"}, "server: rate or tau"),
        ({"server": "adam:x"}, "server: adam:x: expected none"),
        ({"selection": "best"}, "selection: best: no such way"),
        ({"error_feedback": True}, "error feedback with dense updates"),
        ({"error_feedback": 1}, "error_feedback is 1, expected true or false"),
        ({"proximal": 50}, "proximal × learning_rate is 1.5, expected below 1"),
        ({"colour": 1}, "no field 'colour', expected some of name, rounds"),
    ],
)
def test_senseless_jobs_are_refused(fields: dict[str, Any], fault: str) -> None:
    given = {"name": "keys", "rounds": 30, "goal": 10, **fields}
    with pytest.raises(UserError) as raised:
        Job.from_json(json.dumps(given))
    assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("text", "fault"), [("{", "no JSON"), ("[]", "expected a JSON object"), ("{}", "name is missing")]
)
def test_what_is_no_job(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        Job.from_json(text)


def test_facts_are_what_the_board_packed(tmp_path: Path) -> None:
    model = ulearn.load(small_plan(tmp_path))
    samples, held = training.store(model), training.store(model, 3)
    told = bytes(wire.facts(model, samples, held, 1200, 30000, 80, True))
    parsed = facts.parse(told)
    counts = tuple(sum(samples.target(i) == label for i in range(len(samples))) for label in range(model.classes))
    assert parsed == facts.BoardFacts(
        bytes(model.model_id), bytes(model.base_id), len(samples), 3, 1200, 30000, 80, counts
    )
    assert facts.pack(parsed) == told
    silent = bytes(wire.facts(model, samples))
    assert facts.parse(silent).histogram is None and facts.pack(facts.parse(silent)) == silent


def test_damaged_facts_are_refused(tmp_path: Path) -> None:
    """Every bit, every length; then fields that do not fit together, with a checksum that does."""
    model = ulearn.load(small_plan(tmp_path))
    told = bytes(wire.facts(model, training.store(model), None, histogram=True))
    for bit in range(8 * len(told)):
        damaged = bytearray(told)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError, match="facts: "):
            facts.parse(bytes(damaged))
    for length in range(len(told)):
        with pytest.raises(UserError, match="facts: "):
            facts.parse(told[:length])
    with pytest.raises(UserError, match="bytes, expected"):
        facts.parse(told + bytes(10000))
    known = facts.parse(told)
    rng = np.random.default_rng(1)
    for wrong, fault in (
        ({"battery": 101}, "battery of 101"),
        ({"samples": known.samples + 1}, "a histogram of 7 samples"),
    ):
        with pytest.raises(UserError, match=fault):
            facts.parse(facts.pack(replace(known, **wrong)))
    for _ in range(200):
        with pytest.raises(UserError):
            facts.parse(rng.bytes(int(rng.integers(0, 200))))
