# A board of a fleet on a network, as its owner would write it; says what happens, and last what it has become.
import gc
import hashlib
import time
from binascii import hexlify

import ulearn
import ulearn.wifi


def samples_of(model, path):
    size = model.target_bytes + model.input_bytes
    with open(path, "rb") as f:
        data = memoryview(f.read())
    samples = ulearn.Samples(model, max(1, len(data) // size))
    for at in range(0, len(data), size):
        target = data[at : at + model.target_bytes]
        samples.add(data[at + model.target_bytes : at + size], target[0] | target[1] << 8)
    return samples


class Watchdog:
    # Remembers the longest time that it was not fed.
    def __init__(self):
        self.longest = 0
        self.last = time.ticks_ms()

    def feed(self, done, total):
        now = time.ticks_ms()
        self.longest = max(self.longest, time.ticks_diff(now, self.last))
        self.last = now


def say(text):
    gc.collect()
    print(text)
    print("at", time.time())
    print("heap", gc.mem_alloc())


def main(**more):
    model = ulearn.load("m.ulm")
    watchdog = Watchdog()
    train, test = samples_of(model, "train.bin"), samples_of(model, "test.bin")
    ulearn.wifi.join("fleet.json", model, train, test, watchdog.feed, say, **more)
    print("unfed", watchdog.longest)
    print("base", hexlify(model.base_id).decode())
    print("blob", hexlify(hashlib.sha256(bytes(model.train_blob)).digest()).decode())
