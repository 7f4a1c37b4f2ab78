# As sensor.py on the board: one second of sound from an INMP441, as 49 times 10 band energies (spectrum.py). These are
# no MFCC: a network that was trained on others' features does not know them. Collect samples with this file
# (`ulearn collect`), train a network on those, prepare it.
# An ESP32-C6 of MicroPython 1.25 has no I2S.
import sys

import spectrum
from machine import I2S, Pin
from micropython import const

SHAPE = (49, 10)
DTYPE = "int8"
SCALE = spectrum.SCALE  # decibels
ZERO_POINT = spectrum.ZERO_POINT

_RATE = const(16000)
_BACKLOG = const(16384)  # bytes: a quarter of a second while a frame is computed

_SCK, _WS, _SD = (14, 15, 32) if sys.platform == "esp32" else (16, 17, 18)  # an S3 or C3 has others

_i2s = I2S(0, sck=Pin(_SCK), ws=Pin(_WS), sd=Pin(_SD), mode=I2S.RX, bits=32, format=I2S.MONO, rate=_RATE, ibuf=_BACKLOG)
_words = bytearray(4 * spectrum.HOP)  # 24 bits at the top of 32: what the microphone sends


def read(x):
    # The sound of the second that begins now: what has piled up is thrown away first.
    for _ in range(_BACKLOG // len(_words) + 1):
        _i2s.readinto(_words)
    for frame in range(-1, 49):
        _i2s.readinto(_words)
        spectrum.push(_words)
        if frame >= 0:
            spectrum.bands(x, 10 * frame)
