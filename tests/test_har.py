"""On people it never saw, a board that trains in integers ends where float32 SGD ends, and above where it began."""

from __future__ import annotations

import pytest

import adaptation
import bench

GAP_POINTS = 1.0


@pytest.fixture(scope="module")
def rows() -> dict[str, adaptation.Row]:
    """The full table, by scheme: every subject, every rate, every seed."""
    path = adaptation.data_file()
    if not path.is_file():
        pytest.skip(f"{path} is missing; ULEARN_DATA names the folder that holds har/")
    settings = adaptation.Settings()
    rows = adaptation.summarise(adaptation.run(adaptation.load(path), settings), settings)
    print("\n" + adaptation.table(rows))
    return {row.scheme: row for row in rows}


@pytest.mark.parametrize("scheme", adaptation.TRAINING_SCHEMES)
def test_before_adaptation(rows: dict[str, adaptation.Row], scheme: str) -> None:
    """What both start from is the same network: quantisation costs less than a point, and it was worth adapting."""
    row = rows[scheme]
    assert abs(row.before_float - row.before_int) < 1, row
    assert 84 < row.before_float < 91, row


@pytest.mark.parametrize("scheme", adaptation.TRAINING_SCHEMES)
def test_integer_training_is_as_good_as_float(rows: dict[str, adaptation.Row], scheme: str) -> None:
    """The mean paired gap is at most a point, by two standard errors; the best rates lie within the grid."""
    row = rows[scheme]
    assert row.gap + 2 * row.gap_error <= GAP_POINTS, row
    ends = {adaptation.RATES[0], adaptation.RATES[-1]}
    assert not ends & (row.rates_float.keys() | row.rates_int.keys()), row


@pytest.mark.parametrize("scheme", adaptation.TRAINING_SCHEMES)
def test_adaptation_pays(rows: dict[str, adaptation.Row], scheme: str) -> None:
    """What was learned on one half of a person's executions helps on the other half, beyond two standard errors."""
    row = rows[scheme]
    assert row.after_int > row.before_int, row
    assert row.gain > 2 * row.gain_error, row


def test_the_readme_says_so(rows: dict[str, adaptation.Row]) -> None:
    """Its accuracies are within half a point: the pretraining's float sums depend on the machine."""
    measured = f"```\n{adaptation.table(list(rows.values()))}\n```"
    old, new = (
        [line.split()[:5] for line in text.splitlines()[3:-1]] for text in (bench.in_readme("accuracy"), measured)
    )
    assert len(old) == len(new) == 5
    for a, b in zip(old, new, strict=True):
        assert a[0] == b[0]
        assert all(abs(float(x) - float(y)) <= 0.5 for x, y in zip(a[1:], b[1:], strict=True)), (a, b)
