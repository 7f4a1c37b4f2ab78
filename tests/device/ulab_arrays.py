# ulab arrays wherever numbers are taken, run by tests/test_bits.py on interpreters with ulab; and single records of
# training (stem.rec), compared by tests/test_ulab_operators.py.
import gc
import struct
from binascii import crc32

import ulearn


def main(path):
    from ulab import numpy as np

    model = ulearn.load(path)
    codes = [(i * 29) % 256 - 128 for i in range(model.input_bytes)]
    want = bytes(model.output(bytes(c & 255 for c in codes)))
    real = np.array([(c - model.input_zero) * model.input_scale for c in codes])
    given = (
        np.array(codes, dtype=np.int8),
        np.array([c & 255 for c in codes], dtype=np.uint8),
        real,
        real.reshape((1, len(codes))),
    )
    for x in given:
        assert bytes(model.output(x)) == want
    trainer = ulearn.Trainer(model)
    samples = ulearn.Samples(model, 4)
    for x in given:
        target = 1 if model.loss_kind == 1 else [0.0] * model.target_bytes
        trainer.step(x, target)
        samples.add(x, target)
    assert bytes(samples.x(0)) == bytes(samples.x(2)) == bytes(samples.x(3))
    trainer.fit(samples, epochs=1)
    print("ulab arrays", trainer.counters()[0])


def run_record(folder, stem, executor):
    # The file: a program of one record, then what the arena, FROZEN, TRAIN, STATE and the target hold.
    with open(folder + "/" + stem + ".rec", "rb") as f:
        program = bytearray(f.read(128))
        sizes = struct.unpack_from("<7I", program, 16)
        arena, frozen, train, state, target = [bytearray(f.read(sizes[i])) for i in (1, 6, 3, 4, 2)]
    code = executor(program, [None, arena, target, train, state, bytearray(sizes[5]), frozen], 0, 1)
    return " ".join(["%d" % code] + ["%08x" % (crc32(b) & 0xFFFFFFFF) for b in (arena, train, state)])


def records(folder, stems):
    from ulearn.ulab_executor import run

    for stem in stems:
        print(run_record(folder, stem, run))
        gc.collect()
