"""Split training: what boards choose and send, and the head that the host makes of it."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

import activations
import branches
import cases
import gateways
import training
import ulearn
from conftest import HERE
from test_bits import FIRMWARE, micropython
from test_trainer import plan
from ulearn import checkpoint, task
from ulearn import features as wire
from ulearn_host import aggregate, demo, emulate, numbers, report
from ulearn_host.compiler import Options
from ulearn_host.errors import UserError
from ulearn_host.federation import advance, split, split_head
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.virtual import VirtualBoard
from ulearn_host.fleet import PlanFacts, Samples
from ulearn_host.importers import from_sklearn
from ulearn_host.prepare import prepare
from ulearn_host.quantise import FloatDense


def answer(model: ulearn.Model, samples: ulearn.Samples, kept: int, way: str = "features", **fields: Any) -> bytes:
    """What a board whose owner has agreed sends."""
    model.gives_features = True
    asked = split.ask(
        kept, way, **{"model_id": model.model_id, "base_id": model.base_id, "round": 1, "seed": 3, **fields}
    )
    return bytes(task.carry_out(model, samples, task.parse(asked)))


@pytest.mark.parametrize("loss", ["softmax_ce", "mse"])
def test_every_board_chooses_alike(loss: str, tmp_path: Path) -> None:
    """The Unix port sends what CPython sends; nobody sends without leave."""
    path = plan(tmp_path, loss=loss)
    wanted = activations.lines(path)
    assert wanted[0].startswith("task: it asks for activations") and "given away" not in wanted
    for module in emulate.NATIVE_MODULES:
        shutil.copy(emulate.find_native("x64", module=module), tmp_path)
    code = f"import activations\nactivations.main({path!r})"
    found = micropython(emulate.find_micropython(), tmp_path, [tmp_path, FIRMWARE, HERE / "device"], code)
    assert found == wanted


def test_what_is_sent_are_samples(tmp_path: Path) -> None:
    """Each row is the target and the features of one sample, none is there twice, and every class has its share."""
    model = ulearn.load(plan(tmp_path))
    facts, samples = PlanFacts(Path(model.path)), training.store(model, 40)
    rows = [(samples.target(i), bytes(model.features(samples.x(i)))) for i in range(len(samples))]
    for way in split.WAYS:
        sent = split.parse(answer(model, samples, 9, way, job=4), facts)
        assert (sent.job, sent.round, sent.samples, len(sent), sent.cut) == (4, 1, 40, 9, 0)
        found = [(int(y), x.tobytes()) for x, y in zip(sent.x, sent.y, strict=True)]
        for row in set(found):
            assert found.count(row) <= rows.count(row)
        if way == "features":
            present = {label for label, _ in rows}
            assert {label for label, _ in found} == present
    with pytest.raises(ValueError, match="no sample"):
        answer(model, ulearn.Samples(model, 1), 3)
    with pytest.raises(ValueError, match="cut 7 from the end"):
        answer(model, samples, 3, cut=7)


def test_clusters_are_found() -> None:
    """Of three clouds of one class, one sample each; of a class with fewer samples than its share, all."""
    rng = np.random.default_rng(2)
    clouds = [rng.integers(-4, 5, (n, 6)) + middle for n, middle in ((30, 40), (5, 120), (12, 200))]
    points = np.concatenate([*clouds, rng.integers(90, 100, (2, 6))]).astype(np.uint8)
    chosen = wire.choose(points.tobytes(), 6, [list(range(47)), [47, 48]], 5)
    assert sorted(chosen)[3:] == [47, 48]
    assert [sum(low <= i < high for i in chosen) for low, high in ((0, 30), (30, 35), (35, 47))] == [1, 1, 1]


@pytest.mark.parametrize("loss", ["softmax_ce", "mse"])
def test_damage_is_refused(loss: str, tmp_path: Path) -> None:
    """Any bit, any length; no message makes the host do anything but refuse."""
    model = ulearn.load(plan(tmp_path, loss=loss))
    facts = PlanFacts(Path(model.path))
    data = answer(model, training.store(model, 12), 4)
    assert len(data) <= split.longest(facts, 4)
    split.parse(data, facts)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError, match="features: "):
            split.parse(bytes(damaged), facts)
    for length in (*range(len(data)), len(data) + 1):
        with pytest.raises(UserError, match="features: "):
            split.parse((data + b"\0")[:length], facts)


KINDS = [("last", "int16"), ("last", "int8"), ("last+bias", "int16"), ("full", "int16")]


@pytest.mark.parametrize(("scheme", "weights"), KINDS)
@pytest.mark.parametrize("loss", ["softmax_ce", "mse"])
def test_the_host_trains_as_a_board_does(scheme: str, weights: str, loss: str, tmp_path: Path) -> None:
    """From all activations the host comes to the bits of a board that trains its last layer alone on the samples."""
    model = ulearn.load(plan(tmp_path, scheme, weights, loss))
    facts, samples = PlanFacts(Path(model.path)), training.store(model, 23)
    base = bytes(model.train_blob)
    sent = split.parse(answer(model, samples, 23), facts)
    order = matched(sent, model, samples)
    how = split_head.Training(epochs=3, learning_rate=0.05, halve_every=2, seed=5, skip=0.01)
    update = split_head.train(facts, base, [sent], how)
    trainer = ulearn.Trainer(model, 0.05, 5, 0.01)
    for i in range(2, len(trainer.gates)):
        trainer.gates[i] = 0
    inputs = [bytes(samples.x(i)) for i in order]
    trainer.fit((inputs, [target(samples, i) for i in order]), 3, halve_every=2)
    assert bytes(model.train_blob) != base
    assert aggregate.decode(update, facts.table) == SameValues(aggregate.decode(bytes(model.update(23)), facts.table))


def target(samples: ulearn.Samples, i: int) -> Any:
    """A label, or bytes of a vector."""
    value = samples.target(i)
    return value if isinstance(value, int) else bytes(value)


def matched(sent: split.Features, model: ulearn.Model, samples: ulearn.Samples) -> list[int]:
    """Which sample each row is of: they come in the order of the samples."""
    assert len(sent) == len(samples)
    for i, row in enumerate(sent.x):
        assert row.tobytes() == bytes(model.features(samples.x(i)))
    return list(range(len(sent)))


@dataclass(frozen=True)
class SameValues:
    """Equal to an update with the same values."""

    update: aggregate.Update

    def __eq__(self, other: object) -> bool:
        return isinstance(other, aggregate.Update) and np.array_equal(other.values, self.update.values)


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    """Plans that train nothing above the cut, a cut that there is not, answers that do not belong together."""
    path = Path(plan(tmp_path, "bias"))
    model = ulearn.load(str(path))
    facts, base = PlanFacts(path), bytes(model.train_blob)
    sent = split.parse(answer(model, training.store(model, 12), 4), facts)
    with pytest.raises(UserError, match="cut 3 from the end"):
        split_head.upper(facts, 3)
    with pytest.raises(UserError, match="another base"):
        split_head.train(facts, bytes(len(base)), [sent])
    with pytest.raises(UserError, match="no board"):
        split_head.train(facts, base, [])
    with pytest.raises(UserError, match="different bases"):
        split.together([sent, split.Features(0, 1, sent.model_id, bytes(16), 0, 9, sent.x, sent.y)])
    with pytest.raises(UserError, match="of another model"):
        split.parse(answer(model, training.store(model, 12), 4), PlanFacts(Path(plan(tmp_path, "last"))))
    with pytest.raises(UserError, match="one dense layer"):
        split_head.train_float(facts, base, [sent])


def test_above_any_cut(tmp_path: Path) -> None:
    """Of random networks with branches: a cut is refused, or activations alone lead to the bits of whole steps."""
    accepted = refused = 0
    for seed in range(40):
        case = branches.random_case(seed)
        path = tmp_path / f"{seed}.ulm"
        path.write_bytes(case.plan.data)
        facts = PlanFacts(path)
        names = [cut["name"] for cut in report.read(path).cuts]
        for back, name in enumerate(reversed(names)):
            try:
                part = split_head.upper(facts, back)
            except UserError:
                refused += 1
                continue
            accepted += 1
            assert steps(case, part, None) == steps(case, part, name), (seed, name)
    assert accepted > 20 and refused > 20


def steps(case: cases.Case, part: split_head.Upper, cut: str | None) -> tuple[bytes, bytes]:
    """Weights and STATE after steps as far as the part goes; cut: on activations there, in an arena of noise."""
    model = ulearn.load(case.plan.data)
    trainer = ulearn.Trainer(model, 0, 1, case.skip_below / 65536)
    trainer.set_rate(*case.rate)
    program, table = trainer.programs[part.program][0], model.table
    rng = np.random.default_rng(1)
    for x, y in zip(case.inputs, case.targets, strict=True):
        first, count = 0, part.first + part.count
        if cut is not None:
            there = bytes(model.features(x, cut))
            assert len(there) == part.size
            model.arena[:] = rng.bytes(len(model.arena))
            model.arena[part.at : part.at + part.size] = there
            first, count = part.first, part.count
            x = rng.bytes(len(x))
        table[numbers.BUF_INPUT], table[numbers.BUF_TARGET] = bytes(x), y.tobytes()
        assert model.executor.run(program, table, first, count) == count
    return bytes(model.train_blob), bytes(model.state)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"up": "features"}, "expected dense"),
        ({"up": "features:0"}, "keeps 0 values"),
        ({"up": "features:9", "rule": "median", "goal": 4}, "rule with up"),
        ({"up": "features:9", "personal": True}, "personal with up"),
        ({"up": "random-features:9", "stale": 1}, "stale with up"),
    ],
)
def test_senseless_jobs_are_refused(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        Job(**({"name": "split", "rounds": 1, "goal": 2} | fields))


def test_a_plan_without_a_cut_begins_nothing(tmp_path: Path) -> None:
    """One layer alone has nothing below it."""
    layer = FloatDense(np.eye(4), np.zeros(4), False)
    made = prepare([layer], np.eye(4), None, loss="softmax_ce", options=Options("last"))
    (tmp_path / "one.ulm").write_bytes(made.data)
    with pytest.raises(UserError, match="cut 0 from the end, it has 0"):
        Federation.create(tmp_path / "job", tmp_path / "one.ulm", Job("split", 1, 1, up="features:4"))
    assert not (tmp_path / "job").exists()


def test_a_board_that_gives_nothing_away(tmp_path: Path) -> None:
    """Without its owner's leave a board answers nothing, and the round is given up."""
    path, clock = Path(plan(tmp_path)), gateways.Time()
    with Federation.create(tmp_path / "job", path, Job("split", 1, 1, up="features:4"), clock) as federation:
        boards = gateways.enrol(federation, tmp_path, path, ["board-1"])
        boards["board-1"].model.gives_features = False
        with pytest.raises(ValueError, match="model.gives_features = True"):
            gateways.visit(federation, boards, clock)
        clock.now += 1000
        federation.tick(clock.now)
        assert federation.status()["history"][0]["state"] == "abandoned"


SEEDS = range(4)
KEPT = 20
WORLDS = (*demo.WORLDS, demo.World("fourth", "", 20.0, 0.3, (0, 5, 9)))
TRAIN, TEST = 120, 160
ROUNDS = 5


class Digits:
    """A network pretrained on upright digits, and a fleet whose boards see them tilted, each in its own way and mix."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir()
        rng = np.random.default_rng(seed)
        images, y = load_digits(return_X_y=True)
        order = rng.permutation(len(y))
        images, y = images[order].reshape(-1, 8, 8) / 16, y[order]
        upright = len(y) // 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = MLPClassifier((32,), alpha=1e-3, max_iter=80, random_state=seed)
            model.fit(images[:upright].reshape(upright, -1), y[:upright])
        layers, loss, labels = from_sklearn(model)
        views = np.concatenate([demo.tilted(images[:60], world).reshape(60, -1) for world in WORLDS])
        made = prepare(layers, views, np.tile(y[:60], len(WORLDS)), loss=loss, labels=labels, options=Options("last"))
        self.path = folder / "digits.ulm"
        self.path.write_bytes(made.data)
        self.facts = PlanFacts(self.path)
        self.boards: dict[str, VirtualBoard] = {}
        for world, share in zip(WORLDS, np.array_split(np.arange(upright, len(y)), len(WORLDS)), strict=True):
            chosen = share[demo.draw(y[share], world, TRAIN + TEST, rng)]
            seen = self.facts.samples(
                demo.tilted(images[chosen], world).reshape(len(chosen), -1), y[chosen], world.name
            )
            train, test = Samples(seen.x[:TRAIN], seen.y[:TRAIN]), Samples(seen.x[TRAIN:], seen.y[TRAIN:])
            self.boards[world.name] = VirtualBoard(folder / world.name, self.path, train, test)

    def run(self, folder: Path, job: Job) -> Federation:
        """The job with all boards, to its end."""
        clock = gateways.Time()
        federation = Federation.create(folder, self.path, job, clock)
        for name in self.boards:
            federation.enrol(name, gateways.SECRET, "test")
        while federation.head["state"] != "done":
            gateways.visit(federation, self.boards, clock)
            clock.now += 1
            assert clock.now < 2000, federation.status()
        return federation

    def right(self, blob: bytes) -> float:
        """The share of held-out samples that are right with these weights."""
        shares = []
        for board in self.boards.values():
            model = ulearn.load(self.facts.with_weights(blob))
            shares.append(ulearn.Trainer(model).evaluate(board.held_out))
        return float(np.mean(shares))


def test_a_head_from_few_activations(tmp_path: Path) -> None:
    """On tilted digits a head made of KEPT activations of each board is right far more often than the frozen network,
    and than a federated round that sends as much; the journal replays to its bits. Samples would be larger."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        fleet = Digits(tmp_path / str(seed), seed)
        jobs = {
            "split": Job("split", 1, 4, epochs=48, up=f"features:{KEPT}", quorum=1),
            "split by chance": Job("chance", 1, 4, epochs=48, up=f"random-features:{KEPT}", quorum=1),
            "one federated round": Job("one", 1, 4, learning_rate=0.1, quorum=1),
            f"{ROUNDS} federated rounds": Job("five", ROUNDS, 4, learning_rate=0.1, quorum=1),
        }
        frozen = advance.first_blob(fleet.facts)
        found.setdefault("frozen", []).append(fleet.right(frozen))
        for name, job in jobs.items():
            with fleet.run(tmp_path / f"{seed} {name}", job) as federation:
                blob = bytes(federation.model["blob"])
                assert federation.replay() == blob
                found.setdefault(name, []).append(fleet.right(blob))
                if name == "split":
                    rows = federation.journal.rows("SELECT body FROM updates")
                    sent = [split.parse(bytes(row["body"]), fleet.facts) for row in rows]
        floating = split_head.train_float(fleet.facts, frozen, sent)
        found.setdefault("split, in float", []).append(fleet.right(advance.added(frozen, floating, fleet.facts)))
        for board, bodies in zip(fleet.boards.values(), rows, strict=True):
            raw = KEPT * (fleet.facts.inputs + 2)
            assert len(bodies["body"]) <= split.longest(fleet.facts, KEPT) < raw / 1.5
            board.take("full", frozen, checkpoint.identity(fleet.facts.model_id, frozen))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    print({name: f"{value:.1%}" for name, value in mean.items()})
    assert mean["split"] > mean["frozen"] + 0.2 and min(np.subtract(found["split"], found["frozen"])) > 0.1
    assert mean["split"] > mean["split by chance"] + 0.02
    assert mean["split"] > mean["one federated round"] + 0.05
    assert abs(mean["split, in float"] - mean["split"]) < 0.05
