"""`ulearn simulate`: a fleet of virtual boards on this computer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ulearn_host import display
from ulearn_host.errors import UserError

_FLEET = "Who is in the fleet"
_JOB = "What they do together"
_SHOWN = "What is shown"
_ROWS = 12

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.", rich_help_panel=_SHOWN)]


def register(app: typer.Typer) -> None:
    """Add the command to the `ulearn` command."""
    app.command(
        epilog="Examples:  ulearn simulate digits.ulm --data digits.npz --boards 200 --rounds 30 --alpha 0.3   |   "
        "ulearn simulate digits.ulm --data digits.npz --dropout 0.1 --stragglers 0.1 --up top-k:90   |   "
        "ulearn simulate kws.ulm --data kws.npz --by-group --rule median --attack label-flip:5:0.2 --plot fleet.html",
    )(simulate)


def simulate(
    plan: Annotated[Path, typer.Argument(help="A plan (.ulm) made by `ulearn prepare`.")],
    data: Annotated[
        Path,
        typer.Option(
            metavar="NPZ",
            help="All boards' samples: x in real units and y; for --by-group: group, whose each is.",
        ),
    ],
    test: Annotated[
        Path | None,
        typer.Option(metavar="NPZ", help="Samples to judge with; default: a part of --data, see --holdout."),
    ] = None,
    holdout: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of --data, class by class, that no board gets.")
    ] = 0.25,
    boards: Annotated[
        int | None,
        typer.Option(
            "--boards",
            "-n",
            min=1,
            max=10_000,
            help="How many; default: 20, or with --by-group all groups.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="How mixed each board's classes are: Dirichlet of alpha times their shares (Hsu et al. 2019); "
            "the smaller, the fewer classes; inf: all boards alike. Default: 1; of a regression inf.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    by_group: Annotated[
        bool,
        typer.Option("--by-group", help="A board for each group, the largest first, instead.", rich_help_panel=_FLEET),
    ] = False,
    dropout: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.95,
            help="Share of tasks after which a board is not heard of for a while.",
            rich_help_panel=_FLEET,
        ),
    ] = 0.0,
    stragglers: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.95,
            help="Share of boards that are eight times slower. The others differ, too.",
            rich_help_panel=_FLEET,
        ),
    ] = 0.0,
    attack: Annotated[
        str | None,
        typer.Option(
            metavar="ATTACK",
            help="Boards that lie: label-flip:SHARE learn from labels turned round, label-flip:BOOST:SHARE boost what "
            "they learned from these, scale:FACTOR:SHARE multiply what they learned, e.g. scale:-10:0.2.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, max=100_000, help="How often updates are put together.", rich_help_panel=_JOB)
    ] = 20,
    goal: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Updates a round takes; 130 % are asked. Default: as many as asks every board.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, max=1000, help="How often a board uses each sample in a round.", rich_help_panel=_JOB)
    ] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            min=1e-8,
            max=1e5,
            help="Of a round's first epoch, halved after each; default: the plan's.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    proximal: Annotated[
        float, typer.Option(min=0, max=1e6, help="FedProx's μ: holds boards near the base.", rich_help_panel=_JOB)
    ] = 0.0,
    rule: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="mean, clipped-mean[:BOUND], median, trimmed-mean:SHARE, krum:LIARS, multi-krum:LIARS[:KEPT].",
            rich_help_panel=_JOB,
        ),
    ] = "mean",
    server: Annotated[
        str,
        typer.Option(metavar="STEP", help="none, momentum:BETA[:RATE] or adam:RATE[:TAU].", rich_help_panel=_JOB),
    ] = "none",
    up: Annotated[
        str,
        typer.Option(metavar="ENCODING", help="Of updates: dense, int8, random-k:K or top-k:K.", rich_help_panel=_JOB),
    ] = "dense",
    error_feedback: Annotated[
        bool, typer.Option("--error-feedback", help="What that leaves out is sent later.", rich_help_panel=_JOB)
    ] = False,
    down: Annotated[
        str,
        typer.Option(metavar="ENCODING", help="Of the way down: full, difference or int8.", rich_help_panel=_JOB),
    ] = "difference",
    selection: Annotated[
        str, typer.Option(metavar="POLICY", help="Who is asked: random, balanced or fast.", rich_help_panel=_JOB)
    ] = "random",
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Of splits, speeds, dropouts and liars; orders and rounding.")
    ] = 1,
    processes: Annotated[
        int | None, typer.Option(min=1, max=256, help="Default: a process a core. It changes no result.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw score and bytes over rounds: .html, or .png (extra [plot]).",
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PLAN", help="Write the fleet's plan.", rich_help_panel=_SHOWN)
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a fleet of virtual boards learn together, before there is one.

    Each is the board's own code on this computer, with samples of its own and a speed of its own; the rounds are those
    of `ulearn federate`, in virtual time. Every round's model is judged on samples that no board has, beside the plan
    as it was. The same arguments give the same result.
    """
    from ulearn_host import fleet, picture
    from ulearn_host.federation import attacks, simulation
    from ulearn_host.federation.job import Job
    from ulearn_host.prepare import write_bytes

    if plot:
        picture.check(plot)
    for path in (plot, out):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: there is no such folder")
    if by_group and alpha is not None:
        raise UserError("--by-group says who has which samples, and so does --alpha; give one of the two")
    lies = attacks.parse(attack) if attack else None
    facts = fleet.PlanFacts(plan)
    if lies and lies.kind == "label-flip" and not facts.labelled:
        raise UserError(f"--attack {attack}: {plan} learns no labels; expected scale:FACTOR:SHARE")
    given = _split(facts, data, test, holdout, boards, alpha, by_group, seed)
    world = simulation.World(
        plan, given.boards, given.test, dropout=dropout, stragglers=stragglers, attack=lies, seed=seed
    )
    count = len(world.boards)
    rate = facts.learning_rate if learning_rate is None else learning_rate
    task_s = simulation.steps_us(facts) / 1e6 * max(map(len, world.boards)) * epochs
    job = Job(
        "simulation",
        rounds,
        goal or max(1, math.floor(count / 1.3)),
        retry_s=max(1.0, task_s),
        epochs=epochs,
        learning_rate=rate,
        seed=seed,
        proximal=proximal,
        up=up,
        error_feedback=error_feedback,
        rule=rule,
        server=server,
        down=down,
        selection=selection,
        histogram=selection != "random" and facts.labelled,
    )
    if job.goal > count:
        raise UserError(f"--goal {job.goal} updates of {count} boards; expected at most {count}")
    with display.steps() as steps:
        result = simulation.run(world, job, processes, steps.bar(f"{rounds} rounds, {count} virtual boards", rounds))
    if out:
        write_bytes(facts.with_weights(result.blob), out)
    if plot:
        from ulearn_host.federation import simulation_plot

        title = f"{plan.name}: {count} virtual boards, {_mix(given.skew, alpha, by_group)}"
        simulation_plot.write(plot, [simulation_plot.curve(rule, result)], title, result.labelled)
    if as_json:
        print(json.dumps(_as_json(world, job, result, given.skew)))
        return
    _show(world, job, result, given.skew)


class _Given:
    """Who has which samples. skew: of splits.skew, None for a regression."""

    def __init__(self, boards: tuple[Any, ...], test: Any, skew: float | None) -> None:
        self.boards, self.test, self.skew = boards, test, skew


def _split(
    facts: Any,
    data: Path,
    test: Path | None,
    holdout: float,
    boards: int | None,
    alpha: float | None,
    by_group: bool,
    seed: int,
) -> _Given:
    """The samples of the file, among boards and those who judge."""
    import numpy as np

    from ulearn_host import importers
    from ulearn_host.federation import splits
    from ulearn_host.fleet import Samples

    x, y = importers.load_samples(data)
    every = facts.samples(x, y, str(data))
    if test:
        learned = np.arange(len(every))
        judges = facts.samples(*importers.load_samples(test), str(test))
    else:
        learned, kept = splits.held_out(every.y, holdout, seed)
        judges = Samples(every.x[kept], every.y[kept])
    pool = Samples(every.x[learned], every.y[learned])
    if by_group:
        group = importers.load_groups(data, len(every))
        if group is None:
            raise UserError(f"{data}: says not whose the samples are, expected their groups under the name group")
        parts = splits.by_group(group[learned], boards)
    else:
        mixed = alpha if alpha is not None else 1.0 if facts.labelled else math.inf
        parts = splits.dirichlet(pool.y, 20 if boards is None else boards, mixed, seed)
    skew = splits.skew(pool.y, parts) if facts.labelled else None
    return _Given(tuple(Samples(pool.x[part], pool.y[part]) for part in parts), judges, skew)


def _mix(skew: float | None, alpha: float | None, by_group: bool) -> str:
    if by_group:
        return "one for each group"
    return "alike" if skew is None or alpha == math.inf else f"Dirichlet alpha {1.0 if alpha is None else alpha:g}"


def _as_json(world: Any, job: Any, result: Any, skew: float | None) -> dict[str, Any]:
    """For `--json`: scores are shares right, or mean squared errors; bytes are of all boards."""
    return {
        "boards": len(world.boards),
        "samples": sum(map(len, world.boards)),
        "skew": skew,
        "liars": len(world.liars),
        "tested_on": result.samples,
        "parameters": result.parameters,
        "job": json.loads(job.to_json()),
        "before": result.before,
        "after": result.after,
        "bytes_up": sum(r.bytes_up for r in result.rounds),
        "bytes_down": sum(r.bytes_down for r in result.rounds),
        "seconds": sum(r.seconds for r in result.rounds),
        "rounds": [vars(r) | {"boards": len(r.boards)} for r in result.rounds],
    }


def _show(world: Any, job: Any, result: Any, skew: float | None) -> None:
    score = display.percent if result.labelled else "{:g}".format
    rounds = result.rounds
    shown = {round(i * (len(rounds) - 1) / (_ROWS - 1)) for i in range(_ROWS)} if len(rounds) > _ROWS else None
    rows = [["frozen", "", "", "", "", "", score(result.before)]]
    for i, r in enumerate(rounds):
        if shown is None or i in shown:
            took = f"{len(r.boards)} of {r.asked}" if r.state == "committed" else "given up"
            moved = display.size(r.bytes_up), display.size(r.bytes_down)
            rows.append([str(r.round), took, str(r.late), *moved, display.duration(r.seconds), score(r.score)])
    what = "right" if result.labelled else "error"
    columns = ["round", "updates", "late", "bytes up", "bytes down", "virtual time", what]
    mixed = "" if skew is None else f", their classes {100 * skew:.0f} % apart"
    display.table(f"{world.plan.name}: {len(world.boards)} virtual boards{mixed}", columns, rows)
    lost = len(rounds) - len(result.committed)
    text = f"{len(result.committed)} rounds committed, {lost} given up; "
    text += f"{score(result.before)} before, {score(result.after)} after, on {result.samples} samples that no board has"
    if world.liars:
        text += f"; {len(world.liars)} boards lied"
    display.console.print(text, markup=False, soft_wrap=True)
