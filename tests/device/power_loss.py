# Cuts the power under a save and an apply, at every write and erase of a block device with a real file system on it.
#
#   micropython power_loss.py plan.ulm lfs2|fat
#
# Prints a line for every way to fail, and FAULT lines for what a board must never see; tests/test_power_loss.py reads
# them. Faults, from the n-th write or erase on: once (it alone raises OSError), dead (it and all that follow raise),
# cut (it and all that follow never happen, and nobody says so), torn (as cut, but half of the n-th is done).
import gc
import struct
import sys

import vfs

import ulearn

_BLOCK = 512
_BLOCKS = 96
_EIO = OSError(5)
_MODES = ("once", "dead", "cut", "torn")
_MODEL = "/fs/plan.ulm"
_CHECKPOINT = "/fs/checkpoint"


class Device:
    # Flash: erasing sets all bits of a block, writing at an offset can only clear them; whole blocks are erased first.
    # Nothing here allocates: a file that could not be closed is closed by the collector, under a locked heap.
    def __init__(self, image=None):
        self.image = bytearray(image) if image else bytearray(b"\xff" * (_BLOCK * _BLOCKS))
        self.disarm()

    def arm(self, at, mode):
        self.count, self.at, self.mode = 0, at, mode

    def disarm(self):
        self.count, self.at, self.mode = 0, 1 << 30, None

    def granted(self, size):
        # How many bytes of the operation that comes now are really done.
        self.count += 1
        if self.count < self.at or (self.mode == "once" and self.count > self.at):
            return size
        if self.mode in ("once", "dead"):
            raise _EIO
        return size // 2 if self.mode == "torn" and self.count == self.at else 0

    def readblocks(self, block, buf, offset=0):
        image, at = self.image, block * _BLOCK + offset
        for i in range(len(buf)):
            buf[i] = image[at + i]

    def writeblocks(self, block, buf, offset=None):
        image, at = self.image, block * _BLOCK + (offset or 0)
        for i in range(self.granted(len(buf))):
            image[at + i] = buf[i] if offset is None else image[at + i] & buf[i]

    def ioctl(self, op, arg):
        if op == 4:
            return _BLOCKS
        if op == 5:
            return _BLOCK
        if op == 6:
            image, at = self.image, arg * _BLOCK
            for i in range(self.granted(_BLOCK)):
                image[at + i] = 255
        return 0


class Board:
    # A device with its file system mounted and the model loaded, as after a reset.
    def __init__(self, kind, image, checkpoint):
        self.device = Device(image)
        vfs.mount(kind(self.device), "/fs")
        try:
            self.model = ulearn.load(_MODEL, lambda *_: 0)
            if checkpoint:
                self.model.restore(_CHECKPOINT)
        except Exception:
            vfs.umount("/fs")
            raise

    def weights(self):
        return bytes(self.model.train_blob) + bytes(self.model.state)

    def learn(self, value):
        m = self.model
        for i in range(len(m.train_blob)):
            m.train_blob[i] = value
        struct.pack_into("<II", m.state, 0, value, value)

    def off(self):
        self.device.disarm()
        image = bytes(self.device.image)
        vfs.umount("/fs")  # what it still writes is not on the image any more
        return image


def save(board):
    board.model.save(_CHECKPOINT)


def apply(board):
    board.model.apply(board.model.update(1))


def first_image(kind, plan, work):
    device = Device()
    kind.mkfs(device)
    vfs.mount(kind(device), "/fs")
    with open(_MODEL, "wb") as f:
        f.write(plan)
    vfs.umount("/fs")
    board = Board(kind, device.image, False)
    board.learn(0x11)
    work(board)
    return board.off()


def attempt(kind, image, work, value, at, mode):
    # Learns, saves with a fault at the n-th operation; returns (image, None, or "n" where nothing was refused,
    # operations, weights before, weights after).
    board = Board(kind, image, work is save)
    if work is apply:
        struct.pack_into("<II", board.model.state, 0, 1, 0)
    before = board.weights()
    board.learn(value)
    after = board.weights() if work is save else bytes(board.model.train_blob)
    if work is apply:
        before = before[: len(board.model.train_blob)]
    board.device.arm(at, mode)
    refused = False
    try:
        work(board)
    except (OSError, ValueError):
        refused = True
    count = board.device.count
    return board.off(), refused, count, before, after


def found(kind, image, work):
    # What the board comes back with.
    board = Board(kind, image, work is save)
    weights = board.weights() if work is save else bytes(board.model.train_blob)
    board.off()
    return weights


def judge(kind, image, work, before, after, what):
    # 0: the weights before, 1: those after; None and a line where it is neither.
    try:
        weights = found(kind, image, work)
    except Exception as e:
        print("FAULT", what, "neither:", type(e).__name__, e)
        return None
    if weights == after:
        return 1
    if weights == before:
        return 0
    print("FAULT", what, "a mixture, or weights of an older time")
    return None


def ways(kind, image, work, value, what):
    # Every n in every mode; returns the images that were left, each once.
    left = {}
    for mode in _MODES:
        tally = [0, 0, 0]  # previous, new, faults
        at = 0
        while True:
            at += 1
            image2, refused, count, before, after = attempt(kind, image, work, value, at, mode)
            if count < at:
                break
            place = "%s %s at %d" % (what, mode, at)
            which = judge(kind, image2, work, before, after, place)
            if which == 0 and not refused and mode in ("once", "dead"):
                print("FAULT", place, "reported done, and is not")
                which = None
            tally[2 if which is None else which] += 1
            if which is not None:
                left[image2] = place
            gc.collect()
        print("%s %s: %d operations, %d previous, %d new, %d faults" % ((what, mode, at - 1) + tuple(tally)))
    # Without a fault it must work.
    image2, refused, _, before, after = attempt(kind, image, work, value, 1 << 30, "once")
    if refused or judge(kind, image2, work, before, after, what + " whole") != 1:
        print("FAULT", what, "refused without a fault")
    return left


def again(kind, left, work, value, what):
    # A second power cut, on every image that the first one left.
    tally = [0, 0, 0]
    for image in left:
        at = 0
        while True:
            at += 1
            image2, _, count, before, after = attempt(kind, image, work, value, at, "cut")
            if count < at:
                break
            which = judge(kind, image2, work, before, after, "%s again, cut at %d after: %s" % (what, at, left[image]))
            tally[2 if which is None else which] += 1
        gc.collect()
    print("%s again: %d images, %d previous, %d new, %d faults" % ((what, len(left)) + tuple(tally)))


def main(plan, name):
    kind = vfs.VfsLfs2 if name == "lfs2" else vfs.VfsFat
    with open(plan, "rb") as f:
        plan = f.read()
    for work in (save, apply):
        what = name + " " + ("save" if work is save else "apply")
        image = first_image(kind, plan, work)
        left = ways(kind, image, work, 0x22, what)
        again(kind, left, work, 0x33, what)


main(*sys.argv[1:])
