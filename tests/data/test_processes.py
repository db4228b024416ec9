"""Several processes: the main one lists and hashes for all, and all raise its errors."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from data.files import load, save, write_shard
from PIL import Image

from vqgen import distributed
from vqgen.data import identity, images
from vqgen.data.sources import archive, index
from vqgen.data.sources import folder as folder_module
from vqgen.distributed import computed_by_main, cores_per_process
from vqgen.errors import InputError


def in_two(tmp_path: Path, work: Callable[[int], object]) -> list:
    """The result of work(rank) on each of two processes, through JSON; or the name and message of its exception."""

    def process(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=rank, world_size=2)
        try:
            found = work(rank)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
        os._exit(0)  # without pytest's own end

    running = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in range(2)]
    for one in running:
        one.start()
    for one in running:
        one.join(30)
        one.kill()  # one waits for the other in vain
    assert [one.exitcode for one in running] == [0, 0]
    (tmp_path / "group").unlink(missing_ok=True)
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


def forbidden(*args: object) -> None:
    raise AssertionError("only the main process does this")


def facts(source: Path, **settings) -> list:
    """Everything that must be equal in two equal sets, for both parts of a source."""
    return [[part.names, part.class_ids.tolist(), part.class_names, part.channels, part.fingerprint,
             part.__getitems__(range(len(part)))[0].tolist()] for part in load(source, **settings)]  # fmt: skip


@pytest.mark.parametrize("cache_gb", [0, 1])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_the_main_process_lists_probes_and_hashes_for_all(folder, tmp_path, kind, cache_gb):
    write_shard(tmp_path / "a.tar", {str(k): (k, b"0") for k in range(6)})
    source = folder if kind == "folder" else tmp_path / "a.tar"
    expected = json.loads(json.dumps(facts(source, cache_gb=cache_gb)))

    def work(rank: int) -> object:
        if rank > 0:
            folder_module.list_files = archive._list_tar = forbidden
            images.fingerprint_of = images.ImageSet._look = forbidden
        return facts(source, cache_gb=cache_gb)

    assert in_two(tmp_path, work) == [expected, expected]


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_all_processes_have_the_same_channels_and_levels(folder, tmp_path, cache_gb):
    save(folder / "dog" / "zz.png", (200, 100, 50))
    for k in range(5):
        save(folder / "cat" / f"deep{k}.png", Image.fromarray(np.full((8, 8), 800 * k, np.uint16)))

    def work(rank: int) -> object:
        train, _ = load(folder, cache_gb=cache_gb, val_fraction=0)
        return [facts(folder, cache_gb=cache_gb, val_fraction=0), train.notes, train.crop]

    expected = json.loads(json.dumps(work(0)))
    assert expected[0][0][3] == 3
    assert expected[2]["integer_levels"] == "0 4095"
    assert in_two(tmp_path, work) == [expected, expected]


def test_what_the_main_process_finds_wrong_all_processes_raise(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for k in range(3):
        (tmp_path / "broken" / f"{k}.png").write_bytes(b"")
    for name, message in {"empty": "no image among its files", "broken": "none of 2 images loads"}.items():
        first, second = in_two(tmp_path, lambda rank, name=name: load(tmp_path / name))
        assert first == second
        assert first.startswith("InputError: ")
        assert message in first


@pytest.mark.parametrize("other", ["none", "older"])
def test_a_machine_without_the_index_of_the_main_process_gets_it_from_there(tmp_path, monkeypatch, other):
    monkeypatch.setattr(index, "KEPT_FROM", 1)
    new = index.Index.of(["new"], np.zeros((1, 0), np.int64), np.zeros(1, np.int64))

    def content_of_the_other_machine(folder: Path) -> dict:
        if other == "none":
            raise FileNotFoundError
        return {"checksum": "another", "count": 1, "facts": {}}

    def work(rank: int) -> object:
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        if rank > 0:
            index._content = content_of_the_other_machine
        make = forbidden if rank > 0 else lambda: ([new], {}, "state")
        (found,), _ = index.kept_index(["x"], lambda state: False, make)
        return list(found.names)

    assert in_two(tmp_path, work) == [["new"], ["new"]]


def test_an_error_that_is_not_the_user_s_is_not_shared(tmp_path):
    with pytest.raises(ZeroDivisionError):
        computed_by_main(lambda: 1 / 0)
    with pytest.raises(InputError):
        computed_by_main(lambda: load("nowhere"))


@pytest.mark.parametrize(
    ("cores", "processes", "local", "expected"),
    [(8, 1, None, 8), (8, 2, None, 4), (8, 16, "4", 2), (8, 16, None, 1), (3, 2, "2", 1), (6, 1, "2", 3)],
)
def test_cores_are_those_of_this_machine_shared_by_the_processes_on_it(monkeypatch, cores, processes, local, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert cores_per_process() == expected


def test_cores_that_this_process_may_not_use_do_not_count(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores_per_process() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores_per_process() == len(before)


def test_images_are_decoded_by_as_many_threads_as_there_are_cores(folder, monkeypatch):
    asked = []

    class Pool(images.ThreadPoolExecutor):
        def __init__(self, threads: int):
            asked.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(images, "ThreadPoolExecutor", Pool)
    for cores, expected in ((1, 1), (3, 3), (64, 8)):
        monkeypatch.setattr(images, "cores_per_process", lambda cores=cores: cores)
        load(folder)
        assert asked[-2:] == [expected, expected]


def test_a_fingerprint_that_is_known_is_not_computed_again(folder, monkeypatch):
    train, _ = load(folder)
    before = train.fingerprint
    monkeypatch.setattr(images, "fingerprint_of", forbidden)
    save(folder / "cat" / "new.png")
    assert train.fingerprint == before
    ids = train._source.class_ids[train._rows]
    assert identity.fingerprint_of(train.names, train.class_names, ids, train._source.files) == before
