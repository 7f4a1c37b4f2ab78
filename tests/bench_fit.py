"""Measures records of many shapes on the emulated boards and fits host/ulearn_host/costs.json: make bench ARGS=--fit.

What a plan of one record takes beyond MicroPython's share is fitted, relative to its size, by non-negative least
squares over the counts of ulearn_host.costs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import bench_board
import bench_networks as make
from ulearn_host import costs

_SIGNIFICANT = 5


def operators() -> Iterator[bytes]:
    """Plans of one record each, over the shapes that small networks have."""
    for inputs, outputs in ((256, 64), (128, 128), (64, 12), (10, 5), (640, 32), (33, 9), (500, 20), (16, 100)):
        yield make.plan(make.dense(inputs, outputs))
    for shape, channels in (
        ((25, 5, 64), 64),
        ((8, 8, 16), 16),
        ((6, 7, 8), 4),
        ((5, 5, 3), 24),
        ((4, 4, 128), 32),
        ((16, 16, 4), 8),
        ((3, 3, 10), 7),
    ):
        yield make.plan(make.conv(shape, channels, (1, 1)))
    yield make.plan(make.dense(20, 6, rows=5))
    yield make.plan(make.conv((8, 8, 32), 16, (1, 1), 2))
    for shape, channels, kernel, stride, same in (
        ((16, 16, 8), 16, (3, 3), 1, True),
        ((32, 32, 3), 8, (3, 3), 1, True),
        ((8, 8, 64), 32, (3, 3), 1, True),
        ((49, 10, 1), 64, (10, 4), 2, True),
        ((16, 16, 16), 32, (3, 3), 2, True),
        ((7, 5, 3), 7, (3, 3), 1, False),
        ((9, 8, 1), 6, (5, 5), 2, True),
        ((12, 9, 6), 20, (5, 3), 1, True),
        ((6, 6, 24), 24, (5, 5), 1, True),
        ((10, 10, 2), 3, (2, 2), 1, True),
        ((8, 8, 4), 1, (3, 3), 2, True),
        ((1, 16, 3), 6, (1, 5), 2, True),
        ((4, 4, 8), 5, (3, 3), 1, True),
        ((6, 6, 12), 10, (3, 3), 1, False),
        ((11, 7, 5), 12, (2, 3), 1, True),
    ):
        yield make.plan(make.conv(shape, channels, kernel, stride, same))
    for shape, channels in (((5, 6, 4), 11), ((3, 3, 16), 8), ((4, 4, 1), 4), ((2, 8, 6), 20), ((3, 5, 3), 2)):
        yield make.plan(make.conv(shape, channels, shape[:2], 1, False))
    for shape, stride, multiplier, same in (
        ((16, 16, 8), 1, 1, True),
        ((25, 5, 64), 1, 1, True),
        ((25, 5, 64), 2, 1, True),
        ((7, 6, 3), 1, 2, True),
        ((8, 8, 12), 1, 1, False),
        ((5, 5, 5), 1, 1, True),
        ((12, 12, 4), 2, 1, True),
        ((3, 3, 20), 1, 1, True),
        ((10, 4, 1), 1, 8, True),
        ((11, 13, 6), 1, 1, True),
        ((9, 20, 2), 1, 1, True),
        ((11, 12, 9), 1, 1, True),
    ):
        yield make.plan(make.depthwise(shape, (3, 3), stride, multiplier, same))
    for shape, kernel, stride, multiplier in (
        ((9, 9, 4), (5, 5), 1, 1),
        ((5, 5, 16), (1, 1), 1, 1),
        ((6, 6, 8), (2, 2), 1, 1),
        ((9, 7, 4), (3, 5), 2, 2),
        ((9, 8, 1), (5, 5), 2, 8),
        ((12, 5, 6), (5, 1), 1, 1),
        ((8, 4, 10), (1, 3), 1, 1),
        ((3, 9, 5), (3, 3), 3, 1),
    ):
        yield make.plan(make.depthwise(shape, kernel, stride, multiplier))
    for op in (
        make.dense(64, 24),
        make.conv((6, 6, 8), 12, (1, 1)),
        make.conv((6, 6, 6), 8),
        make.conv((3, 3, 8), 20, (3, 3), 1, False),
        make.depthwise((8, 8, 6)),
        make.depthwise((6, 6, 6), (5, 5)),
    ):
        yield make.plan(make.full_range(op))
    for kind in ("average", "max"):
        for shape, kernel, stride, same in (
            ((25, 5, 32), (25, 5), 1, False),
            ((6, 8, 5), (2, 2), 2, False),
            ((7, 7, 4), (3, 3), 2, True),
            ((8, 8, 16), (2, 2), 1, False),
            ((8, 8, 2), (5, 5), 3, True),
            ((6, 9, 7), (1, 3), 1, True),
        ):
            yield make.plan(make.pool(shape, kernel, stride, kind, same))  # type: ignore[arg-type]
    for shape in ((25, 5, 64), (4, 4, 8), (1, 1, 32), (7, 7, 3)):
        yield make.plan(make.mean(shape))
    for shape, repeated in (
        ((16, 16, 16), False),
        ((4, 4, 4), False),
        ((5, 5, 13), False),
        ((8, 8, 16), True),
        ((5, 5, 3), True),
        ((10, 10, 12), True),
        ((7, 6, 1), True),
    ):
        yield make.plan(make.elementwise(shape, "add", repeated))
        yield make.plan(make.elementwise(shape, "mul", repeated))
    for shape, before, after in (
        ((8, 8, 8), (1, 1, 0), (1, 1, 0)),
        ((5, 6, 3), (0, 2, 1), (1, 0, 4)),
        ((12, 12, 1), (1, 1, 0), (0, 0, 0)),
        ((3, 3, 20), (1, 1, 0), (1, 1, 0)),
    ):
        yield make.plan(make.pad(shape, before, after))
    for shape, channels in (((8, 8, 8), 8), ((5, 6, 3), 4), ((12, 12, 1), 1), ((3, 3, 20), 20)):
        yield make.plan(make.concat(shape, channels))
    for shape in ((8, 8, 8), (1, 1, 10), (5, 7, 3)):
        yield make.plan(make.table(shape))
    for rows, classes in ((1, 10), (1, 12), (1, 100), (6, 4), (3, 30)):
        yield make.plan(make.softmax(rows, classes))
    for weights in ("int8", "int16"):
        for inputs, outputs in ((64, 10), (32, 32), (128, 5), (7, 20), (16, 2)):
            yield make.trained(inputs, outputs, weights)  # type: ignore[arg-type]


def records(data: bytes) -> list[costs.Record]:
    """The records of a plan's forward program."""
    return costs.records_of(bench_board.forward_program(data))


def non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |matrix @ x - wanted|, by Lawson and Hanson's active sets."""
    x = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], bool)
    for _ in range(10 * matrix.shape[1]):
        slope = matrix.T @ (wanted - matrix @ x)
        slope[free] = 0
        if slope.max() <= 1e-9 * np.abs(matrix.T @ wanted).max():
            break
        free[slope.argmax()] = True
        while True:
            best = np.zeros_like(x)
            best[free] = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
            if best[free].min() > 0:
                break
            down = free & (best <= 0)
            step = (x[down] / (x[down] - best[down])).min()
            x += step * (best - x)
            free &= x > 1e-12 * np.abs(x).max()
            x[~free] = 0
            if not free.any():
                break
        x = best
    return x


def fit(measured: list[tuple[bytes, int]], architecture: str) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Coefficients by kind, and by kind how far off the worst of its plans is (a share of what was measured)."""
    by_kind: dict[str, list[tuple[costs.Counts, int]]] = {}
    for data, instructions in measured:
        found = [costs.counts(r, architecture) for r in records(data)]
        together: costs.Counts = {}
        for _, of in found:
            for name, count in of.items():
                together[name] = together.get(name, 0) + count
        by_kind.setdefault(found[0][0], []).append((together, instructions))
    kinds, errors = {}, {}
    for kind, rows in sorted(by_kind.items()):
        names = list(dict.fromkeys(name for of, _ in rows for name in of))
        wanted = np.array([instructions for _, instructions in rows], float)
        matrix = np.array([[of.get(name, 0) for name in names] for of, _ in rows]) / wanted[:, None]
        # Columns of one size: counts of thousands stand beside counts of one.
        size = np.linalg.norm(matrix, axis=0)
        size[size == 0] = 1
        x = non_negative(matrix / size, np.ones(len(rows))) / size
        kinds[kind] = {name: float(f"{v:.{_SIGNIFICANT}g}") for name, v in zip(names, x, strict=True) if v > 0}
        errors[kind] = round(float(np.abs(matrix @ x - 1).max()), 4)
    return kinds, errors


def measure(architecture: str) -> dict[str, object]:
    """What costs.json says of an architecture."""
    plans = {str(i): data for i, data in enumerate(operators())}
    found = bench_board.on_board(architecture, plans)
    call = found["tiny"]
    assert call is not None
    pairs = [(data, c.records) for name, data in plans.items() if (c := found[name])]
    kinds, errors = fit(pairs, architecture)
    return {
        "board": bench_board.BOARDS[architecture],
        "plans": len(pairs),
        "call": call.instructions - call.records,
        "kinds": kinds,
        "worst_error": errors,
    }


def main() -> None:
    """Measure, fit and write costs.json."""
    with ThreadPoolExecutor() as pool:
        found = dict(zip(bench_board.BOARDS, pool.map(measure, bench_board.BOARDS), strict=True))
    what = "make bench ARGS=--fit: instructions of plans of one record on the emulated board, counted by QEMU"
    costs.COSTS.write_text(json.dumps({"measured_by": what, "architectures": found}, indent=1) + "\n")
    costs.coefficients.cache_clear()
    for architecture, entry in found.items():
        print(architecture, entry["plans"], "plans; call", entry["call"])
        for kind, error in entry["worst_error"].items():  # type: ignore[attr-defined]
            print(f"  {kind:15} {100 * error:5.1f} %", entry["kinds"][kind])  # type: ignore[index]


if __name__ == "__main__":
    main()
