# A task: what a host asks of a board in one round of a job, and the board's answer. The same bytes over a serial line
# and a network; training is a pure function of base, job, round, board and data, never of the attempt.
import struct
from binascii import crc32

from .compat import const

MAGIC = b"uLTK"
VERSION = const(1)
# magic, version, kind, encoding, flags, job, round, nonce, model id, base id, seed, epochs, rate's mantissa and
# exponent, skip, kept, proximal, retry, committed; a CRC-32 closes it
HEADER = "<4sBBBBII16s16s16sIHHhHHHII"
HEADER_BYTES = const(88)
BYTES = const(92)
WAIT = const(0)
TRAIN = const(1)
EVALUATE = const(2)
FEATURES = const(3)
DONE = const(4)
PERSONAL = const(1)  # flags: the last layer stays on the board
FEEDBACK = const(2)  # what an encoding leaves out is made up for in later rounds
HISTOGRAM = const(4)  # the board may tell how many samples of each class it has
EVALUATION_MAGIC = b"uLEV"
# magic, version, zero, classes, job, round, base id, samples, right, loss; a CRC-32 closes it
EVALUATION = "<4sBBHII16sIII"
EVALUATION_BYTES = const(44)
UNKNOWN = const(0xFFFFFFFF)
FACTS_MAGIC = b"uLBF"
# magic, version, flags, battery, zero, model id, base id, samples, held out, step, link, classes; then the histogram,
# and a CRC-32
FACTS = "<4sBBBB16s16sIIIIH"
FACTS_BYTES = const(58)
_FIELDS = (
    "kind",
    "encoding",
    "flags",
    "job",
    "round",
    "nonce",
    "model_id",
    "base_id",
    "seed",
    "epochs",
    "rate_mantissa",
    "rate_exponent",
    "skip",
    "kept",
    "proximal",
    "retry_ms",
    "committed",
)
_DENSE = const(1)
_ENCODINGS = const(4)
_RANDOM_K = const(3)
_P_RECORDS = const(52)
_PROGRAM_BYTES = const(64)
_RECORD_BYTES = const(64)
_OP_SOFTMAX_CE = const(3)
_OP_MSE = const(4)
_OP_HINGE = const(8)
_S_LOSS = const(24)
_BUF_INPUT = const(0)
_BUF_TARGET = const(2)


class Task:
    # What `_FIELDS` names, as it came.
    pass


def parse(data):
    # Checks a task and returns it; ValueError names the fault.
    if len(data) != BYTES:
        raise ValueError("task: %d bytes, expected %d" % (len(data), BYTES))
    if bytes(data[:4]) != MAGIC:
        raise ValueError("task: it does not begin with 'uLTK'")
    if data[4] != VERSION:
        raise ValueError("task: version %d, expected %d; deploy ulearn on this board anew" % (data[4], VERSION))
    if struct.unpack_from("<I", data, HEADER_BYTES)[0] != crc32(memoryview(data)[:HEADER_BYTES]) & 0xFFFFFFFF:
        raise ValueError("task: damaged: its checksum does not match")
    task = Task()
    fields = struct.unpack_from(HEADER, data, 0)
    for i in range(len(_FIELDS)):
        setattr(task, _FIELDS[i], fields[i + 2])
    if task.kind > DONE:
        raise ValueError("task: kind %d, expected 0 to %d" % (task.kind, DONE))
    if task.flags & ~(PERSONAL | FEEDBACK | HISTOGRAM):
        raise ValueError("task: unknown flags 0x%x" % task.flags)
    if TRAIN <= task.kind <= FEATURES and not task.round:
        raise ValueError("task: round 0, rounds count from 1")
    if task.kind == TRAIN:
        _check_training(task)
    return task


def _check_training(task):
    if not 1 <= task.encoding <= _ENCODINGS:
        raise ValueError("task: encoding %d, expected 1 to %d" % (task.encoding, _ENCODINGS))
    if task.encoding >= _RANDOM_K and not task.kept:
        raise ValueError("task: a sparse update that keeps no value")
    if not task.epochs:
        raise ValueError("task: training of 0 epochs")
    if task.rate_mantissa and not 1024 <= task.rate_mantissa <= 2047 or not -64 <= task.rate_exponent <= 16:
        raise ValueError(
            "task: learning rate %d * 2^%d, expected a mantissa of 1024 to 2047"
            % (task.rate_mantissa, task.rate_exponent)
        )
    if task.committed >= task.round:
        raise ValueError("task: round %d, of which %d is already committed" % (task.round, task.committed))


def make(**fields):
    # The bytes of a task, for a host; what is not given is 0, ids and nonce included.
    values = [fields.pop(name, bytes(16) if name in ("nonce", "model_id", "base_id") else 0) for name in _FIELDS]
    if fields:
        raise ValueError("task: it has no field '%s'" % sorted(fields)[0])
    data = _closed(struct.pack(HEADER, MAGIC, VERSION, *values))
    parse(data)
    return data


def carry_out(model, samples, task, held_out=None, progress=None):
    # Does what a task of kind TRAIN or EVALUATE asks; returns the answer: an update, or how well the base did on
    # `held_out`. Leaves the model trained, or as model.reset() does. progress(steps done, steps in all) after each.
    if task.model_id != model.model_id:
        raise ValueError("task: for another model than %s" % model.name)
    if task.base_id != model.base_id:
        raise ValueError("task: from another base than the one %s has; fetch that first" % model.name)
    if task.kind == TRAIN:
        return _train(model, samples, task, progress)
    if task.kind == EVALUATE:
        return _evaluate(model, held_out, task, progress)
    if task.kind == FEATURES:
        from .features import make

        return make(model, samples, task, progress)
    raise ValueError("task: kind %d is nothing to carry out" % task.kind)


def _begin(model, task):
    # Weights as a task finds them: the base, with the last layer that this board made in earlier rounds of the job.
    own, model.own = model.own, False
    try:
        model.reset()
    finally:
        model.own = own
    if task.flags & PERSONAL:
        from .personal import put_on

        # A round that is trained again begins as it did; one that is evaluated has been trained.
        put_on(model, task.job, task.round - (task.kind == TRAIN))


def _train(model, samples, task, progress):
    if samples is None or not len(samples):
        raise ValueError("task: there is no sample to train on")
    from .trainer import Trainer

    table = model.tensors
    if task.flags & PERSONAL:
        from .personal import save, shared

        table = shared(table, model.forward)
    elif model.own:
        from .personal import drop

        drop(model)
    _begin(model, task)
    trainer = Trainer(model, 0, task.seed, task.skip / 65536)
    trainer.set_rate(task.rate_mantissa, task.rate_exponent)
    pull = None
    if task.proximal:
        from .proximal import Pull

        progress = pull = Pull(model, table, task.proximal, len(samples), progress)
    try:
        trainer.fit(samples, task.epochs, progress)
    finally:
        if pull:
            pull.close()
    data = _encoded(model, table, task, len(samples))
    if task.flags & PERSONAL:
        save(model, task.job, task.round)
    return data


def _encoded(model, table, task, count):
    if task.encoding == _DENSE:
        from .update import make

        return make(model, count, table)
    from .encodings import make

    left = keep = None
    if task.flags & FEEDBACK:
        from .feedback import leftovers

        left, keep = leftovers(model, table, task.job, task.round, task.committed)
    return make(model, count, table, task.encoding, task.kept, task.job, task.round, left, keep)


def _evaluate(model, samples, task, progress):
    if samples is None or not len(samples):
        raise ValueError("task: there is no held-out sample to evaluate on")
    _begin(model, task)
    right, loss = _score(model, samples, progress)
    model.reset()
    return _closed(
        struct.pack(
            EVALUATION,
            EVALUATION_MAGIC,
            VERSION,
            0,
            model.classes if model.labelled else 0,
            task.job,
            task.round,
            model.base_id,
            len(samples),
            right,
            loss,
        )
    )


def _score(model, samples, progress):
    # How many are right, and the summed loss: cross-entropy (or hinge loss) times 1000, of a regression the squared
    # differences of int8 codes. All integers: the training program as far as its loss, which the kernels compute.
    program, records = _scoring(model)
    table, state, labelled = model.table, model.state, model.labelled
    total = right = 0
    count = len(samples)
    for i in range(count):
        if labelled:
            right += model.predict(samples.x(i)) == samples.target(i)
        if program:
            table[_BUF_INPUT] = samples.inputs
            table[_BUF_TARGET] = samples.targets
            code = model.executor.run(program, table, 0, records, i)
            if code < 0:
                model.fail(code)
            total += struct.unpack_from("<i", state, _S_LOSS)[0]
        if progress:
            progress(i + 1, count)
    if not program:
        return right, UNKNOWN
    if labelled:
        unit = int(1 / model.loss_scale + 0.5)
        total = (total * 1000 + unit // 2) // unit if unit > 1 else int(total * model.loss_scale * 1000 + 0.5)
    return right, min(total, UNKNOWN - 1)


def _scoring(model):
    # A training program, and how many of its records come to a loss.
    program = model.training
    if program:
        for i in range(struct.unpack_from("<H", program, _P_RECORDS)[0]):
            op = program[_PROGRAM_BYTES + _RECORD_BYTES * i]
            if op in (_OP_SOFTMAX_CE, _OP_MSE, _OP_HINGE):
                return program, i + 1
    return None, 0


def facts(model, samples, held_out=None, step_us=0, link=0, battery=255, histogram=False):
    # What the board tells about itself. `battery`: percent, 255 where unknown; `histogram`: whether its owner agreed.
    counts = b""
    if histogram and model.labelled:
        labels = [0] * model.classes
        for i in range(len(samples)):
            labels[samples.target(i)] += 1
        counts = struct.pack("<%dH" % len(labels), *labels)
    head = struct.pack(
        FACTS,
        FACTS_MAGIC,
        VERSION,
        1 if counts else 0,
        battery,
        0,
        model.model_id,
        model.base_id,
        len(samples) if samples else 0,
        len(held_out) if held_out else 0,
        step_us,
        link,
        len(counts) // 2,
    )
    return _closed(head + counts)


def replace(model, blob, base_id):
    # A whole new base: checked to be the one that the host named before anything changes.
    from .checkpoint import commit_base, identity

    if len(blob) != len(model.train_blob):
        raise ValueError("weights of %d bytes, %s has %d" % (len(blob), model.name, len(model.train_blob)))
    if identity(model.model_id, blob) != bytes(base_id):
        raise ValueError("weights that are not the base they were said to be; fetch them again")
    commit_base(model, (blob,), bytes(base_id))


def _closed(data):
    return data + struct.pack("<I", crc32(data) & 0xFFFFFFFF)
