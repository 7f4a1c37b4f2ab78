"""The `ulearn` command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
import typer

from ulearn_host import display, report
from ulearn_host.compiler import SCHEMES, Options, Scheme, WeightType
from ulearn_host.emulate import EmulatorError
from ulearn_host.errors import UserError

app = typer.Typer(
    help="On-device learning for MicroPython: prepare a pretrained network, put it on boards, let them learn.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Port = Annotated[str, typer.Option("--port", "-p", help="Serial port of the board, e.g. /dev/ttyACM0.")]
PlanPath = Annotated[Path, typer.Argument(help="A plan (.ulm) made by `ulearn prepare`.")]
Data = Annotated[Path, typer.Option(help="Samples: an npz with x [n, ...] in real units and y, labels or targets.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]
Epochs = Annotated[int, typer.Option(min=1, max=1000, help="How often each sample is used.")]
Rate = Annotated[
    float | None,
    typer.Option("--learning-rate", "--lr", min=1e-8, max=1e5, help="Of the first epoch, halved after each."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**31, help="Of the order of samples and of stochastic rounding.")]


@app.command(epilog="Example:  ulearn prepare digits.joblib --calibration samples.npz --scheme last+bias")
def prepare(
    model: Annotated[Path, typer.Argument(help="Trained network: .npz (w0, b0, ...) or scikit-learn .joblib/.pkl.")],
    calibration: Annotated[Path, typer.Option(help="npz with x (and y, to calibrate the training as well).")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write the plan; default: MODEL.ulm.")
    ] = None,
    scheme: Annotated[str, typer.Option(help=f"What trains on the board: {', '.join(SCHEMES)}.")] = "last+bias",
    weights: Annotated[str, typer.Option(help="How trainable weights are kept: int16, or int8 (less RAM).")] = "int16",
    loss: Annotated[str | None, typer.Option(help="softmax_ce or mse; an npz is taken for a classifier.")] = None,
) -> None:
    """Quantise a float network and compile it into a plan (.ulm)."""
    from ulearn_host import importers
    from ulearn_host.prepare import prepare as make
    from ulearn_host.prepare import write

    _one_of("scheme", scheme, SCHEMES)
    _one_of("weights", weights, get_args(WeightType))
    layers, found, labels = importers.load_model(model)
    if loss is not None:
        _one_of("loss", loss, ("softmax_ce", "mse"))
        found = "mse" if loss == "mse" else "softmax_ce"
    x, y = importers.load_samples(calibration)
    if y is not None and found == "softmax_ce" and labels and not np.issubdtype(y.dtype, np.integer):
        y = np.array([labels.index(str(v)) if str(v) in labels else -1 for v in y])
    outputs = len(layers[-1].bias)
    if y is not None and found == "softmax_ce":
        if y.ndim != 1 or y.dtype.kind not in "iub" or y.min() < 0 or y.max() >= outputs:
            raise UserError(f"{calibration}: y must hold labels from 0 to {outputs - 1}")
    elif y is not None and (y.dtype.kind not in "fiu" or y.size != len(y) * outputs):
        raise UserError(f"{calibration}: y has shape {y.shape}, expected targets ({len(y)}, {outputs})")
    options = Options(cast(Scheme, scheme), cast(WeightType, weights))
    with display.steps() as steps:
        tick = steps.counter(f"preparing {model.name}", 3)
        plan = make(
            layers,
            x,
            y,
            loss=found,
            labels=labels,
            options=options,
            source=model.name,
            progress=lambda step: tick(),
        )
    path = out or model.with_suffix(".ulm")
    write(plan, path)
    read = report.read(path)
    display.console.print(f"{path}: {len(plan.data):,} bytes, {read.ram_bytes:,} bytes of RAM on a 32-bit board")
    if y is None:
        display.console.print("no labels were given: the board calibrates the training itself in its first 16 steps")


@app.command(epilog="Example:  ulearn inspect digits.ulm --json")
def inspect(plan: PlanPath, as_json: Json = False) -> None:
    """Show a plan's operations, RAM and flash."""
    read = report.read(plan)
    if as_json:
        print(json.dumps(read.as_json(), indent=2))
        return
    title = f"{plan.name}  {read.meta.get('scheme', '')}  {read.loss}"
    for program in dict.fromkeys(o.program for o in read.operations):
        rows = [
            [o.name, o.shape, o.weights, display.size(o.macs) if o.macs else ""]
            for o in read.operations
            if o.program == program
        ]
        rows.append(["", "", "in all", display.size(read.macs(program))])
        display.table(f"{title}: {program}", ["operation", "shape", "weights", "multiply-accumulates"], rows, 3)
    rows = [[t["name"], t["dtype"], str(t["shape"]), display.size(t["bytes"])] for t in read.tensors]
    display.table("trainable", ["tensor", "kept as", "shape", "bytes"], rows, 3)
    rows = [[name, display.size(value)] for name, value in read.buffers.items()]
    rows += [["RAM in all, code apart", display.size(read.ram_bytes)], ["flash", display.size(read.flash_bytes)]]
    display.table("memory (32-bit board)", ["part", "bytes"], rows)
    cuts = ", ".join(f"{c['name']} ({c['bytes']} bytes)" for c in read.cuts)
    display.console.print(f"model {read.model_id}; cuts: {cuts or 'none'}")


@app.command(epilog="Example:  ulearn deploy digits.ulm --port /dev/ttyACM0")
def deploy(plan: PlanPath, port: Port, as_json: Json = False) -> None:
    """Put the package, the native kernels and a plan on a board, by mpremote."""
    from ulearn_host.deploy import deploy as put

    report.read(plan)
    with display.steps() as steps:
        tick = steps.counter(f"deploying {plan.name} to {port}", 4)
        board = put(port, plan, lambda step: tick())
    if as_json:
        print(json.dumps(vars(board)))
        return
    display.console.print(f"{port}: {plan.name} is there ({board.architecture}, MicroPython {board.version})")


@app.command(epilog="Example:  ulearn train digits.ulm --port /dev/ttyACM0 --data mine.npz")
def train(
    plan: PlanPath,
    port: Port,
    data: Data,
    epochs: Epochs = 4,
    learning_rate: Rate = None,
    seed: Seed = 1,
    holdout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the samples kept to test on.")] = 0.25,
    checkpoint: Annotated[str, typer.Option(help="File on the board to keep the weights in; empty: none.")] = "",
    as_json: Json = False,
) -> None:
    """Let a board learn from samples, and show its accuracy before and after on those held back."""
    from ulearn_host import fleet

    facts = fleet.PlanFacts(plan)
    samples = facts.samples(*_load(data))
    learn, test = fleet.split(samples, holdout, seed)
    kept = len(test)
    if checkpoint in (plan.name, plan.name + ".base"):
        raise UserError(f"--checkpoint {checkpoint} is where the plan lies on the board; name another file")
    with _linked(port, facts) as link, display.steps() as steps:
        member = fleet.Member(port, link, learn, test)
        before = member.right(tick=steps.bar("testing")) if facts.labelled else 0
        member.send(steps.bar(f"sending {len(learn)} samples"))
        counters = link.train(
            epochs,
            facts.learning_rate if learning_rate is None else learning_rate,
            seed,
            progress=steps.bar("training on the board"),
        )
        after = member.right(tick=steps.bar("testing")) if facts.labelled else 0
        if checkpoint:
            link.checkpoint(checkpoint)
    result: dict[str, Any] = {**vars(counters), "trained_on": len(learn), "tested_on": kept}
    if facts.labelled and kept:
        result |= {"before": before / kept, "after": after / kept}
    if as_json:
        print(json.dumps(result))
        return
    rows = [
        [key, display.percent(value) if key in ("before", "after") else str(value)] for key, value in result.items()
    ]
    display.table(f"{plan.name} on {port}", ["", ""], rows)


@app.command(epilog="Example:  ulearn evaluate digits.ulm --port /dev/ttyACM0 --data test.npz")
def evaluate(plan: PlanPath, port: Port, data: Data, as_json: Json = False) -> None:
    """Count how many samples a board gets right; they do not stay there."""
    from ulearn_host import fleet

    facts = fleet.PlanFacts(plan)
    samples = facts.samples(*_load(data))
    with _linked(port, facts) as link, display.steps() as steps:
        score = link.score(samples.x, samples.y, steps.bar(f"testing on {len(samples)} samples"))
    if as_json:
        print(json.dumps(vars(score)))
    elif facts.labelled:
        share = display.percent(score.right / score.samples)
        display.console.print(f"{share}: {score.right} of {score.samples} right")
    else:
        error = score.loss * facts.output.scale**2 / score.samples / facts.outputs
        display.console.print(f"mean squared error {error:g} over {score.samples} samples")


@app.command(epilog="Example:  ulearn federate digits.ulm -p PORT1 --data a.npz -p PORT2 --data b.npz --out fleet.ulm")
def federate(
    plan: PlanPath,
    port: Annotated[list[str], typer.Option("--port", "-p", help="Serial port of a board; once for each.")],
    data: Annotated[list[Path], typer.Option(help="That board's samples (npz), in the order of the ports.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often the boards' updates are averaged.")] = 5,
    epochs: Epochs = 1,
    learning_rate: Rate = None,
    seed: Seed = 1,
    holdout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of each board's samples to test on.")] = 0.25,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the fleet's plan.")] = None,
    as_json: Json = False,
) -> None:
    """Federated averaging: boards train on their own samples, the host averages the updates by sample counts."""
    from contextlib import ExitStack

    from ulearn_host import fleet
    from ulearn_host.prepare import write_bytes as prepare_write

    if out and not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no such folder")
    if len(port) != len(data):
        raise UserError(f"{len(port)} ports and {len(data)} files of samples were given, expected one file a port")
    facts = fleet.PlanFacts(plan)
    if not facts.labelled:
        raise UserError(f"{plan}: federated evaluation of regressions is not supported yet; expected a classifier")
    rate = facts.learning_rate if learning_rate is None else learning_rate
    sets = [facts.samples(*_load(path)) for path in data]
    with ExitStack() as stack:
        members = []
        for name, samples in zip(port, sets, strict=True):
            learn, test = fleet.split(samples, holdout, seed)
            members.append(fleet.Member(name, stack.enter_context(_linked(name, facts)), learn, test))
        steps = stack.enter_context(display.steps())
        before = fleet.together(members, lambda m: m.right())
        for member in members:
            member.send(steps.bar(f"{member.name}: sending {len(member.train)} samples"))
        trained = steps.counter(f"{rounds} rounds on {len(members)} boards", rounds * len(members))
        for index in range(rounds):
            how = fleet.Hyperparameters(epochs, rate, seed + index)
            fleet.federated_round(members, facts, how, trained)
            if out:  # after every round: what the boards have committed is not lost with a later one
                prepare_write(facts.with_weights(members[0].link.weights()), out)
        after = fleet.together(members, lambda m: m.right())
    result = {
        "boards": [
            {
                "port": m.name,
                "samples": len(m.train),
                "before": b / max(1, len(m.test)),
                "after": a / max(1, len(m.test)),
            }
            for m, b, a in zip(members, before, after, strict=True)
        ],
        "before": fleet.accuracy(members, before),
        "after": fleet.accuracy(members, after),
        "rounds": rounds,
    }
    if as_json:
        print(json.dumps(result))
        return
    rows = [
        [b["port"], str(b["samples"]), display.percent(b["before"]), display.percent(b["after"])]
        for b in cast(list[dict[str, Any]], result["boards"])
    ]
    total = sum(len(m.train) for m in members)
    rows.append(
        [
            "fleet",
            str(total),
            display.percent(cast(float, result["before"])),
            display.percent(cast(float, result["after"])),
        ]
    )
    display.table(f"{plan.name} after {rounds} rounds", ["board", "samples", "before", "after"], rows)


@app.command(epilog="Example:  ulearn demo --seed 3 --json result.json")
def demo(
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Changes splits, mixes and order.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
) -> None:
    """Three emulated boards learn tilted digits, each on its own and then together."""
    from ulearn_host import demo as job

    with display.steps() as steps:
        result = job.run(seed, steps)
    if json_file:
        json_file.write_text(json.dumps(result.as_json(), indent=2) + "\n")
    rows = [
        [b["name"], b["implementation"], *(display.percent(b[key]) for key in ("before", "after", "federated"))]
        for b in result.boards
    ]
    fleet = result.federated
    rows.append(
        ["fleet", f"{fleet['rounds']} rounds", display.percent(fleet["before"]), "", display.percent(fleet["after"])]
    )
    columns = ["board", "implementation", "before", "after, alone", "after, fleet"]
    display.table("accuracy on samples that nobody trained on", columns, rows, 2)
    display.console.print(f"{result.seconds:.0f} s")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"--{name} {value} is not known; expected one of {', '.join(allowed)}")


def _load(path: Path) -> tuple[Any, Any, str]:
    from ulearn_host.importers import load_samples

    return (*load_samples(path), str(path))


def _linked(port: str, facts: Any) -> Any:
    from contextlib import contextmanager

    from ulearn_host.link import Link

    @contextmanager
    def session() -> Any:
        with Link.open(port) as link:
            loaded = link.load(facts.path.name)
            if loaded is None or loaded.model_id != facts.model_id:
                raise UserError(f"{port}: {facts.path.name} on the board is another model; run ulearn deploy first")
            yield link

    return session()


def main() -> int:
    """Entry point: errors of the user are one sentence on stderr and exit status 1."""
    try:
        app(standalone_mode=True)
    except (UserError, EmulatorError) as fault:
        display.errors.print(f"error: {fault}", markup=False, soft_wrap=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as fault:
        name = f"{fault.filename}: " if fault.filename else ""
        display.errors.print(f"error: {name}{fault.strerror}", markup=False, soft_wrap=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
