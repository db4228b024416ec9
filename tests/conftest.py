"""Fixtures of the tests of programs: running a program in this process, and one tiny run of each stage."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from programs import ROOT, THREADS, own_messages, shell

# Use as many threads here as in the programs that tests start, because another number of threads changes the bits.
torch.set_num_threads(THREADS)

LONGEST = ["test_readme.py", "test_configs.py", "test_gan.py", "test_evaluate.py", "test_end_to_end.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, because a long file that starts last would run while the other workers wait."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def program(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs a program's file in this process with these arguments; returns exit code, output and errors."""

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))  # a busy machine's first line would be about threads
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
        code = 0
        try:
            with own_messages():
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)  # or the next test would compute in this one's precision


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with stage1/ and stage2/, made by the two commands with tiny settings, once for all xdist workers.

    If you start the tests many times, set VQGEN_TEST_RUNS to a folder that keeps these runs.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    folder = Path(os.environ.get("VQGEN_TEST_RUNS", folder))
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            train = "accelerate launch {0}/train.py configs/debug/{0}.yaml run_dir={1}/{0}"
            shell(train.format("stage1", folder))
            shell(f"{train.format('stage2', folder)} stage1={folder}/stage1")
            (folder / "done").touch()
    return folder
