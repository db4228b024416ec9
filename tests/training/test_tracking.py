"""The log of a run, and that no tracker can stop the run."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import wandb
from PIL import Image

from vqgen.errors import InputError
from vqgen.settings import Stage1Config, TrackingConfig
from vqgen.training import tracking
from vqgen.training.tracking import Tracker, image_grid


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Starts a tracker in a new run folder, by default without wandb, and ends it after the test."""
    for name in ("API_KEY", "MODE", "DIR", "DISABLED", "PROJECT", "NAME", "ENTITY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))  # hides the key of the person who runs the tests
    trackers = []

    def start(mode: str = "disabled", logged: int = 0, is_main: bool = True) -> Tracker:
        (tmp_path / "runs" / "a").mkdir(parents=True, exist_ok=True)
        config = Stage1Config(tracking=TrackingConfig(wandb=mode))
        facts = {"num_parameters": 5}
        trackers.append(Tracker(tmp_path / "runs" / "a", config, logged=logged, is_main=is_main, facts=facts))
        return trackers[-1]

    yield start
    for tracker in trackers:
        tracker.close()


def lines(tracker: Tracker) -> list[dict]:
    return [json.loads(line) for line in tracker.path.read_text().splitlines()]


def warnings(caplog) -> list[str]:
    """All warnings, from any logger; wandb's own messages are below that level."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def picture(colour: int = 0) -> Image.Image:
    return Image.new("L", (4, 4), colour)


# metrics.jsonl and samples/


def test_each_log_is_a_line_of_metrics_jsonl(run):
    tracker = run()
    tracker.log(10, {"train/loss": torch.tensor(0.5), "train/lr": 1e-3})
    tracker.log(20, {"val/psnr": 30.25})
    assert lines(tracker) == [{"step": 10, "train/loss": 0.5, "train/lr": 1e-3}, {"step": 20, "val/psnr": 30.25}]


def test_a_resumed_run_drops_the_lines_beyond_its_checkpoint(run):
    first = run()
    for step in (10, 20):
        first.log(step, {"loss": step})
    logged = first.flush()
    first.log(20, {"val/loss": 20})  # an evaluation that a stop has put off is logged later
    first.log(30, {"loss": 30})
    with open(first.path, "a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    resumed = run(logged=logged)
    assert lines(resumed) == [{"step": 10, "loss": 10}, {"step": 20, "loss": 20}]
    resumed.log(30, {"loss": 31})
    assert [line["loss"] for line in lines(resumed)] == [10, 20, 31]


def test_a_run_from_the_start_drops_all_lines(run):
    run().log(10, {"loss": 1})
    assert lines(run()) == []


def test_pictures_lie_in_samples_by_name_and_step(run):
    tracker = run()
    tracker.picture(7, "reconstructions", picture(9))
    tracker.picture(8, "reconstructions", picture())
    folder = tracker.run_dir / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["reconstructions_00000007.png", "reconstructions_00000008.png"]
    assert Image.open(folder / "reconstructions_00000007.png").getpixel((0, 0)) == 9


def test_progress_without_a_terminal_is_plain_lines(run, capsys):
    tracker = run()
    tracker.progress(50, 0.5, 61.2, loss=0.125)
    tracker.say("half way")
    out = capsys.readouterr().out
    assert "step 50  loss 0.125  1:02 left\n" in out
    assert "half way\n" in out


def test_processes_other_than_the_main_one_say_and_write_nothing(run, tmp_path, capfd):
    tracker = run("offline", is_main=False)
    tracker.log(1, {"loss": 1.0})
    tracker.picture(1, "samples", picture())
    tracker.progress(1, 0.5, 1.0)
    tracker.say("hello")
    tracker.close()
    assert list((tmp_path / "runs" / "a").iterdir()) == []
    assert capfd.readouterr() == ("", "")


# wandb


def test_offline_makes_a_real_run_in_the_run_folder_and_goes_on_with_it(run, caplog, capsys):
    first = run("offline")
    first.log(1, {"val/psnr": 0.5})
    first.picture(1, "samples", picture())
    run_id = first.wandb.run.id
    assert first.wandb.run.config["num_parameters"] == 5
    assert first.wandb.run.config["optim"]["lr"] == Stage1Config().optim.lr
    first.close()
    wandb.teardown()  # waits for its background process, which writes the file's end
    (folder,) = first.run_dir.glob("wandb/offline-run-*")
    assert b"val/psnr" in (folder / f"run-{run_id}.wandb").read_bytes()
    assert len(list(folder.glob("files/media/images/samples_*.png"))) == 1
    assert f"wandb sync {folder}\n" in capsys.readouterr().out

    resumed = run("offline", logged=first.flush())
    assert resumed.wandb.run.id == run_id
    resumed.close()
    wandb.teardown()
    # The last synced file of a run holds the whole run.
    (again,) = (path for path in first.run_dir.glob("wandb/offline-run-*") if path != folder)
    assert b"val/psnr" in (again / f"run-{run_id}.wandb").read_bytes()
    assert warnings(caplog) == []


def test_auto_without_a_key_is_offline(run, caplog):
    tracker = run("auto")
    assert tracker.wandb.run.settings.mode == "offline"
    assert warnings(caplog) == []


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_auto_follows_the_environment(run, monkeypatch, caplog, name, value):
    monkeypatch.setenv(name, value)
    tracker = run("auto")
    tracker.log(1, {"loss": 0.5})
    assert tracker.wandb.run is None
    assert run("offline").wandb.run is not None  # the configuration takes precedence
    assert warnings(caplog) == []


def test_wandb_has_the_project_the_name_and_the_entity_of_the_environment(run, monkeypatch):
    assert run("offline").wandb.run.project == "vqgen"
    wandb.teardown()
    for name in ("PROJECT", "NAME", "ENTITY"):
        monkeypatch.setenv(f"WANDB_{name}", f"my-{name.lower()}")
    tracker = run("auto")
    assert (tracker.wandb.run.project, tracker.wandb.run.name) == ("my-project", "my-name")
    assert tracker.wandb.run.entity == "my-entity"


def test_a_key_without_a_network_becomes_an_offline_run(run, monkeypatch, caplog, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")  # nothing answers at this address
    wandb.teardown()
    tracker = run("auto")
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    said = capsys.readouterr().out
    assert "wandb: not reached (" in said
    (folder,) = tracker.run_dir.glob("wandb/offline-run-*")
    assert f"wandb sync {folder}\n" in said
    assert warnings(caplog) == []


def test_a_process_of_wandb_that_does_not_end_is_killed(tmp_path, monkeypatch):
    (tmp_path / "wandb-core").symlink_to(shutil.which("sleep"))
    hanging = subprocess.Popen([tmp_path / "wandb-core", "60"])
    monkeypatch.setattr(tracking, "SERVICE_ENDS", 0.1)
    monkeypatch.setattr(wandb, "teardown", hanging.wait)
    # Without the process that other tests use.
    alone = SimpleNamespace(children=lambda: [psutil.Process(hanging.pid)])
    monkeypatch.setattr(tracking, "psutil", SimpleNamespace(Process=lambda: alone))
    tracking._end_service()
    assert hanging.returncode == -signal.SIGKILL


def test_training_goes_on_where_wandb_does_not_start(run, monkeypatch, caplog):
    def fail(**_):
        raise wandb.Error("no space\nleft on device")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = run("offline")
    tracker.log(1, {"loss": 0.5})
    tracker.picture(1, "samples", picture())
    assert lines(tracker) == [{"step": 1, "loss": 0.5}]
    assert warnings(caplog) == ["wandb failed and is off for this run (no space); metrics.jsonl goes on"]


def test_training_goes_on_where_wandb_fails_on_the_way(run, monkeypatch, caplog):
    tracker = run("offline")

    def fail(*_, **__):
        raise BrokenPipeError

    wandb_run = tracker.wandb.run
    monkeypatch.setattr(wandb_run, "log", fail)
    for step in (1, 2):
        tracker.log(step, {"loss": 0.5})
    tracker.picture(2, "samples", picture())
    tracker.close()
    assert [line["step"] for line in lines(tracker)] == [1, 2]
    assert len(warnings(caplog)) == 1
    wandb_run.finish()  # otherwise it stays open in later tests


def test_disabled_does_not_import_wandb(run, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    tracker = run("disabled")
    tracker.log(1, {"loss": 0.5})
    tracker.picture(1, "samples", picture())
    tracker.close()
    assert warnings(caplog) == []
    assert not (tracker.run_dir / "wandb").exists()


def test_wandb_that_is_not_installed_is_one_line_or_an_error_if_it_is_asked_for(run, monkeypatch, caplog, capsys):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    run("auto").log(1, {"loss": 0.5})
    assert capsys.readouterr().out.count("pip install 'vqgen[tracking]'") == 1
    assert warnings(caplog) == []
    with pytest.raises(InputError, match=r"tracking.wandb=offline needs wandb, .* pip install 'vqgen\[tracking\]'"):
        run("offline")


# image_grid


def test_grid_puts_images_in_rows_with_a_gap():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    grid = image_grid(np.broadcast_to(colours[:, None, None], (3, 64, 64, 3)), columns=2, gap=2)
    assert (grid.mode, grid.size) == ("RGB", (130, 130))
    pixels = np.asarray(grid)
    for colour, y, x in zip(colours, (0, 0, 66), (0, 66, 0), strict=True):
        assert (pixels[y : y + 64, x : x + 64] == colour).all()
    assert (pixels[64:66] == 128).all()
    assert (pixels[:, 64:66] == 128).all()
    assert (pixels[66:, 66:] == 128).all()  # no fourth image


def test_grid_of_small_grey_images_is_enlarged_pixel_by_pixel():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    grid = image_grid(images, columns=2, gap=1)
    assert (grid.mode, grid.size) == ("L", (17 * 8, 8 * 8))
    pixels = np.asarray(grid)
    np.testing.assert_array_equal(pixels[::8, ::8][:, :8], images[0, ..., 0])
    np.testing.assert_array_equal(pixels[7::8, 7::8][:, 9:], images[1, ..., 0])


def test_grid_of_one_image_and_of_wide_images():
    assert image_grid(np.zeros((1, 100, 100, 3), np.uint8), columns=1).size == (100, 100)
    assert image_grid(np.zeros((2, 16, 32, 1), np.uint8), columns=1, gap=2).size == (64, 68)
