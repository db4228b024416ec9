"""Completes `accelerate launch` on machines without a GPU: starts several processes, and chooses the threads."""

import os
import sys

import psutil
import torch

from vqgen.distributed import available_cores
from vqgen.errors import InputError
from vqgen.training.cpu import CHOSEN

LOOKS, LOOK = 3, 0.2  # times that the cores are watched, and for how many seconds each


def make_up_for_launcher() -> None:
    """Starts all processes that `accelerate launch --cpu` should start, and chooses the number of threads.

    `accelerate launch --cpu --num_processes 2 PROGRAM` starts only one process (huggingface/accelerate issue 2741).
    This function turns that process into torch's launcher for all of them. Accelerate also sets OMP_NUM_THREADS=1 for
    each process if the user has not set it, which would leave most of the machine idle.

    Other launchers start all processes, but do not tell Accelerate that they are to work together on CPUs.

    Raises:
        InputError: the launch asks for several machines in a way in which Accelerate starts one process on each.
    """
    launcher = psutil.Process().parent()
    by_accelerate = launcher is not None and "ACCELERATE_USE_CPU" in os.environ
    if "WORLD_SIZE" in os.environ:  # torch's launcher or Slurm has started this process as one of several
        if int(os.environ["WORLD_SIZE"]) > 1 and not torch.accelerator.is_available():
            os.environ.setdefault("ACCELERATE_USE_CPU", "True")  # otherwise each process would run alone
        return
    if torch.cuda.is_available() and not (by_accelerate and os.environ["ACCELERATE_USE_CPU"] == "True"):
        return
    count = _processes_asked_for(launcher.cmdline()) if by_accelerate and "MASTER_PORT" in os.environ else 1
    if "OMP_NUM_THREADS" not in (launcher.environ() if by_accelerate else os.environ):
        _use_free_cores(count)
    if count > 1:
        os.environ["ACCELERATE_USE_CPU"] = "True"  # otherwise each process would run alone
        address = ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
        arguments = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), *address, *sys.argv]
        os.execv(sys.executable, [sys.executable, *arguments])


def _use_free_cores(processes: int) -> None:
    """Sets one thread for each core that no other program keeps busy, divided among this run's processes.

    OpenMP's threads wait for each other many times per step. A thread that shares its core with another program makes
    all of them wait, and training is then slower than with fewer threads (tests/benchmarks/threads.py).
    """
    cores = available_cores()
    looks = [psutil.cpu_percent(LOOK, percpu=True) for _ in range(LOOKS)]
    # The least of several looks: a program that is just ending is no reason to do without a core.
    busy = round(min(sum(load[core] for core in cores if core < len(load)) for load in looks) / 100)
    threads = max(1, (len(cores) - busy) // processes)
    if busy:
        print(
            f"other programs keep {busy} of {len(cores)} cores busy, so each process takes {threads} thread(s); "
            "OMP_NUM_THREADS= sets another number",
            flush=True,
        )
    os.environ["OMP_NUM_THREADS"], os.environ[CHOSEN] = str(threads), "1"
    torch.set_num_threads(threads)


def _processes_asked_for(command: list[str]) -> int:
    """The number of processes in an `accelerate launch` command line, or in its configuration file."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    names = ("launch", "launch.py", "accelerate-launch")  # `accelerate launch` or python -m accelerate.commands.launch
    start = 1 + next(i for i, part in enumerate(command) if part.endswith(names))
    asked, _ = launch_command_parser().parse_known_args(command[start:])
    read = asked.config_file is not None or asked.num_processes is None
    by_file = vars(load_config_from_file(asked.config_file)) if read else {}
    if (asked.num_machines or by_file.get("num_machines", 1)) > 1:
        instead = "give --multi_gpu instead of --cpu, or leave out --cpu if --config_file= says MULTI_GPU"
        raise InputError(f"accelerate launch starts no processes of several machines this way; {instead}")
    return asked.num_processes or by_file["num_processes"]
