"""What fleets learn: integers beside float32, encodings by their bytes, rules against boards that lie.

    python tests/fleet_accuracy.py [--full] [--tables fleet-accuracy,encodings,attacks] [--resume FILE] [--write]

Every run is `simulation.run`: the real state machine of rounds and the board's own code, all boards in every round.
Runs are many and short; --resume keeps each in a line of FILE and goes on from there. It does not know when the code
has changed: then begin a new one. Without --full there are fewer seeds, rates and attacks: about 15 minutes of a core,
and with it 75.

fleet-accuracy: MLPerf Tiny's keyword network, a board for each of 53 speakers, in two fleets that share no speaker,
drawn anew with every seed. A board learns from one half of its clips; the halves that it keeps, and all clips of the
other fleet, judge. The same job in float32: the same boards, samples and orders, the mean in float64. The learning rate
of a fleet is the one of RATES that served the other fleet best, for float and integers apart.

encodings: the same network's last layer in one fleet of all speakers, from where it was pretrained and begun anew (its
weights 0). Bytes are those of one board and round.

attacks: a fifth of the boards lie in every round. What is lost is counted from the same rule ("lost"), and from the
mean ("to the mean"), both without liars; accuracy is the mean over the last LAST rounds. kws01 is its last layer begun
anew, 50 speakers; digits are a perceptron whole, 20 boards of 39 samples. "classes apart": splits.skew, of IID boards
what chance makes of few samples.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from threadpoolctl import threadpool_limits

import fleet_worlds as worlds
import speakers
import ulearn
from fleet_worlds import Data, Indices
from ulearn_host import aggregate, display
from ulearn_host.federation import attacks, float_fleet, simulation, splits
from ulearn_host.federation.job import Job
from ulearn_host.fleet import PlanFacts

TABLES = ("fleet-accuracy", "encodings", "attacks")
RATES = {"last": (0.1, 0.3, 1.0), "sparse": (0.001, 0.003, 0.01)}
FLEET_ROUNDS, ENCODING_ROUNDS = 10, 20
LIMIT = 256  # bytes up
ENCODING_RATE = 0.3
LAST = 5
ATTACKS = ("none", "label-flip:0.2", "label-flip:5:0.2", "scale:-10:0.2")

Numbers = dict[str, float]
Case = tuple[str, Callable[[], Numbers]]


@dataclass(frozen=True)
class Settings:
    """How much is tried."""

    seeds: tuple[int, ...] = (1, 2, 3)
    rates: Mapping[str, tuple[float, ...]] = None  # type: ignore[assignment]
    attacks: tuple[str, ...] = ATTACKS

    def __post_init__(self) -> None:
        if self.rates is None:
            object.__setattr__(self, "rates", RATES)


FULL = Settings()
SHORT = Settings((1,), {"last": (0.1, 0.3), "sparse": (0.003, 0.01)}, ("none", *ATTACKS[2:]))


def fleet(
    data: Data, boards: Sequence[Indices], judges: Indices, job: Job, attack: str = "none", seed: int = 1
) -> simulation.Result:
    """One simulated fleet; boards: whose clips; all of them in every round."""
    lies = None if attack == "none" else attacks.parse(attack)
    with TemporaryDirectory() as folder:
        plan = worlds.put(data, Path(folder))
        world = simulation.World(plan, tuple(map(data.samples, boards)), data.samples(judges), attack=lies, seed=seed)
        return simulation.run(world, job, 1)


def job(boards: int, rounds: int, rate: float, **more: object) -> Job:
    """All boards in every round, one epoch each unless more says otherwise."""
    given = {"epochs": 1, "retry_s": 1.0} | more
    return Job("accuracy", rounds, boards, over=1.0, learning_rate=rate, **given)  # type: ignore[arg-type]


# ---- Integers beside float32 -----------------------------------------------------------------------------------------


def fleets(seed: int) -> tuple[list[int], list[int]]:
    """The frequent speakers in two halves."""
    mixed = np.random.default_rng(seed).permutation(speakers.frequent(worlds.clips())).tolist()
    return mixed[::2], mixed[1::2]


def accuracy(scheme: str, seed: int, half: int, rate: float) -> Numbers:
    """One fleet, in integers and in float32: percent right before and after, on its own speakers and on the others."""
    mine, others = fleets(seed)[half], fleets(seed)[1 - half]
    boards, judged = worlds.halves(mine, seed)
    own, strange = np.concatenate(judged), np.flatnonzero(np.isin(worlds.clips().speakers, others))
    data, asked = worlds.keywords(scheme), job(len(mine), FLEET_ROUNDS, rate)
    result = fleet(data, boards, own, asked)
    net = worlds.FloatBoards(scheme, boards, asked)
    before = ulearn.load(data.plan).train_blob
    found = {
        "own before int": 100 * result.before,
        "own before float": net.right(own),
        "strange before int": data.right(bytes(before), strange),
        "strange before float": net.right(strange),
    }
    # Float32 may diverge at the highest rates; that is a result, not a fault.
    with threadpool_limits(1), np.errstate(all="ignore"):
        for _ in float_fleet.run(net, asked, result.rounds, [len(b) for b in boards]):
            pass
        found |= {"own after float": net.right(own), "strange after float": net.right(strange)}
    return found | {
        "own after int": 100 * result.after,
        "strange after int": data.right(result.blob, strange),
        "clips": float(np.mean([len(b) for b in boards])),
    }


def accuracy_key(scheme: str, seed: int, half: int, rate: float) -> str:
    """What a run is called in the journal."""
    return f"fleet-accuracy {scheme} seed {seed} half {half} rate {rate:g} rounds {FLEET_ROUNDS}"


def accuracy_cases(settings: Settings) -> Iterator[Case]:
    """All fleets at all rates."""
    for scheme, rates in settings.rates.items():
        for seed in settings.seeds:
            for half in (0, 1):
                for rate in rates:
                    given = scheme, seed, half, rate
                    yield accuracy_key(*given), partial(accuracy, *given)


@dataclass(frozen=True)
class Gap:
    """A scheme over all fleets: means of the numbers at the rates that served the other fleets, float less integer in
    points with its standard error, and how often each rate was taken."""

    scheme: str
    means: Numbers
    gap: float
    error: float
    rates: dict[str, dict[float, int]]


def gaps(done: Mapping[str, Numbers], settings: Settings) -> list[Gap]:
    """A row a scheme."""
    rows = []
    for scheme, rates in settings.rates.items():
        taken: dict[str, dict[float, int]] = {"int": {}, "float": {}}
        found: list[Numbers] = []
        for seed in settings.seeds:
            for half in (0, 1):
                numbers: Numbers = {}
                for kind in ("int", "float"):
                    other = [done[accuracy_key(scheme, seed, 1 - half, r)][f"own after {kind}"] for r in rates]
                    rate = rates[int(np.argmax(other))]
                    taken[kind][rate] = taken[kind].get(rate, 0) + 1
                    mine = done[accuracy_key(scheme, seed, half, rate)]
                    numbers |= {key: value for key, value in mine.items() if key.endswith(kind) or key == "clips"}
                found.append(numbers)
        means = {key: float(np.mean([numbers[key] for numbers in found])) for key in found[0]}
        differences = np.array([numbers["own after float"] - numbers["own after int"] for numbers in found])
        error = float(differences.std(ddof=1) / math.sqrt(len(differences)))
        rows.append(Gap(scheme, means, float(differences.mean()), error, taken))
    return rows


def accuracy_text(done: Mapping[str, Numbers], settings: Settings) -> str:
    """The table, as the README has it."""
    columns = ["kws01, a board a speaker", "frozen, float", "frozen, int8", "fleet, float32", "fleet, integers",
               "float less integers", "strangers, frozen", "strangers, float32", "strangers, integers", "rates, float",
               "rates, integers"]  # fmt: skip
    rows = []
    for row in gaps(done, settings):
        m = row.means
        keys = ("own before float", "own before int", "own after float", "own after int")
        strange = ("strange before int", "strange after float", "strange after int")
        rates = [", ".join(f"{r:g} ({n})" for r, n in sorted(row.rates[kind].items())) for kind in ("float", "int")]
        cells = [*(f"{m[key]:.2f}" for key in keys), f"{row.gap:+.2f} ± {row.error:.2f}"]
        rows.append([row.scheme, *cells, *(f"{m[key]:.2f}" for key in strange), *rates])
    return _table(columns, rows)


# ---- Encodings -------------------------------------------------------------------------------------------------------


def encodings(plan: PlanFacts) -> list[tuple[str, bool, str]]:
    """(up, error feedback, down) of each row: everything, and what fits into LIMIT bytes and less."""
    random_k, top_k = (aggregate.most_kept(plan.table, name, LIMIT) for name in ("random-k", "top-k"))
    rows: list[tuple[str, bool, str]] = [("dense", False, "difference")]
    for up in ("int8", f"random-k:{random_k}", f"random-k:{random_k // 2}", f"top-k:{top_k}", f"top-k:{top_k // 3}"):
        rows += [(up, False, "difference"), (up, True, "difference")]
    return [*rows, (f"top-k:{top_k}", True, "int8")]


def keyword_plan() -> PlanFacts:
    """Of the last layer."""
    with TemporaryDirectory() as folder:
        return PlanFacts(worlds.put(worlds.keywords("last"), Path(folder)))


def encoding(anew: bool, seed: int, up: str, feedback: bool, down: str) -> Numbers:
    """One fleet of all frequent speakers with one encoding."""
    boards, judged = worlds.halves(speakers.frequent(worlds.clips()), seed)
    asked = job(len(boards), ENCODING_ROUNDS, ENCODING_RATE, up=up, error_feedback=feedback, down=down, seed=seed)
    result = fleet(worlds.keywords("last", anew), boards, np.concatenate(judged), asked)
    return {
        "before": 100 * result.before,
        "after": 100 * result.late_mean(LAST),
        "up": sum(r.update_bytes for r in result.rounds) / sum(len(r.boards) for r in result.rounds),
        "longest": max(r.longest for r in result.rounds),
        # Of the first round there is no base to fetch.
        "down": sum(r.base_bytes for r in result.rounds[1:]) / sum(r.asked for r in result.rounds[1:]),
    }


def encoding_key(anew: bool, seed: int, up: str, feedback: bool, down: str) -> str:
    """What a run is called in the journal."""
    return f"encodings {'anew' if anew else 'as it is'} seed {seed} {up} {feedback} {down} rounds {ENCODING_ROUNDS}"


def encoding_cases(settings: Settings) -> Iterator[Case]:
    """All rows."""
    for anew in (False, True):
        for seed in settings.seeds:
            for row in encodings(keyword_plan()):
                yield encoding_key(anew, seed, *row), partial(encoding, anew, seed, *row)


@dataclass(frozen=True)
class Encoded:
    """One encoding, means over the seeds. lost: points below dense, of the network as it is and begun anew."""

    up: str
    feedback: bool
    down: str
    bytes_up: float
    longest: float
    bytes_down: float
    after: tuple[float, float]
    lost: tuple[float, float]


def encoded(done: Mapping[str, Numbers], settings: Settings) -> list[Encoded]:
    """A row an encoding, dense first."""
    rows: list[Encoded] = []
    for row in encodings(keyword_plan()):
        both = [[done[encoding_key(anew, seed, *row)] for seed in settings.seeds] for anew in (False, True)]
        every = both[0] + both[1]
        after = tuple(float(np.mean([numbers["after"] for numbers in runs])) for runs in both)
        lost = tuple(a - b for a, b in zip(rows[0].after if rows else after, after, strict=True))
        up, down = (float(np.mean([numbers[way] for numbers in every])) for way in ("up", "down"))
        longest = max(numbers["longest"] for numbers in every)
        rows.append(Encoded(*row, up, longest, down, after, lost))  # type: ignore[arg-type]
    return rows


def encodings_text(done: Mapping[str, Numbers], settings: Settings) -> str:
    """The table, as the README has it."""
    columns = ["up", "error feedback", "down", "bytes up", "at most", "bytes down", "kws01", "lost",
               "last layer begun anew", "lost"]  # fmt: skip
    rows = []
    for e in encoded(done, settings):
        cells = [e.up, "yes" if e.feedback else "no", e.down, f"{e.bytes_up:,.0f}", f"{e.longest:,.0f}"]
        cells.append(f"{e.bytes_down:,.0f}")
        rows.append([*cells, *(f"{n:z.2f}" for pair in zip(e.after, e.lost, strict=True) for n in pair)])
    first = [done[encoding_key(anew, settings.seeds[0], *encodings(keyword_plan())[0])] for anew in (False, True)]
    rows.insert(0, ["frozen", "", "", "0", "0", "0", f"{first[0]['before']:.2f}", "", f"{first[1]['before']:.2f}", ""])
    return _table(columns, rows, text=3)


# ---- Liars -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Who has what. split: "by speaker" or Dirichlet's alpha; rules: with as many liars as there will be."""

    name: str
    what: str
    split: str
    boards: int
    rounds: int
    rate: float
    epochs: int

    @property
    def rules(self) -> tuple[str, ...]:
        """What is compared."""
        liars = round(0.2 * self.boards)
        return ("mean", "median", "trimmed-mean:0.2", f"multi-krum:{liars}", "bucketed:2:median")

    def samples(self, seed: int) -> tuple[Data, list[Indices], Indices]:
        """The data, each board's samples, and those that judge."""
        if self.what == "digits":
            data = worlds.digits(seed)
            pool, judges = splits.held_out(data.labels, 0.35, seed)
        else:
            data = worlds.keywords("last", anew=True)
            learned, judged = worlds.halves(speakers.frequent(worlds.clips())[: self.boards], seed)
            pool, judges = np.concatenate(learned), np.concatenate(judged)
            if self.split == "by speaker":
                return data, learned, judges
        parts = splits.dirichlet(data.labels[pool], self.boards, float(self.split), seed)
        return data, [pool[part] for part in parts], judges


SCENES = (
    Scene("kws01, IID", "kws01", "inf", 50, 20, 0.1, 1),
    Scene("kws01, by speaker", "kws01", "by speaker", 50, 20, 0.1, 1),
    Scene("kws01, Dirichlet 10", "kws01", "10", 50, 20, 0.1, 1),
    Scene("kws01, Dirichlet 3", "kws01", "3", 50, 20, 0.1, 1),
    Scene("digits, IID", "digits", "inf", 20, 30, 0.1, 2),
    Scene("digits, Dirichlet 10", "digits", "10", 20, 30, 0.1, 2),
)


def lying(scene: Scene, rule: str, attack: str, seed: int) -> Numbers:
    """One fleet with its liars."""
    data, boards, judges = scene.samples(seed)
    asked = job(len(boards), scene.rounds, scene.rate, epochs=scene.epochs, rule=rule, seed=seed)
    result = fleet(data, boards, judges, asked, attack, seed)
    return {
        "before": 100 * result.before,
        "after": 100 * result.late_mean(LAST),
        "skew": splits.skew(data.labels, boards),
    }


def lying_key(scene: Scene, rule: str, attack: str, seed: int) -> str:
    """What a run is called in the journal."""
    how = f"boards {scene.boards} rounds {scene.rounds} rate {scene.rate:g} epochs {scene.epochs}"
    return f"attacks {scene.name} {rule} {attack} seed {seed} {how}"


def lying_cases(settings: Settings, scenes: Sequence[Scene] = SCENES) -> Iterator[Case]:
    """All rules against all attacks."""
    for scene in scenes:
        for rule in scene.rules:
            for attack in settings.attacks:
                for seed in settings.seeds:
                    given = scene, rule, attack, seed
                    yield lying_key(*given), partial(lying, *given)


@dataclass(frozen=True)
class Held:
    """A rule against an attack, means over the seeds. lost: points below the same rule without liars, with its standard
    error (NaN of one seed); below_mean: points below the mean without liars."""

    scene: str
    rule: str
    attack: str
    after: float
    lost: float
    error: float
    below_mean: float


def held(done: Mapping[str, Numbers], settings: Settings, scenes: Sequence[Scene] = SCENES) -> list[Held]:
    """A row for each scene, rule and attack."""
    rows = []
    for scene in scenes:

        def after(rule: str, attack: str, scene: Scene = scene) -> list[float]:
            return [done[lying_key(scene, rule, attack, seed)]["after"] for seed in settings.seeds]

        for rule in scene.rules:
            for attack in settings.attacks:
                values = np.array(after(rule, attack))
                lost = np.array(after(rule, "none")) - values
                error = float(lost.std(ddof=1) / math.sqrt(len(lost))) if len(lost) > 1 else math.nan
                below = float(np.mean(after("mean", "none")) - values.mean())
                rows.append(Held(scene.name, rule, attack, float(values.mean()), float(lost.mean()), error, below))
    return rows


def attacks_text(done: Mapping[str, Numbers], settings: Settings) -> str:
    """The table, as the README has it."""
    columns = ["split", "classes apart", "frozen", "rule", "no liars"]
    for attack in settings.attacks[1:]:
        columns += [attack, "lost / to the mean"]
    rows, found = [], held(done, settings)
    for scene in SCENES:
        first = [done[lying_key(scene, "mean", "none", seed)] for seed in settings.seeds]
        apart, frozen = (float(np.mean([numbers[key] for numbers in first])) for key in ("skew", "before"))
        for rule in scene.rules:
            mine = [h for h in found if (h.scene, h.rule) == (scene.name, rule)]
            facts = [scene.name, f"{100 * apart:.0f} %", f"{frozen:.1f}"] if rule == "mean" else ["", "", ""]
            cells = [*facts, rule, f"{mine[0].after:.1f}"]
            for h in mine[1:]:
                error = "" if math.isnan(h.error) else f" ± {h.error:.1f}"
                cells += [f"{h.after:.1f}", f"{h.lost:z.1f}{error} / {h.below_mean:z.1f}"]
            rows.append(cells)
    return _table(columns, rows)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> None:
    """fleet.png: 200 boards of tilted digits, three mixes of classes; fleet_attacks.png: four rules and liars."""
    from ulearn_host.federation import simulation_plot

    data = worlds.digits(1)
    pool, judges = splits.held_out(data.labels, 0.35, 1)
    with TemporaryDirectory() as temporary:
        plan = worlds.put(data, Path(temporary))
        curves = []
        for alpha in (math.inf, 10.0, 1.0):
            parts = splits.dirichlet(data.labels[pool], 200, alpha, 1)
            boards = tuple(data.samples(pool[part]) for part in parts)
            world = simulation.World(plan, boards, data.samples(judges), dropout=0.1, stragglers=0.1)
            asked = Job("picture", 40, 100, epochs=2, learning_rate=0.1, retry_s=2.0)
            name = "all boards alike" if math.isinf(alpha) else f"Dirichlet {alpha:g}"
            curves.append(simulation_plot.curve(name, simulation.run(world, asked, 1)))
        title = "200 virtual boards learn tilted digits; 10 % drop out of a round, 10 % are eight times slower"
        simulation_plot.write(folder / "fleet.png", curves, title)
    scene, curves = next(scene for scene in SCENES if scene.name == "digits, IID"), []
    data, own, judges = scene.samples(1)
    for rule in scene.rules[:4]:
        asked = job(len(own), scene.rounds, scene.rate, epochs=scene.epochs, rule=rule)
        result = fleet(data, own, judges, asked, ATTACKS[-1])
        curves.append(simulation_plot.curve(rule, result))
    title = "20 virtual boards learn tilted digits; 4 of them send −10 times what they learned"
    simulation_plot.write(folder / "fleet_attacks.png", curves, title)


# ---- The command -----------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """Markdown; columns from `text` on are right-aligned."""
    line = ["---"] * text + ["---:"] * (len(columns) - text)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, line, *rows))


CASES: Mapping[str, Callable[[Settings], Iterator[Case]]] = {
    "fleet-accuracy": accuracy_cases,
    "encodings": encoding_cases,
    "attacks": lying_cases,
}
TEXTS: Mapping[str, Callable[[Mapping[str, Numbers], Settings], str]] = {
    "fleet-accuracy": accuracy_text,
    "encodings": encodings_text,
    "attacks": attacks_text,
}


def known(resume: Path | None) -> dict[str, Numbers]:
    """What was done before; half a line, where a run was killed, counts for nothing."""
    done: dict[str, Numbers] = {}
    text = resume.read_text() if resume and resume.exists() else ""
    if resume and text and not text.endswith("\n"):
        resume.write_text(text + "\n")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        done[entry["case"]] = entry["numbers"]
    return done


def run(tables: Sequence[str], settings: Settings, resume: Path | None = None) -> dict[str, Numbers]:
    """All numbers that tables need, each run once."""
    done = known(resume)
    left = [case for table in tables for case in CASES[table](settings) if case[0] not in done]
    with display.steps() as steps:
        tick = steps.counter(f"{len(left)} fleets", len(left))
        for key, measure in left:
            done[key] = measure()
            if resume:
                with resume.open("a") as file:
                    file.write(json.dumps({"case": key, "numbers": done[key]}) + "\n")
            tick()
    return done


def text(table: str, settings: Settings = FULL, resume: Path | None = None) -> str:
    """A table by the name of its markers, measured where that was not done before."""
    return TEXTS[table](run([table], settings, resume), settings)


def main() -> int:
    """Print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description="What simulated fleets learn.")
    parser.add_argument("--full", action="store_true", help="all seeds, rates and attacks: hours")
    parser.add_argument("--tables", metavar="A,B", default=",".join(TABLES), help=f"which of {','.join(TABLES)}")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done in FILE, and go on from there")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw fleet.png and fleet_attacks.png instead")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    arguments = parser.parse_args()
    tables = arguments.tables.split(",")
    if not set(tables) <= set(TABLES):
        parser.error(f"tables {arguments.tables}: expected some of {','.join(TABLES)}")
    missing = [path for path in speakers.data_files() if not path.exists()]
    if missing:
        print(f"{missing[0]} is missing; ULEARN_DATA names the folder that holds it", file=sys.stderr)
        return 1
    if arguments.pictures:
        pictures(arguments.pictures)
        return 0
    start, settings = time.monotonic(), FULL if arguments.full else SHORT
    for table in tables:
        shown = text(table, settings, arguments.resume)
        print(f"{table}:\n{shown}\n")
        if arguments.write:
            import bench

            bench.put_into_readme(table, shown)
    print(f"seeds {settings.seeds}, executor {ulearn.executor}, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
