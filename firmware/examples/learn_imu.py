# A board that learns its wearer's movements while they are made. On the board: the package, a plan with a training
# program (imu.ulm), codes.py, this file, as sensor.py one of sensor_*.py, and as labels.py one of labels_*.py.
#   mpremote run learn_imu.py
import gc

import sensor
from codes import Codes, buffer
from micropython import const

import ulearn

_HELD_OUT = const(20)  # the first samples judge, before and after; nothing trains on them
_STEPS = const(100)
_CHECKPOINT = "imu.ckpt"

model = ulearn.load("imu.ulm")
trainer = ulearn.Trainer(model)
codes = Codes(model, sensor)
x = buffer(sensor)


def sample():
    # One sample into x. A recording knows what it was; of a movement that is made now, somebody has to say.
    while True:
        label = sensor.read(x)
        if label is None:
            from labels import label as ask

            label = ask()
        if label is not None:
            return label


def step():
    # Nothing is allocated here (tests/test_examples.py locks the heap).
    label = sample()
    return trainer.step(codes.of(x), label)


def main(held_out=_HELD_OUT, steps=_STEPS):
    try:
        model.restore(_CHECKPOINT)
    except ValueError as fault:
        print(fault)  # there is none yet, or it is damaged: go on with the plan's own weights
    judges = ulearn.Samples(model, held_out)
    while len(judges) < held_out:
        label = sample()
        judges.add(codes.of(x), label)
    before = trainer.evaluate(judges)
    gc.collect()
    for i in range(steps):
        step()
    after = trainer.evaluate(judges)
    if after >= before:
        model.save(_CHECKPOINT)
    print("right of %d held out: before %d %%, after %d %%" % (held_out, before * 100, after * 100))


if __name__ == "__main__":
    main()
