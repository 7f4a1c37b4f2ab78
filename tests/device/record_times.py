# How long each record of the first training program takes on an emulated board: 1,000 instructions a microsecond.
import struct
import time

import ulearn
from ulearn.trainer import Trainer

_TURNS = 3


def main(path, frozen="auto"):
    model = ulearn.load(path, frozen=frozen)
    trainer = Trainer(model, learning_rate=0, skip=0)
    x = bytes((i * 37 + 11) & 255 for i in range(model.input_bytes))
    for i in range(17):  # until the gains are known
        trainer.step(x, i % model.classes)
    program = model.training
    for kind in (program, model.forward):
        times = []
        for i in range(struct.unpack_from("<H", kind, 52)[0]):
            start = time.ticks_us()
            for _ in range(_TURNS):
                model.run(kind, model.table, i, 1)
            times.append(time.ticks_diff(time.ticks_us(), start) * 1000 // _TURNS)
        print(" ".join([str(t) for t in times]))
