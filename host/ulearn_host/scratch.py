"""How much SCRATCH a kernel is given, and how it cuts its work to fit (CONV and DEPTHWISE in ul_format.h)."""

from __future__ import annotations

from ulearn_host.network import Conv, Dense, Depthwise

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


def _band(op: Depthwise, rows: int) -> int:
    (kernel_h, kernel_w), (stride_h, stride_w) = op.window.kernel, op.window.stride
    width = (op.output.shape[1] - 1) * stride_w + kernel_w
    lines = (rows // 2 - 1) * stride_h + max(kernel_h, stride_h)
    return 4 * lines * width + 4 * rows * op.output.shape[1] + 4 * kernel_h * kernel_w
