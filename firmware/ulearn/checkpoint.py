# A checkpoint is model id, base id, trainable blob and STATE: a resumed run continues to the bit. The base that was
# last applied is a checkpoint without a STATE, beside the plan. SHA-256 closes both.
import struct
from hashlib import sha256

from .compat import const
from .safefile import candidates, exists, recover
from .safefile import write as write_safely

_MAGIC = b"uLCK"
_VERSION = const(1)
_HEADER = "<4sHHII16s16s"  # magic, version, zero, bytes of TRAIN, bytes of STATE, model id, base id
_HEADER_BYTES = const(48)
_HASH_BYTES = const(32)
_CHUNK = const(256)
_ID_BYTES = const(16)
_S_COUNTS = const(32)  # the fields of STATE that the plan decides: how many gains, gates, sizes, and where
_S_COUNTS_END = const(40)


def identity(model_id, train):
    # The base id: which trainable weights, of which model.
    digest = sha256(model_id)
    digest.update(train)
    return digest.digest()[:_ID_BYTES]


def base_id(model):
    digest = sha256(model.model_id)
    for chunk in base_chunks(model):
        digest.update(chunk)
    return digest.digest()[:_ID_BYTES]


class Base:
    # The base's trainable blob, read where it is asked for: from memory, from the base file or from the plan itself.
    def __init__(self, model):
        self.file = self.view = None
        if model.base is not None and not model.base_path:
            self.view = memoryview(model.base)
        else:
            self.path, self.offset = (
                (model.base_path, _HEADER_BYTES) if model.base_path else (model.path, model.base_place)
            )
            self.file = open(self.path, "rb")

    def into(self, at, view):
        # Allocates no room of its own.
        if not self.file:
            view[:] = self.view[at : at + len(view)]
            return
        self.file.seek(self.offset + at)
        if self.file.readinto(view) != len(view):
            raise ValueError("%s: cut short while it was in use" % self.path)

    def close(self):
        if self.file:
            self.file.close()


def base_chunks(model, size=_CHUNK):
    # The base's trainable blob, piece by piece.
    base, total = Base(model), len(model.train_blob)
    try:
        for at in range(0, total, size):
            chunk = bytearray(min(size, total - at))
            base.into(at, chunk)
            yield chunk
    finally:
        base.close()


def load_base(model):
    at = 0
    blob = memoryview(model.train_blob)
    for chunk in base_chunks(model):
        blob[at : at + len(chunk)] = chunk
        at += len(chunk)
    if model.own:
        from .personal import put_on

        put_on(model)


def write(path, model_id, base, train, state, size=None):
    # `train`: the pieces that together are the trainable blob, and `size` its bytes where they come only once. A STATE
    # makes it a checkpoint, none a base.
    def parts():
        digest = sha256()
        for part in pieces():
            digest.update(part)
            yield part
        yield digest.digest()

    def pieces():
        yield struct.pack(_HEADER, _MAGIC, _VERSION, 0, size, len(state), model_id, base)
        for part in train:
            yield part
        yield state

    def of_use(place):
        _, _, model, origin = check(place)
        if model != model_id or (state and origin != base):
            raise ValueError("%s: of another model or base" % place)

    if size is None:
        size = sum([len(part) for part in train])
    write_safely(path, parts(), of_use)


def check(path):
    # Raises ValueError unless the whole file is sound; returns its header's fields.
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        f.seek(0)
        head = f.read(_HEADER_BYTES)
        if len(head) != _HEADER_BYTES:
            raise ValueError("%s: cut short: %d bytes" % (path, size))
        fields = struct.unpack(_HEADER, head)
        magic, version, zero, train, state = fields[:5]
        if magic != _MAGIC:
            raise ValueError("%s: not a checkpoint (it does not begin with 'uLCK')" % path)
        if version != _VERSION or zero:
            raise ValueError("%s: checkpoint version %d, expected %d" % (path, version, _VERSION))
        if _HEADER_BYTES + train + state + _HASH_BYTES != size:
            raise ValueError("%s: %d bytes long, its header says %d" % (path, size, _HEADER_BYTES + train + state + 32))
        digest = sha256(head)
        left = train + state
        while left:
            chunk = f.read(min(left, _CHUNK))
            if not chunk:
                raise ValueError("%s: cut short while it was read" % path)
            digest.update(chunk)
            left -= len(chunk)
        if digest.digest() != f.read(_HASH_BYTES):
            raise ValueError("%s: damaged: its SHA-256 does not match" % path)
    return fields[3:]


def save(model, path):
    if model.base_path is None and model.path is None and model.base is None:
        raise ValueError("%s: the model has no base" % model.name)
    if path in (model.path, str(model.path) + ".base"):
        raise ValueError("%s: the plan lies there; save to another file" % path)
    write(path, model.model_id, model.base_id, (model.train_blob,), model.state)


def restore(model, path):
    # The committed checkpoint, or after a power loss whichever of the two files is whole. Nothing is half-restored.
    fault = None
    for candidate in candidates(path):
        if not exists(candidate):
            continue
        try:
            _restore(model, candidate)
            return
        except (OSError, ValueError) as e:
            fault = fault or e
    if fault:
        raise fault
    raise ValueError("%s: there is no such checkpoint" % path)


def _restore(model, path):
    train, state, model_id, base = check(path)
    if model_id != model.model_id:
        raise ValueError("%s: made with another model than %s" % (path, model.name))
    if (train, state) != (len(model.train_blob), len(model.state)):
        raise ValueError(
            "%s: holds %d + %d bytes, expected %d + %d" % (path, train, state, len(model.train_blob), len(model.state))
        )
    if base != model.base_id:
        raise ValueError("%s: made before the base that %s has was applied; save anew" % (path, model.name))
    with open(path, "rb") as f:
        f.seek(_HEADER_BYTES + train)
        fresh = f.read(state)
        same = fresh[_S_COUNTS:_S_COUNTS_END] == model.first_state[_S_COUNTS:_S_COUNTS_END]
        if not same or not any(fresh[:4]):
            raise ValueError("%s: its state does not fit the plan" % path)
        f.seek(_HEADER_BYTES)
        try:
            if f.readinto(model.train_blob) != train:
                raise ValueError("%s: cut short while it was read" % path)
        except (OSError, ValueError):
            load_base(model)  # no mixture
            raise
    model.state[:] = fresh


def adopt_base(model):
    # At load: take the base that was last applied. One that is damaged or of another model is left alone.
    path = model.path + ".base"
    found = []

    def of_use(place):
        train, state, model_id, base = check(place)
        if state or model_id != model.model_id or train != len(model.train_blob):
            raise ValueError("%s: not a base of %s" % (place, model.name))
        found.append(base)

    if recover(path, of_use):
        model.base_path = path
        model._base_id = found[-1]
        load_base(model)


def commit_base(model, chunks, base):
    # A new base beside the plan, then in memory; without a file, in memory alone.
    if model.path:
        path = model.path + ".base"
        write(path, model.model_id, base, chunks, b"")
        model.base_path = path
    else:
        model.base = b"".join(chunks)
    model._base_id = base
    load_base(model)
