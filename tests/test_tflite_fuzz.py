"""Hostile .tflite files end in one sentence: never another exception, a hang, or much memory."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import test_fuzz
import tflite_models
import ulearn
from test_fuzz import described, execute, sessions_of
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.prepare import best_scheme
from ulearn_host.tflite_import import load_tflite

driver = test_fuzz.driver  # the core under sanitizers, in both ways to multiply
MUTATIONS = 10_000
SLOWEST_S = 5.0


def mutants(count: int) -> Iterator[tuple[str, bytes]]:
    """(kind and number, file): flipped bits, truncations, and 32-bit numbers replaced by hostile ones."""
    bases = [model for _, model in tflite_models.operator_models()][::4]
    bases += [tflite_models.random_model(seed) for seed in range(20)]
    hostile = (0, 1, 2, 4, 127, 255, 65535, 2**24, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 4)
    for i in range(count):
        rng = random.Random(i)
        data = bytearray(rng.choice(bases))
        kind = rng.choice(("bits", "bits", "number", "number", "short", "bytes"))
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            if kind == "bits":
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif kind == "number":
                at = 4 * rng.randrange(len(data) // 4)
                old = struct.unpack_from("<I", data, at)[0]
                value = rng.choice((*hostile, old + 1, old - 1, old * 2, old ^ 0x80000000, rng.getrandbits(32)))
                struct.pack_into("<I", data, at, value % 2**32)
            elif kind == "bytes":
                data[rng.randrange(len(data))] = rng.randrange(256)
        yield f"{kind} #{i}", bytes(data[: rng.randrange(len(data))] if kind == "short" else data)


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ulearn.Model]]:
    """The mutations that are not refused, as models; every other one is refused in one sentence."""
    path = tmp_path_factory.mktemp("mutants") / "mutant.tflite"
    refused = 0
    models = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in mutants(MUTATIONS):
        path.write_bytes(data)
        start = time.monotonic()
        try:
            network = load_tflite(path)
            plan = compile_plan(network, Options(best_scheme(network)))
        except UserError as refusal:
            assert "\n" not in str(refusal) and len(str(refusal)) > 10, name
            refused += 1
            continue
        except Exception as fault:
            raise AssertionError(f"{name}: {type(fault).__name__} instead of a UserError: {fault}") from fault
        finally:
            assert time.monotonic() - start < SLOWEST_S, name
        try:
            model = ulearn.load(plan.data)
        except ValueError as fault:
            # What only the verifier limits: a network of more work or memory than any board has.
            assert "too much work" in str(fault) or "buffer" in str(fault) or "elements" in str(fault), (name, fault)
            refused += 1
            continue
        models.append((name, model))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20, f"hostile files took {grown} KiB"
    assert refused > 1500 and len(models) > 1500, (refused, len(models))
    return models


def test_the_accepted_run_under_sanitizers(
    driver: Path, accepted: list[tuple[str, ulearn.Model]], tmp_path: Path
) -> None:
    """The core runs what the importer and the verifier let through, every byte beyond a buffer watched."""
    sessions, names = [], []
    for i, (name, model) in enumerate(accepted):
        for session in sessions_of(random.Random(i), model):
            sessions.append(session)
            names.append(name)
    answers, faults = execute(driver, sessions, tmp_path)
    assert not faults, described(faults, names)
    codes = [code for answer in answers for (code,) in struct.iter_unpack("<i", answer)]
    assert sum(code > 0 for code in codes) > 0.9 * len(codes)


@pytest.mark.parametrize("content", [b"", b"TFL3", b"\0" * 64, b"\x10\0\0\0TFL3" + b"\xff" * 200, b"PK\x03\x04" * 9])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """What is no .tflite at all."""
    path = tmp_path / "other.tflite"
    path.write_bytes(content)
    with pytest.raises(UserError, match="other.tflite: "):
        load_tflite(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    """The operating system's reason is passed on."""
    for path in (tmp_path / "none.tflite", tmp_path):
        with pytest.raises(UserError, match="expected a .tflite file"):
            load_tflite(path)
