# Rounds of a fleet of one board, in every encoding, with and without feedback, a last layer of its own and a pull
# towards the base; tests/test_encodings.py compares the lines.
import os
from binascii import crc32

import ulearn
from training import store
from ulearn.task import EVALUATE, FEEDBACK, PERSONAL, TRAIN, carry_out, make, parse

KINDS = [
    # encoding, flags, kept, proximal
    (1, 0, 0, 0),
    (2, 0, 0, 0),
    (2, FEEDBACK, 0, 900),
    (3, FEEDBACK, 9, 0),
    (4, FEEDBACK, 5, 0),
    (4, FEEDBACK | PERSONAL, 3, 200),
    (1, PERSONAL, 0, 65535),
]
# Rounds, and the last one before each that the fleet has taken in: the second is lost, then asked for again.
COURSE = [(1, 0), (2, 1), (2, 1), (3, 1), (4, 3)]


def clean(path):
    # As a board that has just been deployed to.
    folder = path[: path.rfind("/") + 1] or "."
    name = path[path.rfind("/") + 1 :]
    for other in os.listdir(folder):
        if other.startswith(name + "."):
            os.remove(folder.rstrip("/") + "/" + other if folder != "." else other)


def digest(data):
    return "%08x" % (crc32(data) & 0xFFFFFFFF)


def asked(model, kind, job, number, committed, seed, epochs=3):
    encoding, flags, kept, proximal = KINDS[job - 1]
    fields = {"kind": kind, "encoding": encoding, "flags": flags, "job": job, "round": number, "seed": seed}
    fields.update(model_id=model.model_id, base_id=model.base_id, epochs=epochs, rate_mantissa=1600, rate_exponent=-15)
    fields.update(kept=kept, proximal=proximal, committed=committed)
    return parse(make(**fields))


def main(path):
    for job in range(1, len(KINDS) + 1):
        clean(path)
        for number, committed in COURSE:
            model = ulearn.load(path)  # after a reset
            data = carry_out(model, store(model), asked(model, TRAIN, job, number, committed, 100 * job + number))
            print(job, number, len(data), digest(data[:-4]), digest(model.train_blob))
            if committed + 1 == number and number != 2:
                model.apply(data)
        report = carry_out(model, None, asked(model, EVALUATE, job, 4, 3, 0), store(model, 5, 3))
        print("report", digest(report[:-4]), digest(model.train_blob), digest(model.base_id))


def cost(path, job):
    # Virtual microseconds of a task of one epoch, and of that training alone.
    import time

    clean(path)
    model = ulearn.load(path)
    samples = store(model)
    for number in (1, 2):  # the second reads what the first has left out
        task = asked(model, TRAIN, job, number, number - 1, 1, 1)
        begin = time.ticks_us()
        carry_out(model, samples, task)
        whole = time.ticks_diff(time.ticks_us(), begin)
    model.reset()
    begin = time.ticks_us()
    ulearn.Trainer(model).fit(samples, 1)
    print("cost", whole, time.ticks_diff(time.ticks_us(), begin))
