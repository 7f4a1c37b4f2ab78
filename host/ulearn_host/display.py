"""Progress and tables: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)
_BESIDES_TERMINALS = str.maketrans({"×": "x", "→": ">", "←": "<", "–": "-", "▕": "|", "▏": "|", "…": "~", "±": "+-"})


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


def plain_table(
    title: str, columns: list[str], rows: list[list[str]], numeric: Sequence[int], wrapped: Mapping[str, int | None]
) -> None:
    """A table without frames. numeric: columns that are right-aligned; wrapped: those that may go on in the next line,
    with their most letters."""
    text(f"[bold]{escape(title)}[/bold]")
    frame = box.SIMPLE_HEAD if unicode() else box.ASCII
    result = Table(box=frame, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        justify: JustifyMethod = "right" if i in numeric else "left"
        free = column in wrapped
        result.add_column(plain(column), justify=justify, no_wrap=not free, max_width=wrapped.get(column))
    for row in rows:
        result.add_row(*(plain(cell) for cell in row))
    console.print(result)
    console.print()


def text(line: str) -> None:
    """A line with markup."""
    console.print(plain(line), soft_wrap=True)


def unicode() -> bool:
    """Whether the output can hold it."""
    return console.encoding.lower().startswith("utf")


def plain(line: str) -> str:
    """Text that the output's encoding can hold."""
    if unicode():
        return line
    return line.translate(_BESIDES_TERMINALS).encode("ascii", "replace").decode()


def visible(words: str) -> str:
    """Text from outside with nothing in it that a terminal or a page obeys: escapes, line ends, turned writing."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)


def safe(words: str) -> str:
    """The same without markup, for `text` and tables."""
    return escape(visible(words))


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
