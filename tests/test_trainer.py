"""The trainer: rates, resumed fits, class weights, held-out samples, statistics, several programs."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import training
import ulearn
import ulearn.evaluation
import ulearn.statistics
from conftest import HERE, Device
from test_bits import FIRMWARE, micropython
from ulearn import update as wire
from ulearn.fitting import shuffle
from ulearn.rates import rate
from ulearn_host import emulate, numbers
from ulearn_host.compiler import Options
from ulearn_host.prepare import prepare
from ulearn_host.quantise import FloatDense

SAMPLES, EPOCHS = 7, 3
SEED = 70001  # of more bits than STATE has room for
KINDS = [("last", "int16"), ("last", "int8"), ("last+bias", "int16"), ("last+bias", "int8")]


def plan(folder: Path, scheme: str = "last", weights: str = "int16", loss: str = "softmax_ce") -> str:
    """A small random perceptron in a file; its path."""
    rng = np.random.default_rng(7)
    widths = (9, 8, 4)
    layers = [
        FloatDense(rng.normal(size=(n, k)) / k**0.5, rng.normal(size=n) / 4, i == 0)
        for i, (k, n) in enumerate(zip(widths, widths[1:], strict=False))
    ]
    x = rng.normal(size=(40, widths[0]))
    options = Options(scheme=scheme, weights=weights)  # type: ignore[arg-type]
    path = folder / f"{scheme}-{weights}-{loss}.ulm"
    path.write_bytes(prepare(layers, x, None, loss=loss, options=options).data)  # type: ignore[arg-type]
    return str(path)


def bits(model: ulearn.Model) -> tuple[bytes, bytes]:
    return bytes(model.train_blob), bytes(model.state)


def begun(model: ulearn.Model, **asked: Any) -> ulearn.Trainer:
    """A trainer that begins: all it can be told is told."""
    return ulearn.Trainer(model, learning_rate=0.05, seed=SEED, skip=0, **asked)


class Cut(Exception):
    """Power fails."""


def cutting(model: ulearn.Model, path: str, at: int) -> Callable[[int, int], None]:
    """A progress callback that saves after step `at`, and then all is over."""

    def progress(done: int, total: int) -> None:
        if done == at:
            model.save(path)
            raise Cut

    return progress


def resumed(
    path: str,
    samples: ulearn.Samples,
    cuts: list[int],
    asked: dict[str, Any],
    fit: dict[str, Any],
    epochs: int = EPOCHS,
) -> ulearn.Trainer:
    """The trainer after a fit that was cut after each of these steps and went on, each time after a reset."""
    model = ulearn.load(path)
    trainer = begun(model, **asked)
    for i, at in enumerate(cuts):
        with pytest.raises(Cut):
            trainer.fit(samples, epochs, cutting(model, path + ".ck", at), resume=i > 0, **fit)
        model = ulearn.load(path)
        model.restore(path + ".ck")
        trainer = ulearn.Trainer(model, **asked)
    trainer.fit(samples, resume=True, **fit)
    return trainer


# ---- The rate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("halve_every", "wanted"), [(0, "000000"), (1, "012345"), (2, "001122"), (4, "000011")])
def test_rate_halves(halve_every: int, wanted: str, tmp_path: Path) -> None:
    model = ulearn.load(plan(tmp_path))
    samples = training.store(model)
    trainer = begun(model)
    first = rate(0.05)[1]
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        assert total == 5 * SAMPLES
        seen.append(first - struct.unpack_from("<h", model.state, numbers.S_LR_EXP)[0])

    trainer.fit(samples, 5, progress, halve_every=halve_every)
    assert seen == [int(digit) for digit in wanted[:5] for _ in range(SAMPLES)]
    progress(0, 5 * SAMPLES)
    assert seen[-1] == int(wanted[5])
    assert struct.unpack_from("<IHH", model.state, numbers.S_FIT_START) == (0, 0, SEED & 0xFFFF)


def test_epochs_are_what_they_were(tmp_path: Path) -> None:
    """The steps, their order and the returned loss are those of a loop written out."""
    path = plan(tmp_path, "last", "int8")
    model, other = ulearn.load(path), ulearn.load(path)
    samples = training.store(model)
    mean = begun(model).fit(samples, EPOCHS)
    trainer = begun(other)
    order = list(range(SAMPLES))
    for epoch in range(EPOCHS):
        shuffle(order, SEED + epoch)
        total = sum(trainer.step(samples.x(i), samples.target(i)) for i in order)
        mantissa, exponent = rate(0.05)
        trainer.set_rate(mantissa, exponent - 1 - epoch)
    assert mean == total * model.loss_scale / SAMPLES
    assert other.train_blob == model.train_blob
    assert other.state[: numbers.S_FIT_START] == model.state[: numbers.S_FIT_START]
    third = ulearn.load(path)
    begun(third).fit(([samples.x(i) for i in range(SAMPLES)], [samples.target(i) for i in range(SAMPLES)]), EPOCHS)
    assert bits(third) == bits(model)


# ---- Resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halve_every", [1, 2])
@pytest.mark.parametrize(("scheme", "weights"), KINDS)
def test_resume_at_every_step(scheme: str, weights: str, halve_every: int, tmp_path: Path) -> None:
    path = plan(tmp_path, scheme, weights)
    model = ulearn.load(path)
    samples = training.store(model)
    asked: dict[str, Any] = {"class_weights": "balanced"} if halve_every == 2 else {}
    mean = begun(model, **asked).fit(samples, EPOCHS, halve_every=halve_every)
    whole = bits(model)
    assert whole[0] != bits(ulearn.load(path))[0] and mean > 0
    for at in range(1, EPOCHS * SAMPLES + 1):
        trainer = resumed(path, samples, [at], asked, {"halve_every": halve_every})
        assert bits(trainer.model) == whole, at
    rng = random.Random(3)
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, EPOCHS * SAMPLES + 1), 2))
        assert bits(resumed(path, samples, cuts, asked, {"halve_every": halve_every}).model) == whole, cuts


def test_stopped_within_the_first_step_of_an_epoch(tmp_path: Path) -> None:
    """The rate was halved for a step that never came: the resumed fit halves it once, not twice."""
    path = plan(tmp_path)
    model = ulearn.load(path)
    samples = training.store(model)
    begun(model).fit(samples, EPOCHS)
    whole = bits(model)
    xs: list[Any] = [samples.x(i) for i in range(SAMPLES)]
    targets = [samples.target(i) for i in range(SAMPLES)]

    class Stubborn(list):  # type: ignore[type-arg]
        reads = 0

        def __getitem__(self, i: Any) -> Any:
            Stubborn.reads += 1
            if Stubborn.reads == SAMPLES + 1:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    model = ulearn.load(path)
    with pytest.raises(KeyboardInterrupt):
        begun(model).fit((Stubborn(xs), targets), EPOCHS)
    model.save(path + ".ck")
    again = ulearn.load(path)
    again.restore(path + ".ck")
    for interrupted in (model, again):
        ulearn.Trainer(interrupted).fit((xs, targets), resume=True)
        assert bits(interrupted) == whole


def test_a_second_fit_and_a_step_counter_that_wraps(tmp_path: Path) -> None:
    path = plan(tmp_path)
    ends = []
    for at in (None, 9):
        model = ulearn.load(path)
        samples = training.store(model)
        trainer = begun(model)
        struct.pack_into("<I", model.state, numbers.S_STEP, 0xFFFFFFF8)
        trainer.fit(samples, 1)
        if at:
            with pytest.raises(Cut):
                trainer.fit(samples, 2, cutting(model, path + ".ck", at))
        trainer.fit(samples, 2, resume=bool(at))
        assert model.counters()[0] == 3 * SAMPLES - 8
        ends.append(bits(model))
    assert ends[0] == ends[1]


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    model = ulearn.load(plan(tmp_path))
    samples = training.store(model)
    trainer = begun(model)
    with pytest.raises(ValueError, match="there is no fit to resume"):
        trainer.fit(samples, resume=True)
    trainer.fit(samples, 1)
    with pytest.raises(ValueError, match="there is no fit to resume"):
        trainer.fit(samples, resume=True)
    with pytest.raises(Cut):
        trainer.fit(samples, EPOCHS, cutting(model, str(tmp_path / "ck"), 20))
    with pytest.raises(ValueError, match="20 steps were taken, expected at most 3 epochs of 6 samples"):
        trainer.fit(training.store(model, 6), resume=True)
    trainer.fit(samples, resume=True)
    for epochs in (0, -1, 65536):
        with pytest.raises(ValueError, match="epochs, expected 1 to 65535"):
            trainer.fit(samples, epochs)
    with pytest.raises(ValueError, match="no sample to train on"):
        trainer.fit(ulearn.Samples(model, 4))


# ---- Class weights ---------------------------------------------------------------------------------------------------


def value(mantissa: int, exponent: int) -> Fraction:
    return mantissa * Fraction(2) ** exponent


def rate_of(model: ulearn.Model) -> tuple[int, int]:
    mantissa, exponent = struct.unpack_from("<Hh", model.state, numbers.S_LR_MANT)
    return mantissa, exponent


@pytest.mark.parametrize("weights", ["int16", "int8"])
def test_class_weights_scale_the_rate(weights: str, tmp_path: Path) -> None:
    path = plan(tmp_path, "last", weights)
    model, other = ulearn.load(path), ulearn.load(path)
    samples = training.store(model)
    asked = (1, 0.3, 0, 2.5)
    trainer, plain = begun(model, class_weights=asked), begun(other)
    for turn in range(40):
        i = turn % SAMPLES
        base = (1024 + 23 * turn, -14 - turn % 3)
        trainer.set_rate(*base)
        label = turn % 4
        # The product as an 11-bit mantissa, to the nearest: what the plain trainer is told.
        exact = value(*base) * value(*rate(asked[label]))
        fields = (0, 0)
        if exact:
            exponent = 0
            while exact >= 2048 * Fraction(2) ** exponent:
                exponent += 1
            while exact < 1024 * Fraction(2) ** exponent:
                exponent -= 1
            mantissa = int(exact / Fraction(2) ** exponent + Fraction(1, 2))
            fields = (1024, exponent + 1) if mantissa == 2048 else (mantissa, exponent)
        plain.set_rate(*fields)
        before = bytes(model.train_blob)
        assert trainer.step(samples.x(i), label) == plain.step(samples.x(i), label)
        assert rate_of(model) == base and rate_of(other) == fields
        assert model.train_blob == other.train_blob
        assert (bytes(model.train_blob) == before) or label != 2
    assert bytes(model.train_blob) != bytes(ulearn.load(path).train_blob)


def test_weights_of_one_change_nothing(tmp_path: Path) -> None:
    path = plan(tmp_path)
    ends = []
    for weights in (None, (1, 1, 1, 1)):
        model = ulearn.load(path)
        begun(model, class_weights=weights).fit(training.store(model), EPOCHS)
        ends.append(bits(model))
    assert ends[0] == ends[1]


def test_balanced_weights_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    model = ulearn.load(plan(tmp_path))
    rng = np.random.default_rng(2)
    for present in ([0, 1, 2, 3], [0, 3], [2]):
        labels = rng.choice(present, 60)
        labels[: len(present)] = present
        samples = ulearn.Samples(model, 60)
        for label in labels:
            samples.add(rng.integers(0, 256, model.input_bytes).astype(np.uint8).tobytes(), int(label))
        trainer = begun(model, class_weights="balanced")
        trainer.fit(samples, 1)
        wanted = dict(zip(present, compute_class_weight("balanced", classes=np.array(present), y=labels), strict=True))
        for c in range(4):
            found = float(value(*struct.unpack_from("<Hh", trainer.watch.weights, 4 * c)))
            assert found == pytest.approx(wanted.get(c, 0), rel=2**-11), (present, c)
        other = ulearn.load(model.path)
        other.reset()
        pairs = ([samples.x(i) for i in range(60)], [int(v) for v in labels])
        begun(other, class_weights="balanced").fit(pairs, 1)
        model.reset()
        begun(model, class_weights="balanced").fit(samples, 1)
        assert bits(other) == bits(model)


def test_the_base_rate_comes_back_after_a_fault(tmp_path: Path) -> None:
    model = ulearn.load(plan(tmp_path))
    trainer = begun(model, class_weights=(1, 2, 3, 4), statistics=4)
    before = rate_of(model)
    with pytest.raises(ValueError, match="input has 3 numbers"):
        trainer.step([0.0] * 3, 2)
    assert rate_of(model) == before and len(trainer.statistics) == 0
    samples = training.store(model)
    samples.targets[0] = 9
    with pytest.raises(ValueError, match="label"):
        trainer.fit(samples, 1)
    assert rate_of(model) == before


def test_class_weights_that_are_refused(tmp_path: Path) -> None:
    model = ulearn.load(plan(tmp_path))
    for weights in ((1, 2, 3), "balance", (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match="expected 4 numbers or 'balanced'"):
            begun(model, class_weights=weights)
    for wrong in (-1, 1e7, 1e-9, float("nan")):
        with pytest.raises(ValueError, match="class weight .*, expected 0 or a number from"):
            begun(model, class_weights=(1, 1, wrong, 1))
    with pytest.raises(ValueError, match="class weights need labels"):
        begun(ulearn.load(plan(tmp_path, loss="mse")), class_weights="balanced")


# ---- Evaluation and an early end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["softmax_ce", "mse"])
def test_evaluate(loss: str, tmp_path: Path) -> None:
    model = ulearn.load(plan(tmp_path, loss=loss))
    samples = training.store(model, 50)
    before = bits(model)
    found = ulearn.Trainer(model).evaluate(samples)
    if loss == "mse":
        wanted = np.mean(
            [(np.array(model.predict(samples.x(i))) - real(model, samples.target(i))) ** 2 for i in range(len(samples))]
        )
    else:
        wanted = np.mean([model.predict(samples.x(i)) == samples.target(i) for i in range(len(samples))])
    assert 0 < found == pytest.approx(wanted, rel=1e-6)
    pairs = [samples.x(i) for i in range(50)], [samples.target(i) for i in range(50)]
    assert ulearn.Trainer(model).evaluate(pairs) == found
    if loss == "mse":
        reals = [list(real(model, samples.target(i))) for i in range(50)]
        assert ulearn.Trainer(model).evaluate((pairs[0], reals)) == found
    assert bits(model) == before
    with pytest.raises(ValueError, match="no sample to evaluate on"):
        ulearn.Trainer(model).evaluate(([], []))


def real(model: ulearn.Model, codes: bytes) -> Any:
    return (np.frombuffer(codes, np.int8).astype(float) - model.output_zero) * model.output_scale


@pytest.mark.parametrize(
    ("loss", "scores", "patience", "epochs", "best"),
    [
        ("softmax_ce", [0.5, 0.7, 0.7, 0.6, 0.9], 2, 4, 1),
        ("softmax_ce", [0.5, 0.7, 0.7, 0.6, 0.9], 3, 5, 4),
        ("softmax_ce", [0.5, 0.4], 1, 2, 0),
        ("mse", [3.0, 2.0, 1.0, 1.5, 1.0], 2, 5, 2),
        ("mse", [0.0, 2.0, 1.0], 2, 3, 0),
    ],
)
def test_early_end(
    loss: str, scores: list[float], patience: int, epochs: int, best: int, tmp_path: Path, monkeypatch: Any
) -> None:
    path = plan(tmp_path, loss=loss)
    for keep in (None, path + ".best"):
        model, other = ulearn.load(path), ulearn.load(path)
        samples = training.store(model)
        left = iter(scores)
        monkeypatch.setattr(ulearn.evaluation, "evaluate", lambda *_, left=left: next(left))
        steps: list[int] = []
        trainer = begun(model)
        trainer.fit(
            samples, 5, lambda done, _, to=steps: to.append(done), held_out=samples, patience=patience, keep=keep
        )
        assert steps[-1] == epochs * SAMPLES and trainer.best == scores[best]
        begun(other).fit(samples, best + 1 if keep else epochs)
        assert bits(model) == bits(other)  # STATE too: as if there had been no more epochs than that
    with pytest.raises(ValueError, match="patience of 0 epochs"):
        trainer.fit(samples, 5, held_out=samples, patience=0)
    with pytest.raises(ValueError, match="no sample to evaluate on"):
        monkeypatch.undo()
        trainer.fit(samples, 5, held_out=ulearn.Samples(model, 3))


@pytest.mark.parametrize("loss", ["softmax_ce", "mse"])
def test_an_early_end_is_resumed(loss: str, tmp_path: Path, monkeypatch: Any) -> None:
    """With `keep`, patience and the best are those of the uninterrupted fit."""
    path = plan(tmp_path, loss=loss)
    keep = path + ".best"
    model = ulearn.load(path)
    samples, held_out = training.store(model), training.store(model, 30, 1)
    real_evaluate = ulearn.evaluation.evaluate
    ends_after = set()
    for twist in range(4):
        # Scores that go up and down with the weights: of the network's own making, and reproducible.
        def evaluate(model: Any, samples: Any, twist: int = twist) -> float:
            return real_evaluate(model, samples) + sum(model.train_blob) * (twist + 1) % 7

        monkeypatch.setattr(ulearn.evaluation, "evaluate", evaluate)
        fit: dict[str, Any] = {"held_out": held_out, "patience": 2, "keep": keep}
        model.reset()
        steps: list[int] = []
        Path(keep).unlink(missing_ok=True)
        trainer = begun(model)
        trainer.fit(samples, 6, lambda done, _, to=steps: to.append(done), **fit)
        ends_after.add(len(steps) // SAMPLES)
        for at in range(1, len(steps) + 1):
            Path(keep).unlink(missing_ok=True)
            other = resumed(path, samples, [at], {}, fit, 6)
            assert bits(other.model) == bits(model) and other.best == trainer.best, at
    assert len(ends_after) > 1


def test_labels_of_any_loss(tmp_path: Path) -> None:
    """Whatever is not trained on vectors takes labels."""
    model = ulearn.load(plan(tmp_path))
    samples = training.store(model)
    accuracy = ulearn.Trainer(model).evaluate(samples)
    model.loss_kind = numbers.LOSS_HINGE
    trainer = begun(model, class_weights=(1, 2, 1, 1))
    pairs = [samples.x(i) for i in range(SAMPLES)], [samples.targets[2 * i] for i in range(SAMPLES)]
    assert trainer.evaluate(pairs) == accuracy
    trainer.step(samples.x(0), 3)
    with pytest.raises(ValueError, match="label 4, expected 0 to 3"):
        trainer.step(samples.x(0), 4)


# ---- Statistics ------------------------------------------------------------------------------------------------------


def test_statistics(tmp_path: Path) -> None:
    path = plan(tmp_path, "last", "int8")
    model, other = ulearn.load(path), ulearn.load(path)
    samples = training.store(model)
    trainer = ulearn.Trainer(model, learning_rate=8, seed=3, skip=0.3, statistics=10)
    plain = ulearn.Trainer(other, learning_rate=8, seed=3, skip=0.3)
    assert plain.statistics is None and plain.watch is None and trainer.statistics.summary()["steps"] == 0
    for m in (model, other):  # a difference is taken of counters that may wrap
        struct.pack_into("<III", m.state, numbers.S_SATURATED, 0xFFFFFFFE, 0xFFFFFF, 0xFFFFFFFF)
    rows = []
    for turn in range(47):
        i = turn * 5 % SAMPLES
        before = other.counters()
        loss = plain.step(samples.x(i), samples.target(i))
        moved = [(b - a) & 0xFFFFFFFF for a, b in zip(before, other.counters(), strict=True)]
        rows.append((loss * model.loss_scale, moved[2], moved[3], bool(moved[4])))
        assert trainer.step(samples.x(i), samples.target(i)) == loss
        assert bits(model) == bits(other)
        last, s = rows[-10:], trainer.statistics
        assert [*zip(s.losses(), s.saturated(), s.clipped(), s.skipped(), strict=True)] == last
        losses, saturated, clipped, skipped = zip(*last, strict=True)
        assert s.summary() == {
            "steps": len(last),
            "loss": pytest.approx(sum(losses) / len(last)),
            "skipped": sum(skipped) / len(last),
            "saturated": sum(saturated),
            "clipped": sum(clipped),
        }
    assert any(row[2] for row in rows) and len({row[3] for row in rows}) == 2
    trainer.statistics.clear()
    assert trainer.statistics.losses() == [] and trainer.statistics.summary()["loss"] == 0
    trainer.fit(samples, 1)
    assert len(trainer.statistics) == SAMPLES
    for size in (-1, 65536):
        with pytest.raises(ValueError, match="statistics of .* steps, expected 1 to 65535"):
            ulearn.Trainer(model, statistics=size)


def test_statistics_clip_a_loss() -> None:
    s = ulearn.statistics.Statistics(2, 1)
    state = bytearray(48)
    for loss, kept in ((2**30 - 1, 2**30 - 1), (2**30, 2**30 - 1), (2**31 - 1, 2**30 - 1), (70000, 70000)):
        struct.pack_into("<I", state, numbers.S_LOSS, loss)
        s.begin(state)
        s.end(state)
        assert s.losses()[-1] == kept


# ---- Several programs ------------------------------------------------------------------------------------------------


def test_programs_take_turns(tmp_path: Path) -> None:
    """Epoch by epoch, one program after the other; a step names its own."""
    path = plan(tmp_path)

    def load() -> ulearn.Model:
        # The last record trains one of the layer's two tensors: a program without it, and the whole one.
        model = ulearn.load(path)
        whole = bytes(model.training)
        (records,) = struct.unpack_from("<H", whole, numbers.P_RECORDS)
        short = bytearray(whole[: -numbers.RECORD_BYTES])
        struct.pack_into("<H", short, numbers.P_RECORDS, records - 1)
        model.trainings = [short, model.training]
        return model

    model, other = load(), load()
    samples = training.store(model)
    trainer, plain = begun(model), begun(other)
    assert trainer.programs[1][1] == trainer.programs[0][1] + 1
    trainer.fit(samples, 5, halve_every=0)
    order = list(range(SAMPLES))
    moved = []
    for epoch in range(5):
        shuffle(order, SEED + epoch)
        before = bytes(other.train_blob)
        for place, i in enumerate(order):
            plain.step(samples.x(i), samples.target(i), (epoch + place) % 2)
        moved.append(sum(a != b for a, b in zip(before, other.train_blob, strict=True)))
    assert other.train_blob == model.train_blob
    single = ulearn.load(path)
    begun(single).fit(samples, 5, halve_every=0)
    assert single.train_blob != model.train_blob and all(moved)
    for at in (3, 7, 8, 16):
        fresh = load()
        trainer = begun(fresh)
        with pytest.raises(Cut):
            trainer.fit(samples, 5, cutting(fresh, path + ".ck", at), halve_every=0)
        fresh = load()
        fresh.restore(path + ".ck")
        ulearn.Trainer(fresh).fit(samples, resume=True, halve_every=0)
        assert bits(fresh) == bits(model), at


# ---- On MicroPython --------------------------------------------------------------------------------------------------


def wanted(path: str) -> list[str]:
    """What tests/device/training.py prints: CPython learns the same."""
    lines = training.learn(path)
    assert lines.count("resumed True") == 4 and len(lines) == 12
    return ["locked 100 30", "evaluate 0", *lines]


@pytest.mark.parametrize(("loss", "weights"), [("softmax_ce", "int16"), ("softmax_ce", "int8"), ("mse", "int16")])
def test_unix_port(loss: str, weights: str, tmp_path: Path) -> None:
    path = Path(plan(tmp_path, "last", weights, loss))
    code = f"import training; training.main('{path.name}')"
    native = emulate.find_native("x64").parent
    lines = micropython(emulate.find_micropython(), tmp_path, [native, FIRMWARE, HERE / "device"], code)
    assert lines == wanted(str(path))


@pytest.mark.parametrize(("loss", "weights"), [("softmax_ce", "int16"), ("softmax_ce", "int8"), ("mse", "int16")])
def test_cortex_m0(cortex_m0: Device, loss: str, weights: str, tmp_path: Path) -> None:
    path = Path(plan(tmp_path, "last", weights, loss))
    cortex_m0.put(path, HERE / "device" / "training.py")
    lines = cortex_m0.fresh(f"import training; training.main('{path.name}')")
    assert lines == wanted(str(path))


# ---- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["int16", "int8"])
@pytest.mark.parametrize("size", [2, 3, 7, 50])
def test_a_batch_adds_up(tmp_path: Path, size: int, weights: str) -> None:
    """All samples of a batch see its first weights; what they change is what each alone would have changed, in sum."""
    path = plan(tmp_path, "last+bias", weights)
    model = ulearn.load(path)
    samples = training.store(model)
    order = list(range(SAMPLES))
    trainer = ulearn.Trainer(model, learning_rate=0.02, seed=SEED, skip=0, batch=size)
    state = bytes(model.state)
    trainer.fit(samples, 1, halve_every=0)
    shuffle(order, SEED)
    alone = ulearn.load(path)
    single = ulearn.Trainer(alone, skip=0)
    alone.state[:] = state
    values = blob = _numbers(alone, alone.train_blob)
    for first in range(0, SAMPLES, size):
        base = bytes(alone.train_blob)
        moved = [np.zeros_like(v) for v in values]
        for i in order[first : first + size]:
            alone.train_blob[:] = base
            single.step(samples.x(i), samples.target(i))
            for total, now, was in zip(moved, _numbers(alone, alone.train_blob), _numbers(alone, base), strict=True):
                total += now - was
        blob = [was + total for was, total in zip(_numbers(alone, base), moved, strict=True)]
        data = bytearray(base)
        for (dtype, count, offset), v in zip(wire.tensors(alone.tensors), blob, strict=True):
            data[offset : offset + (count << (dtype - 1))] = v.astype({1: "i1", 2: "<i2", 3: "<i4"}[dtype]).tobytes()
        alone.train_blob[:] = data
    for total, got, was in zip(blob, _numbers(model, model.train_blob), values, strict=True):
        # int8 weights that come near the end of their range are cut step by step.
        free = np.abs(was) < 100 if weights == "int8" else np.ones(len(was), dtype=bool)
        assert (total == got)[free | (np.abs(was) > 127)].all()
    assert ulearn.Trainer(model).batch is None and model.executor is model


def _numbers(model: ulearn.Model, blob: bytes) -> list[np.ndarray]:
    codes = {1: "i1", 2: "<i2", 3: "<i4"}
    return [np.frombuffer(bytes(blob), codes[d], c, o).astype(np.int64) for d, c, o in wire.tensors(model.tensors)]


def test_a_cut_batch_is_begun_anew(tmp_path: Path) -> None:
    """A fit with batches that was cut anywhere ends at the weights of one that was not."""
    path = plan(tmp_path, "last+bias", "int16")

    def trainer(model: ulearn.Model, **more: float) -> ulearn.Trainer:
        return ulearn.Trainer(model, skip=0, batch=3, **more)

    model = ulearn.load(path)
    samples = training.store(model)
    trainer(model, learning_rate=0.02, seed=SEED).fit(samples, 2)
    for at in range(1, 2 * SAMPLES):
        fresh = ulearn.load(path)
        with pytest.raises(Cut):
            trainer(fresh, learning_rate=0.02, seed=SEED).fit(samples, 2, cutting(fresh, path + ".ck", at))
        fresh = ulearn.load(path)
        fresh.restore(path + ".ck")
        trainer(fresh).fit(samples, resume=True)
        assert fresh.train_blob == model.train_blob, at
