"""The settings that programs take from a run's config.yaml, also after folders have moved."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from programs import ENVIRONMENT, ROOT

from vqgen.cli.runs import codes_folder, run_data, run_images
from vqgen.errors import InputError


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run in old/runs/stage1, trained on images in old/photos; the current folder is old."""
    old = tmp_path / "old"
    for folder, count in (("photos", 4), ("other", 3), ("held_out", 2)):
        (old / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8), 60 * i + count, np.uint8)).save(old / folder / f"{i}.png")
    monkeypatch.chdir(old)
    data = {"source": "photos", "val_source": "held_out", "image_size": 8, "channels": 1, "resize": "pad"}
    (old / "runs/stage1").mkdir(parents=True)
    config = {"data": {**data, "flip": False, "cache_gb": 0.5}, "stage1": "runs/stage1", "working_dir": str(old)}
    (old / "runs/stage1/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Path("runs/stage1")


def test_a_run_decides_what_the_user_does_not_give_and_says_so(run):
    data, own, taken = run_data(run, {"image_size": 16, "channels": None}, 1)
    assert (data.source, data.val_source, data.image_size, data.resize) == ("photos", "held_out", 16, "pad")
    assert own
    assert taken == "data: as runs/stage1/config.yaml says: source photos, val_source held_out, resize pad"
    _, _, taken = run_data(run, {}, 1)
    assert taken.endswith("says: source photos, val_source held_out, image_size 8, resize pad")


def test_another_source_leaves_out_the_runs_val_source_and_says_so(run):
    data, own, taken = run_data(run, {"source": "other"}, 1)
    assert (data.source, data.val_source, data.image_size, own) == ("other", None, 8, False)
    assert taken.endswith("image_size 8, resize pad, but not val_source held_out, which belongs to another source")
    data, own, taken = run_data(run, {"source": "other", "val_source": "held_out"}, 1)
    assert (data.val_source, own) == ("held_out", False)
    assert "but not" not in taken
    assert run_data(run, {"source": os.path.abspath("photos")}, 1).config.val_source == "held_out"  # the same folder


def test_a_run_without_config_asks_for_the_source(tmp_path):
    with pytest.raises(InputError, match=r"does not say which images it used; give data\.source="):
        run_data(tmp_path, {}, 1)
    data, own, taken = run_data(tmp_path, {"source": "digits"}, 3)
    assert (data.source, data.channels, own, taken) == ("digits", 3, False, "")


def test_other_channels_than_the_models_are_refused(run):
    with pytest.raises(InputError, match=r"^data\.channels=3: runs/stage1 is for 1$"):
        run_data(run, {"channels": 3}, 1)


def test_relative_paths_are_found_again_from_another_folder(run, tmp_path, monkeypatch):
    absolute = run.resolve()
    monkeypatch.chdir(tmp_path)
    data, own, _ = run_data(absolute, {}, 1)
    assert (data.source, data.val_source, own) == (f"{tmp_path}/old/photos", f"{tmp_path}/old/held_out", True)
    assert len(run_images(absolute, {}, 1)[0]) == 4
    assert codes_folder(absolute) == tmp_path / "old/runs/stage1/codes"
    Path("photos").mkdir()  # another folder with this name is not the run's
    assert run_data(absolute, {}, 1).config.source == f"{tmp_path}/old/photos"
    assert not run_data(absolute, {"source": "photos"}, 1).own


@pytest.mark.parametrize("source", ["digits", "https://host/x-{0..9}.tar", "s3://bucket/x.tar", "hf:user/name:train"])
def test_a_source_that_is_no_path_is_taken_as_it_is_from_any_folder(run, tmp_path, monkeypatch, source):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"source": source, "val_source": source}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    absolute = run.resolve()
    monkeypatch.chdir(tmp_path)
    data, own, _ = run_data(absolute, {}, 1)
    assert (data.source, data.val_source, own) == (source, source, True)
    assert run_data(absolute, {"source": source}, 1).own
    assert not run_data(absolute, {"source": f"{source}x"}, 1).own


def test_a_project_that_moved_is_whole(run, tmp_path, monkeypatch):
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    assert run_data(run, {}, 1).config.source == "photos"
    assert codes_folder(run) == Path("runs/stage1/codes")


def test_a_source_that_is_nowhere_is_named_with_both_places(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "elsewhere/copied")
    (tmp_path / "old/photos").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = rf"^data\.source=photos of copied is not there, nor at {tmp_path}/old/photos; give data\.source=$"
    with pytest.raises(InputError, match=said):
        run_data(Path("copied"), {}, 1)
    monkeypatch.chdir(tmp_path / "old")
    with pytest.raises(InputError, match=r"^data\.source=photos of runs/stage1 is not there; give data\.source=$"):
        run_data(run, {}, 1)
    assert run_data(run, {"source": str(tmp_path / "moved"), "val_source": "held_out"}, 1).config.image_size == 8


def test_patterns_are_found_again_too(run, tmp_path, monkeypatch):
    absolute = run.resolve()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"source": "shards/t-{0..1}.tar", "val_source": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    Path("shards").mkdir()
    Path("shards/t-0.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert run_data(absolute, {}, 1).config.source == f"{tmp_path}/old/shards/t-{{0..1}}.tar"


def test_both_stages_in_one_folder_and_the_evaluation_in_another(tmp_path, monkeypatch):
    """All paths are relative, in a project outside the programs' folder."""
    project = tmp_path / "project"
    for i in range(40):
        (project / "photos" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(project / "photos" / f"{i % 2}" / f"{i}.png")
    shutil.copytree(project / "photos", project / "val")

    def python(program: str, *arguments: str, cwd: Path = project) -> str:
        command = [sys.executable, ROOT / program, *arguments]
        environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    few = ["train.max_steps=2", "train.batch_size=8", "tracking.wandb=disabled"]
    small = ["model.widths=[8,8]", "model.quantizer.codebook_size=16"]
    python("stage1/train.py", "data.source=photos", "data.val_source=val", "run_dir=runs/1", *small, *few)
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
    said = python("stage2/train.py", "stage1=runs/1", "run_dir=runs/2", *small, *few)
    assert "data: as runs/1/config.yaml says: source photos, val_source val, image_size 32\n" in said
    assert "40 training and 40 held-out sequences" in said
    said = python("stage2/train.py", "stage1=runs/1", "run_dir=runs/3", "data.source=val", *small, *few)
    assert "but not val_source val, which belongs to another source" in said
    assert "40 training and 40 held-out sequences" not in said
    monkeypatch.chdir(tmp_path)
    train, held_out, own = run_images(project / "runs/2", {}, 1)  # as the evaluations do
    assert (len(train), len(held_out), own) == (40, 40, True)
    assert codes_folder(project / "runs/2") == project / "runs/1/codes"
