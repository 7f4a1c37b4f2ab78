"""The ClientApp in front of a gateway: it hands what Flower brings to the gateway on its host, and the answer back.

Flower starts a process for every message; the gateway, which owns the boards, stays. Where it listens stands in the
SuperNode's configuration: --node-config 'gateway="/path/to/folder/gateway.sock"'.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Client

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

PATIENCE_S = 60.0  # for a gateway that is being started again
LARGEST = 1 << 30


def train(message: Message, context: Context) -> Message:
    """One round. Raises OSError, which Flower reports, where no gateway answers."""
    answer = _asked(str(context.node_config["gateway"]), message.content["ulearn"]["message"])
    return Message(RecordDict({"ulearn": ConfigRecord({"message": answer})}), reply_to=message)


def _asked(address: str, request: bytes) -> bytes:
    """The gateway's answer. It gives the same one as often as it is asked, so whatever breaks is tried again."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            with Client(address, "AF_UNIX") as gateway:
                until = time.monotonic() + PATIENCE_S
                gateway.send_bytes(request)
                return gateway.recv_bytes(LARGEST)
        except (OSError, EOFError):
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


app = ClientApp()
app.train()(train)
