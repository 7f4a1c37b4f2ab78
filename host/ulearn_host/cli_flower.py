"""The commands of a fleet behind several hosts: `ulearn flower` leads it, `ulearn gateway` is one of its hosts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ulearn_host import cli_fleet, display
from ulearn_host.errors import UserError

SOCKET = "gateway.sock"
_Plan = Annotated[Path, typer.Argument(help="A plan (.ulm) made by `ulearn prepare`, the same on every host.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the `ulearn` command."""
    app.command(
        epilog="Example:  ulearn flower digits.ulm --folder fleet/all --gateways 4 --set rounds=30 --set goal=40"
    )(flower)
    app.command(
        epilog="Example:  ulearn gateway digits.ulm --job job.json --folder fleet/cellar -p PORT1 --data a.npz   |   "
        "ulearn gateway digits.ulm --job job.json --folder fleet/barn --listen 8470"
    )(gateway)


def flower(
    plan: _Plan,
    folder: Annotated[Path, typer.Option(help="Where the job is kept; the last model is model.ulm in it.")],
    gateways: Annotated[int, typer.Option(min=1, help="How many there must be to begin a round.")],
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A field of the job: rounds, goal (updates of a round, of all hosts together), epochs, learning_rate, "
            "up, down, rule, ...; those of `ulearn federate` with _ for -.",
        ),
    ] = None,
    updates: Annotated[
        bool, typer.Option("--updates", help="Have every board's update passed up where the hosts' sums would do.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a round waits for gateways.")] = 3600.0,
) -> None:
    """Begin a job for boards behind several hosts, which Flower (extra \\[flower]) brings together.

    Every host runs `ulearn gateway` and a SuperNode of Flower beside it, this one a SuperLink. The hosts pass sums up:
    the model has the bits that one host with all the boards would give it. Stopped, the job goes on with the last
    committed round.
    """
    from ulearn_host.federation.flower_app import write_app
    from ulearn_host.federation.root import Root

    job = _job(plan, given or [])
    Root.create(folder, plan, job).close()
    (folder / "job.json").write_text(job.to_json() + "\n")
    write_app(folder / "app", folder, gateways, timeout, updates)
    cli_fleet.warn(job)
    for line in (
        f"{folder}: the job, and what Flower runs of it; bring {folder / 'job.json'} and the plan to every host",
        f"here:           flower-superlink, and once the gateways are there, flwr run {folder / 'app'}",
        "on every host:  ulearn gateway, and flower-supernode with the node-config that it tells",
    ):
        display.console.print(line, markup=False, soft_wrap=True)


def gateway(
    plan: _Plan,
    job: Annotated[Path, typer.Option(help="What the job is: the job.json that `ulearn flower` has written.")],
    folder: Annotated[Path, typer.Option(help="Where this host keeps it; its name is the gateway's.")],
    port: Annotated[
        list[str] | None, typer.Option("--port", "-p", help="Serial port of a board; once for each.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(metavar="NPZ", help="That board's samples, in the order of the ports.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="[ADDRESS:]PORT", help="Wait there for boards on the network, those of `ulearn enrol`."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without TLS: whoever listens reads every update.")] = False,
    fleet: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the cards of this host's boards are.")] = Path(
        "fleet"
    ),
    goal: Annotated[int | None, typer.Option(min=1, help="Updates of a round that are enough; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Drive the boards of this host in a job that `ulearn flower` leads, until it is done.

    Flower's SuperNode beside it is told where this host is asked: --node-config 'gateway="FOLDER/gateway.sock"'.
    """
    from ulearn_host import fleet as members
    from ulearn_host.federation.behind import Behind
    from ulearn_host.federation.job import Job
    from ulearn_host.federation.roster import Roster

    ports, files = port or [], data or []
    if len(ports) != len(files):
        raise UserError(f"{len(ports)} ports and {len(files)} files of samples were given, expected one file a port")
    known = Roster(fleet).secrets() if listen else {}
    if not ports and not known:
        raise UserError(
            "no board takes part; give --port and --data for each, or --listen for boards that are enrolled"
        )
    try:
        whole = Job.from_json(job.read_text())
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{job}: {fault}; expected the job.json of ulearn flower") from None
    cli_fleet.warn(whole)
    lines = cli_fleet.lines_of(members.PlanFacts(plan), ports, files, 0.0, whole.seed)
    network = cli_fleet.network(listen, known, plain)
    hosting = Behind(folder, fleet, lines, network, as_json=as_json, socket=folder / SOCKET, goal=goal)
    display.errors.print(f"""--node-config 'gateway="{(folder / SOCKET).resolve()}"'""", markup=False, soft_wrap=True)
    cli_fleet.carry_out(hosting, plan, whole, "stopped; the same command goes on where it was")


def _job(plan: Path, given: list[str]) -> Any:
    """The job of NAME=VALUE pairs."""
    from ulearn_host.federation.job import Job

    fields: dict[str, Any] = {"name": plan.stem}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: expected NAME=VALUE, e.g. rounds=30")
        try:
            fields[name] = json.loads(text)
        except ValueError:
            fields[name] = text
    return Job.from_json(json.dumps(fields))
