// The plan format, version 1, and the arithmetic of its records.
//
// This header is the one definition of every number that a plan (.ulm) is made of. The Python side is generated
// from its #define lines (python -m ulearn_host.layout: host/ulearn_host/numbers.py, and const() lines on the device), so
// a line here is `#define UL_NAME number` and nothing cleverer. Everything is little-endian; every offset is in bytes.
//
// FILE     header, then sections in ascending order of file offset, until the header's length is reached.
// SECTION  u16 type, u16 flags (bit 0: a reader must understand it), u32 length, value, zeros up to a multiple of 8.
// OPERAND  u32: buffer in the top 4 bits, offset in the lower 28. The value 0xFFFFFFFF means "none".
// GRADIENT a tensor of integer mantissas with one exponent: i16 exponent, u16 max|mantissa|, i16 mantissa[n].
//          real value = mantissa * 2^exponent; mantissas have 12 bits and stay within +-2047. In a NARROW one they are
//          i8 mantissa[n] and stay within +-127. A mantissa that is read is cut to its range first.
#ifndef UL_FORMAT_H
#define UL_FORMAT_H

// File header: 96 bytes. The hash is SHA-256 of the whole file with the fields hash and tag as zeros.
#define UL_MAGIC 0x504D4C75 // "uLMP"
#define UL_VERSION 1
#define UL_HEADER_BYTES 96
#define UL_H_VERSION 4   // u16
#define UL_H_FLAGS 6     // u16, no flag is defined yet
#define UL_H_LENGTH 8    // u32, of the whole file
#define UL_H_SECTIONS 12 // u16, how many; then u16 zero
#define UL_H_MODEL_ID 16 // 16 bytes
#define UL_H_HASH 32     // 32 bytes
#define UL_H_TAG 64      // 32 bytes, an authentication tag; zeros: none
#define UL_ID_BYTES 16

#define UL_SECTION_REQUIRED 1
#define UL_SECTION_IO 1      // the input, the output, the loss
#define UL_SECTION_TENSORS 2 // the trainable tensors
#define UL_SECTION_PROGRAM 3 // one per program
#define UL_SECTION_CUTS 4
#define UL_SECTION_FROZEN 5
#define UL_SECTION_TRAIN 6  // the trainable blob as imported, canonical order
#define UL_SECTION_STATE 7  // the first STATE
#define UL_SECTION_SCALES 8 // f32 per channel of each trainable tensor; not read on a board unless asked for
#define UL_SECTION_META 9   // JSON: labels, provenance, scheme, names

// Section IO: 40 bytes.
#define UL_IO_BYTES 40
#define UL_IO_IN_SHAPE 0    // u16[4], NHWC without N: h, w, c, then 0
#define UL_IO_IN_SCALE 8    // f32
#define UL_IO_IN_ZERO 12    // i32
#define UL_IO_OUT_SHAPE 16  // u16[4]
#define UL_IO_OUT_SCALE 24  // f32
#define UL_IO_OUT_ZERO 28   // i32
#define UL_IO_LOSS 32       // u16: UL_LOSS_*; then u16 zero
#define UL_IO_LOSS_SCALE 36 // f32: real loss = loss in STATE * this
#define UL_LOSS_NONE 0
#define UL_LOSS_SOFTMAX_CE 1
#define UL_LOSS_MSE 2
#define UL_LOSS_HINGE 3

// Section TENSORS: entries of 32 bytes.
#define UL_TENSOR_BYTES 32
#define UL_T_ID 0       // u16
#define UL_T_DTYPE 2    // u8: UL_DTYPE_*
#define UL_T_FRACTION 3 // u8, fraction bits
#define UL_T_FLAGS 4    // u16: UL_TENSOR_*
#define UL_T_CAPACITY 6 // u16, channels there is room for
#define UL_T_ACTIVE 8   // u16, channels in use; equal to the capacity in version 1; then u16 zero
#define UL_T_SHAPE 12   // u16[4], OHWI
#define UL_T_OFFSET 20  // u32, in TRAIN
#define UL_T_SCALES 24  // u32, in SCALES: f32[capacity]; then u32 zero
#define UL_DTYPE_INT8 1
#define UL_DTYPE_INT16 2
#define UL_DTYPE_INT32 3
#define UL_DTYPE_UINT8 4 // of a record only: an int8 weight + 128
#define UL_TENSOR_SHARED 1
#define UL_TENSOR_PERSONAL 2 // refused in version 1
#define UL_TENSOR_RESIDUAL 4 // refused in version 1

// Section CUTS: entries of 48 bytes. Running the records [0, record) leaves the features at the operand.
#define UL_CUT_BYTES 48
#define UL_C_NAME 0     // char[16]
#define UL_C_PROGRAM 16 // u16, index among the PROGRAM sections
#define UL_C_RECORD 18  // u16
#define UL_C_OPERAND 20 // u32
#define UL_C_LENGTH 24  // u32, bytes of features
#define UL_C_SHAPE 28   // u16[4]
#define UL_C_SCALE 36   // f32
#define UL_C_ZERO 40    // i32; then u32 zero

// Section PROGRAM: header of 64 bytes, then records. `sizes` is what each buffer must hold at least.
#define UL_PROGRAM_BYTES 64
#define UL_P_NAME 0          // char[16]
#define UL_P_SIZES 16        // u32[7], by buffer
#define UL_P_OUTPUT 44       // operand of the network's output
#define UL_P_OUTPUT_BYTES 48 // u32
#define UL_P_RECORDS 52      // u16, how many
#define UL_P_KIND 54         // u8: UL_KIND_*
#define UL_P_FLAGS 55        // u8, no flag is defined yet; then 8 bytes zero
#define UL_KIND_FORWARD 1
#define UL_KIND_TRAIN 2

// Buffers. INPUT, FROZEN and TARGET are only read. ARENA, FROZEN, TRAIN, STATE and SCRATCH start at a multiple of 4.
#define UL_BUF_INPUT 0
#define UL_BUF_ARENA 1
#define UL_BUF_TARGET 2 // u16 label, or int8 vector in the output's quantisation
#define UL_BUF_TRAIN 3
#define UL_BUF_STATE 4
#define UL_BUF_SCRATCH 5 // what a kernel needs for itself; nothing in it outlives a record
// Not 2: 0x20000000 and on are the addresses of RAM on an ARM, and a board's collector would take operands for pointers.
#define UL_BUF_FROZEN 6
#define UL_BUFFERS 7
#define UL_OPERAND_NONE 0xFFFFFFFF

// STATE: a block of 48 bytes, then gains, gates, active sizes, zeros up to a multiple of 4.
#define UL_STATE_BYTES 48
#define UL_S_RNG 0        // u32, xorshift32, never 0
#define UL_S_STEP 4       // u32, steps taken
#define UL_S_LR_MANT 8    // u16: 0 or 1024..2047
#define UL_S_LR_EXP 10    // i16: learning rate = mantissa * 2^exponent
#define UL_S_SATURATED 12 // u32, gradient mantissas that were cut off
#define UL_S_CLIPPED 16   // u32, weights and biases that hit the end of their range
#define UL_S_SKIPPED 20   // u32, steps whose backward pass was skipped
#define UL_S_LOSS 24      // i32, of the last step: softmax: 1024 * nats; mse: sum of squared differences
#define UL_S_SKIP_BELOW 28 // u16: skip the backward pass when 65536 * max|p - y| is below this
#define UL_S_FLAGS 30      // u16: bit 0, the loss found nothing to learn: backward records do nothing
#define UL_S_N_GAINS 32    // u16
#define UL_S_N_GATES 34    // u16
#define UL_S_N_ACTIVE 36   // u16
#define UL_S_GATES 38      // u16, offset of the first gate in STATE
#define UL_S_FIT_START 40  // u32, the step count at which the fit in hand began; kernels do not read what follows
#define UL_S_FIT_EPOCHS 44 // u16, its epochs; 0: none is in hand
#define UL_S_FIT_SEED 46   // u16, of its order of samples
#define UL_STATE_NOTHING_TO_LEARN 1
// A gain is i8 gain, u8 seen: while seen < 16 the kernel looks at the accumulators first and learns the gain.
#define UL_GAIN_BYTES 2
#define UL_GAIN_SAMPLES 16

// Record: 64 bytes, read in place.
#define UL_RECORD_BYTES 64
#define UL_R_OP 0         // u8: UL_OP_*
#define UL_R_MODE 1       // u8: UL_MODE_*
#define UL_R_FLAGS 2      // u8: UL_FLAG_*
#define UL_R_ROUNDING 3   // u8: UL_ROUND_*
#define UL_R_GATE 4       // u16, offset of a gate (u8) in STATE; 0: none
#define UL_R_GAIN 6       // u16, offset of a gain in STATE; 0: none
#define UL_R_OPERANDS 8   // u32[6]
#define UL_R_IN_H 32      // u16 in_h, in_w, in_c, out_h, out_w, out_c
#define UL_R_IN_W 34
#define UL_R_IN_C 36
#define UL_R_OUT_H 38
#define UL_R_OUT_W 40
#define UL_R_OUT_C 42
#define UL_R_KERNEL_H 44  // u8 kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left
#define UL_R_ZERO_IN 50   // i8
#define UL_R_ZERO_OUT 51  // i8
#define UL_R_ACT_MIN 52   // i8
#define UL_R_ACT_MAX 53   // i8
#define UL_R_W_DTYPE 54   // u8: UL_DTYPE_INT8, UL_DTYPE_INT16 or UL_DTYPE_UINT8
#define UL_R_FRACTION 55  // u8, fraction bits f of int16 weights, 0..7, plus FINER * z: z of them, 0..f, stay in forward sums
#define UL_FINER 16
#define UL_R_SCALE_MANT 56 // u16
#define UL_R_SCALE_EXP 58  // i16
#define UL_R_EXTRA 60      // u32
#define UL_OPERANDS 6

#define UL_MODE_APPLY 0
#define UL_MODE_ACCUMULATE 1 // refused in version 1
#define UL_MODE_SCORE 2      // refused in version 1

#define UL_FLAG_BITS 1        // RELU_BACK: operand 4 holds bits, as MASK leaves them
#define UL_FLAG_GATE_DEEPER 2 // run when the gate or any gate after it is on
#define UL_FLAG_FULL_RANGE 4  // CONV and DEPTHWISE: a weight is -128, so two products do not fit into 16 bits
#define UL_FLAG_ONE_SCALE 8   // where there are multipliers: i32[1] (with AWAY i32[2]) and shift i8[1] serve all channels
#define UL_FLAG_NARROW_OUT 16 // the gradient at operand 0 is narrow
#define UL_FLAG_NARROW_IN 32  // the gradient at operand 1 is narrow
#define UL_FLAG_AGAIN 64      // of forward records in a training program: computes again what the backward pass needs, as part of it

// Roundings. In all of them shift is first cut to -31..30, and the result saturates to 32 bits.
#define UL_ROUND_NONE 0 // of records that scale nothing
#define UL_ROUND_SINGLE 1 // floor((acc * multiplier + 2^(30 - shift)) / 2^(31 - shift)), one 64-bit rounding
// gemmlowp's two roundings. left = max(shift, 0), right = max(-shift, 0); a = acc * 2^left (mod 2^32, as signed);
// h = floor((a * multiplier + 2^30) / 2^31), saturated to 32 bits; then h / 2^right, halves away from zero.
#define UL_ROUND_DOUBLE 2
// One rounding, halves away from zero, of a finer multiplier: i32[2N], N upper parts, then N lower ones (mod 2^16).
// a = |acc|, at most 2^31 - 1; P = a * upper + floor(a * lower / 2^16);
// sign(acc) * floor((P + 2^(30 - shift)) / 2^(31 - shift)), its size at most 2^31 - 1.
#define UL_ROUND_AWAY 3

// The records. K = in_c, N = out_c. wq(w) is w itself for int8 weights and (w + 2^(f-1)) >> f for int16 with f
// fraction bits. In forward sums of int16 weights z of these bits stay, so that a step below one unit of int8 is
// seen at the output: wz(w) = (w + 2^(f-z-1)) >> (f - z), and coarse(sum) = floor(sum / 2^z + 1/2); 2^-1 stands for 0. Before
// the first step, when the bits are 0, that is what wq gives. For int8 weights z = 0, wz = wq.
// rshift(p, s) = floor(p / 2^s + 1/2), cut to +-2^30; 0 for s > 62. bitlen(0) = 0. A gradient's top is 2047,
// or 127 where it is narrow, its bits 11 or 7.
//
// DENSE: 0 x int8[K], 1 y int8[N], 2 weights [N][K], 3 bias i32[N], 4 multiplier i32[N], 5 shift i8[N]; SINGLE or AWAY
//   acc = bias[n] + coarse(sum_k (x[k] - zero_in) * wz(w[n][k]))                             (mod 2^32)
//   y[n] = clamp(round(acc, multiplier[n], shift[n]) + zero_out, act_min, act_max); shift is cut to -31..30 and
//   the rounded value saturates to 32 bits.
//   ONE_SCALE may be set.
#define UL_OP_DENSE 1
// RELU: 0 x int8[K], 1 y int8[K]. y = clamp(x, act_min, act_max). x and y may be the same.
#define UL_OP_RELU 2
// SOFTMAX_CE: 0 logits int8[N], 1 gradient[N], 2 exponential table u16[extra], 3 label u16
//   e[n] = table[max(logits) - logits[n]], 0 beyond the table; S = sum e
//   d[n] = e[n] - S for the label, 0 where its logit is 127; else e[n], 0 where the logit is -128: a logit at the end of
//   its range can go no further, and to push it there would only part the weights from what they show.
//   j = smallest with max|d| * 2^j >= S; k = j + 10
//   mantissa[n] = sign(d[n]) * min(2047, floor(|d[n]| * 2^k / S + 1/2)); exponent = -k
//   loss = ((log2q(S) - log2q(max(1, e[label]))) * 710 + 512) >> 10, where log2q(v) is
//   1024 * log2(v) cut off: n = bitlen(v) - 1, x = floor(v * 2^15 / 2^n); ten times: x = floor(x^2 / 2^15), and
//   the next bit of the result is x >= 2^16, after which such an x is halved.
//   Nothing to learn: max|d| = 0 (then all mantissas and the exponent are 0), or floor(max|d| * 65536 / S) < skip_below.
//   S = 0: the step is refused (UL_E_DATA). Takes the step counter on by one, as every loss does.
#define UL_OP_SOFTMAX_CE 3
// MSE: 0 output int8[N], 1 gradient[N], 2 none, 3 target int8[N]
//   d[n] = output[n] - target[n]; j = 11 - bitlen(max|d|); mantissa[n] = d[n] * 2^j; exponent = -j (0 where all d are
//   0); loss = sum of d[n]^2. Nothing to learn: all d are 0; skip_below has no say.
//   The factor 2 * scale / N of the mean's derivative is part of the update records' scale.
#define UL_OP_MSE 4
// HINGE: 0 logits int8[N], 1 gradient[N], 3 label u16; N >= 2
//   r = the first class but the label with the largest logit; v = logits[r] - logits[label] + extra, extra the margin
//   v > 0: mantissa[r] = 1024, mantissa[label] = -1024, all others 0, exponent -10; loss = v
//   else all mantissas and the exponent 0, loss = 0, nothing to learn. skip_below has no say.
#define UL_OP_HINGE 8
// DENSE_BACK: the gradient at a dense layer's input. Of the layer's N rows of weights the last T are trained.
//   0 gradient_out[N], 1 gradient_in[K], 2 the first N - T rows u8[N - T][R], a weight its byte - 128, R = K rounded up to a
//   multiple of 4 (none if T = N), 3 channel scales u16[N], 5 the last T rows [T][K], w_dtype INT8 or INT16 (none if T = 0);
//   T = extra. SCRATCH: i16[N] from offset 0. A channel's weight scale is its table entry * 2^(scale_exp - 16).
//   Comes before the UPDATE_WEIGHT of the same layer: the gradient passes through the weights of the forward pass.
//   g[n] = (mantissa_out[n] * channel_scale[n] + 32768) >> 16; b = bitlen(max|g|)
//   acc[k] = sum_n g[n] * wq(w[n][k]); a = bitlen(max|acc|)
//   where a > 0 and the gain has seen < 16: gain = a - b if seen == 0 else max(gain, a - b); seen += 1
//   s = clamp(b + gain + 1 - bits_in, 0, 30)                     (gain itself is cut to -31..31)
//   mantissa_in[k] = clamp(rshift(acc[k], s), -top_in, top_in), cut-offs counted as saturated
//   exponent_in = clamp(exponent_out + scale_exp + s, -8192, 8192); all zero (exponent 0) when max|g| = 0.
//   Where all acc are 0 the mantissas are 0 and the exponent follows the rule.
#define UL_OP_DENSE_BACK 5
// UPDATE_WEIGHT: 0 gradient_out[M], 1 x int8[K], 2 weights [N][K] in TRAIN, 3 table u16[N]; M = extra & 65535
//   The rows belong to the last N of M channels: mantissa[n] is the gradient's M - N + n-th.
//   One table entry is the reciprocal of the channel's weight scale: (1024 + (t & 1023)) * 2^(t >> 10).
//   mul11(a, b): p = a * b; p >= 2^21: ((p + 1024) >> 11, 11) else ((p + 512) >> 10, 10); 2048 becomes 1024 with
//   one more in the exponent; 0 stays (0, 0).
//   (l, i) = mul11(scale_mant, lr_mant); (m, j) = mul11(l, 1024 + (t & 1023))
//   s = -(exponent_out + scale_exp + lr_exp + i + j + (t >> 10))
//   acc[n][k] = mantissa[n] * (x[k] - zero_in); p = acc[n][k] * m, exactly; rows with mantissa 0 are passed over
//   int16 weights: w -= rshift(p, s), saturated to +-32767
//   int8 weights, stochastic rounding: the record takes the generator one xorshift32 (13, 17, 5) on, once, and the i-th
//   weight of the tensor, i = n * K + k, draws r = mix(generator + i * 2654435769 mod 2^32), where mix(v) is, mod 2^32:
//   v ^= v >> 16; v *= 0x7FEB352D; v ^= v >> 15; v *= 0x846CA68B; v ^= v >> 16
//   s > 30: p = floor(p / 2^min(s - 30, 62)), s = 30; s in 1..30: w -= floor((p + (r >> (32 - s))) / 2^s), what is taken
//   off cut to +-2^30; s <= 0: as rshift; saturated to +-127. Saturations are counted as clipped.
#define UL_OP_UPDATE_WEIGHT 6
// UPDATE_BIAS: 0 gradient_out[out_h][out_w][M], 2 bias i32[N] in TRAIN, 3 table u16[N]; M = extra & 65535
//   The biases belong to the channels from in_c on: acc[n] = sum over out_h, out_w of mantissa[..][in_c + n]
//   for acc[n] != 0: p = acc[n] * m, exactly; b = b - rshift(p, s), b cut to +-(2^30 - 1) before and after; cut-offs
//   after count as clipped. m and s as in UPDATE_WEIGHT.
#define UL_OP_UPDATE_BIAS 7


// Operators of imported networks. x[i][j][c] with c fastest; "inside" means 0 <= i < in_h and 0 <= j < in_w.
//
// CONV: 0 x int8[in_h][in_w][in_c], 1 y int8[out_h][out_w][N], 2 weights u8[N][R], 3 bias i32[N],
//   4 multiplier i32[N], 5 shift i8[N]; N = out_c, K = kernel_h * kernel_w * in_c, R = K rounded up to a multiple of 4.
//   A weight is its byte - 128 (w_dtype UINT8); bytes behind the K-th of a row have no say. Where one is 0, FULL_RANGE is set.
//   Operand 3 is the network's bias less what the input's zero point contributes: - zero_in * (sum of the row's weights).
//   acc = bias[n] + sum over the kernel of x[i][j][c] * w[n][ki][kj][c]                     (mod 2^32)
//   at i = oi * stride_h - pad_top + ki, j = oj * stride_w - pad_left + kj; x is zero_in where not inside.
//   y = clamp(round(acc, multiplier[n], shift[n]) + zero_out, act_min, act_max), with any of the roundings; the sum with
//   zero_out does not wrap. A fully connected layer has in_h = out_h = 1, in_w = out_w rows, kernel and stride 1.
//   SCRATCH: P positions at a time, 1 where the output has one, else 2; extra = chunk | block << 16: inputs of `chunk`
//   taps (a multiple of 4, 4..R), sums of `block` channels (1..N; N where chunk < R): P * (2 * chunk + 4 * block) bytes.
//   y is y[out_h][out_w][M] of which the first N channels are written; M = scale_mant, or N where that is 0.
//   y may start where x starts when kernel and stride are 1, nothing is padded and N <= in_c, or out_h = out_w = 1; M = N.
//   The bias may be trainable: the weights are not, so what the zero point contributes stays.
#define UL_OP_CONV 16
// DEPTHWISE: as CONV with DOUBLE rounding; 2 weights int8[N][kernel_h][kernel_w], none is -128 without FULL_RANGE; channel
//   n reads the input channel n / m alone, N = m * in_c.
//   SCRATCH: extra = band, an even number of output rows at a time: 4 * A * B + 4 * band * out_w + 4 * kernel_h * kernel_w
//   bytes with A = (band / 2 - 1) * stride_h + max(kernel_h, stride_h), B = (out_w - 1) * stride_w + kernel_w.
//   y may start where x starts when both have the same shape and band >= out_h.
#define UL_OP_DEPTHWISE 17
// AVERAGE_POOL, MAX_POOL: 0 x int8[in_h][in_w][in_c], 1 y int8[out_h][out_w][in_c]; out_c = in_c; kernel, stride, padding
//   as in CONV, only cells inside count, and there is one at least. Average: S = their sum, n = their number;
//   y = clamp(S / n, act_min, act_max), halves away from zero. Max: y = clamp(the largest, act_min, act_max).
#define UL_OP_AVERAGE_POOL 18
#define UL_OP_MAX_POOL 19
// MEAN: 0 x int8[in_h][in_w][in_c], 1 y int8[in_c], 2 parameters i32[2]: multiplier, shift
//   y = clamp(round(sum over i, j of (x[i][j][c] - zero_in), multiplier, shift) + zero_out, act_min, act_max), DOUBLE.
#define UL_OP_MEAN 20
// ADD: 0 a int8[n], 1 y int8[n], 2 b int8[extra], 3 parameters i32[7]: zero_b, multiplier and shift of a, of b, of the sum
//   n = in_h * in_w * in_c; b repeats: b[i mod extra]; zero_b is cut to -128..127; DOUBLE rounding.
//   s = round((a[i] - zero_in) * 2^20, of a) + round((b - zero_b) * 2^20, of b)             (mod 2^32)
//   y = clamp(round(s, of the sum) + zero_out, act_min, act_max)
//   SCRATCH: 4 * ADD_BLOCK bytes. y may start where a starts, or where b starts if extra = n.
#define UL_OP_ADD 21
#define UL_ADD_BLOCK 64
// MUL: as ADD, without SCRATCH; parameters i32[3]: zero_b, multiplier, shift
//   y = clamp(round((a[i] - zero_in) * (b - zero_b), multiplier, shift) + zero_out, act_min, act_max)
#define UL_OP_MUL 22
// PAD: 0 x int8[in_h][in_w][in_c], 1 y int8[out_h][out_w][out_c]: x at row pad_top, column pad_left, channel extra of y,
//   where it fits in whole, and zero_in everywhere else.
#define UL_OP_PAD 23
// COPY: 0 x int8[in_h][in_w * in_c], 1 y int8[in_h][out_w * out_c]: each row of x to the bytes from extra on of y's row,
//   where it fits in whole; the rest of y stays.
#define UL_OP_COPY 24
// TABLE: 0 x int8[n], 1 y int8[n], 2 table int8[256]; n = in_h * in_w * in_c: y = table[x + 128]. In place if need be.
#define UL_OP_TABLE 25
// SOFTMAX: 0 x int8[in_h * in_w][in_c], 1 y int8 of the same shape, 2 table i32[extra] of exp, * 2^31; each row by itself.
//   high(a, b) = floor((a * b + 2^30) / 2^31), saturated; part(a, n) = a / 2^n, halves away from zero.
//   d[c] = max(row) - x[c]; where d[c] >= extra, y = -128, and it counts no further; e[c] = table[d[c]]
//   S = sum of part(e[c], 12), each rounded (mod 2^32, unsigned); z = leading zeros of S in 32 bits
//   All y of the row are -128 where S = 0 or z < 4. h = floor(S * 2^z / 2); r = 1515870810 + high(h, -1010580540);
//   three times r = r + saturate(4 * high(r, 2^29 - high(h, r))); r = saturate(2 * r)
//   y[c] = clamp(part(high(r, e[c]), 35 - z) - 128, -128, 127). 1 <= in_c < 8192; in place if need be.
#define UL_OP_SOFTMAX 26


// Operators of imported networks whose weights are trained. wz, coarse and the dtypes INT8 and INT16 as in DENSE.
//
// CONV_TRAINED: 0 x int8[in_h][in_w][in_c], 1 y int8[out_h][out_w][M], 2 weights [N][K], K = kernel_h * kernel_w * in_c,
//   3 bias i32[N], 4 multiplier i32[N], 5 shift i8[N]; roundings as CONV. The last N of M channels are written; M = scale_mant.
//   acc = bias[n] + coarse(sum over the kernel, inside, of (x[i][j][c] - zero_in) * wz(w[n][ki][kj][c]))     (mod 2^32)
//   y[..][M - N + n] = clamp(round(acc, multiplier[n], shift[n]) + zero_out, act_min, act_max)
//   SCRATCH: four positions at a time; extra = taps at a time, 1..K: 16 * extra bytes, and 16 * N where extra < K.
#define UL_OP_CONV_TRAINED 27
// DEPTHWISE_TRAINED: as CONV_TRAINED with 2 weights [N][kernel_h][kernel_w], DOUBLE rounding, M = N (scale_mant 0), extra 0;
//   channel n reads the input channel n / m alone, N = m * in_c. No SCRATCH.
#define UL_OP_DEPTHWISE_TRAINED 28
// MASK: 0 x int8[n], 1 bits u8[(n + 7) / 8], n = in_h * in_w * in_c: bit i mod 8 of byte i / 8 says x[i] != act_min; the bits
//   behind the n-th are 0. out_h, out_w, out_c as the input's.
#define UL_OP_MASK 29

// Gradients. "out" is the side of the loss, "in" the side of the network's input; dimensions are the operator's own.
//
// CONV_BACK: 0 gradient_out[out_h][out_w][N], 1 gradient_in[in_h][in_w][in_c], 2 the first N - T rows u8[N - T][R] as CONV has
//   them, 3 channel scales u16[N], 5 the last T rows [T][K] as CONV_TRAINED has them; T = extra; 2 is none if T = N, 5 if T = 0.
//   As DENSE_BACK, with the maxima over the whole tensors, g[p][n] of every position p, and
//   acc[i][j][c] = sum over all n, ki, kj, oi, oj with i = oi * stride_h - pad_top + ki, j = oj * stride_w - pad_left + kj
//   of g[oi][oj][n] * wq(w[n][ki][kj][c]).
//   SCRATCH: 16 * N + 16 * in_c bytes. gradient_in may start where gradient_out starts, both narrow or neither, when kernel
//   and stride are 1, nothing is padded and in_c <= N.
#define UL_OP_CONV_BACK 32
// DEPTHWISE_BACK: as CONV_BACK with 2 weights int8[N][kernel_h][kernel_w] (none if T = N), 5 trained ones (none if T = 0), T being
//   0 or N. Channel n belongs to the input channel n / m alone.
//   SCRATCH: 4 * H * W + 4 * ((out_h - 1) * G + out_w) bytes, H = (out_h - 1) * stride_h + kernel_h, W = (out_w - 1) * stride_w +
//   kernel_w, G = W if both strides are 1, else out_w. gradient_in may start where gradient_out starts, both narrow or neither, when stride is 1 and input and output have the same shape.
#define UL_OP_DEPTHWISE_BACK 33
// UPDATE_CONV: 0 gradient_out[out_h][out_w][M], 1 x int8[in_h][in_w][in_c], 2 weights [N][K] in TRAIN, 3 table u16[N]
//   M = extra & 65535; the last N of M channels. As UPDATE_WEIGHT with
//   acc[n][ki][kj][c] = sum over positions inside of mantissa[oi][oj][M - N + n] * (x[i][j][c] - zero_in);
//   rows whose mantissas are all 0 are passed over.
//   SCRATCH: band = extra >> 16, rows of the output at a time, 1..out_h: 16 * band * out_w bytes, and 16 * K where band < out_h.
#define UL_OP_UPDATE_CONV 34
// UPDATE_DEPTHWISE: as UPDATE_CONV with 2 weights [N][kernel_h][kernel_w], M = N, band 0, no SCRATCH; channel n sees the input
//   channel n / m alone.
#define UL_OP_UPDATE_DEPTHWISE 35
// AVERAGE_BACK: 0 gradient_out[out_h][out_w][N], 1 gradient_in[in_h][in_w][N]; kernel, stride, padding as in AVERAGE_POOL
//   r(n) = floor((2^extra + floor(n / 2)) / n), extra 0..30
//   acc[i][j][c] = sum over the windows that hold i, j of mantissa[..][c] * r(cells of the window inside)
//   mantissa_in = clamp(rshift(acc, scale_mant), -top_in, top_in), cut-offs counted as saturated, scale_mant 0..30;
//   exponent_in = clamp(exponent_out - extra + scale_mant, -8192, 8192)
#define UL_OP_AVERAGE_BACK 36
// MAX_BACK: 0 gradient_out[out_h][out_w][N], 1 gradient_in[in_h][in_w][N], 4 x int8[in_h][in_w][N]; as AVERAGE_BACK, extra 0, with
//   acc[i][j][c] = sum of mantissa[..][c] over the windows whose first largest x[..][c], row by row, is at i, j
#define UL_OP_MAX_BACK 37
// SCALE_BACK: 0 gradient_out[n], 1 gradient_in[n], 2 table i16[extra]; n = in_h * in_w * in_c = the output's
//   mantissa_in[i] = clamp(rshift(mantissa_out[i] * table[i mod extra], 11), -top_in, top_in), cut-offs counted as saturated;
//   exponent_in = clamp(exponent_out + scale_exp + 11, -8192, 8192). Both are narrow or neither; gradient_in may start where
//   gradient_out starts.
#define UL_OP_SCALE_BACK 38
// CROP: 0 gradient_out[out_h][out_w][N], 1 gradient_in[in_h][in_w][in_c], narrow only if gradient_out is
//   mantissa_in[i][j][c] = mantissa_out[((i + pad_top) * out_w + j + pad_left) * N + extra + c], all within the output; the
//   exponent stays. The output's height, width and channels may be cut otherwise than the input's: only the formula counts.
#define UL_OP_CROP 39
// SUM: 0 gradient a[n], 1 gradient_in[n], 4 gradient b[n], all narrow or none; n = in_h * in_w * in_c = the output's
//   max a = 0: b as it is; else max b = 0: a as it is (exponent and mantissas; max as the header of each says). Else
//   E = max(exponent a + bitlen(max a), exponent b + bitlen(max b)) + 1 - bits;
//   mantissa_in = clamp(rshift(a, clamp(E - exponent a, -15, 62)) + rshift(b, clamp(E - exponent b, -15, 62)), -top, top), cut-offs
//   counted as saturated; exponent_in = clamp(E, -8192, 8192). gradient_in may start where a starts, or where b starts.
#define UL_OP_SUM 40
// RELU_BACK: 0 gradient_out[n], 1 gradient_in[n], both narrow or neither, 4 x int8[n], or with BITS bits u8[(n + 7) / 8] of MASK;
//   n = in_h * in_w * in_c = the output's. mantissa_in = 0 where x = act_min or the bit is 0, else mantissa_out as it is
//   (uncut); exponent and max stay.
//   gradient_in may start where gradient_out starts.
#define UL_OP_RELU_BACK 41

#define UL_GRADIENT_HEADER 4
#define UL_MANTISSA_MAX 2047
#define UL_NARROW_MAX 127
#define UL_WEIGHT_MAX 32768 // of an int16 weight: wz lies within +-(this >> (f - z)), what bounds are computed with
#define UL_BIAS_MAX 1073741823
#define UL_CLASSES_MAX 8192
#define UL_RECORDS_MAX 1024
#define UL_PRODUCTS_MAX 1073741824 // and numbers gathered, in one program: a plan must come to an end

// What a run answers: the number of records done, or one of these.
#define UL_E_BUFFER -1    // a buffer is missing or smaller than the program needs
#define UL_E_ALIGNMENT -2 // a buffer does not start at a multiple of 4
#define UL_E_RECORD -3    // a record type that this core does not know
#define UL_E_RANGE -4     // first or count lie outside the program
#define UL_E_LABEL -5     // the label is not below the number of classes
#define UL_E_DATA -6      // a table makes the step impossible

#endif
