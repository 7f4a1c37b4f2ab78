"""What boards send and are sent: encodings against an independent one, feedback, last layers, the pull, fuzzing."""

from __future__ import annotations

import os
import random
import shutil
import struct
from binascii import crc32
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import branches
import rounds
import speakers
import training
import ulearn
from conftest import HERE, Device
from test_bits import FIRMWARE, micropython
from test_power_loss import DONE, child, stop_at_byte
from test_task import a_task
from test_trainer import plan
from ulearn import encodings, personal
from ulearn import task as tasks
from ulearn import update as wire
from ulearn.checkpoint import identity
from ulearn.feedback import find, reader
from ulearn.proximal import Pull
from ulearn_host import aggregate, emulate
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.fleet import PlanFacts
from ulearn_host.prepare import from_network, prepare
from ulearn_host.quantise import FloatDense
from ulearn_host.schemes import NAMED_SCHEMES
from ulearn_host.tflite_import import load_tflite

Values = NDArray[np.int64]
SMALLEST = 256  # bytes that an update of a thousand numbers may take


def wide_plan(folder: Path) -> str:
    """A last layer of 1,000 trained numbers in a file; its path."""
    rng = np.random.default_rng(3)
    layers = [FloatDense(rng.normal(size=(8, 124)) / 11, rng.normal(size=8) / 4, False)]
    path = folder / "wide.ulm"
    path.write_bytes(prepare(layers, rng.normal(size=(40, 124)), None, options=Options("last")).data)
    return str(path)


def scattered(model: ulearn.Model, seed: int, spread: float = 1.0) -> Values:
    """Weights a random distance from the base, a few of them far; the distances, in canonical order."""
    rng = np.random.default_rng(seed)
    model.reset()
    parts = []
    for dtype, count, offset in wire.tensors(model.tensors):
        kind = {1: "<i1", 2: "<i2", 3: "<i4"}[dtype]
        far = (20, 3000, 10**6)[dtype - 1] * spread * rng.random()
        moved = (rng.normal(size=count) * far * rng.choice([0.01, 0.1, 1], count)).astype(np.int64)
        stored = np.frombuffer(model.train_blob, kind, count, offset)
        limit = (127, 32767, 2**30 - 1)[dtype - 1]
        after = np.clip(stored + moved, -limit, limit)
        parts.append(after - stored.astype(np.int64))
        model.train_blob[offset : offset + after.astype(kind).nbytes] = after.astype(kind).tobytes()
    return np.concatenate(parts)


def spans(table: bytes) -> list[tuple[bool, slice]]:
    """Of each tensor, whether it holds biases, and where it is among all values."""
    result, at = [], 0
    for dtype, count, _ in wire.tensors(table):
        result.append((dtype == 3, slice(at, at + count)))
        at += count
    return result


def rounded(values: Values, wanted: Values, wide: bool) -> tuple[Values, int]:
    """int8 codes of one tensor's values by exact arithmetic, and their shift; `wanted`: which decide the shift."""
    top = int(np.abs(values[wanted]).max(initial=0))
    shift = next((s for s in range(24 if wide else 9) if (2 * top + 2**s) // 2 ** (s + 1) <= 127), 24 if wide else 9)
    return np.sign(values) * np.minimum(127, (2 * np.abs(values) + 2**shift) // 2 ** (shift + 1)), shift


def permutation(job: int, count: int) -> Values:
    """The order in which rounds of one value each send the places."""
    masks = [encodings.chosen(job, number, 1, count) for number in range(1, count + 1)]
    bits = [np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little") for mask in masks]
    assert all(b.sum() == 1 for b in bits)
    return np.array([int(b.argmax()) for b in bits])


def reference(values: Values, table: bytes, encoding: str, kept: int, job: int, number: int) -> Values:
    """What comes out at the other end."""
    count = len(values)
    sent = np.zeros(count, bool)
    if encoding == "random-k":
        first = (number - 1) * kept
        sent[permutation(job, count)[np.arange(first, first + min(kept, count)) % count]] = True
    elif encoding != "top-k":
        sent[:] = True
    codes, scaled = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for wide, span in spans(table):
        deciding = sent[span] if encoding == "random-k" else np.ones(span.stop - span.start, bool)
        codes[span], shift = rounded(values[span], deciding, wide)
        scaled[span] = codes[span] << shift
    if encoding == "top-k":
        order = np.argsort(-np.abs(codes), kind="stable")[:kept]
        sent[order[codes[order] != 0]] = True
    return np.where(sent, scaled, 0)


KINDS = [
    ("int8", 0),
    ("random-k", 1),
    ("random-k", 13),
    ("random-k", 65535),
    ("top-k", 1),
    ("top-k", 13),
    ("top-k", 999),
]


def dense_values(payload: bytes, model: ulearn.Model) -> Values:
    """What a dense payload holds."""
    head = struct.pack(
        wire.HEADER,
        *(wire.MAGIC, 1, wire.DENSE, 0, model.model_id, model.base_id, 1),
        *(sum(count for _, count, _ in wire.tensors(model.tensors)), 0, 16, 32, 0),
    )
    return aggregate.decode(sealed(head + payload), bytes(model.tensors)).values


def sealed(data: bytes) -> bytes:
    """An update with the length and the checksum that belong to it."""
    data = data[:8] + struct.pack("<I", len(data) + 4) + data[12:]
    return data + struct.pack("<I", crc32(data))


def encoded(model: ulearn.Model, encoding: str, kept: int, job: int = 5, number: int = 3, **more: Any) -> bytes:
    """The differences as they are now."""
    how = (aggregate.ENCODINGS[encoding], kept, job, number)
    return bytes(encodings.make(model, 12, more.pop("table", model.tensors), *how, **more))


# ---- Up --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "kept"), KINDS)
@pytest.mark.parametrize("weights", ["int16", "int8"])
def test_encoding_is_the_reference(encoding: str, kept: int, weights: str, tmp_path: Path) -> None:
    """Decoded, each is what exact arithmetic says; a board adds the same; what is left out is the rest, to the unit."""
    model = ulearn.load(plan(tmp_path, "full", weights))
    table = bytes(model.tensors)
    parts = spans(table)
    for seed in range(12):
        values = scattered(model, seed, spread=(0.0, 0.02, 1.0, 11.0)[seed % 4])
        pieces: list[bytes] = []
        data = encoded(model, encoding, kept, keep=lambda parts, pieces=pieces: pieces.extend(bytes(p) for p in parts))
        update = aggregate.decode(data, table)
        assert (update.num_samples, update.model_id, update.base_id) == (12, model.model_id, model.base_id)
        wanted = np.concatenate([np.clip(values[s], *((-(2**31), 2**31), (-32767, 32767))[not w]) for w, s in parts])
        assert update.saturated == np.count_nonzero(wanted != values)
        assert np.array_equal(update.values, reference(wanted, table, encoding, kept, 5, 3)), seed
        assert np.array_equal(dense_values(b"".join(pieces), model), wanted - update.values)
        assert len(data) <= aggregate.update_bytes(table, encoding, kept)
        changed = dict(encodings.changes(data, table))
        assert [changed.get(i, 0) for i in range(len(values))] == update.values.tolist()
        model.reset()
        ours, theirs = bytearray(model.train_blob), bytearray(model.train_blob)
        wire.add(ours, data, table)
        wire.add(theirs, aggregate.encode(update, table), table)
        assert ours == theirs or np.abs(update.values).max() > 32767


def test_every_place_has_its_turn() -> None:
    """n / k rounds send each place once; other jobs have other orders; neighbours do not go together."""
    for count, kept in ((300, 52), (7, 2), (1, 1), (256, 256), (100, 99)):
        turns = np.zeros(count, int)
        for number in range(1, count + 1):
            bits = np.unpackbits(np.frombuffer(encodings.chosen(9, number, kept, count), np.uint8), bitorder="little")
            assert bits.sum() == kept and not bits[count:].any()
            turns += bits[:count]
            assert np.all(turns == turns[0]) if number * kept % count == 0 else np.ptp(turns) <= 1
    orders = [permutation(job, 300) for job in range(20)]
    assert all(sorted(order) == list(range(300)) for order in orders)
    assert len({tuple(order) for order in orders}) == 20
    # Of a layer of 64 inputs each output's weights are drawn about evenly: within a few of the hypergeometric's.
    for job in range(50):
        mask = np.unpackbits(np.frombuffer(encodings.chosen(job, 1, 176, 768), np.uint8), bitorder="little")
        assert np.all(np.abs(mask.reshape(12, 64).sum(axis=1) - 176 / 12) <= 14)
        assert np.all(np.abs(mask.reshape(12, 64).sum(axis=0) - 176 / 64) <= 8)


def test_a_thousand_numbers_in_256_bytes(tmp_path: Path) -> None:
    """The sparse encodings with as many values as that takes, whatever the differences are."""
    model = ulearn.load(wide_plan(tmp_path))
    table = bytes(model.tensors)
    assert sum(count for _, count, _ in wire.tensors(table)) == 1000
    for encoding in ("random-k", "top-k"):
        kept = aggregate.most_kept(table, encoding, SMALLEST)
        assert kept == {"random-k": 178, "top-k": 89}[encoding]
        assert (
            aggregate.update_bytes(table, encoding, kept)
            <= SMALLEST
            < aggregate.update_bytes(table, encoding, kept + 1)
        )
        sizes = []
        for seed in range(20):
            scattered(model, seed)
            sizes.append(len(encoded(model, encoding, kept)))
        assert max(sizes) <= SMALLEST, sizes
    # The longest gaps that there can be.
    model.reset()
    for i in range(0, 1000, 1 + 1000 // 7):
        struct.pack_into("<h", model.train_blob, 2 * i, 1000)
    data = encoded(model, "top-k", 89)
    assert len(data) <= aggregate.update_bytes(table, "top-k", 7)
    assert aggregate.most_kept(table, "top-k", 70) == 0


def test_gaps_of_every_length() -> None:
    """Numbers in groups of 7 bits come back; cut short, too long or with groups to spare they are refused."""
    for value in (0, 1, 127, 128, 16383, 16384, 2**21 - 1, 2**32 - 1, 2**35 - 1):
        out = bytearray()
        encodings.put_groups(out, value)
        assert encodings._groups(out, 0) == (value, len(out))
        for wrong in (out[:-1], out[:-1] + bytes([out[-1] | 128]), bytes([out[0] | 128, 0]) if len(out) == 1 else b""):
            with pytest.raises(ValueError, match="a number"):
                encodings._groups(wrong, 0)


# ---- What is left out ------------------------------------------------------------------------------------------------


def memory_board(path: str) -> ulearn.Model:
    """A board whose plan is no file: it keeps all in memory."""
    return ulearn.load(Path(path).read_bytes())


@pytest.mark.parametrize("stored", ["file", "memory"])
@pytest.mark.parametrize(("encoding", "kept"), [("int8", 0), ("random-k", 9), ("top-k", 4)])
def test_nothing_is_lost(stored: str, encoding: str, kept: int, tmp_path: Path) -> None:
    """What the fleet has taken in and what the board still keeps come to all that training did in those rounds."""
    path = plan(tmp_path, "full")
    model = ulearn.load(path) if stored == "file" else memory_board(path)
    table = bytes(model.tensors)
    rng, total, taken, committed, losses = random.Random(4), 0, 0, 0, 0
    kind = {"encoding": aggregate.ENCODINGS[encoding], "kept": kept, "flags": tasks.FEEDBACK}
    for number in range(1, 13):
        task = a_task(model, round=number, seed=number, committed=committed, rate_exponent=-18, **kind)
        data = bytes(tasks.carry_out(model, training.store(model), task))
        difference = aggregate.decode(bytes(model.update(1)), table).values
        if stored == "file":
            model = ulearn.load(path)  # a reset
        if rng.random() < 0.5:  # an attempt that was not heard of
            again = bytes(tasks.carry_out(model, training.store(model), task))
            assert again == data
        if rng.random() < 0.3:
            losses += 1
            continue  # the update never reaches the fleet
        update = aggregate.decode(data, table)
        total, taken, committed = total + difference, taken + update.values, number
        mean = aggregate.encode(aggregate.fedavg([update]), table)
        model.apply(mean)
    assert losses > 1
    slot = find(model, "left", wire.payload_bytes(table), 7, committed, committed)
    with reader(model, "left", slot) as file:
        payload = file.read(wire.payload_bytes(table))
    kept_values = dense_values(payload, model)
    assert np.array_equal(total, taken + kept_values) and kept_values.any()


def test_committed_chooses_the_generation(tmp_path: Path) -> None:
    """With round 2 lost, round 3 starts from what round 1 left; another job from nothing."""
    kind = {"encoding": 3, "kept": 5, "flags": tasks.FEEDBACK}

    def after(folder: str, *course: tuple[int, int, int]) -> bytes:
        (tmp_path / folder).mkdir()
        model = ulearn.load(plan(tmp_path / folder, "full"))
        for job, number, committed in course:
            task = a_task(model, job=job, round=number, seed=number, committed=committed, **kind)
            data = tasks.carry_out(model, training.store(model), task)
        return bytes(data)

    kept = after("kept", (7, 1, 0), (7, 2, 1), (7, 3, 2))
    lost = after("lost", (7, 1, 0), (7, 2, 1), (7, 3, 1))
    never = after("never", (7, 1, 0), (7, 3, 1))
    fresh = after("fresh", (7, 3, 0))
    assert lost == never and len({kept, lost, fresh}) == 3
    assert after("other", (8, 1, 0), (8, 2, 1), (7, 3, 0)) == fresh
    # A generation that should be there and is not counts as nothing, not as an older one.
    assert after("gone", (7, 1, 0), (7, 3, 2)) == fresh


def test_power_fails_while_the_rest_is_kept(tmp_path: Path) -> None:
    """At any byte of what is written: the next attempt of the round has the bytes of one that was not disturbed."""
    path = plan(tmp_path, "full")
    model = ulearn.load(path)
    samples = training.store(model)
    flags = tasks.FEEDBACK | tasks.PERSONAL
    kind = {"encoding": 4, "kept": 5, "flags": flags}
    first = a_task(model, round=1, **kind)
    model.apply(tasks.carry_out(model, samples, first))
    second = a_task(model, round=2, seed=2, committed=1, **kind)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    whole = bytes(tasks.carry_out(model, samples, second))
    size = max(p.stat().st_size for p in tmp_path.iterdir() if p.name[-5:-1] in ("left", ".own"))

    def put(found: dict[str, bytes]) -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        for name, data in found.items():
            (tmp_path / name).write_bytes(data)

    ends = set()
    for at in (*range(0, size, 11), size):
        for kill in (False, True):
            put(files)
            board = ulearn.load(path)
            ends.add(
                child(stop_at_byte(at, kill), lambda board=board: tasks.carry_out(board, samples, second), lambda: True)
            )
            board = ulearn.load(path)
            assert bytes(tasks.carry_out(board, samples, second)) == whole, (at, kill)
    assert DONE in ends and len(ends) >= 3


# ---- Down ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["dense", "int8", "sparse"])
def test_down(encoding: str, tmp_path: Path) -> None:
    """A board and the host come to the same base; what an encoding leaves out is made up for in later rounds."""
    model = ulearn.load(plan(tmp_path, "full"))
    table = bytes(model.tensors)
    residual, exact, told_in_all = None, 0, 0
    for seed in range(6):
        model.reset()
        base = bytes(model.train_blob)
        values = scattered(model, seed, 0.3)
        values[np.random.default_rng(seed).random(len(values)) < 0.8] = 0
        update = aggregate.Update(model.model_id, model.base_id, 9, values)
        data, told, residual = aggregate.encode_down(update, table, encoding, residual)
        model.apply(data)
        expected = bytearray(base)
        wire.add(expected, aggregate.encode(told, table), table)
        assert model.train_blob == expected and model.base_id == identity(model.model_id, bytes(expected))
        exact, told_in_all = exact + values, told_in_all + told.values
        assert np.array_equal(exact, told_in_all + residual)
        assert residual.any() == (encoding == "int8")
        lengths = {e: len(aggregate.encode(update, table, e)) for e in ("dense", "int8", "sparse")}
        assert lengths["sparse"] < lengths["dense"] and lengths["int8"] < lengths["dense"]
    full = replace(update, values=scattered(model, 1))
    assert aggregate.encode(full, table, "sparse") == aggregate.encode(full, table)  # where it would not be shorter
    with pytest.raises(ValueError, match="top-k"):
        aggregate.encode(full, table, "top-k")


def test_extremes_of_int8(tmp_path: Path) -> None:
    """The largest differences there are do not leave the range of an exact sum."""
    model = ulearn.load(plan(tmp_path, "full"))
    table = bytes(model.tensors)
    for sign in (-1, 1):
        values = np.concatenate([np.full(s.stop - s.start, sign * 2**40) for _, s in spans(table)])
        update = aggregate.Update(model.model_id, model.base_id, 9, values)
        data, told, residual = aggregate.encode_down(update, table, "int8")
        assert np.abs(told.values).max() <= 2**31
        assert np.array_equal(values, told.values + residual)
        model.apply(data)


# ---- A last layer of one's own ---------------------------------------------------------------------------------------


def own_names(found: Any) -> set[str]:
    """The names of a compiled plan's tensors that are not shared."""
    count = len(personal.shared(table_of(found), found.programs[0].section)) // wire.TENSOR_BYTES
    return {t.name for t in found.tensors[count:]}


def table_of(found: Any) -> bytes:
    """The tensor table of a compiled plan."""
    from ulearn import plan as plan_file

    return bytes(plan_file.read(found.data).section(2))


def test_the_last_layer_is_found() -> None:
    """In random networks with branches, all rows trained, some of them or biases alone."""
    seen = 0
    for seed in range(150):
        found = branches.random_case(seed).plan
        last = found.network.layers[-1].name + "/"
        names = {t.name for t in found.tensors}
        own = {name for name in names if name.startswith(last)}
        if own and own != names:
            assert own_names(found) == own, seed
            seen += 1
        else:
            with pytest.raises(ValueError, match="own: the plan trains (all but it|nothing else)"):
                own_names(found)
    assert seen > 10


def test_the_last_layer_of_keywords(shared_data: Path) -> None:
    """Every scheme on a real network: weights and biases of the last layer, some rows of it, or its biases."""
    network = load_tflite(shared_data / speakers.MODEL_FILE)
    last = network.layers[-1].name
    for scheme in NAMED_SCHEMES:
        found = compile_plan(network, Options(scheme))
        if scheme == "last":
            with pytest.raises(ValueError, match="nothing else"):
                own_names(found)
        else:
            assert own_names(found) == {t.name for t in found.tensors if t.name.startswith(last)} != set()
    chosen = [(0, True)] * (len(network.layers) - 1)
    found = compile_plan(network, Options("sparse", selection=(*chosen, (6, True))))
    assert own_names(found) == {f"{last}/weights", f"{last}/bias", f"{last}/bias of frozen weights"}


def blob_parts(model: ulearn.Model) -> tuple[bytes, bytes]:
    """The weights of the shared layers, and those of the last one."""
    at = personal.begin(model)
    return bytes(model.train_blob[:at]), bytes(model.train_blob[at:])


@pytest.mark.parametrize("stored", ["file", "memory"])
def test_boards_agree_on_a_base_and_keep_their_last_layers(stored: str, tmp_path: Path) -> None:
    """Two boards with other samples: one base, two last layers, which neither updates, blobs nor resets take away."""
    boards = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        path = plan(tmp_path / str(i), "full")
        boards.append(ulearn.load(path) if stored == "file" else memory_board(path))
    table = bytes(boards[0].tensors)
    count = aggregate.shared_tensors(tmp_path / "0" / Path(path).name)
    start = blob_parts(boards[0])
    owns = [start[1], start[1]]
    for number in range(1, 4):
        datas = []
        for i, model in enumerate(boards):
            samples = training.store(model, 7, 3 * i)
            task = a_task(model, round=number, seed=number, flags=tasks.PERSONAL, committed=number - 1)
            data = bytes(tasks.carry_out(model, samples, task))
            owns[i] = blob_parts(model)[1]
            if stored == "file":
                model = boards[i] = ulearn.load(model.path)
                assert blob_parts(model)[1] == owns[i]
            # Repeated, it begins with the last layer that the round began with.
            assert bytes(tasks.carry_out(model, samples, task)) == data and blob_parts(model)[1] == owns[i]
            datas.append(data)
        assert owns[0] != owns[1]
        updates = [aggregate.decode(data, table, count) for data in datas]
        assert all(len(d) == aggregate.update_bytes(table, "dense", tensors=count) for d in datas)
        assert all(not u.values[sum(c for _, c, _ in wire.tensors(table[: 32 * count])) :].any() for u in updates)
        with pytest.raises(ValueError, match="expected all"):
            aggregate.decode(datas[0], table, 0)
        with pytest.raises(ValueError, match="without the last one"):
            aggregate.fedavg([updates[0], replace(updates[1], tensors=0)])
        mean = aggregate.encode(aggregate.fedavg(updates), table, ("dense", "int8", "sparse")[number - 1])
        for model, own in zip(boards, owns, strict=True):
            model.apply(mean)
            assert blob_parts(model)[1] == own
        assert boards[0].base_id == boards[1].base_id
        assert blob_parts(boards[0])[0] == blob_parts(boards[1])[0] != start[0]
    # The whole base, as a board that was away gets it.
    base = blob_parts(boards[0])[0] + start[1]
    assert identity(boards[0].model_id, base) == boards[0].base_id
    for model, own in zip(boards, owns, strict=True):
        tasks.replace(model, base, boards[0].base_id)
        model.reset()
        assert blob_parts(model) == (blob_parts(boards[0])[0], own)
    # Evaluated with it and without.
    model = boards[0]
    asked = {"kind": tasks.EVALUATE, "round": 3}
    with_own = tasks.carry_out(model, None, a_task(model, flags=tasks.PERSONAL, **asked), training.store(model, 9))
    without = tasks.carry_out(model, None, a_task(model, **asked), training.store(model, 9))
    assert with_own != without and blob_parts(model)[1] == owns[0]
    # Another job begins with the fleet's; one that trains all layers takes it over.
    other = a_task(model, job=8, flags=tasks.PERSONAL, rate_mantissa=0)
    tasks.carry_out(model, training.store(model), other)
    assert blob_parts(model)[1] == start[1]
    tasks.carry_out(boards[1], training.store(boards[1]), a_task(boards[1], job=9))
    boards[1].reset()
    assert blob_parts(boards[1])[1] == start[1] and not boards[1].own
    if stored == "file":
        assert not list((tmp_path / "1").glob("*.own*"))


def test_a_plan_without_a_last_layer_to_keep(tmp_path: Path) -> None:
    """Refused before anything is trained."""
    model = ulearn.load(plan(tmp_path, "last"))
    with pytest.raises(ValueError, match="trains nothing else"):
        tasks.carry_out(model, training.store(model), a_task(model, flags=tasks.PERSONAL))
    assert model.counters()[0] == 0


def test_a_plan_that_takes_anothers_place(tmp_path: Path) -> None:
    """Last layers kept for the old one are left alone; a file that is damaged is, too."""
    path = Path(plan(tmp_path, "full"))
    model = ulearn.load(str(path))
    tasks.carry_out(model, training.store(model), a_task(model, flags=tasks.PERSONAL))
    assert ulearn.load(str(path)).own
    kept = path.with_name(path.name + ".own0")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not ulearn.load(str(path)).own
    kept.write_bytes(whole)
    for scheme in ("last", "last+bias", "bias"):
        path.write_bytes(Path(plan(tmp_path, scheme)).read_bytes())
        model = ulearn.load(str(path))
        fresh = bytes(model.train_blob)
        model.reset()
        assert not model.own and model.train_blob == fresh


# ---- The pull towards the base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1, 20, 700, 30000, 65535])
def test_pull(strength: int, tmp_path: Path) -> None:
    """Distances shrink as (1 - strength)^steps, whatever their size, and never pass the base; files or memory."""
    for model in (ulearn.load(wide_plan(tmp_path)), memory_board(wide_plan(tmp_path))):
        model.reset()
        base = np.frombuffer(bytes(model.train_blob[:1984]), "<i2").astype(int)
        biases = np.frombuffer(bytes(model.train_blob[1984:]), "<i4").astype(int)
        moved = base.copy()
        moved[::2] += 40
        moved[1::2] -= 900
        model.train_blob[:1984] = moved.astype("<i2").tobytes()
        model.train_blob[1984:] = (biases + 10**8).astype("<i4").tobytes()
        told: list[tuple[int, int]] = []
        pull = Pull(
            model, bytes(model.tensors), strength, 40, lambda done, total, told=told: told.append((done, total))
        )
        for done in range(1, 41):
            pull(done, 80)
        pull.close()
        assert told == [(done, 80) for done in range(1, 41)]
        left = (1 - strength / 65536) ** 40
        after = np.frombuffer(bytes(model.train_blob[:1984]), "<i2").astype(int) - base
        for distances, was in ((after[::2], 40), (after[1::2], -900)):
            assert np.all(distances * np.sign(was) >= 0) and np.all(np.abs(distances) <= abs(was))
            assert abs(distances.mean() - was * left) <= 0.15 + 0.003 * abs(was)
            assert np.ptp(distances) <= 4  # rounding alone
        deep = np.frombuffer(bytes(model.train_blob[1984:]), "<i4").astype(int) - biases
        assert np.all(np.abs(deep / 1e8 - left) < 2e-3)


def test_pull_halves_with_the_rate(tmp_path: Path) -> None:
    """In the second epoch half as much is taken away; it is a part of a task."""
    model = ulearn.load(wide_plan(tmp_path))
    pull = Pull(model, bytes(model.tensors), 4096, 32)
    shares = [pull._share(epoch, 16) / 16384 for epoch in range(3)]
    pull.close()
    assert np.allclose(shares, [1 - (1 - 2.0 ** -(4 + epoch)) ** 16 for epoch in range(3)], atol=1e-4)
    distances = []
    for proximal in (0, 2000, 30000):
        task = a_task(model, proximal=proximal, epochs=5)
        update = aggregate.decode(bytes(tasks.carry_out(model, training.store(model, 40), task)), bytes(model.tensors))
        steps = PlanFacts(Path(model.path)).steps
        distances.append(float(np.linalg.norm(update.values * steps)))
    assert distances[0] > 1.05 * distances[1] > 1.05 * 1.05 * distances[2] > 0


# ---- Hostile bytes ---------------------------------------------------------------------------------------------------


def test_mutated_updates(tmp_path: Path) -> None:
    """Thousands, with checksums put right: each is refused in a sentence or is a sound update within its limits."""
    model = ulearn.load(plan(tmp_path, "full"))
    table = bytes(model.tensors)
    count = sum(c for _, c, _ in wire.tensors(table))
    scattered(model, 3)
    part = table[: 2 * wire.TENSOR_BYTES]
    seeds = [bytes(wire.make(model, 9)), bytes(wire.make(model, 9, part))]
    seeds += [encoded(model, encoding, kept) for encoding, kept in KINDS]
    seeds += [encoded(model, "top-k", 7, table=part), encoded(model, "random-k", 7, table=part)]
    some = scattered(model, 4)
    some[::3] = 0
    seeds.append(aggregate.encode(aggregate.Update(model.model_id, model.base_id, 9, some), table, "sparse"))
    assert struct.unpack_from("<H", seeds[-1], 6)[0] == encodings.SPARSE
    limits = np.concatenate([np.full(s.stop - s.start, 2**31 if wide else 32768) for wide, s in spans(table)])
    rng, refused, sound = random.Random(1), 0, 0
    for _ in range(4000):
        data = bytearray(rng.choice(seeds)[:-4])
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.choice((rng.randrange(64), rng.randrange(len(data)), 6, rng.randrange(48, 64), 64, 65, 66))
            what = rng.randrange(4)
            if what == 0:
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            elif what == 1:
                data[min(at, len(data) - 1)] = rng.choice((0, 1, 2, 3, 4, 5, 127, 128, 255))
            elif what == 2:
                del data[max(64, at) : max(64, at) + rng.randrange(1, 4)]
            else:
                data[max(64, at) : max(64, at)] = rng.randbytes(rng.randrange(1, 4))
        data = sealed(bytes(data)) if rng.random() < 0.9 else bytes(data)
        try:
            update = aggregate.decode(data, table)
        except ValueError as fault:
            refused += 1
            assert str(fault).startswith("update: "), fault
            continue
        sound += 1
        assert len(update.values) == count and np.all(np.abs(update.values) <= limits)
        ours = bytearray(model.train_blob)
        wire.add(ours, data, table)
    assert refused > 1000 and sound > 500, (refused, sound)


@pytest.mark.parametrize(
    ("encoding", "change", "fault"),
    [
        ("int8", lambda p: p[:-1], "values in"),
        ("int8", lambda p: b"\x0a" + p[1:], "shifted by 10"),
        ("int8", lambda p: p[:-1] + b"\x80", "-128"),
        ("random-k", lambda p: p[:4] + bytes(4) + p[8:], "no round"),
        ("random-k", lambda p: p + b"\0", "values in"),
        ("top-k", lambda p: p[:-1] + b"\x7f", "at place"),
        ("top-k", lambda p: p[:-1] + b"\xff", "cut short"),
        ("top-k", lambda p: p[:-1] + b"\x80\0", "more groups"),
        ("top-k", lambda p: p + b"\0", "behind the last gap"),
    ],
)
def test_faults_are_named(encoding: str, change: Any, fault: str, tmp_path: Path) -> None:
    model = ulearn.load(plan(tmp_path, "full"))
    scattered(model, 3)
    data = encoded(model, encoding, 5)
    wrong = sealed(data[: wire.HEADER_BYTES] + change(data[wire.HEADER_BYTES : -4]))
    with pytest.raises(ValueError, match=fault):
        wire.parse(wrong, bytes(model.tensors))


# ---- Boards ----------------------------------------------------------------------------------------------------------


def here(path: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of tests/device/rounds.py under CPython."""
    capsys.readouterr()
    rounds.main(path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rounds.KINDS) * (len(rounds.COURSE) + 1)
    return lines


def test_unix_port_has_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds in every encoding on the Unix port, which keeps its own files."""
    for module in emulate.NATIVE_MODULES:
        shutil.copy(emulate.find_native("x64", module=module), tmp_path)
    for loss in ("softmax_ce", "mse"):
        wanted = here(plan(tmp_path, "full", loss=loss), capsys)
        (tmp_path / loss).mkdir()
        path = plan(tmp_path / loss, "full", loss=loss)
        code = f"import rounds; rounds.main({path!r})"
        lines = micropython(emulate.find_micropython(), tmp_path, [tmp_path, FIRMWARE, HERE / "device"], code)
        assert lines == wanted


def test_cortex_m0_has_the_same_bits(cortex_m0: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same on an emulated Cortex-M0 with an RP2040's heap."""
    path = plan(tmp_path, "full")
    cortex_m0.put(Path(path), HERE / "device" / "rounds.py", HERE / "device" / "training.py")
    lines = cortex_m0.fresh(f"import rounds; rounds.main({os.path.basename(path)!r})")
    assert lines == here(path, capsys)


def test_keywords_on_a_cortex_m0(cortex_m0: Device, shared_data: Path, tmp_path: Path) -> None:
    """There, whatever is sent of the keyword network's last layer costs less than three more training steps."""
    path = tmp_path / "kws.ulm"
    network = load_tflite(shared_data / speakers.MODEL_FILE)
    path.write_bytes(from_network(network, options=Options("last")).data)
    cortex_m0.put(path, HERE / "device" / "rounds.py", HERE / "device" / "training.py")
    for job in (1, 3, 5):
        line = cortex_m0.fresh(f"import rounds; rounds.cost('kws.ulm', {job})")[-1]
        whole, alone = (int(us) / 1000 for us in line.split()[1:])
        print(f"{rounds.KINDS[job - 1]}: {whole - alone:.1f} million instructions beside {alone:.1f} of 7 steps")
        assert 0 < whole - alone < 3 * alone / 7
