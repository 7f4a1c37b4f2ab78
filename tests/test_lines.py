"""Boards on serial lines as members of a fleet, alone and beside boards on a network."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from network_fleet import enrolled
from test_agent import put, running_board
from test_rounds import independent
from test_server import Served, agree, running
from test_trainer import plan as small_plan
from ulearn_host import emulate
from ulearn_host.federation import lines
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.fleet import PlanFacts, Samples
from ulearn_host.link import Link

SERIAL = ("UNIX", "UNIX", "QEMU_CORTEX_M0", "QEMU_CORTEX_M3")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small perceptron that trains whole."""
    return Path(small_plan(tmp_path_factory.mktemp("plan"), "full"))


def samples(facts: PlanFacts, seed: int, count: int) -> Samples:
    """Random ones, more of some classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, max(2, facts.outputs - seed % 2), count).astype(np.uint16) % facts.outputs
    return Samples(rng.integers(-128, 128, (count, facts.inputs)).astype(np.int8), y)


def opened(port: str, plan: Path) -> Link:
    """A session with a board, its model loaded."""
    link = Link.open(port, timeout_s=4)
    link.load(plan.name)
    return link


@contextlib.contextmanager
def on_lines(plan: Path, names: tuple[str, ...]) -> Iterator[tuple[list[lines.Line], list[emulate.EmulatedBoard]]]:
    """Emulated boards to which the plan was deployed."""
    facts = PlanFacts(plan)
    with contextlib.ExitStack() as stack:
        made, boards = [], []
        for i, name in enumerate(names):
            board = stack.enter_context(running_board(name))
            put(board.port, plan)
            boards.append(board)

            def session(port: str = board.port) -> Link:
                return opened(port, plan)

            made.append(lines.Line(f"serial-{i}", session, samples(facts, i, 12 + i), samples(facts, 50 + i, 6)))
        yield made, boards


def weights_of(line: lines.Line) -> bytes:
    """What a board has in the end."""
    with line.open() as link:
        return link.weights()


def test_serial_boards_and_network_boards_in_one_job(tmp_path: Path, plan: Path) -> None:
    """Four emulated boards on serial lines, two of them Cortex-M, and two over TLS: one fleet, the same bits."""
    job = Job("mixed", 3, 6, over=1.0, deadline_s=100.0, retry_s=0.5, epochs=2, evaluate_every=3, min_group=6)
    federation = Federation.create(tmp_path / "job", plan, job)
    with on_lines(plan, SERIAL) as (members, _):
        for member in members:
            federation.enrol(member.board, os.urandom(32), "serial")
        said: list[tuple[str, str]] = []
        beside = lines.beside(federation, members, lambda board, text: said.append((board, text)))
        served = Served(federation, beside=[beside])
        folders = enrolled(federation, tmp_path, plan, 2, served.port)
        with running(folders) as boards:
            served.wait(180)
            agree(federation, boards)
        assert not said
        assert {weights_of(member) for member in members} == {bytes(federation.model["blob"])}
    status = federation.status()
    assert [turn["state"] for turn in status["history"]] == ["committed"] * 3
    assert [turn["updates"] for turn in status["history"]][1:] == [6, 6]  # whoever is there first begins
    assert all(board["rounds"] >= 2 for board in status["boards"])
    assert sorted(board["link"] for board in status["boards"]) == ["network"] * 2 + ["serial"] * 4
    assert all(board["samples"] and board["step_us"] and board["bytes_up"] for board in status["boards"])
    assert status["history"][-1]["accuracy"] is not None
    federation.close()


def test_a_line_that_dies_and_comes_back(tmp_path: Path, plan: Path) -> None:
    """A board is killed in the middle, the others commit with a quorum; the job ends, and replay gives its model."""
    job = Job("lines", 4, 3, over=1.0, quorum=0.6, deadline_s=5.0, retry_s=0.3, epochs=2)
    federation = Federation.create(tmp_path / "job", plan, job)
    said: list[tuple[str, str]] = []
    with on_lines(plan, ("UNIX", "UNIX", "UNIX")) as (members, boards):
        for member in members:
            federation.enrol(member.board, os.urandom(32), "serial")

        killed: list[int] = []

        def tick() -> None:
            if not killed and federation.model["round"] >= 1:
                killed.append(1)
                boards[0].kill()

        lines.run(federation, members, lambda board, text: said.append((board, text)), tick)
        assert killed and any(board == "serial-0" for board, _ in said)
        assert {weights_of(member) for member in members[1:]} == {bytes(federation.model["blob"])}
    history = federation.status()["history"]
    assert len([turn for turn in history if turn["state"] == "committed"]) == 4
    assert federation.replay() == bytes(federation.model["blob"]) == independent(federation)
    federation.close()


def test_names_of_ports() -> None:
    assert lines.name_of("/dev/ttyACM0") == "ttyACM0"
    assert lines.name_of("/dev/pts/3") == "pts-3"
    assert lines.name_of("/dev/serial/by-id/usb-MicroPython_Board_e66-if00") == "usb-MicroPython_Board_e66-if00"
