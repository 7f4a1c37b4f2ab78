"""Simulated fleets: who has which samples, who lies, and whole jobs of virtual boards, the same in any number of
processes; small forms of what tests/fleet_accuracy.py measures."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import fleet_accuracy
import fleet_worlds as worlds
import speakers
import ulearn
from test_cli import run
from ulearn import task as wire
from ulearn_host import aggregate, bucketing, cli, rule_names, rules
from ulearn_host.compiler import Options
from ulearn_host.errors import UserError
from ulearn_host.federation import attacks, float_fleet, simulation, simulation_plot, splits
from ulearn_host.federation.job import Job
from ulearn_host.federation.simulation import Result, World, name_of
from ulearn_host.federation.virtual import VirtualBoard
from ulearn_host.fleet import PlanFacts, Samples
from ulearn_host.prepare import prepare
from ulearn_host.quantise import FloatDense

BOARDS = 10
BEARABLE, RUINOUS = 2.0, 10.0  # points
LIES = ("label-flip:5:0.2", "scale:-10:0.2")


# ---- Splits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels() -> NDArray[np.int64]:
    """600 labels of 10 classes, some rarer than others."""
    return np.random.default_rng(3).choice(10, 600, p=np.arange(1, 11) / 55)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 10.0, math.inf])
def test_every_sample_goes_to_one_board(labels: NDArray[np.int64], alpha: float) -> None:
    """A split is a partition into parts of one size, the same for the same seed and another for another."""
    parts = splits.dirichlet(labels, 7, alpha, 5)
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    assert {len(part) for part in parts} == {85, 86}
    again, other = (splits.dirichlet(labels, 7, alpha, seed) for seed in (5, 6))
    assert all(map(np.array_equal, parts, again)) and not all(map(np.array_equal, parts, other))


def test_the_smaller_alpha_the_fewer_classes(labels: NDArray[np.int64]) -> None:
    """How far boards' mixes are apart falls with alpha; with a tiny one the first boards have but one class."""
    skews = [splits.skew(labels, splits.dirichlet(labels, 12, alpha, 1)) for alpha in (0.01, 0.5, 5.0, math.inf)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.7 and skews[-1] < 0.25
    assert len(np.unique(labels[splits.dirichlet(labels, 100, 0.01, 1)[0]])) == 1


def test_samples_are_held_out_by_class(labels: NDArray[np.int64]) -> None:
    """Of each class the share, to one sample; no sample is on both sides."""
    train, test = splits.held_out(labels, 0.3, 2)
    assert sorted(np.concatenate([train, test]).tolist()) == list(range(600))
    for c in range(10):
        assert abs(np.sum(labels[test] == c) - 0.3 * np.sum(labels == c)) <= 1
    train, test = splits.held_out(np.zeros((10, 2)), 0.3, 2)
    assert (len(train), len(test)) == (7, 3)


def test_a_board_a_group() -> None:
    """The largest groups come first; too few are refused."""
    group = np.array(list("abbcccdddd"))
    assert [len(part) for part in splits.by_group(group)] == [4, 3, 2, 1]
    assert [set(group[part]) for part in splits.by_group(group, 2)] == [{"d"}, {"c"}]
    assert len(splits.by_group(group, least=3)) == 2
    with pytest.raises(UserError, match="2 groups of 3 samples or more, expected 3"):
        splits.by_group(group, 3, least=3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda y: splits.dirichlet(y, 5, 0.0, 1), "alpha: 0.0, expected above 0"),
        (lambda y: splits.dirichlet(y, 601, 1.0, 1), "601 boards for 600 samples"),
        (lambda y: splits.dirichlet(np.zeros((9, 2)), 3, 1.0, 1), "give alpha inf"),
        (lambda y: splits.held_out(y, 1.0, 1), "expected above 0 and below 1"),
        (lambda y: splits.held_out(y[:2], 0.1, 1), "give more samples"),
        (lambda y: attacks.parse("label-flip"), "expected label-flip:SHARE"),
        (lambda y: attacks.parse("scale:0.2"), "expected label-flip:SHARE"),
        (lambda y: attacks.parse("scale:x:0.2"), "not the numbers it takes"),
        (lambda y: attacks.parse("scale:-10:1.5"), "share of liars: 1.5"),
        (lambda y: attacks.parse("scale:nan:0.2"), "factor nan"),
        (lambda y: attacks.parse("noise:0.2"), "expected label-flip:SHARE"),
    ],
)
def test_what_cannot_be_split_or_attacked(labels: NDArray[np.int64], call, said: str) -> None:  # type: ignore[no-untyped-def]
    """One sentence for each."""
    with pytest.raises(UserError, match=re.escape(said)):
        call(labels)


# ---- Liars and virtual boards ----------------------------------------------------------------------------------------


def test_attacks_by_name() -> None:
    """A share of the boards, the same for the same seed; turned labels; multiplied differences."""
    flip, scale = attacks.parse("label-flip:5:0.2"), attacks.parse("scale:-2.5:0.1")
    assert flip == attacks.Attack("label-flip", 5.0, 0.2) and attacks.parse("label-flip:0.2").factor == 1
    assert len(flip.liars(20, 1)) == 4 and flip.liars(20, 1) == flip.liars(20, 1) != flip.liars(20, 2)
    assert len(scale.liars(3, 1)) == 1
    y = np.array([0, 3, 9], np.uint16)
    assert flip.labels(y, 10).tolist() == [9, 6, 0] and flip.labels(y, 10).dtype == y.dtype
    assert scale.labels(y, 10) is y
    assert scale.lie(np.array([1, -1, 3, 10, 0])).tolist() == [-3, 3, -8, -25, 0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[worlds.Data, Path]:
    """Tilted digits, and the plan's file."""
    data = worlds.digits(0)
    return data, worlds.put(data, tmp_path_factory.mktemp("plan"))


def training(board: VirtualBoard, **more: object) -> bytes:
    """A task for a board."""
    ids = {"model_id": bytes(board.model.model_id), "base_id": board.base_id}
    fields = {"encoding": 1, "job": 7, "round": 1, "seed": 11, "epochs": 2, "rate_mantissa": 1600, "rate_exponent": -14}
    return bytes(wire.make(kind=wire.TRAIN, **ids, **fields | more))


def test_a_virtual_board_is_a_board(digits: tuple[worlds.Data, Path], tmp_path: Path) -> None:
    """Its answers are those of the board's code; what it has applied is there when it is started again."""
    data, plan = digits
    own = data.samples(np.arange(30))
    board = VirtualBoard(tmp_path / "b", plan, own, data.samples(np.arange(30, 40)), step_us=123, link=456)
    answer = board.answer(training(board))
    model = ulearn.load(str(plan))
    ulearn.Trainer(model, learning_rate=1600 * 2**-14, seed=11, skip=0).fit(
        ([bytes(x) for x in own.x], own.y.tolist()), 2
    )
    assert answer == bytes(model.update(30))
    model.apply(answer)
    board.take("update", answer, bytes(model.base_id))
    again = VirtualBoard(tmp_path / "b", plan, own)
    assert again.base_id == board.base_id == bytes(model.base_id) != bytes(ulearn.load(data.plan).base_id)
    other = VirtualBoard(tmp_path / "c", plan, own)
    other.take("full", bytes(model.train_blob), bytes(model.base_id))
    assert other.answer(training(other)) == again.answer(training(again))
    with pytest.raises(ValueError, match="another base"):
        VirtualBoard(tmp_path / "d", plan, own).take("update", again.answer(training(again)), b"")


@pytest.mark.parametrize("encoding", ["dense", "int8"])
def test_a_liar_multiplies_what_it_learned(digits: tuple[worlds.Data, Path], tmp_path: Path, encoding: str) -> None:
    """Its update is the honest one times the factor, in the encoding that was asked for; another one learns from turned
    labels."""
    data, plan = digits
    own = data.samples(np.arange(30))
    facts = PlanFacts(plan)
    learned = {}
    for name in ("none", "scale:-3:0.5", "label-flip:0.5", "label-flip:2:0.5"):
        attack = None if name == "none" else attacks.parse(name)
        board = VirtualBoard(tmp_path / name, plan, own, attack=attack)
        learned[name] = aggregate.decode(board.answer(training(board, encoding=1 + (encoding == "int8"))), facts.table)
    values = {name: update.values for name, update in learned.items()}
    assert {update.num_samples for update in learned.values()} == {30}
    slack = 0 if encoding == "dense" else 3 * 2 ** max(0, int(np.abs(values["none"]).max()).bit_length() - 6)
    assert np.abs(values["scale:-3:0.5"] + 3 * values["none"]).max() <= slack
    assert np.abs(values["label-flip:2:0.5"] - 2 * values["label-flip:0.5"]).max() <= slack
    turned = replace(own, y=(9 - own.y).astype(np.uint16))
    board = VirtualBoard(tmp_path / "turned", plan, turned)
    assert (
        board.answer(training(board))[68:-4]
        == VirtualBoard(tmp_path / "flips", plan, own, attack=attacks.parse("label-flip:0.5")).answer(training(board))[
            68:-4
        ]
    )


# ---- Whole jobs ------------------------------------------------------------------------------------------------------


def tilted(digits: tuple[worlds.Data, Path], boards: int = BOARDS, alpha: float = math.inf, **more: object) -> World:
    """A fleet of tilted digits."""
    data, plan = digits
    pool, judges = splits.held_out(data.labels, 0.35, 0)
    parts = splits.dirichlet(data.labels[pool], boards, alpha, 0)
    return World(plan, tuple(data.samples(pool[p]) for p in parts), data.samples(judges), **more)  # type: ignore[arg-type]


def job(rounds: int, goal: int = BOARDS, **more: object) -> Job:
    """All boards in every round, unless more says otherwise."""
    given = {"over": 1.0, "epochs": 2, "learning_rate": 0.1, "retry_s": 1.0} | more
    return Job("test", rounds, goal, **given)  # type: ignore[arg-type]


def test_the_same_in_any_number_of_processes(digits: tuple[worlds.Data, Path]) -> None:
    """Dropouts, stragglers, liars and all: rounds, times, bytes, scores and the model to the bit; not so of a seed."""
    world = tilted(digits, 12, 1.0, dropout=0.2, stragglers=0.2, attack=attacks.parse("scale:-2:0.1"))
    asked = job(4, 6, over=1.5, up="top-k:100", error_feedback=True)
    ticks: list[tuple[int, int]] = []
    one = simulation.run(world, asked, 1, lambda done, total: ticks.append((done, total)))
    three = simulation.run(world, asked, 3)
    assert one.rounds == three.rounds and one.blob == three.blob and one == three
    assert ticks == [(i, 4) for i in range(1, 5)]
    assert len(one.committed) == 4 and all(4 < len(r.boards) <= 6 <= r.asked <= 9 for r in one.committed)
    other = simulation.run(replace(world, seed=2), asked, 1)
    assert [r.seconds for r in other.rounds] != [r.seconds for r in one.rounds]


def by_hand(world: World, asked: Job, result: Result, folder: Path) -> bytes:
    """The final weights once more: each round's boards train one after the other, and the exact mean is applied."""
    facts, fleet = PlanFacts(world.plan), ulearn.load(world.plan.read_bytes())
    boards = {name_of(i): VirtualBoard(folder / str(i), world.plan, own) for i, own in enumerate(world.boards)}
    known: dict[str, bytes] = {}
    for turn in result.committed:
        updates = []
        for name in turn.boards:
            board = boards[name]
            board.take("full", bytes(fleet.train_blob), bytes(fleet.base_id))
            known[name] = training(
                board,
                round=turn.round,
                seed=asked.training_seed(turn.round, name),
                skip=round(asked.skip * 65536),
                epochs=asked.epochs,
                rate_mantissa=1638,
                rate_exponent=-14,
            )
            updates.append(aggregate.decode(board.answer(known[name]), facts.table))
        fleet.apply(aggregate.encode(aggregate.fedavg(updates), facts.table))
    return bytes(fleet.train_blob)


def test_a_fleet_is_what_its_rounds_make_it(digits: tuple[worlds.Data, Path], tmp_path: Path) -> None:
    """Recomputed from who took part, by the board's code alone, the model is the same to the bit; it has learned."""
    world, asked = tilted(digits, stragglers=0.3, dropout=0.1), job(6, 6, over=1.5)
    result = simulation.run(world, asked, 1)
    assert by_hand(world, asked, result, tmp_path) == result.blob
    assert result.after > result.before + 0.3
    assert result.after == pytest.approx(digits[0].right(result.blob, _judges(digits)) / 100)
    assert sum(r.late for r in result.rounds) and len({r.boards for r in result.committed}) > 1
    dense = aggregate.update_bytes(PlanFacts(world.plan).table, "dense")
    assert all((r.longest, r.update_bytes) == (dense, dense * len(r.boards)) for r in result.committed)


def _judges(digits: tuple[worlds.Data, Path]) -> worlds.Indices:
    return splits.held_out(digits[0].labels, 0.35, 0)[1]


def test_a_fleet_that_learns_numbers(tmp_path: Path) -> None:
    """Of a regression the score is the mean squared error in real units; it falls, in any number of processes alike."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (200, 3))
    y = np.stack([x[:, 0] - x[:, 1], x[:, 2] * 0.5], axis=1)
    layers = [FloatDense(np.array([[1.5, -1.0, 0.5], [0.5, 0.5, 1.5]]), np.zeros(2), False)]  # its range holds y
    plan = prepare(layers, x, y, loss="mse", options=Options("full"))
    (tmp_path / "line.ulm").write_bytes(plan.data)
    facts = PlanFacts(tmp_path / "line.ulm")
    samples = facts.samples(x, y, "line")
    parts = splits.dirichlet(samples.y[:150], 5, math.inf, 1)
    boards = tuple(Samples(samples.x[p], samples.y[p]) for p in parts)
    world = World(facts.path, boards, Samples(samples.x[150:], samples.y[150:]))
    one, two = (simulation.run(world, job(3, 5, learning_rate=0.1), count) for count in (1, 2))
    assert one == two and not one.labelled
    model = ulearn.load(plan.data)
    found = [(np.array(model.predict(code)) - target) ** 2 for code, target in zip(world.test.x, y[150:], strict=True)]
    assert one.before == pytest.approx(np.mean(found), rel=0.05)
    assert one.after < one.before / 2


def test_rounds_that_never_end_are_given_up(digits: tuple[worlds.Data, Path]) -> None:
    """With a deadline that nobody meets no round is committed, and the simulation says why."""
    with pytest.raises(UserError, match=r"0 rounds were committed and \d+ given up.*updates in time"):
        simulation.run(tilted(digits, 3), job(1, 3, deadline_s=0.01), 1)
    with pytest.raises(UserError, match="dropout: 1.0"):
        tilted(digits, dropout=1.0)


@pytest.fixture(scope="module")
def attacked(digits: tuple[worlds.Data, Path]) -> dict[tuple[str, str], float]:
    """Percent right after eight rounds, by rule and attack: two of ten boards lie."""
    found = {}
    for rule in ("mean", "median", "trimmed-mean:0.2", "multi-krum:2"):
        for attack in ("none", *LIES):
            lies = None if attack == "none" else attacks.parse(attack)
            result = simulation.run(tilted(digits, attack=lies), job(8, rule=rule), 1)
            found[rule, attack] = 100 * result.late_mean(3)
    print(found)
    return found


@pytest.mark.parametrize("attack", LIES)
@pytest.mark.parametrize("rule", ["median", "trimmed-mean:0.2", "multi-krum:2"])
def test_liars_ruin_the_mean_alone(attacked: dict[tuple[str, str], float], rule: str, attack: str) -> None:
    """Where boosted updates from turned labels, or reversed ones, cost the plain mean ten points, the others lose two
    at most."""
    assert attacked["mean", "none"] - attacked["mean", attack] >= RUINOUS
    assert attacked[rule, "none"] - attacked[rule, attack] <= BEARABLE
    assert attacked[rule, "none"] >= attacked["mean", "none"] - BEARABLE


# ---- Keywords by speaker ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["last", "sparse"])
def test_what_comes_behind_the_frozen_part_gives_the_same_bits(shared_data: Path, scheme: str) -> None:
    """A fleet of four speakers on codes from the border, and on whole clips."""
    learned, judged = worlds.halves(speakers.frequent(worlds.clips())[:4], 1)
    asked = job(2, 4, epochs=1)
    blobs = []
    for whole in (False, True):
        result = fleet_accuracy.fleet(worlds.keywords(scheme, whole=whole), learned, judged[0], asked)
        blobs.append((result.blob, result.after))
    assert blobs[0] == blobs[1] and blobs[0][0] != bytes(ulearn.load(worlds.keywords(scheme).plan).train_blob)


def test_integers_end_where_float32_ends(shared_data: Path) -> None:
    """Twelve speakers' fleet, the last layer: within a point of the same job in float32, and above the frozen plan."""
    learned, judged = worlds.halves(speakers.frequent(worlds.clips())[:12], 1)
    judges, asked = np.concatenate(judged), job(5, 12, epochs=1, learning_rate=0.3)
    data = worlds.keywords("last")
    result = fleet_accuracy.fleet(data, learned, judges, asked)
    net = worlds.FloatBoards("last", learned, asked)
    before = net.right(judges)
    weights = list(float_fleet.run(net, asked, result.rounds, [len(own) for own in learned]))
    print(
        f"float {before:.2f} to {net.right(judges):.2f}, integers {100 * result.before:.2f} to {100 * result.after:.2f}"
    )
    assert len(weights) == 5 and np.array_equal(net.weights(), weights[-1])
    assert abs(net.right(judges) - 100 * result.after) <= 1.0
    assert result.after > result.before + 0.01
    with pytest.raises(UserError, match="no server momentum"):
        next(float_fleet.run(net, replace(asked, server="momentum:0.9"), result.rounds, [1] * 12))


def test_a_quarter_of_a_kilobyte_is_enough(shared_data: Path) -> None:
    """A layer begun anew from updates of 256 bytes at most loses a point at most against dense ones of 1,652."""
    learned, judged = worlds.halves(speakers.frequent(worlds.clips())[:16], 1)
    data, judges = worlds.keywords("last", anew=True), np.concatenate(judged)
    small = f"top-k:{aggregate.most_kept(fleet_accuracy.keyword_plan().table, 'top-k', fleet_accuracy.LIMIT)}"
    after, longest = {}, {}
    for up, feedback in (("dense", False), (small, True)):
        asked = job(10, 16, epochs=1, learning_rate=0.3, up=up, error_feedback=feedback)
        result = fleet_accuracy.fleet(data, learned, judges, asked)
        after[up], longest[up] = 100 * result.late_mean(3), max(r.longest for r in result.rounds)
    print(after, longest)
    assert longest["dense"] == 1652 and 250 < longest[small] <= fleet_accuracy.LIMIT
    assert after[small] >= after["dense"] - 1.0 > 80


# ---- Bucketing -------------------------------------------------------------------------------------------------------


def test_buckets_are_means_of_clients() -> None:
    """Every client is in one bucket; the order of clients changes no bit; a rule takes the means."""
    updates = np.random.default_rng(1).normal(size=(11, 4))
    means, counts = bucketing.buckets(updates, 2)
    assert means.shape == (6, 4) and sorted(counts.tolist()) == [1, 2, 2, 2, 2, 2]
    assert np.allclose((means * counts[:, None]).sum(axis=0), updates.sum(axis=0))
    mixed = updates[np.random.default_rng(2).permutation(11)]
    assert np.array_equal(bucketing.buckets(mixed, 2)[0], means)
    assert np.array_equal(rule_names.parse("bucketed:2:median")(mixed, np.ones(11)), rules.median(means))
    assert np.array_equal(rule_names.parse("bucketed:1:trimmed-mean:0.2")(mixed, np.ones(11)),
                          rules.trimmed_mean(updates, 0.2))  # fmt: skip
    assert np.allclose(rule_names.parse("bucketed:2:mean")(updates, np.ones(11)), updates.mean(axis=0))
    weights = np.array([1.0] * 10 + [0.0])
    assert np.array_equal(rule_names.parse("bucketed:2:median")(updates, weights),
                          rules.median(bucketing.buckets(updates[:10], 2)[0]))  # fmt: skip


def test_buckets_help_where_boards_differ() -> None:
    """Two fifths know a coordinate and a fifth lies: the median forgets what few know, that of buckets less."""
    rng = np.random.default_rng(0)
    honest = np.where(rng.random((40, 400)) < 0.4, 1.0, 0.0)
    updates = np.concatenate([honest, -10 * np.ones((10, 400))])
    plain, bucketed = (rule_names.parse(name)(updates, np.ones(50)) for name in ("median", "bucketed:2:median"))
    assert np.abs(bucketed - 0.4).mean() < np.abs(plain - 0.4).mean()


@pytest.mark.parametrize("text", ["bucketed", "bucketed:2", "bucketed:x:median", "bucketed:0:median",
                                  "bucketed:2:bucketed:2:median", "bucketed:2:none"])  # fmt: skip
def test_buckets_that_make_no_sense(text: str) -> None:
    """Refused by name."""
    with pytest.raises(UserError, match="bucket|expected one of"):
        rule_names.parse(text)


# ---- Pictures, measurements and the command --------------------------------------------------------------------------


def test_pictures(tmp_path: Path) -> None:
    """HTML that needs nothing else and has every number, and a PNG; other files are refused."""
    curves = [
        simulation_plot.Curve("one <two>", (50.0, 71.25, 80.0), (0, 1000, 2000), (0, 500, 1500)),
        simulation_plot.Curve("b", (50.0, 60.0), (0, 10, 20), (0, 5, 15)),
    ]
    for name in ("fleet.html", "fleet.png"):
        simulation_plot.write(tmp_path / name, curves, "A & B")
    page = (tmp_path / "fleet.html").read_text()
    assert "one &lt;two&gt;" in page and "A &amp; B" in page and "71.25" in page and "2,000" in page
    assert "http" not in page.replace("http-equiv", "") and page.count("<polyline") == 6
    assert (tmp_path / "fleet.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"\.html or \.png"):
        simulation_plot.write(tmp_path / "fleet.gif", curves, "")
    assert simulation_plot.marks(0, 30) == [0, 5, 10, 15, 20, 25, 30]
    assert all(low <= m <= high for low, high in ((-3.2, 4.0), (32.1, 95.3)) for m in simulation_plot.marks(low, high))


def test_a_measurement_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the file is not done again, and half a line counts for nothing; tables come from the numbers."""
    settings, calls = replace(fleet_accuracy.SHORT, rates={"last": (0.1, 0.3)}), []

    def measured(scheme: str, seed: int, half: int, rate: float) -> dict[str, float]:
        calls.append(rate)
        keys = [f"{who} {when} {kind}" for who in ("own", "strange") for when in ("before", "after")
                for kind in ("int", "float")]  # fmt: skip
        # Integers do best at 0.3, floats at 0.1.
        best = {"int": 0.3, "float": 0.1}
        return {k: 90.0 + half + (rate == best[k.rsplit(" ", 1)[1]]) for k in keys} | {"clips": 22.0}

    monkeypatch.setattr(fleet_accuracy, "accuracy", measured)
    path = tmp_path / "done.jsonl"
    shown = fleet_accuracy.text("fleet-accuracy", settings, path)
    assert len(calls) == 4 and "| last |" in shown and "0.1 (2)" in shown and "+0.00 ± 0.00" in shown
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20]]))
    assert fleet_accuracy.text("fleet-accuracy", settings, path) == shown
    assert len(calls) == 5 and len(fleet_accuracy.known(path)) == 4


@pytest.fixture(scope="module")
def files(digits: tuple[worlds.Data, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The plan, and samples in real units with groups."""
    data, plan = digits
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    real = PlanFacts(plan).input.real(data.codes[:500])
    np.savez(path, x=real, y=data.labels[:500], group=np.arange(500) % 9)
    return plan, path


def test_simulate_as_a_user_runs_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A table and a picture; JSON of the same run; a plan that is what the run ended with."""
    plan, data = files
    usual = ["simulate", plan, "--data", data, "--boards", 12, "--rounds", 3, "--alpha", 0.5, "--dropout", 0.1,
             "--stragglers", 0.1, "--lr", 0.1, "--rule", "median", "--attack", "label-flip:5:0.1"]  # fmt: skip
    shown = run(*usual, "--plot", tmp_path / "fleet.html", "--processes", 1)
    told = json.loads(run(*usual, "--json", "--processes", 2, "--out", tmp_path / "fleet.ulm").stdout)
    assert told["boards"] == 12 and told["liars"] == 1 and told["samples"] + told["tested_on"] == 500
    assert sum(r["state"] == "committed" for r in told["rounds"]) == 3
    assert f"{100 * told['before']:.1f} % before, {100 * told['after']:.1f} % after" in shown.stdout
    assert "<svg" in (tmp_path / "fleet.html").read_text()
    assert told["parameters"] == len(PlanFacts(plan).steps) and told["job"]["rule"] == "median"
    assert ulearn.load(str(tmp_path / "fleet.ulm")).train_blob != ulearn.load(str(plan)).train_blob
    grouped = json.loads(
        run("simulate", plan, "--data", data, "--by-group", "--rounds", 1, "--json", "--processes", 1).stdout
    )
    assert grouped["boards"] == 9 and grouped["skew"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by-group", "--alpha", "1"], "give one of the two"),
        (["--attack", "noise:0.2"], "expected label-flip:SHARE"),
        (["--boards", "400"], "400 boards for 375 samples"),
        (["--goal", "30"], "--goal 30 updates of 20 boards"),
        (["--plot", "fleet.gif"], "drawn as .html or .png"),
        (["--rule", "multi-krum:9"], "Krum against 9 liars"),
        (["--up", "top-k"], "expected dense, int8"),
    ],
)
def test_simulations_that_are_refused(files: tuple[Path, Path], arguments: list[str], said: str) -> None:
    """One sentence for each."""
    result = CliRunner().invoke(cli.app, ["simulate", str(files[0]), "--data", str(files[1]), *arguments])
    assert isinstance(result.exception, UserError) and said in str(result.exception)
