"""Who is there, and what they moved: what a host knows of its boards between two transactions, one entry a board."""

from __future__ import annotations

from dataclasses import dataclass

from ulearn_host.federation.facts import BoardFacts


@dataclass
class Seen:
    """When a board was last heard of, in seconds of the host's clock, and what it told of itself."""

    when_s: float
    facts: BoardFacts | None = None


@dataclass
class Moved:
    """Bytes and refusals of a board that no transaction has written down yet."""

    up: int = 0
    down: int = 0
    refused: int = 0


class Presence:
    """The boards that were heard of since the host was started. A restarted host waits until they ask again."""

    def __init__(self) -> None:
        """Nobody yet."""
        self._seen: dict[str, Seen] = {}
        self.moved: dict[str, Moved] = {}
        self._refused: dict[str, set[bytes]] = {}
        self._refused_in = 0

    def __len__(self) -> int:
        """How many were heard of, lately or not."""
        return len(self._seen)

    def asked(self, board: str, facts: BoardFacts, now: float) -> None:
        """A board wants a task."""
        self._seen[board] = Seen(now, facts)

    def touched(self, board: str, now: float) -> None:
        """A board was heard of; what it told before still holds."""
        before = self._seen.get(board)
        self._seen[board] = Seen(now, before.facts if before else None)

    def lost(self, board: str) -> None:
        """Its link broke: it is not there until it is heard of again."""
        self._seen.pop(board, None)

    def seen(self, board: str) -> Seen | None:
        """The last of a board."""
        return self._seen.get(board)

    def present(self, now: float, within_s: float) -> dict[str, BoardFacts]:
        """The boards heard of in the last seconds that have told of themselves, by name in order."""
        return {
            board: seen.facts
            for board, seen in sorted(self._seen.items())
            if seen.facts is not None and now - seen.when_s <= within_s
        }

    def refusals(self, board: str, turn: int) -> set[bytes]:
        """Hashes of what a board was refused in a round; of earlier rounds nothing is known any more."""
        if turn != self._refused_in:
            self._refused_in, self._refused = turn, {}
        return self._refused.setdefault(board, set())

    def move(self, board: str, up: int = 0, down: int = 0, refused: int = 0) -> None:
        """Count bytes and refusals."""
        moved = self.moved.setdefault(board, Moved())
        moved.up, moved.down, moved.refused = moved.up + up, moved.down + down, moved.refused + refused
