"""Read an ONNX file without trusting it: nodes that lead to the output, constants and one input, or a UserError."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn_host.errors import UserError

MAX_NUMBERS = 1 << 22  # of one tensor; no board holds more
_MAX_BYTES = 32 << 20  # of the file, and of external data
_MAX_FIELDS = 1_000_000  # of the protobuf: an empty one takes 2 bytes in the file and a hundred in memory
_MAX_NODES = 10_000
_OPSETS = range(11, 23)
_VALUE_TYPES = ("FLOAT", "DOUBLE", "FLOAT16", "INT8", "UINT8", "INT32", "INT64", "BOOL")


@dataclass(frozen=True)
class Node:
    """An operator of the file. attributes: int, float, bytes, lists of these, or an array."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(repr=False)
    proto: Any = field(repr=False)

    def refuse(self, what: str) -> UserError:
        """The error that names this node; what: the rest of the sentence."""
        return UserError(f"{self.op} '{self.name}' {what}")

    def integer(self, name: str, default: int) -> int:
        """An attribute that is an integer."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise self.refuse(f"has a {name} that is no integer; the file is damaged")
        return value

    def number(self, name: str, default: float) -> float:
        """An attribute that is a finite number."""
        value = self.attributes.get(name, default)
        if not isinstance(value, float) or not math.isfinite(value):
            raise self.refuse(f"has a {name} that is no finite number; the file is damaged")
        return value

    def text(self, name: str, default: str) -> str:
        """An attribute that is a string."""
        value = self.attributes.get(name, default.encode())
        if not isinstance(value, bytes):
            raise self.refuse(f"has a {name} that is no text; the file is damaged")
        return value.decode("ascii", errors="replace")

    def integers(self, name: str, default: list[int] | None = None) -> list[int] | None:
        """An attribute that is a list of integers, or the default."""
        value = self.attributes.get(name, default)
        if value is None or (isinstance(value, list) and all(isinstance(v, int) for v in value)):
            return value
        raise self.refuse(f"has {name} that are no integers; the file is damaged")


@dataclass(frozen=True)
class Graph:
    """What a file holds. dims: the input's shape with its batch dimension, which is 1; dtype: the input's type."""

    nodes: tuple[Node, ...]
    constants: dict[str, NDArray[Any]]
    input: str
    dims: tuple[int, ...]
    dtype: np.dtype[Any]
    output: str
    opset: int
    imports: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]


def read_graph(path: Path) -> Graph:
    """Read a model. Raises UserError when it is no ONNX file, damaged, too large, or of a kind that has no board."""
    model = _parse(path)
    _check_text(model, path)
    _load_external(model, path)
    opset = _opset(model)
    if model.functions:
        raise UserError(
            f"{path}: the model calls functions of its own; inline them first (onnx.inliner.inline_local_functions)"
        )
    if len(model.graph.node) > _MAX_NODES:
        raise UserError(f"{path}: the model has {len(model.graph.node)} nodes, at most {_MAX_NODES} are supported")
    if model.graph.sparse_initializer:
        raise UserError(f"{path}: sparse weights are not supported; store them dense")
    constants = {t.name: tensor_array(t, f"the weights '{t.name}'") for t in model.graph.initializer}
    nodes = [_node(n) for n in model.graph.node]
    name, dims, dtype = _input(model.graph, constants)
    output, notes = _output(model.graph, nodes)
    _check_names(nodes, {name, *constants})
    nodes = _leading_to(output, nodes)
    _check_order(nodes, {name, *constants}, output)
    imports = tuple((o.domain, o.version) for o in model.opset_import)
    return Graph(tuple(nodes), constants, name, dims, dtype, output, opset, imports, tuple(notes))


def tensor_array(tensor: Any, what: str) -> NDArray[Any]:
    """A TensorProto's numbers. Raises UserError when they are damaged, not finite, too many or of another type."""
    import onnx

    kind = onnx.TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in _type_numbers() else "unknown"
    if kind not in _VALUE_TYPES:
        raise UserError(f"{what} are of type {kind}, expected float32 or int8; 16-bit and 4-bit ones are not supported")
    if any(d < 0 for d in tensor.dims) or len(tensor.dims) > 8 or math.prod(tensor.dims) > MAX_NUMBERS:
        raise UserError(f"{what} have shape {list(tensor.dims)[:8]}; at most {MAX_NUMBERS} numbers are supported")
    try:
        array: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        array = array.reshape(tuple(tensor.dims))
    except Exception as fault:  # the reader raises half a dozen kinds
        raise UserError(f"{what} are damaged ({fault})") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{what} hold numbers that are not finite; train the network again")
    return array


def _type_numbers() -> Iterable[int]:
    import onnx

    numbers: Iterable[int] = onnx.TensorProto.DataType.values()
    return numbers


def _parse(path: Path) -> Any:
    """The file as a ModelProto."""
    try:
        import onnx
    except ImportError:
        raise UserError("reading ONNX models needs the extra: pip install 'ulearn[onnx]'") from None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: the file is larger than {_MAX_BYTES >> 20} MB, which no board holds")
        data = path.read_bytes()
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}; expected an ONNX file") from None
    if not data:
        raise UserError(f"{path}: the file is empty; expected an ONNX model")
    try:
        _check_fields(data, onnx.ModelProto.DESCRIPTOR)
        model = onnx.ModelProto()
        model.ParseFromString(data)
    except (ValueError, IndexError):
        raise UserError(f"{path}: damaged, or not an ONNX file; export it again") from None
    except Exception as fault:  # protobuf's own
        raise UserError(f"{path}: damaged, or not an ONNX file ({fault}); export it again") from None
    return model


def _check_text(model: Any, path: Path) -> None:
    """Names that are no text are given as bytes, or raise an error of their own when they are read."""
    graph = model.graph
    try:
        names = [i.name for part in (graph.input, graph.output, graph.initializer) for i in part]
        for node in graph.node:
            names += [node.name, node.op_type, node.domain, *node.input, *node.output]
            names += [text for a in node.attribute for text in (a.name, a.ref_attr_name)]
        names += [text for t in _tensors(model) for e in t.external_data for text in (e.key, e.value)]
        names += [o.domain for o in model.opset_import]
        readable = all(isinstance(name, str) for name in names)
    except UnicodeDecodeError:
        readable = False
    if not readable:
        raise UserError(f"{path}: damaged: a name in it is no text; export it again")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf integer and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("integer too long")


def _check_fields(data: bytes, descriptor: Any) -> None:
    """Count the fields before a parser allocates for them. Raises ValueError when there are too many, or damage."""
    fields = 0
    messages = [(0, len(data), descriptor)]
    while messages:
        at, end, kind = messages.pop()
        while at < end:
            key, at = _varint(data, at)
            fields += 1
            if key & 7 == 2:
                length, at = _varint(data, at)
                known = kind.fields_by_number.get(key >> 3)
                if known is not None and known.message_type is not None:
                    messages.append((at, at + length, known.message_type))
                at += length
            elif key & 7 == 0:
                _, at = _varint(data, at)
            elif key & 7 in (1, 5):
                at += 8 if key & 7 == 1 else 4
            else:
                raise ValueError("unknown wire type")
            if at > end or fields > _MAX_FIELDS:
                raise ValueError("a field reaches beyond its message, or there are too many")


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of the main graph that may lie outside the file."""
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors


def _load_external(model: Any, path: Path) -> None:
    """Read weights that the exporter put in a file beside this one, and in no other place."""
    import onnx

    outside = [t for t in _tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    total = 0
    for tensor in outside:
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        if not location or location in (".", "..") or set(location) & set("/\\:\0"):
            raise UserError(f"{path}: weights lie in '{location}'; only a file in the same folder is read")
        if len(entries) != len(tensor.external_data) or entries.keys() - {"location", "offset", "length", "checksum"}:
            raise UserError(f"{path}: the reference to '{location}' is damaged; export the model again")
        try:
            total += int(entries["length"]) if "length" in entries else (path.parent / location).stat().st_size
        except (ValueError, OSError):
            raise UserError(f"{path}: the file '{location}' with its weights is missing beside it") from None
    if total > _MAX_BYTES:
        raise UserError(f"{path}: its weights take more than {_MAX_BYTES >> 20} MB, which no board holds")
    for tensor in outside:
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        except Exception as fault:  # also links and files that end too early, each with its own kind
            raise UserError(f"{path}: the file beside it with its weights cannot be read ({fault})") from None


def _opset(model: Any) -> int:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in _OPSETS:
        found = f"opset {versions[0]}" if versions else "no opset"
        raise UserError(
            f"the model has {found}, expected {_OPSETS[0]} to {_OPSETS[-1]}; export it with opset_version=17"
        )
    return int(versions[0])


def _node(proto: Any) -> Node:
    name = proto.name or next((o for o in proto.output if o), "")
    if proto.domain not in ("", "ai.onnx", "ai.onnx.ml"):
        raise UserError(
            f"{proto.op_type} '{name}' of '{proto.domain}' is not supported; export standard operators only"
        )
    return Node(name, proto.op_type, tuple(proto.input), tuple(proto.output), dict(_attributes(proto, name)), proto)


def _attributes(proto: Any, name: str) -> Iterator[tuple[str, Any]]:
    import onnx

    kinds = onnx.AttributeProto
    for a in proto.attribute:
        if a.ref_attr_name:
            raise UserError(f"{proto.op_type} '{name}' takes {a.name} from a function; inline functions first")
        if a.type == kinds.TENSOR:
            yield a.name, tensor_array(a.t, f"the numbers of {proto.op_type} '{name}'")
        elif a.type in (kinds.INT, kinds.FLOAT, kinds.STRING):
            yield a.name, onnx.helper.get_attribute_value(a)
        elif a.type in (kinds.INTS, kinds.FLOATS, kinds.STRINGS):
            yield a.name, list(onnx.helper.get_attribute_value(a))
        else:
            yield a.name, None  # the operator is refused for what it is, or its attribute for being nothing


def _input(graph: Any, constants: dict[str, NDArray[Any]]) -> tuple[str, tuple[int, ...], np.dtype[Any]]:
    """The one input that is not a constant: name, shape with batch 1, type."""
    inputs = [i for i in graph.input if i.name not in constants]
    if len(inputs) != 1:
        raise UserError(f"the model has {len(inputs)} inputs, expected one")
    name, kind = inputs[0].name, inputs[0].type.tensor_type
    types = {1: np.float32, 2: np.uint8, 3: np.int8, 10: np.float16, 11: np.float64}
    if kind.elem_type not in types:
        raise UserError(f"the input '{name}' does not take float32 or int8; expected a tensor of one of these")
    sizes = [int(d.dim_value) if d.HasField("dim_value") else 0 for d in kind.shape.dim]
    if not 2 <= len(sizes) <= 4:
        raise UserError(f"the input '{name}' has {len(sizes)} dimensions, expected a batch of 1 and one to three more")
    if sizes[0] > 1:
        raise UserError(f"the input '{name}' takes batches of {sizes[0]}; export the model with a batch of 1")
    if any(s < 1 for s in sizes[1:]):
        raise UserError(f"the input '{name}' has a size that is not fixed; export the model with fixed sizes")
    if math.prod(sizes[1:]) > MAX_NUMBERS:
        raise UserError(f"the input '{name}' has shape {sizes}; at most {MAX_NUMBERS} numbers are supported")
    return name, (1, *sizes[1:]), np.dtype(types[kind.elem_type])


def _output(graph: Any, nodes: list[Node]) -> tuple[str, list[str]]:
    """The output that holds numbers: not a label, and a table of names replaced by its numbers."""
    makers = {name: n for n in nodes for name in n.outputs}
    outputs = []
    notes = []
    for o in graph.output:
        name = o.name
        behind = {n.op for n in _leading_to(name, nodes)} if len(graph.output) > 1 else set()
        if len(graph.output) > 1 and behind & {"ArgMax", "TopK"}:
            notes.append(f"the output '{name}' (the class) is left away; the board's answer holds a number for each")
            continue
        if name in makers and makers[name].op == "ZipMap" and makers[name].inputs:
            name = makers[name].inputs[0]
        outputs.append(name)
    if len(outputs) != 1:
        raise UserError(f"the model has {len(outputs)} outputs, expected one; export it with one")
    return outputs[0], notes


def _leading_to(output: str, nodes: list[Node]) -> list[Node]:
    """The nodes that the output depends on, in the file's order."""
    makers = {name: i for i, n in enumerate(nodes) for name in n.outputs if name}
    wanted: set[int] = set()
    names = [output]
    while names:
        i = makers.get(names.pop())
        if i is not None and i not in wanted:
            wanted.add(i)
            names.extend(nodes[i].inputs)
    return [n for i, n in enumerate(nodes) if i in wanted]


def _check_names(nodes: list[Node], known: set[str]) -> None:
    """No tensor is given twice."""
    known = set(known)
    for node in nodes:
        for name in filter(None, node.outputs):
            if name in known:
                raise node.refuse(f"gives '{name}', which exists already; the file is damaged")
            known.add(name)


def _check_order(nodes: list[Node], known: set[str], output: str) -> None:
    """Every tensor is given before it is read, so that there is no circle."""
    known = known | {""}
    for node in nodes:
        for name in node.inputs:
            if name not in known:
                raise node.refuse(f"reads '{name}', which nothing before it gives; the file is damaged")
        known.update(node.outputs)
    if output not in known:
        raise UserError(f"nothing gives the output '{output}'; the file is damaged")
