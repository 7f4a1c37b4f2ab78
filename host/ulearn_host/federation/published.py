"""Files that change by rename only: whoever opens one sees it whole, the old or the new."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

NEW = ".new"


def publish(path: Path, data: bytes, observe: Callable[[str], None] = lambda event: None) -> None:
    """Put `data` at `path`: written beside, synced, renamed, the folder synced, in this order.

    observe is told "written" when the new file lies beside, synced, and "renamed" before the folder is synced.
    """
    beside = path.with_name(path.name + NEW)
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    observe("written")
    os.replace(beside, path)
    observe("renamed")
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def holds(path: Path, data: bytes) -> bool:
    """Whether the file is there and has these bytes."""
    try:
        return path.read_bytes() == data
    except OSError:
        return False
