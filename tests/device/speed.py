# Instructions of an inference and of a training step on an emulated board, where a microsecond is 1,000 of them.
import gc
import time

import ulearn
from ulearn.trainer import Trainer

_TURNS = 200


def main(path):
    model = ulearn.load(path)
    trainer = Trainer(model, skip=0)
    x = bytes((i * 37 + 11) & 255 for i in range(model.input_bytes))

    def turn(do):
        gc.collect()  # none within the turns: a step allocates nothing, counting them does
        start = time.ticks_us()
        for i in range(_TURNS):
            do(i)
        return time.ticks_diff(time.ticks_us(), start)

    empty = turn(lambda i: None)
    inference = turn(lambda i: model.output(x)) - empty
    step = turn(lambda i: trainer.step(x, i % 10)) - empty
    print("speed", inference * 1000 // _TURNS, step * 1000 // _TURNS)
