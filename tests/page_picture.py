"""The README's picture of a fleet's page, of a job that virtual boards carry out while a browser looks on.

    python tests/page_picture.py [docs/fleet_page.png]        (scikit-learn, Chromium; about half a minute)

Eight boards (the board's own code) learn digits of few classes each; one sends nonsense at times, one goes away.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import bench_selection
import browser
from small_fleet import SmallFleet
from ulearn_host.federation import web
from ulearn_host.fleet import Samples

NAMES = [f"hall-{i}" for i in range(1, 4)] + [f"roof-{i}" for i in range(1, 4)] + ["gate-1", "gate-2"]
ROUNDS, SHOWN, LEAVES = 30, 17, 12


def fleet(folder: Path) -> SmallFleet:
    """The job in the middle of round 18."""
    made = bench_selection.world(folder, 2, len(NAMES), 120, 1.0)
    parts = [(Samples(s.x[:80], s.y[:80]), Samples(s.x[80:], s.y[80:])) for s in made.boards]
    how = {"goal": 6, "over": 1.3, "quorum": 0.6, "learning_rate": 0.0015, "epochs": 4, "retry_s": 4.0, "stale": 1}
    how |= {"up": "int8", "down": "int8", "error_feedback": True}
    result = SmallFleet(folder, NAMES, ROUNDS, world=(made.plan, parts), name="digits at eight doors", **how)
    host = result.federation
    while host.commits() < SHOWN or not host.head["asked"]:
        for name in NAMES:
            if name != "roof-3" or host.commits() < LEAVES:
                result.turn(name)
        if host.commits() in (5, 11):
            host.submit("gate-2", b"uLUP" + bytes(60 + host.commits()), result.now)
    for name in NAMES[:-2]:
        if name != "roof-3":
            result.ask(name)
    for name in NAMES[:3]:
        result.turn(name)
    return result


def main() -> None:
    """Draw it."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "fleet_page.png")
    program = browser.find()
    if program is None:
        sys.exit(f"no Chromium: apt-get install {browser.PACKAGE}")
    with TemporaryDirectory() as folder:
        made = fleet(Path(folder))
        status = made.federation.status()
        made.close()
    with web.in_thread(lambda: status) as url, browser.started(program) as tab:
        tab.size(1200, 1080)
        tab.open(url)
        tab.wait(f"document.querySelectorAll('#boards-table tbody tr').length === {len(NAMES)}")
        tab.picture(path, whole=False)
    print(path)


if __name__ == "__main__":
    main()
