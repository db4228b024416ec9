"""The files of configs/accelerate/: Accelerate reads them, CPU processes train by them, and jobs of Slurm resume."""

import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from programs import ENVIRONMENT, ROOT, launch_two, shell

from vqgen.cli.launch import _processes_asked_for
from vqgen.errors import InputError

FILES = "configs/accelerate"
STAGE1 = (
    "stage1/train.py configs/debug/stage1.yaml data.max_images=200 train.log_every=1 train.eval_images=32 "
    "train.mixed_precision=no tracking.wandb=disabled"
)
SRUN = """#!/bin/bash
# Stands in for Slurm's: starts the tasks on this machine, and passes SIGUSR1 on to each task, but not to its children.
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
worst=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task"
    code=$?
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
# Stands in for Slurm's: knows one machine, and only notes what is requeued.
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_node", DistributedType.MULTI_GPU, 1, 8),
        ("two_nodes", DistributedType.MULTI_GPU, 2, 16),
        ("fsdp", DistributedType.FSDP, 1, 8),
    ],
)
def test_accelerate_reads_the_file(name, kind, machines, processes):
    read = load_config_from_file(f"{ROOT}/{FILES}/{name}.yaml")  # raises for unknown keys
    asked = (read.distributed_type, read.num_machines, read.num_processes, read.mixed_precision)
    assert asked == (kind, machines, processes, "bf16")


def test_two_processes_train_by_the_file_for_one_node(tmp_path):
    launch = launch_two().replace("launch", f"launch --config_file {FILES}/one_node.yaml", 1)
    assert "2 x cpu" in shell(f"{launch} {STAGE1} train.max_steps=2 run_dir={tmp_path}/run")


def test_two_launchers_train_by_the_file_for_two_nodes(tmp_path):
    """Without --cpu, Accelerate starts torch's launchers here too, which find each other as on two machines."""
    launch = f"accelerate launch --config_file {FILES}/two_nodes.yaml --num_processes 2 --main_process_ip localhost"
    launch += f" --main_process_port {free_port()} --machine_rank"
    command = f"{launch} {{}} {STAGE1} train.max_steps=2 run_dir={tmp_path}/run"
    second = subprocess.Popen(command.format(1), shell=True, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
    try:
        assert "2 x cpu" in shell(command.format(0))
        assert second.wait(timeout=60) == 0
    finally:
        if second.poll() is None:
            os.killpg(second.pid, signal.SIGTERM)


def test_several_machines_of_which_accelerate_would_start_one_process_each_are_refused():
    for options in (f"--config_file {FILES}/two_nodes.yaml", "--num_machines 2 --num_processes 2"):
        with pytest.raises(InputError, match="starts no processes of several machines this way; give --multi_gpu"):
            _processes_asked_for(["accelerate", "launch", "--cpu", *options.split(), "stage1/train.py"])


def free_port() -> int:
    """A free port of those that the Slurm script chooses from, which are none of the system's own choice."""
    while True:
        with socket.socket() as found:
            port = random.randrange(20000, 30000)
            try:
                found.bind(("localhost", port))
            except OSError:
                continue
            return port


class Job:
    """A job of the Slurm script on this machine, with stand-ins for `srun` and `scontrol`."""

    def __init__(self, folder: Path, processes: int):
        self.requeued = folder / "requeued"
        self.id = free_port() - 20000
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        sizes = {"SLURM_NTASKS": processes, "SLURM_JOB_NUM_NODES": 1, "SLURM_CPUS_PER_TASK": 1, "SLURM_JOB_ID": self.id}
        self.environment = ENVIRONMENT | {key: str(value) for key, value in sizes.items()}
        self.environment |= {"SLURM_JOB_NODELIST": "localhost", "REQUEUED": str(self.requeued)}
        self.environment["PATH"] = f"{folder}:{ENVIRONMENT['PATH']}"

    def run(self, command: str, until: Path | None = None) -> tuple[int, str]:
        """Runs the script; sends it SIGUSR1, as Slurm before the time limit, once a file is there."""
        script = subprocess.Popen(
            ["bash", f"{FILES}/slurm.sh", *command.split()],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            while until is not None and not until.exists():
                assert script.poll() is None, script.stdout.read()
                time.sleep(0.05)
            if until is not None:
                script.send_signal(signal.SIGUSR1)
            said, _ = script.communicate(timeout=120)
        finally:
            if script.poll() is None:
                os.killpg(script.pid, signal.SIGKILL)
        return script.returncode, said


def test_a_job_of_slurm_is_requeued_until_its_run_is_finished(tmp_path):
    job, run = Job(tmp_path, 2), tmp_path / "run"
    command = f"{STAGE1} run_dir={run} train.max_steps=100 train.checkpoint_every=1000 train.eval_every=1000"
    code, said = job.run(command, until=run / "metrics.jsonl")
    assert code == 0, said
    assert f"job {job.id}, restart 0: 2 processes on 1 machine(s), bf16 unless" in said
    assert "2 x cpu" in said
    assert "SIGUSR1: stopped at step" in said
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert job.requeued.read_text() == f"requeue {job.id}\n"

    code, said = job.run(command)
    assert code == 0, said
    assert f"going on from step {step}" in said
    assert (run / "checkpoints/step_00000100").is_dir()
    assert "ended with exit code 0; not requeued" in said
    assert job.requeued.read_text() == f"requeue {job.id}\n"


def test_a_job_of_slurm_that_fails_is_not_requeued(tmp_path):
    job = Job(tmp_path, 1)
    for command, line in (
        (f"{STAGE1} run_dir={tmp_path}/run optim.name=sgd", "ended with exit code 2; not requeued"),
        ("", "error: no program; usage: sbatch"),
    ):
        code, said = job.run(command)
        assert code == 2, said
        assert line in said
    assert not job.requeued.exists()
