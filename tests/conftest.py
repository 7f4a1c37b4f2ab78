"""What the suite shares: paths, boards that are started once, and the rule that green by skipping is red."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell starts what it does not wait for with Ctrl-C ignored, and every process below inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "device")]

from ulearn_host import deploy, emulate  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, no worker lists or asks another one's boards
    os.environ["ULEARN_RUNNING"] = tempfile.mkdtemp(prefix="ulearn-running-")

ON_DEBIAN = Path("/etc/debian_version").exists()
# The only absences that may skip a test: the shared data, an interpreter with ulab, flwr; a system that is not Debian.
ALLOWED_SKIPS = ("ULEARN_DATA", "ULEARN_MICROPYTHON_ULAB", "flwr", *(() if ON_DEBIAN else ("not a Debian system",)))


def data_folder() -> Path | None:
    """The folder of shared recordings and models, if there is one."""
    named = os.environ.get("ULEARN_DATA")
    folder = Path(named) if named else HERE.parent.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data, or a skip that says what is missing."""
    folder = data_folder()
    if folder is None:
        pytest.skip("the shared data is missing: set ULEARN_DATA or put it at ../shared/data")
    return folder


class Device:
    """A started board to which files are copied once and on which device tests are run."""

    def __init__(self, board: emulate.EmulatedBoard) -> None:
        self.board = board
        self.port = board.port

    def put(self, *files: Path) -> None:
        """Copy files to the board's root."""
        deploy.mpremote(self.port, "fs", "cp", *(str(f) for f in files), ":")

    def fresh(self, code: str) -> list[str]:
        """The same on a board that has just been reset, with all its heap."""
        lines = deploy.mpremote(self.port, "soft-reset", "exec", code).splitlines()
        return [line.rstrip() for line in lines]

    def run(self, code: str) -> list[str]:
        """Execute code and return the lines it printed."""
        return [line.rstrip() for line in deploy.mpremote(self.port, "exec", code).splitlines()]


def _device(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    if name.startswith("QEMU") and not ON_DEBIAN:
        pytest.skip("not a Debian system: the emulated board cannot be built")
    import cases

    folder = tmp_path_factory.mktemp("plan")
    (folder / "first.ulm").write_bytes(cases.random_case(0).plan.data)
    with emulate.start(name) as board:
        deploy.deploy(board.port, folder / "first.ulm")
        # A deploy brings what its plan needs; tests bring others.
        arch = emulate.board_facts(name)["arch"]
        modules = [str(emulate.find_native(arch, module=module)) for module in emulate.NATIVE_MODULES]
        deploy.mpremote(board.port, "fs", "cp", *modules, ":lib/")
        yield Device(board)


@pytest.fixture(scope="session")
def cortex_m0(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """An emulated Cortex-M0 with an RP2040's heap, the package and the native module on it."""
    yield from _device("QEMU_CORTEX_M0", tmp_path_factory)


@pytest.fixture(scope="module")
def own_cortex_m0(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """The same for one module alone, with all of its flash."""
    yield from _device("QEMU_CORTEX_M0", tmp_path_factory)


@pytest.fixture(scope="session")
def unix_board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A board on the Unix port, the package and the native module on it."""
    yield from _device("UNIX", tmp_path_factory)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the skips that nothing allowed caused."""
    for report in terminalreporter.stats.get("skipped", []):
        if not _allowed(report):
            terminalreporter.write_line(f"skipped without leave: {report.nodeid}: {report.longrepr[2]}", red=True)


def _allowed(report: pytest.TestReport) -> bool:
    return any(word in str(report.longrepr) for word in ALLOWED_SKIPS)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the run on such a skip."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if exitstatus == 0 and not all(_allowed(report) for report in skipped):
        session.exitstatus = 1
