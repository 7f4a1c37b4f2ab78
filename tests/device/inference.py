# Instructions of an inference on an emulated board, where a microsecond is 1,000 of them, and the heap that a model
# takes. Copied as .mpy: some models leave nothing over.
import gc
import time

import ulearn


def _used():
    gc.collect()
    gc.collect()
    return gc.mem_alloc()


def _least(do, *arguments):
    # Instructions of a call, the least of three rounds: a garbage collection may fall into one.
    least = 1 << 29
    turns = 1
    for _ in range(4):
        start = time.ticks_us()
        for _ in range(turns):
            do(*arguments)
        took = time.ticks_diff(time.ticks_us(), start)
        if turns == 1:
            turns = max(2, 2000 // max(1, took))
        else:
            least = min(least, took)
    return least * 1000 // turns


def forward(*plans):
    # Of each plan (path, input bytes): instructions of an inference with all of MicroPython's share, and of the records
    # alone (what running none of them takes is off; 0 where they are streamed); heap that the model takes. -1: does not
    # fit. The first plan should be a small one: loading it brings in the code.
    for path, size in plans:
        model = x = call = None
        x = bytearray(size)
        for i in range(size):
            x[i] = (i * 37 + 11) & 255
        before = _used()
        try:
            model = ulearn.load(path)
            heap = _used() - before
            whole = _least(model.output, x)
            records = 0
            if not model.streamed:
                call = model.forward, model.table, 0
                records = _least(model.run, *call, model.records) - _least(model.run, *call, 0)
            print("forward", path, whole, records, heap)
        except MemoryError:
            print("forward", path, -1, -1, -1)
