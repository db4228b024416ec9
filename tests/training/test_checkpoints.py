"""A run's folder: its owner, and that it keeps a complete checkpoint whenever a process is killed."""

import errno
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch

from vqgen.errors import InputError
from vqgen.settings import DataConfig, OptimConfig, Stage1Config, TrackingConfig, TrainConfig
from vqgen.training.checkpoints import (
    check_made_from,
    how_resumed,
    load_checkpoint,
    newest_checkpoint,
    open_run,
    save_checkpoint,
    update_config,
)
from vqgen.training.files import written_whole
from vqgen.training.shards import BackgroundWriter
from vqgen.yaml_file import read_yaml


def opened(config: Stage1Config) -> None:
    with open_run(config):
        pass


def run_config(tmp_path: Path, **changes) -> Stage1Config:
    return Stage1Config(run_dir=str(tmp_path / "run"), **changes)


def test_open_run_writes_the_configuration_and_takes_the_same_again(tmp_path):
    config = run_config(tmp_path, model={"patch_size": 2, "quantizer": {"decay": 0.5}})
    opened(config)
    saved = read_yaml(tmp_path / "run" / "config.yaml")
    assert (saved["seed"], saved["model"]) == (0, {"patch_size": 2, "quantizer": {"decay": 0.5}})
    opened(config)


@pytest.mark.parametrize(
    ("changes", "key", "there", "asked"),
    [
        ({"seed": 7}, "seed", "0", "7"),
        ({"train": TrainConfig(batch_size=3)}, "train.batch_size", str(TrainConfig().batch_size), "3"),
        ({"optim": OptimConfig(beta2=0.6)}, "optim.beta2", str(OptimConfig().beta2), "0.6"),
        ({"model": {"quantizer": {"decay": 0.5}}}, "model.quantizer.decay", "None", "0.5"),
    ],
)
def test_open_run_refuses_other_settings_by_key_and_values(tmp_path, changes, key, there, asked):
    opened(run_config(tmp_path))
    save_checkpoint(tmp_path / "run", 1, {}, keep=1)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(InputError) as caught:
        opened(run_config(tmp_path, **changes))
    message = str(caught.value)
    assert f"{key}={there}, but {key}={asked} " in message
    assert "run_dir=" in message
    assert len(message.splitlines()) == 1
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_open_run_takes_other_settings_while_there_is_nothing_to_go_on_from(tmp_path):
    opened(run_config(tmp_path))
    opened(run_config(tmp_path, seed=7))
    assert read_yaml(tmp_path / "run" / "config.yaml")["seed"] == 7


def test_open_run_lets_settings_differ_that_do_not_change_the_result(tmp_path):
    opened(run_config(tmp_path))
    save_checkpoint(tmp_path / "run", 1, {}, keep=1)
    often = TrainConfig(log_every=1, checkpoint_every=2, keep_checkpoints=3, milestone_every=4, max_hours=5.0)
    free = run_config(tmp_path, tracking=TrackingConfig("disabled", "other"), train=often)
    free.data.workers = 0
    opened(free)


def test_a_run_goes_on_with_data_that_were_moved_but_not_with_others(tmp_path):
    opened(run_config(tmp_path, data=DataConfig(source="here", val_source="there")))
    save_checkpoint(tmp_path / "run", 1, {}, keep=1)
    moved = run_config(tmp_path, data=DataConfig(source="elsewhere", val_source="also", cache_gb=0))
    opened(moved)
    state = {"data": "1", "held_out": "2"}
    check_made_from(moved, state, {"data": "1", "held_out": "2"})
    with pytest.raises(InputError, match="was trained with other data than now"):
        check_made_from(moved, state, {"data": "3", "held_out": "2"})
    with pytest.raises(InputError, match="was trained with other held-out images than now"):
        check_made_from(moved, state, {"data": "1", "held_out": None})
    with pytest.raises(InputError, match=r"data.val_source=there, but data.val_source=also is asked for"):
        check_made_from(moved, {"data": "1"}, {"data": "1", "held_out": "2"})  # from an older version
    update_config(moved)
    assert read_yaml(tmp_path / "run/config.yaml")["data"]["source"] == "elsewhere"


def test_a_run_that_an_older_version_left_goes_on(tmp_path):
    """The old config.yaml has no architecture's name, and null for the precision."""
    opened(run_config(tmp_path, model={"patch_size": 2}))
    save_checkpoint(tmp_path / "run", 1, {}, keep=1)
    opened(run_config(tmp_path, model={"name": "light", "patch_size": 2}, train=TrainConfig(mixed_precision="bf16")))
    with pytest.raises(InputError, match=r"model.name=light, but model.name=other"):
        opened(run_config(tmp_path, model={"name": "other", "patch_size": 2}))


def test_all_settings_that_differ_are_named_up_to_a_few(tmp_path):
    opened(run_config(tmp_path, model={"name": "light", "patch_size": 2, "widths": [8]}))
    save_checkpoint(tmp_path / "run", 1, {}, keep=1)
    both = r"patch_size=4 is asked for; also other than there: model.widths, seed; repeat .* name another run_dir=$"
    with pytest.raises(InputError, match=both):  # without the advice to train on from its weights, which do not fit
        opened(run_config(tmp_path, seed=1, model={"name": "light", "patch_size": 4, "widths": [16]}))
    with pytest.raises(InputError, match=r"model.name=other is asked for; repeat"):  # a name stands for its options
        opened(run_config(tmp_path, model={"name": "other", "patch_size": 4, "widths": [16]}))
    many = {f"option{i}": 1 for i in range(9)}
    with pytest.raises(InputError, match=r"model.option4, model.option5 and 3 more; repeat"):
        opened(run_config(tmp_path, model={"name": "light", "patch_size": 2, "widths": [8], **many}))


def test_a_run_of_before_legacy_beta_goes_on_without_it_and_not_with_it(tmp_path):
    before = {"name": "residual", "base": {"name": "vq"}}
    opened(run_config(tmp_path, model={"name": "light", "quantizer": before}))
    save_checkpoint(tmp_path / "run", 1, {}, keep=1)
    now = {"name": "residual", "base": {"name": "vq", "legacy_beta": False}}
    opened(run_config(tmp_path, model={"name": "light", "quantizer": now}))
    now["base"]["legacy_beta"] = True
    with pytest.raises(InputError, match=r"model.quantizer.base.legacy_beta=False, but .*=True is asked for"):
        opened(run_config(tmp_path, model={"name": "light", "quantizer": now}))


def test_open_run_takes_a_run_that_was_moved(tmp_path):
    config = run_config(tmp_path)
    opened(config)
    save_checkpoint(tmp_path / "run", 1, {}, keep=1)
    (tmp_path / "run").rename(tmp_path / "moved")
    config.run_dir = str(tmp_path / "moved")
    opened(config)


def test_a_second_process_is_kept_out_of_a_run_and_told_who_has_it(tmp_path):
    """At the end SIGKILL ends the first run, and its lock is then no obstacle."""
    ready, parent = os.pipe()
    child = os.fork()
    if child == 0:
        with open_run(run_config(tmp_path)):
            os.write(parent, b"!")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(InputError, match=f"run is in use by process {child} on {socket.gethostname()}; wait for it"):
        opened(run_config(tmp_path))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    opened(run_config(tmp_path))


def test_a_run_on_a_read_only_disk_can_be_asked_for(tmp_path, monkeypatch):
    config = run_config(tmp_path)
    opened(config)
    save_checkpoint(tmp_path / "run", 1, {}, keep=1)

    def refuse(path, *arguments, **options):
        if path.name == ".lock":
            raise OSError(errno.EROFS, "Read-only file system")
        return plain_open(path, *arguments, **options)

    plain_open = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    opened(config)


def test_open_run_says_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        opened(Stage1Config(run_dir=str(tmp_path / "file" / "run")))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_whole_takes_the_place_of_the_old_folder(tmp_path):
    for content in ("old", "new"):
        with written_whole(tmp_path / "model") as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["new"]


def test_written_whole_leaves_the_old_folder_where_the_writing_fails(tmp_path):
    with written_whole(tmp_path / "model") as folder:
        (folder / "a").write_text("old")

    def fail_half_way() -> None:
        with written_whole(tmp_path / "model") as folder:
            (folder / "a").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail_half_way()
    assert names(tmp_path) == ["model"]  # no partial folder stays on a full disk
    assert (tmp_path / "model" / "a").read_text() == "old"
    with written_whole(tmp_path / "model") as folder:
        (folder / "b").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["b"]


def test_the_newest_checkpoints_stay_and_the_newest_is_loaded(tmp_path):
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step, "model": {"w": torch.full((2,), float(step))}}, keep=2)
    assert names(tmp_path / "checkpoints") == ["step_00000010", "step_00000100"]
    state = load_checkpoint(tmp_path)
    assert state["step"] == 100
    assert torch.equal(state["model"]["w"], torch.full((2,), 100.0))


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    save_checkpoint(tmp_path, 5, {"step": 5}, keep=2)
    half = tmp_path / "checkpoints" / "step_00000010.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert load_checkpoint(tmp_path) == {"step": 5}
    save_checkpoint(tmp_path, 10, {"step": 10}, keep=1)
    assert names(tmp_path / "checkpoints") == ["step_00000010"]
    assert load_checkpoint(tmp_path) == {"step": 10}


def test_a_checkpoint_that_fails_leaves_those_before_it(tmp_path):
    save_checkpoint(tmp_path, 5, {"step": 5}, keep=1)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path, 10, {"step": lambda: 10}, keep=1)
    assert load_checkpoint(tmp_path) == {"step": 5}


def test_the_last_checkpoint_is_kept_even_if_none_is_asked_for(tmp_path):
    for step in (5, 10):
        save_checkpoint(tmp_path, step, {"step": step}, keep=0)
    assert names(tmp_path / "checkpoints") == ["step_00000010"]


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert load_checkpoint(tmp_path) is None


def test_milestones_stay(tmp_path):
    for step in range(3, 40, 3):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2, milestone_every=10)
    assert names(tmp_path / "checkpoints") == [f"step_{step:08d}" for step in (12, 21, 30, 36, 39)]


def test_what_an_ended_process_was_writing_is_cleared_away(tmp_path):
    for name in ("step_00000007.tmp", "step_00000006.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save_checkpoint(tmp_path, 8, {}, keep=1)
    assert names(tmp_path / "checkpoints") == ["step_00000008"]


DAMAGES = {
    "a flipped byte": lambda folder: flip(folder / "state.pt", 1000),
    "a flipped byte of the checksum": lambda folder: flip(folder / "SHA256SUMS", 3),
    "cut short": lambda folder: os.truncate(folder / "state.pt", 1500),
    "empty": lambda folder: os.truncate(folder / "state.pt", 0),
    "without its state": lambda folder: (folder / "state.pt").unlink(),
    "without its checksum": lambda folder: (folder / "SHA256SUMS").unlink(),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "w": torch.arange(500.0)}, keep=2)
    DAMAGES[damage](tmp_path / "checkpoints/step_00000002")
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "step_00000002 is damaged" in caplog.text
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002"]  # looking changes nothing


def test_damaged_checkpoints_are_set_aside_and_do_not_count(tmp_path):
    for step in (1, 2, 4):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    for step in (2, 4):
        flip(tmp_path / f"checkpoints/step_{step:08d}/state.pt", 200)
    assert load_checkpoint(tmp_path)["step"] == 1
    save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert names(tmp_path / "checkpoints") == ["step_00000002", "step_00000004.damaged"]
    assert load_checkpoint(tmp_path)["step"] == 2


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    sums = tmp_path / "checkpoints/step_00000001/SHA256SUMS"
    sums.unlink()
    sums.symlink_to(sums)  # reading it raises an OSError, but not FileNotFoundError
    with pytest.raises(OSError, match="symbolic links"):
        load_checkpoint(tmp_path)


def test_checkpoints_are_in_the_order_of_their_steps_also_beyond_eight_digits(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert load_checkpoint(tmp_path)["step"] == 100_000_000


def test_how_a_run_goes_on_is_said_with_what_it_cannot_keep():
    state = {"step": 5, "processes": 1, "accumulation": 2}
    assert how_resumed(None, 2) == ""
    assert how_resumed(state, 2) == "; going on from step 5"
    said = how_resumed(state, 4, by_pass="the codebook")
    assert said.startswith("; going on from step 5 by 1 x 4 passes per step after 1 x 2: the same batches; ")
    assert said.endswith(", and the codebook")
    assert how_resumed(state | {"workers": 3}, 2, workers=3) == "; going on from step 5"
    for accumulation, workers in ((2, 2), (4, 3)):
        said = how_resumed(state | {"workers": 3}, accumulation, workers=workers)
        assert said.startswith("; going on from step 5 with other batches of the stream, because ")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=2)
    flip(tmp_path / "checkpoints/step_00000001/state.pt", 200)
    for _ in range(2):
        with pytest.raises(InputError, match="are damaged; remove the folder to start anew"):
            newest_checkpoint(tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    save_checkpoint(tmp_path, 1, {"step": Evil()}, keep=1)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("in_shards", [False, True])
def test_a_process_killed_at_any_call_that_changes_the_disk_leaves_a_whole_checkpoint_and_model(tmp_path, in_shards):
    """For every n, a child process kills itself at the n-th such call during a save."""
    run = tmp_path / "run"
    config = Stage1Config(run_dir=str(run))

    def save(step: int) -> None:
        with written_whole(run / "model") as folder:
            (folder / "model.safetensors").write_text(str(step))
        writer = BackgroundWriter() if in_shards else None
        save_checkpoint(run, step, {"step": step, "w": torch.arange(2000)}, keep=1, writer=writer)
        if writer is not None:
            writer.close()

    n, ended = 0, False
    while not ended:
        n += 1
        shutil.rmtree(run, ignore_errors=True)
        opened(config)
        save(1)
        child = os.fork()
        if child == 0:
            left = n

            def counted(call):
                def count(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **kwargs)

                return count

            for name in ("rename", "mkdir", "unlink", "rmdir", "fsync", "open"):
                setattr(os, name, counted(getattr(os, name)))
            save(2)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        opened(config)
        step = load_checkpoint(run)["step"]
        assert step == (2 if ended else step)
        assert (run / "model/model.safetensors").read_text() in ("1", "2")
        save(3)
        assert names(run) == [".lock", "checkpoints", "config.yaml", "model"]
        assert names(run / "checkpoints") == ["step_00000003"]
    assert n > 15
