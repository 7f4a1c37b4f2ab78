"""The model once more, from the plan and the accepted updates of the journal alone."""

from __future__ import annotations

from ulearn_host.errors import UserError
from ulearn_host.federation import advance
from ulearn_host.federation.core import Core
from ulearn_host.federation.machine import PARTS, contribution


def replay(core: Core) -> bytes:
    """The trainable blob after all committed rounds, one round in memory at a time.

    Raises UserError naming the first round whose base is not the one that was committed.
    """
    blob, held = advance.first_blob(core.plan), advance.start(core.job, core.plan)
    for row in core.journal.rows("SELECT round, base FROM models WHERE round > 0 ORDER BY round"):
        parts = [contribution(part) for part in core.journal.rows(PARTS, row["round"])]
        made = advance.advance(blob, parts, held, core.job, core.plan)
        if made.base_id != bytes(row["base"]):
            raise UserError(
                f"round {row['round']}: the journal's updates give base {made.base_id.hex()}, committed was "
                f"{row['base'].hex()}"
            )
        blob, held = made.blob, made.held
    return blob
