# Epochs over samples: what a trainer's fit does.
import struct
from array import array

from .compat import const

_S_STEP = const(4)
_S_LR_MANT = const(8)
_S_SATURATED = const(12)  # where the rate ends
_LEAST_EXPONENT = const(-64)  # of a rate that moves nothing any more
_S_FIT_START = const(40)
_S_FIT_EPOCHS = const(44)


def fit(trainer, samples, epochs, progress, resume, halve_every, held_out, patience, keep):
    # As Trainer.fit.
    model = trainer.model
    state = model.state
    count = len(samples) if hasattr(samples, "inputs") else len(samples[0])
    if not count:
        from .faults import refuse

        refuse("samples")
    if not resume:
        if not 0 < epochs <= 65535:
            from .faults import refuse

            refuse("epochs", epochs)
        step = struct.unpack_from("<I", state, _S_STEP)[0]
        struct.pack_into("<IHH", state, _S_FIT_START, step, epochs, trainer.seed & 0xFFFF)
    done, epochs, seed = progress_of(state)
    if not epochs:
        from .faults import refuse

        refuse("resume", model.name)
    if done > epochs * count:
        from .faults import refuse

        refuse("steps", done, epochs, count)
    if trainer.watch is not None:
        trainer.watch.weigh(samples)
    held = None
    if held_out is not None:
        from .evaluation import HeldOut

        held = HeldOut(trainer, held_out, patience, keep, count if resume else 0)
    order = array("H", range(count))
    for epoch in range(epochs):
        shuffle(order, seed + epoch)
        first = max(done - epoch * count, 0)
        if first > count:
            continue
        begun = first  # 0: its rate has yet to be halved
        if trainer.batch and first % count:
            first -= first % trainer.batch.size  # a batch that was cut is begun anew
            start = struct.unpack_from("<I", state, _S_FIT_START)[0]
            struct.pack_into("<I", state, _S_STEP, start + epoch * count + first & 0xFFFFFFFF)
        loss = 0
        before = state[_S_LR_MANT:_S_SATURATED]
        try:
            # Before an epoch, not after the last one: so a checkpoint at the border is of the epoch that has ended.
            if epoch and not begun:
                _halve(trainer, epoch, halve_every)
            for i in range(first, count):
                loss += trainer.step_of(samples, order[i], (epoch + i) % len(trainer.programs))
                if trainer.batch and i + 1 == count:
                    trainer.batch.end()
                if progress:
                    progress(epoch * count + i + 1, epochs * count)
        except BaseException:
            if progress_of(state)[0] == epoch * count:
                state[_S_LR_MANT:_S_SATURATED] = before  # stopped within its first step, which will halve it again
            raise
        if held is not None and held.ends(epoch):
            break
    if held is not None:
        held.restore()
    _halve(trainer, progress_of(state)[0] // count, halve_every)
    struct.pack_into("<H", state, _S_FIT_EPOCHS, 0)
    return loss * model.loss_scale / (count - first) if first < count else trainer.loss


def _halve(trainer, epoch, every):
    if every and not epoch % every:
        mantissa, exponent = struct.unpack_from("<Hh", trainer.model.state, _S_LR_MANT)
        trainer.set_rate(mantissa, max(exponent - 1, _LEAST_EXPONENT))


def progress_of(state):
    # Of the fit in hand: steps done, epochs in all (0: there is none), seed of the order.
    start, epochs, seed = struct.unpack_from("<IHH", state, _S_FIT_START)
    return (struct.unpack_from("<I", state, _S_STEP)[0] - start) & 0xFFFFFFFF, epochs, seed


def shuffle(order, seed):
    # Fisher-Yates with a 16-bit xorshift (7, 9, 8): small integers only, the same order on every board.
    x = (seed * 40503 + 1) & 0xFFFF or 1
    for i in range(len(order) - 1, 0, -1):
        x = (x ^ x << 7) & 0xFFFF
        x ^= x >> 9
        x = (x ^ x << 8) & 0xFFFF
        j = x * (i + 1) >> 16
        t = order[i]
        order[i] = order[j]
        order[j] = t
