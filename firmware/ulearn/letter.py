# Letters: what a board and its host write to each other over a network, as the bodies of HTTP requests and replies.
#
#   request  head, MAC of the head, the content from `offset` on, MAC of head and whole content
#   reply    head, the content from `offset` on, MAC of head and whole content
#
# A MAC is HMAC-SHA256 with the secret of the board that the head names. The two magics keep the directions apart:
# no reply passes for a request. A session is the host's nonce for one connection, and in it counters rise; the reply
# repeats both. So the host knows whom it listens to before it keeps a byte, and content that broke off goes on where it
# ended, in another connection: its MAC is always that of the whole.
import struct

from .compat import const

REQUEST = b"uLRQ"
REPLY = b"uLRP"
VERSION = const(1)
# magic, version, kind, what, board, session, counter, nonce, job, round, offset, total
HEAD = "<4sBBH64s16sI16sIIII"
HEAD_BYTES = const(124)
BOARD_BYTES = const(64)
ID_BYTES = const(16)
PATH = "/ulearn/1"

# Kinds. `what` of a request: how many seconds the board can wait for the answer.
HELLO = const(1)  # session: the board's own nonce. The reply's content: SESSION
POLL = const(2)  # content: task.facts. The reply's: a task, for a training that `nonce`, `job`, `round` then tell of
DOWN = const(3)  # content: WANTED. The reply's: what leads to the last base, which its nonce is
UP = const(4)  # content: the answer to a task. The reply's: why it was refused, if it was
WHERE = const(5)  # how far did UP get? nonce and total tell of what. The reply's content: PLACE; or as UP's reply
CANNOT = const(6)  # content: why the task that `nonce` tells of cannot be carried out

# `what` of a reply.
DONE = const(0)
REFUSED = const(1)  # content: the reason
UPDATE = const(2)  # of DOWN: for model.apply
FULL = const(3)  # of DOWN: the trainable weights themselves
PARTIAL = const(4)  # of UP and WHERE: go on from the PLACE in the content

SESSION = "<16sH"  # the session, and for how many seconds the host keeps a poll at the most
SESSION_BYTES = const(18)
WANTED = "<16s16sI"  # the board's base id, the base that it has a part of (or zeros), the offset that it goes on from
WANTED_BYTES = const(36)
PLACE = "<I"
PLACE_BYTES = const(4)


def write(buffer, magic, kind, what, board, session, counter, nonce, job, turn, offset, total):
    # A head. `board`: bytes; they are padded with zeros.
    struct.pack_into(
        HEAD, buffer, 0, magic, VERSION, kind, what, board, session, counter, nonce, job, turn, offset, total
    )
