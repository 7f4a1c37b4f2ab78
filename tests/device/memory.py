# What a model costs on the heap, and a hundred steps with the heap locked. Run on boards by tests/test_board.py.
import gc
import struct

import micropython

from ulearn.model import load
from ulearn.trainer import Trainer


def used():
    gc.collect()
    gc.collect()
    return gc.mem_alloc()


def heap(path, frozen="auto"):
    # The least of several: what the first load interns and caches belongs to the code, and a collector that takes any
    # word on the stack for a pointer may keep something of the round before.
    least = grown = 1 << 29
    for _ in range(4):
        before = used()
        model = load(path, frozen=frozen)
        trainer = Trainer(model) if model.trainings else None
        after = used()
        x, target = bytes(model.input_bytes), 0 if model.labelled else bytes(model.target_bytes)
        once = twice = 0
        for i in range(len(model.trainings)):
            trainer.step(x, target, i)
            once = once or used()
            trainer.step(x, target, i)
            twice = used()
        model.close()
        del model, trainer, x, target
        least = min(least, after - before)
        grown = min(grown, twice - once)
    print("heap", least, grown)


def locked(path, stem, frozen="auto"):
    model = load(path, frozen=frozen)
    with open(stem + ".bin", "rb") as f:
        data = f.read()
    steps = struct.unpack_from("<H", data, 10)[0]
    trainer = Trainer(model, learning_rate=0.01, skip=0, batch=3 if frozen == "stream" else 1)
    k, t = model.input_bytes, model.target_bytes
    xs = [data[12 + i * k : 12 + (i + 1) * k] for i in range(steps)]
    at = 12 + steps * k
    ts = [data[at + i * t : at + (i + 1) * t] for i in range(steps)]
    if model.labelled:
        ts = [struct.unpack("<H", v)[0] for v in ts]
    gc.collect()
    micropython.heap_lock()
    try:
        done = 0
        while done < 100:
            trainer.step(xs[done % steps], ts[done % steps])
            done += 1
    finally:
        micropython.heap_unlock()
    print("locked", done, trainer.counters()[0])
