"""On speakers it never heard, a board that trains in integers ends where float32 SGD ends, and above where it began."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import adaptation
import speakers
import ulearn
from ulearn_host.prepare import from_network
from ulearn_host.tflite_import import load_tflite

GAP_POINTS = 1.0


@pytest.fixture(scope="module")
def clips(shared_data: Path) -> speakers.Clips:
    """Every keyword clip."""
    return speakers.load(shared_data / speakers.CLIP_FILE)


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Path:
    """The network's file."""
    return shared_data / speakers.MODEL_FILE


@pytest.fixture(scope="module")
def rows(clips: speakers.Clips, model: Path) -> dict[str, adaptation.Row]:
    """The short table, by scheme."""
    some = speakers.frequent(clips)[: speakers.SHORT_SPEAKERS]
    results = speakers.run(clips, model, speakers.SHORT, some)
    print("\n" + speakers.table(results, speakers.SHORT))
    return {row.scheme: row for row in adaptation.summarise(results, speakers.SHORT)}


@pytest.mark.parametrize("scheme", speakers.SHORT.schemes)
def test_integer_training_is_as_good_as_float(rows: dict[str, adaptation.Row], scheme: str) -> None:
    """Of a few speakers the mean paired gap is no more than a point and two standard errors; both have learned."""
    row = rows[scheme]
    assert abs(row.before_float - row.before_int) < 1.5, row
    assert row.gap <= GAP_POINTS + 2 * row.gap_error, row
    assert row.gain > row.gain_error, row


def test_who_they_are(clips: speakers.Clips, model: Path) -> None:
    """53 speakers of 44 clips, no two the same; before adaptation they average what the data's README says."""
    found = speakers.frequent(clips)
    sizes = [int(np.sum(clips.speakers == speaker)) for speaker in found]
    assert (len(found), sum(sizes)) == (53, 2332)
    assert min(sizes) >= speakers.CLIPS
    assert len(np.unique(clips.codes, axis=0)) == len(clips.codes)
    network = load_tflite(model)
    net = speakers.float_network(model)
    net.reset()
    board = ulearn.load(from_network(network, options=speakers.options(network, "last")).data)
    means = np.zeros(2)
    for speaker in found:
        own = clips.speakers == speaker
        shown = clips.codes[own], clips.labels[own]
        means += (speakers.accuracy_float(net, *shown), adaptation.accuracy_int(board, *shown))
    assert means / len(found) == pytest.approx([91.1, 91.1], abs=0.5)


def test_halves() -> None:
    """Each clip in one half; the halves of a word, and of all, differ by one at most; a seed decides."""
    labels = np.random.default_rng(0).integers(0, 10, 45)
    for seed in range(20):
        train, test = speakers.halves(labels, seed)
        assert sorted([*train, *test]) == list(range(45))
        assert abs(len(train) - len(test)) <= 1
        counts = [np.bincount(labels[half], minlength=10) for half in (train, test)]
        assert np.abs(counts[0] - counts[1]).max() <= 1
        assert (speakers.halves(labels, seed)[0] == train).all()
    assert sorted(speakers.halves(labels, 1)[0]) != sorted(speakers.halves(labels, 2)[0])


@pytest.mark.parametrize("scheme", speakers.SCHEMES)
def test_float_trains_what_the_plan_trains(model: Path, scheme: str) -> None:
    """The tensors of the plan, name by name, and how many output channels of each."""
    network = load_tflite(model)
    options = speakers.options(network, scheme)
    plan = from_network(network, options=options)
    wanted = {}
    for layer, (rows, bias) in zip(network.layers, options.parts(network), strict=True):
        wanted |= {layer.name + "/weights": rows} if rows else {}
        wanted |= {layer.name + "/bias": len(layer.bias)} if bias else {}
    assert {tensor.name: tensor.shape[0] for tensor in plan.tensors} == wanted


def test_an_interrupted_run_goes_on(
    clips: speakers.Clips, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the file is not done again; half a line and lines of other settings count for nothing."""
    settings = replace(speakers.SHORT, schemes=("last",), rates=(0.03, 0.1))
    some = speakers.frequent(clips)[:2]
    journal = tmp_path / "done.jsonl"
    first = speakers.run(clips, model, settings, some, journal)
    lines = journal.read_text().splitlines()
    assert len(lines) == 2
    journal.write_text(lines[0] + "\n" + lines[1][:50])
    again = speakers.run(clips, model, settings, some, journal)
    assert len(journal.read_text().splitlines()) == 3
    monkeypatch.setattr(speakers, "prepared", lambda *_: pytest.fail("there was nothing left to do"))
    last = speakers.run(clips, model, settings, some, journal)
    for results in (again, last):
        assert speakers.report(results, settings) == speakers.report(first, settings)
    assert speakers.Journal(journal, replace(settings, epochs=5)).done == {}
    picture = tmp_path / "curves.png"
    speakers.draw(speakers.curves(first, settings), settings.rates, 2, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
