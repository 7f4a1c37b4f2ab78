"""The main job on emulated boards: a network pretrained on upright digits meets three boards that see them tilted."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host import deploy, emulate, fleet
from ulearn_host.compiler import Options
from ulearn_host.display import Steps
from ulearn_host.errors import UserError
from ulearn_host.federation import lines
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.importers import from_sklearn
from ulearn_host.prepare import prepare, write

HIDDEN = 32
TRAIN_SAMPLES = 120
TEST_SAMPLES = 160
ROUNDS = 10
LOCAL = fleet.Hyperparameters(epochs=6, learning_rate=0.06)
ROUND = fleet.Hyperparameters(epochs=3, learning_rate=0.06)


@dataclass(frozen=True)
class World:
    """What one board sees: digits turned by `angle` degrees and slanted by `shear`, `favourites` twice as often."""

    name: str
    board: str
    angle: float
    shear: float
    favourites: tuple[int, ...]


WORLDS = (
    World("unix-1", "UNIX", 28.0, 0.0, (0, 1, 2, 3)),
    World("unix-2", "UNIX", -28.0, 0.0, (4, 5, 6)),
    World("cortex-m0", "QEMU_CORTEX_M0", 0.0, 0.45, (7, 8, 9)),
)


def tilted(images: NDArray[np.float64], world: World) -> NDArray[np.float64]:
    """Images [n, 8, 8] as the world shows them, interpolated linearly."""
    from scipy.ndimage import affine_transform

    a = np.deg2rad(world.angle)
    matrix = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) @ np.array([[1.0, 0.0], [world.shear, 1.0]])
    middle = np.array([3.5, 3.5])
    offset = middle - matrix @ middle
    return np.stack([affine_transform(image, matrix, offset, order=1) for image in images])


def draw(y: NDArray[np.int64], world: World, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of `count` different samples in the world's mix of classes."""
    weight = np.where(np.isin(y, world.favourites), 2.0, 1.0)
    return rng.choice(len(y), size=count, replace=False, p=weight / weight.sum())


@dataclass
class Result:
    """What the demo measured; as_json is the documented form."""

    boards: list[dict[str, Any]]
    federated: dict[str, Any]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """{boards: [{name, implementation, before, after}], federated: {before, after, rounds}, seconds}."""
        return {"boards": self.boards, "federated": self.federated, "seconds": round(self.seconds, 1)}


def run(seed: int, show: Steps) -> Result:
    """Pretrain, prepare, start three boards, deploy, learn on each, then average over rounds.

    Raises UserError when scikit-learn is missing or a board cannot be started.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.neural_network import MLPClassifier
    except ImportError:
        raise UserError("the demo needs scikit-learn: pip install 'ulearn[sklearn]'") from None
    began = time.monotonic()
    rng = np.random.default_rng(seed)
    images, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    images, y = images[order].reshape(-1, 8, 8) / 16, y[order]
    upright = len(y) // 3
    tick = show.counter(f"pretraining on {upright} upright digits", 2)
    x0, y0 = images[:upright].reshape(upright, -1), y[:upright]
    model = MLPClassifier((HIDDEN,), alpha=1e-3, max_iter=80, random_state=seed)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x0, y0)
    layers, loss, labels = from_sklearn(model)
    tick()
    # Room for what tilted digits do to the activations comes from calibration samples of many angles, not the boards'.
    views = [World("", "", a, s, ()) for a, s in ((0, 0), (15, 0), (-15, 0), (30, 0), (-30, 0), (0, 0.3))]
    calibration = np.concatenate([tilted(images[:60], view).reshape(60, -1) for view in views])
    plan = prepare(
        layers,
        calibration,
        np.tile(y[:60], len(views)),
        loss=loss,
        labels=labels,
        options=Options("full"),
        source="scikit-learn digits (UCI ML hand-written digits, CC BY 4.0)",
    )
    tick()
    # Every board draws from samples of its own, so nobody is tested on what anybody has learned from.
    shares = np.array_split(np.arange(upright, len(y)), len(WORLDS))
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        path = Path(temporary) / "digits.ulm"
        write(plan, path)
        facts = fleet.PlanFacts(path)
        members, hellos, ports = [], [], []
        single = stack.enter_context(ExitStack())
        for world, share in zip(WORLDS, shares, strict=True):
            chosen = share[draw(y[share], world, TRAIN_SAMPLES + TEST_SAMPLES, rng)]
            seen = tilted(images[chosen], world).reshape(len(chosen), -1)
            samples = facts.samples(seen, y[chosen], world.name)
            train = fleet.Samples(samples.x[:TRAIN_SAMPLES], samples.y[:TRAIN_SAMPLES])
            test = fleet.Samples(samples.x[TRAIN_SAMPLES:], samples.y[TRAIN_SAMPLES:])
            board = stack.enter_context(emulate.start(world.board))
            deploy.deploy(board.port, path, show.bar(f"{world.name}: deploying", 100))
            link = single.enter_context(fleet.opened(board.port, facts))
            ports.append(board.port)
            members.append(fleet.Member(world.name, link, train, test))
            hellos.append(link.about.implementation + ", " + link.about.machine if link.about else "")
        before = fleet.together(members, lambda m: m.right())
        for member in members:
            member.send(show.bar(f"{member.name}: sending {len(member.train)} samples"))
        bars = {m.name: show.bar(f"{m.name}: learning on its own") for m in members}
        fleet.together(members, lambda m: m.learn(LOCAL, bars[m.name]))
        after = fleet.together(members, lambda m: m.right())
        single.close()
        told = _together(facts, members, ports, show.counter(f"{ROUNDS} federated rounds", ROUNDS * len(members)))
        boards = [
            {
                "name": m.name,
                "implementation": hello,
                "before": b / len(m.test),
                "after": a / len(m.test),
                "federated": dict(told["boards"])[m.name],
            }
            for m, hello, b, a in zip(members, hellos, before, after, strict=True)
        ]
        federated = {"before": told["before"], "after": told["after"], "rounds": ROUNDS}
    return Result(boards, federated, time.monotonic() - began)


def _together(
    facts: fleet.PlanFacts, members: Sequence[fleet.Member], ports: Sequence[str], done: Callable[[], None]
) -> Any:
    """The job of the fleet. Returns the accuracy of all before and after, and each board's after."""
    job = Job(
        "demo",
        ROUNDS,
        len(members),
        over=1.0,
        retry_s=0.2,
        epochs=ROUND.epochs,
        learning_rate=ROUND.learning_rate,
        evaluate_every=ROUNDS,
        min_group=1,
    )

    def observe(event: str, details: Mapping[str, Any]) -> None:
        if event == "update":
            done()

    with Federation.create(facts.path.parent / "fleet", facts.path, job, observe=observe) as federation:
        made = []
        for member, port in zip(members, ports, strict=True):
            federation.enrol(member.name, secrets.token_bytes(32), "serial")
            made.append(lines.Line(member.name, partial(fleet.opened, port, facts), member.train, member.test))
        lines.run(federation, made)
        status = federation.status()
    return {
        "before": status["accuracy_before"],
        "after": status["history"][-1]["accuracy"],
        "boards": [(board["id"], board["accuracy"][-1][1]) for board in status["boards"]],
    }
