"""The command line becomes a configuration, or an error message."""

import inspect
import json
from pathlib import Path

import pytest
import yaml
from soak.mutations import PROGRAMS, mutated_configs

from vqgen.adversarial.dcgan import DCGANDiscriminator, DCGANGenerator
from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.cli.parse import load_config
from vqgen.cli.reflect import check_options, complete_options, settings, usage
from vqgen.errors import InputError
from vqgen.priors.prior import Prior
from vqgen.quantizers import BASES, QUANTIZERS, EMAQuantizer, quantizer_options
from vqgen.settings import (
    CompareConfig,
    DataConfig,
    GANConfig,
    SampleConfig,
    Stage1Config,
    Stage1EvaluateConfig,
    Stage2Config,
    Stage2EvaluateConfig,
    TrackingConfig,
)
from vqgen.tokenizers import ARCHITECTURES, Light, build_tokenizer
from vqgen.yaml_file import read_yaml, save_config

STAGE1 = {"model": Light, "model.quantizer": EMAQuantizer, "discriminator": PatchDiscriminator}
EVALUATE = {"data": DataConfig, "tracking": TrackingConfig}
STAGE2 = {"model": Prior, "data": DataConfig}


def load1(*arguments: str) -> Stage1Config:
    return load_config(Stage1Config, arguments, STAGE1)


def load2(*arguments: str) -> Stage2Config:
    return load_config(Stage2Config, arguments, STAGE2)


def error_of(call, *arguments, **options) -> str:
    """The InputError's message, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def write(tmp_path: Path, monkeypatch):
    """Writes a file to the current folder, which is new and empty, and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes, name: str = "config.yaml") -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


# Valid command lines


def test_no_argument_is_the_defaults():
    assert load1() == Stage1Config()
    assert load2() == Stage2Config()
    assert load_config(SampleConfig, [], {}) == SampleConfig()


def test_command_line_goes_before_file_goes_before_defaults(write):
    name = write("optim: {lr: 0.5, warmup: 0.25}\ntrain: {max_steps: 7}\nmodel: {patch_size: 2, widths: [8, 16]}")
    config = load1("optim.lr=0.75", name, "model.patch_size=8")
    assert (config.optim.lr, config.optim.warmup, config.train.max_steps) == (0.75, 0.25, 7)
    assert config.model == {"patch_size": 8, "widths": [8, 16]}
    assert config.optim.grad_clip == Stage1Config().optim.grad_clip
    assert config.data == Stage1Config().data


def test_the_last_of_two_equal_keys_holds():
    assert load1("seed=1", "seed=2").seed == 2


def test_a_pattern_that_the_shell_expanded_is_refused():
    assert "quote" in error_of(load1, "data.source=0.tar", "data.source=1.tar")


def test_text_stays_as_it_is():
    config = load1("run_dir=1e3", "data.background=#336699", "data.source=007", "data.val_source=null")
    assert (config.run_dir, config.data.background) == ("1e3", "#336699")
    assert (config.data.source, config.data.val_source) == ("007", None)


def test_values_take_the_type_of_their_setting():
    config = load1("train.max_seconds=60", "data.flip=true", "optim.beta1=0", "run_dir=3", "train.max_steps=null")
    assert (config.train.max_seconds, config.data.flip, config.train.max_steps) == (60.0, True, None)
    assert type(config.train.max_seconds) is float
    assert type(config.optim.beta1) is float
    assert config.run_dir == "3"


def test_an_empty_file_changes_nothing(write):
    assert load1(write("")) == Stage1Config()


def test_plain_sections_hold_what_is_given_and_no_more():
    assert load2("data.image_size=16", "model.hidden_size=64").data == {"image_size": 16}
    assert load2("model.hidden_size=64", "model.intermediate_size=96").model == {
        "hidden_size": 64,
        "intermediate_size": 96,
    }
    assert load1("model.quantizer.codebook_size=64").model == {"quantizer": {"codebook_size": 64}}


def test_configurations_do_not_share_their_sections():
    load1().model["widths"] = [8]
    assert load1() == Stage1Config()


@pytest.mark.parametrize(
    "setting",
    ["train.batch_size=0", "train.accumulation=0", "train.log_every=0", "optim.lr=0", "optim.warmup=1", "seed=-1"],
)
def test_numbers_that_mean_nothing_are_refused_by_name(setting):
    assert error_of(load1, setting).startswith(setting.split("=")[0])


@pytest.mark.parametrize(
    "config", [Stage1Config(model={"widths": [8], "quantizer": {"decay": 0.5}}), Stage2Config(), SampleConfig()]
)
def test_saved_configuration_reads_back_whole(tmp_path, config):
    path = tmp_path / "config.yaml"
    save_config(config, path)
    sections = {Stage1Config: STAGE1, Stage2Config: STAGE2}.get(type(config), {})
    saved = {k: v for k, v in read_yaml(path).items() if v != {}}
    path.write_text(yaml.safe_dump(saved))
    assert load_config(type(config), [str(path)], sections) == config
    assert read_yaml(path).keys() >= {k for k, v in vars(config).items() if v != {}}


def test_a_saved_configuration_is_a_config_file(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(load1("seed=5", "model.patch_size=2"), path)
    assert load1(str(path)) == load1("seed=5", "model.patch_size=2")


# Errors


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optim.lrr", "optim.lr"),
        ("max_steps", "train.max_steps"),
        ("lr", "optim.lr"),
        ("optim.beta1.x", "optim.beta1"),
        ("model.patchsize", "model.patch_size"),
        ("model.codebok_size", "model.quantizer.codebook_size"),
        ("model.codebook_size", "model.quantizer.codebook_size"),
    ],
)
def test_unknown_key_suggests_the_nearest(key, near):
    message = error_of(load1, f"{key}=5")
    assert message.startswith(f"{key}: ")
    assert f"did you mean {near}?" in message


def test_unknown_key_of_a_plain_section_suggests_the_nearest():
    assert "did you mean data.source?" in error_of(load2, "data.sorce=digits")


def test_unknown_key_in_a_file_is_refused_like_one_on_the_command_line(write):
    assert "did you mean optim.lr?" in error_of(load1, write("optim: {lrr: 1}"))


def test_unknown_key_that_is_near_to_none_points_to_help():
    assert "--help" in error_of(load1, "qqqqqqqqqqqqqqqq=1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", "abc"),
        ("train.max_steps", "2.5"),
        ("data.flip", "maybe"),
        ("data.image_size", "1e2"),
        ("seed", "true"),
        ("seed", ""),
        ("optim.beta1", "[1]"),
        ("model.patch_size", "x"),
        ("model.widths", "8"),
        ("model.widths", "[a]"),
        ("model.channels", "null"),
    ],
)
def test_value_of_another_type_is_refused_by_its_key(key, value):
    assert error_of(load1, f"{key}={value}").startswith(key)


def test_value_of_another_type_in_a_file_is_refused_by_its_key(write):
    assert error_of(load2, write("data: {image_size: large}")).startswith("data.image_size")


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("loss.rec", ["mse", "l1"]),
        ("data.resize", ["crop", "pad"]),
        ("data.on_error", ["skip", "raise"]),
        ("train.mixed_precision", ["no", "bf16", "fp16"]),  # YAML 1.1 reads `no` as a boolean
        ("tracking.wandb", ["auto", "online", "offline", "disabled"]),
    ],
)
def test_a_setting_with_a_choice_takes_each_and_no_other(write, key, choices):
    section, name = key.split(".")
    for choice in choices:
        assert getattr(getattr(load1(f"{key}={choice}"), section), name) == choice
        assert load1(write(f"{section}: {{{name}: {choice}}}")) == load1(f"{key}={choice}")
    message = error_of(load1, f"{key}=other")
    assert message.startswith(key)
    assert all(choice in message for choice in choices)


@pytest.mark.parametrize("argument", ["optim=3", "model=3", "model=null", "model.quantizer=ema", "train=[1]"])
def test_a_section_takes_no_value(argument):
    key = argument.partition("=")[0]
    assert f"{key}.KEY=VALUE" in error_of(load1, argument)


def test_a_section_takes_no_value_in_a_file_either(write):
    assert "optim.KEY=VALUE" in error_of(load1, write("optim: 3"))


@pytest.mark.parametrize(
    "content", ["- 1\n- 2\n", "5\n", "a: [1, 2\nb: }\n", "seed: 1\nseed: 2\n", "seed: ${nope}\n", b"\xff\xfe\x00\x80"]
)
def test_a_file_that_is_no_yaml_mapping_is_named(write, content):
    assert error_of(load1, write(content, "broken.yaml")).startswith("broken.yaml: not a YAML file of settings")


def test_a_file_with_a_key_that_is_no_text_is_refused(write):
    assert "no such key" in error_of(load1, write("1: 2"))


def test_a_missing_file_is_named():
    assert error_of(load1, "nowhere.yaml").startswith("nowhere.yaml: no such config file")


def test_a_second_file_is_refused(write):
    first, second = write("seed: 1", "first.yaml"), write("seed: 2", "second.yaml")
    message = error_of(load1, first, second)
    assert "first.yaml" in message
    assert "second.yaml" in message


@pytest.mark.parametrize(
    "content",
    [
        "seed: !!int x",
        "seed: !!int ''",
        "data: {flip: !!bool 3}",
        "run_dir: !!timestamp x",
        "seed: ???",
        "model: {widths: [???]}",
        f"seed: {'9' * 5000}",
        f"seed: {'[' * 2000}{']' * 2000}",
        "seed: !!python/object/apply:os.getpid []",
    ],
)
def test_a_value_that_yaml_does_not_read_is_an_input_error(write, content):
    assert error_of(load1, write(content, "broken.yaml")).startswith("broken.yaml: not a YAML file of settings: ")


def test_what_is_no_yaml_is_named_by_its_line(write):
    assert "duplicate key seed in line 3" in error_of(load1, write("seed: 1\nrun_dir: x\nseed: 2\n"))


def test_a_dot_in_a_files_key_is_explained(write):
    assert "a section is a line of its own" in error_of(load1, write("train.max_steps: 1"))


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("optim.lr", "optim: {lr: .nan}"),
        ("train.max_seconds", "train: {max_seconds: .inf}"),
        ("loss.adversarial.weight", "loss: {adversarial: {weight: 1e300}}"),
        ("model.quantizer.decay", "model: {quantizer: {decay: .nan}}"),
        ("seed", f"seed: {2**64}"),
        ("train.max_steps", f"train: {{max_steps: 1{'0' * 400}}}"),
        ("optim.grad_clip", f"optim: {{grad_clip: 1{'0' * 400}}}"),
        ("train.ema", "train: {ema: 0.28}"),
        ("train.batch_size", "train: {batch_size: 1000000000}"),
        ("train.keep_checkpoints", "train: {keep_checkpoints: -3}"),
        ("data.workers", "data: {workers: 1000000000}"),
        ("model.widths", "model: {widths: {}}"),
        ("model.widths", "model: {widths: [{a: 1}]}"),
        ("model.widths", "model: {widths: [[8]]}"),
        ("loss.perceptual.weights", "loss: {perceptual: {weights: [[a]]}}"),
        ("run_dir", "run_dir: ''"),
        ("run_dir", 'run_dir: "a\\0b"'),
        ("run_dir", 'run_dir: "a\\nb"'),
        ("run_dir", f"run_dir: {'x' * 256}"),
        ("data.source", f"data: {{source: '{'*' * 5000}'}}"),
        ("tracking.project", "tracking: {project: ' '}"),
    ],
)
def test_what_no_setting_takes_is_refused_by_its_key(write, key, content):
    assert error_of(load1, write(content)).startswith(key)


def test_an_empty_section_changes_nothing(write):
    assert load1(write("model: {}\noptim: {}\n")) == Stage1Config()


@pytest.mark.parametrize(
    "argument",
    [
        "a=[1,2",
        "seed={x",
        "seed=${nope}",
        "=3",
        "seed=???",
        "run_dir=???",
        "run_dir=${nope}",
        "run_dir=",
        "optim.lr=nan",
    ],
)
def test_a_broken_argument_is_an_input_error(argument):
    error_of(load1, argument)


def test_a_mutated_file_is_a_configuration_or_an_input_error(write):
    loaded, refused = [], []
    for program, text in mutated_configs(seed=0, count=90):
        cls, sections, _ = PROGRAMS[program]
        name = write(text.encode("utf-8", "surrogateescape"))
        try:
            loaded.append(load_config(cls, [name], sections))
        except InputError as error:
            refused.append(str(error))
    assert min(len(loaded), len(refused)) > 10
    assert all(len(message.splitlines()) == 1 for message in refused)


# The constructor as the schema


def test_check_options_fills_in_defaults_and_converts():
    defaults = {name: p.default for name, p in inspect.signature(Light).parameters.items()}
    defaults["widths"] = list(defaults["widths"])  # the default is a tuple, but config.json has lists
    assert check_options(Light, {}, "model") == defaults
    assert check_options(Light, {"patch_size": "2", "widths": ["8", 16]}, "model") == {
        **defaults,
        "patch_size": 2,
        "widths": [8, 16],
    }


def test_check_options_names_the_section():
    assert "did you mean over.there.decay?" in error_of(check_options, EMAQuantizer, {"decy": 1}, "over.there")
    assert error_of(check_options, EMAQuantizer, {"decay": "x"}, "over.there").startswith("over.there.decay: ")


def test_check_options_leaves_further_options_of_an_open_constructor_as_they_are():
    complete = check_options(Prior, {"intermediate_size": 96}, "model")
    assert (complete["intermediate_size"], complete["model_type"]) == (96, "llama")


SECTIONS = {"model": ARCHITECTURES, "model.quantizer": QUANTIZERS, "model.quantizer.base": BASES}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_complete_options_are_those_that_a_saved_model_has(tmp_path, name):
    complete = complete_options(SECTIONS, "model", {"widths": ["8", "16"], "quantizer": {"name": name}})
    build_tokenizer(widths=[8, 16], quantizer={"name": name}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == complete
    assert complete_options(SECTIONS, "model", complete) == complete


def test_complete_options_converts_and_fills_in_at_every_depth():
    base = {"codebook_size": "8", "decay": "0.5"}
    given = {"patch_size": "2", "quantizer": {"name": "residual", "dropout": 1, "base": base}}
    complete = complete_options(SECTIONS, "model", given)
    quantizer = complete["quantizer"]
    assert [complete["name"], quantizer["name"], quantizer["base"]["name"]] == ["light", "residual", "ema"]
    assert (complete["patch_size"], complete["head_width"]) == (2, 8)
    assert type(quantizer["dropout"]) is float
    assert quantizer["base"] == quantizer_options(codebook_size=8, decay=0.5)
    assert given["quantizer"]["base"] == base == {"codebook_size": "8", "decay": "0.5"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "heavy"}, "model.name=heavy: no such model; there is light"),
        ({"name": ["light"]}, "model.name=['light']: no such model"),
        ({"width": [8]}, "model.width: light has no such option; did you mean model.widths?"),
        ({"widths": "x"}, "model.widths: "),
        ({"quantizer": {"name": "vqq"}}, "model.quantizer.name=vqq: no such quantizer; there is ema, vq, "),
        ({"quantizer": {"decay": "x"}}, "model.quantizer.decay: "),
        (
            {"quantizer": {"name": "fsq", "code_dim": 3}},
            "model.quantizer.code_dim=3: fsq has no such option: it is the",
        ),
        ({"quantizer": {"name": "vq", "levels": [3]}}, "model.quantizer.levels: vq has no such option; it takes code"),
        ({"quantizer": {"name": "residual", "base": {"name": "residual"}}}, "model.quantizer.base.name=residual: no"),
        ({"quantizer": {"name": "residual", "base": {"lookup": "x"}}}, "model.quantizer.base.lookup: "),
    ],
    ids=str,
)
def test_complete_options_refuses_by_the_full_key(options, message):
    assert error_of(complete_options, SECTIONS, "model", options).startswith(message)


def test_a_misfit_of_the_chosen_constructor_is_refused_before_the_program_starts():
    given = ["model.quantizer.name=lfq", "model.quantizer.decay=0.5"]
    message = error_of(load_config, Stage1Config, given, SECTIONS)
    assert message.startswith("model.quantizer.decay: lfq has no such option; it takes codebook_size, spherical, ")
    message = error_of(load_config, Stage1Config, ["model.quantizer.lookup=x"], SECTIONS)
    assert message.startswith("model.quantizer.lookup: ")


def test_check_options_takes_a_dataclass_too():
    assert DataConfig(**check_options(DataConfig, {"image_size": "16"}, "data")) == DataConfig(image_size=16)


# --help


def test_classes_are_read_as_they_are_written():
    asked = load_config(SampleConfig, ["class_ids=[3,007,yes,null,1e3,猫,'a, b',-1]"], {}).class_ids
    assert asked == ["3", "007", "yes", "null", "1e3", "猫", "a, b", "-1"]
    assert load_config(SampleConfig, ["class_ids=cat"], {}).class_ids == ["cat"]
    assert load_config(SampleConfig, ["class_ids=null"], {}).class_ids is None
    assert error_of(load_config, SampleConfig, ["class_ids=[a"], {}).startswith("class_ids=[a: ")


@pytest.mark.parametrize(
    ("cls", "sections"),
    [
        (Stage1Config, STAGE1),
        (Stage2Config, STAGE2),
        (GANConfig, {"generator": DCGANGenerator, "discriminator": DCGANDiscriminator}),
        (CompareConfig, {"data": DataConfig}),
        (SampleConfig, {}),
        (Stage1EvaluateConfig, EVALUATE),
        (Stage2EvaluateConfig, EVALUATE),
    ],
)
def test_help_gives_every_setting_its_default_and_a_meaning(cls, sections):
    text = usage("program [key=value]", cls, sections)
    found = list(settings(cls, sections))
    assert len(found) == len({key for key, *_ in found}) >= 9
    for key, kind, default, meaning in found:
        assert meaning, key
        assert f"\n  {key}={default}  ({kind})\n      {meaning.split()[0]}" in text
    assert "program [key=value]" in text
    assert inspect.getdoc(cls) in text


def test_what_help_calls_the_default_is_one_and_can_be_typed():
    found = settings(Stage1Config, STAGE1)
    config = load1(*[f"{key}={default}" for key, kind, default, _ in found if kind != "section"])
    model, quantizer = config.model, config.model.pop("quantizer")
    assert {**model, "quantizer": None} == check_options(Light, {}, "model")
    assert quantizer == check_options(EMAQuantizer, {}, "model.quantizer")
    assert config.discriminator == check_options(PatchDiscriminator, {}, "discriminator")
    config.model = config.discriminator = {}
    assert config == Stage1Config()


SEVERAL = {"a": lambda x=1, y=2.0: None, "b": lambda x=1, y=3.0, z=True: None}


def test_a_section_of_several_constructors_lists_what_they_share_once():
    sections = {"model": Light, "model.quantizer": SEVERAL}
    found = [setting for setting in settings(Stage1Config, sections) if setting[0].startswith("model.quantizer.")]
    assert [(key.removeprefix("model.quantizer."), default, meaning.strip()) for key, _, default, meaning in found] == [
        ("name", "a", "the quantizer, a name with its options: a, b"),
        ("x", "1", ""),
        ("y", "2.0", "(a)"),
        ("y", "3.0", "(b)"),
        ("z", "True", "(b)"),
    ]


def test_settings_of_a_quantizer_within_a_quantizer():
    sections = STAGE1 | SECTIONS
    arguments = ["model.quantizer.name=residual", "model.quantizer.base.name=fsq", "model.quantizer.base.levels=[4,4]"]
    config = load_config(Stage1Config, arguments, sections)
    assert config.model == {"quantizer": {"name": "residual", "base": {"name": "fsq", "levels": [4, 4]}}}
    with pytest.raises(InputError, match=r"did you mean model\.quantizer\.(base\.)?levels"):
        load_config(Stage1Config, ["model.quantizer.base.level=[4,4]"], sections)
    text = usage("program", Stage1Config, sections)
    assert text.count("lookup=euclidean") == 1  # inside the other quantizer it has the same meaning
    assert "  model.name=light  (str)\n      The tokenizer's architecture: light, vqgan\n" in text
    assert "model.quantizer.base.name=ema" in text
    for key, _, _, meaning in settings(Stage1Config, sections):
        assert meaning.split(") ", 1)[-1], key
