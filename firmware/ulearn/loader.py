# Proves a plan, then puts it into a model: run once, then forgotten, so that a board has its code's memory back.
import struct
from array import array

from .compat import addressof, collect, const
from .loading import MODULES
from .plan import read

_SECTION_IO = const(1)
_SECTION_TENSORS = const(2)
_SECTION_CUTS = const(4)
_SECTION_FROZEN = const(5)
_SECTION_TRAIN = const(6)
_SECTION_STATE = const(7)
_SECTION_META = const(9)
_BUF_INPUT = const(0)
_BUF_ARENA = const(1)
_BUF_SCRATCH = const(5)
_LOSS_SOFTMAX_CE = const(1)
_LOSS_HINGE = const(3)
_P_SIZES = const(16)
_P_OUTPUT = const(44)
_P_RECORDS = const(52)
_P_KIND = const(54)
_KIND_TRAIN = const(2)
_PROGRAM_BYTES = const(64)
_RECORD_BYTES = const(64)
_OP_DENSE = const(1)
_OP_RELU = const(2)
_OP_SOFTMAX_CE = const(3)
_OP_MSE = const(4)
_OP_DENSE_BACK = const(5)
_OP_UPDATE_WEIGHT = const(6)
_OP_UPDATE_BIAS = const(7)
_OP_HINGE = const(8)
_OP_CONV = const(16)
_OP_DEPTHWISE = const(17)
_OP_AVERAGE_POOL = const(18)
_OP_MAX_POOL = const(19)
_OP_MEAN = const(20)
_OP_ADD = const(21)
_OP_MUL = const(22)
_OP_PAD = const(23)
_OP_COPY = const(24)
_OP_TABLE = const(25)
_OP_SOFTMAX = const(26)
_OP_MASK = const(29)
_OP_RELU_BACK = const(41)
_SAMPLES_BYTES = const(8192)  # in one piece, to be left to a board that learns

# The parts that a native module may lack, and their records: ul_core.c. What is in none of them trains convolutions.
_ALWAYS = (_OP_DENSE, _OP_RELU, _OP_CONV, _OP_SOFTMAX, _OP_COPY, _OP_TABLE)
_PARTS = (
    (_OP_DEPTHWISE, _OP_AVERAGE_POOL, _OP_MAX_POOL, _OP_MEAN, _OP_PAD),
    (_OP_ADD, _OP_MUL),
    (_OP_SOFTMAX_CE, _OP_UPDATE_WEIGHT, _OP_UPDATE_BIAS),
    (_OP_MSE, _OP_HINGE, _OP_DENSE_BACK, _OP_MASK, _OP_RELU_BACK),
)
_TRAINING = const(16)
_HAVE = (3, 12, 5, 15, 31)  # the parts that each of MODULES has, as bits


def check(source):
    # Reads and proves a plan; keeps nothing but its hash, what its records need of FROZEN, and which kernels they need:
    # what is read between the verifier's code would leave the heap in pieces.
    plan = read(source, leave=(_SECTION_FROZEN,))
    from .verify import verify

    kinds = (_SECTION_IO, _SECTION_TENSORS, _SECTION_CUTS, _SECTION_TRAIN, _SECTION_STATE)
    io, tensors, cuts, train, state = [plan.section(kind) for kind in kinds]
    frozen = plan.offsets.get(_SECTION_FROZEN, (0, 0))[1]
    windows = verify(plan, (io, tensors, cuts, frozen, train, state))
    # A board that is there to infer may do so with a plan that trains, too.
    forward = [p for p in plan.programs if p[_P_KIND] != _KIND_TRAIN]
    return plan.hash, windows, modules(plan.programs), modules(forward)


def modules(programs):
    # The names of the native modules that know all records of these programs, in the order of MODULES.
    needed = 0
    for program in programs:
        for at in range(_PROGRAM_BYTES, len(program), _RECORD_BYTES):
            needed |= _part(program[at])
    return [MODULES[i] for i in range(len(MODULES)) if not needed & ~_HAVE[i]]


def _part(op):
    for i in range(len(_PARTS)):
        if op in _PARTS[i]:
            return 1 << i
    return 0 if op in _ALWAYS else _TRAINING


def fill(model, source, run, place, checked):
    # The same plan once more, into a model.
    hash, windows = checked[:2]
    model.run = run
    source = read(source, leave=(_SECTION_FROZEN,))
    if source.hash != hash:
        raise ValueError("%s: changed while it was loaded" % source.name)
    sections = source.section
    model.name = source.name
    model.path = None
    model.model_id = source.model_id
    model.tensors = sections(_SECTION_TENSORS)
    model.cuts = sections(_SECTION_CUTS)
    model.meta_place = source.offsets.get(_SECTION_META)
    model.base_place = source.offsets.get(_SECTION_TRAIN, (0, 0))[0]
    train, state, io = sections(_SECTION_TRAIN), sections(_SECTION_STATE), sections(_SECTION_IO)
    offset, size = source.offsets.get(_SECTION_FROZEN, (0, 0))
    # The largest buffers side by side: whatever is small would lie in their way.
    collect()
    model.arena, scratch = _room(source, _BUF_ARENA), _room(source, _BUF_SCRATCH)
    frozen = None
    if source.in_place:
        frozen = sections(_SECTION_FROZEN)
        frozen = bytearray(frozen) if place == "ram" else _aligned(frozen)
    elif place != "stream":
        try:
            frozen = _read_at(source.name, offset, bytearray(size))
            if place == "auto" and len(source.programs) > 1:
                bytearray(_SAMPLES_BYTES)
        except MemoryError:
            if place == "ram":
                raise
            frozen = None
            collect()
    # Read into bytearrays of our own, a file's sections are already ours; what is only viewed is copied once.
    model.base = None if isinstance(train, bytearray) else train
    model.train_blob = train if isinstance(train, bytearray) else bytearray(train)
    model.first_state = bytes(state)
    model.state = bytearray(state)
    model.base_path = None
    model._base_id = None
    fields = struct.unpack("<4Hfi4HfiHHf", io)
    model.input_shape, model.input_scale, model.input_zero = _shape(fields[:4]), fields[4], fields[5]
    model.output_shape, model.output_scale, model.output_zero = _shape(fields[6:10]), fields[10], fields[11]
    model.loss_kind, model.loss_scale = fields[12], fields[14]
    model.forward, model.trainings, programs = None, [], []
    for program in source.programs:
        sizes = struct.unpack_from("<7I", program, _P_SIZES)
        model.input_bytes = sizes[_BUF_INPUT]
        program = _aligned(program)
        programs.append(program)
        if program[_P_KIND] == _KIND_TRAIN:
            model.trainings.append(program)
        else:
            model.forward = program
    model.records = struct.unpack_from("<H", model.forward, _P_RECORDS)[0]
    output, size = struct.unpack_from("<II", model.forward, _P_OUTPUT)
    model.classes = size
    model.labelled = model.loss_kind in (_LOSS_SOFTMAX_CE, _LOSS_HINGE)  # its targets are labels
    model.target_bytes = 2 if model.labelled else size
    model.label = array("H", (0,))
    at = output & 0x0FFFFFFF
    model.result = memoryview(model.arena)[at : at + size]
    model.quantised = None
    # Called as a method of `executor`: a bound method in its place would allocate at every call.
    model.streamed, model.executor = None, model
    if frozen is None:
        from .streaming import Streamed

        model.streamed = model.executor = Streamed(model.run, source.name, offset, programs, windows)
    model.frozen = "stream" if model.streamed else "ram" if isinstance(frozen, bytearray) else "in place"
    model.training = model.trainings[0] if model.trainings else None
    model.table = [None, model.arena, model.label, model.train_blob, model.state, scratch, frozen]


def _room(source, buffer):
    # What the programs need of a buffer.
    return bytearray(max([struct.unpack_from("<7I", program, _P_SIZES)[buffer] for program in source.programs]))


def _read_at(path, offset, data):
    with open(path, "rb") as f:
        f.seek(offset)
        if f.readinto(data) != len(data):
            raise ValueError("%s: cut short while it was read" % path)
    return data


def _shape(numbers):
    return tuple(n for n in numbers if n)


def _aligned(data):
    # Numbers of 16 and 32 bits lie in it; a slice of a foreign buffer may start anywhere, and is copied then.
    return data if len(data) and not addressof(data) & 3 else bytearray(data)
