"""Speed of stage 1 beside other programs, by the number of threads and by how the threads wait for each other.

python tests/benchmarks/threads.py [rounds=3] [seconds=8]

Prints images per second on a quiet machine and beside one process that keeps a core busy: medians over rounds in which
the variants take turns. Run it alone. The first row is torch's own choice, the last row is the programs' choice.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))
VARIANTS = {
    "a thread for each core": {"OMP_NUM_THREADS": str(CORES)},
    "a thread for each core, OMP_WAIT_POLICY=passive": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "passive"},
    "a thread for each core, GOMP_SPINCOUNT=20000": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "20000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "the programs' choice": {},
}


@contextmanager
def neighbour():
    """Keeps one core busy with another process."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def images_per_second(variables: dict[str, str], seconds: float) -> float:
    """The speed of the last three quarters of a run of stage 1 on the built-in digits."""
    unset = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | variables
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "stage1/train.py", f"run_dir={folder}/run", "tracking.wandb=disabled"]
        command += ["train.max_steps=null", f"train.max_seconds={seconds}", "train.log_every=5", "train.eval_images=64"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    speeds = [line["train/images_per_second"] for line in lines if "train/images_per_second" in line]
    return statistics.harmonic_mean(speeds[len(speeds) // 4 :])


def main(rounds: int = 3, seconds: float = 8.0) -> None:
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for name, variables in VARIANTS.items():
            for beside in (False, True):
                with neighbour() if beside else nullcontext():
                    found.setdefault((name, beside), []).append(images_per_second(variables, seconds))
    medians = {key: statistics.median(speeds) for key, speeds in found.items()}
    whole = medians["a thread for each core", False]
    print(f"images/s, medians of {rounds} runs of {seconds:g} s on {CORES} cores; in brackets the share of the first")
    print("| threads | quiet | beside one busy process |\n|---|---|---|")
    for name in VARIANTS:
        cells = [f"{medians[name, beside]:,.0f} ({medians[name, beside] / whole:.0%})" for beside in (False, True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:])
    main(int(options.get("rounds", 3)), float(options.get("seconds", 8)))
