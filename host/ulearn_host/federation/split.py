"""Split training: boards send activations of a few chosen samples, the host trains what lies above the cut.

After Shi and Radu 2022, "Data selection for efficient model update in federated learning": of each class a board keeps
the samples in the middle of clusters of its activations and sends those alone. They reduce the activations by principal
components before k-means; boards (ulearn.features) cluster them as they are, in integers.
"""

from __future__ import annotations

import struct
from binascii import crc32
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulearn import features as wire
from ulearn import plan as plan_file
from ulearn import task as tasks
from ulearn_host import numbers as n
from ulearn_host.errors import UserError
from ulearn_host.fleet import PlanFacts

WARNING = (
    "split training sends activations of single samples with their labels: whoever holds the network can guess at the "
    "samples themselves (model inversion), which no sum over boards hides; use federated rounds where that matters"
)
WAYS: Mapping[str, int] = {"features": wire.CLUSTERS, "random-features": wire.RANDOM}  # encodings of what goes up


@dataclass(frozen=True)
class Features:
    """A board's answer. samples: how many it chose from. x: int8 codes at the cut, [sent, numbers]; y: labels, uint16
    [sent], or of a regression int8 codes [sent, outputs]. cut: how many cuts before the plan's last."""

    job: int
    round: int
    model_id: bytes
    base_id: bytes
    cut: int
    samples: int
    x: NDArray[np.int8]
    y: NDArray[Any]

    def __len__(self) -> int:
        return len(self.x)


def ask(kept: int, way: str = "features", cut: int = 0, **fields: Any) -> bytes:
    """A task that asks for `kept` samples, in one of WAYS, at the cut that is so many before the plan's last.

    fields: job, round, model_id, base_id, nonce, seed as task.make has them.
    """
    data: bytes = tasks.make(kind=tasks.FEATURES, encoding=WAYS[way], kept=kept, proximal=cut, **fields)
    return data


def parse(data: bytes, plan: PlanFacts) -> Features:
    """A board's answer, checked against the plan. Raises UserError naming the fault."""
    if len(data) < wire.HEADER_BYTES + 4:
        raise UserError(f"features: cut short: {len(data)} bytes")
    head = struct.unpack_from(wire.HEADER, data)
    magic, version, cut, way, job, turn, model_id, base_id, samples, sent, target, size = head
    if magic != wire.MAGIC:
        raise UserError("features: they do not begin with 'uLFE', expected a board's activations")
    if version != wire.VERSION:
        raise UserError(f"features: version {version}, expected {wire.VERSION}; deploy ulearn on the board anew")
    if way not in WAYS.values():
        raise UserError(f"features: encoding {way}, expected one of {', '.join(map(str, WAYS.values()))}")
    if len(data) != wire.HEADER_BYTES + sent * (target + size) + 4:
        raise UserError(f"features: {len(data)} bytes, expected {sent} samples of {target + size} bytes")
    if struct.unpack_from("<I", data, len(data) - 4)[0] != crc32(data[:-4]):
        raise UserError("features: damaged: their checksum does not match; ask the board again")
    if model_id != plan.model_id:
        raise UserError(f"features: of another model than {plan.path}")
    wanted = 2 if plan.labelled else plan.outputs
    if target != wanted or not 1 <= sent <= samples:
        raise UserError(
            f"features: {sent} of {samples} samples with targets of {target} bytes, expected 1 or more with {wanted}"
        )
    rows = np.frombuffer(data, np.uint8, sent * (target + size), wire.HEADER_BYTES).reshape(sent, target + size)
    y: NDArray[Any] = np.ascontiguousarray(rows[:, :target]).view(np.uint16 if plan.labelled else np.int8)
    if plan.labelled:
        y = y.ravel()
        if int(y.max()) >= plan.outputs:
            raise UserError(f"features: a label {int(y.max())}, expected 0 to {plan.outputs - 1}")
    x = np.ascontiguousarray(rows[:, target:]).view(np.int8)
    return Features(job, turn, model_id, base_id, cut, samples, x, y)


def together(answers: Sequence[Features]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """x and y of all boards. Raises UserError unless all are of one base and one cut."""
    if not answers:
        raise UserError("no board has sent features; expected one or more")
    kinds = {(a.model_id, a.base_id, a.cut, a.x.shape[1]) for a in answers}
    if len(kinds) != 1:
        raise UserError("features of different bases or cuts; ask all boards for those of the base they have now")
    return np.concatenate([a.x for a in answers]), np.concatenate([a.y for a in answers])


def longest(plan: PlanFacts, kept: int) -> int:
    """Bytes of an answer with so many samples, at any cut."""
    cuts = bytes(plan_file.read(str(plan.path)).section(n.SECTION_CUTS))
    sizes = [struct.unpack_from("<I", cuts, at + n.C_LENGTH)[0] for at in range(0, len(cuts), n.CUT_BYTES)]
    target = 2 if plan.labelled else plan.outputs
    return int(wire.HEADER_BYTES) + kept * (target + max(sizes, default=0)) + 4
