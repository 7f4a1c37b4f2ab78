"""The audit log and the lineage of models, out of the journal of a real job."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from small_fleet import SmallFleet
from ulearn import checkpoint
from ulearn_host import display
from ulearn_host.errors import UserError
from ulearn_host.federation import audit


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[SmallFleet]:
    """Four boards, three rounds, nonsense from one of them."""
    made = SmallFleet(tmp_path, 4, 3)
    made.run(1)
    made.federation.submit("board-2", b"nonsense", made.now)
    made.run()
    yield made
    made.close()


def test_what_was_asked_sent_accepted_refused(fleet: SmallFleet) -> None:
    """Each update and report of each board once, what was refused with its reason, in the order of time."""
    log = list(audit.entries(fleet.federation.journal))
    counts = Counter((entry.event, entry.board) for entry in log)
    for board in fleet.boards:
        assert counts["update", board] == 3 and counts["report", board] == 4
        assert counts["task", board] == counts["update", board] + counts["report", board]
        assert counts["enrol", board] == 1
    assert counts["commit", None] == 3 and counts["create", None] == 1 and counts["done", None] == 1
    assert {entry.event for entry in log} <= audit.WORDS.keys()
    assert [entry.n for entry in log] == sorted(entry.n for entry in log)
    assert [entry.time for entry in log] == sorted(entry.time for entry in log)
    (refused,) = audit.entries(fleet.federation.journal, event="refuse")
    assert refused.board == "board-2" and "update" in refused.text
    assert {e.board for e in audit.entries(fleet.federation.journal, board="board-1")} == {"board-1"}
    assert list(audit.entries(fleet.federation.journal, last=5)) == log[-5:]
    with pytest.raises(UserError, match="nap: no such event, expected one of create, enrol"):
        next(audit.entries(fleet.federation.journal, event="nap"))


def test_where_each_model_came_from(fleet: SmallFleet) -> None:
    """A chain from the plan's own weights to those of now; each link's updates are the accepted ones."""
    models = list(audit.lineage(fleet.federation.journal))
    plan = fleet.federation.plan
    at, size = plan.train_place
    first = checkpoint.identity(plan.model_id, plan.path.read_bytes()[at : at + size])
    assert (models[0].base_id, models[0].parent, models[0].updates) == (first.hex(), None, [])
    assert [m.parent for m in models[1:]] == [m.base_id for m in models[:-1]]
    assert models[-1].base_id == fleet.federation.status()["model"]["base_id"]
    blob = fleet.federation.replay()
    assert models[-1].base_id == checkpoint.identity(plan.model_id, blob).hex()
    for model in models[1:]:
        assert [part.board for part in model.updates] == sorted(fleet.boards)
        for part in model.updates:
            body = fleet.federation.journal.value(
                "SELECT body FROM updates WHERE round = ? AND board = ?", part.round, part.board
            )
            assert (part.sha256, part.bytes) == (sha256(body).hexdigest(), len(body))
            assert (part.samples, part.stale, part.round) == (40, 0, model.round)


def test_lines_and_tables(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has all of it, a line each; the table reads well; neither is to be had while a host has the job."""
    folder = fleet.federation.folder
    with pytest.raises(UserError, match="in use by another process"):
        audit.show(folder)
    fleet.close()
    audit.show(folder, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert Counter(row["kind"] for row in rows)["model"] == 4
    assert rows[0]["event"] == "create" and rows[0]["time"] == "2027-01-15T08:00:00.000+00:00"
    audit.show(folder, as_json=True, event="commit", last=1)
    assert json.loads(capsys.readouterr().out.splitlines()[0])["event"] == "commit"
    monkeypatch.setattr(display.console, "_width", 120)
    audit.show(folder)
    out = capsys.readouterr().out
    for words in ("update accepted", "answer refused", "round committed", "board-2", "the plan"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 120
    assert not any(len(word.strip(",")) > 31 for line in out.splitlines() if "sha256" in line for word in line.split())


def test_the_log_holds_no_secret_and_no_boards_figure(fleet: SmallFleet) -> None:
    """Not the boards' secrets, nor what a single board got right."""
    text = "\n".join(audit.lines(fleet.federation.journal))
    assert bytes(16).hex() not in text
    assert " right" not in text


def test_hostile_names_are_text(fleet: SmallFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that a later version, or a board's reason, put there: no markup, no escape sequence."""
    with fleet.federation.journal.transaction():
        for board, words in (("[red]x[/red]\x1b[2J", "[bold]\x1b]0;title\x07"), (None, "[/]")):
            fleet.federation.journal.insert("audit", time=1.9e9, event="new", board=board, text=words)
    audit.table(fleet.federation.journal, last=2)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "[bold]" in out and "[/]" in out


def test_no_job(tmp_path: Path) -> None:
    """Nothing is made where nothing lies."""
    with pytest.raises(UserError, match="no job lies there"):
        audit.show(tmp_path)
    assert list(tmp_path.iterdir()) == []
