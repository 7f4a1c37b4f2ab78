"""The journal of a job: a transaction lasts or leaves no trace, whatever happens to its file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fleet_boards import Board, fleet
from test_trainer import plan as small_plan
from ulearn_host.errors import UserError
from ulearn_host.federation import published
from ulearn_host.federation.core import JOURNAL, MODEL, PLAN
from ulearn_host.federation.job import Job
from ulearn_host.federation.journal import VERSION, Journal
from ulearn_host.federation.rounds import Federation

JOB = Job("journal", 3, 2, retry_s=1.0, evaluate_every=1, min_group=1)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """An empty one."""
    return Journal(tmp_path / JOURNAL)


def note(journal: Journal, text: str) -> None:
    """A row."""
    journal.insert("audit", time=0.0, event="test", board=None, text=text)


def notes(journal: Journal) -> list[str]:
    """All rows."""
    return [row["text"] for row in journal.rows("SELECT text FROM audit ORDER BY n")]


def test_a_transaction_is_whole_or_nothing(journal: Journal) -> None:
    with journal.transaction():
        note(journal, "a")
    for fault in (ValueError, KeyboardInterrupt, sqlite3.IntegrityError):
        with pytest.raises(fault), journal.transaction():
            note(journal, "b")
            raise fault
    with pytest.raises(AssertionError, match="outside a transaction"):
        note(journal, "c")
    assert notes(journal) == ["a"]
    with journal.transaction():
        note(journal, "d")
    journal.close()
    assert notes(Journal(journal.path)) == ["a", "d"]


def test_settings_that_make_it_last(journal: Journal) -> None:
    """WAL; FULL is 2; an update counts once by the schema itself."""
    assert journal.value("PRAGMA journal_mode") == "wal"
    assert journal.value("PRAGMA synchronous") == 2
    row = {"round": 1, "board": "b", "entered": 1, "sha256": b"", "samples": 1, "quality": 1, "stale": 0}
    with journal.transaction():
        journal.insert("updates", **row, received=0, body=b"")
    for other in ({"entered": 2}, {"round": 2}):
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"), journal.transaction():
            journal.insert("updates", **{**row, **other}, received=0, body=b"")


@pytest.mark.skipif(os.name != "posix", reason="not a Debian system: no owner's bits")
def test_only_its_owner_reads_secrets(journal: Journal) -> None:
    with journal.transaction():
        note(journal, "a")
    for path in journal.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_one_host_at_a_time(journal: Journal) -> None:
    """Another process is refused while this one lives, and not a moment longer."""
    code = "import sys, pathlib; from ulearn_host.federation.journal import Journal; Journal(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(journal.path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "in use by another process" in refused.stderr
    journal.close()
    assert subprocess.run(command, timeout=60).returncode == 0


def test_files_that_are_no_journal(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database at all " * 100)
    with pytest.raises(UserError, match="text: file is not a database; expected a journal"):
        Journal(tmp_path / "text")
    newer = Journal(tmp_path / "newer")
    newer.close()
    with sqlite3.connect(tmp_path / "newer") as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    with pytest.raises(UserError, match=f"version {VERSION + 1}, expected {VERSION}"):
        Journal(tmp_path / "newer")
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE something (a)")
    connection.close()
    with pytest.raises(UserError, match="version 0, expected"):
        Journal(tmp_path / "other")


def test_a_full_disk_changes_nothing(journal: Journal) -> None:
    with journal.transaction():
        note(journal, "a")
    pages = journal.value("PRAGMA page_count")
    journal.value(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(UserError, match="full; nothing was changed"), journal.transaction():
        note(journal, "b" * 100000)
    assert notes(journal) == ["a"]
    with journal.transaction():
        note(journal, "c")
    assert notes(journal) == ["a", "c"]


def test_a_file_is_synced_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and synced beside, renamed, the folder synced: in another order a power cut may leave an empty file."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"file of {os.fstat(handle).st_size}")
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        done.append(f"rename to {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    published.publish(tmp_path / "m", b"12345", done.append)
    assert done == ["file of 5", "written", "rename to m", "renamed", "folder"]
    assert (tmp_path / "m").read_bytes() == b"12345"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a host that was killed after some rounds: its log was never brought home."""
    folder = tmp_path_factory.mktemp("finished")
    plan = Path(small_plan(folder))
    job, now = folder / "job", 0.0
    federation = Federation.create(job, plan, JOB, clock=lambda: now)
    boards = fleet(federation, folder, plan, 3)
    while federation.head["state"] != "done":
        for board in boards:
            board.turn(federation, now)
        now += 1.0
    shutil.copytree(job, folder / "copy")  # as it lies there now
    federation.close()
    return folder / "copy"


def opened(folder: Path) -> Federation:
    """At a time after all others."""
    return Federation(folder, clock=lambda: 1000.0)


@pytest.mark.parametrize("seed", range(40))
def test_a_log_cut_anywhere_is_a_host_killed_earlier(seed: int, finished: Path, tmp_path: Path) -> None:
    """A power cut leaves a beginning of the log, the last sector perhaps with anything in it: what was committed before
    is there, and the model file follows the journal, were it newer or damaged."""
    rng = np.random.default_rng(seed)
    folder = tmp_path / "job"
    shutil.copytree(finished, folder)
    log = folder / (JOURNAL + "-wal")
    first = log.stat().st_size - log.stat().st_size * 3 // 4
    data = bytearray(log.read_bytes())[: int(rng.integers(first, len(log.read_bytes())))]
    data[-min(512, len(data)) :] = rng.bytes(min(512, len(data)))
    log.write_bytes(data)
    try:
        federation = opened(folder)
    except UserError as fault:  # cut before the job was begun
        assert "begun" in str(fault)
        return
    with federation:
        rounds = [row["round"] for row in federation.journal.rows("SELECT round FROM rounds ORDER BY round")]
        assert rounds == list(range(1, len(rounds) + 1))
        assert federation.replay() == bytes(federation.model["blob"])
        assert (folder / MODEL).read_bytes() == federation.plan.with_weights(bytes(federation.model["blob"]))
        assert federation.journal.value("PRAGMA integrity_check") == "ok"


@pytest.mark.parametrize("harm", ["gone", "torn", "empty", "older", "beside"])
def test_the_model_file_is_repaired(harm: str, finished: Path, tmp_path: Path) -> None:
    """Whatever a power cut left of it, opening the job puts it right."""
    folder = tmp_path / "job"
    shutil.copytree(finished, folder)
    model, whole = folder / MODEL, (finished / MODEL).read_bytes()
    if harm == "gone":
        model.unlink()
    elif harm == "beside":
        (folder / (MODEL + published.NEW)).write_bytes(whole[:100])
    else:
        model.write_bytes({"torn": whole[:-7], "empty": b"", "older": (folder / PLAN).read_bytes()}[harm])
    with opened(folder) as federation:
        assert model.read_bytes() == whole
        assert Board("z", tmp_path, model).model.base_id == bytes(federation.model["base"])


def test_another_plan_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    shutil.copytree(finished, folder)
    (folder / PLAN).write_bytes(Path(small_plan(tmp_path, "full")).read_bytes())
    with pytest.raises(UserError, match="not the plan that the job was begun with"):
        opened(folder)
    with pytest.raises(UserError, match="another job or plan lies there"):
        Federation.create(folder, folder / PLAN, JOB)
    (folder / PLAN).unlink()
    with pytest.raises(UserError, match="No such file"):
        opened(folder)
    with pytest.raises(UserError, match="no job lies there"):
        Federation(tmp_path / "nowhere")
