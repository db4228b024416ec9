"""Runs the plain GAN, stage 1 with discriminator and perceptual loss, and the comparison, as programs."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ENVIRONMENT, ROOT, launch_two, shell, untimed_metrics
from safetensors.torch import load_file

from vqgen.yaml_file import read_yaml

DEBUG = {"train": "configs/debug/stage1.yaml", "train_gan": "configs/debug/gan.yaml"}
QUIET = "tracking.wandb=disabled"
# Everything at once, on the debug run's 40 steps: D learns from step 8 on, and the decoder sees it from step 16 on.
VQGAN = ["loss.perceptual.name=alex", "loss.perceptual.every=8", "loss.perceptual.start=0"]
VQGAN += ["loss.adversarial.name=hinge", "loss.adversarial.start=0.4", "loss.adversarial.lead=0.2"]
VQGAN += ["loss.adversarial.lecam=0.01", "loss.adversarial.r1=0.1", "discriminator.width=8", "discriminator.layers=2"]
DRAWN = [*VQGAN, "loss.adversarial.every=2", "loss.adversarial.augment=[color,translation,cutout]"]


def same_weights(a: Path, b: Path) -> bool:
    a, b = (load_file(next(run.glob("model/**/model.safetensors"))) for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with vqgan/ and gan/, made by the two commands on tiny settings."""
    folder = tmp_path_factory.mktemp("made")
    shell(f"accelerate launch stage1/train.py {DEBUG['train']} run_dir={folder}/train {QUIET} {' '.join(DRAWN)}")
    shell(f"accelerate launch stage1/train_gan.py {DEBUG['train_gan']} run_dir={folder}/train_gan {QUIET}")
    return folder


def test_activations_that_are_computed_again_change_no_bit_of_a_run_that_goes_on_with_them(made, program, tmp_path):
    run = shutil.copytree(made / "train", tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step_00000040")
    again = "train.activation_checkpointing=true"
    code, output, _ = program("stage1/train.py", DEBUG["train"], f"run_dir={run}", QUIET, *DRAWN, again)
    assert (code, "going on from step 20" in output) == (0, True)
    assert "activation_checkpointing: true" in (run / "config.yaml").read_text()
    assert same_weights(run, made / "train")
    assert untimed_metrics(run) == untimed_metrics(made / "train")


@pytest.mark.parametrize("name", ["train", "train_gan"])
def test_the_same_seed_gives_the_same_bits_and_a_killed_run_goes_on_to_them(made, program, tmp_path, name):
    run = tmp_path / "run"
    arguments = [DEBUG[name], f"run_dir={run}", QUIET, *(DRAWN if name == "train" else [])]
    process = subprocess.Popen(["python", f"stage1/{name}.py", *arguments], cwd=ROOT, env=ENVIRONMENT)
    while not (run / "checkpoints/step_00000020").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, output, _ = program(f"stage1/{name}.py", *arguments)
    assert code == 0
    assert "going on from step 20" in output
    assert untimed_metrics(run) == untimed_metrics(made / name)
    assert same_weights(run, made / name)
    assert "finished" in program(f"stage1/{name}.py", *arguments)[1]


def test_the_discriminator_learns_before_the_decoder_sees_it(made):
    metrics = {line["step"]: line for line in untimed_metrics(made / "train") if "train/loss" in line}
    assert "train/disc_loss" in metrics[10]
    assert "train/adv_loss" not in metrics[10]  # from step 16 on
    for name in ("adv_loss", "adv_weight", "disc_loss", "real_logits", "fake_logits", "disc_accuracy"):
        assert f"train/{name}" in metrics[20]
    for name in ("perceptual_loss", "grad_norm", "disc_grad_norm"):
        assert f"train/{name}" in metrics[40]
    timed = json.loads((made / "train/metrics.jsonl").read_text().splitlines()[0])
    assert 0 < timed["train/perceptual_time"] < 1
    state = torch.load(made / "train/checkpoints/step_00000040/state.pt", weights_only=True)
    assert state["lecam"]["real_mean"] != 0
    assert state["disc_optimizer"]["state"][0]["step"] == 32


@pytest.mark.parametrize("name", ["non_saturating", "least_squares"])
def test_the_other_losses_and_a_fixed_weight_train_too(program, tmp_path, name):
    settings = [f"loss.adversarial.name={name}", "loss.adversarial.adaptive=false", "loss.adversarial.weight=0.01"]
    settings += ["loss.adversarial.start=0", "loss.adversarial.ramp=0", "discriminator.norm=none"]
    settings += ["train.max_steps=4", "train.log_every=2", "discriminator.width=8", "train.accumulation=2"]
    code, _, errors = program("stage1/train.py", DEBUG["train"], f"run_dir={tmp_path}/run", QUIET, *settings)
    assert code == 0, errors
    last = untimed_metrics(tmp_path / "run")[-2]
    assert last["train/adv_weight"] == pytest.approx(0.01)
    assert all(np.isfinite(value) for value in last.values())


def test_turning_the_discriminator_on_costs_less_than_one_db_within_its_ramp(program, tmp_path):
    """Of eight evaluations, the third is the last without the adversarial loss, the sixth is at the end of its ramp."""
    settings = ["train.max_steps=320", "train.eval_every=40", "train.checkpoint_every=1000", "train.eval_images=500"]
    settings += ["loss.adversarial.name=hinge", "loss.adversarial.start=0.375", "loss.adversarial.ramp=0.375"]
    settings += ["discriminator.width=16"]
    code, _, errors = program("stage1/train.py", DEBUG["train"], f"run_dir={tmp_path}/run", QUIET, *settings)
    assert code == 0, errors
    psnr = {line["step"]: line["val/psnr"] for line in untimed_metrics(tmp_path / "run") if "val/psnr" in line}
    assert "train/adv_loss" in untimed_metrics(tmp_path / "run")[-2]
    assert min(psnr[step] for step in (160, 200, 240)) > psnr[120] - 1
    assert psnr[320] > psnr[120] - 1


def test_a_run_that_overflows_goes_back_with_a_lowered_weight_and_ends_well(program, tmp_path):
    """The adversarial weight makes gradients overflow from its start, step 30, until it has been lowered far enough."""
    settings = ["loss.adversarial.name=hinge", "loss.adversarial.adaptive=false", "loss.adversarial.weight=1e21"]
    settings += ["loss.adversarial.start=0.5", "loss.adversarial.ramp=0", "train.max_bad_steps=3", "train.max_steps=60"]
    settings += ["train.eval_every=100", "discriminator.width=8", "discriminator.norm=none"]
    code, output, errors = program("stage1/train.py", DEBUG["train"], f"run_dir={tmp_path}/run", QUIET, *settings)
    assert code == 0, errors
    assert "step 30: grad_norm not finite; the update is skipped" in output
    assert "going back to" in output
    assert "step_00000020 with the learning rate and the adversarial weight at 1/2 of the setting" in output
    assert [line["step"] for line in untimed_metrics(tmp_path / "run") if "train/loss" in line] == [
        10,
        20,
        30,
        40,
        50,
        60,
    ]
    state = torch.load(tmp_path / "run/checkpoints/step_00000060/state.pt", weights_only=True)
    assert state["rollbacks"] > 0
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("name", ["stage1/train", "stage1/train_gan", "stage2/train"])
def test_a_run_beyond_help_ends_with_one_line(program, runs, tmp_path, name):
    config = {"stage1/train_gan": DEBUG["train_gan"]}.get(name, f"configs/debug/{name.split('/')[0]}.yaml")
    arguments = [config, f"run_dir={tmp_path}/run", QUIET, "optim.lr=1e30", "train.max_bad_steps=3"]
    arguments += [f"stage1={runs}/stage1"] if name == "stage2/train" else []
    code, output, errors = program(f"{name}.py", *arguments)
    assert code == 2
    assert "not finite; the update is skipped" in output
    assert errors.startswith("error: step ")
    assert errors.count("\n") == 1
    assert "there is no checkpoint yet; lower optim.lr=1e+30" in errors


def test_a_discriminator_that_has_won_is_reported(program, tmp_path):
    settings = ["loss.adversarial.name=hinge", "loss.adversarial.start=1", "loss.adversarial.lead=1"]
    settings += ["discriminator.width=8", "discriminator.norm=none", "discriminator.layers=1", "train.max_steps=60"]
    settings += ["optim.lr=1e-6", "loss.adversarial.lr=1e-2"]  # the decoder learns nothing
    code, output, errors = program("stage1/train.py", DEBUG["train"], f"run_dir={tmp_path}/run", QUIET, *settings)
    assert code == 0, errors
    assert output.count("the discriminator has won") == 1


def test_a_gans_run_has_what_the_others_have_and_is_sampled_like_them(made, program, tmp_path):
    run = made / "train_gan"
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000020", "step_00000040"]
    assert len(list((run / "samples").glob("samples_*.png"))) == 2
    for count, batch_size in ((25, 7), (12, 64)):
        code, _, errors = program(
            "stage2/sample.py", run, f"num_images={count}", f"batch_size={batch_size}", f"out={tmp_path}/{count}"
        )
        assert code == 0, errors
    samples, fewer = (np.load(tmp_path / f"{count}/samples.npz") for count in (25, 12))
    assert samples["images"].shape == (25, 32, 32)
    assert samples["images"].dtype == np.uint8
    assert samples["class_ids"].tolist() == [i % 10 for i in range(25)]
    assert np.array_equal(samples["images"][:12], fewer["images"])  # the same with any batch size
    assert Image.open(tmp_path / "25/grid.png").width > 10 * 32


def test_a_gan_of_colour_images_without_classes(program, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8))
    arguments = [f"data.source={tmp_path}/images.npz", "data.image_size=64", "train.max_steps=3", "train.batch_size=8"]
    arguments += ["train.log_every=1", "generator.width=4", "discriminator.width=4", "train.accumulation=2", QUIET]
    for loss in ("minimax", "hinge"):
        code, output, errors = program("stage1/train_gan.py", f"run_dir={tmp_path}/{loss}", f"loss={loss}", *arguments)
        assert code == 0, errors
        assert output.startswith(
            "images: 39 to train on, 1 held out (5 % by a hash of the names), RGB, 64x64, as they are\n"
        )
        assert all(np.isfinite(value) for line in untimed_metrics(tmp_path / loss) for value in line.values())
    code, output, errors = program("stage2/sample.py", tmp_path / "hinge", "num_images=5")
    assert code == 0, errors
    assert output.startswith("classes: none\n")
    samples = np.load(tmp_path / "hinge/samples/samples.npz")
    assert samples["images"].shape == samples["arr_0"].shape == (5, 64, 64, 3)
    assert samples["class_ids"].tolist() == [-1] * 5


def test_two_processes_train_a_vqgan_as_one_does_and_a_gan(tmp_path):
    # Sums over two processes round differently, by 1e-7 of their value. The difference stays small because everything
    # here is continuous: a single code has no border to another code, and this adversarial loss has no hinge. Slow
    # learning keeps 20 steps from amplifying it: weights changed by 1e-6 change no figure by more than 4e-5.
    smooth = ["loss.adversarial.name=non_saturating", "model.quantizer.codebook_size=1"]
    slow = ["optim.lr=1e-3", "loss.adversarial.lr=5e-4", "train.max_steps=20", "train.log_every=1"]
    command = f"stage1/train.py {DEBUG['train']} {QUIET} {' '.join([*VQGAN, *smooth, *slow])}"
    shell(f"accelerate launch {command} run_dir={tmp_path}/one")
    assert "2 x cpu" in shell(f"{launch_two()} {command} run_dir={tmp_path}/two")
    for one, two in zip(untimed_metrics(tmp_path / "one"), untimed_metrics(tmp_path / "two"), strict=True):
        one, two = ({k: v for k, v in line.items() if k != "train/disc_accuracy"} for line in (one, two))  # it counts
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert "2 x cpu" in shell(f"{launch_two()} stage1/train_gan.py {DEBUG['train_gan']} {QUIET} run_dir={tmp_path}/gan")
    assert all(np.isfinite(value) for line in untimed_metrics(tmp_path / "gan") for value in line.values())


def test_the_comparison_makes_its_table_and_picture_and_makes_nothing_twice(program, tmp_path):
    settings = [
        "seconds=2",
        "num_images=60",
        "num_reference=80",
        "perceptual=none",
        f"cache_dir={tmp_path}/cache",
        "data.source=digits",
        QUIET,
    ]
    settings += ["data.image_size=[32,40]", "data.max_images=2000"]
    settings += ["gan=[generator.width=4,discriminator.width=4]", "prior=[model.num_hidden_layers=1]"]
    settings += ["tokenizer=[model.quantizer.codebook_size=32,train.batch_size=16]"]
    settings += ["vqgan=[loss.adversarial.name=hinge,discriminator.width=4]"]
    command = f"python stage2/compare.py run_dir={tmp_path}/run {' '.join(settings)}"
    printed = shell(command)
    table = (tmp_path / "run/comparison.md").read_text()
    assert table.rstrip() in printed
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [cell.strip(" |") for cell in rows[0]] == ["", "DCGAN", "VQ-VAE + prior", "VQGAN + prior", "real images"]
    figures = {row[0].strip("| "): [cell.strip("* |") for cell in row[1:]] for row in rows[1:]}
    assert figures["psnr"][0] == ""  # a GAN reconstructs nothing
    assert all(float(figures["psnr"][i]) > 5 for i in (1, 2))
    for name in ("FD-EffLite0", "precision", "recall", "recognised", "parameters", "images/s when sampling"):
        assert all(figures[name][:3]), name
    assert all(float(value) >= 2 for value in figures["training seconds"][:3])
    assert Image.open(tmp_path / "run/comparison.png").width > 900
    for name, loss in (("vqvae", "none"), ("vqgan", "hinge")):
        assert read_yaml(tmp_path / f"run/{name}/stage1/config.yaml")["loss"]["adversarial"]["name"] == loss

    def made() -> dict[Path, int]:
        files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith("comparison")]
        return {p: p.stat().st_mtime_ns for p in files}

    before = made()
    shell(command)
    assert made() == before
    assert (tmp_path / "run/comparison.md").read_text() == table


BAD = {
    "no such adversarial loss": ("train", "loss.adversarial.name=wgan", "'hinge'"),
    "no such perceptual loss": ("train", "loss.perceptual.name=squeeze", "'alex'"),
    "no such GAN loss": ("train_gan", "loss=wgan", "'minimax'"),
    "a section in place of its name": ("train", "loss.adversarial=hinge", "set its keys, as in loss.adversarial.KEY="),
    "too deep": (
        "train",
        "loss.adversarial.name=hinge discriminator.layers=4",
        "discriminator.layers=4 is too deep for images of 32 pixels; use 3 or fewer",
    ),
    "a start beyond the run": (
        "train",
        "loss.adversarial.start=1.5",
        "loss.adversarial.start=1.5: is a share of the run, from 0 to 1",
    ),
    "a start before the run": ("train", "loss.adversarial.start=-0.1", "from 0 to 1"),
    "a perceptual loss of no image": ("train", "loss.perceptual.every=0", "must be at least 1"),
    "a discriminator of no image": ("train", "loss.adversarial.every=0", "must be at least 1"),
    "a change that D does not know": (
        "train",
        "loss.adversarial.augment=[blur]",
        "one of ['color', 'translation', 'cutout']",
    ),
    "mistyped discriminator key": ("train", "discriminator.layer=2", "did you mean discriminator.layers?"),
    "too coarse": (
        "train",
        "loss.adversarial.name=hinge train.mixed_precision=fp16",
        "use bf16 or no",
    ),
    "no power of two": (
        "train_gan",
        "data.image_size=48",
        "data.image_size=48 does not suit a DCGAN, which needs 8, 16, 32, ...; use 32",
    ),
    "mistyped generator key": ("train_gan", "generator.widht=2", "did you mean generator.width?"),
    "guidance of a GAN": ("sample", "{gan} cfg_scale=2", "cfg_scale=2.0: "),
    "no such class of a GAN": ("sample", "{gan} class_ids=[10]", "10 is not a class"),
    "no class of a GAN that has classes": ("sample", "{gan} class_ids=[-1]", "-1 is not a class"),
    "nothing to sample": ("sample", "{tmp}", "no model there"),
    "evaluating a GAN as a prior": ("evaluate", "{gan}", "measure with --images"),
    "comparing by a network that is none": ("compare", "run_dir={tmp}/run features=foo", "features=foo"),
    "comparing for unequal times": ("compare", "run_dir={tmp}/run gan=[train.max_seconds=9]", "the same for all three"),
    "comparing with a mistyped key": ("compare", "run_dir={tmp}/run prior=[optim.lrr=1]", "did you mean optim.lr?"),
    "two files for one network": (
        "train",
        "loss.perceptual.name=lpips-vgg loss.perceptual.weights=[vgg16.pth]",
        "LPIPS's; give loss.perceptual.weights=[VGG16.pth,HEADS.pth], or leave them out",
    ),
    "comparing for no time": ("compare", "seconds=0", "seconds=0.0: must be positive"),
    "comparing on nothing": ("compare", "run_dir={tmp}/run data.source={tmp}/missing", "missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(case, made, program, tmp_path):
    name, arguments, said = BAD[case]
    given = arguments.format(tmp=tmp_path, gan=made / "train_gan").split()
    if name in DEBUG:
        given = [DEBUG[name], f"run_dir={tmp_path}/run", QUIET, *given]
    code, _, errors = program(f"stage{1 if name in DEBUG else 2}/{name}.py", *given)
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert said in errors
    assert not (tmp_path / "run/config.yaml").exists()
