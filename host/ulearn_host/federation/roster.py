"""The boards that a host has enrolled, whatever jobs they do: a folder with a card for each."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

from ulearn.hmac import MAC_BYTES
from ulearn_host.errors import UserError
from ulearn_host.federation import enrol
from ulearn_host.federation.certificate import Certificate
from ulearn_host.federation.published import publish

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


class Roster:
    """A fleet's folder. Cards hold secrets: they are readable to their owner alone."""

    def __init__(self, folder: Path) -> None:
        """The folder need not exist before a board is added."""
        self.folder = Path(folder)
        self._cards = self.folder / "cards"

    def add(self, board: str, host: str, port: int, identity: Certificate | None) -> bytes:
        """A card for a board, new or with the secret that it has; it is kept here and returned for the board.

        host, port: where the board will find this host. identity: None allows plain text. Raises UserError.
        """
        if not _NAME.fullmatch(board):
            raise UserError(f"board {board!r}: expected a name of 1 to 32 letters, digits, '.', '_' or '-'")
        card = enrol.card(board, self.secrets().get(board) or secrets.token_bytes(MAC_BYTES), host, port, identity)
        self._cards.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._cards / f"{board}.json"
        publish(path, card)
        os.chmod(path, 0o600)
        return card

    def secrets(self) -> dict[str, bytes]:
        """Each board's secret, by name. Raises UserError naming a card that is damaged."""
        found = {}
        for path in sorted(self._cards.glob("*.json")):
            try:
                card = json.loads(path.read_bytes())
                found[str(card["board"])] = bytes.fromhex(card["secret"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: no card of a board; remove it, and run ulearn enrol for that board") from None
        return found
