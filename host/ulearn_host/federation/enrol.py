"""Taking boards into a fleet: over USB a board is given its card, which says who it is and whom it may trust."""

from __future__ import annotations

import base64
import json
import secrets
import socket

from ulearn import letter
from ulearn.hmac import MAC_BYTES
from ulearn_host.errors import UserError
from ulearn_host.federation.certificate import NAME, Certificate
from ulearn_host.federation.rounds import Federation
from ulearn_host.link import Link

FILE = "fleet.json"


def card(board: str, secret: bytes, host: str, port: int, identity: Certificate | None) -> bytes:
    """The file that makes a board one of the fleet; whoever has it can speak as that board.

    host, port: where the board finds this host. identity: None allows plain text. Raises UserError.
    """
    if len(secret) != MAC_BYTES:
        raise UserError(f"board {board}: a secret of {len(secret)} bytes, expected {MAC_BYTES}")
    if not 1 <= len(board.encode()) <= letter.BOARD_BYTES:
        raise UserError(f"board {board!r}: expected a name of 1 to {letter.BOARD_BYTES} bytes")
    if not host or not 0 < port < 65536:
        raise UserError(f"{host!r} port {port}: expected an address that the boards can reach, and a port below 65536")
    fields = {
        "board": board,
        "secret": secret.hex(),
        "host": host,
        "port": port,
        "name": NAME,
        "certificate": base64.b64encode(identity.der).decode() if identity else None,
        "plain": identity is None,
    }
    return (json.dumps(fields) + "\n").encode()


def enrol(federation: Federation, board: str, host: str, port: int, identity: Certificate | None) -> bytes:
    """Take a board on the network into a fleet, with a new secret, or the one it has; returns its card."""
    secret = federation.secret(board) or secrets.token_bytes(MAC_BYTES)
    made = card(board, secret, host, port, identity)
    federation.enrol(board, secret, "network")
    return made


def over_serial(port: str, card: bytes, path: str = FILE) -> None:
    """Write a card to the board on a serial port, to which ulearn was deployed. Raises LinkError."""
    with Link.open(port) as link:
        link.file_put(path, card)


def own_address() -> str:
    """The address by which others in the local network reach this computer, as far as it knows. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: an address that is nobody's
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
