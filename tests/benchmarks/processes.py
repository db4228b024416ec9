"""Speed of training on CPUs: one process with a thread for each core, against a process for each core.

python tests/benchmarks/processes.py [rounds=3] [seconds=10]

The two take turns in each round, so that other work on the machine slows down both. Prints the medians of images per
second, and the ratio of the two in each round: if the ratios lie on both sides of 1, the measurement tells nothing.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))
LARGER = ["model.hidden_size=256", "model.num_hidden_layers=8", "model.num_attention_heads=8", "optim.lr=3e-3"]
CASES = {
    "stage 1, configs/debug": ["stage1/train.py", "configs/debug/stage1.yaml"],
    "stage 1": ["stage1/train.py"],
    "stage 1, batches of 512": ["stage1/train.py", "train.batch_size=512"],
    "stage 2, configs/debug": ["stage2/train.py", "configs/debug/stage2.yaml"],
    "stage 2": ["stage2/train.py"],
    "stage 2, width 256, 8 layers": ["stage2/train.py", *LARGER],
}
COMMON = ["tracking.wandb=disabled", "train.eval_images=64", "data.max_images=2000"]


def run(command: list[str], processes: int) -> None:
    """Runs a program by so many processes, which share the cores."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = f"accelerate launch --cpu --num_processes {processes} --main_process_port {port}".split()
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
    subprocess.run([*launch, *command], cwd=ROOT, env=environment, check=True, capture_output=True)


def images_per_second(case: list[str], processes: int, stage1: Path, seconds: float) -> float:
    """The speed of the last three quarters of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*case, f"run_dir={folder}/run", *COMMON, "train.max_steps=null", f"train.max_seconds={seconds}"]
        command += ["train.log_every=1"] + ([f"stage1={stage1}"] if "stage2" in case[0] else [])
        run(command, processes)
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    speeds = [line["train/images_per_second"] for line in lines if "train/images_per_second" in line]
    return statistics.harmonic_mean(speeds[len(speeds) // 4 :])


def main(rounds: int = 3, seconds: float = 10.0) -> None:
    print(f"images/s, medians of {rounds} runs of {seconds:g} s; {CORES} cores", flush=True)
    print(f"| steps of | 1 process, {CORES} threads | {CORES} processes, 1 thread each | ratio in each round |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        stage1 = Path(folder, "stage1")
        run(["stage1/train.py", f"run_dir={stage1}", *COMMON, "train.max_steps=20"], 1)
        for name, case in CASES.items():
            found = [[images_per_second(case, n, stage1, seconds) for n in (1, CORES)] for _ in range(rounds)]
            threads, processes = (statistics.median(speeds) for speeds in zip(*found, strict=True))
            ratios = ", ".join(f"{b / a:.2f}" for a, b in sorted(found, key=lambda pair: pair[1] / pair[0]))
            print(f"| {name} | {threads:,.0f} | {processes:,.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:])
    main(int(options.get("rounds", 3)), float(options.get("seconds", 10)))
