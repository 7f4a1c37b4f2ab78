"""`ulearn deploy` on real ports: what it copies, what it refuses, and what an interruption leaves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import cases
import ulearn
from test_cli import run
from ulearn import selftest
from ulearn_host import asking, deploy, emulate, fleet
from ulearn_host.compiler import Options
from ulearn_host.errors import UserError
from ulearn_host.link import Link
from ulearn_host.prepare import from_network
from ulearn_host.tflite_import import load_tflite

# Those without a ROMFS, which is used in place of the file system: tests/test_romfs.py.
BOARDS = sorted(name for name in emulate.emulated_boards() if "romfs_bytes" not in emulate.board_facts(name))
CLIPS = 12
INTERRUPTIONS = 8
LIMIT_S = 15
LEAST_BYTES_PER_S = 500_000


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "a.ulm"
    path.write_bytes(next(c for c in map(cases.random_case, range(1, 50)) if c.targets.ndim == 1).plan.data)
    return path


@pytest.fixture(scope="module")
def kws(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """kws01, of which the last layer and two biases train, and clips to train on."""
    return keywords(tmp_path_factory.mktemp("kws"), shared_data)


def keywords(folder: Path, shared_data: Path, scheme: Literal["sparse", "last"] = "sparse") -> Path:
    """Put that network's plan, kws.ulm, and clips.npz into a folder."""
    network = replace(load_tflite(shared_data / "models" / "kws01_dscnn_int8.tflite"), loss="softmax_ce")
    rows = [(0, i >= len(network.layers) - 3) for i in range(len(network.layers))]
    rows[-1] = (len(network.layers[-1].weights), True)
    options = Options("sparse", selection=tuple(rows), gradients="int8") if scheme == "sparse" else Options(scheme)
    (folder / "kws.ulm").write_bytes(from_network(network, options=options).data)
    with np.load(shared_data / "kws" / "kws_test_4890_mfcc_int8.npz") as clips:
        x = (clips["X"][:CLIPS].reshape(CLIPS, -1).astype(np.float32) - clips["zero_point"]) * clips["scale"]
        np.savez(folder / "clips.npz", x=x, y=clips["y"][:CLIPS])
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_changed_is_copied(plan: Path, tmp_path: Path) -> None:
    with emulate.start("UNIX", folder=tmp_path / "board") as board:
        done: list[int] = []
        first = deploy.deploy(board.port, plan, lambda percent, total: done.append(percent))
        assert done[0] == 0 and done[-1] == 100 and done == sorted(done)
        assert "lib/ulab_kernels.mpy" in first.copied and first.executor == "native"
        assert first.tested == selftest.run(str(plan)) and all(first.tested)
        was = files(tmp_path / "board")
        assert was["a.ulm"] == plan.read_bytes() and not [n for n in was if n.endswith((".part", ".new"))]
        assert deploy.deploy(board.port, plan).copied == ()
        # Python beside the compiled file would be imported in its place; a damaged module is copied again.
        (tmp_path / "board" / "lib" / "ulearn" / "agent.py").write_text("raise SystemError")
        (tmp_path / "board" / "lib" / "ulearn" / "model.mpy").write_bytes(b"")
        (tmp_path / "board" / "a.ulm.base").write_bytes(b"of another plan")
        assert deploy.deploy(board.port, plan).copied == ("lib/ulearn/model.mpy",)
        assert files(tmp_path / "board") == was


def test_a_plan_that_computes_otherwise_is_not_taken(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "a.ulm"
    other.write_bytes(cases.random_case(0).plan.data)
    with emulate.start("UNIX", folder=tmp_path / "board") as board:
        deploy.deploy(board.port, plan)
        right = selftest.run(str(other))
        for at, what in ((0, "an inference"), (1, "10 training steps"), (2, "10 training steps")):
            wrong = tuple(v ^ (i == at) for i, v in enumerate(right))
            monkeypatch.setattr(selftest, "run", lambda path, wrong=wrong: wrong)
            with pytest.raises(UserError, match=f"{what} on the board gave other bits.*keeps the plan it had"):
                deploy.deploy(board.port, other)
            assert (tmp_path / "board" / "a.ulm").read_bytes() == plan.read_bytes()


def test_the_self_test_starts_from_the_plans_weights(plan: Path, tmp_path: Path) -> None:
    """Whatever base lies beside it, and as often as one likes."""
    path = tmp_path / "a.ulm"
    path.write_bytes(plan.read_bytes())
    expected = selftest.run(str(path))
    case = next(c for c in map(cases.random_case, range(1, 50)) if c.targets.ndim == 1)
    model = ulearn.load(str(path))
    trainer = ulearn.Trainer(model, 0.1, skip=0)
    for x, y in zip(case.inputs, case.targets, strict=True):
        trainer.step(x.tobytes(), int(y))
    model.apply(model.update(3))
    assert (tmp_path / "a.ulm.base").exists()
    assert selftest.run(str(path)) == expected
    assert selftest.run(str(path), steps=9) != expected


def test_what_does_not_fit_is_refused_before_a_byte(tmp_path: Path, shared_data: Path) -> None:
    """Heap, its largest piece, and flash; on the smallest board."""
    network = replace(load_tflite(shared_data / "models" / "kws01_dscnn_int8.tflite"), loss="softmax_ce")
    full = tmp_path / "full.ulm"
    full.write_bytes(from_network(network, options=Options("full")).data)
    last = tmp_path / "last.ulm"
    last.write_bytes(from_network(network, options=Options("last")).data)
    with emulate.start("QEMU_CORTEX_M3", folder=tmp_path / "board") as board:
        for name, words in ((full, "bytes of heap at the least"), (last, "bytes of flash")):
            if name == last:
                fill = "import os\ns=os.statvfs('/')\nb=bytes(s[0])\nf=open('big','wb')\n"
                fill += "for i in range(s[3]-8):n=f.write(b)\nf.close()"
                deploy.mpremote(board.port, "exec", fill)
            before = deploy.mpremote(board.port, "fs", "ls", ":").split()
            refusal = run("deploy", name, "--port", board.port, fails=True).stderr
            assert words in " ".join(refusal.split())
            assert deploy.mpremote(board.port, "fs", "ls", ":").split() == before


def test_an_interrupted_deploy_completes(plan: Path, tmp_path: Path) -> None:
    """The command killed at random moments: the board keeps a whole plan, and the next run completes."""
    rng = random.Random(1)
    old = tmp_path / "old" / "a.ulm"
    old.parent.mkdir()
    old.write_bytes(cases.random_case(0).plan.data)
    folder = tmp_path / "board"
    with emulate.start("UNIX", folder=folder) as board:
        deploy.deploy(board.port, old)
        command = [sys.executable, "-m", "ulearn_host.cli", "deploy", "--port", board.port]
        killed, whole = 0, 0.0
        for _ in range(INTERRUPTIONS):
            for path in (folder / "lib").rglob("*.mpy"):
                path.write_bytes(b"old")
            if not whole:  # how long it takes on this machine, as busy as it is
                began = time.monotonic()
                subprocess.run([*command, str(old)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                whole = time.monotonic() - began
                continue
            process = subprocess.Popen([*command, str(plan)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(rng.uniform(0.2, 0.9) * whole)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
            assert (folder / "a.ulm").read_bytes() in (old.read_bytes(), plan.read_bytes())
        assert killed > 1
        deploy.deploy(board.port, plan)
        assert (folder / "a.ulm").read_bytes() == plan.read_bytes()
        assert deploy.deploy(board.port, plan).copied == ()


def test_a_board_that_loses_power_in_a_deploy(plan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "board"
    for percent in (15, 30, 60, 80):
        with emulate.start("UNIX", folder=folder) as board:

            def cut(done: int, total: int, board: emulate.EmulatedBoard = board, percent: int = percent) -> None:
                if done >= percent:
                    board.kill()

            began = time.monotonic()
            with pytest.raises(UserError, match=board.port):
                deploy.deploy(board.port, plan, cut)
            assert time.monotonic() - began < asking.TIMEOUT_S / 2
    with emulate.start("UNIX", folder=folder) as board:
        deploy.deploy(board.port, plan)
        assert (folder / "a.ulm").read_bytes() == plan.read_bytes()


def test_frames_are_fast(unix_board, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = random.Random(0).randbytes(2_000_000)
    with Link.open(unix_board.port, buffer_bytes=8192) as link:
        began = time.monotonic()
        link.file_put("large", data)
        speed = len(data) / (time.monotonic() - began)
    print(f"{speed / 1000:.0f} KB/s")
    assert (unix_board.board.folder / "large").read_bytes() == data
    (unix_board.board.folder / "large").unlink()
    assert speed > LEAST_BYTES_PER_S


# ---- A real network on every board -----------------------------------------------------------------------------------


def learned(port: str, folder: Path) -> tuple[bytes, float]:
    """Deploy and train with the command, read the update back; its bytes, and the seconds that deploying took."""
    began = time.monotonic()
    run("deploy", folder / "kws.ulm", "--port", port)
    took = time.monotonic() - began
    trained = run("train", folder / "kws.ulm", "--port", port, "--data", folder / "clips.npz", "--epochs", 2,
                  "--lr", 0.02, "--holdout", 0, "--checkpoint", "after.ck", "--json")  # fmt: skip
    assert json.loads(trained.stdout)["steps"] == 2 * CLIPS
    with Link.open(port) as link:
        link.load("")  # there may be no room for two
        link.load("kws.ulm")
        link.restore("after.ck")
        return link.update_get(CLIPS), took


def simulated(folder: Path) -> bytes:
    """The same by the board's own code in this process."""
    model = ulearn.load(str(folder / "kws.ulm"))
    with np.load(folder / "clips.npz") as clips:
        learn, _ = fleet.split(fleet.PlanFacts(folder / "kws.ulm").samples(clips["x"], clips["y"], "clips"), 0, 1)
    samples = ulearn.Samples(model, len(learn))
    for x, y in zip(learn.x, learn.y, strict=True):
        samples.add(x.tobytes(), int(y))
    ulearn.Trainer(model, 0.02, 1, 1 / 16).fit(samples, 2)
    return bytes(model.update(CLIPS))


@pytest.mark.parametrize("name", BOARDS)
def test_kws_learns_on_every_board(name: str, kws: Path, tmp_path: Path, shared_data: Path) -> None:
    if emulate.board_facts(name)["heap_bytes"] < 128 * 1024:  # on an ESP32's heap there is room for the last layer
        kws = keywords(tmp_path, shared_data, "last")
    with emulate.start(name) as board:
        update, took = learned(board.port, kws)
        print(f"{name}: deployed in {took:.1f} s")
        assert update == simulated(kws)
        assert took < LIMIT_S


def test_two_boards_at_once(kws: Path) -> None:
    with emulate.start("UNIX") as one, emulate.start("QEMU_CORTEX_M0") as two, ThreadPoolExecutor(2) as pool:
        updates = [update for update, _ in pool.map(lambda port: learned(port, kws), (one.port, two.port))]
    assert updates == [simulated(kws)] * 2
