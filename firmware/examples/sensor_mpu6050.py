# As sensor.py on the board: 1.28 s of movement from an MPU-6050 (or MPU-6500, -9250: the registers are the same).
# 64 readings at 50 Hz become 16 means of 4, six axes each: acceleration in 1/8192 g, rotation in 1/65.5 °/s.
import sys
import time

from machine import I2C, Pin
from micropython import const

SHAPE = (16, 6)
DTYPE = "int16"

_ADDRESS = const(0x68)  # 0x69 where AD0 is high
_SMPLRT_DIV = const(0x19)
_CONFIG = const(0x1A)
_GYRO_CONFIG = const(0x1B)
_ACCEL_CONFIG = const(0x1C)
_ACCEL_XOUT_H = const(0x3B)  # acceleration, temperature, rotation: seven big-endian numbers
_PWR_MGMT_1 = const(0x6B)
_PERIOD_US = const(20000)
_MEAN_OF = const(4)

_SCL, _SDA = (22, 21) if sys.platform == "esp32" else (5, 4)  # an S3, C3 or C6 has others: 9 and 8, for example

_i2c = I2C(0, scl=Pin(_SCL), sda=Pin(_SDA), freq=400000)
_raw = bytearray(14)
_sums = [0] * 6


def _start():
    _i2c.writeto_mem(_ADDRESS, _PWR_MGMT_1, b"\x01")  # awake, clocked by the gyroscope
    _i2c.writeto_mem(_ADDRESS, _CONFIG, b"\x04")  # low pass at 20 Hz: 50 readings a second alias nothing
    _i2c.writeto_mem(_ADDRESS, _SMPLRT_DIV, b"\x04")
    _i2c.writeto_mem(_ADDRESS, _GYRO_CONFIG, b"\x08")  # 500 degrees a second
    _i2c.writeto_mem(_ADDRESS, _ACCEL_CONFIG, b"\x08")  # 4 g
    time.sleep_ms(50)


def add(raw, sums):
    # One reading to the sums; the temperature, the fourth number, is left out.
    for i in range(6):
        at = 2 * i if i < 3 else 2 * i + 2
        v = raw[at] << 8 | raw[at + 1]
        sums[i] += v - 65536 if v & 32768 else v


def mean(sums, x, at):
    # The sums' means into x from `at`; the sums begin anew.
    for i in range(6):
        x[at + i] = (sums[i] + _MEAN_OF // 2) // _MEAN_OF
        sums[i] = 0


def read(x):
    due = time.ticks_us()
    for at in range(0, 96, 6):
        for _ in range(_MEAN_OF):
            while time.ticks_diff(due, time.ticks_us()) > 0:
                pass
            due = time.ticks_add(due, _PERIOD_US)
            _i2c.readfrom_mem_into(_ADDRESS, _ACCEL_XOUT_H, _raw)
            add(_raw, _sums)
        mean(_sums, x, at)


_start()
