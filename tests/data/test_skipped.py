"""The list of images that do not load, which processes and threads write together."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from data.files import load
from programs import ENVIRONMENT, ROOT

from vqgen.data.skipped import SkippedFile, count_skipped, read_skipped
from vqgen.errors import InputError


def test_skipped_images_of_another_source_are_told_apart(damaged, tmp_path):
    (tmp_path / "held" / "cat" / "3.png").write_bytes(b"")
    for part in load(damaged, val_source=str(tmp_path / "held")):
        part.report_skipped(tmp_path / "skipped.txt")
    names = read_skipped(tmp_path / "skipped.txt").keys()
    assert names == {"cat/3.png", "cat/4.png", "dog/0.png", f"{tmp_path}/held/cat/3.png"}


def test_a_list_of_skipped_images_that_cannot_be_written_ends_a_run_only_at_its_start(damaged, tmp_path):
    settings = {"val_source": str(tmp_path / "held")}
    (tmp_path / "file").touch()
    train, _ = load(damaged, **settings)
    with pytest.raises(InputError, match=r"/file/skipped\.txt cannot be written \(Not a directory\)"):
        train.report_skipped(tmp_path / "file" / "skipped.txt")
    train, _ = load(damaged, **settings, cache_gb=0)
    train.report_skipped(tmp_path / "gone" / "skipped.txt")
    assert train.__getitems__([3])[0][0, 0, 0, 0] == 5
    assert count_skipped(tmp_path / "gone" / "skipped.txt") == 0


def test_processes_and_threads_that_skip_the_same_images_name_each_once(tmp_path):
    path = tmp_path / "skipped.txt"
    code = f"""
from pathlib import Path
from vqgen.data.skipped import SkippedFile
mine = SkippedFile(Path({str(path)!r}))
for i in range(300):
    mine.add({{f"{{i}}.png": "empty"}})
"""
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT) for _ in range(2)]
    ours = SkippedFile(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: ours.add({f"{i % 300}.png": "empty"}), range(900)))
    assert [process.wait() for process in running] == [0, 0]
    assert count_skipped(path) == len(read_skipped(path)) == 300
