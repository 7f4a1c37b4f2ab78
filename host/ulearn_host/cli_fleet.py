"""The commands of a fleet: `ulearn federate`, `ulearn enrol` and `ulearn audit`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ulearn_host import display
from ulearn_host.errors import UserError

_BOARDS = "Who takes part"
_TRAINING = "What a board does"
_SENT = "What is sent"
_ROUND = "What a round is"
_SHOWN = "What is shown"
_BOARDS_SHOWN = 30

Fleet = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Where the fleet is kept: the cards of its boards, the host's certificate, a folder for each job.",
        rich_help_panel=_BOARDS,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `ulearn` command."""
    app.command(
        epilog="Examples:  ulearn federate digits.ulm -p PORT1 --data a.npz -p PORT2 --data b.npz --out fleet.ulm   "
        "|   ulearn enrol kitchen -p /dev/ttyACM0   and then   ulearn federate digits.ulm --listen 8470 --rounds 30 "
        "--web 8080   |   ulearn federate digits.ulm --listen 8470 --goal 20 --up top-k:90 --rule trimmed-mean:0.2"
    )(federate)
    app.command(
        epilog="Examples:  ulearn enrol kitchen --port /dev/ttyACM0   |   "
        "ulearn enrol barn --port /dev/ttyACM0 --host 192.168.1.20:8470   |   ulearn enrol barn --out fleet.json"
    )(enrol)
    app.command(
        epilog="Examples:  ulearn audit fleet/digits   |   ulearn audit fleet/digits --board kitchen --event refuse   "
        "|   ulearn audit fleet/digits --json"
    )(audit)


def federate(
    plan: Annotated[Path, typer.Argument(help="A plan (.ulm) made by `ulearn prepare`, on the boards by `deploy`.")],
    port: Annotated[
        list[str] | None,
        typer.Option("--port", "-p", help="Serial port of a board; once for each.", rich_help_panel=_BOARDS),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="NPZ", help="That board's samples, in the order of the ports.", rich_help_panel=_BOARDS),
    ] = None,
    holdout: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="Share of each file's samples to test on.", rich_help_panel=_BOARDS),
    ] = 0.25,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS:]PORT",
            help="Wait there for boards on the network (extra \\[fleet]), those of `ulearn enrol`.",
            rich_help_panel=_BOARDS,
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Without TLS: whoever listens reads every update.", rich_help_panel=_BOARDS),
    ] = False,
    fleet: Fleet = Path("fleet"),
    selection: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="How boards are drawn: random, balanced (by label histograms, see --histogram), fast.",
            rich_help_panel=_BOARDS,
        ),
    ] = "random",
    histogram: Annotated[
        bool,
        typer.Option(
            "--histogram", help="Ask boards for label histograms; owners may refuse.", rich_help_panel=_BOARDS
        ),
    ] = False,
    job: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the job; default: the plan's name.", rich_help_panel=_ROUND),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often updates are put together; 0: boards only score the plan on their held-out samples.",
            rich_help_panel=_ROUND,
        ),
    ] = 5,
    goal: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Updates that a round takes, of 130 % boards asked; default: as many as there are boards.",
            rich_help_panel=_ROUND,
        ),
    ] = None,
    quorum: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the goal that is enough at the deadline.", rich_help_panel=_ROUND),
    ] = 0.8,
    deadline: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds of a round; default: drawn from measured times.", rich_help_panel=_ROUND),
    ] = None,
    retry: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds after which an idle board asks again, more or less; default: 1 on serial lines, else 10.",
            rich_help_panel=_ROUND,
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="How many updates become one: mean (by sample counts), clipped-mean[:BOUND], median, "
            "trimmed-mean:SHARE, krum:LIARS, multi-krum:LIARS[:KEPT]; but for mean they bear some that are wrong.",
            rich_help_panel=_ROUND,
        ),
    ] = "mean",
    server: Annotated[
        str,
        typer.Option(
            metavar="STEP",
            help="What is made of that: none, momentum:BETA[:RATE] (FedAvgM), adam:RATE[:TAU] (FedAdam).",
            rich_help_panel=_ROUND,
        ),
    ] = "none",
    epochs: Annotated[
        int, typer.Option(min=1, max=1000, help="How often each sample is used in a round.", rich_help_panel=_TRAINING)
    ] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            min=1e-8,
            max=1e5,
            help="Of the first epoch of a round, halved after each; default: the plan's.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**31, help="Of the order of samples and of stochastic rounding.", rich_help_panel=_TRAINING
        ),
    ] = 1,
    proximal: Annotated[
        float,
        typer.Option(min=0, help="FedProx: how strongly boards are pulled to the base.", rich_help_panel=_TRAINING),
    ] = 0.0,
    personal: Annotated[
        bool,
        typer.Option("--personal", help="The last layer stays on each board, its own.", rich_help_panel=_TRAINING),
    ] = False,
    up: Annotated[
        str,
        typer.Option(
            metavar="ENCODING",
            help="Of updates: dense (16 bits a weight), int8, random-k:K, top-k:K (K values of 8 bits). In their "
            "place: features:K or random-features:K, activations of K samples on which the host trains the last layer.",
            rich_help_panel=_SENT,
        ),
    ] = "dense",
    feedback: Annotated[
        bool,
        typer.Option(help="Boards keep what an encoding leaves out for later rounds.", rich_help_panel=_SENT),
    ] = True,
    down: Annotated[
        str,
        typer.Option(
            metavar="ENCODING",
            help="Of the way down: full, difference (exact), int8 (the rest comes in later rounds).",
            rich_help_panel=_SENT,
        ),
    ] = "difference",
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rounds between evaluations on the boards' held-out samples; default: before and after the job.",
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    min_group: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Boards that must have reported before a figure is told; default: 5, of samples from this host 1.",
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    page: Annotated[
        int | None,
        typer.Option(
            "--web",
            min=0,
            max=65535,
            metavar="PORT",
            help="A page on this computer to look at.",
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Where the fleet's plan is written after every round.", rich_help_panel=_SHOWN
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON for scripts: a line a round, and one with the result.", rich_help_panel=_SHOWN
        ),
    ] = False,
) -> None:
    """Let a fleet learn together: boards train on their own samples, the host puts their updates together.

    Boards are on serial lines (--port), on the network (--listen), or both. A round asks more boards than it needs and
    commits when it has enough, so that slow and lost ones hold nobody up. Stopped at any moment, by Ctrl-C, by a crash,
    the same command goes on with the last committed round.
    """
    from ulearn_host import fleet as members
    from ulearn_host.federation.hosting import Hosting
    from ulearn_host.federation.job import Job
    from ulearn_host.federation.roster import Roster

    ports, files = port or [], data or []
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no such folder")
    if len(ports) != len(files):
        raise UserError(f"{len(ports)} ports and {len(files)} files of samples were given, expected one file a port")
    known = Roster(fleet).secrets() if listen else {}
    if not ports and not known:
        raise UserError(
            f"{fleet}: no board is enrolled; run ulearn enrol for each first"
            if listen
            else "no board takes part; give --port and --data for each, or --listen for boards on the network"
        )
    facts = members.PlanFacts(plan)
    made = Job(
        job or plan.stem,
        rounds,
        goal or len(ports) + len(known),
        quorum=quorum,
        deadline_s=deadline,
        retry_s=retry or (10.0 if known else 1.0),
        epochs=epochs,
        learning_rate=facts.learning_rate if learning_rate is None else learning_rate,
        seed=seed,
        proximal=proximal,
        up=up,
        error_feedback=feedback and up != "dense",
        personal=personal,
        rule=rule,
        server=server,
        down=down,
        selection=selection,
        histogram=histogram,
        evaluate_every=max(1, rounds) if evaluate_every is None else evaluate_every,
        min_group=min_group or (5 if known else 1),
    )
    warn(made)
    hosting = Hosting(
        fleet / made.name,
        fleet,
        lines_of(facts, ports, files, holdout, seed),
        network(listen, known, plain),
        out,
        page,
        as_json,
    )
    carry_out(hosting, plan, made, "stopped; the same command goes on with the last committed round")


def warn(job: Any) -> None:
    """What goes up may tell more than updates do."""
    if job.split:
        from ulearn_host.federation.split import WARNING

        display.errors.print(f"warning: {WARNING}", markup=False, soft_wrap=True)


def carry_out(hosting: Any, plan: Path, job: Any, stopped: str) -> None:
    """Run a job to its end and show what came of it; stopped: what Ctrl-C is answered with."""
    try:
        status = hosting.run(plan, job)
    except KeyboardInterrupt:
        raise UserError(stopped) from None
    except ImportError as missing:
        raise UserError(f"boards on the network need {missing.name}: pip install 'ulearn[fleet]'") from None
    _show(status, hosting.as_json, job.name)


def lines_of(facts: Any, ports: Sequence[str], files: Sequence[Path], holdout: float, seed: int) -> list[Any]:
    """The boards on serial lines, each with its samples."""
    from ulearn_host import fleet
    from ulearn_host.federation.lines import Line, name_of
    from ulearn_host.importers import load_samples

    made = []
    for port, path in zip(ports, files, strict=True):
        learn, test = fleet.split(facts.samples(*load_samples(path), str(path)), holdout, seed)
        made.append(Line(name_of(port), partial(fleet.opened, port, facts), learn, test))
    names = [line.board for line in made]
    if len(set(names)) != len(names):
        raise UserError(f"{', '.join(sorted(names))}: the same board twice; give each port once")
    return made


def network(listen: str | None, known: dict[str, bytes], plain: bool) -> Any:
    """Where the boards on the network find this host; None without --listen."""
    from ulearn_host.federation.hosting import Network

    return Network(*_address(listen, "0.0.0.0", 8470), known, plain) if listen else None


def _address(text: str, host: str, port: int) -> tuple[str, int]:
    """(address, port) of "PORT", "ADDRESS" or "ADDRESS:PORT"."""
    first, colon, last = text.rpartition(":")
    if not colon and not last.isdecimal():
        return last, port
    if not last.isdecimal() or not 0 <= int(last) < 65536:
        raise UserError(f"{text}: expected an address and a port, e.g. 192.168.1.20:8470")
    return first or host, int(last)


def _show(status: Mapping[str, Any], as_json: bool, name: str) -> None:
    """The job's result: each board's accuracy before and after, where it may be told."""
    from ulearn_host.federation import progress

    boards = [
        {
            "id": board["id"],
            "link": board["link"],
            "samples": board["samples"],
            "rounds": board["rounds"],
            "before": board["accuracy"][0][1] if board["accuracy"] else None,
            "after": board["accuracy"][-1][1] if board["accuracy"] else None,
        }
        for board in status["boards"]
    ]
    told = [row["accuracy"] for row in status["history"] if row["accuracy"] is not None]
    result = {
        "job": name,
        "rounds": len([row for row in status["history"] if row["state"] == "committed"]),
        "before": status["accuracy_before"],
        "after": told[-1] if told else None,
        "base_id": status["model"]["base_id"],
        "boards": boards,
    }
    if as_json:
        print(json.dumps(result))
        return
    if result["rounds"]:
        progress.table(status)
    if len(boards) <= _BOARDS_SHOWN:
        rows = [
            [
                display.visible(b["id"]),
                b["link"],
                f"{b['samples']:,}",
                str(b["rounds"]),
                *("" if b[key] is None else display.percent(b[key]) for key in ("before", "after")),
            ]
            for b in boards
        ]
        display.plain_table("boards", ["board", "link", "samples", "rounds", "before", "after"], rows, (2, 3, 4, 5), {})
    if result["before"] is None:
        return
    if result["after"] is None:
        display.console.print(f"on samples held out: {display.percent(result['before'])}", markup=False)
    else:
        display.console.print(
            f"on samples that no board learned from: {display.percent(result['before'])} before, "
            f"{display.percent(result['after'])} after",
            markup=False,
        )


def enrol(
    name: Annotated[str, typer.Argument(help="What the board is called from now on.")],
    port: Annotated[
        str | None, typer.Option("--port", "-p", help="Its serial port, with ulearn on it by `deploy`.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS[:PORT]", help="Where the board will find this computer; default: its own, port 8470."
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Allow this board to speak without TLS.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the card to a file in place of the board.")
    ] = None,
    fleet: Fleet = Path("fleet"),
) -> None:
    """Give a board its card: who it is, its secret, and the certificate by which it knows this computer.

    On the board, once it is in the network:

    import ulearn.wifi; ulearn.wifi.join("fleet.json", model, samples)
    """
    try:
        from ulearn_host.federation import certificate
        from ulearn_host.federation import enrol as enrolment
    except ImportError as missing:
        raise UserError(f"boards on the network need {missing.name}: pip install 'ulearn[fleet]'") from None
    from ulearn_host.federation.roster import Roster

    if (port is None) == (out is None):
        raise UserError("expected either --port of the board, or --out for a file to bring there yourself")
    fleet.mkdir(parents=True, exist_ok=True)
    place = _address(host, "", 8470) if host else (enrolment.own_address(), 8470)
    identity = None if plain else certificate.ensure(fleet)
    card = Roster(fleet).add(name, *place, identity)
    if out:
        out.touch(mode=0o600)
        out.chmod(0o600)  # it may have been there
        out.write_bytes(card)
    elif port:
        enrolment.over_serial(port, card)
    where = port or str(out)
    display.console.print(
        f"{name}: card written to {where}; it will look for this computer at {place[0]} port {place[1]}",
        markup=False,
        soft_wrap=True,
    )
    display.console.print('on the board:  ulearn.wifi.join("fleet.json", model, samples)', markup=False)


def audit(
    folder: Annotated[Path, typer.Argument(help="A job's folder, e.g. fleet/digits.")],
    board: Annotated[str | None, typer.Option(help="Only what concerns this board.")] = None,
    event: Annotated[str | None, typer.Option(help="Only these: task, update, refuse, commit, ...")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many, the last ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts, one object a line.")] = False,
) -> None:
    """Show what a job asked, sent, accepted and refused, and from which base each of its models came."""
    from ulearn_host.federation import audit as log

    log.show(folder, as_json, board=board, event=event, last=last)
