# How well a model does on samples, and fits that end when it gets no better.
from .compat import const
from .trainer import _is_codes

_BUF_INPUT = const(0)
_BUF_TARGET = const(2)
_S_FIT_START = const(40)
_S_FIT_END = const(48)


class HeldOut:
    # Says when a fit got no better on samples that it does not train on, and keeps the best weights.
    def __init__(self, trainer, samples, patience, keep, resumed):
        # `resumed`: 0, or of a fit that goes on the number of its samples.
        if patience < 1:
            raise ValueError("patience of %d epochs, expected 1 or more" % patience)
        self.trainer, self.samples, self.patience, self.keep = trainer, samples, patience, keep
        self.best_epoch = self.epoch = 0
        trainer.best = None
        if resumed and keep:
            self._recall(resumed)

    def _recall(self, count):
        # What the best weights of the resumed fit came to, and when: so it ends as if nothing had interrupted it.
        model = self.trainer.model
        train, state = bytes(model.train_blob), bytes(model.state)
        try:
            model.restore(self.keep)
            if model.state[_S_FIT_START:_S_FIT_END] == state[_S_FIT_START:_S_FIT_END]:
                from .fitting import progress_of

                self.best_epoch = progress_of(model.state)[0] // count - 1
                self.trainer.best = evaluate(model, self.samples)
        except (OSError, ValueError):
            pass  # none of use was kept yet
        finally:
            model.train_blob[:] = train
            model.state[:] = state

    def ends(self, epoch):
        trainer = self.trainer
        model, best = trainer.model, trainer.best
        score = evaluate(model, self.samples)
        self.epoch = epoch
        if best is None or (score > best if model.labelled else score < best):
            trainer.best = score
            self.best_epoch = epoch
            if self.keep:
                model.save(self.keep)
        return epoch - self.best_epoch >= self.patience

    def restore(self):
        # STATE comes back too, so the fit ends like one that had no more epochs than the best.
        if self.keep and self.best_epoch != self.epoch:
            self.trainer.model.restore(self.keep)


def evaluate(model, samples):
    # Accuracy, or the mean squared error in real units. Of samples in a store none allocates anything.
    stored = hasattr(samples, "inputs")
    count = len(samples) if stored else len(samples[0])
    if not count:
        raise ValueError("there is no sample to evaluate on")
    labels, size = model.labelled, model.classes
    table, y = model.table, model.result
    total = high = at = 0
    for i in range(count):
        if stored:
            target = samples.targets
            at = 2 * i if labels else size * i
            table[_BUF_INPUT] = samples.inputs
            table[_BUF_TARGET] = target
            code = model.executor.run(model.forward, table, 0, model.records, i)
            if code < 0:
                model.fail(code)
        else:
            target = samples[1][i]
            if not labels and not _is_codes(target, size):
                target = model.quantise_target(target)
            model.output(samples[0][i])
        if labels:
            best = 0
            for j in range(1, size):
                # bytes of int8: flipping the sign bit puts them in order
                if y[j] ^ 128 > y[best] ^ 128:
                    best = j
            total += best == (target[at] | target[at + 1] << 8 if stored else target)
            continue
        for j in range(size):
            d = (y[j] ^ 128) - (target[at + j] & 255 ^ 128)
            total += d * d
        high += total >> 28
        total &= 0xFFFFFFF
    return total / count if labels else (high * 268435456.0 + total) * model.loss_scale / count
