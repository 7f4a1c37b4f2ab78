# What a trainer can be asked for, on whatever executes this file; tests/test_trainer.py compares the lines.
import gc
from binascii import crc32

import ulearn
from ulearn.trainer import Trainer

_COUNT = 7


def store(model, count=_COUNT, shift=0):
    # A store of made-up samples. One class in three has most of them.
    samples = ulearn.Samples(model, count)
    k = model.input_bytes
    for i in range(count):
        x = bytes([(i * 37 + j * (11 + i) + shift) & 255 for j in range(k)])
        if model.loss_kind == 2:
            samples.add(x, bytes([(i * 29 + j * 5) & 255 for j in range(model.target_bytes)]))
        else:
            samples.add(x, (i + shift) % model.classes if i % 3 == 0 else 0)
    return samples


def weights_of(model):
    return None if model.loss_kind == 2 else [0.1 + c * 0.75 for c in range(model.classes)]


def locked(path):
    # A hundred steps with the heap locked, with class weights and statistics, and an evaluation.
    import micropython

    model = ulearn.load(path)
    samples = store(model)
    trainer = Trainer(model, learning_rate=0.01, skip=0, class_weights=weights_of(model), statistics=30)
    trainer.evaluate(samples)
    xs = [bytes(samples.x(i)) for i in range(_COUNT)]
    targets = [samples.target(i) for i in range(_COUNT)]
    gc.collect()
    micropython.heap_lock()
    try:
        for i in range(50):
            trainer.step(xs[i % _COUNT], targets[i % _COUNT])
            trainer.step_of(samples, i % _COUNT)
            if i == 25:
                model.state[10] -= 1  # half the rate: the classes' rates are made anew
    finally:
        micropython.heap_unlock()
    print("locked", trainer.counters()[0], len(trainer.statistics))
    # A sample more in a store takes no byte more of an evaluation.
    alone = store(model, 1)
    gc.collect()
    gc.disable()
    before = gc.mem_alloc()
    trainer.evaluate(alone)
    between = gc.mem_alloc()
    trainer.evaluate(samples)
    after = gc.mem_alloc()
    gc.enable()
    print("evaluate", after - between - (between - before))


def learn(path):
    # Fits of all kinds, the last ones stopped and resumed; a line each.
    lines = []
    model = ulearn.load(path)
    samples, held_out = store(model), store(model, 5, 3)
    labels = model.loss_kind != 2

    def tell():
        s = trainer.statistics.summary()
        numbers = (crc32(model.train_blob) & 0xFFFFFFFF, crc32(model.state) & 0xFFFFFFFF)
        lines.append("%08x %08x %d %d %d" % (numbers + (s["steps"], s["saturated"], s["clipped"])))

    def cut(done, total):
        if done == 10:
            model.save(path + ".cut")
            raise KeyboardInterrupt

    for weights in (weights_of(model), "balanced" if labels else None):
        for keep in (None, path + ".best"):
            model.reset()
            trainer = Trainer(model, 0.05, 70001, 0, weights, 9)
            trainer.fit(samples, 3, halve_every=2, held_out=held_out if keep else None, patience=1, keep=keep)
            tell()
            whole = lines[-1].split()[:2]
            model.reset()
            trainer = Trainer(model, 0.05, 70001, 0, weights, 9)
            try:
                trainer.fit(samples, 3, cut, False, 2, held_out if keep else None, 1, keep)
            except KeyboardInterrupt:
                pass
            model.reset()
            model.restore(path + ".cut")
            trainer = Trainer(model, class_weights=weights, statistics=9)
            trainer.fit(samples, 1, None, True, 2, held_out if keep else None, 1, keep)
            tell()
            lines.append("resumed %s" % (lines[-1].split()[:2] == whole))
    return lines


def main(path):
    locked(path)
    for line in learn(path):
        print(line)
