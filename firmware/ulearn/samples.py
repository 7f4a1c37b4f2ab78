import struct


class Samples:
    # A fixed amount of room for labelled samples; when it is full, the oldest make room.
    def __init__(self, model, capacity):
        if not 0 < capacity <= 65535:
            from .faults import refuse

            refuse("capacity", capacity)
        self.model = model
        self.capacity = capacity
        self.inputs = bytearray(capacity * model.input_bytes)
        self.targets = bytearray(capacity * model.target_bytes)
        self.clear()

    def clear(self):
        self.count = 0
        self.next = 0

    def __len__(self):
        return self.count

    def add(self, x, target):
        # `x` as for model.predict; `target` a label, or for a regression a vector.
        model = self.model
        k, t = model.input_bytes, model.target_bytes
        codes = None if isinstance(x, (list, tuple)) else bytes(x)  # of wider numbers it is longer than k
        if codes is None or len(codes) != k:
            codes = model.quantise(x)
        if model.labelled:
            if not 0 <= target < model.classes:
                from .faults import refuse

                refuse("label", target, model.classes - 1)
            target = struct.pack("<H", target)
        elif not isinstance(target, (bytes, bytearray, memoryview)) or len(target) != t:
            target = model.quantise_target(target)
        else:
            target = bytes(target)
        i = self.next
        memoryview(self.inputs)[i * k : (i + 1) * k] = memoryview(codes)
        memoryview(self.targets)[i * t : (i + 1) * t] = memoryview(target)
        self.next = (i + 1) % self.capacity
        self.count = min(self.count + 1, self.capacity)

    def x(self, i):
        k = self.model.input_bytes
        return memoryview(self.inputs)[i * k : (i + 1) * k]

    def target(self, i):
        t = self.model.target_bytes
        value = memoryview(self.targets)[i * t : (i + 1) * t]
        return struct.unpack("<H", value)[0] if self.model.labelled else value
