"""Helpers that run the programs as a user does."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"  # real data, only on the project's own machines; the product never reads it
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
BIN = Path(sys.executable).parent
# One thread unless OMP_NUM_THREADS says otherwise: test files run side by side. No credentials: wandb stays offline.
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PATH": f"{BIN}:{os.environ['PATH']}"}
ENVIRONMENT["NETRC"] = os.devnull
ENVIRONMENT.pop("WANDB_API_KEY", None)


def shell(command: str, cwd: Path = ROOT) -> str:
    """Runs a command line as a user would, from the project's root; returns what it printed."""
    done = subprocess.run(
        command, shell=True, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def untimed_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics, without the figures that depend on time."""
    timed = ("train/images_per_second", "train/data_time", "train/perceptual_time")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def metrics(run: Path) -> dict[str, float]:
    """All figures in the last lines of a run's log."""
    merged: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        merged |= json.loads(line)
    return merged


def state(run: Path, step: int) -> dict:
    """The state in a run's checkpoint."""
    return torch.load(run / f"checkpoints/step_{step:08d}/state.pt", weights_only=True)


def as_it_was(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run in its state at a step."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").iterdir():
        if folder.name > f"step_{step:08d}":
            shutil.rmtree(folder)
    return copy


def launch_two() -> str:
    """An `accelerate launch` of two processes on a free port, as other tests run at the same time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"accelerate launch --num_processes 2 --cpu --main_process_port {free.getsockname()[1]}"


@contextmanager
def own_messages() -> Iterator[None]:
    """Restores the warning filters and the log level that a program changes when it runs in this process."""
    pillow = logging.getLogger("PIL")
    level = pillow.level
    with warnings.catch_warnings():
        try:
            yield
        finally:
            pillow.setLevel(level)
