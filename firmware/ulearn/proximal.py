# FedProx (Li et al. 2020): training is held near the base. Its gradient, mu * (w - base), is split from the loss's and
# taken late: after every 16 steps, and at the end of an epoch, w moves towards the base by 1 - (1 - mu * rate)^steps of
# its distance. As the rate does, the pull halves with every epoch.
from .checkpoint import Base
from .compat import const
from .update import tensors

_STEPS = const(16)
_SCALE_BITS = const(14)  # of a pull: times a distance of 16 bits, it is a small integer on a board
_ROUND_MASK = const(16383)
_BLOCK_BYTES = const(256)
# What a distance is rounded by moves on by these, so that all of a range is met and small distances shrink on average.
_NEXT_VALUE = const(10139)
_NEXT_PULL = const(5323)


class Pull:
    # Called after every step as a trainer's progress, which it passes on. Its buffer is made once.
    def __init__(self, model, table, strength, count, progress=None):
        # `strength`: mu * learning rate of the first epoch, in 65536ths a step; `count`: steps of an epoch.
        self.model, self.strength, self.count, self.progress = model, strength, count, progress
        self.spans = list(tensors(table))
        self.base = Base(model)
        self.before = bytearray(_BLOCK_BYTES)
        self.view = memoryview(self.before)
        self.rounding = self.taken = 0
        self.known = (0, 0, 0)

    def __call__(self, done, total):
        self.taken += 1
        if self.taken == _STEPS or done % self.count == 0:
            self._pull(self._share((done - 1) // self.count, self.taken))
            self.taken = 0
        if self.progress:
            self.progress(done, total)

    def close(self):
        self.base.close()

    def _share(self, epoch, steps):
        # The share of a distance that so many steps take away, in 16384ths.
        if self.known[0] != epoch or self.known[1] != steps:
            left = 1 << 24
            for _ in range(steps):
                left -= left * self.strength >> 16 + epoch
            self.known = epoch, steps, (1 << 24) - left + 512 >> 10
        return self.known[2]

    def _pull(self, share):
        if not share:
            return
        blob, view = self.model.train_blob, self.view
        for dtype, count, offset in self.spans:
            unit = 1 << (dtype - 1)
            end = offset + count * unit
            while offset < end:
                size = min(_BLOCK_BYTES, end - offset)
                self.base.into(offset, view if size == _BLOCK_BYTES else view[:size])
                self._block(blob, offset, size, unit, share)
                offset += size
        self.rounding = self.rounding + _NEXT_PULL & _ROUND_MASK

    def _block(self, blob, offset, size, unit, share):
        before, rounding = self.before, self.rounding
        top = unit - 1
        for i in range(0, size, unit):
            # Byte by byte, the highest one signed: any larger read would allocate.
            at = offset + i
            w = (blob[at + top] ^ 128) - 128
            b = (before[i + top] ^ 128) - 128
            j = top
            while j:
                j -= 1
                w = w << 8 | blob[at + j]
                b = b << 8 | before[i + j]
            rounding = rounding + _NEXT_VALUE & _ROUND_MASK
            d = w - b
            if not d:
                continue
            size_of_d = d if d > 0 else -d
            shift = 0
            while size_of_d >> shift > 65535:
                shift += 1
            d = (size_of_d >> shift) * share + rounding >> _SCALE_BITS << shift
            w = w - d if w > b else w + d
            j = 0
            while j < unit:
                blob[at + j] = w >> 8 * j & 255
                j += 1
        self.rounding = rounding
