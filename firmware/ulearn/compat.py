# What MicroPython has and CPython lacks. The compiler of MicroPython folds `_NAME = const(...)` and keeps no name.
try:
    from micropython import const
except ImportError:
    const = int
