"""Tasks: what a host asks of a board in a round, and the board's answers."""

from __future__ import annotations

import struct
from binascii import crc32
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import training
import ulearn
from test_trainer import plan
from ulearn import task as wire
from ulearn.rates import rate
from ulearn_host import aggregate


def a_task(model: ulearn.Model, **fields: Any) -> wire.Task:
    """A task for a model at its base: TRAIN and dense where nothing else is said."""
    mantissa, exponent = rate(0.05)
    known = {"kind": wire.TRAIN, "encoding": 1, "job": 7, "round": 1, "seed": 70001, "epochs": 2}
    known |= {"rate_mantissa": mantissa, "rate_exponent": exponent}
    return wire.parse(wire.make(**{"model_id": model.model_id, "base_id": model.base_id, **known, **fields}))


def test_fields_survive() -> None:
    """Every field comes back as it was put in."""
    given = {"kind": 1, "encoding": 4, "flags": 7, "job": 2**32 - 1, "round": 9, "nonce": b"n" * 16}
    given |= {"model_id": b"m" * 16, "base_id": b"b" * 16, "seed": 2**31, "epochs": 65535, "rate_mantissa": 2047}
    given |= {"rate_exponent": -64, "skip": 4096, "kept": 1000, "proximal": 65535, "retry_ms": 86400000, "committed": 8}
    data = wire.make(**given)
    assert len(data) == wire.BYTES == struct.calcsize(wire.HEADER) + 4
    assert vars(wire.parse(data)) == given


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"kind": 5}, "kind 5"),
        ({"flags": 8}, "flags 0x8"),
        ({"encoding": 0}, "encoding 0"),
        ({"encoding": 5}, "encoding 5"),
        ({"encoding": 3}, "keeps no value"),
        ({"epochs": 0}, "0 epochs"),
        ({"round": 0}, "rounds count from 1"),
        ({"rate_mantissa": 2048}, "mantissa of 1024 to 2047"),
        ({"rate_exponent": 17}, "mantissa of 1024 to 2047"),
        ({"committed": 1}, "already committed"),
        ({"colour": 1}, "no field 'colour'"),
    ],
)
def test_senseless_fields_are_refused(wrong: dict[str, int], fault: str) -> None:
    known = {"kind": 1, "encoding": 1, "round": 1, "epochs": 1, "rate_mantissa": 1024, "rate_exponent": -15}
    with pytest.raises(ValueError, match=fault):
        wire.make(**(known | wrong))


def test_damage_is_refused() -> None:
    """Any bit that flips, any byte that is missing or too many."""
    data = wire.make(kind=wire.WAIT, retry_ms=1000)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="task: "):
            wire.parse(damaged)
    for length in (*range(len(data)), len(data) + 1):
        with pytest.raises(ValueError, match="bytes, expected"):
            wire.parse((data + b"\0")[:length])


def test_training_is_the_trainers(tmp_path: Path) -> None:
    """A task's update is that of a trainer with the same settings, whatever was trained before."""
    model = ulearn.load(plan(tmp_path))
    samples = training.store(model)
    task = a_task(model)
    first = bytes(wire.carry_out(model, samples, task))
    assert bytes(wire.carry_out(model, samples, task)) == first
    other = ulearn.load(plan(tmp_path))
    ulearn.Trainer(other, learning_rate=0.05, seed=70001, skip=0).fit(training.store(other), epochs=2)
    assert bytes(other.update(len(samples))) == first
    assert aggregate.decode(first, bytes(model.tensors)).num_samples == len(samples)
    with pytest.raises(ValueError, match="another model"):
        wire.carry_out(model, samples, a_task(model, model_id=bytes(16)))
    with pytest.raises(ValueError, match="another base"):
        wire.carry_out(model, samples, a_task(model, base_id=bytes(16)))
    with pytest.raises(ValueError, match="no sample"):
        wire.carry_out(model, ulearn.Samples(model, 1), task)


@pytest.mark.parametrize("loss", ["softmax_ce", "mse"])
def test_evaluation(loss: str, tmp_path: Path) -> None:
    """It tells of the base, whatever was trained: samples, how many are right, the loss that a step would tell."""
    model = ulearn.load(plan(tmp_path, loss=loss))
    samples = training.store(model)
    trainer = ulearn.Trainer(model, 0)
    right = sum(model.predict(samples.x(i)) == samples.target(i) for i in range(len(samples))) if model.labelled else 0
    losses = [trainer.step(samples.x(i), samples.target(i)) for i in range(len(samples))]
    wire.carry_out(model, samples, a_task(model))
    trained = bytes(model.train_blob)
    report = wire.carry_out(model, samples, a_task(model, kind=wire.EVALUATE, round=3), held_out=samples)
    fields = struct.unpack_from(wire.EVALUATION, report)
    assert len(report) == struct.calcsize(wire.EVALUATION) + 4 == wire.EVALUATION_BYTES + 4
    assert struct.unpack("<I", report[-4:])[0] == crc32(report[:-4])
    total = (sum(losses) * 1000 + 512) // 1024 if model.labelled else sum(losses)
    classes = model.classes if model.labelled else 0
    assert fields == (b"uLEV", 1, 0, classes, 7, 3, model.base_id, len(samples), right, total)
    assert model.train_blob != trained and model.state == model.first_state
    with pytest.raises(ValueError, match="no held-out sample"):
        wire.carry_out(model, samples, a_task(model, kind=wire.EVALUATE))


def test_facts(tmp_path: Path) -> None:
    """What a board tells; the label histogram only where it was agreed to."""
    model = ulearn.load(plan(tmp_path))
    samples = training.store(model)
    for agreed in (False, True):
        data = wire.facts(model, samples, None, step_us=900, link=12000, battery=80, histogram=agreed)
        labels = np.bincount([samples.target(i) for i in range(len(samples))], minlength=model.classes)
        counts = labels.astype("<u2").tobytes() if agreed else b""
        head = (b"uLBF", 1, int(agreed), 80, 0, model.model_id, model.base_id, len(samples), 0, 900, 12000)
        assert struct.unpack_from(wire.FACTS, data) == (*head, len(counts) // 2)
        assert data[wire.FACTS_BYTES :] == counts + struct.pack("<I", crc32(data[:-4]))


def test_replace(tmp_path: Path) -> None:
    """A whole blob becomes the base, and is found again; one that is not what it was said to be changes nothing."""
    from ulearn.checkpoint import identity

    path = plan(tmp_path)
    model = ulearn.load(path)
    before = model.base_id
    blob = bytes(i & 1 for i in range(len(model.train_blob)))
    for wrong, fault in ((blob[1:], "bytes"), (bytes(len(blob)), "not the base")):
        with pytest.raises(ValueError, match=fault):
            wire.replace(model, wrong, identity(model.model_id, blob))
    assert model.base_id == before == ulearn.load(path).base_id
    wire.replace(model, blob, identity(model.model_id, blob))
    assert model.base_id == ulearn.load(path).base_id == identity(model.model_id, blob)
    assert model.train_blob == blob
