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
_BUF_FROZEN = const(6)
_BUF_TRAIN = const(3)
_BUF_STATE = const(4)
_BUF_SCRATCH = const(5)
_BUF_TARGET = const(2)
_OPERAND_NONE = const(4294967295)
_STATE_BYTES = const(48)
_S_N_GAINS = const(32)
_GAIN_BYTES = const(2)
_IO_BYTES = const(40)
_S_LR_MANT = const(8)
_LOSS_SOFTMAX_CE = const(1)
_LOSS_MSE = const(2)
_LOSS_HINGE = const(3)
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
_OP_HINGE = const(8)
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
_OP_CONV_TRAINED = const(27)
_OP_DEPTHWISE_TRAINED = const(28)
_OP_MASK = const(29)
_OP_CONV_BACK = const(32)
_OP_DEPTHWISE_BACK = const(33)
_OP_UPDATE_CONV = const(34)
_OP_UPDATE_DEPTHWISE = const(35)
_OP_AVERAGE_BACK = const(36)
_OP_MAX_BACK = const(37)
_OP_SCALE_BACK = const(38)
_OP_CROP = const(39)
_OP_SUM = const(40)
_OP_RELU_BACK = const(41)
_MODE_APPLY = const(0)
_FLAG_BITS = const(1)
_FLAG_GATE_DEEPER = const(2)
_FLAG_FULL_RANGE = const(4)
_FLAG_ONE_SCALE = const(8)
_FLAG_NARROW_OUT = const(16)
_FLAG_NARROW_IN = const(32)
_FLAG_AGAIN = const(64)
_ROUND_NONE = const(0)
_ROUND_SINGLE = const(1)
_ROUND_DOUBLE = const(2)
_ROUND_AWAY = const(3)
_GRADIENT_HEADER = const(4)
_CLASSES_MAX = const(8192)
_PRODUCTS_MAX = const(1073741824)

_WEIGHT_MAX = const(32768)
_MANTISSA_MAX = const(2047)
_NARROW_MAX = const(127)
_ARENA_MAX = const(16777216)
_SCALE_MAX = 1e30

# Of each record, for each operand: which, unit, number. As bytes it takes less heap than as tuples, and leaves no names
# behind as short texts do.
# Units: 1, 2, 4 bytes an element, w: a weight that is trained, g: a gradient tensor, t: the target; of FROZEN alone
# f: bytes, a: bytes from a multiple of 4 on. Numbers: N outputs, X and Y elements of the whole input and output,
# W weights, F of them frozen, T trained, E the record's extra, S scales, M multipliers, B elements of a mask,
# V values of a byte, or themselves.
_OPERANDS = {
    _OP_DENSE: b"01X 11Y 2wW 34N 44M 51S",
    _OP_RELU: b"01X 11X",
    _OP_SOFTMAX_CE: b"01Y 1gY 22E 3tN",
    _OP_MSE: b"01Y 1gY 3tN",
    _OP_HINGE: b"01Y 1gY 3tN",
    _OP_DENSE_BACK: b"0gY 1gX 2aF 32N 5wT",
    _OP_UPDATE_WEIGHT: b"0gY 11X 2wW 32N",
    _OP_UPDATE_BIAS: b"0gY 24N 32N",
    _OP_CONV: b"01X 11Y 2aF 34N 44M 51S",
    _OP_DEPTHWISE: b"01X 11Y 2fF 34N 44M 51S",
    _OP_AVERAGE_POOL: b"01X 11Y",
    _OP_MAX_POOL: b"01X 11Y",
    _OP_MEAN: b"01X 11Y 242",
    _OP_ADD: b"01X 11Y 21E 347",
    _OP_MUL: b"01X 11Y 21E 343",
    _OP_PAD: b"01X 11Y",
    _OP_COPY: b"01X 11Y",
    _OP_TABLE: b"01X 11Y 21V",
    _OP_SOFTMAX: b"01X 11Y 24E",
    _OP_CONV_TRAINED: b"01X 11Y 2wW 34N 44M 51S",
    _OP_DEPTHWISE_TRAINED: b"01X 11Y 2wW 34N 44M 51S",
    _OP_MASK: b"01X 11B",
    _OP_CONV_BACK: b"0gY 1gX 2aF 32N 5wT",
    _OP_DEPTHWISE_BACK: b"0gY 1gX 2fF 32N 5wT",
    _OP_UPDATE_CONV: b"0gY 11X 2wW 32N",
    _OP_UPDATE_DEPTHWISE: b"0gY 11X 2wW 32N",
    _OP_AVERAGE_BACK: b"0gY 1gX",
    _OP_MAX_BACK: b"0gY 1gX 41X",
    _OP_SCALE_BACK: b"0gY 1gX 22E",
    _OP_CROP: b"0gY 1gX",
    _OP_SUM: b"0gY 1gX 4gY",
    _OP_RELU_BACK: b"0gY 1gX 41B",
}


class _Verifier:
    def __init__(self, plan, sections):
        self.name = plan.name
        self.io, self.tensors, self.cuts, frozen, train, self.state = sections
        self.have = (_ARENA_MAX, _ARENA_MAX, _ARENA_MAX, len(train), len(self.state), _ARENA_MAX, frozen)
        self.where = "plan"
        self.trainable = {}
        self.windows = []  # of FROZEN, what each record of each program needs: from, to, from, to, ...

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
        self.need(self.loss <= _LOSS_HINGE and not zero, "loss %d is not known" % self.loss)

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
        for buf in range(len(self.have)):
            self.need(self.sizes[buf] <= self.have[buf], "needs %d bytes of buffer %d" % (self.sizes[buf], buf))
        self.need(self.sizes[_BUF_INPUT] == self.input_bytes, "takes %d bytes of input" % self.sizes[_BUF_INPUT])
        target = 0
        if self.kind == _KIND_TRAIN:
            self.need(self.loss, "there is no loss to train with")
            self.need(self.sizes[_BUF_STATE] == len(self.state), "it sees only a part of the state")
            target = self.output_bytes if self.loss == _LOSS_MSE else 2
        self.need(self.sizes[_BUF_TARGET] == target, "takes %d bytes of target" % self.sizes[_BUF_TARGET])
        self.products = 0
        self.windows.append(array("I", bytes(8 * count)))
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
        need = self.need
        fields = struct.unpack_from("<4B2H6I6H6B4b2BHhI", program, at)
        op, mode, flags, rounding, gate, gain = fields[:6]
        act_min, act_max, dtype, fraction, _, _, extra = fields[26:]
        need(op in _OPERANDS, "operation %d is not known to this version" % op)
        need(mode == _MODE_APPLY, "mode %d is not supported yet" % mode)
        uses = _OPERANDS[op]
        update = op in (_OP_UPDATE_WEIGHT, _OP_UPDATE_BIAS, _OP_UPDATE_CONV, _OP_UPDATE_DEPTHWISE)
        backward = op >= _OP_CONV_BACK or _OP_DENSE_BACK <= op <= _OP_UPDATE_BIAS
        allowed = _FLAG_ONE_SCALE if b"S" in uses else 0
        if op in (_OP_CONV, _OP_DEPTHWISE):
            allowed |= _FLAG_FULL_RANGE
        elif op == _OP_RELU_BACK:
            allowed = _FLAG_BITS
        if backward:
            allowed |= _FLAG_NARROW_OUT if update else _FLAG_NARROW_OUT | _FLAG_NARROW_IN
        again = flags & _FLAG_AGAIN
        if _OP_CONV <= op < _OP_MASK or op <= _OP_RELU:
            allowed |= _FLAG_AGAIN
        if gate:
            allowed |= _FLAG_GATE_DEEPER
            need(backward and self.gates <= gate < self.gates_end, "gate %d lies outside the gates" % gate)
        need(not flags & ~allowed, "unknown flags 0x%x" % flags)
        roundings = 1 << _ROUND_NONE
        if op == _OP_DENSE:
            roundings = 1 << _ROUND_SINGLE | 1 << _ROUND_AWAY
        elif op in (_OP_CONV, _OP_CONV_TRAINED):
            roundings = 1 << _ROUND_SINGLE | 1 << _ROUND_DOUBLE | 1 << _ROUND_AWAY
        elif b"S" in uses or op in (_OP_MEAN, _OP_ADD, _OP_MUL):
            roundings = 1 << _ROUND_DOUBLE
        need(roundings >> rounding & 1, "rounding %d is not supported here" % rounding)
        need(act_min <= act_max, "its activation range is empty")
        forward = op <= _OP_RELU or _OP_CONV <= op < _OP_MASK
        need(self.kind == _KIND_TRAIN or (forward and not again), "it trains, in a program that must not")
        passes = b"T" in uses
        inside = _STATE_BYTES <= gain < self.gains_end and gain % 2 == 0
        need(inside if passes else not gain, "gain %d lies outside the gains" % gain)
        trained = b"w" in uses and (extra or not passes)
        frozen = _DTYPE_UINT8 if op == _OP_CONV else _DTYPE_INT8 if op == _OP_DEPTHWISE else 0
        need(dtype in (_DTYPE_INT8, _DTYPE_INT16) if trained else dtype == frozen, "weights of dtype %d" % dtype)
        wide = trained and dtype == _DTYPE_INT16
        finer = fraction >> 4 if forward else 0
        fraction -= 16 * finer
        need(finer <= fraction <= (7 if wide else 0), "%d fraction bits, %d of them in sums" % (fraction, finer))
        numbers, inherits = self.check_shape(fields, update, _WEIGHT_MAX >> (fraction - finer) if wide else 128)
        used = 0
        self.spans = []
        for use in uses.split():
            index, unit, number = use[0] - 48, use[1:2], use[2:]
            count = numbers[number] if number in numbers else int(number)
            if not count and number in b"FT":
                continue
            used |= 1 << index
            size = 1
            if unit == b"w":
                size = 2 if wide else 1
            elif unit == b"g":
                size = 1 if flags & (_FLAG_NARROW_IN if index == 1 else _FLAG_NARROW_OUT) else 2
            elif unit in b"24":
                size = int(unit)
            written = 2 * (index == 2) if update else index == 1
            self.check_use(index, fields[6 + index], unit, size, count, written, fraction)
        self.check_overlap(inherits)
        low, high = 0x0FFFFFFF, 0
        for start, end, _, _ in self.spans:
            if start >> 28 == _BUF_FROZEN:
                low, high = min(low, start & 0x0FFFFFFF), max(high, end & 0x0FFFFFFF)
        # from a multiple of 4 on, as the buffer it stands for
        self.windows[-1][2 * self.record], self.windows[-1][2 * self.record + 1] = min(low, high) // 4 * 4, high
        for index in range(6):
            unused = fields[6 + index] == _OPERAND_NONE
            need(used >> index & 1 or unused, "operand %d has no meaning here" % index)

    def check_shape(self, fields, update, largest):
        # Dimensions, sums, scratch and work of a record whose weights are at most `largest`. Returns the numbers of
        # _OPERANDS and the operands in whose place it may write.
        need = self.need
        op, _, flags, rounding = fields[:4]
        in_h, in_w, k, out_h, out_w, n, kernel_h, kernel_w, stride_h, stride_w, top, left = fields[12:24]
        mantissa, extra = fields[30], fields[32]
        image = op >= _OP_CONV
        full = op in (
            _OP_DENSE,
            _OP_DENSE_BACK,
            _OP_UPDATE_WEIGHT,
            _OP_CONV,
            _OP_CONV_TRAINED,
            _OP_CONV_BACK,
            _OP_UPDATE_CONV,
        )
        depthwise = op in (_OP_DEPTHWISE, _OP_DEPTHWISE_TRAINED, _OP_DEPTHWISE_BACK, _OP_UPDATE_DEPTHWISE)
        unpool = op in (_OP_AVERAGE_BACK, _OP_MAX_BACK)
        pool = unpool or op in (_OP_AVERAGE_POOL, _OP_MAX_POOL)
        cells, places = in_h * in_w, out_h * out_w
        # Of a window: its cells; how many windows meet in a cell; how many cells lie inside at least.
        area = meet = least = 1
        if not image:
            fault = in_h or in_w or any(fields[18:24])
            if op != _OP_UPDATE_BIAS:
                fault = fault or out_h or out_w
                places = 1
            need(not fault, "dimensions that it does not have are set")
            cells = 1
        else:
            need(cells and k and places and n, "one of its dimensions is 0")
            if full or depthwise or pool:
                need(kernel_h and kernel_w and stride_h and stride_w, "its kernel or stride is 0")
                for size, out, kernel, stride, pad in (
                    (in_h, out_h, kernel_h, stride_h, top),
                    (in_w, out_w, kernel_w, stride_w, left),
                ):
                    last = (out - 1) * stride - pad
                    need(pad < kernel and last < size, "its kernel leaves the image")
                    area *= kernel
                    meet *= min(out, (kernel + stride - 1) // stride)
                    # None has fewer inside than the first or the last.
                    begin = max(last, 0)
                    least *= min(kernel - pad, size, last + kernel - begin, size - begin)
            else:
                need(not any(fields[18:22]), "it has a kernel and no use for one")
                need(op in (_OP_PAD, _OP_CROP) or not (top or left), "it has padding and no use for any")
        need(not depthwise or n % k == 0, "%d channels out of %d" % (n, k))
        need(not pool or k == n, "it changes the number of channels")
        taps = area * k if full else area
        row = (taps + 3) // 4 * 4 if full else taps
        x, y = cells * k, places * n
        scales = 1 if flags & _FLAG_ONE_SCALE else n
        bits = x if op == _OP_RELU_BACK and not flags & _FLAG_BITS else (x + 7) // 8
        multipliers = scales * 2 if rounding == _ROUND_AWAY else scales
        numbers = {b"X": x, b"N": n, b"W": n * taps, b"F": n * row, b"E": extra, b"S": scales, b"M": multipliers}
        numbers[b"B"], numbers[b"V"] = bits, 256
        work = max(x, y * (taps + 3))
        scratch = peak = 0  # peak: the largest sum
        most = _NARROW_MAX if flags & _FLAG_NARROW_OUT else _MANTISSA_MAX
        alike = (flags & _FLAG_NARROW_OUT) * 2 == flags & _FLAG_NARROW_IN
        same = fields[12:15] == fields[15:18]
        point = kernel_h * kernel_w * stride_h * stride_w == 1 and not (top or left)
        point = point and (in_h, in_w) == (out_h, out_w)
        inherits = ()
        if op in (_OP_SOFTMAX_CE, _OP_MSE, _OP_HINGE):
            # The other two are numbered alike.
            loss = _LOSS_HINGE if op == _OP_HINGE else op - _OP_SOFTMAX_CE + _LOSS_SOFTMAX_CE
            need(self.loss == loss, "it is not the plan's loss")
            need(n <= _CLASSES_MAX and n == self.output_bytes, "%d outputs" % n)
            need(op != _OP_HINGE or (n > 1 and 0 < extra < 65536), "%d outputs, margin %d" % (n, extra))
        elif op == _OP_RELU:
            inherits = (0,)
        elif b"T" in _OPERANDS[op]:
            need(extra <= n and (full or extra in (0, n)), "%d trained channels of %d" % (extra, n))
            numbers[b"F"], numbers[b"T"] = (n - extra) * row, extra * taps
            peak = most * meet * (128 * (n - extra) + largest * extra)
            if not image:
                scratch = 2 * n
            elif full:
                scratch = 16 * (n + k)
                work += cells * area * n
                if alike and point and k <= n:
                    inherits = (0,)
            else:
                peak //= k
                # A plane of sums with its margin, and one of gradients, with that margin where both strides are 1.
                high, wide = (out_h - 1) * stride_h + kernel_h, (out_w - 1) * stride_w + kernel_w
                pitch = wide if stride_h * stride_w == 1 else out_w
                scratch = 4 * (high * wide + (out_h - 1) * pitch + out_w)
                work += high * wide * area * n
                if alike and same and stride_h * stride_w == 1:
                    inherits = (0,)
        elif update:
            whole, band = extra & 0xFFFF, extra >> 16
            first = 0
            peak = most * places
            if op == _OP_UPDATE_BIAS:
                first = k
            else:
                peak *= 255
            need(1024 <= mantissa <= 2047, "scale mantissa %d" % mantissa)
            need(first + n <= whole and (n == whole or not depthwise), "%d of %d channels" % (n, whole))
            if op == _OP_UPDATE_CONV:
                scratch = 16 * (band * out_w if band == out_h else band * out_w + taps)
            need(0 < band <= out_h if scratch else not band, "%d rows at a time" % band)
            y = places * whole
        elif op == _OP_CONV:
            whole = mantissa or n
            chunk, block = extra & 0xFFFF, extra >> 16
            peak = taps << 15
            need(0 < chunk <= row and chunk % 4 == 0 and 0 < block <= n, "%d and %d at a time" % (chunk, block))
            need(block == n or chunk == row, "it cuts both taps and channels")
            need(n <= whole, "%d of %d channels" % (n, whole))
            scratch = (1 if places == 1 else 2) * (2 * chunk + 4 * block)
            # The kernel's rows are walked anew for every chunk.
            work += places * kernel_h * (row // chunk + 1)
            y = (places - 1) * whole + n
            if n == whole and (places == 1 or (point and n <= k)):
                inherits = (0,)
        elif op == _OP_DEPTHWISE:
            need(extra >= 2 and extra % 2 == 0 and extra < 65536, "%d rows at a time" % extra)
            lines = (extra // 2 - 1) * stride_h + max(kernel_h, stride_h)
            width = (out_w - 1) * stride_w + kernel_w
            scratch = 4 * (lines * width + extra * out_w + taps)
            need(not mantissa, "parameters that it does not have are set")
            # Every channel gathers its bands.
            work += n * (out_h // extra + 1) * 2 * lines * width
            if same and extra >= out_h:
                inherits = (0,)
        elif full or depthwise:
            # the ones whose weights are trained
            peak = 2 * taps * 255 * largest
            if op == _OP_CONV_TRAINED:
                need(0 < extra <= taps and n <= mantissa, "%d taps at a time, %d channels" % (extra, mantissa))
                scratch = 16 * (extra if extra == taps else extra + n)
                work += places * area * (taps // extra + 1)
                y = places * mantissa
            elif image:
                need(not (extra or mantissa), "parameters that it does not have are set")
        elif unpool:
            need(extra <= (30 if op == _OP_AVERAGE_BACK else 0) and mantissa <= 30, "shifts %d, %d" % (extra, mantissa))
            peak = most * meet * ((1 << extra) // least + 1)
            # Every cell looks through the windows that hold it, for the largest cell by cell.
            work += x * meet * (1 if op == _OP_AVERAGE_BACK else area)
        elif op == _OP_MEAN:
            need((out_h, out_w, n) == (1, 1, k), "its output is no vector of channels")
            peak = cells << 9
        elif op == _OP_PAD:
            need(top + in_h <= out_h and left + in_w <= out_w and extra + k <= n, "its input does not fit")
        elif op == _OP_COPY:
            need(in_h == out_h and extra + in_w * k <= out_w * n, "its input does not fit")
        elif op == _OP_CROP:
            end = ((in_h - 1 + top) * out_w + in_w - 1 + left) * n + extra + k
            need(end <= y, "its output does not fit")
        elif not pool:
            need(same, "its input and output differ in shape")
            inherits = (0,)
            if op == _OP_SOFTMAX:
                need(k < _CLASSES_MAX and 0 < extra <= 256, "%d classes, %d exponentials" % (k, extra))
            elif op in (_OP_ADD, _OP_MUL, _OP_SCALE_BACK):
                need(extra > 0 and x % extra == 0, "%d numbers do not repeat evenly" % extra)
                if op != _OP_SCALE_BACK and extra == x:
                    inherits = (0, 2)
                scratch = 4 * _ADD_BLOCK if op == _OP_ADD else 0
            elif op != _OP_TABLE:
                need(extra == 0, "parameters that it does not have are set")
                inherits = (0, 4) if op == _OP_SUM else (0,) if op == _OP_RELU_BACK else ()
        widens = op == _OP_CROP and not flags & _FLAG_NARROW_IN
        need(alike or widens or op < _OP_SCALE_BACK, "its gradients are not alike")
        need(peak <= 1 << 31, "its sums could overflow the accumulator")
        need(self.sizes[_BUF_SCRATCH] >= scratch, "it needs %d bytes of scratch" % scratch)
        self.products += work
        need(self.products <= _PRODUCTS_MAX, "the program is too much work")
        numbers[b"Y"] = y
        return numbers, inherits

    def check_overlap(self, inherits):
        # What a record writes lies apart from all that it reads, or takes the whole place of what it may replace.
        for start, end, written, _ in self.spans:
            for other, other_end, other_written, index in self.spans:
                if written and not other_written and start < other_end and other < end:
                    self.need(index in inherits and start == other, "it writes over what it reads")

    def check_use(self, index, operand, unit, step, count, written, fraction):
        # step: bytes of an element; written: 1 to the arena, 2 to what is trainable
        if unit == b"t":
            self.need(operand == _BUF_TARGET << 28, "its target does not lie in the target buffer")
            return
        buf, size = operand >> 28, step * count
        align = step
        if unit == b"g":
            self.need(buf == _BUF_ARENA and count > 0, "a gradient must lie in the arena")
            align = 2
            size += _GRADIENT_HEADER
        elif unit == b"a":
            align = 4
        self.check_operand(operand, align, size)
        self.need(unit not in b"af" or buf == _BUF_FROZEN, "its weights are not frozen")
        self.spans.append((operand, operand + size, written, index))
        self.need(written != 1 or buf == _BUF_ARENA, "it writes outside the arena")
        self.need(written != 2 or buf == _BUF_TRAIN, "it updates what is not trainable")
        if buf == _BUF_TRAIN:
            entry = self.trainable.get(operand & 0x0FFFFFFF)
            dtype = _DTYPE_INT32 if step == 4 else step  # 1 and 2 are numbered as they are wide
            wanted = (dtype, fraction if unit == b"w" else 0, count)
            self.need(entry == wanted, "it does not match a trainable tensor")


def verify(plan, sections):
    # sections: IO, TENSORS, CUTS, bytes of FROZEN, TRAIN, STATE. Raises ValueError naming the plan, the place and the
    # fault. Returns what each record of each program needs of FROZEN: from, to, from, to, ...
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
    v.need(len(kinds) <= 256, "more than 255 training programs")
    v.check_cuts(plan.programs)
    return v.windows
