"""The `ulearn` command as a user runs it: every station over real ports, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ulearn
from ulearn_host import emulate
from ulearn_host import fleet as fleet_module


def run(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command; it must not print a traceback, and fail only where that is expected."""
    command = [sys.executable, "-m", "ulearn_host.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert (done.returncode != 0) == fails, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained classifier, calibration samples and samples of two users."""
    folder = tmp_path_factory.mktemp("work")
    x, y = load_digits(return_X_y=True)
    x = x / 16
    model = MLPClassifier((24,), max_iter=40, random_state=0).fit(x[:600], y[:600])
    joblib.dump(model, folder / "digits.joblib")
    scaled = make_pipeline(StandardScaler(), MLPClassifier((24,), max_iter=40, random_state=0)).fit(x[:600], y[:600])
    joblib.dump(scaled, folder / "scaled.joblib")
    np.savez(folder / "calibration.npz", x=x[:200], y=y[:200])
    for i, part in enumerate((slice(600, 760), slice(760, 920))):
        tilted = np.roll(x[part].reshape(-1, 8, 8), i + 1, axis=2).reshape(-1, 64)
        np.savez(folder / f"user{i}.npz", x=tilted, y=y[part])
    run("prepare", folder / "digits.joblib", "--calibration", folder / "calibration.npz", "--scheme", "full")
    return folder


@pytest.mark.parametrize(("name", "agreement", "loss"), [("digits", 0.97, 0.01), ("scaled", 0.92, 0.02)])
def test_prepared_plan_is_the_network(work: Path, name: str, agreement: float, loss: float) -> None:
    """The int8 plan predicts what the float network predicts, nearly always, and loses next to no accuracy.

    `scaled`: a StandardScaler is folded in, whose hardly used pixels ask for weights a hundred times larger.
    """
    model = joblib.load(work / f"{name}.joblib")
    run("prepare", work / f"{name}.joblib", "--calibration", work / "calibration.npz", "-o", work / "same.ulm")
    x, y = load_digits(return_X_y=True)
    x, y = x[600:] / 16, y[600:]
    plan = ulearn.load(str(work / "same.ulm"))
    got, wanted = np.array([plan.predict(sample) for sample in x]), model.predict(x)
    assert np.mean(got == wanted) >= agreement
    assert np.mean(got == y) >= np.mean(wanted == y) - loss
    assert plan.meta["labels"] == [str(i) for i in range(10)]


def test_inspect(work: Path) -> None:
    """A table for people, the same numbers as JSON for scripts."""
    facts = json.loads(run("inspect", work / "digits.ulm", "--json").stdout)
    assert facts["flash_bytes"] == (work / "digits.ulm").stat().st_size
    assert facts["macs"]["forward"] == 64 * 24 + 24 * 10
    assert facts["meta"]["scheme"] == "full" and len(facts["tensors"]) == 4
    shown = run("inspect", work / "digits.ulm").stdout
    assert "dense_1" in shown and f"{facts['ram_bytes']:,}" in shown


@pytest.mark.parametrize("scheme", ["last", "bias", "last+bias", "full"])
def test_npz(work: Path, scheme: str) -> None:
    """Plain float weights in either orientation give one plan; int8 weights take less RAM than int16."""
    model = joblib.load(work / "digits.joblib")
    upright = {f"w{i}": w for i, w in enumerate(model.coefs_)} | {f"b{i}": b for i, b in enumerate(model.intercepts_)}
    np.savez(work / "a.npz", **upright)
    np.savez(work / "b.npz", **{k: v.T for k, v in upright.items()})
    for name in "ab":
        run("prepare", work / f"{name}.npz", "--calibration", work / "calibration.npz", "--scheme", scheme)
    a, b = (ulearn.load(str(work / f"{name}.ulm")) for name in "ab")
    assert a.model_id == b.model_id and a.train_blob == b.train_blob
    run("prepare", work / "a.npz", "--calibration", work / "calibration.npz", "--scheme", scheme, "--weights", "int8")
    small = ulearn.load(str(work / "a.ulm"))
    assert len(small.train_blob) < len(b.train_blob) or scheme == "bias"


def test_regression_learns(tmp_path: Path) -> None:
    """A regressor by mean squared error: the loss on new samples falls."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (600, 6))
    y = np.stack([x[:, 0] + 0.5 * x[:, 1], np.maximum(x[:, 2], x[:, 3])], axis=1)
    model = MLPRegressor(hidden_layer_sizes=(24,), max_iter=300, random_state=0).fit(x[:300], y[:300])
    joblib.dump(model, tmp_path / "r.pkl")
    np.savez(tmp_path / "c.npz", x=x[:200], y=y[:200] * 1.3)
    run("prepare", tmp_path / "r.pkl", "--calibration", tmp_path / "c.npz", "--scheme", "last+bias")
    plan = ulearn.load(str(tmp_path / "r.ulm"))

    def error() -> float:
        return float(
            np.mean([(np.array(plan.predict(a)) - b) ** 2 for a, b in zip(x[400:], 1.3 * y[400:], strict=True)])
        )

    before = error()
    trainer = ulearn.Trainer(plan, learning_rate=0.05)
    trainer.fit((x[:400].tolist(), (1.3 * y[:400]).tolist()), epochs=4)
    assert error() < 0.6 * before


def test_two_boards(work: Path, tmp_path: Path) -> None:
    """deploy, evaluate, train and federate on two Unix-port boards; the fleet's plan holds what they learned."""
    plan = work / "digits.ulm"
    with ExitStack() as stack:
        ports = [stack.enter_context(emulate.start("UNIX")).port for _ in range(2)]
        for port in ports:
            assert json.loads(run("deploy", plan, "--port", port, "--json").stdout)["board"]["architecture"] == "x64"
        users = [work / "user0.npz", work / "user1.npz"]
        score = json.loads(run("evaluate", plan, "--port", ports[0], "--data", users[0], "--json").stdout)
        assert score["samples"] == 160
        local = ulearn.load(str(plan))
        with np.load(users[0]) as data:
            right = sum(local.predict(x) == y for x, y in zip(data["x"], data["y"], strict=True))
        assert score["right"] == right
        learned = json.loads(run("train", plan, "-p", ports[0], "--data", users[0], "--json").stdout)
        assert learned["after"] > learned["before"] + 0.1
        both = [a for port, user in zip(ports, users, strict=True) for a in ("-p", port, "--data", user)]
        out = tmp_path / "fleet.ulm"
        both += ["--fleet", tmp_path / "fleet", "-o", out, "--json"]
        job = ["federate", plan, *both, "--rounds", 4, "--epochs", 2]
        shown = [json.loads(line) for line in run(*job).stdout.splitlines()]
        assert [line["round"] for line in shown[:-1]] == [1, 2, 3, 4]
        fleet = shown[-1]
        assert fleet["after"] > fleet["before"] + 0.1
        # A job that is done is not done again; another one begins with the plan, whatever the boards have now.
        assert json.loads(run(*job).stdout.splitlines()[-1]) == fleet
        assert "another job" in run("federate", plan, *both, "--rounds", 5, fails=True).stderr
        second = json.loads(run("federate", plan, *both, "--rounds", 1, "--job", "two").stdout.splitlines()[-1])
        assert second["before"] == pytest.approx(fleet["before"]) and second["base_id"] != fleet["base_id"]
        only = ["--rounds", 0, "--job", "score", "-o", tmp_path / "same.ulm"]
        scored = json.loads(run("federate", plan, *both, *only).stdout.splitlines()[-1])
        assert scored["before"] == pytest.approx(fleet["before"]) and scored["after"] is None
        log = run("audit", tmp_path / "fleet" / "two", "--json").stdout.splitlines()
        assert {"create", "select", "update", "commit", "done"} <= {json.loads(line).get("event") for line in log}
        fleet = second
        rights = 0
        for user in users:
            facts = fleet_module.PlanFacts(out)
            with np.load(user) as data:
                _, test = fleet_module.split(facts.samples(data["x"], data["y"], ""), 0.25, 1)
            model = ulearn.load(str(out))
            rights += sum(model.predict(x) == y for x, y in zip(test.x, test.y, strict=True))
        assert rights / 80 == pytest.approx(fleet["after"])


def test_search_within_a_budget(work: Path, tmp_path: Path) -> None:
    """--ram measures what pays, resumes from its file, and says what it chose, what it costs and how to load it."""
    plan = tmp_path / "d.ulm"
    with np.load(work / "user0.npz") as data:
        x, y = data["x"][:96], data["y"][:96]
    np.savez(tmp_path / "mine.npz", x=x, y=y, group=np.repeat(["ann", "bob", "cem"], 32))
    command = ["prepare", work / "digits.joblib", "--calibration", tmp_path / "mine.npz", "--ram", "96k", "-o", plan]
    shown = run(*command, "--buffer", 10)
    cache = tmp_path / "d.ulm.search.jsonl"
    assert str(cache) in shown.stderr and len(cache.read_text().splitlines()) >= 5
    for words in ("RAM of the board", "98,304", "before training", "learning rate", "dense_2", 'ulearn.load("d.ulm"'):
        assert words in shown.stdout, words
    measured = cache.read_bytes()
    found = json.loads(run(*command, "--buffer", 10, "--json").stdout)
    assert cache.read_bytes() == measured
    assert found["scheme"] == "sparse" and found["search"]["ram"]["total"] <= 98304
    assert found["search"]["place"] == "ram" and found["search"]["contributions"]["units"] == 3
    model = ulearn.load(str(plan))
    assert model.training is not None
    assert found["learning_rate"] == pytest.approx(found["search"]["learning_rate"], rel=1e-3)
    streamed = json.loads(run(*command, "--place", "stream", "--gradients", "int8", "--json").stdout)
    assert streamed["search"]["place"] == "stream" and streamed["gradients"] == "int8"


def test_learning_rate(work: Path, tmp_path: Path) -> None:
    """Given, measured on samples that there is something to learn from, or the scheme's."""
    command = ["prepare", work / "digits.joblib", "--calibration", work / "user0.npz", "-o", tmp_path / "r.ulm"]
    given = json.loads(run(*command, "--lr", 0.07, "--json").stdout)
    assert given["learning_rate"] == pytest.approx(0.07, rel=1e-3) and given["tuning"]["source"] == "given"
    assert fleet_module.PlanFacts(tmp_path / "r.ulm").learning_rate == pytest.approx(0.07, rel=1e-3)
    found = json.loads(run(*command, "--json").stdout)
    assert found["tuning"]["source"] == "measured" and found["tuning"]["after"] > found["tuning"]["before"]
    assert "the best of" in run(*command).stdout
    own = json.loads(run(*command, "--no-tune", "--json").stdout)
    assert own["tuning"]["source"] == "scheme" and own["learning_rate"] == pytest.approx(0.03, rel=1e-3)
    known = run("prepare", work / "digits.joblib", "--calibration", work / "calibration.npz", "-o", tmp_path / "k.ulm")
    assert "the scheme's own" in known.stdout and "gained too little" in known.stdout
    chosen = json.loads(run(*command, "--layers", "dense_2=4+bias,dense_1=bias", "--layerwise", "--json").stdout)
    assert chosen["scheme"] == "sparse" and chosen["layerwise"] and "dense_1/bias" in chosen["trains"]
    assert len(ulearn.load(str(tmp_path / "r.ulm")).trainings) == 2


def mistakes(work: Path) -> list[tuple[tuple[object, ...], str]]:
    """Commands that cannot work, and a word that their message must have."""
    x = np.zeros((5, 64))
    files = {
        "bad.npz": b"not an archive",
        "cut.ulm": (work / "digits.ulm").read_bytes()[:100],
    }
    for name, content in files.items():
        (work / name).write_bytes(content)
    np.savez(work / "nothing.npz", z=x)
    np.savez(work / "narrow.npz", x=x[:, :10], y=np.zeros(5, int))
    np.savez(work / "infinite.npz", x=x + np.inf, y=np.zeros(5, int))
    np.savez(work / "labels.npz", x=x, y=np.full(5, 77))
    np.savez(work / "scalar.npz", x=np.float64(3))
    np.savez(work / "words.npz", x=np.full((5, 64), "word"))
    np.savez(work / "halves.npz", x=x, y=np.full(5, 0.5))
    with (work / "bare.npz").open("wb") as file:
        np.save(file, x)
    (work / "folder").mkdir(exist_ok=True)
    joblib.dump(LogisticRegression(), work / "other.pkl")
    joblib.dump(MLPClassifier(), work / "unfitted.pkl")
    joblib.dump(MLPClassifier((4,), activation="tanh", max_iter=1).fit(x, [0, 1, 0, 1, 0]), work / "tanh.pkl")
    good = work / "calibration.npz"
    digits = ("prepare", work / "digits.joblib", "--calibration", good, "-o", work / "never.ulm")
    np.savez(work / "bare_x.npz", x=np.random.default_rng(0).uniform(0, 1, (30, 64)))
    np.savez(work / "few_groups.npz", x=x, y=np.arange(5), group=np.arange(4))
    return [
        ((*digits, "--ram", "lots"), "e.g. 96k"),
        ((*digits, "--ram", "40k"), "too few even to train the last layer"),
        ((*digits, "--ram", "96k", "--scheme", "last"), "give one of the two"),
        ((*digits, "--ram", "96k", "--layers", "dense_1=all"), "give one of the two"),
        ((*digits, "--ram", "96k", "--no-tune"), "--learning-rate"),
        ((*digits, "--ram", "96k", "--place", "moon"), "in-place"),
        ((*digits, "--ram", "96k", "--buffer", "-1"), "--buffer"),
        ((*digits, "--buffer", "10"), "--ram 96k"),
        ((*digits, "--restart"), "--ram 96k"),
        ((*digits, "--place", "ram"), "--ram 96k"),
        ((*digits, "--scheme", "sparse"), "--layers"),
        ((*digits, "--layers", "conv=all"), "dense_1, dense_2"),
        ((*digits, "--layers", "dense_1=all", "--scheme", "full"), "give one of the two"),
        ((*digits, "--gradients", "int4"), "int16, int8"),
        ((*digits, "--lr", "0"), "--learning-rate"),
        ((*digits, "--loss", "l1"), "softmax_ce, mse, hinge"),
        (("prepare", work / "digits.joblib", "--calibration", work / "bare_x.npz", "--ram", "96k"), "x and y"),
        (("prepare", work / "digits.joblib", "--ram", "96k"), "x and y"),
        (("prepare", work / "digits.joblib", "--calibration", work / "few_groups.npz"), "each of 5 samples"),
        (("prepare", work / "missing.npz", "--calibration", good), "no such file"),
        (("prepare", work / "bad.npz", "--calibration", good), "npz"),
        (("prepare", work / "nothing.npz", "--calibration", good), "w0"),
        (("prepare", work / "model.tflite", "--calibration", good), "no such file"),
        (("prepare", work / "other.pkl", "--calibration", good), "LogisticRegression"),
        (("prepare", work / "unfitted.pkl", "--calibration", good), "fit()"),
        (("prepare", work / "tanh.pkl", "--calibration", good), "tanh"),
        (("prepare", work / "digits.joblib", "--calibration", work / "narrow.npz"), "shape"),
        (("prepare", work / "digits.joblib", "--calibration", work / "infinite.npz"), "finite"),
        (("prepare", work / "digits.joblib", "--calibration", work / "labels.npz"), "labels"),
        (("prepare", work / "digits.joblib", "--calibration", good, "--scheme", "sparse"), "scheme"),
        (("prepare", work / "digits.joblib", "--calibration", good, "--weights", "int4"), "weights"),
        (("inspect", work / "missing.ulm"), "no such file"),
        (("inspect", work / "cut.ulm"), "cut.ulm"),
        (("inspect", work / "bad.npz"), "bad.npz"),
        (("deploy", work / "digits.ulm", "--port", "/dev/ttyNOWHERE"), "ttyNOWHERE"),
        (("evaluate", work / "digits.ulm", "-p", "/dev/ttyNOWHERE", "--data", good), "ttyNOWHERE"),
        (("evaluate", work / "digits.ulm", "-p", "x", "--data", work / "narrow.npz"), "64"),
        (("train", work / "digits.ulm", "-p", "x", "--data", work / "labels.npz"), "labels"),
        (("inspect", work), "directory"),
        (("evaluate", work, "-p", "x", "--data", good), "directory"),
        (("prepare", work / "digits.joblib", "--calibration", work / "scalar.npz"), "shape"),
        (("prepare", work / "digits.joblib", "--calibration", work / "words.npz"), "numbers"),
        (("prepare", work / "digits.joblib", "--calibration", work / "bare.npz"), "bare"),
        (("prepare", work / "digits.joblib", "--calibration", good, "-o", work / "none" / "x.ulm"), "x.ulm"),
        (("prepare", work / "digits.joblib", "--calibration", good, "-o", work / "folder"), "folder"),
        (("prepare", work / "digits.joblib", "--calibration", good, "--loss", "mse"), "targets"),
        (("evaluate", work / "digits.ulm", "-p", "x", "--data", work / "halves.npz"), "no labels"),
        (("train", work / "digits.ulm", "-p", "x", "--data", good, "--seed", "-1"), "seed"),
        (("train", work / "digits.ulm", "-p", "x", "--data", good, "--lr", "-3"), "learning-rate"),
        (("federate", work / "digits.ulm", "-p", "x", "--data", good, "-o", work / "none" / "f.ulm"), "folder"),
        (("federate", work / "digits.ulm", "-p", "a", "-p", "b", "--data", good), "2 ports"),
        (("federate", work / "digits.ulm"), "no board"),
        (("federate", work / "digits.ulm", "--listen", "8470"), "enrol"),
        (
            ("federate", work / "digits.ulm", "-p", "a", "--data", good, "--rule", "krum:9", "--fleet", work / "f"),
            "krum",
        ),
        (("enrol", "kitchen"), "--port"),
        (("audit", work), "job"),
    ]


def test_mistakes_are_answered_in_one_sentence(work: Path) -> None:
    """Status not 0, one line that names the fault, and no file left behind."""
    for command, word in mistakes(work):
        before = {p.name for p in work.iterdir()}
        done = run(*command, fails=True)
        assert word.lower() in done.stderr.lower(), (command, done.stderr)
        lines = done.stderr.strip().splitlines()
        assert lines[-1].startswith(("error: ", "╰")) and sum(line.startswith("error: ") for line in lines) <= 1, lines
        assert {p.name for p in work.iterdir()} == before


def test_bars_on_a_terminal(work: Path) -> None:
    """On a terminal there is a progress bar; on a pipe there is none and no escape code."""
    command = [sys.executable, "-m", "ulearn_host.cli", "prepare", str(work / "digits.joblib")]
    command += ["--calibration", str(work / "calibration.npz"), "-o", str(work / "bars.ulm")]
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    assert b"\x1b[" in shown and "━".encode() in shown
    assert "\x1b[" not in run(*command[3:]).stdout
