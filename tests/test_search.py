"""What each part of a network adds when it trains, measured, resumed and searched within a RAM budget."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import speakers
import ulearn
from conftest import Device
from ulearn_host import budget, contribution, emulate, placement, preparation, report, search, simulate
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.contribution import Candidate, Contribution, Contributions
from ulearn_host.display import Steps
from ulearn_host.errors import UserError
from ulearn_host.network import Conv, Dense, Depthwise, Mean, Network, Tensor, Window
from ulearn_host.schemes import Scheme
from ulearn_host.simulate import Samples, Settings, Simulation
from ulearn_host.tflite_import import load_tflite

SHORT = Settings(groups=6, pilots=3, most=16)
CLASSES, SIDE, CHANNELS = 4, 6, 2
BUFFER = 2_000
CODE = 30_000


def _layer(kind: type, name: str, x: Tensor, y: Tensor, weights: np.ndarray[Any, Any], **more: Any) -> Any:
    """A layer of real weights, quantised channel by channel."""
    scales = np.abs(weights).reshape(len(weights), -1).max(axis=1) / 127
    codes = np.rint(weights / scales.reshape(-1, *[1] * (weights.ndim - 1))).astype(np.int8)
    bias = np.zeros(len(weights), np.int32)
    return kind(name, (x,), y, codes, bias, scales, (-128, 127), **more)


def _pretrained(network: Network, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Network:
    """The last layer learned by the board's own code."""
    model = ulearn.load(compile_plan(network, Options("last")).data)
    trainer = ulearn.Trainer(model, learning_rate=0.03)
    trainer.fit((x, [int(label) for label in y]), epochs=6)
    last = network.layers[-1]
    count = last.weights.size
    wide = np.frombuffer(model.train_blob, np.int16, count).astype(np.int32)
    codes = np.clip((wide + 32) >> 6, -127, 127).astype(np.int8).reshape(last.weights.shape)
    bias = np.frombuffer(model.train_blob, np.int32, len(last.bias), 2 * count).copy()
    return replace(network, ops=(*network.ops[:-1], replace(last, weights=codes, bias=bias)))


@pytest.fixture(scope="module")
def task() -> tuple[Network, Samples]:
    """A small convolutional network that knows four clusters, and six groups who see each of them displaced."""
    rng = np.random.default_rng(7)
    image = Tensor(1 / 24, 3, "image", (SIDE, SIDE, CHANNELS))
    a, b = (Tensor(4 / 255, -128, name, (SIDE, SIDE, 8)) for name in "ab")
    c, d = Tensor(4 / 255, -128, "c", (SIDE, SIDE, 12)), Tensor(1.5 / 255, -128, "d", (1, 1, 12))
    logits = Tensor(1 / 12, 0, "logits", (1, 1, CLASSES))
    same = Window((3, 3), (1, 1), (1, 1))
    network = Network(
        (
            _layer(Conv, "conv", image, a, rng.normal(0, (2 / 18) ** 0.5, (8, 3, 3, CHANNELS)), window=same),
            _layer(Depthwise, "depth", a, b, rng.normal(0.1, (2 / 9) ** 0.5, (8, 3, 3, 1)), window=same),
            _layer(Conv, "point", b, c, rng.normal(0, (2 / 8) ** 0.5, (12, 1, 1, 8)), window=Window((1, 1))),
            Mean("mean", (c,), d),
            _layer(Dense, "dense", d, logits, rng.normal(0, 0.3, (CLASSES, 12))),
        ),
        "softmax_ce",
    )
    clusters = rng.normal(0, 0.9, (CLASSES, SIDE, SIDE, CHANNELS))

    def images(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return clusters[labels] + rng.normal(0, 0.6, (len(labels), SIDE, SIDE, CHANNELS))

    labels = rng.integers(0, CLASSES, 300)
    network = _pretrained(network, image.codes(images(labels)).reshape(300, -1), labels)
    group = np.repeat(np.arange(6), 32)
    y = np.tile(np.arange(32) % CLASSES, 6)
    gain, offset = rng.uniform(0.5, 1.6, (6, 1, 1, CHANNELS)), rng.normal(0, 1.0, (6, 1, 1, CHANNELS))
    return network, Samples(image.codes(images(y) * gain[group] + offset[group]).reshape(len(y), -1), y, group)


@pytest.fixture(scope="module")
def measured(task: tuple[Network, Samples], tmp_path_factory: pytest.TempPathFactory) -> tuple[Contributions, Path]:
    """Contributions of everything, and the file that they are kept in."""
    cache = tmp_path_factory.mktemp("contributions") / "done.jsonl"
    seen: list[tuple[int, int]] = []
    found = contribution.analyse(*task, SHORT, cache=cache, progress=lambda *at: seen.append(at), processes=1)
    assert seen == [(i, len(found.items) + 1) for i in range(len(found.items) + 2)]
    return found, cache


def test_what_is_measured(task: tuple[Network, Samples], measured: tuple[Contributions, Path]) -> None:
    """Every layer at every share that it can train, biases at every depth; learning pays, and more than one kind."""
    found = measured[0]
    parts = {(i.candidate.kind, i.candidate.layer, i.candidate.amount) for i in found.items}
    assert {p for p in parts if p[0] == "bias"} == {("bias", 4 - k, k) for k in (2, 3, 4)}
    shares = {0: (1, 2, 4, 8), 1: (8,), 2: (2, 3, 6, 12)}
    assert {p for p in parts if p[0] == "weights"} == {("weights", i, r) for i, rows in shares.items() for r in rows}
    assert found.units == 6 and found.last_gain > 2 * found.last_error > 0
    assert max(item.gain for item in found.items) > 0
    for item in found.items:
        assert item.gain == pytest.approx(item.accuracy - found.last)
    json.dumps(found.as_json())


def test_the_folds_never_mix(task: tuple[Network, Samples]) -> None:
    """What judges was not learned from, and is of the same group; another split, other halves."""
    _, samples = task
    assert samples.group is not None
    for settings in (SHORT, replace(SHORT, seeds=2, split=1)):
        folds = simulate.folds(samples, settings)
        assert len(folds) == 6 * settings.seeds
        for fold in folds:
            assert not set(fold.train) & set(fold.test)
            assert len({int(samples.group[i]) for i in (*fold.train, *fold.test)}) == 1
            counts = [np.bincount(samples.y[half], minlength=CLASSES) for half in (fold.train, fold.test)]
            assert np.abs(counts[0] - counts[1]).max() <= 1
    first, other = (set(simulate.folds(samples, replace(SHORT, split=i))[0].train) for i in (0, 1))
    assert first != other
    alone = Samples(samples.x, samples.y)
    assert len({tuple(sorted(fold.train)) for fold in simulate.folds(alone, SHORT)}) == 6


def test_deterministic(
    task: tuple[Network, Samples], measured: tuple[Contributions, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes measure the same, to the bit."""
    monkeypatch.setattr(simulate, "_SHORT", 0.0)
    assert contribution.analyse(*task, SHORT, processes=2) == measured[0]


def test_resume(
    task: tuple[Network, Samples],
    measured: tuple[Contributions, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that was killed at any byte of the file goes on, and measures only what is missing."""
    found, cache = measured
    lines = cache.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(found.items) + 1
    calls: list[Options] = []
    whole = Simulation.measure
    monkeypatch.setattr(Simulation, "measure", lambda self, *a: calls.append(a[0]) or whole(self, *a))
    path = tmp_path / "done.jsonl"
    for kept, rest in ((len(lines) - 1, lines[-1][:30]), (len(lines) - 2, b"\x00{]\n"), (len(lines), b"")):
        path.write_bytes(b"".join(lines[:kept]) + rest)
        calls.clear()
        assert contribution.analyse(*task, SHORT, cache=path, processes=1) == found
        assert len(calls) == len(lines) - kept
    again = path.read_bytes()
    contribution.analyse(*task, SHORT, cache=path, processes=1)
    assert path.read_bytes() == again
    few = [Candidate("bias", 2, 2)]
    calls.clear()
    contribution.analyse(*task, replace(SHORT, epochs=1), only=few, cache=path, processes=1)
    assert len(calls) == 2, "other settings are measured anew"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="expected a file of measurements"):
        contribution.analyse(*task, SHORT, cache=path)


def _search(task: tuple[Network, Samples], found: Contributions, ram: int, **more: Any) -> search.Choice:
    return search.search(task[0], found, ram, data_buffer_bytes=BUFFER, code_bytes=CODE, **more)


@pytest.fixture(scope="module")
def least(task: tuple[Network, Samples], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Heap for the last layer alone, in the narrowest arithmetic."""
    plan = compile_plan(task[0], Options("last", gradients="int8", weights="int8"))
    return budget.heap(plan, tmp_path_factory.mktemp("least") / "plan").needed + CODE + BUFFER


@pytest.fixture(scope="module")
def budgets(least: int) -> list[int]:
    """From too little for anything else to more than enough."""
    return [least, *range(least + 200, least + 6_000, 900), least + 100_000]


def test_the_choice_fits(
    task: tuple[Network, Samples], measured: tuple[Contributions, Path], budgets: list[int], tmp_path: Path
) -> None:
    """What is predicted is what the plan's file says; more RAM never gives less; nothing that harms is chosen."""
    before = -1.0
    gains = {item.candidate: item.gain for item in measured[0].items}
    for ram in budgets:
        choice = _search(task, measured[0], ram)
        assert choice == _search(task, measured[0], ram)
        path = tmp_path / "choice.ulm"
        path.write_bytes(compile_plan(task[0], choice.options()).data)
        heap = report.read(path).ram_bytes
        assert heap == choice.ram.plan + choice.ram.frozen + choice.ram.weights + choice.ram.arena
        assert choice.ram.margin >= budget.LOADING_BYTES
        assert choice.ram.total == heap + CODE + BUFFER + choice.ram.margin <= ram
        assert choice.complete
        assert choice.summed == pytest.approx(sum(gains[c] for c in choice.candidates))
        assert all(gains[c] > 0 for c in choice.candidates)
        assert choice.summed >= before
        before = choice.summed
        json.dumps(choice.as_json())
        rows = choice.explain()
        assert rows[0].layer == "dense" and len(rows) == 1 + 4
        assert sum(not row.note for row in rows) == 1 + len(choice.candidates)
    best = {}
    for item in measured[0].items:
        key = item.candidate.layer if item.candidate.kind == "weights" else -1
        best[key] = max(best.get(key, 0.0), item.gain)
    assert before == pytest.approx(sum(best.values())), "with all the RAM there is, all that gains"
    places: list[budget.Place] = ["in-place", "stream", "ram"]
    sizes = [_search(task, measured[0], ram, place=place).ram for place in places]
    assert sizes[0].frozen == 0 < sizes[1].frozen < sizes[2].frozen
    assert sizes[0].total < sizes[2].total


def _subsets(items: tuple[Contribution, ...]) -> Iterator[list[Contribution]]:
    groups: dict[int, list[Contribution | None]] = {}
    for item in items:
        groups.setdefault(item.candidate.layer if item.candidate.kind == "weights" else -1, [None]).append(item)
    for chosen in product(*groups.values()):
        yield [item for item in chosen if item]


@pytest.mark.parametrize("seed", range(2))
def test_none_is_better(
    task: tuple[Network, Samples], measured: tuple[Contributions, Path], budgets: list[int], tmp_path: Path, seed: int
) -> None:
    """Of all choices there are, compiled one by one, none that fits has more; with gains by chance."""
    rng = np.random.default_rng(seed)
    some = [i for i in measured[0].items if i.candidate.layer != 0 or i.candidate.kind == "bias"]
    items = tuple(replace(item, gain=float(rng.normal(0.01, 0.01))) for item in some)
    found = replace(measured[0], items=items)
    sizes: list[tuple[int, float]] = []
    for chosen in _subsets(items):
        parts = contribution.with_candidates(task[0], [item.candidate for item in chosen])
        kinds = [Options("sparse", w, selection=tuple(parts), gradients=g) for g, w in search.ARITHMETIC]
        heaps = [budget.heap(compile_plan(task[0], options), tmp_path / "plan").needed for options in kinds]
        sizes.append((min(heaps) + CODE + BUFFER, sum(item.gain for item in chosen)))
    for ram in budgets[::2]:
        best = max(gain for size, gain in sizes if size <= ram)
        assert _search(task, found, ram).summed == pytest.approx(best)


def test_a_search_cut_short_says_so(
    task: tuple[Network, Samples], measured: tuple[Contributions, Path], budgets: list[int]
) -> None:
    """With too few plans compiled the choice still fits."""
    choice = _search(task, measured[0], budgets[3], limit=3)
    assert not choice.complete and choice.ram.total <= budgets[3]


def test_caution(task: tuple[Network, Samples], measured: tuple[Contributions, Path]) -> None:
    """What gains no more than its error is left out on request."""
    items = tuple(replace(i, gain=0.02, error=0.001 if i.candidate.kind == "bias" else 0.03) for i in measured[0].items)
    choice = _search(task, replace(measured[0], items=items), 10**6, caution=1.0)
    assert [c.kind for c in choice.candidates] == ["bias"]
    assert {row.note for row in choice.explain()} == {"", "too uncertain a gain"}


def test_too_small(task: tuple[Network, Samples], measured: tuple[Contributions, Path], least: int) -> None:
    """Where not even the last layer fits, the message counts the bytes; to the byte."""
    assert _search(task, measured[0], least).ram.total == least
    with pytest.raises(
        UserError, match=rf"are 1 too few .* takes {least:,}: MicroPython and code 30,000, .* data buffer 2,000, margin"
    ):
        _search(task, measured[0], least - 1)


def test_settled_and_finished(
    task: tuple[Network, Samples], measured: tuple[Contributions, Path], budgets: list[int]
) -> None:
    """The whole choice is measured on other halves; the plan has its rate, and gains that the samples calibrated."""
    choice = _search(task, measured[0], budgets[4])
    settled = search.settle(*task, choice, SHORT, processes=1)
    everyone = [settled, *settled.alternatives]
    assert {c.candidates for c in everyone} == {c.candidates for c in (choice, *choice.alternatives)} >= {()}
    assert settled.gain == max(c.gain for c in everyone if c.gain is not None) == settled.expected_gain
    assert settled.learning_rate in simulate.RATES
    settled = replace(choice, learning_rate=0.3)
    plan = search.finish(task[0], settled, task[1])
    assert plan.options == settled.options()
    model = ulearn.load(plan.data)
    mantissa, exponent = struct.unpack_from("<Hh", model.state, n.S_LR_MANT)
    assert mantissa * 2.0**exponent == pytest.approx(0.3, rel=1e-3)
    (gains,) = struct.unpack_from("<H", model.state, n.S_N_GAINS)
    seen = [model.state[n.STATE_BYTES + n.GAIN_BYTES * i + 1] for i in range(gains)]
    assert gains and seen == [n.GAIN_SAMPLES] * gains


def test_places(task: tuple[Network, Samples], measured: tuple[Contributions, Path], least: int) -> None:
    """Frozen weights in RAM where all that gains fits so, streamed where only that fits; the error is of the least."""
    code: dict[budget.Place, int] = {"ram": CODE, "stream": CODE - 2000, "in-place": CODE}
    more: dict[str, Any] = {"code_bytes": code, "data_buffer_bytes": BUFFER}

    def choice(ram: int, *places: budget.Place) -> search.Choice:
        return search.search_places(task[0], measured[0], ram, places or ("ram", "stream"), **more)

    best = choice(10**6)
    assert {c.place for c in (best, *best.alternatives)} == {"ram"}
    tight = choice(least - 1)
    assert tight.place == "stream" and tight.ram.total < least and tight.ram.code == CODE - 2000
    middle = choice(least + 1500)
    assert middle.summed >= choice(least + 1500, "ram").summed
    assert len({json.dumps(c.as_json()["selection"]) + c.gradients + c.weights for c in (middle, *middle.alternatives)})
    with pytest.raises(UserError, match="with its frozen weights streamed"):
        choice(CODE)
    with pytest.raises(UserError, match="with its frozen weights in flash"):
        choice(CODE + 2000, "in-place")


def test_the_whole_search(task: tuple[Network, Samples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command does: measured, searched, settled, with the arithmetic that was asked for."""
    monkeypatch.setattr(preparation, "Settings", lambda learning_rate=None: replace(SHORT, learning_rate=learning_rate))
    ask = preparation.Budget(200_000, 10, gradients="int8", learning_rate=0.03)
    found = preparation.searched(*task, ask, Options(layerwise=True), tmp_path / "cache", Steps(None))
    assert found.choice.gradients == "int8" and found.choice.learning_rate == 0.03
    assert found.choice.ram.data == budget.buffer_bytes(task[0], 10)
    assert found.choice.options(Options(layerwise=True)).layerwise
    assert found.choice.before is not None and found.choice.accuracy is not None
    lines = [json.loads(line)["choice"] for line in (tmp_path / "cache").read_text().splitlines()]
    assert {choice for choice in lines if "layerwise" not in choice} <= {"last"}, "alone it is the same either way"
    json.dumps(found.as_json())
    preparation.show(task[0], found)
    assert "before training" in " ".join(preparation.expectation(found))
    with pytest.raises(UserError, match="too few even to train"):
        preparation.searched(*task, replace(ask, ram=60_000), Options(), tmp_path / "none", Steps(None))
    assert not (tmp_path / "none").exists(), "nothing is measured in vain"


def test_the_rate(task: tuple[Network, Samples]) -> None:
    """Measured where there is something to learn; else the scheme's, with the reason."""
    network, samples = task
    ticks: list[tuple[int, int]] = []
    plan = compile_plan(network, Options("last"))

    def tune(data: Samples, net: Network = network) -> preparation.Tuned:
        return preparation.tune(net, data, Options("last"), plan, lambda *at: ticks.append(at))

    found = tune(samples)
    assert found.source == "measured" and found.rate in simulate.RATES and found.groups == 6
    assert found.after is not None and found.before is not None and found.after > found.before
    assert ticks[-1] == (1, 1) and len(ticks) > 6
    assert tune(samples) == found
    assert "too few" in tune(Samples(samples.x[:20], samples.y[:20])).note
    same = samples.y == 1
    assert "one class" in tune(Samples(samples.x[same], samples.y[same])).note
    alone = replace(samples, group=np.arange(len(samples.x)))
    assert tune(alone) == tune(Samples(samples.x, samples.y)), "groups that are too small count for nothing"
    model = ulearn.load(plan.data)
    learned = tune(replace(samples, y=np.array([model.predict(x.tobytes()) for x in samples.x])))
    assert learned.source == "scheme" and learned.before == 1 and "gained too little" in learned.note


def test_named_layers(task: tuple[Network, Samples]) -> None:
    """A choice as it is written, and what is wrong with others."""
    assert preparation.named_layers(task[0], "dense=all+bias, point=3+bias,conv=bias") == (
        *((0, True), (0, False), (3, True), (4, True)),
    )
    for text, words in (
        ("dens=all", "this network has conv, depth, point, dense"),
        ("dense", "does not say what trains"),
        ("dense=5", "4 output channels"),
        ("dense=some", "not what trains"),
        ("dense=0", "not what trains"),
        ("dense=all+weights", "not what trains"),
        ("dense=1,dense=bias", "twice"),
        ("", "does not say"),
    ):
        with pytest.raises(UserError, match=words):
            preparation.named_layers(task[0], text)


_USED = """
import gc
def used():
    gc.collect(); gc.collect(); return gc.mem_alloc()
before = used()
import ulearn
m = ulearn.load("{name}", frozen="{place}")
if m.trainings:
    t = ulearn.Trainer(m)
    s = ulearn.Samples(m, 1)
    s.add(bytes(m.input_bytes), 1)
    t.fit(s, epochs=1)
x = bytes(m.input_bytes)
m.predict(x)
print(before, used() - before)
"""


@pytest.mark.parametrize("scheme", ["none", "last"])
def test_code_on_the_heap(cortex_m0: Device, shared_data: Path, tmp_path: Path, scheme: Scheme) -> None:
    """What the code takes on the Cortex-M0 is what is said: to infer, to train, streamed or not.

    Up to 4 KB more have been seen, with all else the same but the program's text: what a conservative collector keeps
    of the loader by chance (test_memory.py). budget.LOADING_BYTES has room for that.
    """
    network = replace(load_tflite(shared_data / speakers.MODEL_FILE), loss="softmax_ce")
    path = tmp_path / f"{scheme}.ulm"
    path.write_bytes(compile_plan(network, Options(scheme)).data)
    cortex_m0.put(path)
    read = report.read(path)
    for place, heap in (("ram", read.ram_bytes), ("stream", read.frozen.ram_streamed)):
        base, used = map(int, cortex_m0.fresh(_USED.format(name=path.name, place=place))[-1].split())
        held = network.input.size + (budget.buffer_bytes(network, 1) if scheme == "last" else 0)
        code, said = used - heap - held, placement.code_bytes(read.modules[0], read.trains, place == "stream")
        print(f"{scheme} {place}: code {code:,}, said {said:,}; MicroPython itself {base:,}")
        assert -800 <= code - said <= 4_500, (place, code, said)
        assert abs(base - placement.BASE_BYTES) <= 800


_TIGHT = """
import gc
gc.collect(); gc.collect()
r = bytearray(gc.mem_alloc() + gc.mem_free() - {total})
import user
"""
_USER = """
import ulearn
m = ulearn.load("{name}", frozen="{place}")
t = ulearn.Trainer(m, skip=0)
s = ulearn.Samples(m, 22)
for i in range(22):
    s.add(bytes(m.input_bytes), i % 10)
t.fit(s, epochs=1)
print("fits")
"""


@pytest.mark.parametrize("place", ["ram", "stream"])
def test_it_fits_the_board(cortex_m0: Device, shared_data: Path, tmp_path: Path, place: budget.Place) -> None:
    """On a Cortex-M0 whose heap is no larger than the prediction, the keyword network loads and trains."""
    network = replace(load_tflite(shared_data / speakers.MODEL_FILE), loss="softmax_ce")
    plan = compile_plan(network, Options("sparse", selection=preparation.named_layers(network, _CHOICE)))
    size = budget.heap(plan, tmp_path / "tight.ulm", place)
    code = placement.BASE_BYTES + placement.code_bytes(emulate.NATIVE_MODULES[-1], True, place == "stream")
    (tmp_path / "user.py").write_text(_USER.format(name="tight.ulm", place=place))
    cortex_m0.put(tmp_path / "tight.ulm", tmp_path / "user.py")
    total = code + size.needed + budget.buffer_bytes(network, 22)
    assert cortex_m0.fresh(_TIGHT.format(total=total))[-1] == "fits", total


_CHOICE = "conv_5=32+bias,dense_1=all+bias"


def test_regression(task: tuple[Network, Samples]) -> None:
    """Of vectors it is the share of the error that is gone."""
    network, samples = task
    targets = np.eye(CLASSES)[samples.y] * 4
    some = [Candidate("bias", 2, 2), Candidate("weights", 2, 12)]
    found = contribution.analyse(
        replace(network, loss="mse"), replace(samples, y=targets), SHORT, only=some, processes=1
    )
    assert found.regression and found.last < found.before and 0 < found.last_gain < 1
    assert all(item.accuracy > 0 and item.gain < 1 for item in found.items)
    assert not math.isnan(found.items[0].error)


def test_hinge(task: tuple[Network, Samples]) -> None:
    """A loss of margins takes labels as well, and its plan is calibrated."""
    network, samples = replace(task[0], loss="hinge"), task[1]
    found = contribution.analyse(network, samples, SHORT, only=[Candidate("bias", 2, 2)], processes=1)
    assert found.last_gain > found.last_error
    choice = search.search(network, found, 10**6, data_buffer_bytes=BUFFER, code_bytes=CODE)
    assert ulearn.load(search.finish(network, choice, samples).data).loss_kind == n.LOSS_HINGE


def test_refusals(task: tuple[Network, Samples]) -> None:
    """What cannot be used is named."""
    network, samples = task
    cases = (
        (replace(network, loss="none"), samples, "no loss"),
        (network, replace(samples, x=samples.x[:, 1:]), "expected \\[n, 72\\]"),
        (network, replace(samples, y=samples.y + 1), "expected 0 to 3"),
        (network, Samples(samples.x[:3], samples.y[:3]), "too few"),
        (network, replace(samples, group=np.arange(len(samples.x))), "no group has"),
    )
    for net, data, words in cases:
        with pytest.raises(UserError, match=words):
            contribution.analyse(net, data, SHORT)
    with pytest.raises(UserError, match="one for each"):
        Samples(samples.x, samples.y[1:])
    with pytest.raises(UserError, match="2 groups or more"):
        Settings(groups=1)


def test_bytes() -> None:
    """96k is what a user writes."""
    assert [budget.bytes_of(text) for text in ("96k", "96K", "96kB", "1000")] == [98304, 98304, 98304, 1000]
    for text in ("", "k", "kb", "-1", "9.5k", "96kbb", "0", "96m"):
        with pytest.raises(UserError, match="e.g. 96k"):
            budget.bytes_of(text)


def test_keywords(shared_data: Path) -> None:
    """Two speakers and a few candidates on MLPerf Tiny's keyword network."""
    clips = speakers.load(shared_data / speakers.CLIP_FILE)
    network = replace(load_tflite(shared_data / speakers.MODEL_FILE), loss="softmax_ce")
    some = [Candidate("bias", 8, 2), Candidate("weights", 8, 16)]
    settings = Settings(learning_rate=0.03, groups=2, epochs=2)
    found = contribution.analyse(
        network, Samples(clips.codes, clips.labels, clips.speakers), settings, only=some, processes=1
    )
    assert 0.5 < found.before <= 1 and 0.5 < found.last <= 1 and len(found.items) == 2
    choice = search.search(
        network, found, 160 * 1024, data_buffer_bytes=budget.buffer_bytes(network, 22), code_bytes=36_000
    )
    assert choice.ram.data == 22 * 492 + budget.STORE_BYTES
    assert choice.ram.total <= 160 * 1024
    with pytest.raises(UserError, match="too few"):
        search.search(network, found, 64 * 1024, data_buffer_bytes=0, code_bytes=36_000)
