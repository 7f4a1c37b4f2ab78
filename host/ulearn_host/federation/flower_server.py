"""The ServerApp: rounds of a Root over the gateways that Flower knows."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from ulearn_host.federation.root import Root

_LOOK_S = 0.25
_END_S = 60.0  # at most, for telling gateways that the job is over
_TOLD_TIMES = 3


def main(grid: Grid, context: Context) -> None:
    """The rounds of the job in `folder` that are left. Run configuration: folder; gateways: how many there must be to
    begin a round; timeout: seconds that a round waits for their answers; updates: have all updates passed up."""
    config = context.run_config
    timeout_s = float(config["timeout"])
    with closing(Root(Path(str(config["folder"])), updates=bool(config["updates"]))) as root:
        while not root.over:
            nodes = _nodes(grid, int(config["gateways"]))
            root.collect(_answers(grid, nodes, root.ask(), timeout_s), root.clock())
        told: list[bytes] = []
        for _ in range(_TOLD_TIMES):
            if len(told) < int(config["gateways"]):
                told = list(_answers(grid, grid.get_node_ids(), root.ask(), min(timeout_s, _END_S)))
        root.finish(len(told), root.clock())


def _nodes(grid: Grid, least: int) -> list[int]:
    """The gateways that are there, when there are enough."""
    while True:
        nodes = list(grid.get_node_ids())
        if len(nodes) >= least:
            return nodes
        time.sleep(_LOOK_S)


def _answers(grid: Grid, nodes: Iterable[int], body: bytes, timeout_s: float) -> Iterable[bytes]:
    """What the gateways say in time. Asked more often than Grid.send_and_receive asks, which takes 3 s each time."""
    content = RecordDict({"ulearn": ConfigRecord({"message": body})})
    open_ids = set(grid.push_messages([Message(content, dst_node_id=node, message_type="train") for node in nodes]))
    until = time.monotonic() + timeout_s
    while open_ids and time.monotonic() < until:
        for reply in grid.pull_messages(open_ids):
            open_ids.discard(reply.metadata.reply_to_message_id)
            if reply.has_content():
                yield reply.content["ulearn"]["message"]
        time.sleep(_LOOK_S)


app = ServerApp()
app.main()(main)
