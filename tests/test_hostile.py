"""A server under fire: every hostile message is refused with a reason, memory is bounded, honest boards go on.

1,000 messages; ULEARN_HOSTILE=10000 for all of them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import ulearn
from hostile import Attacker
from letters import Writer
from network_fleet import Board, enrolled
from network_host import NetworkHost, free_port
from test_rounds import independent
from test_server import recomputed
from test_trainer import plan as small_plan
from ulearn_host.federation import certificate
from ulearn_host.federation.door import Limits
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation

MESSAGES = int(os.environ.get("ULEARN_HOSTILE", "1000"))
ATTACKERS = 24
HONEST = 3
GROWTH_BYTES = 8 << 20
SECRET = b"a secret that has got about....."


async def fire(attackers: list[Attacker], numbers: range) -> list[tuple[str, str]]:
    """All messages, each attacker's one after the other."""
    verdicts: list[tuple[str, str]] = []

    async def shoot(attacker: Attacker, mine: range) -> None:
        for number in mine:
            verdicts.append(await attacker.attack(number))

    count = len(attackers)
    await asyncio.gather(*(shoot(a, numbers[i::count]) for i, a in enumerate(attackers)))
    return verdicts


def test_hostile_messages(tmp_path: Path) -> None:
    """Refused, counted, and nobody else is the worse for it."""
    plan = Path(small_plan(tmp_path, "full"))
    folder, port = tmp_path / "job", free_port()
    limits = Limits(request_s=4.0, silence_s=4.0, handshake_s=10.0)
    job = Job("hostile", 100_000, HONEST, over=1.0, deadline_s=60.0, retry_s=1.0, epochs=2)
    with Federation.create(folder, plan, job) as federation:
        folders = enrolled(federation, tmp_path, plan, HONEST, port)
        for i in range(ATTACKERS):
            federation.enrol(f"traitor-{i}", SECRET, "network")
        largest, number = federation.body_largest, federation.job.number
    der = certificate.ensure(folder).der
    attackers = [
        Attacker(
            port,
            der,
            f"127.0.0.{2 + i % 8}",
            Writer(f"traitor-{i}", SECRET, job=number),
            "board-00",
            largest,
            _update(folders[0]),
            seed=20,
        )
        for i in range(ATTACKERS)
    ]
    host = NetworkHost(folder, port, limits=limits)
    boards = [Board(place) for place in folders]
    try:
        committed(host, 1)
        warm = asyncio.run(fire(attackers, range(MESSAGES // 10)))
        before, began, rounds = settled(host, warm), time.monotonic(), committed(host, 1)
        verdicts = warm + asyncio.run(fire(attackers, range(MESSAGES // 10, MESSAGES)))
        lasted = time.monotonic() - began
        after = settled(host, verdicts)
        during = committed(host, rounds + 1) - rounds
        assert all(board.process.poll() is None for board in boards)
    finally:
        for board in boards:
            board.end()
        host.end()
    assert len(verdicts) == MESSAGES and all(reason for _, reason in verdicts)
    assert after["traced_bytes"] - before["traced_bytes"] < GROWTH_BYTES
    assert after["rss_bytes"] - before["rss_bytes"] < 4 * GROWTH_BYTES  # with what the allocator keeps, and SQLite
    with Federation(folder) as federation:
        history = check_honest(federation, folders)
        refused = federation.status()["refused"]
    kinds = Counter(by for by, _ in verdicts)
    print(
        f"{MESSAGES} messages in {lasted:.0f} s, {dict(kinds)}, {during} rounds meanwhile, {history} in all, "
        f"{len({reason for _, reason in verdicts})} reasons, traced {before['traced_bytes'] >> 10} to "
        f"{after['traced_bytes'] >> 10} KB, RSS {before['rss_bytes'] >> 10} to {after['rss_bytes'] >> 10} KB"
    )
    assert refused and all(entry["reason"] for entry in refused)


def _update(folder: Path) -> bytes:
    """One of the job's model, as a board makes it."""
    model = ulearn.load(str(folder / "m.ulm"))
    return bytes(model.update(5))


def committed(host: NetworkHost, least: int) -> int:
    """How many rounds were committed; waits until there are so many."""
    until = time.monotonic() + 60
    while True:
        count = sum(event["event"] == "commit" for event in host.events)
        if count >= least:
            return count
        assert time.monotonic() < until, host.events[-3:]
        time.sleep(0.1)


def settled(host: NetworkHost, verdicts: list[tuple[str, str]]) -> dict[str, Any]:
    """What the host says of itself once every message is accounted for and the attackers' connections are gone."""
    wanted = sum(by == "server" for by, _ in verdicts)
    until = time.monotonic() + 20
    while True:
        facts = host.facts
        if facts.get("refused", 0) >= wanted and facts["connections"] <= HONEST:
            assert facts["refused"] <= wanted + 5, facts  # and none is counted twice
            return facts
        assert time.monotonic() < until, (facts, wanted)
        time.sleep(0.2)


def check_honest(federation: Federation, folders: list[Path]) -> int:
    """Every round took all honest boards' updates, which are what they would be without an attack."""
    rows = federation.journal.rows("SELECT * FROM updates ORDER BY round")
    rounds = federation.commits()
    assert rounds > 1 and {row["board"] for row in rows} == {place.name for place in folders}
    assert all(turn["state"] == "committed" for turn in federation.status()["history"])
    assert all(board["refused"] == 0 for board in federation.status()["boards"] if board["id"].startswith("board-"))
    for row in rows[: 20 * HONEST]:
        folder = next(place for place in folders if place.name == row["board"])
        assert bytes(row["body"]) == recomputed(federation, folder, row["round"])
    assert independent(federation) == bytes(federation.model["blob"])
    return rounds


@pytest.mark.parametrize("count", [200])
def test_strangers_make_room_for_each_other(tmp_path: Path, count: int) -> None:
    """Nobody can hold all places: so many connections that say nothing, and a board trains on."""
    plan = Path(small_plan(tmp_path, "full"))
    folder, port = tmp_path / "job", free_port()
    job = Job("crowd", 3, 1, over=1.0, retry_s=1.0, epochs=1)
    with Federation.create(folder, plan, job) as federation:
        (place,) = enrolled(federation, tmp_path, plan, 1, port)
    host = NetworkHost(folder, port, limits=Limits(strangers=20, strangers_of_address=5))

    async def crowd() -> int:
        most = 0
        writers = []
        for i in range(count):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(f"127.0.1.{1 + i % 50}", 0))
                writers.append(writer)
            except OSError:
                await asyncio.sleep(0.05)
            most = max(most, host.facts.get("connections", 0))
        await asyncio.sleep(0.6)
        most = max(most, host.facts.get("connections", 0))
        board.append(Board(place))
        host.wait(30)
        for writer in writers:
            writer.transport.abort()
        return most

    board: list[Board] = []
    try:
        assert 10 < asyncio.run(crowd()) <= 20
        assert board[0].process.wait(20) == 0, board[0].log
    finally:
        for one in board:
            one.end()
        host.end()
