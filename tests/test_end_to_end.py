"""The three commands from end to end with tiny settings, and their messages for bad input."""

import itertools
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
from programs import ENVIRONMENT, ROOT, shell, untimed_metrics
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import vqgen
from vqgen.codes import ORDERS
from vqgen.data.images import load_set
from vqgen.quantizers import QUANTIZERS
from vqgen.settings import DataConfig
from vqgen.yaml_file import read_yaml

DEBUG = {stage: f"configs/debug/{stage}.yaml" for stage in ("stage1", "stage2")}


def weights_equal(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_metrics_pictures_checkpoints_and_a_model(runs):
    for stage, key in (("stage1", "train/loss"), ("stage2", "train/loss")):
        run = runs / stage
        losses = [line[key] for line in untimed_metrics(run) if key in line]
        assert losses[-1] < losses[0]
        assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000020", "step_00000040"]
        assert len(list((run / "samples").glob("*.png"))) == 2
        assert list((run / "wandb").glob("offline-run-*/*.wandb"))
        assert (run / "config.yaml").is_file()
    figures = untimed_metrics(runs / "stage2")[-1]
    assert figures["val/nll"] < figures["val/unigram_entropy"]  # it has learned more than the codes' frequencies
    assert figures["val/code_bits_per_dim"] == pytest.approx(figures["val/nll"] / np.log(2) * 16 / 32**2)


def test_the_prior_is_a_plain_transformers_checkpoint(runs):
    prior = LlamaForCausalLM.from_pretrained(runs / "stage2/model/prior")
    assert prior.config.vocab_size == 64 + 1 + 10


def test_sampling_writes_a_picture_and_arrays_and_cycles_through_the_classes(runs, tmp_path):
    run = shutil.copytree(runs / "stage2", tmp_path / "alone")  # the stage-2 folder is enough
    shell(f"python stage2/sample.py {run} num_images=25 out={tmp_path}/out")
    samples = np.load(tmp_path / "out/samples.npz")
    assert samples["images"].shape == (25, 32, 32)
    assert np.array_equal(samples["arr_0"], samples["images"])  # the name that other evaluators read
    Image.fromarray(samples["images"][0])
    assert samples["images"].dtype == np.uint8
    assert samples["class_ids"].tolist() == [i % 10 for i in range(25)]
    assert samples["class_ids"].dtype == np.int64
    assert Image.open(tmp_path / "out/grid.png").width > 10 * 32


def test_the_same_seed_gives_the_same_images_whatever_the_batch_size(runs, program, tmp_path):
    drawn = []
    for i, options in enumerate(["batch_size=7", "batch_size=64", "batch_size=64 num_images=12", "seed=1"]):
        program("stage2/sample.py", runs / "stage2", "num_images=40", *options.split(), f"out={tmp_path}/{i}")
        drawn.append(np.load(tmp_path / f"{i}/samples.npz")["images"])
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0][:12], drawn[2])
    assert not np.array_equal(drawn[0], drawn[3])


def test_class_ids_and_no_class(runs, program, tmp_path):
    _, output, _ = program("stage2/sample.py", runs / "stage2", "num_images=5", "class_ids=[3,-1]", f"out={tmp_path}")
    assert np.load(tmp_path / "samples.npz")["class_ids"].tolist() == [3, -1, 3, -1, 3]
    assert output.startswith("classes: 0 (1,960), 1 (2,184), 2 (2,010), ")  # with the numbers of training images


def test_what_the_model_s_card_says_is_so(runs, monkeypatch):
    for stage, said, made in (
        ("stage1", "An image tokenizer (architecture light, quantizer ema, 0.05 M parameters)", "codes[0].shape"),
        (
            "stage2",
            "an autoregressive prior (llama, 0.03 M parameters) over the codes of",
            "len(images), images[0].size",
        ),
    ):
        card = (runs / stage / "model/README.md").read_text()
        assert said in card
        assert "- Images: grey, 32x32 pixels; trained on 20,000 images." in card
        assert "- Classes: 10: 0 (1,960), 1 (2,184), " in card
        assert f"- Training: 40 steps, with vqgen {vqgen.__version__}." in card
        for name, value in untimed_metrics(runs / stage)[-1].items():
            if name.startswith("val/"):
                assert f"{name.removeprefix('val/')} {value:.4g}" in card
        monkeypatch.chdir(runs / stage / "model")
        scope: dict = {}
        exec(card.partition("```python\n")[2].partition("```")[0], scope)
        assert eval(made, scope) == {"stage1": (1, 1, 4, 4), "stage2": (16, (32, 32))}[stage]
    monkeypatch.chdir(runs / "stage2/model/tokenizer")
    card = Path("README.md").read_text()
    assert "Hub" not in card
    exec(card.partition("```python\n")[2].partition("```")[0], scope)
    assert scope["tokenizer"].channels == 1


def test_single_files_are_a_source_of_images_again(runs, program, tmp_path):
    arguments = ["stage2/sample.py", runs / "stage2", "num_images=7", "png=true"]
    code, output, errors = program(*arguments, "class_ids=[3,7]", f"out={tmp_path}/out")
    assert code == 0, errors
    assert f"single files, a folder for each class: data.source={tmp_path}/out" in output
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("*/*.png")) == [
        "3/00000.png", "3/00002.png", "3/00004.png", "3/00006.png", "7/00001.png", "7/00003.png", "7/00005.png",
    ]  # fmt: skip
    samples = np.load(tmp_path / "out/samples.npz")
    images, held_out = load_set("images", DataConfig(source=str(tmp_path / "out")))
    assert (held_out, images.class_names, images.channels) == (None, ["3", "7"], 1)
    for i, name in enumerate(images.names):
        number = int(Path(name).stem)
        assert np.array_equal(images.read(i)[0], samples["images"][number])
        assert int(images.class_names[images.class_ids[i]]) == samples["class_ids"][number]

    code, _, errors = program(*arguments, f"out={tmp_path}/out")
    assert code == 2
    assert errors.startswith(f"error: out={tmp_path}/out has images already, such as 3/00000.png: ")
    assert errors.count("\n") == 1
    code, _, errors = program(*arguments, "class_ids=-1", f"out={tmp_path}/flat")
    assert code == 0, errors
    assert sorted(p.name for p in (tmp_path / "flat").glob("**/*.png")) == [f"{i:05d}.png" for i in range(7)]
    assert len(load_set("images", DataConfig(source=str(tmp_path / "flat")))[0]) == 7


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_same_seed_gives_the_same_bits_and_repeating_the_command_changes_nothing(runs, program, tmp_path, stage):
    arguments = [f"{stage}/train.py", DEBUG[stage], f"run_dir={tmp_path}/run", "tracking.wandb=disabled"]
    arguments += [f"stage1={runs}/stage1"] if stage == "stage2" else []
    inside = "model/model.safetensors" if stage == "stage1" else "model/prior/model.safetensors"
    assert program(*arguments)[0] == 0
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(runs / stage)
    assert weights_equal(tmp_path / "run" / inside, runs / stage / inside)

    before = (tmp_path / "run/metrics.jsonl").read_text(), (tmp_path / "run" / inside).stat().st_mtime_ns
    code, output, _ = program(*arguments)
    assert code == 0
    assert "finished" in output
    assert (
        "images: 20,000 to train on, 2,000 held out (test images of the arrays), grey, 32x32, as they are\n" in output
    )
    assert "classes: 10: 0 (1,960), 1 (2,184), " in output
    assert before == ((tmp_path / "run/metrics.jsonl").read_text(), (tmp_path / "run" / inside).stat().st_mtime_ns)


AGAIN = "train.activation_checkpointing=true"


@pytest.mark.parametrize(("stage", "then"), [("stage1", []), ("stage2", []), ("stage2", [AGAIN])])
def test_a_killed_run_goes_on_to_the_same_bits(runs, program, tmp_path, stage, then):
    run = tmp_path / "run"
    arguments = [DEBUG[stage], f"run_dir={run}", "tracking.wandb=disabled"]
    arguments += [f"stage1={runs}/stage1"] if stage == "stage2" else []
    process = subprocess.Popen(["python", f"{stage}/train.py", *arguments], cwd=ROOT, env=ENVIRONMENT)
    while not (run / "checkpoints/step_00000020").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, output, _ = program(f"{stage}/train.py", *arguments, *then)
    assert code == 0
    assert "going on from step 20" in output
    assert untimed_metrics(run) == untimed_metrics(runs / stage)
    inside = "model/model.safetensors" if stage == "stage1" else "model/prior/model.safetensors"
    assert weights_equal(run / inside, runs / stage / inside)


def test_accumulation_mixed_precision_flips_and_seconds(runs, program, tmp_path):
    stage1 = ["data.flip=true", "train.accumulation=2", "train.mixed_precision=bf16", "train.max_steps=null"]
    code, _, errors = program(
        "stage1/train.py", DEBUG["stage1"], f"run_dir={tmp_path}/1", *stage1, "train.max_seconds=1"
    )
    assert code == 0, errors
    stage2 = ["train.accumulation=2", "train.mixed_precision=bf16", "train.max_steps=20", "data.channels=null"]
    code, _, errors = program(
        "stage2/train.py", DEBUG["stage2"], f"run_dir={tmp_path}/2", f"stage1={tmp_path}/1", *stage2
    )
    assert code == 0, errors
    assert read_yaml(runs / "stage1/config.yaml")["train"]["mixed_precision"] == "no"  # the value that null stood for
    assert all(np.isfinite(list(line.values())).all() for run in "12" for line in untimed_metrics(tmp_path / run))


FEW_STEPS = ["train.max_steps=3", "train.batch_size=16", "train.eval_images=64", "tracking.wandb=disabled"]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_trains_and_goes_on_where_it_was_stopped(program, tmp_path, name):
    arguments = ["stage1/train.py", "model.widths=[8,16]", f"model.quantizer.name={name}", *FEW_STEPS]
    for run, every in (("whole", 100), ("stopped", 1)):
        code, _, errors = program(*arguments, f"run_dir={tmp_path}/{run}", f"train.checkpoint_every={every}")
        assert code == 0, errors
    assert len(list((tmp_path / "stopped/checkpoints").iterdir())) == 2
    shutil.rmtree(tmp_path / "stopped/checkpoints/step_00000003")
    code, output, _ = program(*arguments, f"run_dir={tmp_path}/stopped", "train.checkpoint_every=1")
    assert code == 0
    assert "going on from step 2" in output
    assert weights_equal(*(tmp_path / run / "model/model.safetensors" for run in ("whole", "stopped")))


def test_several_codes_a_position_from_images_to_images(program, tmp_path):
    residual = ["name=residual", "num_quantizers=3", "dropout=0.5", "base.name=vq", "base.codebook_size=32"]
    quantizer = [f"model.quantizer.{setting}" for setting in residual]
    code, _, errors = program("stage1/train.py", DEBUG["stage1"], *quantizer, *FEW_STEPS, f"run_dir={tmp_path}/1")
    assert code == 2
    assert "model.quantizer.codebook_size=64: residual has no such option" in errors  # debug/stage1.yaml sets it
    assert "set model.quantizer.base.codebook_size" in errors
    code, _, errors = program("stage1/train.py", "model.widths=[8,16]", *quantizer, *FEW_STEPS, f"run_dir={tmp_path}/1")
    assert code == 0, errors
    arguments = [DEBUG["stage2"], f"stage1={tmp_path}/1", "random_orders=0.5", *FEW_STEPS]
    code, _, errors = program("stage2/train.py", *arguments, f"run_dir={tmp_path}/2")
    assert code == 0, errors
    prior = LlamaForCausalLM.from_pretrained(tmp_path / "2/model/prior")
    assert prior.config.vocab_size == 3 * 32 + 1 + 10
    arguments = ["stage2/sample.py", tmp_path / "2", "num_images=4", f"out={tmp_path}/out"]
    code, _, errors = program(*arguments)
    assert code == 0, errors
    drawn = np.load(tmp_path / "out/samples.npz")["images"]
    assert drawn.shape == (4, 32, 32)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    for name, pixels in {"mask": mask, "image": drawn[0]}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    code, printed, errors = program(*arguments, f"image={tmp_path}/image.png", f"mask={tmp_path}/mask.png")
    assert code == 0, errors
    assert "codes are drawn, each from all that stay and those drawn before\n" in printed
    code, _, errors = program(*arguments, "size=[32,64]")
    assert code == 0, errors
    assert np.load(tmp_path / "out/samples.npz")["images"].shape == (4, 32, 64)


def test_images_that_are_no_squares_and_crops_through_both_stages_and_on_after_a_stop(program, tmp_path):
    quiet, small = "tracking.wandb=disabled", ["data.image_size=[16,24]", "data.max_images=120"]
    shape = [*small, "data.augment=[0.7,1]", "data.flip=true", "train.accumulation=2", *FEW_STEPS]
    stages = {
        "1": ["stage1/train.py", "model.widths=[8,16]", *shape],
        "2": [
            "stage2/train.py",
            DEBUG["stage2"],
            f"stage1={tmp_path}/1",
            "data.crops=10",
            "random_orders=0.5",
            *FEW_STEPS,
        ],
        "gan": ["stage1/train_gan.py", "generator.width=4", "discriminator.width=4", *shape],
    }
    for name, command in stages.items():
        arguments = [*command, f"run_dir={tmp_path}/{name}", "train.checkpoint_every=1"]
        code, output, errors = program(*arguments)
        assert code == 0, errors
        whole = {path: load_file(path) for path in (tmp_path / name / "model").rglob("*.safetensors")}
        shutil.rmtree(tmp_path / name / "checkpoints/step_00000003")
        code, resumed, errors = program(*arguments)
        assert (code, "going on from step 2" in resumed) == (0, True), errors
        for path, weights in whole.items():
            assert all(torch.equal(weights[key], value) for key, value in load_file(path).items())
        if name == "2":
            assert "encoding 120 images in 10 crops each" in output
            assert "1200 training (10 crops of each image, one in an epoch)" in output
            assert "encoding" not in resumed
    settings = read_yaml(tmp_path / "2/config.yaml")["data"]
    assert (settings["image_size"], settings["crops"], settings["max_images"]) == ([16, 24], 10, 120)
    figures = untimed_metrics(tmp_path / "2")[-1]
    assert figures["val/code_bits_per_dim"] == pytest.approx(figures["val/nll"] / np.log(2) * 6 / (16 * 24))
    for name in ("2", "gan"):
        code, _, errors = program("stage2/sample.py", tmp_path / name, "num_images=4", f"out={tmp_path}/out")
        assert code == 0, errors
        assert np.load(tmp_path / "out/samples.npz")["images"].shape == (4, 16, 24)
    cache = f"cache_dir={tmp_path}/cache"
    for stage, name in (("stage1", "1"), ("stage2", "2")):
        arguments = [tmp_path / name, "num_images=30", cache, quiet]
        code, output, errors = program(f"{stage}/evaluate.py", *arguments)
        assert code == 0, errors
        assert "efficientnet-lite0 sees the images, of 16 x 24 pixels, squeezed to squares" in output
    report = json.loads((tmp_path / "2/evaluation/evaluation.json").read_text())["figures"]
    assert report["closer_in_pixels"]["protocol"]["searched"] == 1200  # all crops
    assert report["nll_train"]["protocol"]["image_size"] == [16, 24]
    for size, use in (("[20,24]", "[16,24] or [24,24]"), ("[16,7]", "[16,8] or [16,16]")):
        code, _, errors = program("stage1/train.py", f"data.image_size={size}", f"run_dir={tmp_path}/no")
        assert code == 2
        assert f"data.image_size={size} is not divisible by the model's stride 8; use {use}\n" in errors


def test_a_prior_writes_the_codes_in_another_order(runs, program, monkeypatch, tmp_path):
    monkeypatch.setitem(ORDERS, "backwards", lambda shapes: range(15, -1, -1))
    arguments = [DEBUG["stage2"], f"stage1={runs}/stage1", f"codes_dir={tmp_path}/codes", *FEW_STEPS]
    for order in ("raster", "backwards"):
        code, _, errors = program("stage2/train.py", *arguments, f"run_dir={tmp_path}/{order}", f"order={order}")
        assert code == 0, errors
    stores = [np.load(path / "tokens.npy") for path in (tmp_path / "codes").iterdir()]
    assert len(stores) == 4
    assert sum(np.array_equal(a, b[:, ::-1]) for a, b in itertools.permutations(stores, 2)) == 4  # 2 pairs, each twice
    code, _, errors = program("stage2/sample.py", tmp_path / "backwards", "num_images=4", f"out={tmp_path}/out")
    assert code == 0, errors
    monkeypatch.delitem(ORDERS, "backwards")
    code, _, errors = program("stage2/sample.py", tmp_path / "backwards", "num_images=4", f"out={tmp_path}/out")
    assert code == 2
    assert "the order of its tokens, backwards, is not known" in errors


def test_codes_are_made_once_and_made_again_for_another_tokenizer(runs, program, tmp_path):
    stage1 = shutil.copytree(runs / "stage1", tmp_path / "stage1")
    arguments = ["stage2/train.py", DEBUG["stage2"], f"stage1={stage1}", "train.max_steps=1", "tracking.wandb=disabled"]
    stores = {p.name: (p / "tokens.npy").stat().st_mtime_ns for p in (stage1 / "codes").iterdir()}
    assert len(stores) == 2  # training and held out
    assert program(*arguments, f"run_dir={tmp_path}/a")[0] == 0
    assert stores == {p.name: (p / "tokens.npy").stat().st_mtime_ns for p in (stage1 / "codes").iterdir()}

    assert program("stage1/train.py", DEBUG["stage1"], f"run_dir={tmp_path}/other", "seed=1")[0] == 0
    shutil.copytree(tmp_path / "other/model", stage1 / "model", dirs_exist_ok=True)
    assert program(*arguments, f"run_dir={tmp_path}/b")[0] == 0
    assert len(list((stage1 / "codes").iterdir())) == 4
    code, _, errors = program(*arguments, f"run_dir={tmp_path}/a")  # it had the earlier tokenizer
    assert code == 2
    assert "another tokenizer" in errors


def test_help_names_every_setting(program):
    for script, keys in {
        "stage1/train.py": ("data.source=digits", "model.quantizer.codebook_size=512", "train.max_seconds=null"),
        "stage2/train.py": ("stage1=runs/stage1", "model.hidden_size=", "data.image_size="),
        "stage2/sample.py": ("cfg_scale=", "class_ids=null"),
    }.items():
        code, output, _ = program(script, "--help")
        assert code == 0
        assert output.startswith("usage: ")
        assert all(f"  {key}" in output for key in keys)


@pytest.fixture
def folders(tmp_path):
    """Folders that each have a fault."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.fromarray(np.full((32, 32), 60 * i, np.uint8)).save(tmp_path / f"images/{i}.png")
    shutil.copytree(tmp_path / "images", tmp_path / "broken")
    content = (tmp_path / "broken/0.png").read_bytes()
    (tmp_path / "broken/bad.png").write_bytes(content[: len(content) // 2])
    return tmp_path


BAD = {
    "mistyped key": ("stage1", "optim.lrr=1", "did you mean optim.lr?"),
    "mistyped model key": ("stage1", "model.width=[8]", "did you mean model.widths?"),
    "mistyped quantizer key": (
        "stage1",
        "model.quantizer.codebok_size=8",
        "did you mean model.quantizer.codebook_size?",
    ),
    "a quantizer that does not exist": (
        "stage1",
        "model.quantizer.name=vqq",
        "model.quantizer.name=vqq: no such quantizer; there is ema, vq, ",
    ),
    "a quantizer's size": (
        "stage1",
        "model.quantizer.name=lfq model.quantizer.codebook_size=500",
        "model.quantizer.codebook_size=500: lfq needs a power of two; use 256 or 512",
    ),
    "an architecture that does not exist": ("stage1", "model.name=heavy", "model.name=heavy: no such model; there is "),
    "quantizer settings that mean nothing together": (
        "stage1",
        "model.quantizer.gradient=rotation model.quantizer.temperature=1",
        "a drawn code may lie on any side of the vector",
    ),
    "mistyped prior key": ("stage2", "model.hiden_size=8", "did you mean model.hidden_size?"),
    "wrong type": ("stage1", "optim.lr=fast", "optim.lr"),
    "wrong type in the model": ("stage1", "model.quantizer.codebook_size=many", "model.quantizer.codebook_size"),
    "not a choice": ("stage1", "loss.rec=l3", "['mse', 'l1']"),
    "no such config": ("stage1", "missing.yaml", "missing.yaml"),
    "no such data": ("stage1", "data.source={tmp}/missing", "missing"),
    "no image": ("stage1", "data.source={tmp}/empty", "no image"),
    "a size of three sides": ("stage1", "data.image_size=[8,8,8]", "must be a number of pixels, or two as in [height"),
    "a size of other things": (
        "stage2",
        "data.image_size=[[8,8],8]",
        "is a int | list[int], without sections or lists",
    ),
    "more classes than images": (
        "stage1",
        "data.max_images=9",
        "data.max_images=9: is below the number of classes; give ",
    ),
    "a number of crops that is none": ("stage2", "data.crops=3", "data.crops=3: is no such number of crops; use 1, 5"),
    "crops without mirror images": ("stage2", "data.crops=5 data.flip=true", "use data.crops=10 or data.flip=false"),
    "a range of crops that is none": (
        "stage1",
        "data.augment=[0.8]",
        "data.augment=[0.8]: must be two shares in order",
    ),
    "size and stride": (
        "stage1",
        "data.image_size=36",
        "error: data.image_size=36 is not divisible by the model's stride 8; use 32",
    ),
    "broken image": ("stage1", "data.source={tmp}/broken data.on_error=raise", "bad.png"),
    "no tokenizer": ("stage2", "stage1={tmp}/empty", "not a tokenizer"),
    "no stage 1": ("stage2", "stage1={tmp}/missing", "not a tokenizer"),
    "no prior": ("sample", "{tmp}/empty", "no model"),
    "no such class": ("sample", "{runs}/stage2 class_ids=[3,10]", "10 is not a class"),
    "no run": ("sample", "", "usage"),
    "other config": ("stage1", "run_dir={runs}/stage1 optim.lr=0.5", "optim.lr=0.5"),
    "batch and accumulation": ("stage1", "train.accumulation=3", "train.batch_size"),
    "a size that is none": ("stage1", "model.encoder_blocks=-1", "model.encoder_blocks=-1: must be at least 0"),
    "a prior of too many layers": ("stage2", "model.num_hidden_layers=1000000", "must be at most 1000"),
    "an average of too many steps": ("stage1", "train.ema=0.5", "train.ema=0.5: must be at least 0 and below 0.28"),
    "a home that nobody has": ("stage1", "data.source=~nobody-at-all/images", "there is no home folder ~nobody-at-all"),
    "too many shards": ("stage1", "data.source={tmp}/{{0..9999999999}}.tar", "no shard"),
    "an order that does not exist": (
        "stage2",
        "order=spiral",
        "order=spiral: no such order of tokens; there is raster",
    ),
    "more neighbours than codes": (
        "stage1",
        "perturb.images=0.1 perturb.nearest=512",
        "perturb.nearest=512: a code has only ",
    ),
    "a share that is none": ("stage1", "perturb.codes=1.5", "perturb.codes=1.5: is a share, from 0 to 1"),
    "equivariance of nothing": (
        "stage1",
        "equivariance.share=0.5 equivariance.scale=1 equivariance.rotate=false",
        "equivariance.share=0.5: nothing is left to do; ",
    ),
    "latents too small for the discriminator": (
        "stage1",
        "equivariance.share=0.5 loss.adversarial.name=hinge",
        " pixels, which equivariance.scale=0.25 makes; use ",
    ),
    "no budget": ("stage1", "train.max_steps=null", "train.max_seconds"),
}


def made(runs: Path) -> dict[Path, int]:
    """The runs' files with their times, without those that other tests add at the same time."""
    files = (p for p in runs.rglob("*") if p.is_file() and {"codes", "evaluation", "wandb"}.isdisjoint(p.parts))
    return {p: p.stat().st_mtime_ns for p in files}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(case, runs, folders, program):
    stage, arguments, said = BAD[case]
    before = made(runs)
    given = arguments.format(tmp=folders, runs=runs).split()
    if stage == "sample":
        code, _, errors = program("stage2/sample.py", *given)
    else:
        settings = [DEBUG[stage]] if not given[0].endswith(".yaml") else []
        settings += [f"run_dir={folders}/run"] if "run_dir" not in arguments else []
        settings += [f"stage1={runs}/stage1"] if stage == "stage2" and "stage1" not in arguments else []
        code, _, errors = program(f"{stage}/train.py", *settings, *given)
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert said in errors
    assert before.items() <= made(runs).items()
    assert not (folders / "run").exists()


def test_a_broken_image_is_named_and_skipped(folders, program):
    code, output, _ = program(
        "stage1/train.py",
        DEBUG["stage1"],
        f"run_dir={folders}/run",
        f"data.source={folders}/broken",
        "train.max_steps=1",
    )
    assert code == 0
    assert "3 training and 1 held-out images" in output


def test_bad_input_has_exit_code_2_as_a_command_too():
    done = subprocess.run(
        ["python", "stage1/train.py", "optim.lrr=1"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: optim.lrr: no such key; did you mean optim.lr?\n")
