"""Which configuration is chosen, for costs and speeds that are given here."""

import pytest

from vqgen.errors import InputError
from vqgen.planning.choose import (
    GB,
    LEAST_STEP,
    PARAMETERS_PER_TOKEN,
    RUNGS,
    SLACK,
    UTILISATION,
    Images,
    Machine,
    TooSlow,
    as_tree,
    passes_that_fit,
    plan_prior,
    plan_tokenizer,
)
from vqgen.planning.cost import Cost

MANY = Images(1_000_000, 3, 500, False)
FEW = Images(1_000, 3, 500, False)
GPUS = Machine(8, 80 * GB, 400e12, False, "bf16", "eight")
HERE = Machine(1, 16 * GB, 100e9, True, "no", "a laptop")
YEAR = 365 * 24 * 3600


def cost_of(settings) -> Cost:
    """0.1 TFLOP and 0.2 GB an image of 64 pixels, in proportion to the pixels; a third with checkpointing."""
    tree = as_tree(settings)
    share = (tree["data"]["image_size"] / 64) ** 2
    kept = 1 / 3 if tree["train"].get("activation_checkpointing") else 1
    return Cost(1_000_000, 1e11 * share, 0.2 * GB * share * kept, 1 * GB)


def never(settings, passes):
    raise AssertionError("this machine is timed")


def tokenizer(images, machine, seconds, largest=256, cost=cost_of, timed=never):
    return plan_tokenizer(images, machine, seconds, largest, cost_of=cost, timed=timed, extra=0.5 * GB)


def prior(images, machine, seconds, tokens=256, timed=never):
    flat = lambda settings: Cost(1_000_000, 1e9, 0.01 * GB, 1 * GB)  # noqa: E731
    return plan_prior(images, machine, seconds, tokens, cost_of=flat, timed=timed, extra=0.5 * GB)


def test_the_best_that_the_hours_train_is_chosen_and_more_hours_never_choose_less():
    sizes = []
    for hours in (1, 10, 100, 1000, 10000):
        try:
            rung, stage = tokenizer(MANY, GPUS, 3600 * hours)
        except TooSlow:
            sizes.append(0)
            continue
        sizes.append(rung.size)
        assert stage.hours <= hours
        assert stage.epochs >= 1
        assert stage.batch % (GPUS.devices * stage.passes) == 0
        assert stage.memory <= GPUS.memory
    assert sizes == sorted(sizes)
    assert (sizes[0] <= 64, sizes[-1]) == (True, 256)


def test_images_are_not_enlarged_and_the_largest_size_is_kept():
    assert tokenizer(MANY._replace(side=100), GPUS, YEAR)[0].size == 64
    assert tokenizer(MANY, GPUS, YEAR, largest=128)[0].size == 128
    assert tokenizer(MANY._replace(side=20), GPUS, YEAR)[0].size == 32
    with pytest.raises(InputError, match="largest=16: the smallest that can be planned is 32"):
        tokenizer(MANY, GPUS, YEAR, largest=16)


def test_few_images_end_before_the_hours_do():
    _, stage = tokenizer(FEW, GPUS, YEAR, largest=64)
    assert stage.steps == RUNGS[2].enough // stage.batch
    assert as_tree(stage.settings)["data"]["augment"] == [0.9, 1]
    reasons = {s.key: s.why for s in stage.settings}
    assert "more would bring little" in reasons["train.max_steps"]
    _, stage = tokenizer(MANY, GPUS, 3600 * 2, largest=64)
    assert "as many as the hours allow" in {s.key: s.why for s in stage.settings}["train.max_steps"]


def test_few_images_have_fewer_codes_and_are_not_repeated_for_ever():
    _, stage = tokenizer(FEW, GPUS, YEAR)
    assert as_tree(stage.settings)["model"]["quantizer"]["codebook_size"] == 1024
    assert stage.epochs == pytest.approx(1000, rel=0.01)
    _, stage = tokenizer(MANY, GPUS, YEAR)
    assert as_tree(stage.settings)["model"]["quantizer"]["codebook_size"] == 16384
    assert stage.epochs == pytest.approx(50, rel=0.01)


def test_a_step_that_does_not_fit_takes_more_passes_and_is_checkpointed_if_one_image_does_not_fit():
    _, stage = tokenizer(MANY, GPUS._replace(memory=14 * GB), YEAR)
    # 16 images of 3.2 GB on each GPU, which has 1 GB and 0.5 GB in use besides: two fit.
    assert (stage.passes, as_tree(stage.settings)["train"]["accumulation"]) == (8, 8)
    assert stage.memory == pytest.approx(0.5 * GB + SLACK * (1 + 2 * 3.2) * GB)
    assert "activation_checkpointing" not in as_tree(stage.settings)["train"]
    _, stage = tokenizer(MANY, GPUS._replace(memory=5 * GB), YEAR)
    assert as_tree(stage.settings)["train"]["activation_checkpointing"] is True
    assert stage.passes == 8
    assert stage.memory == pytest.approx(0.5 * GB + SLACK * (1 + 2 * 3.2 / 3) * GB)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_a_gpu_on_which_nothing_fits_is_an_input_error_with_the_least_memory(size):
    with pytest.raises(InputError, match=r"nothing fits; the smallest configuration takes 1\.7 GB at one image a pass"):
        tokenizer(MANY, GPUS._replace(memory=1 * GB), YEAR, largest=size)


def test_the_hours_that_an_error_asks_for_are_enough():
    for machine, timed in ((GPUS, never), (HERE, lambda settings, passes: 5.0)):
        cost = cost_of if timed is never else lambda settings: Cost(1, 1e9, 1e6, GB)
        with pytest.raises(TooSlow) as error:
            tokenizer(FEW, machine, 1.0, cost=cost, timed=timed)
        half = 3600 * error.value.hours / 2
        assert tokenizer(FEW, machine, half * 1.001, cost=cost, timed=timed)[1].hours <= error.value.hours
        with pytest.raises(TooSlow):
            tokenizer(FEW, machine, half * 0.999, cost=cost, timed=timed)


def test_only_what_can_be_fast_enough_is_timed_here():
    sizes = []

    def timed(settings, passes):
        sizes.append(as_tree(settings)["data"]["image_size"])
        return 100.0

    cost = lambda settings: Cost(1, 1e8 * as_tree(settings)["data"]["image_size"] ** 2 / 1024, 1e6, GB)  # noqa: E731
    rung, stage = tokenizer(FEW, HERE, 60_000 / 99, cost=cost, timed=timed)
    # At 100 GFLOP/s 64 pixels are at most 250 images a second, and 99 are asked for; 256 would be 16.
    assert sizes == [64]
    assert (rung.size, stage.speed) == (64, 100.0)


def test_small_steps_take_as_long_as_their_launches():
    tiny = lambda settings: Cost(1, 1e6, 1e6, GB)  # noqa: E731
    _, stage = tokenizer(FEW, GPUS, 3600, largest=64, cost=tiny)
    assert stage.speed == stage.batch / LEAST_STEP
    large = lambda settings: Cost(1, 1e13, 1e6, GB)  # noqa: E731
    _, stage = tokenizer(FEW, GPUS, 3600 * 24, largest=64, cost=large)
    assert stage.speed == pytest.approx(8 * 400e12 * UTILISATION / 1e13)


def test_a_prior_is_as_large_as_its_tokens_suffice_for():
    widths = []
    for number in (100, 10_000, 1_000_000, 100_000_000):
        stage = prior(Images(number, 3, 64, False), GPUS, 100 * YEAR, tokens=64)
        model = as_tree(stage.settings)["model"]
        widths.append(model["hidden_size"])
        parameters = 12 * model["num_hidden_layers"] * model["hidden_size"] ** 2
        versions = 5 if number < 5000 else 1
        assert model["hidden_size"] == 128 or parameters <= PARAMETERS_PER_TOKEN * number * versions * 64
    assert widths == sorted(widths)
    assert (widths[0], widths[-1]) == (128, 1024)


@pytest.mark.parametrize(("mirrored", "crops"), [(False, 5), (True, 10)])
def test_few_images_get_what_puts_off_learning_by_heart(mirrored, crops):
    tree = as_tree(prior(FEW._replace(mirrored=mirrored), GPUS, YEAR).settings)
    assert (tree["context_noise"], tree["data"]["crops"], tree["optim"]["weight_decay"]) == (0.5, crops, 0.1)
    tree = as_tree(prior(MANY._replace(mirrored=mirrored), GPUS, YEAR).settings)
    assert (tree["context_noise"], "data" in tree) == (0.0, False)


def test_a_prior_that_takes_too_long_says_how_long():
    with pytest.raises(TooSlow) as error:
        prior(FEW, HERE, 1.0, timed=lambda settings, passes: 10.0)
    assert error.value.hours == pytest.approx(40_000 / 10 / 3600 * 2)


def test_passes_divide_the_batch_over_all_devices():
    cost = Cost(1, 1, 1 * GB, 0)
    assert passes_that_fit(cost, 64, HERE, 0) == (8, SLACK * 8 * GB)
    assert passes_that_fit(cost, 64, HERE._replace(memory=1 * GB), 0) is None
    assert passes_that_fit(cost, 6, HERE._replace(memory=3 * GB), 0) is None  # 3 do not divide by 2
