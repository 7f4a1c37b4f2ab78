"""How much SCRATCH a kernel is given, and how it cuts its work to fit (CONV and DEPTHWISE in ul_format.h)."""

from __future__ import annotations

from ulearn_host.network import Conv, Dense, Depthwise, Tensor

BUDGET = 1024
_LEAST_CHUNK = 64


def conv(op: Conv | Dense) -> tuple[int, int]:
    """(extra, bytes): all taps of a position at a time where they fit with the sums of a few channels; else the sums of
    all channels with as many taps as fit beside them, and never fewer than 64."""
    taps = op.weights[0].size
    row, channels = -(-taps // 4) * 4, len(op.weights)
    positions = 1 if op.output.shape[:2] == (1, 1) else 2
    left = BUDGET // positions - 2 * row
    if left >= 4 * min(channels, 8):
        chunk, block = row, min(channels, left // 4)
    else:
        chunk, block = max(_LEAST_CHUNK, (BUDGET // positions - 4 * channels) // 8 * 4), channels
        chunk = min(chunk, row)
    return chunk | block << 16, positions * (2 * chunk + 4 * block)


def depthwise(op: Depthwise) -> tuple[int, int]:
    """(extra, bytes): as many output rows at a time as fit, an even number, at least two."""
    rows = op.output.shape[0] + op.output.shape[0] % 2
    while rows > 2 and _band(op, rows) > BUDGET:
        rows -= 2
    return max(rows, 2), _band(op, max(rows, 2))


def trained(taps: int, channels: int) -> tuple[int, int]:
    """(extra, bytes) of CONV_TRAINED: all taps of four positions at a time where they fit, else as many as fit beside
    the sums of all channels, and never fewer than 64."""
    if 16 * taps <= 2 * BUDGET:
        return taps, 16 * taps
    chunk = min(taps, max(_LEAST_CHUNK, (2 * BUDGET - 16 * channels) // 16))
    return chunk, 16 * chunk + (16 * channels if chunk < taps else 0)


def update(output: Tensor, taps: int) -> tuple[int, int]:
    """(rows of the output at a time, bytes) of UPDATE_CONV: all of them where they fit, else as many as fit beside the
    sums of four channels' weights."""
    height, width, _ = output.shape
    if 16 * height * width <= 2 * BUDGET:
        return height, 16 * height * width
    band = max(1, min(height, (2 * BUDGET - 16 * taps) // (16 * width)))
    if 16 * height * width <= 16 * (band * width + taps):
        band = height
    return band, 16 * band * width + (16 * taps if band < height else 0)


def conv_back(op: Conv | Dense) -> int:
    """Bytes of CONV_BACK: four positions' gradients and the sums of all inputs."""
    return 16 * len(op.weights) + 16 * int(op.weights.shape[-1])


def depthwise_back(op: Depthwise) -> int:
    """Bytes of DEPTHWISE_BACK: the sums of one input channel with a margin, the gradient of one output channel."""
    (out_h, out_w, _), window = op.output.shape, op.window
    height = (out_h - 1) * window.stride[0] + window.kernel[0]
    width = (out_w - 1) * window.stride[1] + window.kernel[1]
    pitch = width if window.stride == (1, 1) else out_w
    return 4 * height * width + 4 * ((out_h - 1) * pitch + out_w)


def _band(op: Depthwise, rows: int) -> int:
    (kernel_h, kernel_w), (stride_h, stride_w) = op.window.kernel, op.window.stride
    width = (op.output.shape[1] - 1) * stride_w + kernel_w
    lines = (rows // 2 - 1) * stride_h + max(kernel_h, stride_h)
    return 4 * lines * width + 4 * rows * op.output.shape[1] + 4 * kernel_h * kernel_w
