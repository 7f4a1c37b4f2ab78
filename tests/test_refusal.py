"""A damaged plan, checkpoint, base or update is refused by name, wherever it was cut or changed; nothing changes."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cases
import ulearn

SEEDS = range(4)  # one a scheme, both losses, both kinds of weights
WIDEST = 8


def cuts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The data cut at every length."""
    for length in range(len(data)):
        yield f"cut at {length} of {len(data)}", data[:length]


def changes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The data with every byte changed to another value."""
    rng = random.Random(len(data))
    for at in range(len(data)):
        value = (data[at] + rng.randrange(1, 256)) % 256
        yield f"byte {at} changed from {data[at]} to {value}", data[:at] + bytes([value]) + data[at + 1 :]


def longer(data: bytes) -> Iterator[tuple[str, bytes]]:
    for tail in (b"\0", b"\xff", bytes(8), data[:64], data):
        yield f"{len(tail)} bytes appended", data + tail


DAMAGES = [cuts, changes, longer]
Damage = Callable[[bytes], Iterator[tuple[str, bytes]]]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of files are written here, and a disk would be waited for."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def refused(what: str, name: str, call: Callable[[], object]) -> None:
    """`call` raises ValueError with the text "name: fault"."""
    try:
        call()
    except ValueError as e:
        text = str(e)
        assert text.startswith(name + ": ") and len(text) > len(name) + 10, f"{what}: the error says {text!r}"
    except BaseException as e:
        raise AssertionError(f"{what}: {type(e).__name__} instead of ValueError: {e}") from e
    else:
        raise AssertionError(f"{what}: accepted")


def train(model: ulearn.Model, case: cases.Case, steps: int = 3) -> None:
    """A few steps that move weights and STATE."""
    trainer = ulearn.Trainer(model, learning_rate=0.05, skip=0)
    for x, target in list(zip(case.inputs, case.targets, strict=True))[:steps]:
        trainer.step(x.tobytes(), int(target) if case.targets.ndim == 1 else target.tobytes())


def contents(model: ulearn.Model, folder: Path) -> tuple[object, ...]:
    """Everything that must not change: weights, STATE, base, and all files."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return bytes(model.train_blob), bytes(model.state), model.base_id, model.base_path, model.base, files


def learned(memory: Path, seed: int, name: str = "plan.ulm") -> tuple[cases.Case, ulearn.Model]:
    """A model that was loaded from a file and has learned something."""
    case = cases.random_case(seed, WIDEST)
    path = memory / name
    path.write_bytes(case.plan.data)
    model = ulearn.load(str(path))
    before = bytes(model.train_blob)
    train(model, case)
    assert bytes(model.train_blob) != before
    return case, model


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_plan_file(seed: int, damage: Damage, memory: Path) -> None:
    data = cases.random_case(seed, WIDEST).plan.data
    path = memory / "damaged.ulm"
    path.write_bytes(data)
    ulearn.load(str(path))
    for what, broken in damage(data):
        path.write_bytes(broken)
        refused(what, str(path), lambda: ulearn.load(str(path)))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_damaged_plan_in_memory(wrap: Callable[[bytes], bytes], damage: Damage) -> None:
    data = cases.random_case(1, WIDEST).plan.data
    ulearn.load(wrap(data))
    for what, broken in damage(data):
        refused(what, "plan", lambda broken=broken: ulearn.load(wrap(broken)))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_checkpoint(seed: int, damage: Damage, memory: Path) -> None:
    case, model = learned(memory, seed)
    path = memory / "checkpoint"
    model.save(str(path))
    data = path.read_bytes()
    saved = bytes(model.train_blob), bytes(model.state)
    train(model, case)
    before = bytes(model.train_blob), bytes(model.state), model.base_id, model.base_path
    for what, broken in damage(data):
        path.write_bytes(broken)
        refused(what, str(path), lambda: model.restore(str(path)))
        assert (bytes(model.train_blob), bytes(model.state), model.base_id, model.base_path) == before, what
        assert sorted(os.listdir(memory)) == ["checkpoint", "plan.ulm"], what
    path.write_bytes(data)
    model.restore(str(path))
    assert (bytes(model.train_blob), bytes(model.state)) == saved


def test_checkpoint_of_another_model_or_base(memory: Path) -> None:
    _, model = learned(memory, 1)
    _, other = learned(memory, 5, "other.ulm")
    path = str(memory / "checkpoint")
    other.save(path)
    before = contents(model, memory)
    refused("another model", path, lambda: model.restore(path))
    assert contents(model, memory) == before
    model.save(path)
    model.apply(model.update(1))
    before = contents(model, memory)
    refused("another base", path, lambda: model.restore(path))
    refused("missing", path + "2", lambda: model.restore(path + "2"))
    assert contents(model, memory) == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("as_file", [True, False])
def test_damaged_update(as_file: bool, seed: int, damage: Damage, memory: Path) -> None:
    case, model = learned(memory, seed)
    if not as_file:
        model = ulearn.load(case.plan.data)
        train(model, case)
    data = model.update(17)
    trained = bytes(model.train_blob)
    train(model, case)
    before = contents(model, memory)
    for what, broken in damage(data):
        refused(what, "update", lambda broken=broken: model.apply(broken))
        assert contents(model, memory) == before, what
    model.apply(data)
    assert bytes(model.train_blob) == trained
    assert model.base_id != before[2]
    # And a second time: it is counted from a base that is no longer the model's.
    after = contents(model, memory)
    refused("applied twice", "update", lambda: model.apply(data))
    assert contents(model, memory) == after


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_base_is_left_alone(seed: int, damage: Damage, memory: Path) -> None:
    # The base that was applied is gone with its file; the plan's own weights are whole, never a mixture.
    case, model = learned(memory, seed)
    plan = ulearn.load(case.plan.data)
    original, first_id = bytes(plan.train_blob), plan.base_id
    model.apply(model.update(1))
    applied, applied_id = bytes(model.train_blob), model.base_id
    base = memory / "plan.ulm.base"
    data = base.read_bytes()
    for what, broken in damage(data):
        base.write_bytes(broken)
        again = ulearn.load(model.path)
        assert (bytes(again.train_blob), again.base_id) == (original, first_id), what
        assert struct.unpack_from("<I", again.update(1), 48)[0] == sum(t[1] for t in _tensors(again)), what
    base.write_bytes(data)
    again = ulearn.load(model.path)
    assert (bytes(again.train_blob), again.base_id) == (applied, applied_id)


def _tensors(model: ulearn.Model) -> list[tuple[int, int, int]]:
    from ulearn.update import tensors

    return list(tensors(model.tensors))
