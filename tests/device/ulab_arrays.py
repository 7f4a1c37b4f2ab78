# ulab arrays wherever numbers are taken. Run by tests/test_bits.py on interpreters with ulab.
from ulab import numpy as np

import ulearn


def main(path):
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
