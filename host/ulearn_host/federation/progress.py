"""A job's progress while it runs: a live view on a terminal, a line an event elsewhere, or JSON, one object a round."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ulearn_host import display

Status = Mapping[str, Any]

EVERY_S = 0.25  # between two pictures
SETTLED = ("select", "commit", "done")  # before these the last round has been evaluated, if it is at all
TOLD = ("resume", "select", "update", "late", "refuse", "commit", "abandon", "evaluated", "done")
STATES = {
    "select": "choosing boards",
    "configure": "handing out tasks",
    "collect": "collecting",
    "commit": "committing",
    "abandon": "given up",
    "done": "done",
}
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"training": "cyan", "late": "yellow", "gone": "red", "refused": "red"}
_ORDER = ("training", "late", "refused", "idle", "gone")
_BESIDES_BOARDS = 12  # lines of the view


class Progress:
    """Shows a federation's events as they happen. Give `observe` to it, then `watch` its status.

    All is called on the federation's own thread; `tick` where it has nothing else to do, so that clocks go on. What is
    shown goes to stderr, JSON to stdout. A round's JSON object is printed once its accuracy can be told: with the next
    round, or at the end.
    """

    def __init__(self, as_json: bool = False) -> None:
        """Nothing is shown before the with statement."""
        self._as_json = as_json
        self._status: Callable[[], Status] | None = None
        self._live: Live | None = None
        self._shown_s = -EVERY_S
        self._printed = 0

    def watch(self, status: Callable[[], Status]) -> None:
        """Where to look. Rounds that are over already are not told of again."""
        self._status = status
        self._printed = max((r["round"] for r in status()["history"]), default=0)
        self.tick()

    def observe(self, event: str, details: Mapping[str, Any]) -> None:
        """What has happened, as a Federation tells it."""
        if self._status is None or event.startswith("before "):
            return
        if self._as_json:
            if event in SETTLED:
                self._print(self._status()["history"], but_last=event == "commit")
            return
        if self._live is None:
            if event in TOLD and not display.errors.is_terminal:
                display.errors.print(line(event, details), markup=False, soft_wrap=True)
            return
        self.tick(at_once=event in SETTLED)

    def tick(self, at_once: bool = False) -> None:
        """Bring the live view up to date, if it is time."""
        if self._live is None or self._status is None:
            return
        now = time.monotonic()
        if at_once or now - self._shown_s >= EVERY_S:
            self._shown_s = now
            height = max(4, display.errors.height - _BESIDES_BOARDS)
            self._live.update(view(self._status(), height), refresh=True)

    def _print(self, history: Sequence[Status], but_last: bool = False) -> None:
        """The committed rounds that were not printed yet."""
        for row in history[: len(history) - but_last]:
            if row["round"] > self._printed:
                self._printed = row["round"]
                if row["state"] == "committed":
                    print(json.dumps(row), flush=True)

    def __enter__(self) -> Progress:
        """Begin to show."""
        if not self._as_json and display.errors.is_terminal:
            self._live = Live(console=display.errors, auto_refresh=False, transient=False)
            self._live.start()
            self.tick(at_once=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show or print what is left."""
        try:
            if self._as_json and self._status is not None:
                self._print(self._status()["history"])
            self.tick(at_once=True)
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None


def line(event: str, details: Mapping[str, Any]) -> str:
    """An event in one line without markup."""
    board = f" {display.visible(details['board'])}:" if details.get("board") else ""
    return display.plain(f"round {details['round']}: {event}:{board} {display.visible(details['text'])}")


def spark(shares: Sequence[float], width: int = 40) -> str:
    """The last shares as a line of bars, from the lowest to the highest; empty where the output cannot hold it."""
    last = list(shares)[-width:]
    if len(last) < 2 or not display.unicode():
        return ""
    low, span = min(last), max(0.02, max(last) - min(last))
    return "".join(_BARS[min(len(_BARS) - 1, int((share - low) / span * len(_BARS)))] for share in last)


def view(status: Status, boards: int = 20) -> RenderableType:
    """A status as it stands on the terminal, with at most so many boards."""
    job, history = status["job"], status["history"]
    parts: list[RenderableType] = [_headline(status)]
    if status["state"] == "collect":
        parts.append(ProgressBar(total=max(1, job["goal"]), completed=status["received"], width=50))
    known = [status["accuracy_before"], *(row["accuracy"] for row in history)]
    shares = [share for share in known if share is not None]
    committed = [row for row in history if row["state"] == "committed"]
    if committed:
        last = committed[-1]
        up, down = (sum(row[way] for row in history) for way in ("bytes_up", "bytes_down"))
        text = f"round {last['round']}: {last['updates']} updates of {last['asked']} boards, "
        text += (
            f"{display.duration(last['seconds'])}; all rounds: {display.size(up)} bytes up, {display.size(down)} down"
        )
        parts.append(Text(display.plain(text)))
    if shares:
        gain = f" ({100 * (shares[-1] - shares[0]):+.1f} points)" if len(shares) > 1 else ""
        parts.append(Text(display.plain(f"accuracy {display.percent(shares[-1])}{gain}  {spark(shares)}")))
    parts.append(_boards(status["boards"], boards))
    if status["refused"]:
        one = status["refused"][-1]
        count = sum(board["refused"] for board in status["boards"])
        text = f"refused {count}, last: {display.visible(one['board'] or 'unknown')}: {display.visible(one['reason'])}"
        parts.append(Text(display.plain(text), style="red", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def _headline(status: Status) -> Text:
    """Job, round, state, clock."""
    job = status["job"]
    text = Text(display.plain(display.visible(job["name"])), style="bold")
    text.append(f"  round {status['round']} of {job['rounds']}  ", style="not bold")
    text.append(STATES[status["state"]], style="not bold cyan")
    if status["state"] == "collect":
        text.append(f"  {status['received']} of {job['goal']} updates, {status['asked']} asked", style="not bold")
        if status["deadline_s"] is not None:
            text.append(f", {max(0.0, status['deadline_s']):.0f} s left", style="not bold")
    return text


def _boards(boards: Sequence[Status], most: int) -> Table:
    """The boards, those at work first."""
    result = Table(box=box.SIMPLE_HEAD if display.unicode() else box.ASCII, pad_edge=False, show_edge=False)
    for i, title in enumerate(("board", "state", "samples", "rounds", "accuracy", "seen", "up", "down", "refused")):
        result.add_column(title, justify="right" if i > 1 else "left", no_wrap=True, max_width=None if i else 32)
    ranks = {state: i for i, state in enumerate(_ORDER)}
    ordered = sorted(boards, key=lambda b: (ranks.get(b["state"], len(ranks)), b["id"]))
    for board in ordered[:most]:
        share = display.percent(board["accuracy"][-1][1]) if board["accuracy"] else ""
        seen = "" if board["seen_s"] is None else f"{max(0.0, board['seen_s']):.0f} s"
        moved = (display.size(board["bytes_up"]), display.size(board["bytes_down"]))
        refused = str(board["refused"] or "")
        state = Text(board["state"], style=_STYLES.get(board["state"], ""))
        name = Text(display.plain(display.visible(board["id"])), overflow="ellipsis")
        result.add_row(name, state, f"{board['samples']:,}", str(board["rounds"]), share, seen, *moved, refused)
    if len(ordered) > most:
        result.add_row(Text(f"and {len(ordered) - most} more", style="dim"))
    return result


def table(status: Status) -> None:
    """What came of it: a line a round, the last ones, then the fleet."""
    job, history = status["job"], status["history"]
    rows = [
        [
            str(row["round"]),
            row["base_id"][:8] if row["state"] == "committed" else "given up",
            f"{row['updates']} of {row['asked']}",
            str(row["late"] or ""),
            str(row["refused"] or ""),
            display.size(row["bytes_up"]),
            display.size(row["bytes_down"]),
            display.duration(row["seconds"]),
            display.percent(row["accuracy"]) if row["accuracy"] is not None else "",
        ]
        for row in history
    ]
    columns = ["round", "model", "updates", "late", "refused", "bytes up", "bytes down", "time", "accuracy"]
    title = f"{display.visible(job['name'])}: {sum(r['state'] == 'committed' for r in history)} rounds"
    display.plain_table(title, columns, rows, (0, *range(2, 9)), {})
