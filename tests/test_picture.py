"""`ulearn inspect`: what it reads out of a plan's records is what the compiler planned, and the pictures show it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import branches
import cases
import ulearn
from ulearn import plan as plan_file
from ulearn_host import compiler, costs, display, inspection, memory, picture, report
from ulearn_host import numbers as n
from ulearn_host.compiler import Options, Plan, Program, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.network import (
    Concat,
    Conv,
    Dense,
    Depthwise,
    Elementwise,
    Mean,
    Network,
    Op,
    Pad,
    Pool,
    Reshape,
    Shape,
    Softmax,
    Table,
    Tensor,
    Window,
)
from ulearn_host.recompute import original
from ulearn_host.schemes import Scheme
from ulearn_host.timeline import Timeline

ALL = (-128, 127)


def tensor(name: str, *shape: int) -> Tensor:
    return Tensor(0.05, -3, name, (shape[0], shape[1], shape[2]))


def weights(rng: np.random.Generator, *shape: int) -> dict[str, Any]:
    """Weights, biases and scales of a layer."""
    return {
        "weights": rng.integers(-127, 128, shape).astype(np.int8),
        "bias": rng.integers(-900, 900, shape[0]).astype(np.int32),
        "weight_scales": rng.uniform(0.001, 0.01, shape[0]),
        "activation": ALL,
    }


def conv(name: str, x: Tensor, channels: int, window: Window, shape: Shape | None = None) -> Conv:
    rng = np.random.default_rng(len(name))
    h, w, c = x.shape
    y = tensor("t_" + name, *(shape or (h, w, channels)))
    return Conv(name, (x,), y, **weights(rng, channels, *window.kernel, c), window=window)


def depthwise(name: str, x: Tensor) -> Depthwise:
    rng = np.random.default_rng(len(name))
    y = tensor("t_" + name, *x.shape)
    return Depthwise(name, (x,), y, **weights(rng, x.shape[2], 3, 3, 1), window=Window((3, 3), pad=(1, 1)))


def dense(name: str, x: Tensor, outputs: int) -> Dense:
    rng = np.random.default_rng(len(name))
    return Dense(name, (x,), tensor("t_" + name, 1, 1, outputs), **weights(rng, outputs, x.size))


def add(name: str, a: Tensor, b: Tensor) -> Elementwise:
    return Elementwise(name, (a, b), tensor("t_" + name, *a.shape), "add", ALL, b)


def head(x: Tensor) -> list[Op]:
    """Pool, dense layer, softmax."""
    mean = Mean("mean", (x,), tensor("t_mean", 1, 1, x.shape[2]))
    last = dense("logits", mean.output, 5)
    return [mean, last, Softmax("softmax", (last.output,), Tensor(1 / 256, -128, "t_softmax", (1, 1, 5)))]


def residual() -> Network:
    """A block with a way around it, which is added in place; then a stride."""
    first = conv("stem", tensor("x", 12, 10, 3), 8, Window((3, 3), pad=(1, 1)))
    one = conv("one", first.output, 8, Window((3, 3), pad=(1, 1)))
    two = conv("two", one.output, 8, Window((3, 3), pad=(1, 1)))
    around = add("around", first.output, two.output)
    down = conv("down", around.output, 16, Window((3, 3), (2, 2), (1, 1)), (6, 5, 16))
    return Network((first, one, two, around, down, *head(down.output)))


def chain() -> Network:
    """Operators that all write where they read, but for the first."""
    ops: list[Op] = [conv("stem", tensor("x", 9, 7, 2), 8, Window((3, 3), pad=(1, 1)))]
    ops.append(depthwise("deep", ops[-1].output))
    ops.append(conv("point", ops[-1].output, 8, Window((1, 1))))
    table = np.arange(-128, 128).astype(np.int8)
    ops.append(Table("sigmoid", (ops[-1].output,), tensor("t_sigmoid", 9, 7, 8), "logistic", table))
    ops.append(conv("narrow", ops[-1].output, 4, Window((1, 1))))
    ops.append(Reshape("flat", (ops[-1].output,), tensor("t_flat", 1, 1, 252)))
    ops.append(dense("logits", ops[-1].output, 5))
    return Network(tuple(ops))


def concat(axis: int) -> Network:
    """Three ways side by side, one of them a constant; then padding and pooling."""
    x = tensor("x", 8, 6, 3)
    left, right = conv("left", x, 4, Window((1, 1))), conv("right", x, 4, Window((3, 3), pad=(1, 1)))
    constant = tensor("c", 8, 6, 4)
    shape = [8, 6, 4]
    shape[axis] *= 3
    codes = np.zeros(constant.shape, np.int8)
    joined = Concat(
        "joined",
        (left.output, constant, right.output),
        tensor("t_joined", *shape),
        axis,
        (None, codes, None),
    )
    h, w, c = shape
    padded = Pad("padded", (joined.output,), tensor("t_padded", h + 2, w, c), (1, 0, 0), -3)
    pooled = Pool(
        "pooled", (padded.output,), tensor("t_pooled", h // 2 + 1, w // 2, c), "max", Window((2, 2), (2, 2)), ALL
    )
    return Network((left, right, joined, padded, pooled, *head(pooled.output)))


NETWORKS = {"residual": residual(), "chain": chain(), **{f"concat{axis}": concat(axis) for axis in range(3)}}


def saved(plan: Plan, folder: Path) -> report.Report:
    path = folder / "plan.ulm"
    path.write_bytes(plan.data)
    return report.read(path)


@pytest.fixture(params=NETWORKS)
def inspected(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Plan, report.Report]:
    plan = compile_plan(NETWORKS[request.param], Options("none"))
    return plan, saved(plan, tmp_path)


def planned(program: Program) -> set[tuple[int, int, int, int]]:
    """Offset, size, first and last record of what the compiler placed."""
    return {(program.offsets[life.name], life.size, life.start, life.end) for life in program.lives}


def found(timeline: Timeline) -> list[tuple[int, int, int, int]]:
    return [(t.offset, t.size, t.first, t.last) for t in timeline.tensors]


def alive(program: Program, at: int) -> int:
    """Bytes in use at a record, counted one by one."""
    used: set[int] = set()
    for life in program.lives:
        if life.start <= at <= life.end:
            start = program.offsets[life.name]
            used |= set(range(start, start + memory.aligned(life.size)))
    return len(used)


def check(program: Program, timeline: Timeline) -> None:
    tensors = found(timeline)
    assert len(tensors) == len(set(tensors)) and set(tensors) == planned(program)
    assert timeline.alive == [alive(program, at) for at in range(len(program.records))]
    assert timeline.arena_bytes == program.arena
    assert timeline.alive[timeline.peak_record] == max(timeline.alive) <= program.arena


def test_lifetimes_are_the_compilers(inspected: tuple[Plan, report.Report]) -> None:
    """Offsets, sizes, first and last use, bytes alive at every record and the peak; names and shapes of tensors."""
    plan, read = inspected
    program, timeline = plan.programs[0], read.timelines[0]
    check(program, timeline)
    assert timeline.peak_bytes == memory.lower_bound(program.lives)
    shapes = {"t_" + t.name: t.shape for t in timeline.tensors}
    outputs = {op.output.name: op.output.shape for op in plan.network.ops if not isinstance(op, Reshape)}
    assert shapes == outputs


def makers(network: Network) -> dict[str, Op]:
    """The operator that computes each tensor. A reshape computes none."""
    found = {op.output.name: op for op in network.ops if not isinstance(op, Reshape)}
    for op in network.ops:
        if isinstance(op, Reshape) and op.input.name in found:
            found[op.output.name] = found[op.input.name]
    return found


def work(network: Network, layer: str, rows: int | None = None) -> int:
    """Multiply-accumulates of a pass through so many output channels of a layer, all by default."""
    found = next(op for op in network.layers if op.name == layer)
    positions = found.output.size // found.output.shape[2] if not isinstance(found, Dense) else found.rows
    return positions * found.weights[0].size * (len(found.weights) if rows is None else rows)


def check_tensors(plan: Plan, program: Program, timeline: Timeline) -> None:
    """Every tensor bears the name of what computed it, or of that which it is the gradient or the mask of."""
    by_place = {(t.offset, t.size, t.first, t.last): t for t in timeline.tensors}
    made = makers(plan.network)
    for life in program.lives:
        t = by_place[program.offsets[life.name], life.size, life.start, life.end]
        kind, name = original(life.name).split()[:2]
        assert t.kind == {"act": "activation", "grad": "gradient", "mask": "mask"}[kind]
        if life.name == "act output":
            continue
        op = made[name]
        assert t.name == op.name or t.name.endswith((f"gradient at {op.name}", f"mask of {op.name}"))
        numbers = int(np.prod(t.shape))
        assert numbers == op.output.size
        # Rows of a concatenation have the shape that their reader gives them.
        assert picture.shape(t.shape) == picture.shape(op.output.shape) or isinstance(op, Concat)
        sizes = {
            "activation": {numbers},
            "mask": {-(-numbers // 8)},
            "gradient": {n.GRADIENT_HEADER + numbers, n.GRADIENT_HEADER + 2 * numbers},
        }
        assert t.size in sizes[t.kind]


def check_operations(plan: Plan, program: Program, operations: list[report.Operation]) -> None:
    """Every record bears the name of its layer, with its work and its weights."""
    made = makers(plan.network)
    tensors = {t.name: t for t in plan.tensors}
    for record, o in zip(program.records, operations, strict=True):
        if o.name == "loss":
            assert record.op in (n.OP_SOFTMAX_CE, n.OP_MSE, n.OP_HINGE)
            continue
        layer = next((op for op in plan.network.layers if op.name == o.name), None)
        rows = o.rows[1] - o.rows[0]
        if record.op == n.OP_SUM:
            assert o.name == made[record.writes[0].split()[1]].name and o.role == "sum"
        elif o.role:
            title = {"mask": "which of {} pass", "masking": "mask of {}", "gradient": "gradient of {}"}
            assert record.name == title.get(o.role, f"update {{}}/{o.role}").format(o.name)
        else:
            assert record.name == o.name
        computes = layer is not None and o.role in ("", "gradient", "weights")
        assert o.macs == (work(plan.network, o.name, rows) if computes else 0)
        if o.role == "" and layer is not None:
            total = len(layer.weights)
            trained = tensors[f"{o.name}/weights"].shape[0] if f"{o.name}/weights" in tensors else 0
            assert o.rows == ((total - trained, total, total) if "train" in o.weights else (0, total - trained, total))
        elif o.role == "weights":
            t = tensors[f"{o.name}/weights"]
            unit = {n.DTYPE_INT8: 1, n.DTYPE_INT16: 2}[t.dtype]
            assert o.weights == f"int{8 * unit} in train" and o.weight_bytes == unit * int(np.prod(t.shape))
            assert rows == t.shape[0] and o.rows[1:] == (o.rows[2], len(layer.weights))  # type: ignore[union-attr]
        elif o.role == "gradient" and layer is not None:
            found = tensors.get(f"{o.name}/weights")
            trained = found.shape[0] if found else 0
            assert ("in train" in o.weights) == (trained > 0)
            assert ("int8 in frozen" in o.weights) == (trained < len(layer.weights))
            assert o.rows == (0, len(layer.weights), len(layer.weights))


@pytest.mark.parametrize("seed", range(12))
def test_training_programs(seed: int, tmp_path: Path) -> None:
    """Both programs; a gradient bears the name of the layer behind which it is, a record that of its own."""
    plan = cases.random_case(seed).plan
    read = saved(plan, tmp_path)
    assert read.programs == ["forward", "train"]
    for program, timeline in zip(plan.programs, read.timelines, strict=True):
        check(program, timeline)
        check_tensors(plan, program, timeline)
        check_operations(plan, program, read.of(timeline.program))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_branches_that_train(seed: int, layerwise: bool, tmp_path: Path) -> None:
    """The same of networks with branches, convolutions and narrow gradients, all at once or layer by layer."""
    plan = branches.random_case(seed).plan
    if layerwise:
        plan = compile_plan(plan.network, replace(plan.options, layerwise=True))
    read = saved(plan, tmp_path)
    assert read.programs == [program.name for program in plan.programs]
    for program, timeline in zip(plan.programs, read.timelines, strict=True):
        check(program, timeline)
        check_tensors(plan, program, timeline)
        check_operations(plan, program, read.of(timeline.program))
    facts = {t["name"]: (t["dtype"], t["bytes"], t["layer_rows"]) for t in read.tensors}
    units = {n.DTYPE_INT8: 1, n.DTYPE_INT16: 2, n.DTYPE_INT32: 4}
    channels = {layer.name: len(layer.weights) for layer in plan.network.layers}
    for t in plan.tensors:
        size = units[t.dtype] * int(np.prod(t.shape))
        assert facts[t.name] == (f"int{8 * units[t.dtype]}", size, channels[t.name.split("/")[0]])
    read.as_json()


def test_branches_cover_the_records(tmp_path: Path) -> None:
    """Every record of training is among those that are compared."""
    seen = {o.op for seed in range(40) for o in saved(branches.random_case(seed).plan, tmp_path).operations}
    ops = {name[3:].lower() for name in vars(n) if name.startswith("OP_")}
    assert ops - seen <= {"relu", "softmax", "table"}


def test_programs_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that the file cuts are known in full; every program is shown, in pictures, too."""
    ops = [replace(op, name=f"a layer of name {op.name}") for op in residual().ops]
    network = Network(tuple(ops), "softmax_ce")
    plan = compile_plan(network, Options("full", layerwise=True))
    read = saved(plan, tmp_path)
    trained = [layer.name for layer in reversed(network.layers)]
    assert read.programs == ["forward", *(f"train {name}" for name in trained)]
    text = shown(read, monkeypatch)
    assert all(f"train {name}" in text for name in trained)
    assert list(read.as_json()["macs"]) == read.programs
    for suffix in picture.SUFFIXES:
        picture.write(tmp_path / f"memory{suffix}", read)
    assert all(escape(f"train {name}: arena") in (tmp_path / "memory.html").read_text() for name in trained)


def test_programs_of_one_name(tmp_path: Path) -> None:
    """Programs of a file may be called anything: sums and pictures tell them apart."""
    data = compile_plan(replace(residual(), loss="softmax_ce"), Options("full", layerwise=True)).data
    names = [b"train logits", b"train down", b"train two", b"train one", b"train stem"]
    for name, other in zip(names, (b"forward", b"train", b"train", b"\xff\x1b[2J", b""), strict=True):
        at = data.index(name.ljust(16, b"\0"))
        data = data[:at] + other.ljust(16, b"\0") + data[at + 16 :]
    sections = int.from_bytes(data[n.H_SECTIONS : n.H_SECTIONS + 2], "little")
    path = tmp_path / "plan.ulm"
    path.write_bytes(compiler.seal(bytes(16), [data[n.HEADER_BYTES :]], sections))
    read = report.read(path)
    titles = ["forward", "train forward", "train", "train (2)", "train \ufffd?[2J", "train (3)"]
    assert read.programs == titles
    assert sum(len(read.of(title)) for title in titles) == len(read.operations)


def test_chosen_layers_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trains, which channels of which layer, and what a step costs beside an inference."""
    network = replace(residual(), loss="softmax_ce")
    chosen = ((0, False), (0, False), (3, True), (16, True), (5, True))
    read = saved(compile_plan(network, Options("sparse", selection=chosen)), tmp_path)
    text = shown(read, monkeypatch, width=100)
    assert max(map(len, text.splitlines())) <= 100
    table = [" ".join(line.split()) for line in text.splitlines()]
    assert "two/weights int16 3×3×3×8 5–7 of 8 432" in table
    assert "two/bias of frozen weights int32 5 0–4 of 8 20" in table
    assert "down/weights int16 16×3×3×8 all 16 2,304" in table
    assert sum(line.startswith("in all") and line.endswith(f"{read.buffers['train']:,}") for line in table) == 1
    ratio = read.macs("train") / read.macs("forward")
    step = f"train {len(read.of('train'))} {read.macs('train'):,} {ratio:.2f} × {read.buffers['arena']:,}"
    assert step in table
    operations = read.of("train")
    back = next(o for o in operations if o.name == "two" and o.op == "update_conv")
    assert (back.rows, back.macs, back.kernel) == ((5, 8, 8), 12 * 10 * 3 * 72, (3, 3))
    row = f"{back.record} two [5:8] update_conv 3×3 12×10×8 → 12×10×3 int16 train {back.macs:,} {back.alive_bytes:,}"
    assert row in table
    loss = next(o.record for o in operations if o.name == "loss")
    ahead = [o for o in operations if o.record < loss]
    macs, alive_ = sum(o.macs for o in ahead), max(o.alive_bytes for o in ahead)
    assert f"forward records 0–{loss - 1} {macs:,} {alive_:,}" in table


def test_time_is_not_guessed(tmp_path: Path) -> None:
    """Records whose cost was never measured make a prediction None; what else trains leaves it as it is."""
    network = replace(residual(), loss="softmax_ce")
    nothing = [(0, False)] * 5
    for rows, known in ((0, True), (3, False), (8, False)):
        chosen = (*nothing[:2], (rows, True), *nothing[3:])
        plan = compile_plan(network, Options("sparse", selection=chosen))
        for program, measured in zip(plan.programs, (known, False), strict=True):
            records = costs.records_of(program.section)
            assert (costs.predict(records, "armv6m") is not None) == measured
            assert costs.macs(records) == sum(o.macs for o in saved(plan, tmp_path).of(program.name))


def test_in_place_tensors_are_apart(tmp_path: Path) -> None:
    """One place, five tensors after one another."""
    timeline = saved(compile_plan(NETWORKS["chain"], Options("none")), tmp_path).timelines[0]
    at_one_place = [t for t in timeline.tensors if t.offset == timeline.tensors[0].offset]
    assert [t.name for t in at_one_place[:5]] == ["stem", "deep", "point", "sigmoid", "narrow"]
    drawn = picture.boxes(timeline)
    assert all(a.right == b.left for a, b in zip(drawn[:4], drawn[1:5], strict=True))


def test_operations(tmp_path: Path) -> None:
    """Kind, layer, shapes, kernel, stride, multiply-accumulates and weights of records."""
    read = saved(compile_plan(NETWORKS["residual"], Options("none")), tmp_path)
    by_name = {o.name: o for o in read.operations}
    down = by_name["down"]
    assert (down.op, down.input_shape, down.output_shape) == ("conv", (12, 10, 8), (6, 5, 16))
    assert (down.kernel, down.stride, down.macs) == ((3, 3), (2, 2), 6 * 5 * 16 * 9 * 8)
    assert (down.weights, down.weight_bytes) == ("int8 in frozen", 16 * 72)
    assert (by_name["around"].op, by_name["around"].macs, by_name["around"].kernel) == ("add", 0, ())
    read = saved(compile_plan(NETWORKS["chain"], Options("none")), tmp_path)
    assert {o.name: o.macs for o in read.operations}["deep"] == 9 * 7 * 8 * 9
    read = saved(cases.random_case(2).plan, tmp_path)
    assert {o.weights for o in read.of("train") if o.op == "update_weight"} == {"int16 in train"}


def test_frozen_weights(inspected: tuple[Plan, report.Report]) -> None:
    """A streaming board's windows are what was foretold; in place costs least, held costs most."""
    plan, read = inspected
    frozen = read.frozen
    model = ulearn.load(read.path, frozen="stream")
    sizes = [w[i + 1] - w[i] for w in model.streamed.windows for i in range(0, len(w), 2)]
    assert [o.frozen_bytes for o in read.operations] == sizes
    assert frozen.window_bytes == len(model.streamed.window) == max(sizes)
    assert frozen.streamed_bytes == sum(sizes[: len(read.of("forward"))])
    assert sizes[frozen.window_record] == max(sizes)
    assert frozen.ram_held == read.ram_bytes
    assert frozen.ram_held - frozen.ram_in_place > frozen.size
    assert frozen.size == len(plan_file.read(plan.data).section(n.SECTION_FROZEN))


class Page(HTMLParser):
    """Tags that are closed as they were opened, tooltips, and everything that refers to something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tips: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.attributes += attrs

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-2:] == ["g", "title"]:
            self.tips.append(data)


def page(text: str) -> Page:
    result = Page()
    result.feed(text)
    result.close()
    assert not result.open
    return result


def test_html(inspected: tuple[Plan, report.Report], tmp_path: Path) -> None:
    """Well-formed, every tensor with its bytes and lifetime, and nothing from elsewhere."""
    _, read = inspected
    picture.write(tmp_path / "memory.html", read)
    text = (tmp_path / "memory.html").read_text()
    parsed = page(text)
    for t in read.timelines[0].tensors:
        tip = next(tip for tip in parsed.tips if tip.startswith(t.name + "\n"))
        assert f"{t.size:,} bytes at offset {t.offset:,}" in tip and picture.shape(t.shape) in tip
        assert f"record {t.first} to " in tip
    assert len(parsed.tips) == len(read.timelines[0].tensors)
    assert any("after the end" in tip for tip in parsed.tips)
    assert f"peak: {read.timelines[0].peak_bytes:,} bytes" in text
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img", text)
    assert not [name for name, _ in parsed.attributes if name in ("src", "href", "xlink:href")]


def test_html_stays_inside_its_frame(inspected: tuple[Plan, report.Report]) -> None:
    """Every block lies inside the drawing."""
    from ulearn_host import picture_html

    text = picture_html.draw(inspected[1])
    match = re.search(r'viewBox="0 0 (\d+) (\d+)"', text)
    assert match
    width, height = map(int, match.groups())
    blocks = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', text)
    assert len(blocks) > len(inspected[1].timelines[0].tensors)
    assert all(float(x) + float(w) <= width and float(y) + float(h) <= height for x, y, w, h in blocks)


def test_png(tmp_path: Path) -> None:
    """A picture of sensible size with as many colours as there are tensors, at least."""
    from matplotlib.image import imread

    read = saved(cases.random_case(2).plan, tmp_path)
    picture.write(tmp_path / "memory.png", read)
    pixels = imread(str(tmp_path / "memory.png"))
    height, width, _ = pixels.shape
    assert 600 <= width <= 5200 and 600 <= height <= 2000
    colors = {tuple(c) for c in np.round(pixels[::3, ::3, :3].reshape(-1, 3) * 255).astype(int).tolist()}
    wanted = {box.color for timeline in read.timelines for box in picture.boxes(timeline)}
    assert {tuple(bytes.fromhex(color[1:])) for color in wanted} <= colors


@pytest.mark.parametrize("width", [40, 80, 120])
def test_terminal(inspected: tuple[Plan, report.Report], width: int) -> None:
    """A line for each record, no wider than the terminal; every tensor is seen for as long as it lives."""
    timeline = inspected[1].timelines[0]
    for colors in (False, True):
        drawn = picture.lines(timeline, width, colors)
        assert len(drawn) == 1 + len(timeline.labels)
        assert max(line.cell_len for line in drawn) <= max(width, 60)
        assert [at - 1 for at, line in enumerate(drawn) if "peak" in line.plain] == [timeline.peak_record]
    for at, line in enumerate(drawn[1:]):
        shades = {str(span.style) for span in line.spans}
        for box in picture.boxes(timeline):
            if box.left <= at + 0.4 and at + 1 <= box.right:
                assert any(box.color in shade for shade in shades), (at, box.tensor.name)


def test_plain_drawing(inspected: tuple[Plan, report.Report]) -> None:
    """ASCII: the letter of a tensor stands where its bytes are, from the record whose line names it."""
    timeline = inspected[1].timelines[0]
    bars = [line.plain[line.plain.index("|") + 1 :].split("|")[0] for line in picture.lines(timeline, 200, False)[1:]]
    assert all(line.plain.isascii() for line in picture.lines(timeline, 80, False))
    for i, t in enumerate(timeline.tensors):
        letter = chr(ord("a") + i)
        rows = [at for at, bar in enumerate(bars) if letter in bar]
        last = min(t.last, len(bars) - 1)
        # An heir takes the place over in the record that both touch.
        assert rows[0] == t.first and rows[-1] in (last, last - 1)
        share = bars[t.first].count(letter) / len(bars[0])
        assert share == pytest.approx(t.size / timeline.arena_bytes, abs=2 / len(bars[0]))


def shown(
    read: report.Report, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8", width: int = 80, **console: Any
) -> str:
    """What `inspect` prints on a console, of 80 columns by default."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(display, "console", Console(file=file, width=width, highlight=False, **console))
    inspection.show(read)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_shown(inspected: tuple[Plan, report.Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours on a terminal, none elsewhere, ASCII where the encoding has no more; all within 80 columns."""
    read = inspected[1]
    colored = shown(read, monkeypatch, force_terminal=True, color_system="truecolor", _environ={})
    assert "\x1b[" in colored and "◀ peak" in colored
    piped = shown(read, monkeypatch)
    assert "\x1b[" not in piped and "< peak" in piped and "→" in piped and f"{read.ram_bytes:,}" in piped
    assert max(map(len, piped.splitlines())) <= 80
    assert all(o.name in piped for o in read.operations)
    assert shown(read, monkeypatch, "ascii").isascii()
    assert "◀" not in shown(read, monkeypatch, force_terminal=True, color_system=None, _environ={})


def test_training_plan_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs, the trainable tensors, and what streaming takes."""
    read = saved(cases.random_case(2).plan, tmp_path)
    text = shown(read, monkeypatch)
    assert "memory forward" in text and "memory train" in text and "dense_4/weights" in text
    assert "streaming needs a window of" in " ".join(text.split())


def test_hostile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of layers are shown as they are: no markup, no script, nothing that a terminal obeys."""
    first = replace(NETWORKS["residual"].ops[0], name="<script>\x1b[2J[bold]$x_")
    network = Network((first, *NETWORKS["residual"].ops[1:]))
    read = saved(compile_plan(network, Options("none")), tmp_path)
    text = shown(read, monkeypatch)
    assert "\x1b" not in text and "[bold]" in text
    picture.write(tmp_path / "memory.html", read)
    page((tmp_path / "memory.html").read_text())
    assert "<script>" not in (tmp_path / "memory.html").read_text()
    picture.write(tmp_path / "memory.png", read)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence each, before anything is written."""
    for name in ("memory.pdf", "memory", "memory.svg"):
        with pytest.raises(UserError, match=r"pictures are drawn as \.html or \.png"):
            picture.check(tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture.check(tmp_path / "memory.html")
    with pytest.raises(UserError, match=re.escape("pip install 'ulearn[plot]'; or name an .html file")):
        picture.check(tmp_path / "memory.png")
    assert not list(tmp_path.iterdir())


def test_damaged_metadata(tmp_path: Path) -> None:
    """A plan whose metadata are no JSON object is refused; one without layers' names is shown by its records."""
    data = compile_plan(NETWORKS["chain"], Options("none")).data
    at = data.index(b'{"labels"')
    body, model_id = data[n.HEADER_BYTES : at - 8], data[n.H_MODEL_ID : n.H_MODEL_ID + n.ID_BYTES]
    sections = int.from_bytes(data[n.H_SECTIONS : n.H_SECTIONS + 2], "little")
    for meta, word in ((b"[1]", "metadata"), (b"{", "metadata"), (b"[" * 90000, "metadata"), (b'{"layers": 3}', "")):
        path = tmp_path / "plan.ulm"
        section = compiler._section(n.SECTION_META, meta, required=False)
        path.write_bytes(compiler.seal(model_id, [body, section], sections))
        if word:
            with pytest.raises(UserError, match=word):
                report.read(path)
        else:
            assert [o.name for o in report.read(path).operations][:2] == ["conv", "depthwise"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ulearn_host.cli", "inspect", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_command(tmp_path: Path) -> None:
    """JSON alone on stdout, with a picture beside; one sentence where that cannot be."""
    read = saved(cases.random_case(3).plan, tmp_path)
    done = command(read.path, "--json", "--picture", tmp_path / "memory.html")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and (tmp_path / "memory.html").stat().st_size > 2000
    assert facts == json.loads(json.dumps(read.as_json()))
    first = facts["operations"][0]
    wanted = {"op", "name", "input_shape", "output_shape", "kernel", "stride", "macs", "alive_bytes"}
    assert wanted <= set(first)
    assert facts["memory"]["train"]["peak_bytes"] == max(facts["memory"]["train"]["alive_bytes"])
    assert facts["memory"]["train"]["tensors"] and facts["frozen"]["place"] == "ram"
    done = command(read.path, "--picture", tmp_path / "memory.gif")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    done = command(read.path, "--picture", tmp_path / "none" / "memory.html")
    assert done.returncode == 1 and "none" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["kws01_dscnn_int8", "ic01_resnet8_int8", "ad01_int8"])
def test_real_models(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Lifetimes and peak of real networks, and that their arenas hold what lives and no more."""
    from ulearn_host.tflite_import import load_tflite

    plan = compile_plan(load_tflite(shared_data / "models" / f"{name}.tflite"), Options("none"))
    read = saved(plan, tmp_path)
    check(plan.programs[0], read.timelines[0])
    assert read.timelines[0].peak_bytes == read.buffers["arena"]
    picture.write(tmp_path / "memory.html", read)
    page((tmp_path / "memory.html").read_text())


@pytest.mark.parametrize("scheme", ["sparse", "full", "bias"])
def test_keyword_spotting_trains(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme
) -> None:
    """A real network: all that is read of it, and its tables within 100 columns, no name cut."""
    from ulearn_host.tflite_import import load_tflite

    network = replace(load_tflite(shared_data / "models" / "kws01_dscnn_int8.tflite"), loss="softmax_ce")
    last = len(network.layers) - 1
    chosen = [(len(d.weights) if last - i in (0, 1, 3) else 0, last - i < 5) for i, d in enumerate(network.layers)]
    options = Options(scheme, selection=tuple(chosen) if scheme == "sparse" else None)
    plan = compile_plan(network, options)
    read = saved(plan, tmp_path)
    for program, timeline in zip(plan.programs, read.timelines, strict=True):
        check(program, timeline)
        check_tensors(plan, program, timeline)
        check_operations(plan, program, read.of(timeline.program))
    text = shown(read, monkeypatch, width=100)
    assert max(map(len, text.splitlines())) <= 100
    lines = [line.split() for line in text.splitlines()]
    loss = next(o.record for o in read.of("train") if o.name == "loss")
    masks = sum(o.op == "mask" for o in read.of("train"))
    assert ["forward", "records", f"0–{loss - 1}", str(masks)] in [line[:4] for line in lines] and masks
    for o in read.of("train")[loss:]:
        assert any(line[:3] == [str(o.record), o.name, o.op] and line[-1] == f"{o.alive_bytes:,}" for line in lines)
