# Proves every offset, dimension, operation and buffer bound of a plan before the core runs it: a hash says that a file
# is whole, not that it means well. The core itself trusts.
import struct
from array import array

from .compat import const

_PROGRAM_BYTES = const(64)
_P_SIZES = const(16)
_P_KIND = const(54)
_RECORD_BYTES = const(64)
_RECORDS_MAX = const(1024)
_KIND_FORWARD = const(1)
_KIND_TRAIN = const(2)
_BUF_INPUT = const(0)
_BUF_ARENA = const(1)
_BUF_FROZEN = const(2)
_BUF_TRAIN = const(3)
_BUF_STATE = const(4)
_BUF_SCRATCH = const(5)
_BUF_TARGET = const(6)
_OPERAND_NONE = const(4294967295)
_STATE_BYTES = const(48)
_S_N_GAINS = const(32)
_GAIN_BYTES = const(2)
_IO_BYTES = const(40)
_S_LR_MANT = const(8)
_LOSS_SOFTMAX_CE = const(1)
_LOSS_MSE = const(2)
_TENSOR_BYTES = const(32)
_DTYPE_INT8 = const(1)
_DTYPE_INT16 = const(2)
_DTYPE_INT32 = const(3)
_DTYPE_UINT8 = const(4)
_TENSOR_SHARED = const(1)
_CUT_BYTES = const(48)
_OP_DENSE = const(1)
_OP_RELU = const(2)
_OP_SOFTMAX_CE = const(3)
_OP_MSE = const(4)
_OP_DENSE_BACK = const(5)
_OP_UPDATE_WEIGHT = const(6)
_OP_UPDATE_BIAS = const(7)
_OP_CONV = const(16)
_OP_DEPTHWISE = const(17)
_OP_AVERAGE_POOL = const(18)
_OP_MAX_POOL = const(19)
_OP_MEAN = const(20)
_OP_ADD = const(21)
_ADD_BLOCK = const(64)
_OP_MUL = const(22)
_OP_PAD = const(23)
_OP_COPY = const(24)
_OP_TABLE = const(25)
_OP_SOFTMAX = const(26)
_MODE_APPLY = const(0)
_FLAG_MASK = const(1)
_FLAG_GATE_DEEPER = const(2)
_FLAG_FULL_RANGE = const(4)
_FLAG_ONE_SCALE = const(8)
_ROUND_NONE = const(0)
_ROUND_SINGLE = const(1)
_ROUND_DOUBLE = const(2)
_ROUND_AWAY = const(3)
_GRADIENT_HEADER = const(4)
_CLASSES_MAX = const(8192)
_PRODUCTS_MAX = const(1073741824)

_WEIGHT_MAX = const(32768)
_MANTISSA_MAX = const(2047)
_ARENA_MAX = const(16777216)
_SCALE_MAX = 1e30

# Of each record: (operand, unit, number, written). Units: 1, 2, 4 bytes an element, a: bytes from a multiple of 4 on,
# w: a weight, g: a gradient tensor. Numbers: K inputs, N outputs, W weights, E the record's extra, L one label, X and Y
# elements of a whole input and output image, S scales, M multipliers, or
# themselves.
_IMAGES = ((0, "1", "X", 0), (1, "1", "Y", 1))
_SUMS = ((3, "4", "N", 0), (4, "4", "M", 0), (5, "1", "S", 0))
_OPERANDS = {
    _OP_DENSE: (
        (0, "1", "K", 0),
        (1, "1", "N", 1),
        (2, "w", "W", 0),
    )
    + _SUMS,
    _OP_RELU: ((0, "1", "K", 0), (1, "1", "K", 1)),
    _OP_SOFTMAX_CE: ((0, "1", "N", 0), (1, "g", "N", 1), (2, "2", "E", 0), (3, "t", "L", 0)),
    _OP_MSE: ((0, "1", "N", 0), (1, "g", "N", 1), (3, "t", "N", 0)),
    _OP_DENSE_BACK: ((0, "g", "N", 0), (1, "g", "K", 1), (2, "w", "W", 0), (3, "2", "N", 0), (4, "1", "K", 0)),
    _OP_UPDATE_WEIGHT: ((0, "g", "N", 0), (1, "1", "K", 0), (2, "w", "W", 2), (3, "2", "N", 0)),
    _OP_UPDATE_BIAS: ((0, "g", "N", 0), (2, "4", "N", 2), (3, "2", "N", 0)),
    _OP_CONV: _IMAGES + ((2, "a", "W", 0),) + _SUMS,
    _OP_DEPTHWISE: _IMAGES + ((2, "1", "W", 0),) + _SUMS,
    _OP_AVERAGE_POOL: _IMAGES,
    _OP_MAX_POOL: _IMAGES,
    _OP_MEAN: _IMAGES + ((2, "4", 2, 0),),
    _OP_ADD: _IMAGES + ((2, "1", "E", 0), (3, "4", 7, 0)),
    _OP_MUL: _IMAGES + ((2, "1", "E", 0), (3, "4", 3, 0)),
    _OP_PAD: _IMAGES,
    _OP_COPY: _IMAGES,
    _OP_TABLE: _IMAGES + ((2, "1", 256, 0),),
    _OP_SOFTMAX: _IMAGES + ((2, "4", "E", 0),),
}


class _Verifier:
    def __init__(self, plan, sections):
        self.name = plan.name
        self.io, self.tensors, self.cuts, frozen, train, self.state = sections
        self.have = (None, _ARENA_MAX, frozen, len(train), len(self.state), _ARENA_MAX, None)
        self.where = "plan"
        self.trainable = {}
        self.windows = None  # of FROZEN, what each record of the forward program needs: from, to, from, to, ...

    def refuse(self, fault):
        raise ValueError("%s: %s: %s" % (self.name, self.where, fault))

    def need(self, truth, fault):
        if not truth:
            self.refuse(fault)

    # The parts that are not programs.

    def check_io(self):
        self.where = "input and output"
        self.need(len(self.io) == _IO_BYTES, "%d bytes, expected %d" % (len(self.io), _IO_BYTES))
        fields = struct.unpack("<4Hfi4HfiHHf", self.io)
        ih, iw, ic, none_in, _, _, oh, ow, oc, none_out, _, _, self.loss, zero, _ = fields
        self.need(not none_in and not none_out, "a shape has more than three dimensions")
        for scale, at in ((fields[4], fields[5]), (fields[10], fields[11])):
            # written so that what is not a number is refused, too
            self.need(0 < scale < _SCALE_MAX and -128 <= at <= 127, "quantisation %s, %d" % (scale, at))
        self.input_bytes = ih * iw * ic
        self.output_bytes = oh * ow * oc
        self.need(0 < self.input_bytes <= _ARENA_MAX, "the input has no element or too many")
        self.need(0 < self.output_bytes <= _ARENA_MAX, "the output has no element or too many")
        self.need(self.loss <= _LOSS_MSE and not zero, "loss %d is not known" % self.loss)

    def check_state(self):
        self.where = "state"
        size = len(self.state)
        self.need(size >= _STATE_BYTES and size % 4 == 0, "%d bytes" % size)
        gains, gates, active, at = struct.unpack_from("<4H", self.state, _S_N_GAINS)
        self.gains_end = _STATE_BYTES + _GAIN_BYTES * gains
        self.gates = at
        self.gates_end = at + gates
        self.need(at == self.gains_end, "the gates do not follow the gains")
        self.need(size < 65536 and self.gates_end + 2 * active <= size, "it is shorter than what it counts")
        self.need(any(self.state[:4]), "the generator's seed is 0")
        rate = struct.unpack_from("<H", self.state, _S_LR_MANT)[0]
        self.need(rate == 0 or 1024 <= rate <= 2047, "learning rate mantissa %d" % rate)

    def check_tensors(self):
        self.where = "tensors"
        self.need(len(self.tensors) % _TENSOR_BYTES == 0, "%d bytes" % len(self.tensors))
        end = 0
        for at in range(0, len(self.tensors), _TENSOR_BYTES):
            entry = struct.unpack_from("<HBBHHHH4HIII", self.tensors, at)
            ident, dtype, fraction, flags, capacity, active, zero, o, h, w, i, offset, _, zero2 = entry
            self.where = "tensor %d" % ident
            self.need(flags == _TENSOR_SHARED, "flags 0x%x: only shared tensors are supported yet" % flags)
            self.need(_DTYPE_INT8 <= dtype <= _DTYPE_INT32, "dtype %d is not known" % dtype)
            self.need(fraction <= (7 if dtype == _DTYPE_INT16 else 0), "%d fraction bits" % fraction)
            self.need(active == capacity == o, "room for more channels than are used is not supported yet")
            self.need(not zero and not zero2, "reserved fields are not zero")
            count = o * h * w * i
            unit = 1 << (dtype - 1)
            self.need(0 < count <= _ARENA_MAX and offset % 4 == 0 and offset >= end, "misplaced")
            end = offset + count * unit
            self.need(end <= self.have[_BUF_TRAIN], "it ends at %d of %d bytes" % (end, self.have[_BUF_TRAIN]))
            self.trainable[offset] = (dtype, fraction, count)

    def check_cuts(self, programs):
        self.where = "cuts"
        self.need(len(self.cuts) % _CUT_BYTES == 0, "%d bytes" % len(self.cuts))
        for at in range(0, len(self.cuts), _CUT_BYTES):
            index, record, operand, size = struct.unpack_from("<HHII", self.cuts, at + 16)
            self.need(index < len(programs), "program %d does not exist" % index)
            head = programs[index]
            self.sizes = struct.unpack_from("<7I", head, _P_SIZES)
            self.need(head[_P_KIND] == _KIND_FORWARD, "program %d is not the forward program" % index)
            self.need(0 < record <= struct.unpack_from("<H", head, 52)[0], "record %d does not exist" % record)
            self.check_operand(operand, 1, size)

    # Programs.

    def check_program(self, program):
        self.where = "program"
        self.need(len(program) >= _PROGRAM_BYTES, "%d bytes" % len(program))
        fields = struct.unpack_from("<16s7IIIHBB8s", program, 0)
        self.sizes = fields[1:8]
        output, output_bytes, count, self.kind, flags, zero = fields[8:]
        self.need(self.kind in (_KIND_FORWARD, _KIND_TRAIN), "kind %d is not known" % self.kind)
        self.where = "train" if self.kind == _KIND_TRAIN else "forward"
        self.need(not flags and zero == bytes(8), "unknown flags")
        self.need(0 < count <= _RECORDS_MAX, "%d records" % count)
        self.need(
            len(program) == _PROGRAM_BYTES + count * _RECORD_BYTES, "%d bytes for %d records" % (len(program), count)
        )
        for buf in range(_BUF_ARENA, _BUF_TARGET):
            self.need(self.sizes[buf] <= self.have[buf], "needs %d bytes of buffer %d" % (self.sizes[buf], buf))
        self.need(self.sizes[_BUF_INPUT] == self.input_bytes, "takes %d bytes of input" % self.sizes[_BUF_INPUT])
        target = 0
        if self.kind == _KIND_TRAIN:
            self.need(self.loss in (_LOSS_SOFTMAX_CE, _LOSS_MSE), "there is no loss to train with")
            self.need(self.sizes[_BUF_STATE] == len(self.state), "it sees only a part of the state")
            target = 2 if self.loss == _LOSS_SOFTMAX_CE else self.output_bytes
        self.need(self.sizes[_BUF_TARGET] == target, "takes %d bytes of target" % self.sizes[_BUF_TARGET])
        self.products = 0
        if self.kind == _KIND_FORWARD:
            self.windows = array("I", bytes(8 * count))
        for i in range(count):
            self.where, self.record = "record %d" % i, i
            self.check_record(program, _PROGRAM_BYTES + i * _RECORD_BYTES)
        self.where = "output"
        self.need(output_bytes == self.output_bytes, "%d bytes, expected %d" % (output_bytes, self.output_bytes))
        self.check_operand(output, 1, output_bytes)
        self.need(output >> 28 == _BUF_ARENA, "it must lie in the arena")

    def check_operand(self, operand, unit, size):
        buf, offset = operand >> 28, operand & 0x0FFFFFFF
        self.need(buf in (_BUF_INPUT, _BUF_ARENA, _BUF_FROZEN, _BUF_TRAIN), "buffer %d cannot be an operand" % buf)
        self.need(unit == 1 or buf != _BUF_INPUT, "numbers of %d bytes cannot be read from the input" % unit)
        self.need(offset % unit == 0, "offset %d is not a multiple of %d" % (offset, unit))
        end = offset + size
        self.need(0 < size and end <= self.sizes[buf], "it reaches to byte %d of %d" % (end, self.sizes[buf]))

    def check_record(self, program, at):
        fields = struct.unpack_from("<4B2H6I6H6B4b2BHhI", program, at)
        op, mode, flags, rounding, gate, gain = fields[:6]
        operands = fields[6:12]
        in_h, in_w, k, out_h, out_w, n = fields[12:18]
        act_min, act_max, dtype, fraction, mantissa, _, extra = fields[26:]
        self.need(op in _OPERANDS, "operation %d is not known to this version" % op)
        imported = op >= _OP_CONV
        backward = not imported and op >= _OP_DENSE_BACK
        self.need(mode == _MODE_APPLY, "mode %d is not supported yet" % mode)
        allowed = (_FLAG_MASK if op == _OP_DENSE_BACK else 0) | (_FLAG_GATE_DEEPER if gate else 0)
        if imported and op <= _OP_DEPTHWISE:
            allowed |= _FLAG_FULL_RANGE | _FLAG_ONE_SCALE
        elif op == _OP_DENSE:
            allowed |= _FLAG_ONE_SCALE
        self.need(not flags & ~allowed, "unknown flags 0x%x" % flags)
        roundings = (_ROUND_NONE,)
        if op == _OP_DENSE:
            roundings = (_ROUND_SINGLE, _ROUND_AWAY)
        elif op == _OP_CONV:
            roundings = (_ROUND_SINGLE, _ROUND_DOUBLE, _ROUND_AWAY)
        elif op in (_OP_DEPTHWISE, _OP_MEAN, _OP_ADD, _OP_MUL):
            roundings = (_ROUND_DOUBLE,)
        self.need(rounding in roundings, "rounding %d is not supported here" % rounding)
        if not imported:
            self.need(
                not (in_h or in_w or out_h or out_w or any(fields[18:24])), "dimensions that it does not have are set"
            )
        self.need(act_min <= act_max, "its activation range is empty")
        self.need(self.kind == _KIND_TRAIN or op <= _OP_RELU or imported, "it trains, in a program that must not")
        if gate:
            self.need(backward and self.gates <= gate < self.gates_end, "gate %d lies outside the gates" % gate)
        if op == _OP_DENSE_BACK:
            inside = _STATE_BYTES <= gain < self.gains_end and gain % 2 == 0
            self.need(inside, "gain %d lies outside the gains" % gain)
        else:
            self.need(gain == 0, "it has a gain and no use for one")
        weights = op in (_OP_DENSE, _OP_DENSE_BACK, _OP_UPDATE_WEIGHT)
        wide = weights and dtype == _DTYPE_INT16
        if weights:
            self.need(dtype in (_DTYPE_INT8, _DTYPE_INT16), "weights of dtype %d" % dtype)
            self.need(fraction <= (7 if wide else 0), "%d fraction bits" % fraction)
        largest = _WEIGHT_MAX >> fraction if wide else 128
        if op == _OP_DENSE:
            self.need(k * 255 * largest <= 1 << 30, "%d inputs could overflow the accumulator" % k)
        if op == _OP_DENSE_BACK:
            self.need(n * _MANTISSA_MAX * largest < 1 << 31, "%d channels could overflow the accumulator" % n)
            self.need(self.sizes[_BUF_SCRATCH] >= 2 * n, "it needs %d bytes of scratch" % (2 * n))
        if op in (_OP_SOFTMAX_CE, _OP_MSE):
            self.need(
                self.loss == (_LOSS_SOFTMAX_CE if op == _OP_SOFTMAX_CE else _LOSS_MSE), "it is not the plan's loss"
            )
            self.need(n <= _CLASSES_MAX and n == self.output_bytes, "%d outputs" % n)
        if op in (_OP_UPDATE_WEIGHT, _OP_UPDATE_BIAS):
            self.need(1024 <= mantissa <= 2047, "scale mantissa %d" % mantissa)
        numbers = {"K": k, "N": n, "W": k * n, "E": extra, "L": 1, "X": in_h * in_w * k, "Y": out_h * out_w * n}
        numbers["S"] = 1 if flags & _FLAG_ONE_SCALE else n
        numbers["M"] = numbers["S"] * (2 if rounding == _ROUND_AWAY else 1)
        inherits = (0,) if op == _OP_RELU else ()
        if not imported:
            self.count_work(2 * k * n)
        else:
            inherits = self.check_imported(fields, numbers)
        used = 0
        self.spans = []
        for index, unit, number, written in _OPERANDS[op]:
            if index == 4 and op == _OP_DENSE_BACK and not flags & _FLAG_MASK:
                continue
            used |= 1 << index
            count = numbers[number] if isinstance(number, str) else number
            self.check_use(index, operands[index], unit, count, written, wide, fraction)
        self.check_overlap(inherits)
        if self.kind == _KIND_FORWARD:
            low, high = 0x0FFFFFFF, 0
            for start, end, _, _ in self.spans:
                if start >> 28 == _BUF_FROZEN:
                    low, high = min(low, start & 0x0FFFFFFF), max(high, end & 0x0FFFFFFF)
            # from a multiple of 4 on, as the buffer it stands for
            self.windows[2 * self.record], self.windows[2 * self.record + 1] = min(low, high) // 4 * 4, high
        for index in range(6):
            self.need(used >> index & 1 or operands[index] == _OPERAND_NONE, "operand %d has no meaning here" % index)

    def check_imported(self, fields, numbers):
        # Dimensions, work and scratch of an imported operator; returns the operands in whose place it may write.
        op = fields[0]
        in_h, in_w, k, out_h, out_w, n, kernel_h, kernel_w, stride_h, stride_w, top, left = fields[12:24]
        extra = fields[32]
        self.need(in_h and in_w and k and out_h and out_w and n, "one of its dimensions is 0")
        same = fields[12:15] == fields[15:18]
        window = op <= _OP_MAX_POOL
        if window:
            self.need(kernel_h and kernel_w and stride_h and stride_w, "its kernel or stride is 0")
            for size, out, kernel, stride, pad in (
                (in_h, out_h, kernel_h, stride_h, top),
                (in_w, out_w, kernel_w, stride_w, left),
            ):
                self.need(pad < kernel and (out - 1) * stride - pad < size, "its kernel leaves the image")
        else:
            self.need(not any(fields[18:22]), "it has a kernel and no use for one")
            self.need(op == _OP_PAD or not (top or left), "it has padding and no use for any")
        taps = kernel_h * kernel_w * (k if op == _OP_CONV else 1) if window else 1
        self.count_work(max(numbers["X"], numbers["Y"] * (taps + 3)))
        dtype = {_OP_CONV: _DTYPE_UINT8, _OP_DEPTHWISE: _DTYPE_INT8}.get(op, 0)
        self.need(fields[28] == dtype, "weights of dtype %d" % fields[28])
        scratch = 0
        inherits = ()
        if op == _OP_CONV:
            row = (taps + 3) // 4 * 4
            numbers["W"] = n * row
            chunk, block = extra & 0xFFFF, extra >> 16
            self.need(taps << 14 <= 1 << 30, "%d inputs could overflow the accumulator" % taps)
            self.need(0 < chunk <= row and chunk % 4 == 0 and 0 < block <= n, "%d and %d at a time" % (chunk, block))
            self.need(block == n or chunk == row, "it cuts both taps and channels")
            one = out_h * out_w == 1
            scratch = (1 if one else 2) * (2 * chunk + 4 * block)
            # The kernel's rows are walked anew for every chunk.
            self.count_work(out_h * out_w * kernel_h * (row // chunk + 1))
            point = kernel_h * kernel_w * stride_h * stride_w == 1 and not (top or left)
            if one or (point and n <= k and (in_h, in_w) == (out_h, out_w)):
                inherits = (0,)
        elif op == _OP_DEPTHWISE:
            numbers["W"] = n * taps
            self.need(n % k == 0, "%d channels out of %d" % (n, k))
            self.need(extra >= 2 and extra % 2 == 0 and extra < 65536, "%d rows at a time" % extra)
            lines = (extra // 2 - 1) * stride_h + max(kernel_h, stride_h)
            width = (out_w - 1) * stride_w + kernel_w
            scratch = 4 * (lines * width + extra * out_w + taps)
            # Every channel gathers its bands.
            self.count_work(n * (out_h // extra + 1) * 2 * lines * width)
            if same and extra >= out_h:
                inherits = (0,)
        elif window:
            self.need(k == n, "it changes the number of channels")
        elif op == _OP_MEAN:
            self.need((out_h, out_w, n) == (1, 1, k), "its output is no vector of channels")
            self.need(in_h * in_w <= 1 << 22, "%d inputs could overflow the accumulator" % (in_h * in_w))
        elif op == _OP_PAD:
            self.need(top + in_h <= out_h and left + in_w <= out_w and extra + k <= n, "its input does not fit")
        elif op == _OP_COPY:
            self.need(in_h == out_h and extra + in_w * k <= out_w * n, "its input does not fit")
        else:
            self.need(same, "its input and output differ in shape")
            inherits = (0,)
            if op == _OP_SOFTMAX:
                self.need(k < _CLASSES_MAX and 0 < extra <= 256, "%d classes, %d exponentials" % (k, extra))
            elif op != _OP_TABLE:
                self.need(extra > 0 and numbers["X"] % extra == 0, "%d numbers do not repeat evenly" % extra)
                inherits = (0, 2) if extra == numbers["X"] else (0,)
                scratch = 4 * _ADD_BLOCK if op == _OP_ADD else 0
        self.need(self.sizes[_BUF_SCRATCH] >= scratch, "it needs %d bytes of scratch" % scratch)
        return inherits

    def count_work(self, products):
        self.products += products
        self.need(self.products <= _PRODUCTS_MAX, "the program is too much work")

    def check_overlap(self, inherits):
        # What a record writes lies apart from all that it reads, or takes the whole place of what it may replace.
        for start, end, written, _ in self.spans:
            for other, other_end, other_written, index in self.spans:
                if written and not other_written and start < other_end and other < end:
                    self.need(index in inherits and start == other, "it writes over what it reads")

    def check_use(self, index, operand, unit, count, written, wide, fraction):
        buf = operand >> 28
        if unit == "t":
            self.need(operand == _BUF_TARGET << 28, "its target does not lie in the target buffer")
            return
        if unit == "g":
            self.need(buf == _BUF_ARENA and count > 0, "a gradient must lie in the arena")
            self.check_operand(operand, 2, _GRADIENT_HEADER + 2 * count)
            self.spans.append((operand, operand + _GRADIENT_HEADER + 2 * count, written, index))
            return
        size = (2 if wide else 1) if unit == "w" else 1 if unit == "a" else int(unit)
        self.check_operand(operand, size, size * count)
        aligned = operand % 4 == 0 and buf != _BUF_INPUT
        self.need(unit != "a" or aligned, "its weights do not start at a multiple of 4")
        self.spans.append((operand, operand + size * count, written, index))
        self.need(written != 1 or buf == _BUF_ARENA, "it writes outside the arena")
        self.need(written != 2 or buf == _BUF_TRAIN, "it updates what is not trainable")
        if buf == _BUF_TRAIN:
            entry = self.trainable.get(operand & 0x0FFFFFFF)
            dtype = _DTYPE_INT32 if size == 4 else _DTYPE_INT16 if size == 2 else _DTYPE_INT8
            wanted = (dtype, fraction if unit == "w" else 0, count)
            self.need(entry == wanted, "it does not match a trainable tensor")


def verify(plan, sections):
    # sections: IO, TENSORS, CUTS, bytes of FROZEN, TRAIN, STATE. Raises ValueError naming the plan, the place and the
    # fault. Returns what each record of the forward program needs of FROZEN: from, to, from, to, ...
    v = _Verifier(plan, sections)
    v.check_io()
    v.check_state()
    v.check_tensors()
    kinds = []
    for program in plan.programs:
        v.check_program(program)
        kinds.append(v.kind)
    v.where = "programs"
    v.need(kinds.count(_KIND_FORWARD) == 1, "one forward program is expected")
    v.need(kinds.count(_KIND_TRAIN) <= 1, "more than one training program is not supported yet")
    v.check_cuts(plan.programs)
    return v.windows
