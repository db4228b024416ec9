"""The parts that make a run repeatable: schedules, data order, weight average, steps that are not finite."""

import contextlib
import itertools
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from vqgen.data import order
from vqgen.data.order import BatchOrder, coin_flips, mixed_seed, seed_step
from vqgen.errors import InputError
from vqgen.settings import OptimConfig, Stage1Config, TrackingConfig, TrainConfig
from vqgen.tokenizers.light import Light
from vqgen.training import schedule
from vqgen.training.average import WeightEMA
from vqgen.training.checkpoints import save_checkpoint
from vqgen.training.cpu import CHOSEN, keep_threads
from vqgen.training.guard import Diverged, FiniteGuard
from vqgen.training.means import Means, Stopwatch
from vqgen.training.run import Run, attempts
from vqgen.training.schedule import Budget, lr_at, micro_batch_size, parameter_groups, ramp_at
from vqgen.training.state import TrainState
from vqgen.training.stop import Stop
from vqgen.yaml_file import save_config

CPU = torch.device("cpu")


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process take itself for one of several."""

    def become(rank: int, world_size: int) -> None:
        for module in (order, schedule):
            monkeypatch.setattr(module, "rank", lambda: rank, raising=False)
            monkeypatch.setattr(module, "world_size", lambda: world_size)

    return become


# lr_at


def test_lr_warms_up_linearly_to_its_peak_and_ends_at_zero():
    optim = OptimConfig(lr=2.0, warmup=0.1)
    lrs = [lr_at(share, optim) for share in np.linspace(0, 1, 1001)]
    peak = int(np.argmax(lrs))
    assert 0 < lrs[0] < 0.05
    assert peak / 1000 == pytest.approx(0.1, abs=0.005)
    assert lrs[peak] == pytest.approx(2.0, rel=0.05)
    assert np.all(np.diff(lrs[: peak + 1]) > 0)
    assert np.all(np.diff(lrs[peak:]) < 0)
    assert lrs[50] / lrs[25] == pytest.approx(2, rel=0.03)
    assert lr_at(0.5, optim) == pytest.approx(1.0)
    assert lr_at(0.75, optim) == pytest.approx(1 - np.sqrt(0.5))
    assert lr_at(1.0, optim) == lr_at(1.5, optim) == 0


def test_lr_without_warm_up_starts_at_its_peak():
    assert lr_at(0.0, OptimConfig(lr=2.0, warmup=0.0)) == 2.0


# Budget


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(schedule.time, "monotonic", lambda: now[0])
    return now


def test_budget_in_steps():
    budget = Budget(max_steps=200, max_seconds=None)
    assert [budget.share(step, CPU) for step in (0, 50, 200, 300)] == [0, 0.25, 1, 1.5]


def test_budget_in_seconds_counts_from_start_and_from_what_was_spent_before(clock):
    budget = Budget(max_steps=None, max_seconds=10)
    budget.spent = 2.0
    clock[0] += 50
    assert budget.share(999, CPU) == 0.2
    budget.start()
    clock[0] += 3
    assert (budget.seconds, budget.share(0, CPU)) == (5, 0.5)
    clock[0] += 5
    assert budget.share(0, CPU) == 1


def test_budget_with_both_bounds_goes_by_the_one_nearer_its_end(clock):
    budget = Budget(max_steps=100, max_seconds=10)
    budget.start()
    clock[0] += 4
    assert [budget.share(step, CPU) for step in (10, 90)] == [0.4, 0.9]


def test_budget_does_not_count_what_happens_while_paused(clock):
    budget = Budget(max_steps=None, max_seconds=10)
    budget.start()
    clock[0] += 1
    with budget.paused():
        clock[0] += 1000
        assert budget.seconds == 1
    clock[0] += 2
    assert budget.seconds == 3


def test_the_clock_goes_on_after_an_error_in_a_pause(clock):
    budget = Budget(max_steps=None, max_seconds=10)
    budget.start()
    with contextlib.suppress(ZeroDivisionError), budget.paused():
        raise ZeroDivisionError
    clock[0] += 2
    assert budget.seconds == 2


@pytest.mark.parametrize(("steps", "seconds"), [(None, None), (0, None), (-1, 5.0), (5, 0.0), (None, -2.0)])
def test_budget_without_a_positive_bound_is_refused(steps, seconds):
    with pytest.raises(InputError, match=r"train\.max_(steps|seconds)"):
        Budget(steps, seconds)


# BatchOrder


def examples(order: BatchOrder, num_batches: int) -> list[int]:
    return list(itertools.chain.from_iterable(itertools.islice(order, num_batches)))


def test_each_epoch_is_a_permutation_and_no_two_are_the_same():
    stream = examples(BatchOrder(num_examples=10, micro_batch=4, first=0, seed=0), 10)
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_order_can_start_anywhere():
    stream = examples(BatchOrder(10, 4, first=0, seed=3), 12)
    for first in range(8):
        assert examples(BatchOrder(10, 4, first, seed=3), 4) == stream[4 * first : 4 * (first + 4)]


def test_order_depends_on_the_seed():
    assert examples(BatchOrder(50, 10, 0, seed=0), 5) != examples(BatchOrder(50, 10, 0, seed=1), 5)


@pytest.mark.parametrize("num_examples", [5, 13, 24])
def test_two_processes_together_see_what_one_would(as_rank, num_examples):
    as_rank(0, 1)
    alone = list(itertools.islice(BatchOrder(num_examples, 8, 2, seed=0), 6))
    parts = []
    for rank in range(2):
        as_rank(rank, 2)
        parts.append(list(itertools.islice(BatchOrder(num_examples, 4, 2, seed=0), 6)))
    assert [a + b for a, b in zip(*parts, strict=True)] == alone


def test_a_batch_may_be_larger_than_the_data_set():
    batches = itertools.islice(BatchOrder(num_examples=3, micro_batch=8, first=0, seed=0), 3)
    stream = [*itertools.chain.from_iterable(batches)]
    assert len(stream) == 24
    assert all(sorted(stream[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))


def test_each_epoch_has_one_version_of_each_example_drawn_anew():
    stream = examples(BatchOrder(num_examples=100, micro_batch=10, first=0, seed=0, versions=5), 40)
    epochs = np.array(stream).reshape(4, 100)
    assert (np.sort(epochs % 100, axis=1) == np.arange(100)).all()
    drawn = [dict(zip(epoch % 100, epoch // 100, strict=True)) for epoch in epochs]  # example: version
    for version in drawn:
        assert set(version.values()) == {0, 1, 2, 3, 4}
        assert np.bincount(list(version.values())).min() > 8
    assert all(a != b for a, b in itertools.combinations(drawn, 2))
    other_seed = np.array(examples(BatchOrder(100, 10, first=0, seed=1, versions=5), 40)).reshape(4, 100)
    assert len(np.unique(np.concatenate([epochs, other_seed]) // 100, axis=0)) == 8  # nor are they drawn by position
    plain = np.array(examples(BatchOrder(100, 10, first=0, seed=0), 40)).reshape(4, 100)
    assert np.array_equal(epochs % 100, plain)  # the images come in the same order as without versions


def test_versions_are_the_same_from_any_place_on_and_for_any_number_of_processes(as_rank):
    as_rank(0, 1)
    alone = list(itertools.islice(BatchOrder(13, 8, 0, seed=0, versions=10), 6))
    assert list(itertools.islice(BatchOrder(13, 8, 2, seed=0, versions=10), 4)) == alone[2:]
    parts = []
    for rank in range(2):
        as_rank(rank, 2)
        parts.append(list(itertools.islice(BatchOrder(13, 4, 0, seed=0, versions=10), 6)))
    assert [a + b for a, b in zip(*parts, strict=True)] == alone


# coin_flips and seeds


def test_coin_flips_are_the_same_however_many_processes_share_them(as_rank):
    whole = coin_flips(0.5, 12, seed=1, step=7)
    parts = []
    for rank in range(3):
        as_rank(rank, 3)
        parts.append(coin_flips(0.5, 4, seed=1, step=7))
    assert torch.equal(torch.cat(parts), whole)


def test_coin_flips_are_the_same_however_many_passes_a_step_has(as_rank):
    whole, parts = coin_flips(0.5, 12, seed=1, step=7), []
    for i in range(3):
        for rank in range(2):
            as_rank(rank, 2)
            parts.append(coin_flips(0.5, 2, 1, 7, i, 3))
    assert torch.equal(torch.cat(parts), whole)


def test_coin_flips_come_up_as_often_as_asked_and_anew_for_each_batch():
    assert coin_flips(0.1, 10000, 0, 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not coin_flips(0.0, 100, 0, 0).any()
    assert coin_flips(1.0, 100, 0, 0).all()
    draws = [tuple(coin_flips(0.5, 64, seed, step).tolist()) for seed in range(3) for step in range(3)]
    assert len(set(draws)) == 9


def test_coin_flips_leave_the_random_state_alone():
    before = torch.get_rng_state()
    coin_flips(0.5, 8, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_has_random_numbers_of_its_own_on_each_rank(as_rank):
    def draw(seed, step):
        seed_step(seed, step)
        return torch.rand(4).tolist()

    with torch.random.fork_rng():
        first = draw(0, 5)
        assert draw(0, 5) == first
        as_rank(1, 2)
        others = [draw(0, 5)]
        as_rank(0, 2)
        others += [draw(0, 6), draw(1, 5), draw(5, 0)]
    assert first not in others


def test_mixed_seed_depends_on_each_number_and_their_order():
    seeds = {mixed_seed(*numbers) for numbers in itertools.product(range(20), repeat=2)}
    assert len(seeds) == 400


# Parameters and batches


def test_parameter_groups_part_matrices_from_vectors_and_leave_out_what_is_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[3].requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert set(decayed["params"]) == {model[0].weight, model[2].weight}
    assert set(plain["params"]) == {model[0].bias, model[1].weight, model[1].bias, model[2].bias}


def test_micro_batch_is_the_batch_over_processes_and_accumulation(as_rank):
    assert micro_batch_size(64, 1) == 64
    as_rank(1, 4)
    assert micro_batch_size(64, 2) == 8


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(64, 1, 3), (1, 4, 1)])
def test_batch_size_that_does_not_divide_is_refused_with_one_that_does(as_rank, batch_size, accumulation, processes):
    as_rank(0, processes)
    with pytest.raises(InputError, match=f"train.batch_size={batch_size} ") as caught:
        micro_batch_size(batch_size, accumulation)
    assert micro_batch_size(int(re.search(r"use (\d+)", str(caught.value))[1]), accumulation) > 0


# WeightEMA


def averaging_profile(width: float, num_steps: int) -> np.ndarray:
    """The weight of each step in the average, found by averaging one-hot weights."""
    model = nn.ParameterList([torch.zeros(num_steps, dtype=torch.float64)])
    ema = WeightEMA(model, width)
    for step in range(1, num_steps + 1):
        model[0].data = torch.eye(num_steps, dtype=torch.float64)[step - 1]
        ema.update(model, step)
    return ema.model[0].numpy()


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25])
def test_average_is_a_power_profile_of_the_width_asked_for(width):
    n = 400
    profile, times = averaging_profile(width, n), np.arange(1, n + 1) / n
    assert profile.sum() == pytest.approx(1)
    mean = (profile * times).sum()
    assert np.sqrt((profile * (times - mean) ** 2).sum()) == pytest.approx(width, rel=0.03)
    # The density t^gamma with this standard deviation (EDM2, eq. 123); a step gets the mass since the step before.
    low, high = 0.0, 1e3
    for _ in range(100):
        gamma = (low + high) / 2
        wide = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 > width
        low, high = (gamma, high) if wide else (low, gamma)
    np.testing.assert_allclose(profile, np.diff((np.arange(n + 1) / n) ** (gamma + 1)), atol=1e-9)


def test_width_zero_copies_the_model():
    model = nn.Linear(2, 2)
    ema = WeightEMA(model, 0.0)
    for step in (1, 2, 3):
        nn.init.normal_(model.weight)
        ema.update(model, step)
        assert torch.equal(ema.model.weight, model.weight)


def test_first_step_forgets_the_initial_weights():
    model = nn.Linear(2, 2)
    ema = WeightEMA(model, 0.1)
    nn.init.normal_(model.weight)
    ema.update(model, 1)
    assert torch.equal(ema.model.weight, model.weight)


def test_buffers_are_copied_not_averaged():
    model = nn.BatchNorm1d(3)
    ema = WeightEMA(model, 0.1)
    for step in (1, 2, 3):
        model(torch.randn(8, 3))
        ema.update(model, step)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert ema.model.num_batches_tracked == 3


def test_average_is_a_frozen_copy_in_eval_mode():
    model = nn.Linear(2, 2).train()
    ema = WeightEMA(model, 0.1)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_shards_are_put_back_after_an_error():
    model = nn.Linear(3, 2)
    ema = WeightEMA(model, 0.1)
    ema.shards = [p.detach().clone() for p in model.parameters()]  # as if FSDP had sharded them, into one part
    ema._put_back()
    with contextlib.suppress(ZeroDivisionError), ema.whole() as whole:
        assert torch.equal(whole.weight, model.weight)
        raise ZeroDivisionError
    assert ema.model.weight.numel() == 0


@pytest.mark.parametrize("width", [-0.1, 0.28, 1.0])
def test_width_without_a_profile_is_refused(width):
    with pytest.raises(InputError, match=f"train.ema={width}"):
        TrainConfig(ema=width)


def test_codebooks_are_copied_and_not_averaged():
    model = torch.nn.Module()
    model.codebook, model.weight = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    ema = WeightEMA(model, 0.1)
    for step in range(1, 4):
        with torch.no_grad():
            model.codebook += 1
            model.weight += 1
        ema.update(model, step)
    assert torch.equal(ema.model.codebook, model.codebook)
    assert (ema.model.weight < model.weight).all()


# Means, Stopwatch, ramp_at


def test_means_are_over_the_steps_that_a_name_came_in():
    means = Means(CPU)
    for i in range(4):
        means.add(a=torch.tensor(float(i)), **({"b": torch.tensor(10.0 * i, requires_grad=True)} if i >= 2 else {}))
    assert means.compute() == {"a": 1.5, "b": 25.0}
    means.add(a=torch.tensor(7.0))
    assert means.compute() == {"a": 7.0}


def test_a_stopwatch_counts_what_runs_inside_it():
    watch, began = Stopwatch(CPU), time.perf_counter()
    for _ in range(3):
        with watch.running():
            time.sleep(0.01)
        time.sleep(0.02)
    assert 0.03 <= watch.seconds() < time.perf_counter() - began - 0.06
    assert watch.seconds() == 0


def test_the_ramp_rises_from_its_start():
    shares = [0.0, 0.49, 0.5, 0.55, 0.6, 1.0]
    assert [ramp_at(share, 0.5, 0.1) for share in shares] == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert [ramp_at(share, 0.5, 0.0) for share in shares] == [0, 0, 1, 1, 1, 1]
    assert [ramp_at(share, 0.0, 0.0) for share in shares] == [1] * 6
    assert [ramp_at(share, 1.0, 0.0) for share in shares] == [0] * 6  # never


# FiniteGuard, attempts


def test_a_step_that_is_not_finite_is_named_and_skipped_to_the_last_bit():
    said: list[str] = []
    guard = FiniteGuard(3, said.append, CPU, Stop())
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for step, scale in enumerate([1.0, torch.inf, torch.nan, 1.0]):
        loss = (scale * layer(torch.ones(2))).sum()
        loss.backward()
        optimizer.found_inf = guard.check(step, rec_loss=loss, adv_loss=torch.tensor(0.5), grad_norm=layer.bias.grad[0])
        before = [p.clone() for p in layer.parameters()], layer.weight.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        unchanged = all(torch.equal(p, q) for p, q in zip(layer.parameters(), before[0], strict=True))
        assert unchanged == (not np.isfinite(scale))
    assert said == [f"step {step}: rec_loss and grad_norm not finite; the update is skipped" for step in (1, 2)]
    assert guard.in_a_row == 0
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_too_many_bad_steps_in_a_row_end_the_attempt():
    guard = FiniteGuard(2, lambda text: None, CPU, Stop())
    good, bad = torch.tensor(0.0), torch.tensor(torch.nan)
    for step, value in enumerate([bad, good, bad]):
        guard.check(step, loss=value)
    with pytest.raises(Diverged, match="step 3: loss not finite, for 2 steps in a row"):
        guard.check(3, loss=bad)


def test_what_is_read_late_is_named_at_the_end():
    said: list[str] = []
    guard = FiniteGuard(9, said.append, CPU, Stop())
    guard.lag = 2  # as on a GPU
    for step in range(5):
        guard.check(step, rec_loss=torch.tensor(torch.nan if step in (1, 4) else 0.0))
    assert [text[:6] for text in said] == ["step 1"]
    guard.finish()
    assert [text[:6] for text in said] == ["step 1", "step 4"]


def started(run: Run) -> Run:
    """A run at its first step, without anything to train."""
    run.open()
    run.resume(TrainState(), "")
    run.start("nothing", 0)
    return run


def test_a_run_that_diverges_is_tried_again_with_all_halved_until_it_helps(tmp_path, capsys):
    config = Stage1Config(run_dir=str(tmp_path), tracking=TrackingConfig(wandb="disabled"))
    save_config(config, tmp_path / "config.yaml")
    tried = []
    for run in attempts(config, lowered="the learning rate", to_lower="optim.lr"):
        with run:
            if not tried:
                save_checkpoint(tmp_path, 20, saved_state(rollbacks=2), keep=1)
            started(run)
            tried.append(run.lowered)
            if len(tried) < 3:
                raise Diverged("step 25: adv_loss not finite")
            run.accelerator.end_training()
    assert tried == [1 / 4, 1 / 8, 1 / 16]  # the checkpoint comes from a run that had gone back twice
    assert "step 25: adv_loss not finite: going back to" in (said := capsys.readouterr().out)
    assert "step_00000020 with the learning rate at 1/8 of the setting" in said


def test_what_going_back_does_not_cure_is_one_line_with_the_remedy(tmp_path):
    config = Stage1Config(run_dir=str(tmp_path), tracking=TrackingConfig(wandb="disabled"))

    def diverge() -> None:
        for run in attempts(config, lowered="the learning rate", to_lower="optim.lr=0.008"):
            with run:
                started(run)
                raise Diverged("step 7: rec_loss not finite")

    with pytest.raises(InputError, match=r"no checkpoint yet; lower optim\.lr=0\.008"):
        diverge()
    save_checkpoint(tmp_path, 5, saved_state(), keep=1)
    with pytest.raises(InputError, match=r"the last checkpoint is .*step_00000005; lower optim.lr"):
        diverge()


def test_a_checkpoint_of_a_version_that_knew_other_parts_is_refused_in_one_line(tmp_path):
    config = Stage1Config(run_dir=str(tmp_path), tracking=TrackingConfig(wandb="disabled"))
    save_config(config, tmp_path / "config.yaml")
    for version, said in (({}, "before 0.2"), ({"vqgen": "0.7"}, "0.7")):
        save_checkpoint(tmp_path, 20, saved_state(model={"other": torch.zeros(1)}, **version), keep=1)
        for run in attempts(config, lowered="", to_lower=""):
            with run:
                run.open()
                with pytest.raises(InputError, match=f"written by vqgen {said} and does not fit") as caught:
                    run.resume(TrainState(model=nn.Linear(1, 1)), "")
        assert len(str(caught.value).splitlines()) == 1


def test_each_update_of_a_run_has_random_numbers_of_its_own(tmp_path):
    train = TrainConfig(max_steps=3, accumulation=2, checkpoint_every=100)
    config = Stage1Config(run_dir=str(tmp_path), train=train, tracking=TrackingConfig(wandb="disabled"))
    drawn = []
    for run in attempts(config, lowered="", to_lower=""):
        with run:
            for now in started(run).steps():
                if now.ends:
                    break
                torch.manual_seed(123)  # an evaluation that draws numbers must change nothing
                drawn += [torch.rand(()).item() for _ in run.passes(iter("ab"))]
            run.accelerator.end_training()
    assert len(set(drawn)) == 6
    seed_step(0, 1)
    assert drawn[2:4] == [torch.rand(()).item() for _ in "ab"]


def test_a_checkpoint_takes_no_training_time(tmp_path, clock, monkeypatch):
    config = Stage1Config(run_dir=str(tmp_path), tracking=TrackingConfig(wandb="disabled"))
    model = WeightEMA(Light(channels=1, widths=[8]), 0.1)
    monkeypatch.setattr(model.model, "save_pretrained", lambda folder: clock.__setitem__(0, clock[0] + 1000))
    for run in attempts(config, lowered="", to_lower=""):
        with run:
            now = next(started(run).steps())
            clock[0] += 1
            run.save(now, TrainState(), {"": model})
            clock[0] += 1
            assert run.budget.seconds == 2
            run.accelerator.end_training()


def test_a_checkpoint_made_with_other_threads_is_gone_on_with_by_as_many(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert keep_threads(None) == keep_threads(2) == ""  # older versions did not note it
        monkeypatch.delenv(CHOSEN, raising=False)
        assert keep_threads(3) == " with 2 thread(s) after 3: the same numbers except for rounding"  # the user's choice
        assert torch.get_num_threads() == 2
        monkeypatch.setenv(CHOSEN, "1")
        assert keep_threads(1) == " with 1 thread(s), as before"
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_an_update_that_is_not_finite_changes_nothing(tmp_path, capsys):
    train = TrainConfig(max_steps=4, checkpoint_every=100)
    config = Stage1Config(run_dir=str(tmp_path), train=train, tracking=TrackingConfig(wandb="disabled"))
    unchanged = []
    for run in attempts(config, lowered="", to_lower=""):
        with run:
            bare = nn.Linear(2, 1)
            model, optimizer = run.prepare(bare, torch.optim.AdamW(bare.parameters(), fused=True))
            for now in started(run).steps():
                if now.ends:
                    break
                before = bare.weight.detach().clone()
                for factor in run.passes(iter([torch.nan if now.step == 2 else 1.0])):
                    loss = factor * model(torch.ones(1, 2)).sum()
                    run.accelerator.backward(loss)
                    run.add({"loss": loss})
                run.update(grad_norm=(model, optimizer))
                unchanged.append(torch.equal(bare.weight, before))
            assert all(state["step"] == 3 for state in optimizer.state.values())
            run.accelerator.end_training()
    assert unchanged == [False, False, True, False]
    assert "step 2: loss and grad_norm not finite; the update is skipped" in capsys.readouterr().out


class Apples(torch.optim.AdamW):
    """Ignores `found_inf`, as torch's fused AdamW does on Apple's GPUs."""

    def step(self, closure=None):
        self.found_inf = None
        return super().step(closure)


def test_an_update_that_is_not_finite_changes_nothing_on_apples_gpus(tmp_path):
    config = Stage1Config(run_dir=str(tmp_path), tracking=TrackingConfig(wandb="disabled"))
    with next(attempts(config, lowered="", to_lower="")) as run:
        bare = nn.Linear(2, 1)
        model, optimizer = run.prepare(bare, Apples(bare.parameters(), fused=True))
        started(run)._guards["grad_norm"] = FiniteGuard(3, run.say, CPU, run.stop)
        run.device = torch.device("mps")  # the tensors stay on the CPU
        unchanged = []
        for factor in (1.0, torch.nan, 1.0):
            before = bare.weight.detach().clone()
            loss = factor * model(torch.ones(1, 2)).sum()
            run.accelerator.backward(loss)
            run.add({"loss": loss})
            run.update(grad_norm=(model, optimizer))
            unchanged.append(torch.equal(bare.weight, before))
        run.accelerator.end_training()
    assert unchanged == [False, True, False]
    assert bare.weight.grad is None


def test_what_is_not_a_divergence_is_not_kept_and_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    for run in attempts(Stage1Config(run_dir=str(tmp_path)), lowered="", to_lower=""):
        with contextlib.suppress(ZeroDivisionError), run:
            assert signal.getsignal(signal.SIGTERM) != before
            raise ZeroDivisionError
        assert run.diverged is None
        assert signal.getsignal(signal.SIGTERM) == before


def saved_state(**more) -> dict:
    """The checkpoint state of a run without anything to train."""
    numbers = {"step": 20, "evaluated": 0, "seconds": 1.0, "rollbacks": 0, "processes": 1, "accumulation": 1}
    return {**numbers, "means": Means(CPU).state_dict(), "scaler": {}, "logged": 0, **more}


BF16 = "hint: this CPU computes in bf16 too: train.mixed_precision=bf16"


@pytest.mark.parametrize(
    ("capabilities", "precision", "hinted"),
    [({"avx512_bf16": True}, "null", 1), ({"amx_bf16": True}, "null", 1), ({"avx512_bf16": False}, "null", 0)]
    + [({"avx512_bf16": True}, chosen, 0) for chosen in ("no", "bf16")],
)
def test_a_cpu_with_instructions_for_bf16_is_pointed_out_if_the_precision_is_left_open(
    program, tmp_path, monkeypatch, capabilities, precision, hinted
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    settings = ["configs/debug/stage1.yaml", f"run_dir={tmp_path}", f"train.mixed_precision={precision}"]
    settings += ["train.max_steps=2", "train.checkpoint_every=1", "tracking.wandb=disabled"]
    code, output, errors = program("stage1/train.py", *settings)
    assert code == 0, errors
    assert output.count(BF16) == hinted
    shutil.rmtree(tmp_path / "checkpoints/step_00000002")
    _, output, _ = program("stage1/train.py", *settings)
    assert "going on from step 1" in output
    assert BF16 not in output
