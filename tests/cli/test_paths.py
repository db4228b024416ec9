"""Paths on the command line that contain `=` or `~`."""

import os
import pwd
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from programs import shell

from vqgen import settings
from vqgen.cli.parse import expand_home, is_setting, load_config
from vqgen.errors import InputError
from vqgen.settings import PATHS, Stage1Config, Stage1EvaluateConfig, Stage2Config, Stage2EvaluateConfig
from vqgen.yaml_file import read_yaml, save_config


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder that is not the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_what_exists_or_has_a_slash_before_its_first_equals_sign_is_a_path(home):
    Path("lr=1").mkdir()
    for path in ("lr=1", "runs/lr=4e-3/s2", "./lr=2", "/abs/a=b", "~/a=b", "config.yaml", ""):
        assert not is_setting(path), path
    for setting in ("lr=2", "run_dir=runs/lr=4e-3", "data.source=/a/b", "=3", "--lr=1", "--out=a/b"):
        assert is_setting(setting), setting


def test_a_config_file_in_a_folder_with_an_equals_sign(home):
    Path("runs/lr=4e-3").mkdir(parents=True)
    Path("runs/lr=4e-3/config.yaml").write_text("seed: 7")
    Path("seed=1.yaml").write_text("seed: 8")
    assert load_config(Stage1Config, ["runs/lr=4e-3/config.yaml"], {}).seed == 7
    assert load_config(Stage1Config, ["seed=1.yaml"], {}).seed == 8
    assert load_config(Stage1Config, ["--seed=9", "runs/lr=4e-3/config.yaml"], {}).seed == 9
    with pytest.raises(InputError, match=r"^runs/lr=5/config\.yaml: no such config file"):
        load_config(Stage1Config, ["runs/lr=5/config.yaml"], {})


def test_a_run_with_an_equals_sign_in_its_path_is_sampled_from(runs, program, tmp_path):
    run = shutil.copytree(runs / "stage2", tmp_path / "lr=4e-3/s2")
    code, _, errors = program("stage2/sample.py", run, "num_images=3", "--seed", "1")
    assert (code, errors) == (0, "")
    assert (run / "samples/samples.npz").is_file()


def test_home_folders_are_expanded_in_every_setting_that_is_a_path(home):
    (home / "config.yaml").write_text("run_dir: ~/runs/a\nloss: {perceptual: {weights: [~/w.pth, /v.pth]}}")
    config = load_config(Stage1Config, ["~/config.yaml", "data.source=~/t-{0..9}.tar", "data.val_source=~"], {})
    assert config.run_dir == f"{home}/runs/a"
    assert config.loss.perceptual.weights == [f"{home}/w.pth", "/v.pth"]
    assert (config.data.source, config.data.val_source) == (f"{home}/t-{{0..9}}.tar", str(home))
    config = load_config(
        Stage2Config, ["stage1=~/1", "codes_dir=~/c", "data.source=~/i"], {"data": settings.DataConfig}
    )
    assert (config.stage1, config.codes_dir, config.data) == (f"{home}/1", f"{home}/c", {"source": f"{home}/i"})
    given = [f"{name}=~/x" for name in ("out", "cache_dir", "compare", "images", "reference", "feature_weights")]
    config = load_config(Stage2EvaluateConfig, given, {})
    paths = (config.out, config.cache_dir, config.compare, config.images, config.reference, config.feature_weights)
    assert set(paths) == {f"{home}/x"}
    config = load_config(Stage1EvaluateConfig, ["perceptual_weights=[~/a,~/b]"], {})
    assert config.perceptual_weights == [f"{home}/a", f"{home}/b"]


def test_words_and_other_text_stay_as_they_are(home):
    config = load_config(Stage1Config, ["data.source=digits", "tracking.project=~", "run_dir=a/~/b"], {})
    assert (config.data.source, config.tracking.project, config.run_dir) == ("digits", "~", "a/~/b")


def test_the_home_of_a_user_by_name_and_of_nobody(home):
    user = pwd.getpwuid(os.getuid())
    assert expand_home(f"~{user.pw_name}/a", "out") == f"{user.pw_dir.rstrip('/')}/a"
    with pytest.raises(InputError, match=r"^data\.source=~nobody-at-all/a: there is no home folder ~nobody-at-all; "):
        load_config(Stage1Config, ["data.source=~nobody-at-all/a"], {})
    Path("~nobody-at-all").mkdir()
    assert load_config(Stage1Config, ["data.source=~nobody-at-all/a"], {}).data.source == "~nobody-at-all/a"


def test_a_runs_folder_in_a_home(runs, home):
    shutil.copytree(runs / "stage2", home / "s2")
    program = Path(__file__).parents[2] / "stage2/sample.py"
    shell(f"HOME={home} python {program} '~/s2' num_images=2 out='~/out'", cwd=home.parent)
    assert (home / "out/grid.png").is_file()


def test_each_name_of_a_path_is_a_settings_name():
    classes = [value for value in vars(settings).values() if isinstance(value, type) and is_dataclass(value)]
    assert {field.name for cls in classes for field in fields(cls)} >= PATHS


def test_a_configuration_is_saved_with_the_folder_its_paths_start_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Stage1Config(run_dir="1e3", model={"widths": (8, 16), "name": "no"}, seed=3)
    config.optim.lr = 1e-7
    save_config(config, tmp_path / "config.yaml")
    saved = read_yaml(tmp_path / "config.yaml")
    assert (saved["working_dir"], saved["run_dir"], saved["optim"]["lr"]) == (str(tmp_path), "1e3", 1e-7)
    assert saved["model"] == {"widths": [8, 16], "name": "no"}
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
