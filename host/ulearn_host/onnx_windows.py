"""How a kernel walks over an image, as ONNX says it."""

from __future__ import annotations

from ulearn_host.network import Window
from ulearn_host.onnx_file import Node

MAX_CELLS = 1 << 24  # numbers that the windows of an operator hold together
PLACES = "auto_pad dilations kernel_shape pads strides"


def pair(node: Node, name: str, values: list[int] | None, count: int, missing: int) -> tuple[int, int]:
    """An option for one or two axes as (height, width)."""
    if values is None:
        return (missing, missing)
    if len(values) != count:
        raise node.refuse(f"has {name} {values[:8]}, expected {count}; the file is damaged")
    return (missing, values[0]) if count == 1 else (values[0], values[1])


def window_of(
    node: Node, size: tuple[int, int], count: int, kernel: tuple[int, int]
) -> tuple[Window, tuple[int, int], tuple[int, int]]:
    """The window, the padding below and to the right as the file has it, and the output's (height, width)."""
    stride = pair(node, "strides", node.integers("strides"), count, 1)
    dilation = pair(node, "dilations", node.integers("dilations"), count, 1)
    if any(d != 1 and k > 1 for d, k in zip(dilation, kernel, strict=True)):
        raise node.refuse(
            f"has dilations {node.integers('dilations')}, which are not supported; use a stride or pooling"
        )
    if not all(1 <= v <= 65535 for v in (*stride, *kernel)):
        raise node.refuse(f"has strides {stride} and kernel {kernel}, expected 1 to 65535; the file is damaged")
    before, after = _padding(node, size, count, kernel, stride)
    ceil = node.integer("ceil_mode", 0)
    out = []
    for i in range(2):
        room = size[i] + before[i] + after[i] - kernel[i]
        n = (-(-room // stride[i]) if ceil else room // stride[i]) + 1
        if ceil and (n - 1) * stride[i] >= size[i] + before[i]:
            n -= 1  # a window that begins in the padding does not exist
        if n < 1 or before[i] >= kernel[i] or (n - 1) * stride[i] - before[i] >= size[i]:
            raise node.refuse(f"has windows of {kernel} that lie in the padding alone; the file is damaged")
        out.append(n)
    return Window(kernel, stride, before), after, (out[0], out[1])


def _padding(
    node: Node, size: tuple[int, int], count: int, kernel: tuple[int, int], stride: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding (above, left) and (below, right)."""
    auto = node.text("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(0, (-(-s // t) - 1) * t + k - s) for s, t, k in zip(size, stride, kernel, strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        begin, end = (less, more) if auto == "SAME_UPPER" else (more, less)
        return (begin[0], begin[1]), (end[0], end[1])
    pads = node.integers("pads") if auto == "NOTSET" else None
    if auto not in ("NOTSET", "VALID") or (pads is not None and (len(pads) != 2 * count or min(pads) < 0)):
        raise node.refuse(f"has auto_pad {auto} and pads {pads}; expected none or positive ones")
    pads = pads or [0] * (2 * count)
    return pair(node, "pads", pads[:count], count, 0), pair(node, "pads", pads[count:], count, 0)
