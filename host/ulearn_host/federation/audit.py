"""A job's audit log out of its journal: what was asked, sent, accepted, refused; and where each model came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ulearn_host import display
from ulearn_host.errors import UserError
from ulearn_host.federation.core import JOURNAL
from ulearn_host.federation.journal import Journal

WORDS = {
    "create": "job begun",
    "enrol": "board enrolled",
    "weigh": "board weighed",
    "resume": "host started",
    "select": "boards drawn",
    "configure": "tasks made",
    "task": "task sent",
    "update": "update accepted",
    "late": "answer late",
    "refuse": "answer refused",
    "commit": "round committed",
    "abandon": "round given up",
    "evaluate": "evaluation opened",
    "join": "evaluation joined",
    "report": "report accepted",
    "evaluated": "evaluation closed",
    "done": "job done",
    "begin": "round passed on",
    "collect": "sums collected",
}


@dataclass(frozen=True)
class Entry:
    """A line of the log. time: seconds since 1970; board: None of what concerns no single one."""

    n: int
    time: float
    event: str
    board: str | None
    text: str


@dataclass(frozen=True)
class Part:
    """An update within a model. round: that it was trained in; stale: commits it came late by; sha256: of its bytes."""

    board: str
    round: int
    samples: int
    stale: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """A base, the one that it was made from, and by which updates; the plan's own has neither."""

    round: int
    base_id: str
    parent: str | None
    updates: list[Part]


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """A job's journal, to be read while no host runs the job. Raises UserError where there is none or one does."""
    path = Path(folder) / JOURNAL
    if not path.is_file():
        raise UserError(f"{folder}: no job lies there; expected a folder that ulearn federate has made")
    journal = Journal(path)
    try:
        yield journal
    finally:
        journal.close()


def entries(
    journal: Journal, board: str | None = None, event: str | None = None, last: int | None = None
) -> Iterator[Entry]:
    """The log's lines in order: of one board or event where asked for, the last ones where a number is given.

    Raises UserError for an event that no log has.
    """
    if event is not None and event not in WORDS:
        raise UserError(f"{event}: no such event, expected one of {', '.join(WORDS)}")
    query = "SELECT n, time, event, board, text FROM audit WHERE (? IS NULL OR board = ?) AND (? IS NULL OR event = ?)"
    given = (board, board, event, event)
    if last is not None:
        query = f"SELECT * FROM ({query} ORDER BY n DESC LIMIT ?)"
        given = (*given, last)  # type: ignore[assignment]
    for row in journal.each(query + " ORDER BY n", *given):
        yield Entry(*row)


def lineage(journal: Journal) -> Iterator[Model]:
    """Every base of the job from the plan's own on, with what it was made of."""
    for row in journal.each("SELECT round, base, parent FROM models ORDER BY round"):
        parts = [
            Part(part["board"], part["round"], part["samples"], part["stale"], part["size"], part["sha256"].hex())
            for part in journal.each(
                "SELECT board, round, samples, stale, length(body) AS size, sha256 FROM updates WHERE entered = ? "
                "ORDER BY board",
                row["round"],
            )
        ]
        yield Model(row["round"], row["base"].hex(), row["parent"].hex() if row["parent"] else None, parts)


def lines(
    journal: Journal, board: str | None = None, event: str | None = None, last: int | None = None
) -> Iterator[str]:
    """The log as JSON, an object a line: {"kind": "entry", …}, then the lineage, {"kind": "model", …}."""
    for entry in entries(journal, board, event, last):
        when = datetime.fromtimestamp(entry.time, UTC).isoformat(timespec="milliseconds")
        yield json.dumps({"kind": "entry", **asdict(entry), "time": when})
    for model in lineage(journal):
        yield json.dumps({"kind": "model", **asdict(model)})


def table(journal: Journal, board: str | None = None, event: str | None = None, last: int | None = None) -> None:
    """Print the log, then the lineage."""
    rows = [
        [_when(e.time), WORDS.get(e.event, e.event), display.safe(e.board or ""), display.safe(_short(e.text))]
        for e in entries(journal, board, event, last)
    ]
    display.plain_table("what happened", ["time", "what", "board", "more"], rows, (), {"board": 32, "more": None})
    display.plain_table(
        "where each model came from",
        ["round", "model", "from", "updates", "samples", "boards"],
        [_model(model) for model in lineage(journal)],
        (0, 3, 4),
        {"boards": None},
    )


def _when(seconds: float) -> str:
    """A time of the host's clock where it stands."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _short(text: str) -> str:
    """Hashes as their first digits: a table is for reading, the JSON has them whole."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b", r"\1", text)


def _model(model: Model) -> list[str]:
    """A line of the lineage."""
    parts = model.updates
    late = {part.board: f" ({part.stale} late)" * bool(part.stale) for part in parts}
    boards = ", ".join(display.safe(part.board) + late[part.board] for part in parts)
    samples = f"{sum(part.samples for part in parts):,}" if parts else ""
    origin = model.parent[:8] if model.parent else "the plan"
    return [str(model.round), model.base_id[:8], origin, str(len(parts) or ""), samples, boards]


def show(folder: Path, as_json: bool = False, **chosen: Any) -> None:
    """What `ulearn federate --audit FOLDER` prints; chosen: board, event, last as `entries` takes them."""
    with opened(folder) as journal:
        if not as_json:
            table(journal, **chosen)
            return
        for text in lines(journal, **chosen):
            print(text)
