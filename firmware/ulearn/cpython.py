# What CPython lacks of MicroPython's.


def addressof(view):
    import numpy as np

    return np.frombuffer(view, dtype=np.uint8).ctypes.data
