"""Runs that start from the weights of others, and tokenizers of which some parts stay as they are."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from programs import metrics, state, untimed_metrics
from safetensors.torch import load_file

from vqgen.adversarial.dcgan import DCGANDiscriminator, DCGANGenerator, load_gan
from vqgen.data.images import load_images
from vqgen.data.order import BatchOrder
from vqgen.priors.prior import Prior
from vqgen.settings import DataConfig
from vqgen.tokenizers import build_tokenizer
from vqgen.tokenizers.vqmodel import VQModel, load_tokenizer
from vqgen.training.origin import Origin, class_rows
from vqgen.yaml_file import read_yaml

SHORT = ["train.max_steps=1", "train.log_every=1", "train.batch_size=16", "train.eval_images=32"]
SHORT += ["tracking.wandb=disabled"]
D = ["loss.adversarial.name=hinge", "discriminator.width=8", "discriminator.layers=2", "loss.adversarial.start=1"]
FROZEN = ["freeze=[encoder,quantizer]", "train.max_steps=4", "train.checkpoint_every=2", "optim.lr=1e-3"]


def first_batch(size: int, max_images: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch of the built-in digits that a run with seed 0 sees: images in [-1, 1], class ids."""
    train_set, _ = load_images(DataConfig(channels=1, max_images=max_images))
    (rows,) = itertools.islice(BatchOrder(len(train_set), size, first=0, seed=0), 1)
    pixels, class_ids = train_set.__getitems__(rows)
    return pixels.float() / 127.5 - 1, class_ids


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# What is a source


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_runs_models_and_checkpoints_are_sources_and_their_weights_are_those_of_evaluations(runs, tmp_path, stage):
    run, inside = runs / stage, "" if stage == "stage1" else "prior"
    load = Prior.from_pretrained if stage == "stage2" else VQModel.from_pretrained
    bare = tmp_path / "bare"  # as a converted one: no run around it
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / "model" / inside / name, bare)
    shared = load(run).state_dict()
    for source in (run, run / "model", run / "model" / inside, bare):
        assert same(Origin(str(source), load).model.state_dict(), shared)
    assert f"{Origin(str(run), load)}" == f"{run}, step 40: keeps its averaged weights; new: optimizer, schedule"
    assert f"{Origin(str(bare), load)}" == f"{bare}: keeps its weights; new: optimizer, schedule"

    middle = Origin(str(run / "checkpoints/step_00000020"), load)
    saved = state(run, 20)
    assert same(middle.model.state_dict(), saved["ema"])
    assert not same(saved["ema"], saved["model"])
    assert not same(saved["ema"], shared)
    assert middle.at == ", step 20"


def test_the_tokenizer_of_a_prior_is_a_source_too(runs):
    origin = Origin(str(runs / "stage2"), VQModel.from_pretrained)
    assert same(origin.model.state_dict(), load_tokenizer(runs / "stage1")[0].state_dict())
    assert origin.at == ""  # its checkpoint's step is the prior's


@pytest.mark.parametrize("quantizer", ["ema", "vq", "residual"])
def test_a_codebook_without_counts_is_not_made_anew(tmp_path, quantizer):
    """As other projects' checkpoints have it."""
    options = {"base": {"name": "vq"}} if quantizer == "residual" else {}
    model = build_tokenizer(channels=1, widths=[8, 16], quantizer={"name": quantizer, **options})
    for name, value in model.state_dict().items():
        if name.endswith(".codebook"):
            value.normal_()
    model.save_pretrained(tmp_path)
    origin = Origin(str(tmp_path), VQModel.from_pretrained)
    copied = build_tokenizer(**model.options).train()
    origin.fill(copied)
    x, _ = first_batch(16)
    assert torch.equal(copied(x)[1][0].codes, model.eval().encode(x)[0])
    for name, value in copied.state_dict().items():
        if name.endswith(".codebook"):
            assert (value - model.state_dict()[name]).abs().amax(dim=1).median() < 0.01


# What the run makes of it


def test_stage_1_starts_with_the_weights_and_a_new_optimizer(runs, program, tmp_path):
    settings = ["model.quantizer.revive_below=0", "optim.lr=1e-9", "optim.warmup=0", "data.val_fraction=0.1"]
    code, output, errors = program(
        "stage1/train.py", f"run_dir={tmp_path}", f"init_from={runs}/stage1", *settings, *SHORT
    )
    assert code == 0, errors
    keeps = "keeps its averaged weights, its codebook; new: optimizer, schedule\n"
    assert f"\nstarts from {runs}/stage1, step 40: {keeps}" in output
    x, _ = first_batch(16)
    model = load_tokenizer(runs / "stage1")[0]
    with torch.no_grad():
        x_rec, (q,) = model(x)
    mse, figures = F.mse_loss(x_rec, x).item(), metrics(tmp_path)
    assert figures["train/loss"] == pytest.approx(mse + q.loss.item(), rel=1e-4)
    assert figures["train/rec_loss"] == pytest.approx(mse, rel=1e-4)
    before, saved = load_file(runs / "stage1/model/model.safetensors"), state(tmp_path, 1)
    for name, value in before.items():
        if "quantizer" not in name:
            torch.testing.assert_close(saved["model"][name], value, rtol=0, atol=1e-8)
            torch.testing.assert_close(saved["ema"][name], value, rtol=0, atol=1e-8)
    assert saved["model"]["quantizer.num_updates"] == before["quantizer.num_updates"] + 1 == 41
    weight = 1 / (1 + 0.1 * 41)  # of the running counts, which go on
    count = torch.bincount(q.codes.flatten(), minlength=64)
    torch.testing.assert_close(
        saved["model"]["quantizer.counts"], torch.lerp(before["quantizer.counts"], count.float(), weight)
    )
    assert {of["step"].item() for of in saved["optimizer"]["state"].values() if "exp_avg" in of} == {1}
    config = read_yaml(tmp_path / "config.yaml")
    assert config["init_from"] == f"{runs}/stage1"
    expected = read_yaml(runs / "stage1/config.yaml")["model"]
    expected["quantizer"]["revive_below"] = 0.0
    assert config["model"] == expected
    card = (tmp_path / "model/README.md").read_text()
    assert f"- Started from the weights of {runs}/stage1, step 40.\n" in card


def test_stage_2_starts_with_the_prior(runs, program, tmp_path):
    arguments = [f"run_dir={tmp_path}/2", f"codes_dir={tmp_path}/codes", "data.max_images=200", "class_dropout=0"]
    arguments += [f"stage1={runs}/stage1", f"init_from={runs}/stage2", "optim.lr=1e-9", "context_noise=0", *SHORT]
    code, output, errors = program("stage2/train.py", *arguments, "model.attention_dropout=1e-9")
    assert code == 0, errors
    assert "step 40: keeps its averaged weights; new: optimizer, schedule\n" in output
    prior, (tokenizer, _) = Prior.from_pretrained(runs / "stage2"), load_tokenizer(runs / "stage1")
    for name, value in state(tmp_path / "2", 1)["model"].items():
        torch.testing.assert_close(value, prior.state_dict()[name], rtol=0, atol=1e-8)
    x, class_ids = first_batch(16, max_images=200)
    with torch.no_grad():
        tokens = prior.layout.flatten(tokenizer.encode(x))
        log_p = prior(tokens, class_ids).log_softmax(dim=-1).gather(-1, tokens[..., None])
    assert metrics(tmp_path / "2")["train/loss"] == pytest.approx(-log_p.mean().item(), rel=1e-4)
    config = read_yaml(tmp_path / "2/config.yaml")["model"]
    assert config == read_yaml(runs / "stage2/config.yaml")["model"] | {"attention_dropout": 1e-9}


def test_a_prior_of_one_order_is_no_start_for_random_orders(runs, program, tmp_path):
    arguments = [f"run_dir={tmp_path}", f"codes_dir={tmp_path}/codes", f"init_from={runs}/stage2", "random_orders=0"]
    code, _, errors = program("stage2/train.py", f"stage1={runs}/stage1", *arguments, *SHORT)
    assert code == 2
    assert (
        f"init_from={runs}/stage2: its random_orders is null, here 0.0; both must be null, or both numbers; " in errors
    )


def test_the_gan_starts_with_both_networks(program, tmp_path):
    debug = ["configs/debug/gan.yaml", *SHORT, "data.max_images=200"]
    assert program("stage1/train_gan.py", f"run_dir={tmp_path}/a", *debug)[0] == 0
    arguments = [*SHORT, "data.max_images=200", "optim.lr=1e-9", "disc_lr=1e-9", "discriminator.width=8"]
    code, output, errors = program(
        "stage1/train_gan.py", f"run_dir={tmp_path}/b", f"init_from={tmp_path}/a", *arguments
    )
    assert code == 0, errors
    assert "step 1: keeps its averaged weights, discriminator; new: optimizer, schedule\n" in output
    a, b = state(tmp_path / "a", 1), state(tmp_path / "b", 1)
    for part, source in (("model", "ema"), ("disc", "disc")):
        for name, value in a[source].items():
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                torch.testing.assert_close(b[part][name], value, rtol=0, atol=1e-8, msg=name)
    assert read_yaml(tmp_path / "b/config.yaml")["generator"] == {"latent_dim": 100, "width": 8}
    refused = program(
        "stage1/train_gan.py", f"run_dir={tmp_path}/c", f"init_from={tmp_path}/a", *SHORT, "data.image_size=64"
    )
    assert refused[0] == 2
    assert "draws images of data.image_size=32; give that, or train from scratch\n" in refused[2]
    refused = program(
        "stage1/train_gan.py", f"run_dir={tmp_path}/c", f"init_from={tmp_path}/a", *SHORT, "generator.width=16"
    )
    assert refused[0] == 2
    assert "another model than asked for: generator.width=16, but it has 8; leave these out" in refused[2]


def test_a_discriminator_that_fits_is_kept_and_another_is_new(program, tmp_path):
    debug = ["configs/debug/stage1.yaml", "data.max_images=200", *SHORT]
    assert program("stage1/train.py", f"run_dir={tmp_path}/a", *debug, *D)[0] == 0
    for name, change, said in (
        ("b", "seed=1", "keeps its averaged weights, its codebook, discriminator; new: optimizer, schedule\n"),
        (
            "c",
            "discriminator.width=4",
            "codebook; new: optimizer, schedule, discriminator (there is one of another shape)\n",
        ),
    ):
        arguments = [f"run_dir={tmp_path}/{name}", f"init_from={tmp_path}/a", *debug, *D, change]
        code, output, errors = program("stage1/train.py", *arguments)
        assert code == 0, errors
        assert said in output
    a, b = state(tmp_path / "a", 1), state(tmp_path / "b", 1)  # D does not learn in them, so b's is not of its seed
    assert same(a["disc"], b["disc"])
    code, output, errors = program(
        "stage1/train.py", f"run_dir={tmp_path}/d", f"init_from={tmp_path}/a/model", *debug, *D
    )
    assert "discriminator (there is none)\n" in output


def test_classes_keep_their_weights_by_name(runs):
    """In the prior's tables of tokens, and in the GAN's of classes."""
    origin = Origin(str(runs / "stage2"), Prior.from_pretrained)
    its = origin.model
    assert its.options == read_yaml(runs / "stage2/config.yaml")["model"]
    prior = Prior(its.layout, ["3", "cat", "0"], **its.options)
    fresh = {name: value.clone() for name, value in prior.state_dict().items()}
    first = its.layout.vocab_size + 1
    origin.fill_by_class(prior, prior.token_tables, [(i, i) for i in range(first)], first, prior.class_names)
    assert sorted(prior.token_tables) == ["lm.lm_head.weight", "lm.model.embed_tokens.weight"]
    for name, value in prior.state_dict().items():
        there = its.state_dict()[name]
        if name in prior.token_tables:
            assert torch.equal(value[:first], there[:first])
            assert torch.equal(value[first + 0], there[first + 3])
            assert torch.equal(value[first + 1], fresh[name][first + 1])
            assert torch.equal(value[first + 2], there[first + 0])
        else:
            assert torch.equal(value, there)
    assert str(origin).endswith("weights, 2 of its 10 classes by name; new: optimizer, schedule, the class cat")


def test_classes_of_a_gan_keep_their_weights_by_name(tmp_path):
    torch.manual_seed(0)
    its, its_disc = DCGANGenerator(8, 1, ["a", "b", "c"], width=4), DCGANDiscriminator(8, 1, 3, width=4)
    torch.nn.init.normal_(its_disc.embedding.weight)
    its.save_pretrained(tmp_path)
    origin = Origin(str(tmp_path), load_gan)
    origin.state = {"disc": its_disc.state_dict(), "step": 7}
    own, disc = DCGANGenerator(8, 1, ["c", "d"], width=4), DCGANDiscriminator(8, 1, 2, width=4)
    origin.fill_by_class(own, own.class_tables, [(2, 3)], 0, own.class_names)
    assert origin.fill_part("disc", disc, "discriminator", disc.class_tables, [(2, 3), *class_rows(["c", "d"], "abc")])
    assert torch.equal(own.norms[0].gain.weight[[0, 2]], its.norms[0].gain.weight[[2, 3]])
    assert not torch.equal(own.norms[0].gain.weight[1], its.norms[0].gain.weight[1])
    assert torch.equal(own.first.weight, its.first.weight)
    assert torch.equal(disc.embedding.weight[[0, 2]], its_disc.embedding.weight[[2, 3]])
    assert not disc.embedding.weight[1].any()  # as a new one
    said = (
        ", step 7: keeps its weights, 1 of its 3 classes by name, discriminator; new: optimizer, schedule, the class d"
    )
    assert str(origin).endswith(said)


# Going on


def test_frozen_parts_stay_bit_for_bit_and_the_run_goes_on_to_the_same_bits_without_its_source(runs, program, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(runs / "stage1", source)
    arguments = [f"run_dir={run}", f"init_from={source}", *SHORT, *FROZEN, "data.max_images=200"]
    code, output, errors = program("stage1/train.py", *arguments)
    assert code == 0, errors
    assert "keeps its averaged weights, its codebook, encoder and quantizer frozen; new: " in output
    a, b = (load_tokenizer(folder)[0] for folder in (source, run))
    x, _ = first_batch(64)
    assert torch.equal(a.encode(x)[0], b.encode(x)[0])
    decoded = ("decoder.", "from_code.")
    saved = state(run, 4)
    for weights in (b.state_dict(), saved["model"]):
        for name, value in a.state_dict().items():
            assert torch.equal(value, weights[name]) is not name.startswith(decoded), name
    trained = [name for name, _ in a.named_parameters() if name.startswith(decoded)]
    assert len(saved["optimizer"]["state"]) == len(trained)
    figures = metrics(run)
    assert figures["train/quantizer_loss"] == 0
    assert figures["train/loss"] == figures["train/rec_loss"]

    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(source)
    shutil.rmtree(run / "checkpoints/step_00000004")
    code, output, errors = program("stage1/train.py", *arguments)
    assert code == 0, errors
    assert "going on from step 2" in output
    assert "starts from" not in output
    assert untimed_metrics(run) == untimed_metrics(tmp_path / "copy")
    for part in ("model", "ema"):
        assert same(state(run, 4)[part], saved[part])
    assert f"Started from the weights of {source}, step 40." in (run / "model/README.md").read_text()
    code, _, errors = program("stage1/train.py", *arguments, "model.quantizer.name=fsq")
    assert code == 2
    assert "with model.quantizer.name=ema, but model.quantizer.name=fsq is asked for" in errors
    code, _, errors = program("stage1/train.py", *arguments[:1], *arguments[2:], "freeze=[]")
    assert code == 2
    assert f"with init_from={source}, but init_from=None is asked for" in errors


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_finished_run_that_is_asked_for_more_says_how(runs, program, stage):
    arguments = [f"{stage}/train.py", f"configs/debug/{stage}.yaml", f"run_dir={runs}/{stage}"]
    arguments += [f"stage1={runs}/stage1"] if stage == "stage2" else []
    how = f"to train on from its weights: init_from={runs}/{stage} run_dir=NEW"
    code, _, errors = program(*arguments, "train.max_steps=80")
    asked = "is finished, at step 40, with train.max_steps=40, but train.max_steps=80 is asked for"
    assert (code, errors) == (2, f"error: {runs}/{stage} {asked}; name another run_dir=; {how}\n")
    code, output, _ = program(*arguments)
    assert code == 0
    assert f"is finished, at step 40; {how}; next: " in output


# Bad input

BAD = {
    "no such folder": ("stage1", "init_from={tmp}/none", "init_from={tmp}/none: is not a folder; give a run, its "),
    "a file": ("stage1", "init_from={runs}/stage1/model/model.safetensors", "stage1/convert.py converts other "),
    "no model": ("stage1", "init_from={tmp}", "init_from={tmp}: {tmp} is not a tokenizer: it has no config.json; give"),
    "an address": ("stage1", "init_from=https://example.org/model", "is an address, but must be here"),
    "a prior for stage 1": ("stage1", "init_from={runs}/stage2/model/prior", "does not load as a tokenizer"),
    "a checkpoint of a prior": (
        "stage1",
        "init_from={runs}/stage2/checkpoints/step_00000040",
        "step_00000040: is a checkpoint of another kind of model",
    ),
    "a tokenizer for stage 2": ("stage2", "init_from={runs}/stage1", "no prior there; give the folder of a stage-2"),
    "a tokenizer for the GAN": ("gan", "init_from={runs}/stage1", "does not load as a generator"),
    "a checkpoint without its run": (
        "stage1",
        "init_from={tmp}/alone/checkpoints/step_00000040",
        "a checkpoint must stay in its run, beside model/, which has the options",
    ),
    "a damaged checkpoint": (
        "stage1",
        "init_from={tmp}/damaged/checkpoints/step_00000040",
        "step_00000040: is damaged (state.pt is not what SHA256SUMS says); give another checkpoint",
    ),
    "only damaged checkpoints": (
        "stage1",
        "init_from={tmp}/damaged",
        "all its checkpoints are damaged; give {tmp}/damaged/model",
    ),
    "other widths and another codebook": (
        "stage1",
        "init_from={runs}/stage1 model.widths=[8,32] model.quantizer.codebook_size=32",
        "model.widths=[8, 32], but it has [16, 32]; model.quantizer.codebook_size=32, but it has 64; leave these out",
    ),
    "another quantizer": (
        "stage1",
        "init_from={runs}/stage1 model.quantizer.name=fsq model.quantizer.levels=[8,8]",
        "another model than asked for: model.quantizer.name=fsq, but it has ema; leave these out",
    ),
    "another stride": ("stage1", "init_from={runs}/stage1 model.patch_size=2", "model.patch_size=2, but it has 4"),
    "other channels": (
        "stage1",
        "init_from={runs}/stage1 data.channels=3",
        "data.channels=3, but it has 1; leave these out",
    ),
    "a size that the stride does not divide": (
        "stage1",
        "init_from={runs}/stage1 data.image_size=36",
        "data.image_size=36 is not divisible by the model's stride 8; use 32 or 40",
    ),
    "another prior": (
        "stage2",
        "init_from={runs}/stage2 model.hidden_size=64 model.intermediate_size=88",
        "model.hidden_size=64, but it has 32; leave these out, or train from scratch",
    ),
    "codes of another layout": (
        "stage2",
        "init_from={runs}/stage2 stage1={tmp}/other data.source=digits",
        "another tokenizer, size or order: codes.codebook_sizes=(64,), here (32,); train from scratch\n",
    ),
    "a part that does not exist": (
        "stage1",
        "init_from={runs}/stage1 freeze=[encoder,codebook]",
        "error: freeze=codebook: no such part; there is encoder, quantizer, decoder\n",
    ),
    "nothing to train": (
        "stage1",
        "init_from={runs}/stage1 freeze=[encoder,decoder]",
        "error: freeze=[decoder,encoder]: leaves no weights that a gradient trains; freeze fewer parts\n",
    ),
    "one part without brackets": ("stage1", "freeze=encoder", "freeze=[encoder]: would keep random weights"),
    "random parts frozen": (
        "stage1",
        "freeze=[encoder]",
        "freeze=[encoder]: would keep random weights; give init_from",
    ),
    "a gradient that is not there": (
        "stage1",
        "init_from={runs}/stage1 freeze=[decoder] loss.adversarial.name=hinge",
        "measures the decoder's gradient; use loss.adversarial.adaptive=false",
    ),
    "parts of a prior": ("stage2", "freeze=[encoder]", "freeze: no such key"),
}


@pytest.fixture(scope="module")
def faulty(runs, tmp_path_factory) -> Path:
    """Sources that each have a fault."""
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(runs / "stage1/checkpoints", folder / "alone/checkpoints")
    shutil.copytree(runs / "stage1", folder / "damaged")
    for file in (folder / "damaged/checkpoints").glob("*/state.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    quantizer = {"name": "ema", "codebook_size": 32}
    build_tokenizer(channels=1, widths=[16, 32], quantizer=quantizer).save_pretrained(folder / "other")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(case, runs, faulty, program, tmp_path):
    stage, given, said = BAD[case]
    arguments = given.format(tmp=faulty, runs=runs).split()
    arguments += [f"stage1={runs}/stage1"] if stage == "stage2" and "stage1=" not in given else []
    script = "stage1/train_gan.py" if stage == "gan" else f"{stage}/train.py"
    code, _, errors = program(script, f"run_dir={tmp_path}/run", *arguments, *SHORT)
    assert code == 2, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert said.format(tmp=faulty, runs=runs) in errors
    assert not (tmp_path / "run").exists()


def test_the_generator_of_a_run_loads_from_each_of_its_folders(program, tmp_path):
    assert program("stage1/train_gan.py", "configs/debug/gan.yaml", f"run_dir={tmp_path}", *SHORT)[0] == 0
    folders = (tmp_path, tmp_path / "model", tmp_path / "model/generator")
    a, b, c = (load_gan(folder).state_dict() for folder in folders)
    assert same(a, b)
    assert same(b, c)
