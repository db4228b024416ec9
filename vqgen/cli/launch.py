"""What `accelerate launch` leaves undone where there is no GPU: more than one process, and more than one thread."""

import os
import sys

import psutil
import torch

from vqgen.errors import InputError


def make_up_for_launcher() -> None:
    """Call it first: starts the processes that `accelerate launch --cpu` was asked for, and uses all cores.

    `accelerate launch --cpu --num_processes 2 PROGRAM` starts one process (huggingface/accelerate issue 2741); this one
    then becomes torch's launcher for all of them. And where the user has said nothing, it sets OMP_NUM_THREADS=1 for
    each process, which leaves most of the machine idle.

    Raises:
        InputError: several processes were asked for on several machines without GPUs.
    """
    launcher = psutil.Process().parent()
    if launcher is None or "ACCELERATE_USE_CPU" not in os.environ or "WORLD_SIZE" in os.environ:
        return  # not started by accelerate, or by its launcher for several processes
    if torch.cuda.is_available() and os.environ["ACCELERATE_USE_CPU"] != "True":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = _processes_asked_for(launcher.cmdline()) if "MASTER_PORT" in os.environ else 1
    if "OMP_NUM_THREADS" not in launcher.environ():
        threads = max(1, cores // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if count > 1:
        os.environ["ACCELERATE_USE_CPU"] = "True"  # or else Accelerate takes each process for the only one
        address = ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
        arguments = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), *address, *sys.argv]
        os.execv(sys.executable, [sys.executable, *arguments])


def _processes_asked_for(command: list[str]) -> int:
    """The number of processes in an `accelerate launch` command line, or in the configuration file that it uses."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    names = ("launch", "launch.py", "accelerate-launch")  # `accelerate launch` or python -m accelerate.commands.launch
    start = 1 + next(i for i, part in enumerate(command) if part.endswith(names))
    asked, _ = launch_command_parser().parse_known_args(command[start:])
    if (asked.num_machines or 1) > 1:
        raise InputError("accelerate starts no processes on several machines without GPUs; use torchrun there")
    return asked.num_processes or load_config_from_file(asked.config_file).num_processes
