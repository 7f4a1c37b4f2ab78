"""ROMFS: images that MicroPython reads and uses where they lie, and `ulearn deploy` on a board that has one."""

from __future__ import annotations

import binascii
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cases
import code_heap
from conftest import HERE, ON_DEBIAN
from test_bits import FIRMWARE, micropython
from test_cli import run
from test_deploy import CLIPS, keywords, learned, simulated
from ulearn_host import asking, deploy, deploy_rom, emulate, romfs
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.link import Link

TREES = 40


def plans(count: int) -> dict[str, cases.Case]:
    """Plans of random networks, by the names of their files."""
    return {f"{seed}.ulm": cases.random_case(seed) for seed in range(count)}


# ---- Images ----------------------------------------------------------------------------------------------------------


def random_tree(rng: random.Random, letter: str = "ü") -> dict[str, bytes]:
    """Files of all lengths with names of all lengths, some in folders, some empty, some large."""
    folders = [""]
    for _ in range(rng.randrange(6)):
        folders.append(rng.choice(folders) + "d" * rng.randrange(1, 140) + f"{len(folders)}/")
    sizes = [
        rng.choice((rng.randrange(9), rng.randrange(300), rng.randrange(40_000))) for _ in range(rng.randrange(20))
    ]
    names = [
        rng.choice(folders) + letter * rng.randrange(3) + "f" * rng.randrange(9) + str(i) for i in range(len(sizes))
    ]
    return {name: rng.randbytes(size) for name, size in zip(names, sizes, strict=True)}


def test_micropython_reads_every_file_aligned(tmp_path: Path) -> None:
    """Random trees: each file reads back, in a memoryview at a multiple of 4, and there are no others."""
    rng = random.Random(1)
    trees = [random_tree(rng) for _ in range(TREES)]
    for i, tree in enumerate(trees):
        (tmp_path / f"{i}.romfs").write_bytes(romfs.image(tree))
        assert (tmp_path / f"{i}.romfs").stat().st_size % 4 == 0
    code = f"""if True:
        import os, vfs, uctypes, binascii
        def walk(p):
            for n, kind, _, size in os.ilistdir(p):
                if kind == 0x4000:
                    walk(p + '/' + n)
                    continue
                with open(p + '/' + n, 'rb') as f:
                    v = memoryview(f)
                    assert len(v) == size == os.stat(p + '/' + n)[6] and f.read() == v
                    if not size or not uctypes.addressof(v) & 3:
                        print(p[5:] + '/' + n if p[5:] else n, size, '%08x' % binascii.crc32(v))
        for i in range({TREES}):
            vfs.mount(vfs.VfsRom(open('%d.romfs' % i, 'rb').read()), '/rom')
            print('tree', i)
            walk('/rom')
            vfs.umount('/rom')"""
    lines = micropython(emulate.find_micropython(), tmp_path, [], code)
    wanted = []
    for i, tree in enumerate(trees):
        wanted.append({f"tree {i}"} | {f"{name} {len(data)} {crc(data)}" for name, data in tree.items()})
    assert sum(map(len, trees)) > 100
    for i in reversed(range(TREES)):
        at = lines.index(f"tree {i}")
        lines, part = lines[:at], lines[at:]
        assert len(part) == len(wanted[i]) and set(part) == wanted[i]


def crc(data: bytes) -> str:
    return f"{binascii.crc32(data):08x}"


def test_impossible_paths_are_refused() -> None:
    for wrong in ({"/a": b""}, {"a//b": b""}, {"a/": b""}, {"": b""}):
        with pytest.raises(ValueError, match="no path in a ROMFS"):
            romfs.image(wrong)
    with pytest.raises(ValueError, match="a is a file, expected a folder"):
        romfs.image({"a": b"", "a/b": b""})
    with pytest.raises(ValueError, match="a is a folder, expected a file"):
        romfs.image({"a/b": b"", "a": b""})
    assert romfs.image({}) == romfs.EMPTY


def test_it_is_the_format_that_mpremote_writes(tmp_path: Path) -> None:
    """The same records but for padding: with their numbers shortened and padding left out, the two are equal."""
    tree = random_tree(random.Random(7), "u")
    for name, data in tree.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    command = [sys.executable, "-m", "mpremote", "romfs", "-o", tmp_path / "image", "build", tmp_path / "files"]
    subprocess.run(command, check=True, capture_output=True)
    assert records(romfs.image(tree)) == records((tmp_path / "image").read_bytes())


def records(data: bytes) -> dict[bytes, object]:
    """Files and folders in an image's records, by name."""
    found: dict[bytes, object] = {}
    at = 0
    while at < len(data):
        kind, at = number(data, at)
        size, at = number(data, at)
        body, at = data[at : at + size], at + size
        if kind == 0x14A6B1:
            return records(body)
        if kind in (4, 5):
            length, start = number(body, 0)
            name, inner = body[start : start + length], body[start + length :]
            found[name] = records(inner) if kind == 4 else records(inner)[b""]
        if kind == 2:
            found[b""] = body
    return found


def number(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    while True:
        value = value << 7 | data[at] & 127
        at += 1
        if data[at - 1] < 128:
            return value, at


def test_plans_and_modules_run_from_an_image(tmp_path: Path) -> None:
    """In place, by their plain name, too; what is saved with them lies in the file system."""
    files = {f"lib/ulearn/{path.name}": path.read_bytes() for path in (FIRMWARE / "ulearn").glob("*.py")}
    for module in emulate.NATIVE_MODULES:
        files[f"lib/{module}.mpy"] = emulate.find_native("x64", module=module).read_bytes()
    chosen = {name: case for name, case in plans(12).items() if case.targets.ndim == 1}
    assert len(chosen) > 3
    (tmp_path / "image").write_bytes(romfs.image(files | {name: case.plan.data for name, case in chosen.items()}))
    for name, case in chosen.items():
        (tmp_path / f"{name}.x").write_bytes(case.inputs[0].tobytes())
    shutil.copy(HERE / "device" / "in_rom.py", tmp_path)
    for name in chosen:
        shutil.rmtree(tmp_path / "flash", ignore_errors=True)
        (tmp_path / "flash").mkdir()
        code = f"import in_rom\nin_rom.main({str(tmp_path)!r}, {name!r})"
        lines = micropython(emulate.find_micropython(), tmp_path / "flash", ["/rom/lib", tmp_path], code)
        assert lines == ["package /rom/lib/ulearn/__init__.py", "in place", "in place", "ok"]
        assert {p.name for p in (tmp_path / "flash").iterdir()} == {f"{name}.base", "a.ck"}


# ---- A board that has one --------------------------------------------------------------------------------------------

BOARD = "QEMU_M0_ROMFS"
INTERRUPTIONS = 6
# Heap of package and native modules in the file system, less the same in the ROMFS: bytecode and names stay in flash.
# What loads a plan is forgotten once one is loaded. By what is imported: inference, a plan being loaded, training.
INFERENCE = "import ulearn, ulearn.model; from ulearn.loading import choose; choose('', ['ulab_kernels'])"
IMPORTS = {
    "inference": INFERENCE,
    "loading": INFERENCE + "; import ulearn.loader, ulearn.plan, ulearn.verify",
    "training": INFERENCE + "; import ulearn.samples, ulearn.trainer, ulearn.fitting",
}
SAVES = {"inference": 2_500, "loading": 14_000, "training": 4_500}
FILES = """if True:
    import os
    def walk(p):
        for n, kind, *_ in os.ilistdir(p or '/'):
            walk(p + '/' + n) if kind == 0x4000 else print('file ' + p + '/' + n)
    walk('')
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small plan that trains."""
    path = tmp_path_factory.mktemp("plan") / "a.ulm"
    path.write_bytes(next(c for c in map(cases.random_case, range(1, 50)) if c.targets.ndim == 1).plan.data)
    return path


def start(folder: Path) -> emulate.EmulatedBoard:
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated board cannot be built")
    return emulate.start(BOARD, folder=folder)


def after_reset(port: str, code: str) -> list[str]:
    """What code prints on a board with a fresh heap."""
    return [line.rstrip() for line in deploy.mpremote(port, "soft-reset", "exec", code).splitlines()]


def on_board(port: str) -> tuple[set[str], set[str]]:
    """Files in the ROMFS, and the others."""
    every = {line[5:] for line in after_reset(port, FILES)}
    rom = {name for name in every if name.startswith("/rom/")}
    return rom, every - rom


def test_kws_learns_from_the_romfs(shared_data: Path, tmp_path: Path) -> None:
    """All by the commands: in place, with the simulation's bits; a base and checkpoints lie in the file system."""
    kws = keywords(tmp_path, shared_data)
    with start(tmp_path / "board") as board:
        update, took = learned(board.port, kws)
        print(f"deployed in {took:.1f} s")
        assert update == simulated(kws)
        rom, flash = on_board(board.port)
        assert {"/rom/kws.ulm", "/rom/lib/ulearn/model.mpy", "/rom/lib/ulab_kernels.mpy"} < rom
        assert flash == {"/after.ck"}
        again = json.loads(run("deploy", kws / "kws.ulm", "--port", board.port, "--json").stdout)
        assert again["copied"] == [] and again["note"] == "" and again["board"]["romfs_bytes"] == 524288
        said = after_reset(
            board.port, "import ulearn\nm = ulearn.load('kws.ulm')\nprint(m.frozen, m.path, m.meta != {})"
        )
        assert said == ["in place kws.ulm True"]
        scored = run("evaluate", kws / "kws.ulm", "--port", board.port, "--data", kws / "clips.npz", "--json")
        assert json.loads(scored.stdout)["samples"] == CLIPS
        with Link.open(board.port) as link:
            link.load("kws.ulm")
            base = link.update_put(update)
            facts = link.load("kws.ulm")
            assert facts is not None and facts.base_id == base
        assert on_board(board.port)[1] == {"/after.ck", "/kws.ulm.base"}
        # A new deploy begins with the plan's own weights.
        assert deploy.deploy(board.port, kws / "kws.ulm").copied == ()
        assert on_board(board.port)[1] == {"/after.ck"}


def test_to_the_romfs_and_back(plan: Path, tmp_path: Path) -> None:
    """Plans of other names move along; nothing is left behind in either place that would be used instead."""
    other = tmp_path / "b.ulm"
    other.write_bytes(cases.random_case(0).plan.data)
    load = "import ulearn\nprint(ulearn.__file__, ulearn.load('a.ulm').frozen, ulearn.load('b.ulm').frozen)"
    with start(tmp_path / "board") as board:
        assert deploy.deploy(board.port, plan, use_rom=False).note == ""
        deploy.mpremote(board.port, "exec", "open('lib/mine.py', 'w').close()")
        done = deploy.deploy(board.port, plan)
        assert "/rom/a.ulm" in done.copied and done.copied_bytes % 4 == 0
        rom, flash = on_board(board.port)
        assert flash == {"/lib/mine.py"}
        changed = deploy.deploy(board.port, other)
        assert set(changed.copied) == rom | {"/rom/b.ulm"} == on_board(board.port)[0]
        assert after_reset(board.port, load) == ["/rom/lib/ulearn/__init__.mpy in place in place"]
        assert deploy.deploy(board.port, plan).copied == deploy.deploy(board.port, other).copied == ()
        back = deploy.deploy(board.port, plan, use_rom=False)
        assert {"a.ulm.new", "b.ulm", "lib/ulearn/model.mpy"} < set(back.copied)
        rom, flash = on_board(board.port)
        assert not rom and {"/a.ulm", "/b.ulm", "/lib/ulearn/agent.mpy"} < flash
        assert after_reset(board.port, load) == ["/lib/ulearn/__init__.mpy ram ram"]
        assert deploy.deploy(board.port, plan, use_rom=False).copied == ()


def test_a_romfs_of_others_is_left_alone(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that no deploy put there, a list of ours or not; what would be imported first; too little room."""
    (tmp_path / "files").mkdir()
    with start(tmp_path / "board") as board:
        deploy_rom.write_image(board.port, romfs.image({"ulearn.txt": b"ulearn.txt\n", "a.jpg": b"1"}))
        told = run("deploy", plan, "--port", board.port).stdout
        assert "the ROMFS is left alone, a.jpg in it is not of ulearn deploy" in " ".join(told.split())
        rom, flash = on_board(board.port)
        assert rom == {"/rom/ulearn.txt", "/rom/a.jpg"} and {"/a.ulm", "/lib/ulearn/agent.mpy"} < flash
        deploy.mpremote(board.port, "fs", "cp", "-r", ":lib", str(tmp_path / "files"))
        for other in ({"lib/ulearn/a.py": b""}, {"ulab_kernels.py": b""}):
            deploy_rom.write_image(board.port, romfs.image({"a.jpg": b"1", **other}))
            with pytest.raises(UserError, match=f"holds {min(other)}, which is imported first .* beside a.jpg"):
                deploy.deploy(board.port, plan)
        # The same package in somebody's own image is good, and not copied once more.
        package = {name[1:]: (tmp_path / "files" / name[1:]).read_bytes() for name in flash if name.startswith("/lib/")}
        deploy.mpremote(board.port, "fs", "rm", "-r", ":lib")
        deploy_rom.write_image(board.port, romfs.image({"a.jpg": b"1", **package}))
        done = deploy.deploy(board.port, plan)
        assert done.note and done.copied == () and on_board(board.port)[1] == {"/a.ulm"}
        deploy_rom.write_image(board.port, romfs.EMPTY)
        monkeypatch.setattr(deploy_rom, "_CHUNK_BYTES", 1 << 20)
        done = deploy.deploy(board.port, plan)
        assert "the ROMFS has 524,288 bytes, package and plan take 1,048,576" in done.note
        assert "lib/ulearn/agent.mpy" in done.copied and "a.ulm" not in done.copied


def test_an_interrupted_deploy_completes(plan: Path, tmp_path: Path) -> None:
    """The command killed, or the board's power cut, at random moments; the next run completes."""
    rng = random.Random(3)
    other = tmp_path / "new" / "a.ulm"
    other.parent.mkdir()
    other.write_bytes(cases.random_case(0).plan.data)
    killed = 0
    with start(tmp_path / "board") as board:
        deploy.deploy(board.port, plan)
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "ulearn_host.cli", "deploy", str(other), "--port", board.port], check=True
        )
        whole = time.monotonic() - began  # on this machine, as busy as it is
    for turn in range(INTERRUPTIONS):
        with start(tmp_path / "board") as board:
            command = [sys.executable, "-m", "ulearn_host.cli", "deploy", str((plan, other)[turn % 2])]
            process = subprocess.Popen(
                [*command, "--port", board.port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(rng.uniform(0.2, 0.9) * whole)
            except subprocess.TimeoutExpired:
                killed += 1
            if turn % 3 == 1:
                board.kill()
            process.kill()
            process.wait()
    assert killed > 1
    with start(tmp_path / "board") as board:
        for wanted in (plan, other):
            done = deploy.deploy(board.port, wanted)
            assert done.note == "" and "/rom/a.ulm" in on_board(board.port)[0]
            assert deploy.deploy(board.port, wanted).copied == ()


def test_plans_keep_their_native_modules(plan: Path, tmp_path: Path) -> None:
    """A plan that infers, deployed after one that trains: both load, from the ROMFS and moved out of it."""
    (tmp_path / "none.ulm").write_bytes(compile_plan(code_heap.perceptron(), Options("none")).data)
    with start(tmp_path / "board") as board:
        deploy.deploy(board.port, plan)
        for use_rom in (True, False):
            deploy.deploy(board.port, tmp_path / "none.ulm", use_rom=use_rom)
            code = "import ulearn\nfor n in ('a.ulm', 'none.ulm'):\n m = ulearn.load(n)\n print(n, len(m.trainings))"
            assert after_reset(board.port, code) == ["a.ulm 1", "none.ulm 0"]
            step = "import ulearn\nm = ulearn.load('a.ulm')\nprint(ulearn.Trainer(m).step(bytes(m.input_bytes), 0) > 0)"
            assert after_reset(board.port, step) == ["True"]


def test_half_an_image_is_ours(plan: Path, tmp_path: Path) -> None:
    """Cut after any block of it, whatever comes behind."""
    with start(tmp_path) as board:
        deploy.deploy(board.port, plan)
    image = (tmp_path / "romfs.bin").read_bytes()
    for blocks in (0, 1, 2, 9, 15):
        (tmp_path / "romfs.bin").write_bytes(image[: 4096 * blocks].ljust(len(image), b"\xff"))
        with start(tmp_path) as board:
            answer = asking.ask_for(board.port, [], "soft-reset")
            assert not answer.foreign and bool(answer.rom) == (blocks > 0)
            if blocks in (1, 15):
                assert "/rom/a.ulm" in deploy.deploy(board.port, plan).copied
                assert (tmp_path / "romfs.bin").read_bytes() == image


def test_code_from_the_romfs_takes_less_heap(plan: Path, tmp_path: Path) -> None:
    """Package and native modules; the modules' code is copied into RAM from either place."""
    heap: dict[bool, dict[str, int]] = {}
    with start(tmp_path) as board:
        for use_rom in (True, False):
            deploy.deploy(board.port, plan, use_rom=use_rom)
            heap[use_rom] = {}
            for name, imports in IMPORTS.items():
                code = (
                    f"import gc\ngc.collect()\na = gc.mem_alloc()\n{imports}\ngc.collect()\nprint(gc.mem_alloc() - a)"
                )
                heap[use_rom][name] = int(after_reset(board.port, code)[0])
    for name, least in SAVES.items():
        print(f"{name}: {heap[True][name]:,} bytes from the ROMFS, {heap[False][name]:,} from the file system")
        assert heap[False][name] - heap[True][name] >= least
    saved = {name: heap[False][name] - heap[True][name] for name in IMPORTS}
    assert saved["inference"] >= deploy._ROM_SAVES[False] and saved["training"] >= deploy._ROM_SAVES[True]
