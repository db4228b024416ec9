"""Checkpoints in shards: whole or absent, read back by any number of processes, and without code from their files."""

import errno
import os
import pickle
import pickletools
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from data.test_processes import in_two
from programs import as_it_was, launch_two, shell, state
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vqgen.errors import InputError
from vqgen.training import shards
from vqgen.training.checkpoints import damage, load_checkpoint, load_state, newest_checkpoint, save_checkpoint
from vqgen.training.checkpoints import with_tensors as read
from vqgen.training.files import HashedFile
from vqgen.training.fsdp import moments
from vqgen.training.run import Now, Run
from vqgen.training.shards import SMALL, BackgroundWriter, Hashing, placed, split


def example(step: int) -> dict:
    """A state with what states have: large and small tensors of several types, numbers, and keys that are numbers."""
    torch.manual_seed(step)
    moments = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(40, 50)}, 1: {"exp_avg": torch.randn(3)}}
    return {
        "step": step,
        "model": {"a.weight": torch.randn(40, 50), "b": torch.randn(2, 3000).bfloat16(), "none": None},
        "counts": torch.arange(SMALL),
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    }


def save(run: Path, state: dict, writer: BackgroundWriter, keep: int = 2) -> None:
    save_checkpoint(run, state["step"], state, keep, writer=writer)


def saved(run: Path, *steps: int) -> Path:
    """The run's folder, with a checkpoint in shards of each of these steps."""
    writer = BackgroundWriter()
    for step in steps:
        save(run, example(step), writer)
    writer.close()
    return run


def read_newest(run: Path) -> dict:
    folder = newest_checkpoint(run)
    return read(folder, load_state(folder))


def check_equal(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            check_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def test_a_state_comes_back_as_it_was(tmp_path):
    check_equal(read_newest(saved(tmp_path, 7)), example(7))


def test_the_numbers_can_be_read_without_the_tensors(tmp_path):
    numbers = load_checkpoint(saved(tmp_path, 7))
    assert numbers["step"] == 7
    assert numbers["optimizer"]["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert torch.equal(numbers["optimizer"]["state"][1]["exp_avg"], example(7)["optimizer"]["state"][1]["exp_avg"])
    assert numbers["model"]["a.weight"].is_meta


def test_tensors_are_read_into_those_that_are_there_if_they_fit(tmp_path):
    folder = newest_checkpoint(saved(tmp_path, 7))
    own = {"model": {"a.weight": torch.zeros(40, 50), "b": torch.zeros(2, 2)}}
    state = read(folder, load_state(folder), own)
    assert state["model"]["a.weight"] is own["model"]["a.weight"]
    check_equal(state, example(7))


def test_training_may_change_the_tensors_while_they_are_written(tmp_path, monkeypatch):
    changed = threading.Event()
    create = Hashing.create_stream
    monkeypatch.setattr(Hashing, "create_stream", lambda *given: changed.wait(60) and create(*given))
    writer, state = BackgroundWriter(), example(7)
    save(tmp_path, state, writer)
    state["model"]["a.weight"].zero_()
    state["optimizer"]["state"][0]["exp_avg"].zero_()
    changed.set()
    writer.close()
    check_equal(read_newest(tmp_path), example(7))


def test_each_process_copies_and_writes_a_share_of_the_tensors_that_all_have(monkeypatch):
    tensors = {str(i): torch.zeros(n) for i, n in enumerate([5000, 4000, 3000, 3000, 2000, 1000])}
    monkeypatch.setattr(shards, "world_size", lambda: 3)
    written = []
    for number in range(3):
        monkeypatch.setattr(shards, "rank", lambda number=number: number)
        written.append(shards.my_share(tensors))
    assert sorted(name for share in written for name in share) == sorted(tensors)
    assert [sum(len(x) for x in share.values()) for share in written] == [6000] * 3


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A group of this process alone, which FSDP's tensors need."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp_reads_moments_into_shards(mesh):
    sharded = nn.Parameter(distribute_tensor(torch.zeros(40, 50), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.AdamW([sharded, plain])
    kept = {"exp_avg": torch.empty(40, 50, device="meta"), "step": torch.tensor(1.0)}
    found = moments(optimizer, {"state": {0: kept, 1: {"exp_avg": torch.empty(3, 4)}}})
    assert found.keys() == {0, 1}
    assert found[0].keys() == {"exp_avg"}
    assert isinstance(found[0]["exp_avg"], DTensor)
    assert found[0]["exp_avg"].placements == (Shard(0),)
    assert type(found[1]["exp_avg"]) is torch.Tensor


def test_split_and_placed_are_opposites():
    tensors: dict = {}
    rest = split(example(3), tensors)
    assert sorted(tensors) == ["/counts", "/model/a.weight", "/model/b", "/optimizer/state/0/exp_avg"]
    full = placed(rest)
    assert full["model"]["b"].shape == (2, 3000)
    assert full["model"]["b"].dtype == torch.bfloat16
    assert full["optimizer"]["state"][0]["step"] == 3


def test_sha256sum_can_check_it(tmp_path):
    folder = newest_checkpoint(saved(tmp_path, 7))
    found = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    assert "shards/.metadata: OK" in found.stdout
    assert found.stdout.count("OK") == 2 + len([*(folder / "shards").glob("*.distcp")])


def shard(folder: Path) -> Path:
    return max((folder / "shards").glob("*.distcp"), key=lambda path: path.stat().st_size)


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_last_line(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


DAMAGES = {
    "a flipped bit": (lambda folder: change(shard(folder)), r"shards/__0_\d.distcp is not what SHA256SUMS says"),
    "a flipped bit of the metadata": (lambda f: change(f / "shards/.metadata"), "shards/.metadata is not what SHA256"),
    "cut short": (lambda folder: os.truncate(shard(folder), 1000), "is not what SHA256SUMS says"),
    "a shard less": (lambda folder: shard(folder).unlink(), "distcp is missing"),
    "no shards": (lambda folder: shutil.rmtree(folder / "shards"), "is missing"),
    "a checksum less": (lambda f: without_last_line(f / "SHA256SUMS"), "SHA256SUMS does not name shards/__0_"),
    "no checksums": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, kind):
    saved(tmp_path, 1, 2)
    do, said = DAMAGES[kind]
    do(tmp_path / "checkpoints/step_00000002")
    check_equal(read_newest(tmp_path), example(1))
    assert "step_00000002 is damaged" in caplog.text
    assert re.search(said, caplog.text)


def test_a_checkpoint_that_is_not_written_to_its_end_does_not_count(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints/step_00000002").rename(tmp_path / "checkpoints/step_00000002.tmp")
    assert load_checkpoint(tmp_path)["step"] == 1
    saved(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000001", "step_00000003"]


def test_metadata_that_would_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = newest_checkpoint(saved(tmp_path, 1))
    (folder / "shards/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RuntimeError, match=r"the metadata of its shards name \w+.mkdir"):
        read(folder, load_state(folder))
    assert not (tmp_path / "ran").exists()


def test_a_disk_that_is_full_is_said_at_the_next_save_and_leaves_the_one_before(tmp_path, monkeypatch):
    writer = BackgroundWriter()
    save(tmp_path, example(1), writer)
    writer.wait()

    write = HashedFile.write

    def full(file: HashedFile, data) -> int:
        if "shards" in str(file.raw.name) and file.tell() > 5000:
            raise OSError(errno.ENOSPC, "No space left on device", "shard")
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", full)
        save(tmp_path, example(2), writer)
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    assert not (tmp_path / "checkpoints/step_00000002.tmp/shards").exists()
    save(tmp_path, example(3), writer)
    writer.close()
    check_equal(read_newest(tmp_path), example(3))
    assert damage(tmp_path / "checkpoints/step_00000001") is None


def fails_on_the_other(folder: Path, rank: int) -> tuple[str, int]:
    """Saves twice by two processes, of which the second cannot write the second time; what is said, and kept."""
    writer = BackgroundWriter()
    save(folder, example(1), writer)
    writer.wait()
    if rank == 1:
        HashedFile.write = lambda *_: full_disk()  # of this process alone
    save(folder, example(2), writer)
    try:
        writer.wait()
    except OSError as error:
        return str(error), load_checkpoint(folder)["step"]
    return "nothing", load_checkpoint(folder)["step"]


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_process_that_cannot_write_is_heard_of_by_all(tmp_path):
    found = in_two(tmp_path, lambda rank: fails_on_the_other(tmp_path / "run", rank))
    assert found == [["[Errno 28] No space left on device", 1]] * 2


def test_no_class_of_pythons_own_is_in_the_metadata(tmp_path):
    """Their names depend on Python's version."""
    metadata = (newest_checkpoint(saved(tmp_path, 1)) / "shards/.metadata").read_bytes()
    strings = [text for _, text, _ in pickletools.genops(metadata) if isinstance(text, str)]
    assert "MetadataIndex" in strings
    assert not [text for text in strings if "pathlib" in text or str(tmp_path) in text]


def test_a_checkpoint_that_is_being_written_outlives_an_error_of_the_run(program, tmp_path, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    create = Hashing.create_stream

    def slowly(*given):
        begun.set()
        may_end.wait(60)
        return create(*given)

    def fails(run: Run, now: Now, *_: object, **__: object) -> None:
        if now.step == 6:
            assert begun.wait(60)
            threading.Timer(0.5, may_end.set).start()  # while the run ends
            raise InputError("something else is wrong")

    monkeypatch.setattr(Hashing, "create_stream", slowly)
    monkeypatch.setattr(Run, "log", fails)
    settings = ["train.sharded_checkpoints=true", "train.checkpoint_every=5", "train.log_every=1", "train.max_steps=20"]
    given = ["configs/debug/stage1.yaml", f"run_dir={tmp_path}/run", "tracking.wandb=disabled", *settings]
    code, _, said = program("stage1/train.py", *given)
    assert (code, said) == (2, "error: something else is wrong\n")
    assert load_checkpoint(tmp_path / "run")["step"] == 5


@pytest.mark.parametrize("shared", [True, False])
def test_large_runs_write_shards_if_all_processes_see_the_folder(program, tmp_path, monkeypatch, shared):
    monkeypatch.setattr("vqgen.training.state.LARGE", 100_000)  # bytes
    monkeypatch.setattr("vqgen.training.run.all_agree", lambda value: value and shared)
    given = ["configs/debug/stage1.yaml", f"run_dir={tmp_path}/run", "tracking.wandb=disabled", "train.max_steps=2"]
    code, said, _ = program("stage1/train.py", *given, "train.eval_every=9")
    assert code == 0
    assert (tmp_path / "run/checkpoints/step_00000002/shards").is_dir() == shared
    assert ("not all processes see it, so the main process alone writes checkpoints" in said) == (not shared)


def test_a_failed_writing_is_told_once(tmp_path, monkeypatch):
    writer = BackgroundWriter()
    monkeypatch.setattr(Hashing, "create_stream", lambda *_: full_disk())
    save(tmp_path, example(1), writer)
    while (fault := writer.new_fault()) is None:
        time.sleep(0.01)
    assert str(fault) == "[Errno 28] No space left on device"
    assert writer.new_fault() is None


def test_two_processes_write_a_share_each_and_any_number_goes_on(program, tmp_path):
    both, again, alone = (tmp_path / name for name in ("both", "again", "alone"))
    settings = (
        "stage1/train.py configs/debug/stage1.yaml tracking.wandb=disabled train.max_steps=12 train.eval_every=12 "
        "train.log_every=1 train.checkpoint_every=4 train.keep_checkpoints=9"
    )
    assert "2 x cpu" in shell(f"{launch_two()} {settings} run_dir={both} train.sharded_checkpoints=true")
    last = both / "checkpoints/step_00000012"
    sizes = [sum(path.stat().st_size for path in (last / "shards").glob(f"__{number}_*.distcp")) for number in range(2)]
    assert min(sizes) > 0.4 * sum(sizes)
    end = read(last, load_state(last))

    said = shell(f"{launch_two()} {settings} run_dir={as_it_was(both, 4, again)} train.sharded_checkpoints=false")
    assert "2 x cpu; going on from step 4" in said
    found = state(again, 12)
    for timed in ("seconds", "logged"):
        found[timed] = end[timed]
    check_equal(found, end)

    more = (f"run_dir={as_it_was(both, 8, alone)}", "train.sharded_checkpoints=true")
    code, said, _ = program(*settings.split(), *more)
    assert code == 0
    assert "going on from step 8 by 1 x 1 passes per step after 2 x 1" in said
    found = read(alone / "checkpoints/step_00000012", load_state(alone / "checkpoints/step_00000012"))
    for name, x in end["model"].items():
        torch.testing.assert_close(found["model"][name], x, rtol=0.02, atol=0.02)
