"""A board's end of a fleet on a network: signatures, certificates, silence, lines that change bytes, memory."""

from __future__ import annotations

import hashlib
import hmac
import json
import subprocess
import time
from pathlib import Path

import pytest

import ulearn.hmac
from network_fleet import FIRMWARE, Faults, Line, enrolled
from test_server import Served, agree, running
from test_trainer import plan as small_plan
from ulearn import wifi
from ulearn_host import emulate
from ulearn_host.federation import certificate, enrol
from ulearn_host.federation.door import Limits
from ulearn_host.federation.job import Job
from ulearn_host.federation.rounds import Federation
from ulearn_host.link import Link

# RFC 4231, test cases 1, 2, 4 and the first of those with a key of a whole block: key, data, MAC.
VECTORS = (
    ("0b" * 20, "4869205468657265", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
    (
        "4a656665",
        "7768617420646f2079612077616e7420666f72206e6f7468696e673f",
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
    ),
    (
        "0102030405060708090a0b0c0d0e0f10111213141516171819",
        "cd" * 50,
        "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
    ),
)
SIGN = """
from binascii import hexlify, unhexlify
from ulearn.hmac import Hmac, equal
for key, data, mac in {vectors!r}:
    h = Hmac(unhexlify(key))
    for _ in range(2):
        h.begin()
        for i in range(0, len(data), 14):
            h.update(unhexlify(data[i:i+14]))
        assert hexlify(h.end()).decode() == mac, mac
assert equal(b'ab', bytearray(b'ab')) and not equal(b'ab', b'ac') and not equal(b'ab', b'a')
try:
    Hmac(bytes(65))
    print('too long a key')
except ValueError as e:
    print(e)
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small perceptron that trains whole."""
    return Path(small_plan(tmp_path_factory.mktemp("plan"), "full"))


def test_signatures_here_and_on_a_board() -> None:
    """RFC 4231's vectors on both interpreters; other keys and lengths as CPython's own."""
    exec(SIGN.format(vectors=VECTORS), {"print": lambda text: None})
    said = subprocess.run(
        [str(emulate.find_micropython()), "-c", SIGN.format(vectors=VECTORS)],
        env={"MICROPYPATH": str(FIRMWARE)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert said.stdout.strip() == "a key of 65 bytes, expected at most 64", said.stderr
    for size in range(0, 200, 7):
        key, data = hashlib.sha512(bytes([size])).digest()[: size % 65], bytes(range(size))
        ours = ulearn.hmac.Hmac(key)
        ours.begin()
        ours.update(data)
        assert ours.end() == hmac.digest(key, data, "sha256")


def test_cards_that_are_no_cards(tmp_path: Path) -> None:
    """Named, in one sentence."""
    identity = certificate.ensure(tmp_path)
    good = enrol.card("b", bytes(32), "192.0.2.1", 8470, identity)
    assert wifi.read_card(good)["certificate"] == identity.der
    path = tmp_path / "fleet.json"
    for change in ({"secret": "00"}, {"secret": "zz" * 32}, {"port": 0}, {"port": None}, {"board": ""}, {"host": ""}):
        path.write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(ValueError, match="fleet.json: damaged"):
            wifi.read_card(str(path))
    for text in (b"", b"[]", b"{}", b"1", good[:50]):
        with pytest.raises(ValueError, match="card: damaged"):
            wifi.read_card(text)
    plain = {**json.loads(good), "certificate": None}
    with pytest.raises(ValueError, match="does not allow plain text"):
        wifi.read_card(json.dumps(plain).encode())
    assert wifi.read_card(enrol.card("b", bytes(32), "192.0.2.1", 8470, None))["certificate"] is None
    with pytest.raises(ValueError, match="none.json: .*; enrol this board"):
        wifi.read_card(str(tmp_path / "none.json"))


def test_enrolled_over_a_serial_line(unix_board, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The card lies on the board as it was made."""
    card = enrol.card("b", bytes(range(32)), "192.0.2.1", 8470, certificate.ensure(tmp_path))
    enrol.over_serial(unix_board.port, card)
    assert (unix_board.board.folder / "fleet.json").read_bytes() == card
    with Link.open(unix_board.port) as link:  # and its agent answers still
        assert link.info().model is None


def test_another_certificate_is_refused(tmp_path: Path, plan: Path) -> None:
    """By the board, before it has said who it is."""
    with Federation.create(tmp_path / "job", plan, Job("impostor", 1, 1)) as federation:
        (folder,) = enrolled(federation, tmp_path, plan, 1, 1)
        (tmp_path / "job" / certificate.FILE).unlink()
        served = Served(federation)  # with a certificate of its own
        card = json.loads((folder / "fleet.json").read_text())
        (folder / "fleet.json").write_text(json.dumps({**card, "port": served.port}))
        with running([folder]) as (board,):
            wait_for(lambda: "not correctly signed" in board.log)
            served.end()
        assert federation.status()["boards"][0]["seen_s"] is None
        refused = [entry["reason"] for entry in federation.status()["refused"]]
    assert refused and all("TLS did not come about" in reason for reason in refused)


def test_a_host_that_does_not_know_the_secret(tmp_path: Path, plan: Path) -> None:
    """Nothing that it says is taken for true; a board with a wrong secret is refused by an honest host."""
    with Federation.create(tmp_path / "job", plan, Job("other", 1, 1, over=1.0)) as federation:
        served = Served(federation)
        (folder,) = enrolled(federation, tmp_path, plan, 1, served.port)
        card = json.loads((folder / "fleet.json").read_text())
        (folder / "fleet.json").write_text(json.dumps({**card, "secret": "77" * 32}))
        with running([folder]) as (board,):
            wait_for(lambda: "not signed with the secret of board" in board.log)
            served.end()
        assert federation.head["state"] == "select"


def test_a_line_that_changes_bytes(tmp_path: Path, plan: Path) -> None:
    """Plain text, and bits of what passes are changed: all of that is refused on both sides, what comes through is
    right."""
    warnings: list[str] = []
    job = Job("flips", 3, 1, over=1.0, retry_s=0.5, epochs=1)
    with Federation.create(tmp_path / "job", plan, job) as federation:
        limits = Limits(quiet_s=1.0)
        served = Served(federation, plain=True, warn=warnings.append, limits=limits)
        line = Line(lambda: served.port, Faults(seed=5, flip=0.12))
        folders = enrolled(federation, tmp_path, plan, 1, line.port, plain=True)
        with running(folders) as boards:
            served.wait(60)
            agree(federation, boards)
            assert all("no TLS" in board.log for board in boards)
        line.close()
        found = boards[0].log + str(federation.status()["refused"])
        assert "not signed" in found
        assert line.counts["flipped"] > 1 and len(warnings) == 1 and "no TLS" in warnings[0]


def test_a_line_that_falls_silent(tmp_path: Path, plan: Path) -> None:
    """A connection that is half open is given up, a watchdog is fed meanwhile, and no memory goes."""
    job = Job("silence", 12, 1, over=1.0, retry_s=0.2, epochs=1)
    with Federation.create(tmp_path / "job", plan, job) as federation:
        served = Served(federation)
        line = Line(lambda: served.port, Faults())
        (folder,) = enrolled(federation, tmp_path, plan, 1, line.port)
        line.frozen = True
        with running([folder], silence_ms=700) as (board,):
            wait_for(lambda: "ETIMEDOUT" in board.log)
            line.frozen = False
            served.wait(60)
            agree(federation, [board])
            heap = [int(text[5:]) for text in board.log.splitlines() if text.startswith("heap ")]
            rounds = heap[-12:-1]
            assert len(heap) > 12 and max(rounds) - min(rounds) <= 256, heap
            assert 0 < int(board.said("unfed")) < 1000
        line.close()


def test_a_task_that_a_board_cannot_carry_out(tmp_path: Path, plan: Path) -> None:
    """The host is told why, and the board asks again until it can."""
    with Federation.create(tmp_path / "job", plan, Job("cannot", 2, 1, over=1.0, retry_s=0.3)) as federation:
        served = Served(federation)
        (folder,) = enrolled(federation, tmp_path, plan, 1, served.port)
        (folder / "m.ulm.base" / "full").mkdir(parents=True)  # in the place of the file of a new base
        with running([folder]) as (board,):
            assert served.server is not None
            wait_for(lambda: served.server.call(federation.status)["refused"])
            (entry,) = served.server.call(federation.status)["refused"]
            assert entry["board"] == "board-00" and entry["reason"].startswith("cannot: ")
            (folder / "m.ulm.base" / "full").rmdir()
            (folder / "m.ulm.base").rmdir()
            served.wait(30)
            agree(federation, [board])


def wait_for(condition, seconds: float = 30.0) -> None:  # type: ignore[no-untyped-def]
    """Until it is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)
