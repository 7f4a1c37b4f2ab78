# What a board keeps between two rounds of a job: two generations of each kind, in two files beside the plan, of which a
# round reads one and writes the other. So an attempt that is repeated finds what it found before, and power may fail at
# any moment. A plan that is no file has them in memory.
#
#   left   what the board's updates left out so far (error feedback: Seide et al. 2014, Karimireddy et al. 2019)
#   own    the last layer of its own, see personal.py
import os
import struct
from io import BytesIO

from .checkpoint import check, write
from .compat import const
from .safefile import candidates, exists, recover
from .update import payload_bytes

_TAG = "<4sIII"  # where a checkpoint has its base: "kept", job, round, zero
_MARK = b"kept"
_HEAD_BYTES = const(48)
_LEFT = "left"


def find(model, kind, size, job, first, last):
    # The slot of the newest generation of `size` bytes from rounds `first` to `last` of a job (None: of any), or -1.
    best, found = -1, -1
    for slot in (0, 1):
        tag = _tag(model, kind + str(slot), size)
        if tag and job in (None, tag[0]) and first <= tag[1] <= last and tag[1] > best:
            best, found = tag[1], slot
    return found


def _tag(model, name, size):
    # (job, round) of a generation that is whole and of this model, or None.
    if not model.path:
        job, round, data = (model.kept or {}).get(name, (0, 0, b""))
        return (job, round) if data and len(data) == size else None
    tags = []

    def of_use(place):
        length, state, model_id, tag = check(place)
        mark, job, round, zero = struct.unpack(_TAG, tag)
        if state or model_id != model.model_id or length != size or mark != _MARK or zero:
            raise ValueError("%s: nothing that %s has kept" % (place, model.name))
        tags.append((job, round))

    path = model.path + "." + name
    if any(exists(place) for place in candidates(path)) and recover(path, of_use):
        return tags[-1]
    return None


def reader(model, kind, slot):
    # A file at the first of its bytes.
    name = kind + str(slot)
    if not model.path:
        return BytesIO(model.kept[name][2])
    f = open(model.path + "." + name, "rb")
    f.seek(_HEAD_BYTES)
    return f


def keep(model, kind, slot, size, job, round, pieces):
    # A new generation of `size` bytes in a slot.
    name = kind + str(slot)
    if not model.path:
        if model.kept is None:
            model.kept = {}
        model.kept[name] = job, round, b"".join([bytes(piece) for piece in pieces])
        return
    write(model.path + "." + name, model.model_id, struct.pack(_TAG, _MARK, job, round, 0), pieces, b"", size)


def forget(model, kind, slots=(0, 1)):
    for slot in slots:
        name = kind + str(slot)
        if not model.path:
            (model.kept or {}).pop(name, None)
            continue
        for place in candidates(model.path + "." + name):
            if exists(place):
                os.remove(place)


def leftovers(model, table, job, round, committed):
    # For encodings.make: what opens the differences that were left out up to the round `committed`, the last one whose
    # update has reached the fleet (None: there are none), and what keeps those of `round`.
    size = payload_bytes(table)
    slot = find(model, _LEFT, size, job, committed, committed) if committed else -1

    def opened():
        return reader(model, _LEFT, slot)

    def kept(pieces):
        keep(model, _LEFT, 1 if slot == 0 else 0, size, job, round, pieces)

    return opened if slot >= 0 else None, kept
