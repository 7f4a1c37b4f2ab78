"""STATE: what a plan keeps between steps besides its weights."""

from __future__ import annotations

import struct

from reference_arithmetic import clamp
from reference_plan import NOTHING_TO_LEARN, STATE_BYTES

GAIN_SAMPLES = 16
GAIN_MAX = 31

STATE_FIELDS = {  # name: offset and struct code
    "rng": (0, "I"),
    "step": (4, "I"),
    "lr_mant": (8, "H"),
    "lr_exp": (10, "h"),
    "saturated": (12, "I"),
    "clipped": (16, "I"),
    "skipped": (20, "I"),
    "loss": (24, "i"),
    "skip_below": (28, "H"),
    "flags": (30, "H"),
    "n_gains": (32, "H"),
    "n_gates": (34, "H"),
    "n_active": (36, "H"),
    "gates": (38, "H"),
}


def get_state(state: bytes | bytearray, name: str) -> int:
    offset, code = STATE_FIELDS[name]
    return struct.unpack_from("<" + code, state, offset)[0]


def set_state(state: bytearray, name: str, value: int) -> None:
    offset, code = STATE_FIELDS[name]
    try:
        struct.pack_into("<" + code, state, offset, value)
    except struct.error as error:
        raise ValueError(f"state: {name} = {value} does not fit") from error


def add_state(state: bytearray, name: str, amount: int) -> None:
    """Takes a u32 counter on; it goes round at 2^32."""
    set_state(state, name, (get_state(state, name) + amount) % 2**32)


def set_learning_rate(state: bytearray, mantissa: int, exponent: int) -> None:
    """learning rate = mantissa * 2^exponent"""
    if mantissa != 0 and not 1024 <= mantissa <= 2047:
        raise ValueError(f"learning rate: mantissa {mantissa}, expected 0 or 1024..2047")
    set_state(state, "lr_mant", mantissa)
    set_state(state, "lr_exp", exponent)


def get_gains(state: bytes | bytearray) -> list[tuple[int, int]]:
    """(gain, seen) of every gain."""
    return [struct.unpack_from("<bB", state, STATE_BYTES + 2 * i) for i in range(get_state(state, "n_gains"))]


def get_gates(state: bytes | bytearray) -> list[int]:
    begin = get_state(state, "gates")
    return list(state[begin : begin + get_state(state, "n_gates")])


def set_gate(state: bytearray, index: int, value: int) -> None:
    if not 0 <= index < get_state(state, "n_gates"):
        raise ValueError(f"state: there is no gate {index}")
    state[get_state(state, "gates") + index] = value


def finish_loss(state: bytearray, loss: int, nothing_to_learn: bool) -> None:
    """What every loss leaves in STATE."""
    set_state(state, "loss", loss)
    add_state(state, "step", 1)
    flags = get_state(state, "flags")
    if nothing_to_learn:
        set_state(state, "flags", flags | NOTHING_TO_LEARN)
        add_state(state, "skipped", 1)
    else:
        set_state(state, "flags", flags & ~NOTHING_TO_LEARN)


def learned_gain(state: bytearray, offset: int, a: int, b: int) -> int:
    """The largest a - b of the first 16 samples that had an accumulator other than 0; 0 for a record without a gain."""
    if offset == 0:
        return 0
    gain, seen = struct.unpack_from("<bB", state, offset)
    if a > 0 and seen < GAIN_SAMPLES:
        gain = a - b if seen == 0 else max(gain, a - b)
        struct.pack_into("<bB", state, offset, gain, seen + 1)
    return clamp(gain, -GAIN_MAX, GAIN_MAX)
