"""stage1/plan.py: what it says and writes, and that the programs run what it wrote."""

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image
from programs import ROOT, metrics, shell

from vqgen.cli.parse import load_config
from vqgen.cli.sections import STAGE1_SECTIONS
from vqgen.data.images import load_images
from vqgen.planning.choose import Images, Machine
from vqgen.priors.prior import Prior
from vqgen.settings import DataConfig, Stage1Config, Stage2Config
from vqgen.yaml_file import read_yaml

GPU = ("gpus=1", "gpu_memory=80", "tflops=400")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 40 images of 70 x 90 pixels."""
    folder, random = tmp_path_factory.mktemp("images") / "my photos", np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(random.integers(0, 256, (90, 70, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_both_stages_train_by_what_is_planned(program, photos, tmp_path):
    out = tmp_path / "plan"
    code, output, errors = program("stage1/plan.py", f"data.source={photos}", f"out={out}", "hours=2", *GPU)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0].startswith("images: 7")
    assert lines[0].endswith("(5 % by a hash of the names), RGB, the originals' median shorter side is 70 pixels")
    assert "planned for: 1 GPU(s) of 80 GB and 400 TFLOP/s in bf16; hours=2, 50% of them for stage 1" in lines
    assert any(line.startswith("stage 1: 64x64 pixels to 64 codes of 512, 0.50 M parameters; a step") for line in lines)
    assert lines[-2:] == [f"{word}: accelerate launch --num_processes 1 stage{i}/train.py {out}/stage{i}.yaml"
                          for i, word in ((1, "next"), (2, "then"))]  # fmt: skip
    text = (out / "stage1.yaml").read_text()
    assert "  # the originals' median shorter side is 70 pixels\n  image_size: 64\n" in text
    planned = read_yaml(out / "stage1.yaml")
    assert planned["data"]["source"] == str(photos)
    second = read_yaml(out / "stage2.yaml")
    assert (planned["run_dir"], second["stage1"]) == ("runs/my-photos-plan/stage1",) * 2
    assert second["run_dir"] == "runs/my-photos-plan/stage2"
    assert "" not in lines
    short = "train.max_steps=2 train.mixed_precision=no tracking.wandb=disabled"
    shell(f"accelerate launch stage1/train.py {out}/stage1.yaml run_dir={tmp_path}/1 {short}")
    shell(f"accelerate launch stage2/train.py {out}/stage2.yaml stage1={tmp_path}/1 run_dir={tmp_path}/2 {short}")
    assert metrics(tmp_path / "1")["val/psnr"] > 0
    assert metrics(tmp_path / "2")["val/nll"] > 0


@pytest.mark.parametrize(("largest", "architecture"), [(32, "light"), (64, "light"), (128, "vqgan"), (256, "vqgan")])
def test_each_plan_is_a_configuration_of_both_programs(program, tmp_path, largest, architecture):
    images = np.random.default_rng(0).integers(0, 256, (60, 256, 256, 3), np.uint8)
    np.savez(tmp_path / "large images.npz", train_images=images, test_images=images[:5])
    arguments = (f"data.source={tmp_path}/large images.npz", f"out={tmp_path}/plan", f"largest={largest}")
    code, output, errors = program("stage1/plan.py", *arguments, "gpus=8", *GPU[1:], "hours=200")
    assert (code, errors) == (0, "")
    assert f"stage 1: {largest}x{largest} pixels" in output
    config = load_config(Stage1Config, [f"{tmp_path}/plan/stage1.yaml"], STAGE1_SECTIONS)
    assert config.data.image_size == largest
    assert config.model.get("name", "light") == architecture
    prior = load_config(Stage2Config, [f"{tmp_path}/plan/stage2.yaml"], {"model": Prior, "data": DataConfig})
    assert prior.train.batch_size % 8 == config.train.batch_size % 8 == 0
    assert prior.stage1 == config.run_dir == "runs/large-images-plan/stage1"


def test_the_user_s_own_settings_stay(program, photos, tmp_path):
    out, grey = tmp_path / "plan", tmp_path / "grey"
    for i in range(80):
        (grey / "all").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((300, 40 + i), i, np.uint8)).save(grey / "all" / f"{i}.png")
    own = ["data.augment=[0.8,1]", "data.crops=10", "data.flip=true", f"data.val_source={photos}/a", "data.channels=1"]
    arguments = [f"data.source={grey}", f"out={out}", "gpus=6", "gpu_memory=80", "tflops=400", *own]
    code, output, errors = program("stage1/plan.py", *arguments)
    assert (code, errors) == (0, "")
    assert "median shorter side is 79 pixels" in output or "median shorter side is 80 pixels" in output
    config = load_config(Stage1Config, [f"{out}/stage1.yaml"], STAGE1_SECTIONS)
    data = config.data
    assert (data.augment, data.crops, data.flip, data.channels) == ([0.8, 1], 10, True, 1)
    assert (data.image_size, config.train.batch_size % 6, config.train.mixed_precision) == (64, 0, "bf16")
    prior = load_config(Stage2Config, [f"{out}/stage2.yaml"], {"model": Prior, "data": DataConfig})
    assert "crops" not in prior.data  # it takes those of stage 1


def test_images_that_do_not_stay_in_memory_take_time_at_each_step(photos):
    plan = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("plan", ROOT / "stage1/plan.py")
    )
    spec.loader.exec_module(plan)
    train_set, _ = load_images(DataConfig(source=str(photos), cache_gb=0))
    images, machine = Images(len(train_set), 3, 70, False), Machine(1, 1e9, 1e9, True, "no", "")
    config = Stage1Config(data=DataConfig(image_size=64))
    kept = plan.Planned(images, machine, DataConfig(), train_set)
    read = plan.Planned(images, machine, DataConfig(cache_gb=0), train_set)
    assert kept.reading(config) == 0
    assert read.reading(config) > 0
    assert kept.extra(64) - read.extra(64) == pytest.approx(kept.decoded(64) + kept.own - read.own)
    assert kept.decoded(64) == len(train_set) * 3 * 64 * 64


def test_several_processes_are_refused(program, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", sys.exit)
    code, _, errors = program("stage1/plan.py", f"data.source={photos}", f"out={tmp_path}/plan", *GPU)
    assert code == 2
    assert "stage1/plan.py: is no program for several processes" in errors


def test_this_machine_is_timed(program, photos, tmp_path):
    arguments = (f"data.source={photos}", f"out={tmp_path}/plan", "hours=1", "largest=32")
    code, output, errors = program("stage1/plan.py", *arguments)
    assert (code, errors) == (0, "")
    assert "planned for: this machine's CPU: " in output
    assert "the seconds of a step: timed" in output
    for i in (1, 2):
        steps = read_yaml(tmp_path / f"plan/stage{i}.yaml")["train"]["max_steps"]
        assert 100 < steps < 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpus=1", "gpu_memory=0.3", "tflops=10", "largest=32"), "nothing fits; the smallest configuration takes"),
        (("hours=0.0001", "largest=32", *GPU), "hours=0.0001: too few even for the smallest model on 7"),
        (("gpus=2",), "gpus=2: give gpu_memory= and tflops= of each, too"),
        (("tflops=300",), "gpus=1: give gpu_memory= of each, too"),
        (("hours=0",), "hours=0.0: must be above 0"),
        (("data.image_size=64", *GPU), "data.image_size=64: the plan chooses it; largest= bounds it"),
        (("largest=16", *GPU), "largest=16: the smallest that can be planned is 32"),
        (("model.width=3",), "model"),
        (("data.max_images=3", *GPU), "images to train on; at least 50 are needed"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_writes_nothing(program, photos, tmp_path, arguments, message):
    code, _, errors = program("stage1/plan.py", f"data.source={photos}", f"out={tmp_path}/plan", *arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert message in errors
    assert not (tmp_path / "plan").exists()


def test_a_plan_is_not_written_over(program, photos, tmp_path):
    (tmp_path / "stage2.yaml").write_text("mine")
    code, _, errors = program("stage1/plan.py", f"data.source={photos}", f"out={tmp_path}", *GPU)
    assert (code, (tmp_path / "stage2.yaml").read_text()) == (2, "mine")
    assert "is there already; delete it, or name another folder: out=" in errors
    assert not (tmp_path / "stage1.yaml").exists()
