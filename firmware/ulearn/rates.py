# Learning rates as STATE holds them.
import math


def rate(learning_rate):
    # A learning rate as the 11-bit mantissa and exponent that STATE holds.
    if learning_rate == 0:
        return 0, 0
    if not 1e-9 < learning_rate < 1e6:
        from .faults import refuse

        refuse("rate", learning_rate)
    fraction, exponent = math.frexp(learning_rate)
    mantissa = int(fraction * 2048 + 0.5)
    if mantissa == 2048:
        return 1024, exponent - 10
    return mantissa, exponent - 11
