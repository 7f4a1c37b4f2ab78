"""ONNX import: every operator against ONNX's own evaluator, refusals by name, hostile files."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import onnx_models as om
import ulearn
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.network import Concat, Network, Pad, Reshape, Softmax, Table
from ulearn_host.onnx_import import arrange_samples, load_onnx

Array = np.ndarray


def expected(model: onnx.ModelProto, case: om.Case, x: Array) -> list[Array]:
    """The evaluator's float answers, each flat."""
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    if any(n.op_type == "ZipMap" for n in graph.graph.node):  # a table of names, which the evaluator gives as a list
        zipped = next(n for n in graph.graph.node if n.op_type == "ZipMap")
        graph.graph.node.remove(zipped)
        del graph.graph.output[:]
        graph.graph.output.append(onnx.helper.make_tensor_value_info(zipped.input[0], 1, None))
    evaluator = ReferenceEvaluator(graph)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(graph.graph.input[0].type.tensor_type.elem_type)
    answers = [np.asarray(evaluator.run(None, {"x": sample[None].astype(dtype)})[0], dtype=np.float64) for sample in x]
    return [np.exp(a) if case.log else a for a in answers]


def in_file_order(network: Network, answer: Array, like: Array) -> Array:
    """An answer [h, w, c] in the file's shape; the importer says when that has the channels first."""
    if any(note.startswith("the board gives the output") for note in network.notes):
        channels = like.shape[1]
        answer = answer.reshape(-1, channels).T
    return answer.reshape(like.shape)


@pytest.mark.parametrize("name", om.FLOAT)
def test_float_models_agree_with_the_evaluator(name: str, tmp_path: Path) -> None:
    """Bound: of one layer, half a step of rounding of the output, and what the rounding of inputs and weights does to
    the sum: each is off by 0.3 steps (rms) of some 35, independent of each other, so about 0.5 steps (rms) of the
    output's, 2 at four sigma. 3 steps in all; each further layer adds one, a product of two tensors two. Where
    an activation cuts the range (clip, tanh, a steep softmax), the output's steps are finer by as much, and the case
    says how many."""
    case = om.FLOAT[name]
    model = case.made(name)
    path, x = om.save(model, tmp_path / "m.onnx"), om.samples(name, case)
    network = load_onnx(path, x)
    om.check(network)
    if case.kinds is not None:
        assert tuple(type(op) for op in network.ops) == case.kinds
    answers = [om.interpret(network, s, rounded=True) for s in arrange_samples(path, x)]
    wanted = expected(model, case, x)
    worst = max(np.abs(in_file_order(network, a, w) - w).max() for a, w in zip(answers, wanted, strict=True))
    assert worst <= case.steps * network.output.scale, f"off by {worst / network.output.scale:.2f} steps"


@pytest.mark.parametrize("name", om.QUANTISED)
def test_quantised_models_agree_with_the_evaluator(name: str, tmp_path: Path) -> None:
    """Codes, scales and zero points are the file's own, so nothing differs but ties and float32 sums: at most one step
    for every requantisation on the way."""
    case = om.QUANTISED[name]
    model = case.made(name)
    path, x = om.save(model, tmp_path / "m.onnx"), om.samples(name, case)
    network = load_onnx(path)
    om.check(network)
    if case.kinds is not None:
        assert tuple(type(op) for op in network.ops) == case.kinds
    if case.options:
        x = np.rint(x * 40).astype(np.int8)
    real = network.input.real(x) if case.options else x
    answers = [om.interpret(network, s, rounded=True) for s in arrange_samples(path, real)]
    wanted = expected(model, case, x)
    worst = max(np.abs(in_file_order(network, a, w) - w).max() for a, w in zip(answers, wanted, strict=True))
    assert worst <= len(network.ops) * network.output.scale * 1.001


def tolerance(network: Network) -> tuple[int, float]:
    """Largest and mean difference in codes: a tie or a fixed-point multiplier moves a rounding by one, in a few of a
    hundred (means are full of ties), and a later layer or a steep table carries that on."""
    rounding = [op for op in network.ops if not isinstance(op, Pad | Concat | Reshape)]
    steepest = max(
        (int(np.abs(np.diff(op.table.astype(int))).max()) for op in rounding if isinstance(op, Table)), default=1
    )
    return (1 if len(rounding) == 1 else max(2, steepest)), 0.06 * len(rounding)


@pytest.mark.parametrize("name", [*om.FLOAT, *om.QUANTISED])
def test_plans_compute_what_the_interpreter_computes(name: str, tmp_path: Path) -> None:
    """The int8 plan, executed, against the interpreter with every activation rounded."""
    case = om.FLOAT.get(name) or om.QUANTISED[name]
    path, x = om.save(case.made(name), tmp_path / "m.onnx"), om.samples(name, case)
    network = load_onnx(path, x)
    model = ulearn.load(compile_plan(network, Options("none")).data)
    apart = []
    for sample in arrange_samples(path, x):
        codes = network.input.codes(sample)
        answer = np.frombuffer(bytes(model.output(codes.tobytes())), dtype=np.int8)
        wanted = network.output.codes(om.interpret(network, sample, rounded=True)).ravel()
        apart.append(np.abs(answer.astype(int) - wanted))
    largest, mean = tolerance(network)
    assert np.max(apart) <= largest and np.mean(apart) <= mean


def test_softmax_decides_the_loss(tmp_path: Path) -> None:
    case = om.FLOAT["softmax"]
    network = load_onnx(om.save(case.made("softmax"), tmp_path / "m.onnx"), om.samples("softmax", case))
    assert isinstance(network.ops[-1], Softmax) and network.loss == "softmax_ce"
    assert network.output.scale == 1 / 256 and network.output.zero == -128
    case = om.FLOAT["gemm"]
    assert load_onnx(om.save(case.made("gemm"), tmp_path / "m.onnx"), om.samples("gemm", case)).loss == "none"


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", om.REFUSED)
def test_refusals_name_the_node(name: str, tmp_path: Path) -> None:
    case, message = om.REFUSED[name]
    path = om.save(case.made(name), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=message) as caught:
        load_onnx(path, om.samples(name, case))
    assert str(path) in str(caught.value) and "not foreseen" not in str(caught.value)


def saved(name: str, folder: Path) -> tuple[Path, Array]:
    case = om.FLOAT[name]
    return om.save(case.made(name), folder / "m.onnx"), om.samples(name, case)


def test_samples_are_needed_and_checked(tmp_path: Path) -> None:
    path, x = saved("mobile", tmp_path)
    with pytest.raises(UserError, match="pass calibration samples"):
        load_onnx(path, None)
    with pytest.raises(UserError, match=r"shape \[24, 5\], expected \[n, 3, 9, 8\]"):
        load_onnx(path, np.zeros((24, 5)))
    with pytest.raises(UserError, match="expected \\[n"):
        load_onnx(path, np.zeros((0, 3, 9, 8)))
    x[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="no finite number"):
        load_onnx(path, x)
    with pytest.raises(UserError, match="no finite number"):
        load_onnx(path, np.full((2, 216), "a"))
    with pytest.raises(UserError, match="is not finite on the calibration samples"):
        load_onnx(path, np.full((2, 216), 1e30))


def test_samples_may_be_flat_and_progress_is_told(tmp_path: Path) -> None:
    path, x = saved("mobile", tmp_path)
    seen: list[tuple[int, int]] = []
    flat = load_onnx(path, np.tile(x.reshape(24, -1), (10, 1)), lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 200) for i in range(200)]
    assert [t.scale for t in (flat.input, flat.output)] == [
        t.scale for t in (load_onnx(path, x).input, load_onnx(path, x).output)
    ]


def test_channels_first_is_noted_and_arranged(tmp_path: Path) -> None:
    path, x = saved("mobile", tmp_path)
    network = load_onnx(path, x)
    assert network.input.shape == (9, 8, 3) and any("height, width, channels" in note for note in network.notes)
    assert (arrange_samples(path, x).reshape(24, 9, 8, 3) == x.transpose(0, 2, 3, 1)).all()
    path, x = saved("keras", tmp_path)
    assert load_onnx(path, x).notes == () and (arrange_samples(path, x) == x.reshape(24, -1)).all()


def test_logits_have_headroom(tmp_path: Path) -> None:
    path, x = saved("softmax", tmp_path)
    logits = load_onnx(path, x).logits
    model = om.FLOAT["softmax"].made("softmax")
    model.graph.output[0].name = model.graph.node[0].output[0]
    seen = np.array(expected(model, om.FLOAT["softmax"], x))
    reach = 1.5 * (max(0.0, seen.max()) - min(0.0, seen.min()))
    assert abs(logits.scale * 255 / reach - 1) < 1e-5


def test_quantisation_is_the_same_in_every_opset(tmp_path: Path) -> None:
    case = om.QUANTISED["q network"]
    networks = []
    for opset in (13, 19, 21):
        case = om.Case(case.build, case.dims, opset)
        networks.append(load_onnx(om.save(case.made("q network"), tmp_path / "m.onnx")))
    x = om.samples("q network", case)[0].transpose(1, 2, 0)
    answers = [om.interpret(network, x, rounded=True) for network in networks]
    assert (answers[0] == answers[1]).all() and (answers[0] == answers[2]).all()
    assert networks[0].input.scale == np.float32(0.02) and networks[0].input.zero == 3
    assert networks[0].loss == "softmax_ce"


def test_what_is_not_quantised_is_calibrated(tmp_path: Path) -> None:
    """A file that is quantised up to its last layers; at opset 13 the evaluator has no quantisation of its own."""
    model = om.Model("half", (1, 3, 9, 8), 13)
    y = om.QUANTISED["q conv relu"].build(model)
    y = model.gemm(model.op("Flatten", model.op("GlobalAveragePool", y)), 6, 3)
    path = om.save(model.done(y), tmp_path / "m.onnx")
    x = om.samples("half", om.Case(lambda m: ""))
    with pytest.raises(UserError, match="is not quantised in the file: pass calibration samples"):
        load_onnx(path)
    network = load_onnx(path, x)
    assert network.input.scale == np.float32(0.02) and network.ops[0].output.scale == np.float32(0.03)
    model.opset = 19
    wanted = expected(model.done(y), om.Case(lambda m: ""), x)
    answers = [om.interpret(network, s, rounded=True) for s in arrange_samples(path, x)]
    assert np.abs(np.array(answers).ravel() - np.array(wanted).ravel()).max() < 4 * network.output.scale


def test_relu_without_another_reader_is_a_bound(tmp_path: Path) -> None:
    path, x = saved("clip -1 1", tmp_path)
    op: Any = load_onnx(path, x).ops[0]
    assert [op.output.real(np.array(code)) for code in op.activation] == pytest.approx([-1, 1], abs=0.01)


def test_a_dead_channel_keeps_its_bias(tmp_path: Path) -> None:
    """All weights 0: the scale follows the bias, which would not fit 32 bits at the smallest one."""
    model = om.Model("dead", om.VECTOR)
    weights = np.vstack([np.zeros(12), np.ones(12)])
    y = model.op("Gemm", "x", model.const(weights), model.const([1000.0, 0.5]), transB=1)
    path = om.save(model.done(y), tmp_path / "m.onnx")
    x = om.samples("dead", om.Case(lambda m: "", dims=om.VECTOR))
    network = load_onnx(path, x)
    assert om.interpret(network, x[0], rounded=False).ravel()[0] == pytest.approx(1000, rel=1e-6)


# ---- The file --------------------------------------------------------------------------------------------------------


def outside(tmp_path: Path, location: str) -> Path:
    """A model whose weights lie in another file, as the dynamo exporter leaves them."""
    model = om.FLOAT["conv"].made("conv")
    tensor = model.graph.initializer[0]
    (tmp_path / "m.onnx.data").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "432")):
        tensor.external_data.add(key=key, value=value)
    return om.save(model, tmp_path / "m.onnx")


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    path, x = outside(tmp_path, "m.onnx.data"), om.samples("conv", om.FLOAT["conv"])
    (tmp_path / "inside").mkdir()
    inside = om.save(om.FLOAT["conv"].made("conv"), tmp_path / "inside" / "m.onnx")
    a, b = load_onnx(path, x), load_onnx(inside, x)
    assert (a.layers[0].weights == b.layers[0].weights).all()
    (tmp_path / "m.onnx.data").write_bytes(b"short")
    with pytest.raises(UserError, match="with its weights cannot be read"):
        load_onnx(path, x)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_onnx(path, x)


@pytest.mark.parametrize("location", ["../m.onnx.data", "/etc/passwd", "", "..", "sub/m.onnx.data", "a\\b", "link"])
def test_weights_elsewhere_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("/etc/passwd")
    path = outside(tmp_path / "in", location)
    (tmp_path / "m.onnx.data").write_bytes(bytes(432))
    with pytest.raises(UserError, match="only a file in the same folder is read|cannot be read"):
        load_onnx(path, om.samples("conv", om.FLOAT["conv"]))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(UserError, match="No such file"):
        load_onnx(path)
    with pytest.raises(UserError):
        load_onnx(tmp_path)
    for data in (b"", b"\0", b"not a model at all", b"PK\3\4" * 40, bytes(10_000)):
        path.write_bytes(data)
        with pytest.raises(UserError):
            load_onnx(path)


def test_the_extra_is_named_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = saved("gemm", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'ulearn\[onnx\]'"):
        load_onnx(path, x)


# ---- Hostile files ---------------------------------------------------------------------------------------------------

MUTATIONS = 10_000
MEMORY_BYTES = 1 << 30
OPERATORS = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Mul",
    "Relu",
    "Concat",
    "Reshape",
    "Transpose",
    "Softmax",
    "Slice",
    "Shape",
)
QUICK = ("q network", "q conv uint8", "q matmul", "q concat", "q codes", "view", "classifier", "keras mean", "matmul")


def set_number(rng: random.Random, holder: Any, field: str, old: int) -> None:
    """A number that fits the field, most of them wrong."""
    value = rng.choice((0, 1, 2, -1, 3, old + 1, old - 1, -old, 2**20, 2**31 - 1, 2**31, 2**62, -(2**63)))
    try:
        setattr(holder, field, value)
    except ValueError:
        setattr(holder, field, 7)


def mutate_tensor(rng: random.Random, tensor: Any) -> None:
    what = rng.randrange(7)
    if what == 0 and tensor.dims:
        i = rng.randrange(len(tensor.dims))
        tensor.dims[i] = rng.choice((0, -1, 1, tensor.dims[i] % 2**40 + 1, 2**31, 2**62, tensor.dims[i] % 2**40 * 2))
    elif what == 1:
        tensor.dims.append(rng.choice((1, 0, 2, 2**40)))
    elif what == 2:
        tensor.data_type = rng.randrange(30)
    elif what == 3:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif what == 4:
        size = len(tensor.raw_data)
        tensor.raw_data = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80\x7f", rng.randbytes(4))) * size
        tensor.raw_data = tensor.raw_data[:size]
    elif what == 5:
        tensor.name = rng.choice(("", "x", "t0", tensor.name + "_"))
    else:
        tensor.data_location = 1
        tensor.external_data.add(key="location", value=rng.choice(("m.onnx", "../m.onnx", "/dev/zero", "none", "")))


def mutate_attribute(rng: random.Random, attribute: Any) -> None:
    what = rng.randrange(5)
    if what == 0 and attribute.ints:
        i = rng.randrange(len(attribute.ints))
        attribute.ints[i] = rng.choice((0, -1, 1, 5, 2**31, 2**62, -(2**63)))
    elif what == 1:
        set_number(rng, attribute, "i", attribute.i)
    elif what == 2:
        attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    elif what == 3:
        attribute.type = rng.randrange(15)
    else:
        attribute.name = rng.choice(("axis", "pads", "perm", "group", "to", "value", attribute.name + "s"))


def mutate_node(rng: random.Random, graph: Any) -> None:
    i = rng.randrange(len(graph.node))
    node, names = graph.node[i], [o for n in graph.node for o in (*n.input, *n.output)]
    what = rng.randrange(8)
    if what == 0:
        del graph.node[i]
    elif what == 1 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice((*names, "", "nowhere"))
    elif what == 2 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice((*names, ""))
    elif what == 3:
        node.op_type = rng.choice((*{n.op_type for n in graph.node}, *OPERATORS, "Loop", "If", ""))
    elif what == 4 and node.attribute:
        mutate_attribute(rng, rng.choice(node.attribute))
    elif what == 5:
        del node.input[rng.randrange(len(node.input) + 1) :]
    elif what == 6:
        node.input.append(rng.choice(names))
    else:
        other = graph.node[rng.randrange(len(graph.node))]
        copy = onnx.NodeProto()
        copy.CopyFrom(other)
        other.CopyFrom(node)
        node.CopyFrom(copy)


def mutate_model(rng: random.Random, model: onnx.ModelProto) -> None:
    what = rng.randrange(8)
    if what == 0:
        dims = model.graph.input[0].type.tensor_type.shape.dim
        set_number(rng, rng.choice(dims), "dim_value", 3)
    elif what == 1:
        model.graph.input[0].type.tensor_type.elem_type = rng.randrange(20)
    elif what == 2 and rng.random() < 0.2:
        model.opset_import[0].version = rng.choice((0, 11, 12, 13, 18, 21, 22, 23, -1, 2**40))
    elif what == 3:
        del model.graph.initializer[rng.randrange(len(model.graph.initializer))]
    elif what < 6:
        mutate_tensor(rng, rng.choice(model.graph.initializer))
    else:
        mutate_node(rng, model.graph)


def mutated(rng: random.Random, base: bytes) -> bytes:
    """Flipped bits, truncations, or fields set to what they may not be."""
    data = bytearray(base)
    what = rng.randrange(10)
    if what < 4:
        for _ in range(rng.choice((1, 1, 2, 4))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if what == 4:
        return bytes(data[: rng.randrange(len(data))])
    model = onnx.ModelProto.FromString(base)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if model.graph.node and model.graph.initializer:
            mutate_model(rng, model)
    return model.SerializeToString()


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No more than so many bytes of new memory: what is beyond fails to be allocated."""
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.filterwarnings("ignore")  # of numpy, about numbers that a mutation made
def test_mutated_files_are_refused_or_valid(tmp_path: Path) -> None:
    """10,000 files, seeded. Refused with a UserError that was foreseen, or a network whose operators fit together."""
    rng = random.Random(1)
    cases = {name: om.FLOAT.get(name) or om.QUANTISED[name] for name in QUICK}
    bases = {name: case.made(name).SerializeToString() for name, case in cases.items()}
    inputs = {name: om.samples(name, case, 2) for name, case in cases.items()}
    path = tmp_path / "m.onnx"
    valid, unforeseen, slowest = 0, [], 0.0
    with at_most(MEMORY_BYTES):
        for i in range(MUTATIONS):
            name = QUICK[i % len(QUICK)]
            path.write_bytes(mutated(rng, bases[name]))
            began = time.process_time()
            try:
                network = load_onnx(path, inputs[name])
                om.check(network)
                if i % 10 == 0:
                    om.interpret(network, np.zeros(network.input.shape), rounded=True)
                valid += 1
            except UserError as error:
                if "not foreseen" in str(error):
                    unforeseen.append(f"{i}: {error}")
            slowest = max(slowest, time.process_time() - began)
    assert not unforeseen, "\n".join(unforeseen[:20])
    assert MUTATIONS // 20 < valid < MUTATIONS // 2
    assert slowest < 5


def huge(kind: str) -> onnx.ModelProto | bytes:
    """Files that ask for much with little."""
    model = om.Model(kind, (1, 3, 9, 8))
    if kind == "input":
        return om.Model(kind, (1, 2**20, 2**20, 3)).done("x")
    if kind == "fields":
        return b"\x3a\x80\x80\x80\x0a" + b"\x0a\x00" * (10 << 20)  # ten million empty nodes
    if kind == "weights":
        y = model.op("Conv", "x", model.const(1.0))
        model.initializers[0].dims.extend([2**16, 2**16])
        return model.done(y)
    if kind == "constant of shape":
        y = model.op("Add", "x", model.op("ConstantOfShape", model.const([2**20, 2**20], np.int64)))
    elif kind == "doubling":
        y = model.const(np.ones(1000))
        for _ in range(40):
            y = model.op("Concat", y, y, axis=0)
        y = model.op("Add", "x", y)
    elif kind == "outer product":
        y = model.op("Add", "x", model.op("Mul", model.const(np.ones((4000, 1))), model.const(np.ones(4000))))
    elif kind == "pad":
        y = model.op("Pad", "x", model.const([0, 0, 0, 0, 0, 0, 60000, 60000], np.int64))
    elif kind == "padded convolution":
        y = model.conv("x", 3, 4, 3, 3, pads=[2, 2, 2**40, 2**40])
    elif kind == "views":
        model, y = om.Model(kind, (1, 3, 1000, 1000)), "x"
        for _ in range(4000):
            y = model.op(
                "Transpose", model.op("Reshape", y, model.const([1, 1000, 1000, 3], np.int64)), perm=[0, 3, 1, 2]
            )
        y = model.conv(y, 3, 4, 3, 3)
    elif kind == "constants":
        y = "x"
        for _ in range(3000):
            y = model.op("Add", y, model.op("ConstantOfShape", model.const([1, 4, 1024, 1024], np.int64)))
    elif kind == "readers":
        model, y = om.Model(kind, (1, 3, 1000, 1000)), "x"
        means = [model.op("GlobalAveragePool", "x") for _ in range(4000)]
        y = model.op("Concat", *means, axis=1)
    elif kind == "work":
        y = "x"
        for _ in range(400):
            y = model.op("MaxPool", y, kernel_shape=[65, 65], pads=[64, 64, 64, 64])
    else:
        y = "x"
        for _ in range(9000):
            y = model.op("Relu", model.op("Neg", y))
    return model.done(y)


def test_a_long_chain_of_functions_is_one(tmp_path: Path) -> None:
    model, y = om.Model("chain", om.VECTOR), "x"
    for _ in range(9001):
        y = model.op("Neg", y)
    x = om.samples("chain", om.Case(lambda m: "", dims=om.VECTOR))
    network = load_onnx(om.save(model.done(y), tmp_path / "m.onnx"), x)
    assert len(network.ops) == 1
    assert np.abs(om.interpret(network, x[0], rounded=True).ravel() + x[0]).max() < 2 * network.output.scale


HUGE = (
    *("input", "fields", "weights", "constant of shape", "doubling", "outer product", "pad", "padded convolution"),
    *("work", "many nodes", "views", "constants", "readers"),
)


@pytest.mark.parametrize("kind", HUGE)
def test_huge_files_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    made = huge(kind)
    path = tmp_path / "m.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    began = time.process_time()
    with at_most(MEMORY_BYTES), pytest.raises(UserError) as caught:
        load_onnx(path, np.zeros((2, 216)))
    assert "not foreseen" not in str(caught.value)
    assert time.process_time() - began < 20
