"""How well a board adapts to a speaker it never heard: integer training beside float32 SGD on spoken keywords.

    python tests/speakers.py [--short] [--schemes last,sparse] [--resume FILE] [--picture FILE] [--json FILE]

MLPerf Tiny's keyword network (int8 TFLite) is adapted to every speaker of whom there are at least 20 keyword clips in
the test set of Speech Commands: to one half of these clips, taken word by word, and judged on the other half. Both in
float32 (the same network, dequantised) and by the board's own integer code, on the same clips in the same order. All
of it is repeated with SEEDS (of the halves and of the order) and averaged, since 22 clips judge coarsely. The learning
rate of a speaker is the one of RATES that served other speakers best, for float and integer apart (adaptation.py).
Float32 is plain SGD; the integer step keeps its default of skipping what is right already. Gains are calibrated with
keyword clips of the other, rarer speakers. Recordings that are byte-identical count once.

--resume keeps what is done in FILE, a line a scheme and speaker; a run with the same settings goes on from there. It
does not know when the code has changed: then begin a new one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import adaptation
import ulearn
from adaptation import Course, Settings, Subject, orders
from float_network import FloatNetwork
from ulearn_host import display
from ulearn_host.compiler import Options
from ulearn_host.errors import UserError
from ulearn_host.network import Conv, Network
from ulearn_host.prepare import from_network
from ulearn_host.tflite_import import load_tflite

SCHEMES = ("last", "bias", "last+bias", "sparse", "full")
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = (1, 2, 3)
CLIPS = 20  # keyword clips that a speaker must have
SHORT_SPEAKERS = 12
SHORT = Settings(("last", "last+bias"), (0.01, 0.03, 0.1), seeds=SEEDS[:1])
CALIBRATION = 256
WEAK = 85.0  # percent: below it before adaptation, a speaker needs it most
NO_KEYWORD = ("Silence", "Unknown")
CLIP_FILE = Path("kws") / "kws_test_4890_mfcc_int8.npz"
MODEL_FILE = Path("models") / "kws01_dscnn_int8.tflite"

Codes = NDArray[np.int8]
Labels = NDArray[np.int64]


# ---- Data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clips:
    """Features as int8 codes [n, inputs], and of each clip its class and its speaker, who has a number."""

    codes: Codes
    labels: Labels
    speakers: NDArray[np.int64]


def data_files() -> tuple[Path, Path]:
    """Where the clips and the network are, or would be."""
    folder = Path(os.environ.get("ULEARN_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    return folder / CLIP_FILE, folder / MODEL_FILE


def load(path: Path) -> Clips:
    """The keyword clips of a file, each once."""
    with np.load(path) as archive:
        x, y, names = archive["X"], archive["y"].astype(np.int64), archive["labels"]
        speakers = np.unique(archive["speaker"], return_inverse=True)[1].astype(np.int64)
    codes = np.ascontiguousarray(x.reshape(len(x), -1))
    first = np.sort(np.unique(codes, axis=0, return_index=True)[1])
    kept = first[~np.isin(names[y[first]], NO_KEYWORD)]
    return Clips(codes[kept], y[kept], speakers[kept])


def frequent(clips: Clips, least: int = CLIPS) -> list[int]:
    """The speakers with at least so many clips."""
    numbers, counts = np.unique(clips.speakers, return_counts=True)
    return numbers[counts >= least].tolist()


def halves(labels: Labels, seed: int) -> tuple[Labels, Labels]:
    """Which clips are learned from and which judge, in a random order: every other one of each word, as far as may be.

    The words follow each other, so that both halves are of a size whatever the number of clips of a word.
    """
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(len(labels))
    ordered = mixed[np.argsort(labels[mixed], kind="stable")]
    begin = int(rng.integers(2))
    return rng.permutation(ordered[begin::2]), rng.permutation(ordered[1 - begin :: 2])


# ---- Schemes ---------------------------------------------------------------------------------------------------------


def options(network: Network, scheme: str) -> Options:
    """A scheme for the compiler.

    sparse: the last layer, the biases of the last 4 layers, the weights of the last 2 pointwise convolutions.
    """
    if scheme != "sparse":
        return Options(scheme)
    layers = network.layers
    points = [i for i, op in enumerate(layers) if isinstance(op, Conv) and op.window.kernel == (1, 1)]
    weights, bias = {*points[-2:], len(layers) - 1}, range(len(layers) - 4, len(layers))
    chosen = [(len(op.weights) if i in weights else 0, i in bias) for i, op in enumerate(layers)]
    return Options(scheme, selection=tuple(chosen))


# ---- One speaker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network, its plan for one scheme and the clips that a speaker has."""

    scheme: str
    speaker: int
    network: Path
    plan: bytes
    codes: Codes
    labels: Labels


@cache
def float_network(path: Path) -> FloatNetwork:
    """The network of a file in float32: one a process."""
    return FloatNetwork(load_tflite(path))


def adapt_float(net: FloatNetwork, codes: Codes, y: Labels, course: Course) -> None:
    """Plain stochastic gradient descent in float32 from the pretrained weights, the rate halved after every epoch."""
    net.reset()
    trains = options(net.network, course.scheme).parts(net.network)
    frozen = net.frozen(net.network.input.real(codes), trains)
    for epoch, order in enumerate(orders(len(codes), course.epochs, course.seed)):
        for i in order:
            sample = {tensor: values[i : i + 1] for tensor, values in frozen.items()}
            net.step(sample, int(y[i]), course.rate * 0.5**epoch, trains)


def accuracy_float(net: FloatNetwork, codes: Codes, y: Labels) -> float:
    """Percent of the clips that the float network names rightly."""
    return float(100 * np.mean(net.forward(net.network.input.real(codes)).argmax(axis=1) == y))


def run_speaker(settings: Settings, task: Task) -> Subject:
    """One speaker and scheme, at every rate: accuracies averaged over the seeds."""
    net, model = float_network(task.network), ulearn.load(task.plan)
    before, after = [], []
    # Float32 may diverge at the highest rates; that is a result, not a fault.
    with threadpool_limits(1), np.errstate(all="ignore"):
        for seed in settings.seeds:
            train, test = halves(task.labels, seed)
            shown = task.codes[train], task.labels[train]
            judges = task.codes[test], task.labels[test]
            net.reset()
            model.reset()
            before.append((accuracy_float(net, *judges), adaptation.accuracy_int(model, *judges)))
            for rate in settings.rates:
                course = Course(task.scheme, rate, settings.epochs, seed, settings.skip)
                adapt_float(net, *shown, course)
                adaptation.adapt_int(model, *shown, course)
                after.append((accuracy_float(net, *judges), adaptation.accuracy_int(model, *judges)))
    means = np.mean(before, axis=0)
    rates = np.reshape(after, (len(settings.seeds), len(settings.rates), 2)).mean(axis=0)
    return Subject(task.speaker, float(means[0]), float(means[1]), rates[None, :, 0], rates[None, :, 1])


# ---- All speakers ----------------------------------------------------------------------------------------------------


class Journal:
    """What is done: a line of JSON a scheme and speaker, appended as it comes."""

    def __init__(self, path: Path | None, settings: Settings) -> None:
        """path: where; None: nowhere. Lines of other settings are left alone."""
        self.path = path
        self.settings = {key: value for key, value in asdict(settings).items() if key != "schemes"}
        self.settings = json.loads(json.dumps(self.settings))
        self.done: dict[tuple[str, int], Subject] = {}
        text = path.read_text() if path and path.exists() else ""
        if path and text and not text.endswith("\n"):
            path.write_text(text + "\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line at which the last run was interrupted
            if entry.pop("settings") == self.settings:
                scheme, after = entry.pop("scheme"), [np.array([entry.pop(k)]) for k in ("after_float", "after_int")]
                self.done[scheme, entry["subject"]] = Subject(*entry.values(), *after)

    def add(self, scheme: str, subject: Subject) -> None:
        """One more."""
        self.done[scheme, subject.subject] = subject
        if self.path is None:
            return
        entry = {"scheme": scheme} | asdict(subject)
        entry |= {key: entry[key][0].tolist() for key in ("after_float", "after_int")} | {"settings": self.settings}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def prepared(network: Network, clips: Clips, scheme: str) -> bytes:
    """The plan of a scheme, calibrated with clips of speakers who are not among the frequent ones."""
    others = np.flatnonzero(~np.isin(clips.speakers, frequent(clips)))
    shown = np.random.default_rng(0).permutation(others)[:CALIBRATION]
    plan = from_network(network, clips.codes[shown], clips.labels[shown], options=options(network, scheme))
    return plan.data


def tasks(
    clips: Clips, model: Path, settings: Settings, speakers: Sequence[int], done: Container[tuple[str, int]]
) -> Iterator[Task]:
    """What is left to do."""
    network = load_tflite(model)
    for scheme in settings.schemes:
        left = [speaker for speaker in speakers if (scheme, speaker) not in done]
        plan = prepared(network, clips, scheme) if left else b""
        for speaker in left:
            own = clips.speakers == speaker
            yield Task(scheme, speaker, model, plan, clips.codes[own], clips.labels[own])


def run(
    clips: Clips,
    model: Path,
    settings: Settings,
    speakers: Sequence[int],
    resume: Path | None = None,
    processes: int = 2,
) -> list[Subject]:
    """Every speaker with every scheme, on as many cores as there are, at most `processes`."""
    journal = Journal(resume, settings)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, os.cpu_count() or 1), mp_context=context)
    try:
        with display.steps() as steps:
            left = list(tasks(clips, model, settings, speakers, journal.done))
            tick = steps.counter(f"adapting to {len(speakers)} speakers, {len(left)} runs", len(left))
            running = {pool.submit(run_speaker, settings, task): task for task in left}
            for future in as_completed(running):
                journal.add(running[future].scheme, future.result())
                tick()
    finally:
        pool.shutdown(cancel_futures=True)
    return [_joined([journal.done[scheme, speaker] for scheme in settings.schemes]) for speaker in speakers]


def _joined(parts: Sequence[Subject]) -> Subject:
    """One speaker's schemes in one."""
    after = [np.concatenate([getattr(part, key) for part in parts]) for key in ("after_float", "after_int")]
    return replace(parts[0], after_float=after[0], after_int=after[1])


# ---- What it says ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weakest:
    """The speakers below WEAK before adaptation, in percent, and how many they are."""

    scheme: str
    speakers: int
    before_int: float
    after_float: float
    after_int: float


def weakest(results: Sequence[Subject], settings: Settings) -> list[Weakest]:
    """A row a scheme, at the rates of the main table; none where no speaker is weak."""
    weak = np.array([result.before_int < WEAK for result in results])
    before = [result.before_int for result in results if result.before_int < WEAK]
    rows = []
    for s, scheme in enumerate(settings.schemes if before else ()):
        both = [np.array([after[s] for after in kind]) for kind in zip(*_after(results), strict=True)]
        ends = [(after * adaptation.chosen(after)).sum(axis=1)[weak].mean() for after in both]
        rows.append(Weakest(scheme, len(before), float(np.mean(before)), *map(float, ends)))
    return rows


def _after(results: Sequence[Subject]) -> list[tuple[Any, Any]]:
    return [(result.after_float, result.after_int) for result in results]


@dataclass(frozen=True)
class Curve:
    """Accuracy at every rate, averaged over speakers, and before adaptation."""

    scheme: str
    before: float
    after_float: list[float]
    after_int: list[float]


def curves(results: Sequence[Subject], settings: Settings) -> list[Curve]:
    """A curve a scheme."""
    before = float(np.mean([result.before_int for result in results]))
    means = np.mean(_after(results), axis=0)  # [kinds, schemes, rates]
    return [Curve(scheme, before, *means[:, s].tolist()) for s, scheme in enumerate(settings.schemes)]


def draw(found: Sequence[Curve], rates: Sequence[float], count: int, path: Path) -> None:
    """The curves as a PNG, a panel a scheme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(found), figsize=(2.1 + 2.5 * len(found), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, curve in zip(axes[0], found, strict=True):
        axis.axhline(curve.before, color="0.45", linestyle=":", label="int8, not adapted")
        axis.plot(rates, curve.after_float, color="#0072b2", marker="o", markersize=4, label="float32")
        axis.plot(rates, curve.after_int, color="#d55e00", marker="s", markersize=4, label="integers")
        axis.set_xscale("log")
        axis.set_title(curve.scheme)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    # What collapses at high rates must not squeeze what is to be compared.
    highest = max(max(curve.before, *curve.after_float, *curve.after_int) for curve in found)
    lowest = min(curve.before for curve in found)
    axes[0][0].set_ylim(max(0.0, lowest - 1.5 * (highest - lowest) - 1), highest + 1)
    axes[0][0].set_ylabel("held-out clips named rightly, %")
    figure.supxlabel("learning rate", fontsize="medium")
    figure.suptitle(f"Keywords of {count} speakers, adapted to about 22 clips of each", fontsize="medium")
    axes[0][0].legend(loc="lower left", frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def report(results: Sequence[Subject], settings: Settings) -> Mapping[str, Any]:
    """All that was found, as JSON has it."""
    return {
        "speakers": len(results),
        "settings": asdict(settings),
        "rows": [asdict(row) for row in adaptation.summarise(results, settings)],
        "weakest": [asdict(row) for row in weakest(results, settings)],
        "curves": [asdict(curve) for curve in curves(results, settings)],
    }


def table(results: Sequence[Subject], settings: Settings) -> str:
    """The rows as text, and the weakest speakers below."""
    lines = [adaptation.table(adaptation.summarise(results, settings))]
    for row in weakest(results, settings):
        lines.append(
            f"{row.scheme:11}{row.speakers} speakers below {WEAK:g} %: {row.before_int:.2f} before, "
            f"{row.after_float:.2f} after in float, {row.after_int:.2f} in int8"
        )
    return "\n".join(lines)


def short() -> str:
    """The table of the short form."""
    clips = load(data_files()[0])
    results = run(clips, data_files()[1], SHORT, frequent(clips)[:SHORT_SPEAKERS], None)
    return table(results, SHORT)


# ---- The command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Integer against float32 adaptation to speakers of keywords.")
    parser.add_argument("--short", action="store_true", help="a few speakers, schemes and rates, the first seed only")
    parser.add_argument("--schemes", metavar="A,B", help=f"which of {','.join(SCHEMES)}")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"how many, of halves and orders; else {len(SEEDS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same numbers to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write accuracy over learning rate to FILE, a PNG")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done in FILE, and go on from there")
    return parser


def main() -> int:
    """Print the table; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args()
    settings = SHORT if arguments.short else Settings(SCHEMES, RATES, seeds=SEEDS)
    schemes = tuple(arguments.schemes.split(",")) if arguments.schemes else settings.schemes
    seeds = tuple(range(1, arguments.seeds + 1)) if arguments.seeds else settings.seeds
    settings = replace(settings, schemes=schemes, seeds=seeds)
    if not set(schemes) <= set(SCHEMES):
        parser.error(f"schemes {','.join(schemes)}: expected some of {','.join(SCHEMES)}")
    missing = [path for path in data_files() if not path.exists()]
    if missing:
        print(f"{missing[0]} is missing; ULEARN_DATA names the folder that holds it", file=sys.stderr)
        return 1
    start = time.monotonic()
    clips = load(data_files()[0])
    speakers = frequent(clips)[: SHORT_SPEAKERS if arguments.short else None]
    try:
        results = run(clips, data_files()[1], settings, speakers, arguments.resume)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    print(table(results, settings))
    print(f"{len(results)} speakers, seeds {settings.seeds}, executor {ulearn.executor}, {seconds:.0f} s")
    if arguments.write:
        import bench

        bench.put_into_readme("speakers", f"```\n{table(results, settings)}\n```")
    if arguments.picture:
        draw(curves(results, settings), settings.rates, len(results), arguments.picture)
    if arguments.json:
        found = report(results, settings) | {"seconds": round(seconds, 1)}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
