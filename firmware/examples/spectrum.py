# ruff: noqa: F821 (viper has types that are no names)
# Sound at 16 kHz to ten band energies every 20 ms, in integers: Hann window, 512-point transform, energies between 125
# Hz and 4 kHz in bands as wide as the ear's, logarithm. Native code: mpy-cross -march=<arch> spectrum.py.
# A frame takes 880,000 instructions on the emulated Cortex-M0: of its 20 ms about 9 at 125 MHz, as modelled.
from array import array
from math import cos, pi

import micropython
from micropython import const

SCALE = 0.7526  # decibels a code: a quarter of an octave of energy
ZERO_POINT = -64  # an energy of 1, in units of a 16-bit number's square
HOP = 320

_N = const(512)
_HOP = const(320)
_MANTISSA = const(8192)  # a frame is scaled up until its loudest sample has this
_EDGES = b"\x04\x08\x0d\x13\x1a\x23\x2e\x3c\x4d\x64\x80"  # bins of 31.25 Hz

_sound = array("h", bytes(2 * _N))  # the last 32 ms
_re = array("h", bytes(2 * _N))
_im = array("h", bytes(2 * _N))
_cos = array("h", (int(16384 * cos(2 * pi * i / _N)) for i in range(_N)))  # the sine lies a quarter behind it


@micropython.viper
def _push(words: ptr8, sound: ptr16):
    # The last of the sound moves down, 320 samples of 24 bits come in: their upper 16 bits, four times as loud.
    for i in range(_N - _HOP):
        sound[i] = sound[i + _HOP]
    for i in range(_HOP):
        v = words[4 * i + 1] | words[4 * i + 2] << 8 | words[4 * i + 3] << 16
        v = ((v & 0x7FFFFF) - (v & 0x800000)) >> 6
        if v > 32767:
            v = 32767
        elif v < -32768:
            v = -32768
        sound[_N - _HOP + i] = v


@micropython.viper
def _window(sound: ptr16, re: ptr16, im: ptr16, cos: ptr16) -> int:
    # Into re and im, in the transform's order; returns by how many bits the sound was scaled up.
    peak = 1
    for i in range(_N):
        v = (int(sound[i]) & 0x7FFF) - (int(sound[i]) & 0x8000)
        peak |= v if v >= 0 else -v
    up = 0
    while peak < _MANTISSA:
        peak <<= 1
        up += 1
    j = 0
    for i in range(_N):
        v = (int(sound[i]) & 0x7FFF) - (int(sound[i]) & 0x8000)
        c = (int(cos[i]) & 0x7FFF) - (int(cos[i]) & 0x8000)
        re[j] = ((v << up) * ((16384 - c) >> 1)) >> 14
        im[j] = 0
        bit = _N >> 1
        while j & bit:
            j ^= bit
            bit >>= 1
        j ^= bit
    return up


@micropython.viper
def _transform(re: ptr16, im: ptr16, cos: ptr16):
    # In place, radix 2; halved at every stage, so that nothing leaves 16 bits.
    half = 1
    stride = _N >> 1
    while half < _N:
        for k in range(half):
            at = k * stride
            c = (int(cos[at]) & 0x7FFF) - (int(cos[at]) & 0x8000)
            at = (at + (_N * 3 >> 2)) & (_N - 1)
            s = (int(cos[at]) & 0x7FFF) - (int(cos[at]) & 0x8000)
            i = k
            while i < _N:
                j = i + half
                a = (int(re[j]) & 0x7FFF) - (int(re[j]) & 0x8000)
                b = (int(im[j]) & 0x7FFF) - (int(im[j]) & 0x8000)
                x = (a * c + b * s) >> 14
                y = (b * c - a * s) >> 14
                a = (int(re[i]) & 0x7FFF) - (int(re[i]) & 0x8000)
                b = (int(im[i]) & 0x7FFF) - (int(im[i]) & 0x8000)
                re[i] = (a + x) >> 1
                im[i] = (b + y) >> 1
                re[j] = (a - x) >> 1
                im[j] = (b - y) >> 1
                i = j + half
        half <<= 1
        stride >>= 1


@micropython.viper
def _energy(re: ptr16, im: ptr16, first: int, end: int) -> int:
    # Below 2^29: the squares of all bins together are the mean square of the windowed frame.
    total = 0
    for i in range(first, end):
        a = (int(re[i]) & 0x7FFF) - (int(re[i]) & 0x8000)
        b = (int(im[i]) & 0x7FFF) - (int(im[i]) & 0x8000)
        total += a * a + b * b
    return total


def _log(v):
    # Four times the logarithm to base 2, linear between powers.
    exponent = 0
    while v >> exponent > 1:
        exponent += 1
    return 4 * exponent + ((v << 2 >> exponent) & 3)


def push(words):
    # 320 samples as an I2S microphone sends them: 24 bits at the top of 32, little-endian.
    _push(words, _sound)


def bands(x, at):
    # The energies of the last 512 samples into ten int8 of x.
    up = _window(_sound, _re, _im, _cos)
    _transform(_re, _im, _cos)
    for i in range(10):
        energy = _energy(_re, _im, _EDGES[i], _EDGES[i + 1])
        code = (_log(energy) if energy else 0) - 8 * up + ZERO_POINT
        x[at + i] = -128 if code < -128 else 127 if code > 127 else code
