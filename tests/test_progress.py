"""What a terminal, a pipe and a script see of a real job while it runs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from small_fleet import SmallFleet
from ulearn_host import display
from ulearn_host.federation import progress
from ulearn_host.federation.progress import Progress


class Recorder:
    """Passes events on once a progress is there: a federation is begun before anybody can look at it."""

    def __init__(self) -> None:
        self.to: Progress | None = None

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        if self.to:
            self.to.observe(event, details)


def screen(monkeypatch: pytest.MonkeyPatch, terminal: bool, width: int = 100, height: int = 40) -> io.StringIO:
    """What is written to stderr from now on, as a terminal or as a pipe."""
    out = io.StringIO()
    made = Console(file=out, force_terminal=terminal, width=width, height=height, highlight=False, color_system=None)
    monkeypatch.setattr(display, "errors", made)
    return out


def run(folder: Path, shown: Progress, boards: int | list[str] = 4, **terms: Any) -> SmallFleet:
    """A job of three rounds, shown from its first moment."""
    told = Recorder()
    fleet = SmallFleet(folder, boards, 3, told, **terms)
    told.to = shown
    with shown:
        shown.watch(fleet.federation.status)
        fleet.run(2)
        fleet.federation.submit(next(iter(fleet.boards)), b"nonsense", fleet.now)
        fleet.run()
    fleet.close()
    return fleet


@pytest.mark.parametrize("every", [0, 1, 2])
def test_json_is_one_object_a_round(every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each committed round once, in order, with its accuracy where it was evaluated: as the history ends up saying."""
    told = Recorder()
    fleet = SmallFleet(tmp_path, 4, 3, told, evaluate_every=every)
    told.to = shown = Progress(as_json=True)
    lines: list[str] = []
    with shown:
        shown.watch(fleet.federation.status)
        for rounds in (1, 2, None):
            fleet.run(rounds)
            lines += capsys.readouterr().out.splitlines()
            waits = bool(rounds and every and rounds % every == 0)  # for its evaluation
            assert len(lines) == (rounds or 3) - waits
    rows = [json.loads(line) for line in lines]
    history = fleet.federation.status()["history"]
    fleet.close()
    assert rows == history and [row["round"] for row in rows] == [1, 2, 3]
    assert [row["accuracy"] is not None for row in rows] == [every == 1, every > 0, every > 0]
    assert capsys.readouterr().out == ""


def test_json_after_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds that were over before are not told of again."""
    fleet = SmallFleet(tmp_path, 3, 3)
    fleet.run(2)
    with Progress(as_json=True) as shown:
        shown.watch(fleet.federation.status)
    assert capsys.readouterr().out == ""
    fleet.close()


def test_a_pipe_gets_a_line_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Updates, refusals, commits, evaluations, the end; nothing on stdout, no escape sequence."""
    out = screen(monkeypatch, terminal=False)
    run(tmp_path, Progress())
    lines = out.getvalue().splitlines()
    assert capsys.readouterr().out == "" and "\x1b" not in out.getvalue()
    assert sum(": commit: " in line for line in lines) == 3
    assert sum(": update: board-" in line for line in lines) == 12
    assert sum("refuse: board-0: " in line for line in lines) == 1
    assert [line for line in lines if re.search(r": evaluated: .*accuracy \d+\.\d %", line)]
    assert lines[-1].endswith("done: 3 rounds are committed")
    assert all(line.startswith("round ") for line in lines)


def test_a_terminal_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last picture has the job's end, every board, the last refusal; it fits the terminal."""
    out = screen(monkeypatch, terminal=True)
    fleet = run(tmp_path, Progress())
    last = out.getvalue().rpartition("small fleet")[2]
    assert "round 3 of 3" in last and "done" in last and "refused 1, last: board-0: " in last
    for name in fleet.boards:
        assert name in last
    assert "points)" in last
    assert out.getvalue().count("small fleet") > 3


def drawn(status: Mapping[str, Any], width: int = 100, boards: int = 20, encoding: str = "utf-8") -> str:
    """A view as text."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width, color_system=None).print(progress.view(status, boards))
    out.seek(0)
    return out.read()


def test_views(tmp_path: Path) -> None:
    """At every turn of a job there is one, of any width; the boards at work come first, the rest is counted."""
    fleet = SmallFleet(tmp_path, 5, 2)
    while fleet.federation.head["state"] != "done":
        for name in fleet.boards:
            fleet.turn(name)
            status = fleet.federation.status()
            for width in (20, 80, 200):
                text = drawn(status, width)
                assert max(map(len, text.splitlines())) <= width
            few = drawn(status, boards=2)
            assert "and 3 more" in few
            working = [b["id"] for b in status["boards"] if b["state"] == "training"]
            assert all(name in few for name in working[:2])
    fleet.close()


def test_plain_output_and_hostile_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An output that holds ASCII only gets nothing else; a name or reason is text."""
    fleet = SmallFleet(tmp_path, 3, 1)
    fleet.run()
    status = fleet.federation.status()
    fleet.close()
    status["boards"][0]["id"] = "[red]x[/red]\x1b[2J"
    status["refused"] = [{"time": 1.0, "board": "[b]", "reason": "[/b]\x1b]0;t\x07\nnew line"}]
    text = drawn(status)
    assert "\x1b" not in text and "\x07" not in text and "[red]x[/red]" in text and "[b]: [/b]" in text
    monkeypatch.setattr(display, "console", Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii")))
    assert drawn(status, encoding="ascii").isascii()
    line = progress.line("refuse", {"round": 1, "board": "a\x1b[2J", "text": "n\no"})
    assert line == "round 1: refuse: a?[2J: n?o"


def test_the_closing_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line a round with what the history says, on 80 columns."""
    fleet = SmallFleet(tmp_path, 3, 2)
    fleet.run()
    status = fleet.federation.status()
    fleet.close()
    progress.table(status)
    out = capsys.readouterr().out
    for row in status["history"]:
        line = next(line for line in out.splitlines() if row["base_id"][:8] in line)
        assert f"{row['updates']} of {row['asked']}" in line and display.percent(row["accuracy"]) in line
    assert "…" not in out


def test_spark() -> None:
    """From the lowest to the highest, the last ones; nothing of one figure."""
    assert progress.spark([0.0, 0.5, 1.0]) == "▁▅█"
    assert progress.spark([0.5]) == ""
    assert len(progress.spark([0.1] * 99)) == 40
