# Runs random cases (tests/cases.py) on whatever executes this file: a line a step, compared by tests/test_bits.py.
import gc
import struct
from binascii import crc32

import ulearn


def run(folder, stem, executor=None):
    model = ulearn.load(folder + "/" + stem + ".ulm", executor)
    with open(folder + "/" + stem + ".bin", "rb") as f:
        data = f.read()
    seed, mantissa, exponent, skip, steps = struct.unpack_from("<IHhHH", data, 0)
    trainer = ulearn.Trainer(model, seed=seed)
    trainer.set_rate(mantissa, exponent)
    struct.pack_into("<H", model.state, 28, skip)
    k, t = model.input_bytes, model.target_bytes
    inputs = memoryview(data)[12 : 12 + steps * k]
    targets = memoryview(data)[12 + steps * k :]
    lines = []
    for i in range(steps):
        x = inputs[i * k : (i + 1) * k]
        target = targets[i * t : (i + 1) * t]
        trainer.step(x, struct.unpack("<H", target)[0] if model.labelled else target)
        blocks = (model.train_blob, model.state, model.output(x))
        lines.append(" ".join("%08x" % (crc32(b) & 0xFFFFFFFF) for b in blocks))
    return lines


def main(folder, stems, executor=None):
    print("executor", ulearn.executor if executor is None else "given")
    for stem in stems:
        print("case", stem)
        for line in run(folder, stem, executor):
            print(line)
        gc.collect()
