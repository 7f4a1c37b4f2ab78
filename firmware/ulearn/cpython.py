# What CPython lacks of MicroPython's: never on a board.
import numpy as np


def addressof(view):
    return np.frombuffer(view, dtype=np.uint8).ctypes.data
