# What a plan does on this board, in three numbers that a host compares with its own: the same code runs there.
from binascii import crc32

from .model import load

STEPS = 10


def run(path, steps=STEPS):
    # CRC-32 of an inference's output, then of weights and state after so many training steps (0 where none trains).
    # From the plan's own weights, whatever base lies beside it; nothing is kept.
    model = load(path)
    with open(path, "rb") as f:
        f.seek(model.base_place)
        f.readinto(model.train_blob)
    model.state[:] = model.first_state
    x = bytearray(model.input_bytes)
    _fill(x, 1)
    output = crc32(bytes(model.output(x)))
    if not model.trainings:
        model.close()
        return output, 0, 0
    from .trainer import Trainer

    trainer = Trainer(model, skip=0)
    target = bytearray(model.target_bytes)
    for i in range(steps):
        _fill(x, 2 + i)
        _fill(target, 2 + i)
        trainer.step(x, i % model.classes if model.labelled else target, i % len(model.trainings))
    model.close()
    return output, crc32(model.train_blob), crc32(model.state)


def _fill(buffer, seed):
    # 16-bit xorshift (7, 9, 8), as the trainer's order: small integers only.
    v = seed * 40503 & 0xFFFF or 1
    for i in range(len(buffer)):
        v = (v ^ v << 7) & 0xFFFF
        v ^= v >> 9
        v = (v ^ v << 8) & 0xFFFF
        buffer[i] = v & 255
