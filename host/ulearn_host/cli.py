"""The `ulearn` command."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
import typer
from numpy.typing import NDArray

from ulearn_host import cli_boards, cli_fleet, cli_flower, cli_simulate, display, placement, report
from ulearn_host.budget import PLACES, Place, bytes_of
from ulearn_host.compiler import GradientType, Options, Plan, compile_plan
from ulearn_host.emulate import EmulatorError
from ulearn_host.errors import UserError
from ulearn_host.network import Loss, Network
from ulearn_host.parameters import WeightType
from ulearn_host.preparation import Budget, Found, Tuned
from ulearn_host.quantise import quantise
from ulearn_host.schemes import SCHEMES, Scheme

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

_TRAINING = "What trains on the board"
_SEARCH = "What trains, within a RAM budget"


@app.command(
    epilog="Examples:  ulearn prepare kws.tflite   |   ulearn prepare cnn.onnx --calibration samples.npz   |   "
    "ulearn prepare digits.joblib --calibration samples.npz --scheme last+bias   |   "
    "ulearn prepare kws.tflite --calibration samples.npz --ram 96k   |   "
    'ulearn prepare kws.tflite --layers "conv_5=32+bias,dense_1=all+bias"'
)
def prepare(
    model: Annotated[
        Path,
        typer.Argument(help="int8 .tflite; .onnx, float or int8 QDQ; scikit-learn .joblib/.pkl; .npz of w0, b0, ..."),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="NPZ",
            help="x in real units; y, to calibrate training and measure its learning rate; group, whose a sample is, "
            "e.g. a speaker. A float model needs x, --ram x and y.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PLAN", help="Where to write the plan; default: MODEL.ulm.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="softmax_ce, mse or hinge; an npz is taken for a classifier, so is what ends in a softmax.",
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Names of the classes, with commas between them.")
    ] = None,
    as_json: Json = False,
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(SCHEMES)}; default: last, or last+bias where every layer is dense. sparse: layers that "
            "--layers names or --ram finds.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="CHOICE",
            help='Which layers: so many output channels (the last ones) or all, +bias; or bias alone. E.g. "conv_5=32'
            '+bias,dense_1=all+bias".',
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Trainable weights: int16, or int8 (less RAM).", rich_help_panel=_TRAINING),
    ] = None,
    gradients: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Gradients: int16, or int8 (less RAM).", rich_help_panel=_TRAINING),
    ] = None,
    layerwise: Annotated[
        bool,
        typer.Option(
            "--layerwise",
            help="A training program for each layer, taken in turn: less RAM.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Compute activations again instead of keeping them: less RAM, more work.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            metavar="RATE",
            help="Of the first epoch; default: measured on the samples.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    no_tune: Annotated[
        bool,
        typer.Option("--no-tune", help="Take the scheme's own learning rate unmeasured.", rich_help_panel=_TRAINING),
    ] = False,
    ram: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Search what to train within so much heap, e.g. 96k (k: 1024): MicroPython, code, plan, weights, "
            "arena, samples kept. Takes minutes; a stopped search goes on where it was.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    buffer: Annotated[
        int | None,
        typer.Option(metavar="N", help="Samples that the board keeps; default: 22.", rich_help_panel=_SEARCH),
    ] = None,
    place: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Where frozen weights lie: ram, stream (read from the plan's file), in-place (ROMFS); default: the "
            "better of ram and stream.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Measure anew what was measured before.", rich_help_panel=_SEARCH)
    ] = False,
) -> None:
    """Turn a trained network into a plan (.ulm) that a board can run and train."""
    from ulearn_host import importers, preparation
    from ulearn_host import prepare as making
    from ulearn_host.simulate import Samples

    for name, value, allowed in (
        *(("scheme", scheme, SCHEMES), ("weights", weights, get_args(WeightType))),
        *(("gradients", gradients, get_args(GradientType)), ("loss", loss, get_args(Loss)[1:])),
        ("place", place, PLACES),
    ):
        if value is not None:
            _one_of(name, value, allowed)
    if learning_rate is not None and not 1e-8 <= learning_rate <= 1e5:
        raise UserError(f"--learning-rate {learning_rate:g} is out of range; expected 1e-8 to 1e5")
    if no_tune and ram:
        raise UserError("--no-tune does not go with --ram, which measures rates as well; give --learning-rate instead")
    budget = _budget(ram, buffer, place, weights, gradients, learning_rate)
    _fitting(budget, scheme, layers, {"buffer": buffer is not None, "place": place is not None, "restart": restart})
    names = tuple(name.strip() for name in labels.split(",")) if labels else ()
    path = out or model.with_suffix(".ulm")
    if path.resolve() in [p.resolve() for p in (model, calibration) if p]:
        raise UserError(f"{path}: would overwrite what it is made from; name another file with --out")
    x, y = importers.load_samples(calibration) if calibration else (None, None)
    if budget and y is None:
        raise UserError(
            "--ram tries out what to train, on samples with labels; give an npz of x and y by --calibration"
        )
    group = importers.load_groups(calibration, len(x)) if calibration and x is not None else None
    said: list[str] = []  # notes
    found, tuned = None, Tuned(learning_rate, "scheme" if learning_rate is None else "given")
    with display.steps() as steps:
        network, codes = _network(model, x, loss, steps)
        network = replace(network, labels=names or network.labels)
        if names and len(names) != network.output.size:
            raise UserError(f"--labels has {len(names)} names, the network has {network.output.size} outputs")
        targets = None if y is None else _targets(calibration, y, network)
        options = Options(
            cast(Scheme, "sparse" if budget or layers else scheme or making.best_scheme(network)),
            cast(WeightType, weights or "int16"),
            selection=preparation.named_layers(network, layers) if layers else None,
            gradients=cast(GradientType, gradients or "int16"),
            layerwise=layerwise,
            recompute=recompute,
        )
        samples = None if targets is None or codes is None else Samples(codes.reshape(len(codes), -1), targets, group)
        if budget:
            if samples is None:
                raise UserError(f"{model}: it has no loss to train with; name one with --loss {_LOSSES}")
            cache = path.with_name(path.name + ".search.jsonl")
            if restart:
                cache.unlink(missing_ok=True)
            display.errors.print(_kept(cache), markup=False, soft_wrap=True)
            found = preparation.searched(network, samples, budget, options, cache, steps)
            options, rate = found.choice.options(options), found.choice.learning_rate
            tuned = Tuned(rate, "measured" if learning_rate is None else "given")
        elif not no_tune and learning_rate is None and samples is not None and options.scheme != "none":
            tick = steps.bar("measuring the learning rate")
            tuned = preparation.tune(network, samples, options, compile_plan(network, options), tick)
            said += [tuned.note] if tuned.note else []
        tick_off = steps.counter(
            f"preparing {model.name}", 2 if samples is not None and options.scheme != "none" else 1
        )
        plan = making.from_network(
            network, codes, targets, options=options, learning_rate=tuned.rate, progress=lambda step: tick_off()
        )
    making.write(plan, path)
    read = report.read(path)
    said += network.notes
    if options.scheme == "none" and scheme is None:
        why = "its last layer cannot be trained yet"
        if network.loss == "none":
            why = f"it has no loss; name one with --loss {_LOSSES}"
        said.append(f"nothing will train, since {why}")
    elif targets is None and options.scheme != "none":
        said.append("no samples with y were given (--calibration): the board calibrates training in its first 16 steps")
    if found:
        said.append(f"code is counted as measured on {placement.DEFAULT} (RP2040); elsewhere it differs by some KB")
    if as_json:
        print(json.dumps(_prepared(plan, read, tuned, said, found)))
        return
    if found:
        preparation.show(network, found)
        for line in preparation.expectation(found):
            display.console.print(line, markup=False, soft_wrap=True)
    if plan.options.scheme != "none":
        display.console.print(preparation.rate_sentence(making.rate_of(plan), tuned), markup=False, soft_wrap=True)
    display.console.print(
        f"{path}: {len(plan.data):,} bytes, {read.ram_bytes:,} bytes of RAM on a 32-bit board; trains {_trains(plan)}",
        soft_wrap=True,
    )
    if found:
        display.console.print(preparation.advice(found.choice, path, place is None), markup=False, soft_wrap=True)
    for note in said:
        display.console.print(f"note: {note}", markup=False, soft_wrap=True)


_LOSSES = "softmax_ce, mse or hinge"


def _budget(
    ram: str | None,
    buffer: int | None,
    place: str | None,
    weights: str | None,
    gradients: str | None,
    rate: float | None,
) -> Budget | None:
    """What --ram and the options beside it ask for."""
    if ram is None:
        return None
    size = bytes_of(ram)
    if buffer is not None and not 0 <= buffer <= 65535:
        raise UserError(f"--buffer {buffer} is out of range; expected 0 to 65,535 samples")
    kinds = cast(WeightType | None, weights), cast(GradientType | None, gradients)
    return Budget(size, 22 if buffer is None else buffer, cast(Place | None, place), *kinds, rate)


def _fitting(budget: Budget | None, scheme: str | None, layers: str | None, given: dict[str, bool]) -> None:
    """Refuse options that say two things, or nothing."""
    if budget is None:
        for name, is_given in given.items():
            if is_given:
                raise UserError(f"--{name} belongs to a search; name the board's heap, e.g. --ram 96k")
    elif layers:
        raise UserError("--layers says what trains, and --ram would search it; give one of the two")
    elif scheme not in (None, "sparse"):
        raise UserError(f"--ram searches what trains, which --scheme {scheme} says already; give one of the two")
    if layers and scheme not in (None, "sparse"):
        raise UserError(f"--layers says what trains, and so does --scheme {scheme}; give one of the two")
    if scheme == "sparse" and not (budget or layers):
        raise UserError("--scheme sparse needs to know what trains: --ram 96k searches it, --layers names it")


def _network(
    model: Path, x: NDArray[Any] | None, loss: str | None, steps: display.Steps
) -> tuple[Network, NDArray[np.int8] | None]:
    """The network in a file, quantised, and the samples as codes of its input."""
    from ulearn_host import importers

    if model.suffix in importers.GRAPHS:
        network, codes = importers.quantised(model, x, steps.bar(f"reading {model.name}"))
        return replace(network, loss=loss_of(loss, network.loss)), codes
    layers, found, known = importers.load_model(model)
    if x is None:
        raise UserError(f"{model}: a float network needs samples to be quantised; name them with --calibration")
    x = x.reshape(len(x), -1)
    network = quantise(layers, x, loss_of(loss, found), known, source=model.name)
    return network, network.input.codes(x)


def _kept(cache: Path) -> str:
    if cache.exists():
        return f"{cache} has what an earlier search measured, and is gone on with (--restart begins anew)"
    return f"what is measured is kept in {cache}: a stopped search goes on from there"


def _prepared(plan: Plan, read: report.Report, tuned: Tuned, said: list[str], found: Found | None) -> dict[str, Any]:
    """For `--json`."""
    from ulearn_host.prepare import rate_of

    return {
        "plan": read.path,
        "flash_bytes": len(plan.data),
        "ram_bytes": read.ram_bytes,
        "scheme": plan.options.scheme,
        "weights": plan.options.weights,
        "gradients": plan.options.gradients,
        "layerwise": plan.options.layerwise,
        "recompute": plan.options.recompute,
        "trains": [tensor.name for tensor in plan.tensors],
        "learning_rate": rate_of(plan),
        "tuning": vars(tuned),
        "notes": said,
        "search": found.as_json() if found else None,
    }


def loss_of(named: str | None, found: Loss) -> Loss:
    """The loss that the user named, else the one that was found."""
    return found if named is None else cast(Loss, named)


def _trains(plan: Plan) -> str:
    return ", ".join(tensor.name for tensor in plan.tensors) or "nothing"


def _targets(path: Path | None, y: NDArray[Any], network: Network) -> NDArray[Any] | None:
    """y as labels or vectors that fit the network; None where nothing could be trained with them."""
    outputs = network.output.size
    if network.loss == "none":
        return None
    if network.loss == "mse":
        if y.dtype.kind not in "fiu" or y.size != len(y) * outputs:
            raise UserError(f"{path}: y has shape {y.shape}, expected targets ({len(y)}, {outputs})")
        return y
    if network.labels and not np.issubdtype(y.dtype, np.integer):
        y = np.array([network.labels.index(str(v)) if str(v) in network.labels else -1 for v in y])
    if y.ndim != 1 or y.dtype.kind not in "iub" or y.min() < 0 or y.max() >= outputs:
        raise UserError(f"{path}: y must hold labels from 0 to {outputs - 1}")
    return y


@app.command(
    epilog="Examples:  ulearn inspect digits.ulm  |  ulearn inspect digits.ulm --picture memory.html  |  "
    "ulearn inspect digits.ulm --json"
)
def inspect(
    plan: PlanPath,
    as_json: Json = False,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the memory over the operations into this file: .html or .png.")
    ] = None,
) -> None:
    """Show a plan's operations, its memory over them, RAM and flash, and where frozen weights may lie."""
    from ulearn_host import inspection
    from ulearn_host import picture as pictures

    if picture:
        pictures.check(picture)
    read = report.read(plan)
    if picture:
        pictures.write(picture, read)
    if as_json:
        print(json.dumps(read.as_json(), indent=2))
        return
    inspection.show(read)
    if picture:
        display.console.print(f"picture: {picture}", markup=False, soft_wrap=True)


@app.command(epilog="Example:  ulearn deploy digits.ulm --port /dev/ttyACM0")
def deploy(
    plan: PlanPath,
    port: Port,
    no_rom: Annotated[bool, typer.Option("--no-rom", help="Use the file system where there is a ROMFS, too.")] = False,
    as_json: Json = False,
) -> None:
    """Put the package, the native kernels and a plan on a board, and prove them there.

    Only what changed is copied. The new plan takes the old one's place after a self-test: an inference and ten training
    steps with the same bits as on this computer. The board begins with the plan's weights; checkpoints stay.
    A ROMFS that is empty, or holds an earlier deploy's files, takes them in place of the file system.
    """
    from ulearn_host.deploy import deploy as put

    report.read(plan)
    with display.steps() as steps:
        done = put(port, plan, steps.bar(f"deploying {plan.name} to {port}", 100), use_rom=not no_rom)
    if as_json:
        print(json.dumps({**vars(done), "board": vars(done.board)}))
        return
    files = f"{len(done.copied)} files, {done.copied_bytes:,} bytes copied" if done.copied else "nothing to copy"
    display.console.print(
        f"{port}: {plan.name} is there ({done.board.architecture}, MicroPython {done.board.version}, "
        f"executor {done.executor}); {files}; the self-test gave the same bits as here"
    )
    if done.note:
        display.console.print(f"{port}: {done.note}")


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
    with fleet.opened(port, facts) as link, display.steps() as steps:
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
    with fleet.opened(port, facts) as link, display.steps() as steps:
        score = link.score(samples.x, samples.y, steps.bar(f"testing on {len(samples)} samples"))
    if as_json:
        print(json.dumps(vars(score)))
    elif facts.labelled:
        share = display.percent(score.right / score.samples)
        display.console.print(f"{share}: {score.right} of {score.samples} right")
    else:
        error = score.loss * facts.output.scale**2 / score.samples / facts.outputs
        display.console.print(f"mean squared error {error:g} over {score.samples} samples")


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


cli_boards.register(app)
cli_fleet.register(app)
cli_flower.register(app)
cli_simulate.register(app)
for command in app.registered_commands:
    command.help = cli_boards.paragraphs(command.callback) if command.callback else None


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"--{name} {value} is not known; expected one of {', '.join(allowed)}")


def _load(path: Path) -> tuple[Any, Any, str]:
    from ulearn_host.importers import load_samples

    return (*load_samples(path), str(path))


def main() -> int:
    """Entry point: errors of the user are one sentence on stderr and exit status 1."""
    try:
        app(standalone_mode=True)
    except (UserError, EmulatorError) as fault:
        told = "\n".join(display.visible(line) for line in str(fault).splitlines())  # boards have a say in it
        display.errors.print(f"error: {told}", markup=False, soft_wrap=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as fault:
        name = f"{fault.filename}: " if fault.filename else ""
        display.errors.print(f"error: {name}{fault.strerror}", markup=False, soft_wrap=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
