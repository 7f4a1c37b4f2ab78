# What MicroPython has and CPython lacks. The compiler of MicroPython folds `_NAME = const(...)` and keeps no name.
import gc
import sys

try:
    from micropython import const
except ImportError:
    const = int


try:
    from uctypes import addressof
except ImportError:
    from .cpython import addressof  # noqa: F401


_ON_BOARD = sys.implementation.name == "micropython"


def collect():
    # A collection makes a board's allocator begin at the bottom of the heap again; CPython has no use for one.
    if _ON_BOARD:
        gc.collect()
