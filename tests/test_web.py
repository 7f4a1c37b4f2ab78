"""The page that shows a fleet: over real HTTP, in a real browser, of a real job."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import browser
from browser import Tab
from conftest import ON_DEBIAN
from small_fleet import SmallFleet
from ulearn_host.errors import UserError
from ulearn_host.federation import web

HOSTILE = (
    "<img src=x onerror=\"window.pwned='tag'\">",
    "<script>window.pwned='script'</script>",
    "\"><svg onload=window.pwned='svg'>",
    "javascript:window.pwned='url'",
    "{{7*7}} ${7*7} &amp; \u202egnp.exe \x1b[2J \0",
    "__proto__",
    "x" * 400,
)
SHOWN = [re.sub("[\u202e\x1b\0]", "\N{REPLACEMENT CHARACTER}", text) for text in HOSTILE]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    """A page in the browser. On Debian its absence is a failure: the setup should have installed it."""
    program = browser.find()
    if program is None:
        if not ON_DEBIAN:
            pytest.skip("not a Debian system, and no Chromium: the page cannot be looked at")
        pytest.fail(f"no Chromium: apt-get install {browser.PACKAGE}")
    with browser.started(program) as tab:
        yield tab


@pytest.fixture
def page(tab: Tab) -> Iterator[Tab]:
    """The same, of a usual size, that must have found nothing to complain about and fetched nothing from elsewhere."""
    tab.size(1280, 900)
    tab.faults.clear()
    tab.asked.clear()
    yield tab
    asked = [url for url in tab.asked if not url.startswith(("http://127.0.0.1:", "about:"))]
    tab.open("about:blank")
    assert tab.faults == [] and asked == []


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[SmallFleet]:
    """Six boards, two rounds of four done."""
    made = SmallFleet(tmp_path, 6, 4)
    made.run(2)
    yield made
    made.close()


@contextmanager
def shown(fleet: SmallFleet, **how: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """The page's address while it is served, and what puts the newest status there."""
    latest = web.Latest(fleet.federation.status())
    with web.in_thread(latest.get, **how) as url:
        yield url, lambda: latest.put(fleet.federation.status())


def ask(url: str, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    """One request, its answer read."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    answer = connection.getresponse()
    answer.body = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


def made_up(boards: list[str], rounds: int = 6, **other: Any) -> dict[str, Any]:
    """A status with these boards."""
    one = {"link": "virtual", "state": "idle", "seen_s": 3.0, "samples": 40, "rounds": rounds, "refused": 1}
    one |= {"bytes_up": 2000, "bytes_down": 3000, "step_us": 900}
    history = [
        {"round": r, "state": "abandoned" if r == 3 else "committed", "updates": 5, "asked": 6, "late": 1, "refused": 0}
        | {"bytes_up": 900 + r, "bytes_down": 1500, "accuracy": None if r == 3 else 0.5 + r / (3 * rounds)}
        | {"seconds": 2.5, "base_id": f"{r:032x}", "reason": "too few" if r == 3 else None}
        for r in range(1, rounds + 1)
    ]
    words = {"name": "made up", "plan": "/secret/place/plan.ulm", "rule": "mean", "up": "dense", "down": "full"}
    return {
        "job": words | {"rounds": 2 * rounds, "goal": 5, "selection": "random"},
        **{"round": rounds + 1, "state": "collect", "deadline_s": 60.0, "asked": 6, "received": 2},
        **{"model": {"base_id": f"{rounds:032x}", "parent": f"{rounds - 1:032x}"}, "accuracy_before": 0.3},
        "boards": [
            one | {"id": name, "accuracy": [[r, 0.4 + r / (3 * rounds) + i / 1000] for r in range(rounds + 1)]}
            for i, name in enumerate(boards)
        ],
        "history": history,
        "refused": [{"time": 1.8e9 + i, "board": name, "reason": f"no: {name}"} for i, name in enumerate(boards)],
        **other,
    }


# What goes over the line


def test_every_answer_has_the_headers(fleet: SmallFleet) -> None:
    """Pages, data, errors: nothing from elsewhere, no frame, no cache, no other type."""
    with shown(fleet) as (url, _):
        for method, path, code in (
            *(("GET", f"/{name}", 200) for name in ("", "page.css", "page.js", "charts.js", "status.json", "icon.svg")),
            *(("GET", "/index.html", 404), ("GET", "/../web.py", 404), ("GET", "/%2e%2e/web.py", 404)),
            *(("POST", "/status.json", 405), ("DELETE", "/", 405)),
        ):
            answer = ask(url, path, method)
            assert answer.status == code, path
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Access-Control-Allow-Origin"] is None


def test_no_secret_and_no_place_is_told(tmp_path: Path) -> None:
    """Neither a board's secret nor where the job lies, in no form."""
    fleet = SmallFleet(tmp_path, 4, 2)
    secrets = {name: bytes(range(i, 16 + i)) for i, name in enumerate(fleet.boards)}
    for name, secret in secrets.items():
        fleet.federation.enrol(name, secret, "virtual")
    fleet.run()
    with shown(fleet) as (url, _):
        body = ask(url, "/status.json").body  # type: ignore[attr-defined]
    fleet.close()
    assert json.loads(body)["job"]["plan"] == "plan.ulm"
    assert str(tmp_path).encode() not in body
    for secret in secrets.values():
        assert secret not in body and secret.hex().encode() not in body


def test_small_groups_figures_are_not_told(tmp_path: Path) -> None:
    """Three boards, four are needed: no accuracy in what goes out, pooled or not; with three needed there is."""
    for least, told in ((4, False), (3, True)):
        fleet = SmallFleet(tmp_path / str(least), 3, 2, min_group=least)
        fleet.run()
        with shown(fleet) as (url, _):
            status = json.loads(ask(url, "/status.json").body)  # type: ignore[attr-defined]
        fleet.close()
        figures = [h["accuracy"] for h in status["history"]] + [status["accuracy_before"]]
        assert all((figure is not None) == told for figure in figures)
        assert all(bool(board["accuracy"]) == told for board in status["boards"])


def test_unchanged_is_not_sent_again(fleet: SmallFleet) -> None:
    """A tag that stays while the status does; packed where the browser takes it."""
    with shown(fleet) as (url, renew):
        first = ask(url, "/status.json", Accept_Encoding="gzip")
        body = first.body  # type: ignore[attr-defined]
        assert first.headers["Content-Encoding"] == "gzip"
        assert json.loads(gzip.decompress(body))["round"] == 3
        tag = first.headers["ETag"]
        again = ask(url, "/status.json", If_None_Match=tag)
        assert (again.status, again.body) == (304, b"")  # type: ignore[attr-defined]
        fleet.run(3)
        renew()
        assert wait_for(lambda: ask(url, "/status.json", If_None_Match=tag).status == 200)


def wait_for(what: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether it becomes true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.05)
    return False


def test_status_is_asked_seldom(fleet: SmallFleet) -> None:
    """However many look on; and what it raises is told."""
    calls = []

    def status() -> dict[str, Any]:
        calls.append(1)
        if len(calls) > 1:
            raise UserError("the disk is full; make room")
        return fleet.federation.status()

    with web.in_thread(status) as url:
        assert all(ask(url, "/status.json").status == 200 for _ in range(20))
        assert len(calls) == 1
        assert wait_for(lambda: ask(url, "/status.json").status == 503)
        assert json.loads(ask(url, "/status.json").body)["error"] == "the disk is full; make room"  # type: ignore[attr-defined]


def test_a_token_opens(fleet: SmallFleet) -> None:
    """By address once, then by a cookie that does not tell it; as a Bearer; nothing else."""
    with shown(fleet, token="sesame 1/2") as (url, _):
        for path in ("/", "/status.json", "/page.js", "/?token=", "/?token=sesame", "/status.json?token=%C3%28%00"):
            answer = ask(url, path)
            assert answer.status == 401 and b"sesame" not in answer.body  # type: ignore[attr-defined]
        assert ask(url, "/", Authorization="Bearer sesame").status == 401
        assert ask(url, "/", Cookie="ulearn-00000000=1").status == 401
        assert ask(url, "/status.json", Authorization="Bearer sesame 1/2").status == 200
        opened = ask(url, f"/?{urlsplit(url).query}")
        assert (opened.status, opened.headers["Location"]) == (303, "/")
        cookie = opened.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "sesame" not in cookie
        assert ask(url, "/status.json", Cookie=cookie.partition(";")[0]).status == 200


def test_another_sites_name_is_refused(fleet: SmallFleet) -> None:
    """Without a token, a name that somebody else could point here; with one it does not matter."""
    with shown(fleet) as (url, _):
        port = urlsplit(url).port
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", "[::1]", f"[::1]:{port}"):
            assert ask(url, "/", Host=host).status == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            assert ask(url, "/", Host=host).status == 403
    with shown(fleet, token="sesame") as (url, _):
        assert ask(url, "/", Host="fleet.example", Authorization="Bearer sesame").status == 200


def test_where_it_listens(fleet: SmallFleet) -> None:
    """Not on the network without a token; not on a port that is taken."""
    with pytest.raises(UserError, match=r"0\.0\.0\.0: anybody there could look at the fleet; give a token"):
        shown(fleet, host="0.0.0.0").__enter__()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: .*give another port"):
            shown(fleet, port=port).__enter__()
    assert web.address("::1", 80, "t") == "http://[::1]:80/?token=t"


def test_lines_are_thinned() -> None:
    """Evenly, first and last kept; short ones stay."""
    points = [[r, 0.5] for r in range(1000)]
    few = [r for r, _ in web.thinned(points, 100)]
    assert len(few) == 100 and few[0] == 0 and few[-1] == 999
    assert {b - a for a, b in zip(few, few[1:], strict=False)} <= {10, 11}
    assert web.thinned(points[:100], 100) == points[:100]


# What is seen


def test_the_page_follows_a_job(page: Tab, fleet: SmallFleet) -> None:
    """Figures as the host has them, and new ones without a reload."""
    with shown(fleet) as (url, renew):
        page.open(url)
        page.wait("document.querySelectorAll('#boards-table tbody tr').length === 6")
        page.value("window.same = true")
        for rounds in (2, 3, 4):
            fleet.run(rounds if rounds < 4 else None)
            renew()
            status = fleet.federation.status()
            page.wait(f"document.querySelectorAll('#rounds-table tbody tr').length === {rounds}")
            last = [h["accuracy"] for h in status["history"] if h["accuracy"] is not None][-1]
            page.wait(f"document.querySelector('#accuracy').textContent === '{100 * last:.1f} %'")
        assert page.value("window.same")
        assert page.value("document.querySelector('#job').textContent") == "small fleet"
        assert page.value("document.querySelector('#state').textContent") == "done"
        assert page.value("document.querySelector('#live').dataset.state") == "live"
        assert page.value("document.querySelectorAll('#accuracy-chart .line').length") == 7
        assert page.value("document.querySelectorAll('#bytes-chart rect').length") == 8
        shown_rounds = page.value(
            "[...document.querySelectorAll('#rounds-table tbody tr')].map(r => [...r.children].map(c => c.textContent))"
        )
        history = status["history"]
        assert [row[0] for row in shown_rounds] == ["4", "3", "2", "1"]
        assert [row[2] for row in shown_rounds] == [h["base_id"][:8] for h in reversed(history)]
        assert [row[3] for row in shown_rounds] == [h["base_id"][:8] for h in reversed(history[:-1])] + ["the plan"]
        table = page.value(
            "[...document.querySelectorAll('#boards-table tbody tr')].map(r => [...r.children].map(c => c.textContent))"
        )
        for row, board in zip(table, status["boards"], strict=True):
            assert row[0] == board["id"] and row[3] == f"{100 * board['accuracy'][-1][1]:.1f} %"
            assert (row[5], row[6]) == (str(board["rounds"]), str(board["samples"]))
        assert page.value("document.querySelector('#refused-empty').hidden") is False


def test_a_refused_update_is_seen(page: Tab, fleet: SmallFleet) -> None:
    """A board's reason, as the host gave it."""
    fleet.federation.submit("board-3", b"nonsense", fleet.now)
    reason = fleet.federation.status()["refused"][-1]["reason"]
    with shown(fleet) as (url, _):
        page.open(url)
        row = page.wait("document.querySelector('#refused-table tbody tr')?.innerText")
        assert "board-3" in row and reason in row
        assert page.value("document.querySelector('#refused-count').textContent") == "1"


def test_a_host_that_is_gone(page: Tab, fleet: SmallFleet) -> None:
    """It says so, keeps its figures, and goes on when the host is back; after the job's end it is no alarm."""
    with shown(fleet) as (url, _):
        page.open(url)
        page.wait("document.querySelector('#live').dataset.state === 'live'")
        assert page.value("document.querySelector('#banner').hidden")
    port = urlsplit(url).port
    page.wait("!document.querySelector('#banner').hidden")
    text = page.value("document.querySelector('#banner').textContent")
    assert text.startswith("The host does not answer.") and "The figures are from" in text
    assert page.value("document.querySelector('#banner').getAttribute('role')") == "alert"
    assert page.value("document.querySelectorAll('#boards-table tbody tr').length") == 6
    fleet.run()
    with shown(fleet, port=port):
        page.wait("document.querySelector('#banner').hidden && document.querySelector('#state').textContent === 'done'")
    page.wait("!document.querySelector('#banner').hidden")
    assert "The job is done and its host has ended" in page.value("document.querySelector('#banner').textContent")
    assert page.faults and all("ERR_CONNECTION_REFUSED" in fault for fault in page.faults)
    page.faults.clear()


def test_another_key(page: Tab, fleet: SmallFleet) -> None:
    """The page opened by its address; a host that was started with another token does not know it."""
    with shown(fleet, token="one") as (url, _):
        page.open(url)
        page.wait("document.querySelectorAll('#boards-table tbody tr').length === 6")
        assert page.value("location.search") == ""
    with shown(fleet, token="two", port=urlsplit(url).port):
        page.wait("document.querySelector('#banner').textContent.includes('know this page')")
    page.faults.clear()


def test_hostile_texts_are_text(page: Tab) -> None:
    """Whatever boards are called and reasons say: it is shown, and nothing of it runs."""
    status = made_up(list(HOSTILE))
    for key in ("name", "plan", "rule", "up", "down", "selection"):
        status["job"][key] = HOSTILE[0]
    for board, name in zip(status["boards"], HOSTILE, strict=True):
        board["link"] = name
    status["history"][2]["reason"] = HOSTILE[2]
    with web.in_thread(lambda: status) as url:
        page.open(url)
        page.wait(f"document.querySelectorAll('#boards-table tbody tr').length === {len(HOSTILE)}")
        names = page.value("[...document.querySelectorAll('#boards-table tbody th')].map(c => c.textContent)")
        assert sorted(names) == sorted(SHOWN)
        reasons = page.value(
            "[...document.querySelectorAll('#refused-table tbody td:last-child')].map(c => c.textContent)"
        )
        assert sorted(reasons) == sorted(f"no: {name}" for name in SHOWN)
        assert page.value("document.querySelector('#job').textContent") == HOSTILE[0]
        page.value("document.querySelectorAll('#legend button').forEach(b => { b.focus(); b.click() })")
        assert page.value("document.querySelectorAll('img, main script, main iframe, [onload], [onerror]').length") == 0
        assert page.value("window.pwned") is None and page.value("({}).accuracy") is None
        page.size(360, 740)
        assert page.value("document.documentElement.scrollWidth") <= 360


CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (c) => c.slice(0, 3).reduce((sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const poor = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(rgba(ink)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${walk.currentNode.data.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return poor;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_light_dark_narrow(page: Tab, dark: bool) -> None:
    """Every text stands out (WCAG 2, 4.5 : 1) in both schemes; no width makes the page wider than the window."""
    names = [f"board-{i}" for i in range(12)]
    status = made_up(names)
    for board, state in zip(status["boards"], ("training", "idle", "late", "gone", "refused") * 3, strict=False):
        board["state"] = state
    with web.in_thread(lambda: status) as url:
        page.size(1280, 900, dark)
        page.open(url)
        page.wait("document.querySelectorAll('#boards-table tbody tr').length === 12")
        assert page.value(CONTRAST) == []
        paper = page.value("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(244, 246, 248)") != dark
        for width in (1600, 1280, 1000, 800, 620, 480, 360, 320):
            page.size(width, 800, dark)
            assert page.value("document.documentElement.scrollWidth") <= width
            charts = page.value(
                "[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().width)"
            )
            assert len(charts) == 2 and all(200 < w <= width for w in charts)


def test_what_a_screen_reader_is_told(page: Tab, fleet: SmallFleet) -> None:
    """Every image, button, table, bar and region has a name; headings begin at one and skip no level."""
    with shown(fleet) as (url, _):
        page.open(url)
        page.wait("document.querySelectorAll('#boards-table tbody tr').length === 6")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    seen = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]
    roles = {role for role, _ in seen}
    assert {"image", "button", "table", "region", "heading", "columnheader", "rowheader"} <= roles
    named = ("image", "button", "table", "region", "heading", "progressbar", "progressIndicator", "link")
    nameless = [role for role, name in seen if role in named and not name.strip()]
    assert nameless == []
    label = next(name for role, name in seen if role == "image" and name.startswith("Accuracy over rounds"))
    assert "6 boards between" in label and "%" in label
    levels = page.value("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and set(levels[1:]) == {2}
    assert page.value("document.documentElement.lang") == "en"


def test_the_keyboard_reads_the_chart(page: Tab) -> None:
    """Arrow keys go from round to round, and each is said."""
    with web.in_thread(lambda: made_up(["a", "b"], 6)) as url:
        page.open(url)
        page.wait("!!document.querySelector('#accuracy-chart svg')")
        page.value("document.querySelector('#accuracy-chart svg').focus()")
        for words in ("Round 0: pooled 30.0 %, b 40.1 %, a 40.0 %", "Round 1: pooled 55.6 %, b 45.7 %, a 45.6 %"):
            page.key("ArrowRight")
            assert page.value("document.querySelector('#news').textContent") == words
        assert "Round 1" in page.value("document.querySelector('#tip').innerText")
        page.key("Escape")
        assert page.value("document.querySelector('#tip').hidden")


def test_boards_are_sorted(page: Tab) -> None:
    """By a click on a column's head, and back; the order stays when new figures come."""
    status = made_up([f"board-{i}" for i in (10, 9, 2, 1)])
    for board, seen in zip(status["boards"], (5.0, 1.0, None, 3.0), strict=True):
        board["seen_s"] = seen
    names = "[...document.querySelectorAll('#boards-table tbody th')].map(c => c.textContent.slice(6)).join()"
    head = "[...document.querySelectorAll('#boards-table thead button')].find(b => b.textContent === '%s').click()"
    with web.in_thread(lambda: status) as url:
        page.open(url)
        page.wait("document.querySelectorAll('#boards-table tbody tr').length === 4")
        assert page.value(names) == "1,2,9,10"
        page.value(head % "Accuracy")
        assert page.value(names) == "1,2,9,10"
        assert page.value("document.querySelector('th[aria-sort=descending]').textContent") == "Accuracy"
        page.value(head % "Accuracy")
        assert page.value(names) == "10,9,2,1"
        page.value(head % "Seen")
        assert page.value(names) == "10,1,9,2"
        status["boards"].append(status["boards"][0] | {"id": "board-7", "seen_s": 4.0})
        page.wait("document.querySelectorAll('#boards-table tbody tr').length === 5")
        assert page.value(names) == "10,7,1,9,2"


def test_a_large_fleet_is_drawn_quickly(page: Tab) -> None:
    """300 boards over 500 rounds, all of them shown: no answer keeps the page busy for two seconds."""
    status = made_up([f"board-{i}" for i in range(300)], 500)
    with web.in_thread(lambda: status) as url:
        page.open(url)
        page.wait("document.querySelectorAll('#boards-table tbody tr').length === 300")
        assert page.value("document.querySelectorAll('#accuracy-chart .line').length") == 301
        assert page.value("document.querySelectorAll('#rounds-table tbody tr').length") == 20
        page.value("document.querySelector('#all-rounds').click()")
        assert page.value("document.querySelectorAll('#rounds-table tbody tr').length") == 500
        page.value(
            "window.long = []; new PerformanceObserver((list) => window.long.push(...list.getEntries()"
            ".map((e) => e.duration))).observe({ type: 'longtask' })"
        )
        for received in (3, 4):
            status["received"] = received
            page.wait(f"document.querySelector('#received').textContent.startsWith('{received} of')")
        longest = page.value("Math.max(0, ...window.long)")
        assert longest < 2000, f"{longest} ms in one piece"
