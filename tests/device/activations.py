# What a board sends in split training, on whatever executes this file; tests/test_split.py compares the lines.
from binascii import crc32

import ulearn
from training import store
from ulearn.task import FEATURES, carry_out, make, parse


def lines(path):
    model = ulearn.load(path)
    samples = store(model, 40)
    told = []
    for kept in (1, 5, 12, 40, 60):
        for encoding in (5, 6):
            fields = {"kind": FEATURES, "encoding": encoding, "kept": kept, "round": 2, "seed": 70001}
            asked = parse(make(model_id=model.model_id, base_id=model.base_id, **fields))
            model.gives_features = False
            try:
                carry_out(model, samples, asked)
                told.append("given away")
            except ValueError as e:
                told.append(str(e)[:30])
            model.gives_features = True
            answer = carry_out(model, samples, asked)
            told.append("%d %d %08x" % (kept, len(answer), crc32(answer) & 0xFFFFFFFF))
    return told


def main(path):
    for line in lines(path):
        print(line)
