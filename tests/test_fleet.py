"""Updates and their average: exact, whatever the order, and the same on the board as on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ulearn
from cases import random_case
from ulearn import update as wire
from ulearn_host import aggregate, rule_names
from ulearn_host.errors import UserError
from ulearn_host.fleet import PlanFacts


def trained(case, path, seed, steps=12):  # type: ignore[no-untyped-def]
    """A model that has learned from its case's samples in an order of its own."""
    model = ulearn.load(str(path))
    trainer = ulearn.Trainer(model, seed=seed, skip=0)
    trainer.set_rate(1500, -22)
    for i in np.random.default_rng(seed).permutation(steps):
        target = int(case.targets[i]) if case.targets.ndim == 1 else case.targets[i].tobytes()
        trainer.step(case.inputs[i], target)
    return model


@pytest.mark.parametrize("seed", range(8))
def test_update_restores_the_weights(seed: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Base plus update is the trained model, to the bit; applied to a file, it survives loading again."""
    case = random_case(seed)
    path = tmp_path / "m.ulm"
    path.write_bytes(case.plan.data)
    model = trained(case, path, 3)
    update = model.update(12)
    decoded = aggregate.decode(update, bytes(model.tensors))
    assert decoded.num_samples == 12 and decoded.saturated == 0
    assert aggregate.encode(decoded, bytes(model.tensors)) == update
    other = ulearn.load(str(path))
    assert other.train_blob != model.train_blob
    other.apply(update)
    assert other.train_blob == model.train_blob
    again = ulearn.load(str(path))
    assert again.train_blob == model.train_blob and again.base_id == other.base_id != model.base_id
    with pytest.raises(ValueError, match="another base"):
        again.apply(update)
    fresh = tmp_path / "fresh.ulm"
    fresh.write_bytes(PlanFacts(path).with_weights(bytes(again.train_blob)))
    assert ulearn.load(str(fresh)).train_blob == model.train_blob


def test_fedavg_is_the_weighted_mean() -> None:
    """Against exact fractions; the order of the boards changes no bit; mixed bases are refused."""
    from fractions import Fraction

    rng = np.random.default_rng(5)
    updates = [
        aggregate.Update(b"m" * 16, b"b" * 16, int(rng.integers(1, 500)), rng.integers(-40000, 40000, 300))
        for _ in range(7)
    ]
    mean = aggregate.fedavg(updates).values
    assert np.array_equal(mean, aggregate.fedavg(updates[::-1]).values)
    total = sum(u.num_samples for u in updates)
    for i in range(300):
        exact = Fraction(sum(int(u.values[i]) * u.num_samples for u in updates), total)
        assert abs(mean[i] - exact) <= Fraction(1, 2)
    other = aggregate.Update(b"m" * 16, b"c" * 16, 1, updates[0].values)
    with pytest.raises(ValueError, match="different"):
        aggregate.fedavg([updates[0], other])
    with pytest.raises(ValueError, match="no sample"):
        aggregate.fedavg([aggregate.Update(b"m" * 16, b"c" * 16, 0, updates[0].values)])


def test_checkpoint_resumes_to_the_bit(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Stopped and restored in the middle, training ends at the bits of an uninterrupted run."""
    for seed in range(8):
        case = random_case(seed)
        path = tmp_path / f"{seed}.ulm"
        path.write_bytes(case.plan.data)
        whole = trained(case, path, 1)
        order = np.random.default_rng(1).permutation(12)

        def run(model, steps, fresh, case=case, order=order):  # type: ignore[no-untyped-def]
            if fresh:
                trainer = ulearn.Trainer(model, seed=1, skip=0)
                trainer.set_rate(1500, -22)
            else:
                trainer = ulearn.Trainer(model)  # goes on with what the checkpoint says
            for i in order[steps]:
                target = int(case.targets[i]) if case.targets.ndim == 1 else case.targets[i].tobytes()
                trainer.step(case.inputs[i], target)

        first = ulearn.load(str(path))
        run(first, slice(0, 5), True)
        first.save(str(tmp_path / "c"))
        second = ulearn.load(str(path))
        second.restore(str(tmp_path / "c"))
        run(second, slice(5, 12), False)
        assert second.train_blob == whole.train_blob and second.state == whole.state, seed


def test_numbers_of_every_kind_are_taken() -> None:
    """bytes, bytearray, memoryview, array, numpy int8; lists and floats are quantised with the input's scale."""
    from array import array

    case = random_case(5)
    model = ulearn.load(case.plan.data)
    x = case.inputs[0]
    want = bytes(model.output(x.tobytes()))
    for codes in (bytearray(x.tobytes()), memoryview(x.tobytes()), array("b", x.tolist()), array("B", x.tobytes()), x):
        assert bytes(model.output(codes)) == want
    real = (x.astype(np.float64) - model.input_zero) * model.input_scale
    for numbers in (real, real.astype(np.float32), real.tolist(), array("f", real.tolist()), array("d", real.tolist())):
        assert bytes(model.output(numbers)) == want
    with pytest.raises(ValueError, match="expected"):
        model.output(x[:-1])


def test_a_save_never_takes_the_plans_place(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The plan and its base cannot be overwritten by a checkpoint."""
    path = tmp_path / "m.ulm"
    path.write_bytes(random_case(2).plan.data)
    model = ulearn.load(str(path))
    for place in (path, tmp_path / "m.ulm.base"):
        with pytest.raises(ValueError, match="another file"):
            model.save(str(place))
    assert path.read_bytes() == random_case(2).plan.data


def test_a_plan_at_an_odd_address_runs() -> None:
    """As ROMFS may hand it out: what must be aligned is copied."""
    case = random_case(3)
    x = case.inputs[0].tobytes()
    odd = ulearn.load(memoryview(b"x" + case.plan.data)[1:])
    assert bytes(odd.output(x)) == bytes(ulearn.load(case.plan.data).output(x))


def test_features_feed_the_head() -> None:
    """The features at the named cut are the last hidden layer's activations."""
    import reference

    for seed in range(20):
        case = random_case(seed)
        if len(case.plan.network.layers) < 2:
            continue
        model = ulearn.load(case.plan.data)
        machine = reference.Machine(reference.parse(case.plan.data))
        x = case.inputs[0].tobytes()
        count = len(case.plan.network.layers) - 1
        machine.run("forward", x, b"", 0, count)
        offset = machine.plan.programs["forward"].records[count - 1].operands[1].offset
        size = case.plan.network.layers[-2].output.size
        assert bytes(model.features(x)) == bytes(machine.arena[offset : offset + size])


@pytest.mark.parametrize("seed", range(4))
def test_other_rules_work_in_real_units(seed: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The mean by that way is the exact one; one board that sends nonsense moves the mean, and the median little."""
    case = random_case(seed)
    path = tmp_path / "net.ulm"
    path.write_bytes(case.plan.data)
    facts = PlanFacts(path)
    channels = [t.scales for t in case.plan.tensors]
    assert len(facts.steps) == sum(count for _, count, _ in wire.tensors(facts.table))
    assert facts.steps[0] == channels[0][0] and facts.steps[-1] == channels[-1][-1]
    updates = [
        aggregate.decode(bytes(trained(case, path, board).update(10 + board)), facts.table) for board in range(5)
    ]
    honest = aggregate.fedavg(updates)
    mean = aggregate.combined(updates, rule_names.parse("mean"), facts.steps)
    assert (mean.values == honest.values).all() and mean.num_samples == honest.num_samples
    liar = replace(updates[0], values=np.where(updates[0].values > 0, -20000, 20000))
    seen = [liar, *updates[1:]]
    far = np.abs(aggregate.fedavg(seen).values - honest.values).mean()
    near = np.abs(aggregate.combined(seen, rule_names.parse("median"), facts.steps).values - honest.values).mean()
    assert near < far / 20
    with pytest.raises(UserError, match="liars|clients"):
        aggregate.combined(updates[:3], rule_names.parse("krum:1"), facts.steps)
    with pytest.raises(ValueError, match="different"):
        aggregate.combined([*updates, replace(liar, base_id=b"x" * 16)], rule_names.parse("median"), facts.steps)
