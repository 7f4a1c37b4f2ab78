"""Federated evaluation: reports of real boards' code, pooled, compared, and withheld from small groups."""

from __future__ import annotations

import json
import struct
from binascii import crc32
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import training
import ulearn
from test_trainer import plan
from ulearn import task as wire
from ulearn_host import display
from ulearn_host.errors import UserError
from ulearn_host.federation import evaluation
from ulearn_host.federation.evaluation import Report


def answer(model: ulearn.Model, count: int, shift: int) -> bytes:
    """What a board with `count` held-out samples answers."""
    task = wire.make(kind=wire.EVALUATE, job=7, round=3, model_id=model.model_id, base_id=model.base_id)
    samples = training.store(model, count, shift)
    return bytes(wire.carry_out(model, samples, wire.parse(task), held_out=samples))


def report(samples: int, right: int, loss: float | None = 1.0, **other: int) -> Report:
    """A report of a classifier of 4 classes."""
    return replace(Report(7, 3, b"b" * 16, 4, samples, right, loss), **other)


@pytest.mark.parametrize("loss", ["softmax_ce", "mse"])
def test_boards_reports_are_pooled(loss: str, tmp_path: Path) -> None:
    """Six boards, each with samples of its own: pooled is what one board with all the samples would find."""
    model = ulearn.load(plan(tmp_path, loss=loss))
    answers = {f"board-{i}": answer(model, 6 + i, 11 * i) for i in range(6)}
    reports = {name: evaluation.parse(data) for name, data in answers.items()}
    found = evaluation.pool(reports, min_group=6)
    labelled = loss == "softmax_ce"
    fields = [struct.unpack_from(wire.EVALUATION, data) for data in answers.values()]
    samples, right, total = (sum(f[i] for f in fields) for i in (7, 8, 9))
    assert (found.reported, found.samples, found.base_id, found.round) == (6, samples, model.base_id, 3)
    assert found.loss and found.loss.pooled == pytest.approx(total / samples / (1000 if labelled else 1))
    assert (found.accuracy.pooled if found.accuracy else None) == (right / samples if labelled else None)
    assert found.boards == reports and found.withheld is None
    assert evaluation.pool(dict(reversed(reports.items())), 6).as_dict() == found.as_dict()
    assert json.loads(json.dumps(found.as_dict()))["boards"][2]["board"] == "board-2"


def test_damaged_reports_are_refused(tmp_path: Path) -> None:
    """Every bit that flips, every byte that is missing, and counts that cannot be."""
    data = answer(ulearn.load(plan(tmp_path)), 9, 0)
    assert evaluation.parse(data).samples == 9
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError, match="report: "):
            evaluation.parse(bytes(damaged))
    for length in (*range(len(data)), len(data) + 1):
        with pytest.raises(UserError, match="bytes, expected 48"):
            evaluation.parse((data + b"\0")[:length])
    for version, zero, classes, samples, right in ((2, 0, 4, 9, 1), (1, 1, 4, 9, 1), (1, 0, 4, 9, 10), (1, 0, 0, 9, 1)):
        body = struct.pack(wire.EVALUATION, b"uLEV", version, zero, classes, 7, 3, bytes(16), samples, right, 0)
        with pytest.raises(UserError, match="report: "):
            evaluation.parse(body + struct.pack("<I", crc32(body)))


def test_no_loss_is_none() -> None:
    """A plan without a training program measures none; the pooled loss is not that of the others."""
    body = struct.pack(wire.EVALUATION, b"uLEV", 1, 0, 4, 7, 3, b"b" * 16, 9, 4, wire.UNKNOWN)
    silent = evaluation.parse(body + struct.pack("<I", crc32(body)))
    assert silent.loss is None
    found = evaluation.pool({"a": silent, "b": report(10, 5)}, 2)
    assert found.loss is None and found.accuracy and found.accuracy.pooled == 9 / 19


@pytest.mark.parametrize("boards", range(1, 5))
def test_small_groups_are_told_nothing(boards: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Below the minimum no figure leaves, not in an attribute, not in JSON, not in the table."""
    reports = {f"board-{i}": report(1234, 1111) for i in range(boards)}
    found = evaluation.pool(reports)
    assert found.accuracy is found.loss is found.boards is None
    told = json.dumps(found.as_dict())
    evaluation.table(found, "base 6262")
    out = capsys.readouterr().out
    for text in (told, out, repr(found.as_dict())):
        assert "1234" not in text and "1111" not in text and "0.9" not in text and "board-0" not in text
        assert f"{boards} boards reported, figures are given from 5 boards on" in text
    compared = evaluation.compare(reports, reports)
    assert compared.difference is None and "1234" not in json.dumps(compared.as_dict())
    assert evaluation.pool({**reports, **{f"x{i}": report(10, 5) for i in range(5 - boards)}}).accuracy


def test_what_is_refused() -> None:
    """No reports, mixed ones, a minimum of 0."""
    one = report(10, 5)
    with pytest.raises(UserError, match="no board has reported"):
        evaluation.pool({})
    with pytest.raises(UserError, match="0, expected 1 or more"):
        evaluation.pool({"a": one}, 0)
    for other in ({"job": 8}, {"round": 4}, {"base_id": b"c" * 16}, {"classes": 3}):
        with pytest.raises(UserError, match="b: reports another job, round, base or number of classes than a"):
            evaluation.pool({"a": one, "b": replace(one, **other)}, 1)
    with pytest.raises(UserError, match="3 and of 4 classes"):
        evaluation.compare({"a": one}, {"a": replace(one, classes=3)}, 1)
    with pytest.raises(UserError, match="without a loss"):
        nothing = {"a": replace(one, classes=0, right=0, loss=None)}
        evaluation.compare(nothing, nothing, 1)


def test_spread() -> None:
    """Against numpy on 25 boards; the worst tenth of 25 is three boards, of loss the highest three."""
    values = np.random.default_rng(3).permutation(np.linspace(0, 1, 25))
    found = evaluation.spread(list(values))
    assert (found.min, found.q1, found.median, found.q3, found.max) == (0, 0.25, 0.5, 0.75, 1)
    assert found.worst_decile == pytest.approx((0 + 1 + 2) / 24 / 3)
    assert evaluation.spread(list(values), most=False).worst_decile == pytest.approx((24 + 23 + 22) / 24 / 3)
    assert evaluation.spread([0.5]) == evaluation.Spread(*[0.5] * 6)


def test_two_bases_are_compared_board_by_board() -> None:
    """Only boards that scored both on as many samples; better and worse are counted, an error comes with it."""
    before = {f"b{i}": report(100 * (i + 1), 50 * (i + 1)) for i in range(6)}
    after = {f"b{i}": report(100 * (i + 1), (50 + gain) * (i + 1)) for i, gain in enumerate((10, 10, 0, -5, 10, 10))}
    after = {name: replace(r, base_id=b"c" * 16, round=9) for name, r in after.items()}
    found = evaluation.compare(
        before | {"gone": report(10, 5)}, after | {"b5": report(99, 50, base_id=b"c" * 16, round=9)}
    )
    assert (found.figure, found.boards, found.left_out) == ("accuracy", 5, ["b5", "gone"])
    gains, weights = np.array([0.1, 0.1, 0, -0.05, 0.1]), np.arange(1, 6)
    assert found.before == pytest.approx(0.5) and found.after == pytest.approx(0.5 + gains @ weights / 15)
    assert found.difference == pytest.approx(gains @ weights / 15)
    assert (found.better, found.worse, found.same) == (3, 1, 1)
    same = evaluation.compare(before, before)
    assert (same.difference, same.error, same.same) == (0, 0, 6)


def test_the_error_is_that_of_drawing_boards() -> None:
    """Against 400 draws of 40 boards from a large fleet."""
    rng = np.random.default_rng(8)
    errors, differences = [], []
    for _ in range(400):
        sizes = rng.integers(50, 400, 40)
        gains = rng.normal(0.04, 0.1, 40)
        old = {f"b{i}": report(int(n), int(n * 0.5)) for i, n in enumerate(sizes)}
        rights = (sizes * np.clip(0.5 + gains, 0, 1)).astype(int)
        new = {f"b{i}": report(int(n), int(k)) for i, (n, k) in enumerate(zip(sizes, rights, strict=True))}
        found = evaluation.compare(old, new)
        assert found.error is not None and found.difference is not None
        errors.append(found.error)
        differences.append(found.difference)
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.15)


def test_the_table_says_what_may_be_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Boards, pooled, spread; a hostile name is text."""
    names = ["a", "b", "c", "d", "[red]x[/red]\x1b[2J"]
    monkeypatch.setattr(display.console, "_width", 100)
    evaluation.table(evaluation.pool({n: report(100, 60 + 5 * i) for i, n in enumerate(names)}), "base 6262")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[red]x[/red]" in out
    assert "70.0 %" in next(line for line in out.splitlines() if line.startswith("pooled"))
    assert "60.0 %" in next(line for line in out.splitlines() if "worst decile" in line)
