"""Which configuration is chosen, for costs and speeds that are given here."""

import re

import pytest
from programs import ROOT

from vqgen.codes import CodeLayout
from vqgen.errors import InputError
from vqgen.planning.choose import (
    GB,
    LEAST_STEP,
    PARAMETERS_PER_TOKEN,
    PRIOR_SIZES,
    RUNGS,
    SLACK,
    UTILISATION,
    Images,
    Machine,
    Setting,
    as_tree,
    passes_that_fit,
    plan,
    plan_prior,
    prior_settings,
)
from vqgen.planning.cost import Cost
from vqgen.priors.prior import Prior
from vqgen.yaml_file import read_yaml

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


class Given:
    """`Measures` with given costs; the smallest prior takes no time, unless its speed is given."""

    def __init__(self, cost=cost_of, speed=None, prior_speed=None):
        self.cost, self.speed, self.speed_of_prior = cost, speed, prior_speed
        self.timed = []  # sizes of images

    def extra(self, size):
        return 0.5 * GB

    def tokenizer_cost(self, settings):
        return self.cost(settings)

    def tokenizer_speed(self, settings, passes):
        assert self.speed is not None, "this machine is timed"
        self.timed.append(as_tree(settings)["data"]["image_size"])
        return self.speed

    def prior_cost(self, settings, stage1):
        return Cost(1_000_000, 1e6, 0.01 * GB, 1 * GB)

    def prior_speed(self, settings, stage1, passes):
        return self.speed_of_prior(as_tree(stage1)["data"]["image_size"]) if self.speed_of_prior else 1e9


def tokenizer(images, machine, seconds, largest=256, given=None):
    rung, stage, _ = plan(images, machine, 2 * seconds / 3600, largest, given or Given())
    return rung, stage


def prior(images, machine, seconds, rung=RUNGS[-1], given=None):
    return plan_prior(images, machine, seconds, rung, [Setting("data.image_size", 64)], given or Given(), True)


def test_the_best_that_the_hours_train_is_chosen_and_more_hours_never_choose_less():
    sizes = []
    for hours in (1, 10, 100, 1000, 10000):
        try:
            rung, stage = tokenizer(MANY, GPUS, 3600 * hours)
        except InputError:
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


@pytest.mark.parametrize(("machine", "speed"), [(GPUS, None), (HERE, 5.0)], ids=["GPUs", "timed"])
def test_the_hours_that_an_error_asks_for_are_enough(machine, speed):
    given = Given(cost_of if speed is None else lambda settings: Cost(1, 1e9, 1e6, GB), speed)
    with pytest.raises(InputError, match=r"^hours=0\.0001: too few even for .* on 1,000 images; give") as error:
        plan(FEW, machine, 0.0001, 256, given)
    hours = float(re.search(r"at least hours=([\d.]+)", str(error.value))[1])
    _, first, second = plan(FEW, machine, hours, 256, given)
    assert first.hours + second.hours <= hours
    with pytest.raises(InputError):
        plan(FEW, machine, hours - 0.02, 256, given)
    assert "data.max_images" not in str(error.value)  # 1,000 images are not too many


def test_fewer_images_are_a_remedy_where_one_epoch_takes_too_long():
    with pytest.raises(InputError, match=r"on 1,000,000 images; .*, or fewer images by data\.max_images="):
        plan(MANY, HERE, 0.0001, 256, Given(speed=5.0))


@pytest.mark.parametrize(
    ("rung", "name"), [(1, "cifar10"), (2, "emoji64"), (3, "imagenet256_f8"), (4, "imagenet256_f16")]
)
def test_a_tokenizer_is_the_one_of_the_configuration_that_its_reason_names(rung, name):
    planned, named = as_tree(RUNGS[rung].settings), read_yaml(ROOT / f"configs/stage1/{name}.yaml")
    for part in ("model", "loss", "discriminator", "optim"):
        assert planned.get(part, {}) == named.get(part, {})
    assert planned["train"]["batch_size"] == named["train"]["batch_size"]
    assert f"configs/stage1/{name}.yaml" in RUNGS[rung].why


def test_a_prior_of_llamagen_s_size_is_the_one_of_the_configuration_that_its_reason_names():
    named = read_yaml(ROOT / "configs/stage2/imagenet256_f16.yaml")
    tree = as_tree(prior_settings(PRIOR_SIZES[-2], MANY, GPUS, 256))
    assert tree["model"]["hidden_size"] == named["model"]["hidden_size"] == 768
    assert tree["optim"] == named["optim"]
    assert tree["class_dropout"] == named["class_dropout"]
    assert Prior(CodeLayout(((1, 2, 2),), (8,)), [], **tree["model"]).lm.config.intermediate_size == 2048


def test_a_prior_whose_samples_do_not_fit_is_not_planned():
    with_room = prior(MANY, GPUS, 100 * YEAR)
    assert as_tree(with_room.settings)["model"]["hidden_size"] == 1024
    # 32 guided sequences of 256 codes have 6.4 GB of keys and values in 24 layers of 1,024.
    assert with_room.memory >= SLACK * (1 * GB + 4 * 64 * 2 * 24 * 1024 * 256)
    without = prior(MANY, GPUS._replace(memory=6 * GB), 100 * YEAR)
    assert as_tree(without.settings)["model"]["hidden_size"] < 1024


def test_only_what_can_be_fast_enough_is_timed_here():
    given = Given(lambda settings: Cost(1, 1e8 * as_tree(settings)["data"]["image_size"] ** 2 / 1024, 1e6, GB), 100.0)
    rung, stage = tokenizer(FEW, HERE, 60_000 / 99, given=given)
    # At 100 GFLOP/s 64 pixels are at most 250 images a second, and 99 are asked for; 256 would be 16.
    assert given.timed == [64]
    assert (rung.size, stage.speed) == (64, 100.0)


def test_a_smaller_tokenizer_is_chosen_if_its_prior_is_the_one_that_the_hours_train():
    given = Given(lambda settings: Cost(1, 1e6, 1e6, GB), 1e6, prior_speed=lambda size: 2000 if size == 32 else 1)
    rung, _, second = plan(FEW, HERE, 1, 256, given)
    assert (rung.size, second.speed) == (32, 2000)


def test_small_steps_take_as_long_as_their_launches():
    _, stage = tokenizer(FEW, GPUS, 3600, largest=64, given=Given(lambda settings: Cost(1, 1e6, 1e6, GB)))
    assert stage.speed == stage.batch / LEAST_STEP
    _, stage = tokenizer(FEW, GPUS, 3600 * 24, largest=64, given=Given(lambda settings: Cost(1, 1e13, 1e6, GB)))
    assert stage.speed == pytest.approx(8 * 400e12 * UTILISATION / 1e13)


def test_a_prior_is_as_large_as_its_tokens_suffice_for():
    widths = []
    for number in (100, 10_000, 1_000_000, 100_000_000):
        stage = prior(Images(number, 3, 64, False), GPUS, 100 * YEAR, rung=RUNGS[2])
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


def test_passes_divide_the_batch_over_all_devices():
    cost = Cost(1, 1, 1 * GB, 0)
    assert passes_that_fit(cost, 64, HERE, 0) == (8, SLACK * 8 * GB)
    assert passes_that_fit(cost, 64, HERE._replace(memory=1 * GB), 0) is None
    assert passes_that_fit(cost, 6, HERE._replace(memory=3 * GB), 0) == (3, SLACK * 2 * GB)
    assert passes_that_fit(cost, 132, GPUS._replace(devices=6, memory=3 * GB), 0) == (11, SLACK * 2 * GB)
    assert passes_that_fit(cost, 6, HERE._replace(memory=3 * GB), 0, evaluation=4 * GB) is None
