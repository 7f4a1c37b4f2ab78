# Runs plans (stem.ulm) over inputs (stem.x, back to back) on whatever executes this file: a line an input, the crc32 of
# the output. Single records (stem.rec) as well. Compared by tests/test_ulab_operators.py.
import gc
import struct
from binascii import crc32

import ulearn


def answer(model, x):
    return "%08x" % (crc32(model.output(x)) & 0xFFFFFFFF)


def run(folder, stem, executor=None, frozen="auto", size=0):
    # size: of an input. The file and its buffer come first: where a model hardly fits, nothing is left for them later.
    lines = []
    with open(folder + "/" + stem + ".x", "rb") as f:
        x = bytearray(size)
        model = ulearn.load(folder + "/" + stem + ".ulm", executor, frozen)
        x = x or bytearray(model.input_bytes)
        while f.readinto(x) == len(x):
            lines.append(answer(model, x))
    return lines


def main(folder, stems, executor=None, frozen="auto", size=0):
    print("executor", ulearn.executor if executor is None else "given")
    for stem in stems:
        print("plan", stem)
        for line in run(folder, stem, executor, frozen, size):
            print(line)
        gc.collect()


def packed(path, executor):
    # A file of plans with inputs: u32 bytes of the plan, inputs, bytes of each, then these.
    with open(path, "rb") as f:
        while True:
            head = f.read(12)
            if not head:
                break
            size, count, length = struct.unpack("<III", head)
            model = ulearn.load(bytearray(f.read(size)), executor)
            x = bytearray(length)
            for _ in range(count):
                f.readinto(x)
                print(answer(model, x))


def in_place(plan, inputs):
    model = ulearn.load(plan)
    print(model.frozen)
    x = bytearray(model.input_bytes)
    with open(inputs, "rb") as f:
        while f.readinto(x) == len(x):
            print(answer(model, x))


def score(folder, stem):
    # How many inputs are put into the class that labels.bin says, a byte an input.
    model = ulearn.load(folder + "/" + stem + ".ulm")
    x = bytearray(model.input_bytes)
    right = count = 0
    with open(folder + "/labels.bin", "rb") as labels, open(folder + "/" + stem + ".x", "rb") as f:
        while f.readinto(x) == len(x):
            count += 1
            right += model.predict(x) == labels.read(1)[0]
    print("right", right, "of", count)


def run_record(folder, stem, executor):
    # The file: a program of one record, then what its arena holds, then what lies in FROZEN.
    with open(folder + "/" + stem + ".rec", "rb") as f:
        program = bytearray(f.read(128))
        sizes = struct.unpack_from("<7I", program, 16)
        arena, frozen = bytearray(f.read(sizes[1])), bytearray(f.read(sizes[6]))
    code = executor(program, [None, arena, None, None, None, bytearray(sizes[5]), frozen], 0, 1)
    return "%d %08x" % (code, crc32(arena) & 0xFFFFFFFF)


def records(folder, stems):
    # Of the ulab executor.
    from ulearn.ulab_executor import run

    for stem in stems:
        print(run_record(folder, stem, run))
        gc.collect()
