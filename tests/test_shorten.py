"""The names that the package's bytecode has on a board."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import code_heap
from conftest import HERE, ON_DEBIAN
from ulearn_host import deploy, emulate, shorten
from ulearn_host.compiler import Options, compile_plan

ROOT = HERE.parent
FIRMWARE = ROOT / "firmware"


def identifiers(text: str) -> set[str]:
    """All names in a text of Python."""
    return shorten._tokens(text)


def test_every_firmware_has_the_words() -> None:
    """Those of the emulated boards' and of the Unix port, as their builds list them."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: no firmware is built here")
    lists = sorted((emulate.cache_dir() / "build").glob("*/genhdr/qstrdefs.generated.h"))
    lists = [path for path in lists if "mpy-cross" not in path.parts[-3]]
    assert len(lists) >= 4
    for path in lists:
        known = set(re.findall(r'^QDEF\d?\(\w+, \d+, \d+, "(\w+)"\)', path.read_text(), re.M))
        assert len(known) > 400
        assert set(shorten._WORDS) <= known, path


def test_no_meaning_changes() -> None:
    """Different names get different words, which nothing in the package is called by."""
    chosen, parameters = shorten.names()
    words = [*chosen.values(), *parameters]
    assert len(set(words)) == len(words) and len(chosen) > 150
    everything = set().union(*(identifiers(path.read_text()) for path in shorten.sources().values()))
    assert not set(words) & everything and set(chosen) <= everything
    for path in shorten.sources().values():
        before, after = ast.parse(path.read_text()), ast.parse(shorten.shortened(path))
        functions = [[n for n in ast.walk(t) if isinstance(n, ast.FunctionDef)] for t in (before, after)]
        for old, new in zip(*functions, strict=True):
            assert new.name == chosen.get(old.name, old.name)
            for a, b in zip(old.args.args, new.args.args, strict=True):
                assert b.arg == a.arg or b.arg in parameters


def test_what_others_name_keeps_its_name() -> None:
    """Whatever the examples, the tests on boards, the README and the host's snippets say is there by that name."""
    chosen = shorten.names()[0]
    places = [*(FIRMWARE / "examples").rglob("*.py"), *(HERE / "device").glob("*.py")]
    said = set().union(*(identifiers(path.read_text()) for path in places))
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        said |= identifiers(block)
    for path in (ROOT / "host" / "ulearn_host").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import ulearn" in node.value:
                said |= set(re.findall(r"\w+", node.value))
    # An attribute of theirs may be called as one of ours; what begins with an underscore is nobody else's.
    assert not {name for name in said if name in chosen and not name.startswith("_")}
    assert not {name for name in re.findall(r"\w+\.(_\w+)", " ".join(p.read_text() for p in places)) if name in chosen}


def test_public_parameters_keep_their_names() -> None:
    """What may be given by keyword: of all functions and classes without an underscore, but for the loader's."""
    chosen, parameters = set(shorten.names()[0].values()), shorten.names()[1]
    for module, path in shorten.sources().items():
        if module in shorten._INTERNAL:
            continue
        for node in ast.walk(ast.parse(shorten.shortened(path))):
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in chosen
            if isinstance(node, ast.FunctionDef) and public:
                assert not {a.arg for a in node.args.args} & set(parameters), (module, node.name)


def test_the_table_is_printed() -> None:
    """To read a traceback by."""
    run = subprocess.run([sys.executable, "-m", "ulearn_host.shorten"], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == len(shorten.names()[0])
    assert dict(line.split()[::-1] for line in lines) == shorten.names()[0]


NAMES = """
import micropython, ulearn
m = ulearn.load('x.ulm')
t = ulearn.Trainer(m)
s = ulearn.Samples(m, 2)
s.add(bytes(m.input_bytes), 0)
t.fit(s, 1)
micropython.qstr_info()
import ulearn.agent
micropython.qstr_info()
"""


def test_names_take_less_of_a_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the heap, what names take after a fit, and with the agent: a table that has room for the user's own names."""
    if not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated board cannot be built")
    path = tmp_path / "x.ulm"
    path.write_bytes(compile_plan(code_heap.perceptron(), Options("last")).data)
    taken = []
    with emulate.start("QEMU_CORTEX_M0") as board:
        for _ in range(2):
            deploy.deploy(board.port, path)
            said = deploy.mpremote(board.port, "soft-reset", "exec", NAMES)
            taken.append([int(size) for size in re.findall(r"n_total_bytes=(\d+)", said)])
            monkeypatch.setattr(shorten, "shortened", lambda path: path.read_text())
    print(f"after a fit and with the agent: {taken[0]} bytes of names, {taken[1]} as they are written")
    assert taken[1][0] - taken[0][0] >= 500 and taken[1][1] - taken[0][1] >= 3000
