"""Power that fails at any moment of a save or an apply leaves the weights before or the weights after, whole."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cases
import ulearn
from ulearn_host.emulate import find_micropython, find_native

ROOT = Path(__file__).resolve().parents[1]
SEED, WIDEST = 19, 3  # trains weights and biases; a small file, because every byte of it costs a process or two
OURS = (str(ROOT / "firmware" / "ulearn" / "safefile.py"), str(ROOT / "firmware" / "ulearn" / "checkpoint.py"))
DONE, REFUSED, TOUCHED, ODD = 0, 1, 2, 3  # how a child ends that was not killed


# ---- Real faults: a child process whose writes stop at a byte, or which is killed at a line --------------------------


def child(prepare: Callable[[], None], work: Callable[[], None], untouched: Callable[[], bool]) -> int:
    """Fork; the child prepares its fault and works. Returns its exit status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        status = ODD
        try:
            prepare()
            try:
                work()
                status = DONE
            except (OSError, ValueError):
                status = REFUSED if untouched() else TOUCHED
        finally:
            sys.settrace(None)
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stop_at_byte(count: int, kill: bool) -> Callable[[], None]:
    """No file may grow beyond `count` bytes: the write that would is cut there and then fails, or kills."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))

    return prepare


def kill_at_line(count: int) -> Callable[[], None]:
    """The process ends without a word before the `count`-th line that it executes in the modules that write files."""

    def prepare() -> None:
        left = count

        def local(_frame: object, event: str, _arg: object) -> object:
            nonlocal left
            if event == "line":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return local

        sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename in OURS else None)

    return prepare


def faults(size: int, ways: tuple[bool, ...] = (False, True)) -> list[tuple[str, Callable[[], None]]]:
    """Every byte of a file of `size`: the write is refused there, or the process dies there."""
    names = ("refused", "killed")
    return [(f"{names[kill]} at byte {n}", stop_at_byte(n, kill)) for n in range(size + 1) for kill in ways]


# ---- What a board has on its file system -----------------------------------------------------------------------------


class Board:
    """A folder with a plan; every call of `boot` is a board after a reset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.case = cases.random_case(SEED, WIDEST)
        self.plan = folder / "plan.ulm"
        self.checkpoint = str(folder / "checkpoint")
        self.plan.write_bytes(self.case.plan.data)

    def boot(self) -> ulearn.Model:
        return ulearn.load(str(self.plan))

    def learn(self, model: ulearn.Model, seed: int) -> None:
        trainer = ulearn.Trainer(model, learning_rate=0.05, seed=seed, skip=0)
        for x, target in list(zip(self.case.inputs, self.case.targets, strict=True))[seed % 3 :: 3]:
            trainer.step(x.tobytes(), int(target) if self.case.targets.ndim == 1 else target.tobytes())

    def files(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.folder.iterdir()}

    def put(self, files: dict[str, bytes]) -> None:
        for path in self.folder.iterdir():
            if path.name not in files:
                path.unlink()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)


def weights(model: ulearn.Model) -> tuple[bytes, bytes]:
    return bytes(model.train_blob), bytes(model.state)


def restored(board: Board) -> tuple[bytes, bytes]:
    model = board.boot()
    model.restore(board.checkpoint)
    return weights(model)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of files are cut here, and a disk would be waited for."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


# How the files may stand before the save that is interrupted. Each is what an earlier interruption leaves; the weights
# of the first save are the ones a board comes back with in all of them.


def committed(board: Board, name: str) -> None:
    pass


def beside(board: Board, name: str) -> None:
    # Power failed inside a rename of a file system that removes the old file first, as FAT does.
    os.rename(board.folder / name, board.folder / (name + ".new"))


def debris(board: Board, name: str) -> None:
    # A save was interrupted in its middle.
    data = (board.folder / name).read_bytes()
    (board.folder / (name + ".new")).write_bytes(data[: len(data) // 2])


def damaged(board: Board, name: str) -> None:
    # The flash lost a bit of the committed file after a save was interrupted just before its rename.
    data = bytearray((board.folder / name).read_bytes())
    (board.folder / (name + ".new")).write_bytes(data)
    data[60] ^= 4
    (board.folder / name).write_bytes(data)


def foreign(board: Board, name: str) -> None:
    # The committed file is whole and of another model: the plan was replaced, the save after it interrupted.
    data = bytearray((board.folder / name).read_bytes())
    (board.folder / (name + ".new")).write_bytes(data)
    from ulearn import checkpoint

    fields = struct.unpack_from("<II", data, 8)
    train = bytes(data[48 : 48 + fields[0]])
    checkpoint.write(str(board.folder / "other"), bytes(16), bytes(16), (train,), bytes(data[48 + fields[0] : -32]))
    os.rename(board.folder / "other", board.folder / name)


STANDS = [committed, beside, debris, damaged, foreign]
Stand = Callable[[Board, str], None]


def ways_for(stand: Stand | None) -> tuple[bool, ...]:
    # A refusal and a death at the same byte leave the same file; both are tried where boards usually are.
    return (False, True) if stand in (None, committed) else (False,)


@pytest.mark.parametrize("stand", STANDS)
def test_interrupted_save(stand: Stand, memory: Path) -> None:
    board = Board(memory)
    model = board.boot()
    board.learn(model, 1)
    model.save(board.checkpoint)
    size = os.path.getsize(board.checkpoint)
    before = weights(model)
    stand(board, "checkpoint")
    model = board.boot()
    model.restore(board.checkpoint)
    assert weights(model) == before
    start = board.files()
    board.learn(model, 2)
    after = weights(model)
    assert after[0] != before[0]

    def interrupted(what: str, prepare: Callable[[], None]) -> int:
        board.put(start)
        status = child(prepare, lambda: model.save(board.checkpoint), lambda: weights(model) == after)
        assert status in (DONE, REFUSED, -signal.SIGXFSZ, -signal.SIGKILL), f"{what}: the child ended with {status}"
        try:
            found = restored(board)
        except ValueError as e:
            raise AssertionError(f"{what}: neither the weights before nor after: {e}") from e
        assert found == after or (found == before and status != DONE), f"{what}: a mixture, or not what was reported"
        return status

    ways = ways_for(stand)
    results = [interrupted(what, prepare) for what, prepare in faults(size, ways)]
    assert results.count(REFUSED) == size and results.count(-signal.SIGXFSZ) == size * (len(ways) - 1)
    lines = 0
    while interrupted(f"killed at line {lines}", kill_at_line(lines)) != DONE:
        lines += 1
    assert lines > 20
    # After all that, a save without a fault is one.
    board.put(start)
    model.save(board.checkpoint)
    assert restored(board) == after


def test_interrupted_first_save(memory: Path) -> None:
    # There is nothing to come back to yet: a restore is refused and the plan's weights stay, or the new ones are there.
    board = Board(memory)
    start = board.files()
    model = board.boot()
    plain = weights(model)
    board.learn(model, 1)
    after = weights(model)

    def interrupted(prepare: Callable[[], None]) -> int:
        board.put(start)
        status = child(prepare, lambda: model.save(board.checkpoint), lambda: weights(model) == after)
        again = board.boot()
        try:
            again.restore(board.checkpoint)
        except ValueError:
            assert status != DONE and weights(again) == plain
        else:
            assert weights(again) == after
        return status

    model.save(board.checkpoint)
    size = os.path.getsize(board.checkpoint)
    assert [interrupted(prepare) for _, prepare in faults(size)].count(DONE) == 2
    lines = 0
    while interrupted(kill_at_line(lines)) != DONE:
        lines += 1
    assert lines > 20


@pytest.mark.parametrize("stand", [None, *STANDS])
def test_interrupted_apply(stand: Stand | None, memory: Path) -> None:
    board = Board(memory)
    model = board.boot()
    if stand:  # without one there is no base file yet
        board.learn(model, 1)
        model.apply(model.update(1))
        stand(board, "plan.ulm.base")
    first = bytes(model.train_blob), model.base_id
    model = board.boot()
    assert (bytes(model.train_blob), model.base_id) == first
    start = board.files()
    board.learn(model, 2)
    update = model.update(5)
    trained = weights(model)
    base_path = model.base_path

    def untouched() -> bool:
        # Nothing is half-applied: weights, base and what the next update is counted from are as they were.
        return weights(model) == trained and model.base_id == first[1] and model.update(5) == update

    board.put(start)
    model.apply(update)
    second = bytes(model.train_blob), model.base_id
    size = len((board.folder / "plan.ulm.base").read_bytes())
    assert second[0] == trained[0]
    # The same board again, as it was before it applied.
    board.put(start)
    model = board.boot()
    assert model.base_path == base_path
    model.train_blob[:], model.state[:] = trained

    def interrupted(what: str, prepare: Callable[[], None]) -> int:
        board.put(start)
        status = child(prepare, lambda: model.apply(update), untouched)
        assert status != TOUCHED, f"{what}: the update was refused, and something has changed"
        assert status in (DONE, REFUSED, -signal.SIGXFSZ, -signal.SIGKILL), f"{what}: the child ended with {status}"
        again = board.boot()
        found = bytes(again.train_blob), again.base_id
        assert found == second or (found == first and status != DONE), f"{what}: neither the base before nor after"
        again.update(1)
        return status

    ways = ways_for(stand)
    results = [interrupted(what, prepare) for what, prepare in faults(size, ways)]
    assert results.count(REFUSED) == size and results.count(-signal.SIGXFSZ) == size * (len(ways) - 1)
    lines = 0
    while interrupted(f"killed at line {lines}", kill_at_line(lines)) != DONE:
        lines += 1
    assert lines > 20


def test_full_disk_then_retry(memory: Path) -> None:
    # An update that could not be written can be applied again when there is room.
    board = Board(memory)
    model = board.boot()
    board.learn(model, 1)
    update = model.update(1)

    def work() -> None:
        soft = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, soft[1]))
        with pytest.raises(OSError):
            model.apply(update)
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        model.apply(update)

    assert child(lambda: None, work, lambda: False) == DONE
    assert bytes(board.boot().train_blob) == bytes(model.train_blob)


# ---- Real file systems on MicroPython --------------------------------------------------------------------------------


@pytest.mark.parametrize("file_system", ["lfs2", "fat"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_failing_block_device(file_system: str, size: str, tmp_path: Path) -> None:
    # littlefs promises that a file is old or new. FAT's rename removes the old one first; we find the new one then.
    seed, widest = (3, 8) if size == "small" else (3, 24)
    plan = tmp_path / "plan.ulm"
    plan.write_bytes(cases.random_case(seed, widest).plan.data)
    script = ROOT / "tests" / "device" / "power_loss.py"
    path = f"{ROOT / 'firmware'}:{find_native('x64').parent}"
    run = subprocess.run(
        [find_micropython(), "-X", "heapsize=128m", script, plan, file_system],
        env={"MICROPYPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]
    print(run.stdout)
    lines = run.stdout.splitlines()
    assert not [line for line in lines if line.startswith("FAULT")], "\n".join(lines)
    assert not run.stderr, run.stderr
    # Both works, four modes each and the second cut; in every mode several operations, each of which was tried.
    tallies = [line.split(": ", 1)[1] for line in lines]
    assert len(tallies) == 10
    for tally in tallies:
        counted, before, after, faulty = (int(part.split()[0]) for part in tally.split(", "))
        assert counted >= 5 and before + after >= counted and faulty == 0, lines
