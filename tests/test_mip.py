"""`mpremote mip install` from firmware/*.json: what they list, what a board can do with it, what it is spared."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cases
from conftest import HERE, ON_DEBIAN
from test_bits import micropython
from ulearn_host import deploy, emulate, mip_package
from ulearn_host.compiler import Options, compile_plan

FIRMWARE = HERE.parent / "firmware"
LISTS = sorted(mip_package.packages())
TRAINER = ("trainer", "fitting", "evaluation", "batch", "statistics", "samples", "update", "checkpoint", "agent",
           "frames", "ulab_training")  # fmt: skip
INFER = """import ulearn
m = ulearn.load('{plan}', frozen='{frozen}')
try:
    m.predict([0])
except ValueError as fault:
    print(str(fault).split()[0])
assert m.meta["scheme"] and ulearn.executor
print(m.predict(bytes(m.input_bytes)))"""
TRAIN = "; t = ulearn.Trainer(m); print(t.step(bytes(m.input_bytes), 0) >= 0, m.counters()[0])"
# What a board that only infers is asked: a plan with nothing to train, in RAM and streamed, and one that trains, too.
QUESTIONS = (("none.ulm", "auto"), ("none.ulm", "stream"), ("last.ulm", "auto"))


def listed(name: str) -> dict[str, str]:
    """Where each file goes on a board, and where it comes from."""
    return dict(json.loads((FIRMWARE / name).read_text())["urls"])


def modules(name: str) -> set[str]:
    """The package's modules in a list."""
    return {Path(place).stem for place in listed(name) if place.startswith("ulearn/")}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one classifier, with and without a training program."""
    folder = tmp_path_factory.mktemp("plans")
    networks = (cases.random_network(np.random.default_rng(seed)) for seed in range(9))
    network = next(network for network in networks if network.loss == "softmax_ce")
    for scheme in ("none", "last"):
        (folder / f"{scheme}.ulm").write_bytes(compile_plan(network, Options(scheme)).data)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """firmware/ on a web server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=FIRMWARE)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_lists_are_current() -> None:
    """python -m ulearn_host.mip_package --write has nothing to write."""
    assert mip_package.stale() == []


@pytest.mark.parametrize("name", LISTS)
def test_listed_files_are_there(name: str) -> None:
    """Each beside the list or below it, so that an address is put together without a `..`."""
    for source in listed(name).values():
        assert ".." not in source and (FIRMWARE / source).is_file(), source


def test_no_file_of_the_package_is_left_out() -> None:
    """The portable list is the whole package; an architecture's lacks nothing but what stands in for the kernels."""
    everything = {path.stem for path in (FIRMWARE / "ulearn").glob("*.py")}
    assert modules("package.json") == everything
    for arch in mip_package.ARCHITECTURES:
        assert everything - modules(f"{arch}.json") == {"ulab_executor", "ulab_operators", "ulab_training", "cpython"}
        native = set(listed(f"{arch}.json")) - {f"ulearn/{name}.mpy" for name in everything}
        assert native == {f"{name}.mpy" for name in emulate.NATIVE_MODULES}
        assert set(listed(f"{arch}-inference.json")) & native == {"ulab_infer.mpy"}


@pytest.mark.parametrize("name", [name for name in LISTS if "inference" in name])
def test_inference_holds_no_trainer(name: str) -> None:
    """Neither its modules nor its kernels."""
    assert not modules(name) & set(TRAINER)
    trains = {f"{module}.mpy" for module in emulate.NATIVE_MODULES} - {"ulab_infer.mpy"}
    assert not trains & set(listed(name))


def infers(folder: Path, plans: Path) -> list[str]:
    """Ask all QUESTIONS of a Unix port that has only the files of a folder; what each says, '' for a failure."""
    said = []
    for plan, frozen in QUESTIONS:
        try:
            said += micropython(emulate.find_micropython(), plans, [folder], INFER.format(plan=plan, frozen=frozen))
        except AssertionError:
            said.append("")
    return said


def copied(name: str, folder: Path) -> Path:
    """A folder as mip would leave a board's /lib."""
    for place, source in listed(name).items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FIRMWARE / source, folder / place)
    return folder


def test_inference_is_what_it_needs(plans: Path, tmp_path: Path) -> None:
    """It answers as the whole package does, and there is no file that it could do without."""
    whole = infers(copied("x64.json", tmp_path / "whole"), plans)
    folder = copied("x64-inference.json", tmp_path / "inference")
    assert infers(folder, plans) == whole and all(whole)
    for place in listed("x64-inference.json"):
        (folder / place).rename(tmp_path / "away")
        assert "" in infers(folder, plans), f"{place} is not needed"
        (tmp_path / "away").rename(folder / place)


def test_inference_without_kernels(plans: Path, tmp_path: Path) -> None:
    """The portable one with what stands in for ulab under CPython, and nothing to spare in it either."""
    folder = copied("inference.json", tmp_path / "portable")

    def answers(plan: str, frozen: str) -> bool:
        blocked = f"import sys; sys.modules['ulab_kernels'] = None; sys.path.insert(0, {str(folder)!r}); "
        code = (
            blocked + INFER.format(plan=plan, frozen=frozen) + f"; assert ulearn.__file__.startswith({str(folder)!r})"
        )
        return subprocess.run([sys.executable, "-c", code], cwd=plans, capture_output=True).returncode == 0

    assert all(answers(*question) for question in QUESTIONS)
    for name in ("ulab_executor", "ulab_operators"):
        assert f"ulearn/{name}.py" in listed("inference.json")


def lib(board: emulate.EmulatedBoard) -> set[str]:
    """What lies in a Unix board's /lib."""
    root = board.folder / "lib"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["x64.json", "x64-inference.json"])
def test_mip_on_the_unix_board(name: str, server: str, plans: Path) -> None:
    """From a web server; then the board infers and, with the whole package, takes a step."""
    with emulate.start("UNIX") as board:
        deploy.mpremote(board.port, "mip", "install", f"{server}/{name}")
        assert lib(board) == set(listed(name))
        shutil.copy(plans / "last.ulm", board.folder)
        code = INFER.format(plan="last.ulm", frozen="auto") + ("" if "inference" in name else TRAIN)
        said = deploy.mpremote(board.port, "soft-reset", "exec", code + "; print(ulearn.executor)").split()
        assert said[0] == "input" and said[1].isdigit()
        assert said[2:] == (["native"] if "inference" in name else ["True", "1", "native"])


def test_mip_takes_a_folder_and_a_file(server: str) -> None:
    """The portable package by the name of its folder, and an architecture's from the local disk."""
    with emulate.start("UNIX") as board:
        deploy.mpremote(board.port, "mip", "install", f"{server}/")
        assert lib(board) == set(listed("package.json"))
    with emulate.start("UNIX") as board:
        deploy.mpremote(board.port, "mip", "install", str(FIRMWARE / "x64.json"))
        assert lib(board) == set(listed("x64.json"))


def test_mip_on_a_cortex_m0(server: str, plans: Path) -> None:
    """The bytecode that mip brings, with the native modules."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated board cannot be built")
    with emulate.start("QEMU_CORTEX_M0") as board:
        deploy.mpremote(board.port, "mip", "install", f"{server}/armv6m.json")
        deploy.mpremote(board.port, "fs", "cp", str(plans / "last.ulm"), ":")
        code = INFER.format(plan="last.ulm", frozen="auto") + TRAIN
        said = deploy.mpremote(board.port, "soft-reset", "exec", code + "; print(ulearn.executor)").split()
        assert said[0] == "input" and said[1].isdigit() and said[2:] == ["True", "1", "native"]
