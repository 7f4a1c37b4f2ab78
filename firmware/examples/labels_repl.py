# As labels.py on the board: a digit typed at the prompt is the class of what follows, any other key ends it.
import select
import sys

_poll = select.poll()
_poll.register(sys.stdin, select.POLLIN)
_now = None


def label():
    global _now
    while _poll.poll(0):
        key = sys.stdin.read(1)
        _now = ord(key) - 48 if "0" <= key <= "9" else None
    return _now
