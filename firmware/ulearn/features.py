# Split training: in place of an update a board sends the activations of a few chosen samples at a cut, with their
# targets. Whoever has activations can guess at the samples, so the board's owner must have agreed.
import struct
from array import array
from binascii import crc32

from .compat import const

MAGIC = b"uLFE"
VERSION = const(1)
# magic, version, cut, encoding, job, round, model id, base id, samples in all, samples sent, bytes of a target, of
# features; then of each sample its target and its features, and a CRC-32
HEADER = "<4sBBHII16s16sIHHH"
HEADER_BYTES = const(58)
CLUSTERS = const(5)  # encodings beside those of updates: of each class the samples in the middle of clusters
RANDOM = const(6)  # samples by chance
_CUT_BYTES = const(48)
_NAME_BYTES = const(16)
_ROUNDS = const(3)  # of moving the clusters' middles


def make(model, samples, task, progress=None):
    # The answer to a task of kind FEATURES: task.kept samples chosen as task.encoding says, at the plan's last cut, or
    # task.proximal cuts before it. Leaves the model at its base. progress(samples seen, samples in all) after each.
    if not getattr(model, "gives_features", False):
        raise ValueError(
            "task: it asks for activations, from which samples can be guessed; whoever owns %s allows it with "
            "model.gives_features = True" % model.name
        )
    count = len(samples) if samples is not None else 0
    if not count:
        raise ValueError("task: there is no sample to choose from")
    if not task.kept or task.encoding not in (CLUSTERS, RANDOM):
        raise ValueError("task: %d samples in encoding %d, expected encoding 5 or 6" % (task.kept, task.encoding))
    cut, size = _cut(model, task.proximal)
    model.reset()
    kept = min(task.kept, count)
    if task.encoding == RANDOM:
        chosen = _order(count, task.seed)[:kept]
    else:
        chosen = choose(_all(model, samples, cut, size, progress), size, _groups(model, samples), kept)
    t = model.target_bytes
    out = bytearray(HEADER_BYTES + kept * (t + size) + 4)
    ids = (task.encoding, task.job, task.round, model.model_id, model.base_id)
    struct.pack_into(HEADER, out, 0, MAGIC, VERSION, task.proximal, *(ids + (count, kept, t, size)))
    at, targets = HEADER_BYTES, samples.targets
    for i in sorted(chosen):
        out[at : at + t] = targets[i * t : (i + 1) * t]
        out[at + t : at + t + size] = model.features(samples.x(i), cut)
        at += t + size
    struct.pack_into("<I", out, at, crc32(memoryview(out)[:at]) & 0xFFFFFFFF)
    return out


def _cut(model, back):
    # Name and size of the cut that is so many before the last.
    at = len(model.cuts) - _CUT_BYTES * (back + 1)
    if at < 0:
        raise ValueError("task: cut %d from the end, %s has %d" % (back, model.name, len(model.cuts) // _CUT_BYTES))
    name = bytes(model.cuts[at : at + _NAME_BYTES]).rstrip(b"\0").decode()
    return name, struct.unpack_from("<I", model.cuts, at + 24)[0]


def _all(model, samples, cut, size, progress):
    # The features of every sample as numbers from 0 on.
    count = len(samples)
    try:
        store = bytearray(count * size)
    except MemoryError:
        raise ValueError("task: no room for the features of %d samples; ask for samples by chance" % count)
    at = 0
    for i in range(count):
        for byte in model.features(samples.x(i), cut):
            store[at] = byte ^ 128
            at += 1
        if progress:
            progress(i + 1, count)
    return store


def _groups(model, samples):
    # The indices of each class's samples, the largest class first; of a regression one group.
    if not model.labelled:
        return [range(len(samples))]
    groups = {}
    for i in range(len(samples)):
        groups.setdefault(samples.target(i), []).append(i)
    return [groups[label] for label in sorted(groups, key=lambda label: (-len(groups[label]), label))]


def _order(count, seed):
    from .fitting import shuffle

    order = array("H", range(count))
    shuffle(order, seed & 0xFFFF)
    return order


def choose(store, size, groups, kept):
    # `kept` indices: of each group the same number, as far as it has so many, each the one next to the middle of a
    # cluster. `store`: features of all samples, `size` bytes each.
    shares = [0] * len(groups)
    while kept:
        for g in range(len(groups)):
            if kept and shares[g] < len(groups[g]):
                shares[g] += 1
                kept -= 1
    chosen = []
    for g in range(len(groups)):
        if shares[g] == len(groups[g]):
            chosen.extend(groups[g])
        elif shares[g]:
            chosen.extend(_clusters(store, size, groups[g], shares[g]))
    return chosen


def _clusters(store, size, group, count):
    # k-means (Lloyd 1982) from far points (Gonzalez 1985) on; then of each middle the nearest sample not yet taken.
    middles = [_mean(store, size, group)]
    nearest = [_distance(store, i * size, middles[0], size) for i in group]
    middles = [_at(store, size, group[nearest.index(min(nearest))])]
    nearest = [_distance(store, i * size, middles[0], size) for i in group]
    while len(middles) < count:
        middles.append(_at(store, size, group[nearest.index(max(nearest))]))
        for n in range(len(group)):
            nearest[n] = min(nearest[n], _distance(store, group[n] * size, middles[-1], size))
    for _ in range(_ROUNDS):
        members = [[] for _ in range(count)]
        for i in group:
            apart = [_distance(store, i * size, middle, size) for middle in middles]
            members[apart.index(min(apart))].append(i)
        middles = [_mean(store, size, members[m]) if members[m] else middles[m] for m in range(count)]
    left, chosen = list(group), []
    for middle in middles:
        apart = [_distance(store, i * size, middle, size) for i in left]
        chosen.append(left.pop(apart.index(min(apart))))
    return chosen


def _at(store, size, i):
    return store[i * size : (i + 1) * size]


def _mean(store, size, group):
    half, mean = len(group) // 2, bytearray(size)
    for j in range(size):
        total = half
        for i in group:
            total += store[i * size + j]
        mean[j] = total // len(group)
    return mean


def _distance(store, at, middle, size):
    # Squared.
    total = 0
    for j in range(size):
        d = store[at + j] - middle[j]
        total += d * d
    return total
