# What a sensor gives, as the int8 codes that a plan runs on, in integers: a float a number would be allocated.
from array import array

from micropython import const

_LIMIT = const(16384)  # so that a 16-bit number times the mantissa is a small integer on every board
_CODES = {"int8": "b", "uint8": "B", "int16": "h"}


def buffer(sensor):
    # An array for one sample.
    size = 1
    for n in sensor.SHAPE:
        size *= n
    return array(_CODES[sensor.DTYPE], (0 for _ in range(size)))


class Codes:
    def __init__(self, model, sensor):
        # (v - ZERO_POINT) * SCALE / input_scale + input_zero, the factor as mantissa / 2^shift
        factor = getattr(sensor, "SCALE", 1) / model.input_scale
        self.shift = 0
        while factor * 2 < _LIMIT and self.shift < 28:
            factor *= 2
            self.shift += 1
        self.mantissa = min(int(factor + 0.5), _LIMIT - 1)
        self.half = 1 << self.shift >> 1
        self.minus = getattr(sensor, "ZERO_POINT", 0)
        self.plus = model.input_zero
        self.codes = bytearray(model.input_bytes)

    def of(self, x):
        # A view of the sample's codes that the next call overwrites.
        codes = self.codes
        mantissa, half, shift = self.mantissa, self.half, self.shift
        for i in range(len(codes)):
            q = ((x[i] - self.minus) * mantissa + half >> shift) + self.plus
            codes[i] = (-128 if q < -128 else 127 if q > 127 else q) & 255
        return codes
