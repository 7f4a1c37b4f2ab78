"""A fleet on loopback for tests: boards on the Unix port, each a process, and a line to their host that fails."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from conftest import ON_DEBIAN
from ulearn_host import emulate
from ulearn_host.federation import certificate, enrol
from ulearn_host.federation.rounds import Federation
from ulearn_host.fleet import PlanFacts

HERE = Path(__file__).parent
FIRMWARE = HERE.parent / "firmware"
HOST = "127.0.0.1"


def data(plan: Path, seed: int, count: int) -> bytes:
    """Labelled samples that cluster by class, target first, as boards keep them."""
    facts = PlanFacts(plan)
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(5).integers(-60, 60, (facts.outputs, facts.inputs))
    out = b""
    for label in rng.integers(0, facts.outputs, count):
        x = np.clip(middles[label] + rng.integers(-50, 50, facts.inputs), -128, 127).astype(np.int8)
        out += struct.pack("<H", label) + x.tobytes()
    return out


def enrolled(
    federation: Federation, folder: Path, plan: Path, count: int, port: int, plain: bool = False
) -> list[Path]:
    """The folders of so many boards, with plan, samples and card."""
    identity = None if plain else certificate.ensure(federation.folder)
    folders = []
    for i in range(count):
        name = f"board-{i:02d}"
        place = folder / name
        place.mkdir()
        (place / "m.ulm").write_bytes(plan.read_bytes())
        (place / "train.bin").write_bytes(data(plan, i, 8 + i % 5))
        (place / "test.bin").write_bytes(data(plan, 1000 + i, 6))
        (place / "fleet.json").write_bytes(enrol.enrol(federation, name, HOST, port, identity))
        folders.append(place)
    return folders


class Board:
    """A running board."""

    def __init__(self, folder: Path, **more: object) -> None:
        """Start it, or start it again. more: keywords of ulearn.wifi.join."""
        if not ON_DEBIAN:
            pytest.skip("not a Debian system: the board cannot be built")
        self.folder = folder
        code = f"import fleet_member; fleet_member.main(**{more!r})"
        environment = {**os.environ, "MICROPYPATH": f"{FIRMWARE}:{HERE / 'device'}"}
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(emulate.find_micropython(user_module=True)), "-X", "heapsize=256k", "-c", code],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.folder / "log").read_text(errors="replace")

    def said(self, word: str) -> str:
        """The rest of the last line that begins with a word; '' for none."""
        lines = [line for line in self.log.splitlines() if line.startswith(word + " ")]
        return lines[-1][len(word) + 1 :] if lines else ""

    def end(self) -> None:
        """Cut its power."""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Faults:
    """What happens to an answer, the bytes that a host sends at once after TLS has begun: lost: share that never come,
    with the connection; cut: share of which only the beginning comes; late: share that comes later, by late_s at the
    most and by much less mostly. flip: share of pieces, both ways, with a bit that is another."""

    seed: int = 0
    lost: float = 0.0
    cut: float = 0.0
    late: float = 0.0
    late_s: float = 1.0
    flip: float = 0.0


class Line:
    """A TCP proxy on loopback, in a thread of its own, that does to answers what its faults say. counts: of each."""

    def __init__(self, to: Callable[[], int], faults: Faults) -> None:
        """to(): the port of the host, asked for every connection. The proxy's own is `port`."""
        self._to, self._faults = to, faults
        self._random = random.Random(faults.seed)
        self.counts = {"answers": 0, "lost": 0, "cut": 0, "late": 0, "flipped": 0, "up": 0, "down": 0}
        self.cut_up: int | None = None  # the connection that brings this byte, of all that go up, ends there; once
        self.frozen = False  # answers wait, and no connection ends
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, HOST, 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End every connection and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(10):  # a host that was killed is there again in a moment, and boards would wait longer than that
            try:
                there, back = await asyncio.open_connection(HOST, self._to())
                break
            except OSError:
                await asyncio.sleep(0.05)
        else:
            writer.transport.abort()
            return
        up = asyncio.ensure_future(self._pass(reader, back))
        down = asyncio.ensure_future(self._answers(there, writer))
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down):
                task.cancel()
            for end in (writer, back):
                end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(4096):
                self.counts["up"] += len(piece)
                cut = self.cut_up
                if cut is not None and self.counts["up"] >= cut:
                    self.cut_up = None
                    writer.write(piece[: len(piece) - (self.counts["up"] - cut)])
                    await writer.drain()
                    await asyncio.sleep(0.1)
                    return
                writer.write(self._flipped(piece))
                await writer.drain()
        except OSError:
            pass

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        faults, draw = self._faults, self._random.random
        try:
            while piece := await reader.read(65536):
                self.counts["down"] += len(piece)
                while self.frozen:
                    await asyncio.sleep(0.05)
                if piece[0] not in (0x14, 0x16):  # TLS records of a handshake
                    self.counts["answers"] += 1
                    fate = draw()
                    if fate < faults.lost:
                        self.counts["lost"] += 1
                        return
                    if fate < faults.lost + faults.cut:
                        self.counts["cut"] += 1
                        writer.write(piece[: int(len(piece) * draw())])
                        await writer.drain()
                        return
                    if fate < faults.lost + faults.cut + faults.late:
                        self.counts["late"] += 1
                        await asyncio.sleep(draw() ** 3 * faults.late_s)
                writer.write(self._flipped(piece))
                await writer.drain()
        except OSError:
            pass

    def _flipped(self, piece: bytes) -> bytes:
        if self._random.random() >= self._faults.flip:
            return piece
        self.counts["flipped"] += 1
        changed = bytearray(piece)
        changed[self._random.randrange(len(piece))] ^= 1 << self._random.randrange(8)
        return bytes(changed)
