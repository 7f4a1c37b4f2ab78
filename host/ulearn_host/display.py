"""Progress and tables: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


class Steps:
    """A list of named bars, or on a pipe one line when a bar begins."""

    def __init__(self, progress: Progress | None) -> None:
        """`progress` is None where there is no terminal."""
        self._progress = progress

    def bar(self, title: str, total: int | None = None) -> Callable[[int, int], None]:
        """A new bar; the result is called with (done, total)."""
        if self._progress is None:
            errors.print(title, markup=False)
            return lambda done, total: None
        progress, task = self._progress, self._progress.add_task(title, total=total)
        return lambda done, total: progress.update(task, completed=done, total=total)

    def counter(self, title: str, total: int) -> Callable[[], None]:
        """A new bar that every call takes one further; threads may share it."""
        if self._progress is None:
            self.bar(title)
            return lambda: None
        progress, task = self._progress, self._progress.add_task(title, total=total)
        return lambda: progress.advance(task)


@contextmanager
def steps() -> Iterator[Steps]:
    """Bars that live as long as the block."""
    if not sys.stderr.isatty():
        yield Steps(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors) as progress:
        yield Steps(progress)


def table(title: str, columns: list[str], rows: list[list[str]], numeric: int = 1) -> None:
    """A table; columns from `numeric` on are right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i >= numeric else "left")
    for row in rows:
        result.add_row(*row)
    console.print(result)


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.1f} ms" if seconds >= 0.001 else f"{1e6 * seconds:.0f} µs"


def size(count: int) -> str:
    """A number of bytes with thousands separated."""
    return f"{count:,}"
