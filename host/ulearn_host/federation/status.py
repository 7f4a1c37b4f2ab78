"""What there is to see of a federation, for a terminal and a page: plain numbers and texts, of bounded size."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from ulearn_host.federation import evaluation
from ulearn_host.federation.facts import parse
from ulearn_host.federation.intake import Intake
from ulearn_host.federation.journal import Row

HISTORY = 500  # the last rounds, and as many figures of a board
REFUSED = 50
_SCORED: WeakKeyDictionary[Intake, tuple[int, dict[str, list[tuple[int, float]]]]] = WeakKeyDictionary()


def status(core: Intake, now: float) -> dict[str, Any]:
    """The job, its round, model and boards, the last rounds and refusals. deadline_s, seen_s: seconds from now, ago."""
    job, head, model = core.job, core.head, core.model
    words = {key: getattr(job, key) for key in ("name", "rounds", "goal", "rule", "up", "down", "selection")}
    scores = _scores(core)
    return {
        "job": {**words, "plan": str(core.plan.path)},
        "round": head["round"] if head["state"] != "done" else model["round"],
        "state": head["state"],
        "deadline_s": max(0.0, head["deadline"] - now) if head["state"] == "collect" else None,
        "asked": head["asked"],
        "received": core.received(),
        "model": {"base_id": model["base"].hex(), "parent": model["parent"].hex() if model["parent"] else None},
        "accuracy_before": core.journal.value("SELECT accuracy FROM evaluations WHERE round = 1"),
        "boards": [_board(core, row, scores, now) for row in core.journal.rows("SELECT * FROM boards ORDER BY board")],
        "history": _history(core),
        "refused": [
            {"time": row["time"], "board": row["board"], "reason": row["text"]}
            for row in core.journal.rows(
                "SELECT * FROM (SELECT * FROM audit WHERE event = 'refuse' ORDER BY n DESC LIMIT ?) ORDER BY n", REFUSED
            )
        ],
    }


def _scores(core: Intake) -> dict[str, list[tuple[int, float]]]:
    """Each board's share of right samples by the commits before it, where enough boards have reported.

    A closed evaluation does not change any more: each is read once, since whoever looks on asks twice a second.
    """
    last, scores = _SCORED.get(core, (0, {}))
    rows = core.journal.rows(
        "SELECT r.round, r.board, r.body FROM reports r JOIN evaluations e ON e.round = r.round "
        "WHERE e.closed IS NOT NULL AND e.reported >= ? AND e.round > ? AND "
        "e.round > (SELECT max(round) FROM evaluations) - ? ORDER BY r.round",
        *(core.job.min_group, last, HISTORY),
    )
    for row in rows:
        last = row["round"]
        accuracy = evaluation.parse(bytes(row["body"])).accuracy
        if accuracy is not None:
            scores.setdefault(row["board"], []).append((row["round"] - 1, accuracy))
    _SCORED[core] = last, scores
    return scores


def _board(core: Intake, row: Row, scores: dict[str, list[tuple[int, float]]], now: float) -> dict[str, Any]:
    """One board. accuracy: [[round that made the base, share of right samples]]."""
    seen, moved = core.presence.seen(row["board"]), core.presence.moved.get(row["board"])
    facts = seen.facts if seen and seen.facts else parse(bytes(row["facts"])) if row["facts"] else None
    return {
        "id": row["board"],
        "link": row["link"],
        "state": _state(core, row["board"], now),
        "seen_s": now - seen.when_s if seen else now - row["seen"] if row["seen"] is not None else None,
        "samples": facts.samples if facts else 0,
        "rounds": row["done"],
        "refused": row["refused"] + (moved.refused if moved else 0),
        "bytes_up": row["bytes_up"] + (moved.up if moved else 0),
        "bytes_down": row["bytes_down"] + (moved.down if moved else 0),
        "step_us": facts.step_us if facts else 0,
        "accuracy": [[turn, share] for turn, share in scores.get(row["board"], [])[-HISTORY:]],
    }


def _state(core: Intake, board: str, now: float) -> str:
    """What a board is about, as far as the host knows."""
    last = core.journal.row(
        "SELECT * FROM tasks WHERE board = ? AND kind = 1 ORDER BY round DESC LIMIT 1",
        board,
    )
    working = core.head["state"] == "collect" and last is not None and last["round"] == core.head["round"]
    if working and last is not None and last["sent"] is not None and last["answered"] is None:
        return "training"
    seen = core.presence.seen(board)
    if seen is None or now - seen.when_s > core.job.present_s:
        return "gone"
    if core.presence.refusals(board, core.head["round"]) and (last is None or last["answered"] is None):
        return "refused"
    if last is not None and last["round"] < core.head["round"] and last["sent"] and last["outcome"] in (None, "late"):
        return "late"
    return "idle"


def _history(core: Intake) -> list[dict[str, Any]]:
    """The rounds that are over. accuracy: of the base that a round ended with, where it was evaluated."""
    rows = core.journal.rows(
        "SELECT r.*, e.accuracy, (SELECT count(*) FROM updates u WHERE u.entered = r.round) AS updates FROM rounds r "
        "LEFT JOIN evaluations e ON e.round = r.round + 1 AND r.state = 'committed' "
        "WHERE r.state IN ('committed', 'abandoned') ORDER BY r.round DESC LIMIT ?",
        HISTORY,
    )
    return [
        {
            **{key: row[key] for key in ("round", "state", "updates", "asked", "late", "refused")},
            **{key: row[key] for key in ("bytes_up", "bytes_down", "accuracy", "reason")},
            "seconds": row["ended"] - row["began"],
            "base_id": row["after"].hex(),
        }
        for row in reversed(rows)
    ]
