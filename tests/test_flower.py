"""A fleet behind several hosts: the bits of one host that has all boards; by hand, and by real processes of Flower."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from binascii import crc32
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gateways
from test_lines import on_lines, weights_of
from test_trainer import plan
from ulearn_host import cli, emulate
from ulearn_host.errors import UserError
from ulearn_host.federation.behind import Behind
from ulearn_host.federation.desk import Desk
from ulearn_host.federation.flower_app import write_app
from ulearn_host.federation.gateway import Gateway
from ulearn_host.federation.job import Job
from ulearn_host.federation.root import Root
from ulearn_host.federation.rounds import Federation
from ulearn_host.federation.upward import Answer, Ask
from ulearn_host.federation.virtual import VirtualBoard

JOB = Job(
    "fleet", rounds=4, goal=sum(gateways.SIZES), over=1.0, quorum=0.5, deadline_s=5.0, epochs=2, learning_rate=0.1
)


def flat(folder: Path, plan: Path, job: Job) -> list[bytes]:
    """The same job on one host: the base after each round."""
    clock = gateways.Time()
    with Federation.create(folder / "flat", plan, job, clock) as one:
        boards = gateways.enrol(one, folder / "flat-boards", plan, gateways.names())
        while one.head["state"] != "done":
            gateways.visit(one, boards, clock)
            clock.now += 1
            assert clock.now < 2000, one.status()
        assert one.replay() == bytes(one.model["blob"])
        return [bytes(row["blob"]) for row in one.journal.rows("SELECT blob FROM models ORDER BY round")]


class Fleet:
    """A root and its gateways in one process; messages are handed over by the test."""

    def __init__(self, folder: Path, plan: Path, job: Job, updates: bool = False) -> None:
        self.folder, self.clock = folder, gateways.Time()
        Root.create(folder / "root", plan, job, self.clock).close()
        self.root = Root(folder / "root", self.clock, updates=updates)
        self.gateways = [
            Gateway.begin(folder / f"gateway-{i}", plan, job, count, self.clock)
            for i, count in enumerate(gateways.SIZES)
        ]
        self.boards = [
            gateways.enrol(one, folder / f"boards-{i}", plan, gateways.names(i)) for i, one in enumerate(self.gateways)
        ]

    def answers(self, missing: int | None = None) -> list[bytes]:
        """What the gateways say to what the root asks now."""
        asked = Ask.unpack(self.root.ask())
        found: dict[int, bytes] = {}
        for i, one in enumerate(self.gateways):
            if i != missing:
                one.ask(asked, self.clock())
        while len(found) < len(self.gateways) - (missing is not None):
            for i, one in enumerate(self.gateways):
                if i != missing and i not in found:
                    gateways.visit(one, self.boards[i], self.clock)
                    answer = one.answer(asked)
                    if answer is not None:
                        found[i] = answer.pack()
            self.clock.now += 1
            assert self.clock.now < 2000, asked.round
        return [found[i] for i in sorted(found)]

    def close(self) -> None:
        for one in (self.root, *self.gateways):
            one.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


JOBS = {
    "mean": JOB,
    "all updates": JOB,
    "median": replace(JOB, rule="median"),
    "momentum": replace(JOB, server="momentum:0.9"),
    "int8": replace(JOB, up="int8", error_feedback=True, down="int8"),
    "split": replace(JOB, up="features:3", epochs=6),
    "personal": replace(JOB, up="random-k:8", personal=True),
}


@pytest.mark.parametrize("kind", JOBS)
def test_gateways_are_one_host(kind: str, tmp_path: Path, stack: ExitStack) -> None:
    """After every round the same base as on one host, whatever is passed up; boards and journals agree."""
    place, job = Path(plan(tmp_path, "last+bias")), JOBS[kind]
    wanted = flat(tmp_path, place, job)
    assert len(set(wanted)) == job.rounds + 1
    fleet = Fleet(tmp_path, place, job, updates=kind == "all updates")
    stack.callback(fleet.close)
    found = [bytes(fleet.root.model["blob"])]
    while not fleet.root.over:
        bodies = fleet.answers()
        sums = [answer.total is not None for answer in map(Answer.unpack, bodies) if answer.boards]
        assert all(sums) if kind in ("mean", "int8", "personal") else not any(sums)
        assert fleet.root.collect(bodies, fleet.clock())
        found.append(bytes(fleet.root.model["blob"]))
    assert fleet.answers() == fleet.answers()  # told twice that it is over
    fleet.root.finish(len(fleet.gateways), fleet.clock())
    assert found == wanted
    assert fleet.root.replay() == wanted[-1]
    for one, boards in zip(fleet.gateways, fleet.boards, strict=True):
        gateways.visit(one, boards, fleet.clock)
        assert one.status()["state"] == "done" and bytes(one.model["blob"]) == wanted[-1]
        assert {board.base_id for board in boards.values()} == {bytes(fleet.root.model["base"])}


@pytest.fixture
def two(tmp_path: Path, stack: ExitStack) -> Fleet:
    """A fleet at its first round."""
    fleet = Fleet(tmp_path, Path(plan(tmp_path, "last+bias")), JOB)
    stack.callback(fleet.close)
    return fleet


def reasons(root: Root) -> list[str]:
    """Why answers were refused."""
    return [row["text"] for row in root.journal.rows("SELECT text FROM audit WHERE event = 'refuse' ORDER BY n")]


def test_a_gateway_that_is_away(two: Fleet) -> None:
    """Its boards count for nothing in that round; back, it goes on from the base of now."""
    clock = two.clock
    assert two.root.collect(two.answers(missing=3), clock())
    assert two.root.collect(two.answers(), clock())
    counted = Ask.unpack(two.root.ask()).counted
    assert counted == {"gateway-0": 2, "gateway-2": 2, "gateway-3": 2, "gateway-1": 1}
    two.answers()
    bases = {bytes(one.model["base"]) for one in two.gateways}
    assert bases == {bytes(two.root.model["base"])}
    states = [[row["state"] for row in one.status()["history"]] for one in two.gateways]
    assert states == [["committed"] * 2, ["committed", "abandoned"], ["committed"] * 2, ["abandoned", "committed"]]


def test_too_few_updates_change_nothing(two: Fleet) -> None:
    """A round below the quorum is given up; the next has another number and the same base."""
    before, bodies = bytes(two.root.model["blob"]), two.answers()
    assert not two.root.collect(bodies[:2], two.clock())
    assert bytes(two.root.model["blob"]) == before and two.root.head["round"] == 2
    assert two.root.collect(two.answers(), two.clock())
    assert two.root.replay() == bytes(two.root.model["blob"]) != before


def test_killed_hosts_go_on(two: Fleet) -> None:
    """A gateway opened again gives the same answer to the same ask; a root opened again asks the same again."""
    bodies, asked = two.answers(), two.root.ask()
    for one in two.gateways:
        one.close()
    two.gateways = [Gateway(two.folder / f"gateway-{i}", two.clock) for i in range(len(bodies))]
    assert two.answers() == bodies
    two.root.observe = stop  # killed with the answers in the journal
    with pytest.raises(Killed):
        two.root.collect(bodies, two.clock())
    two.root.close()
    two.root = Root(two.folder / "root", two.clock)
    assert two.root.ask() == asked
    assert two.root.collect(bodies, two.clock()) and two.root.replay() == bytes(two.root.model["blob"])


class Killed(Exception):
    """The host is gone."""


def stop(event: str, details: dict[str, object]) -> None:
    """Before a commit."""
    if event == "before commit":
        raise Killed


def test_a_root_believes_nobody(two: Fleet) -> None:
    """Answers that are damaged, twice there, of another round or beyond what samples can come to are left out."""
    bodies = two.answers()
    good = [Answer.unpack(body) for body in bodies]
    first = good[0]
    assert first.total is not None
    huge = first.total.copy()
    huge[0] = -(2**63)
    forged = {
        "its checksum": bodies[0][:-1] + bytes([bodies[0][-1] ^ 1]),
        "cut short": b"",
        "begins with": two.root.ask(),
        "answers round 2": replace(first, round=2).pack(),
        "counts from base": replace(first, base_id=bytes(16)).pack(),
        "twice; give": replace(first, gateway="other").pack(),
        "a board twice": replace(first, boards=["a", "a"]).pack(),
        "counts 0 samples": replace(first, samples=0).pack(),
        "expected the sum": replace(first, total=first.total[:-1]).pack(),
        "a sum beyond": replace(first, total=huge).pack(),
        "no room": replace(first, reason="no room").pack(),
    }
    rest = [body for name, body in forged.items() if name != "twice; give"]
    assert two.root.collect([*rest, *bodies, forged["twice; give"]], two.clock())
    assert len(reasons(two.root)) == len(forged)
    for name, said in zip([n for n in forged if n != "twice; give"] + ["twice; give"], reasons(two.root), strict=True):
        assert name in said, (name, said)
    rng = np.random.default_rng(3)
    for _ in range(400):
        body = bytearray(bodies[0])
        for place in rng.integers(0, len(body), 3):
            body[place] ^= 1 << int(rng.integers(8))
        fixed = bytes(body[:8]) + crc32(body[12:]).to_bytes(4, "little") + bytes(body[12:])
        for data in (bytes(body), fixed):
            with suppress(UserError):
                Answer.unpack(data)


def test_the_desk(two: Fleet) -> None:
    """Whoever asks gets the answer once the round is closed, as often as it is asked; what is wrong is said."""
    path, lock = two.folder / "g.sock", threading.Lock()
    one, boards = two.gateways[0], two.boards[0]

    def call(do: Callable[[], bytes | None]) -> bytes | None:
        with lock:
            return do()

    def ask(body: bytes) -> Answer:
        with Client(str(path), "AF_UNIX") as line:
            line.send_bytes(body)
            return Answer.unpack(line.recv_bytes())

    with Desk(one, path, call):
        assert path.stat().st_mode & 0o077 == 0
        asked = two.root.ask()
        with Client(str(path), "AF_UNIX") as gone:
            gone.send_bytes(asked)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(ask, asked)
            while not waiting.done():
                with lock:
                    gateways.visit(one, boards, two.clock)
                    two.clock.now += 0.01
        answer = waiting.result()
        assert answer.boards == gateways.names(0) and answer.pack() == ask(asked).pack()
        assert "cut short" in ask(b"?").reason
        assert "another job" in ask(replace(Ask.unpack(asked), job=1).pack()).reason
        assert "bytes, expected" in ask(replace(Ask.unpack(asked), base=b"").pack()).reason
        with Client(str(path), "AF_UNIX") as late:
            late.send_bytes(replace(Ask.unpack(asked), round=3).pack())
            assert not late.poll(0.2)
            assert "come to 3" in ask(asked).reason
    with pytest.raises(OSError):
        ask(asked)


def test_a_board_behind_a_gateway(tmp_path: Path) -> None:
    """A board on a serial line, as `ulearn gateway` has it, ends where a virtual one on one host does."""
    place = Path(plan(tmp_path, "last+bias"))
    job = Job("serial", 2, 1, over=1.0, epochs=2, retry_s=0.2, deadline_s=60.0)
    Root.create(tmp_path / "root", place, job).close()
    with closing(Root(tmp_path / "root")) as root, on_lines(place, ("UNIX",)) as (members, _):
        hosting = Behind(tmp_path / "cellar", tmp_path, members, socket=tmp_path / "s", as_json=True)
        with ThreadPoolExecutor() as pool:
            running = pool.submit(hosting.run, place, job, lambda: gateways.SECRET)
            while not root.over:
                assert root.collect([asked(tmp_path / "s", root.ask())], root.clock()), reasons(root)
            asked(tmp_path / "s", root.ask())
            status = running.result(60)
        assert status["state"] == "done" and status["model"]["base_id"] == root.model["base"].hex()
        assert weights_of(members[0]) == bytes(root.model["blob"])
        virtual = VirtualBoard(tmp_path / "virtual", place, members[0].train)
        with Federation.create(tmp_path / "flat", place, job, gateways.Time()) as one:
            one.enrol(members[0].board, gateways.SECRET, "test")
            while one.head["state"] != "done":
                gateways.visit(one, {members[0].board: virtual}, one.clock)
            assert bytes(one.model["blob"]) == bytes(root.model["blob"])


def asked(path: Path, body: bytes) -> bytes:
    """What a ClientApp does, once the desk is open."""
    until = time.monotonic() + 60
    while True:
        with suppress(FileNotFoundError, ConnectionRefusedError), Client(str(path), "AF_UNIX") as line:
            line.send_bytes(body)
            return line.recv_bytes()
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_command_that_leads(tmp_path: Path) -> None:
    """`ulearn flower` writes the job and what Flower runs; it warns where activations go up, and refuses nonsense."""
    place = plan(tmp_path, "last+bias")
    line = ["flower", place, "--folder", str(tmp_path / "all"), "--gateways", "3", "--set", "name=all"]
    done = CliRunner().invoke(cli.app, [*line, "--set", "rounds=2", "--set", "goal=5", "--set", "up=features:4"])
    assert done.exit_code == 0, done.output
    assert "model inversion" in done.output and "flwr run" in done.output
    job = Job.from_json((tmp_path / "all" / "job.json").read_text())
    assert (job.name, job.rounds, job.goal, job.up) == ("all", 2, 5, "features:4")
    app = tomllib.loads((tmp_path / "all" / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["config"] == {"folder": str(tmp_path / "all"), "gateways": 3, "timeout": 3600.0, "updates": False}
    for name in app["components"].values():
        module, attribute = name.split(":")
        text = (ROOT / "host" / f"{module.replace('.', '/')}.py").read_text()
        assert f"\n{attribute} = " in text  # Flower looks for it without importing it
    for wrong, fault in (("rounds", "expected NAME=VALUE"), ("colour=1", "no field"), ("rounds=-1", "rounds -1")):
        refused = CliRunner().invoke(cli.app, [*line, "--set", "goal=5", "--set", wrong])
        assert refused.exit_code and fault in str(refused.exception), refused


FLOWER = "flwr==1.41.0"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def flower() -> Path:
    """A Python that has Flower: the one that ULEARN_FLOWER names, this one, or one in a folder made for it, since it
    wants other versions of libraries than the tests run with."""
    named = os.environ.get("ULEARN_FLOWER")
    if named:
        return Path(named)
    if importlib.util.find_spec("flwr"):
        return Path(sys.executable)
    folder = emulate.cache_dir() / f"{FLOWER.replace('==', '-')}-{sys.version_info.major}.{sys.version_info.minor}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            _install(folder)
    return folder / "bin" / "python"


def _install(folder: Path) -> None:
    """Flower in a folder, whose Python finds everything else where this one does."""
    pip = ("-m", "pip", "install", "-q", "--retries", "1", "--timeout", "15", "--disable-pip-version-check", FLOWER)
    python = str(folder / "bin" / "python")
    for command in ((sys.executable, "-m", "venv", str(folder)), (python, *pip)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"flwr cannot be installed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    own = next((folder / "lib").glob("python*")) / "site-packages"
    (own / "others.pth").write_text("\n".join([*sysconfig_paths(), ""]))
    (folder / "made").touch()


def sysconfig_paths() -> list[str]:
    """Where this Python finds ulearn and its libraries."""
    return [str(ROOT / "host"), str(ROOT / "firmware"), str(ROOT), sysconfig.get_path("purelib")]


def free_port() -> int:
    """A port that nobody listens at on loopback."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Processes:
    """Processes with their output in files; all are ended at the end."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.all: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.all[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        started = [pid for process in self.all.values() for pid in _children(process.pid)]
        for process in self.all.values():
            process.send_signal(signal.SIGTERM)
        for process in self.all.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in started:  # Flower leaves what it has started to notice by itself that it is alone
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _children(pid: int) -> list[int]:
    """What a process has started, where the system tells."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_four_gateways_under_flower(flower: Path, tmp_path: Path, stack: ExitStack) -> None:
    """A SuperLink, four SuperNodes and four gateways, each a process: the same job as on one host, to the bit."""
    job, place = replace(JOB, rounds=3), Path(plan(tmp_path, "last+bias"))
    wanted = flat(tmp_path, place, job)
    place.rename(tmp_path / "plan.ulm")
    (tmp_path / "job.json").write_text(job.to_json())
    Root.create(tmp_path / "root", tmp_path / "plan.ulm", job).close()
    write_app(tmp_path / "app", tmp_path / "root", len(gateways.SIZES), timeout_s=300)
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    where = {"FLWR_HOME": str(home), "PATH": f"{flower.parent}:{os.environ['PATH']}"}
    where |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    run = Processes(tmp_path, os.environ | where | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3"})
    stack.callback(run.close)
    here = ("--insecure", "--host", "127.0.0.1", "--port")
    without = "--disable-runtime-dependency-installation"
    run.start("superlink", str(flower.parent / "flower-superlink"), *here, str(port), without)
    for i in range(len(gateways.SIZES)):
        run.start(f"gateway {i}", sys.executable, str(Path(gateways.__file__)), str(tmp_path), str(i))
        config = f'gateway="{tmp_path}/{i}.sock"'
        superlink = ("--superlink", f"127.0.0.1:{port}", "--node-config", config)
        run.start(f"supernode {i}", str(flower.parent / "flower-supernode"), *here, str(free_port()), *superlink)
    _wait(lambda: _answers(port), 300, run, "superlink")
    asked = subprocess.run(
        [str(flower.parent / "flwr"), "run", "app", "here"],
        env=run.environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert asked.returncode == 0, asked.stdout + asked.stderr
    results = [tmp_path / f"{i}.json" for i in range(len(gateways.SIZES))]
    _wait(lambda: all(path.exists() for path in results), 300, run, "superlink")
    with closing(Root(tmp_path / "root")) as root:
        assert [bytes(row["blob"]) for row in root.journal.rows("SELECT blob FROM models ORDER BY round")] == wanted
        assert root.replay() == wanted[-1] and root.sums
        base = root.model["base"].hex()
    told = {name: base for path in results for name, base in json.loads(path.read_text()).items()}
    assert told == dict.fromkeys(gateways.names(), base)


def _answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _wait(until: Callable[[], bool], seconds: float, run: Processes, name: str) -> None:
    """Wait for something, or fail with the end of a process's log."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, run.log(name)[-2000:]
        time.sleep(0.1)
