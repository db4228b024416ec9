"""Arms of a comparison: commands to run for each data set, arm and seed, the figures they leave, and a table."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from vqgen.settings import TokenizerOptimConfig
from vqgen.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
Commands = list[list[str]]


class Case(NamedTuple):
    """One run of an arm: the data set, the arm and the seed."""

    data: str
    arm: str
    seed: int

    def folder(self, runs: Path) -> Path:
        words = self.arm.replace(",", "").replace("/", "-").split()
        return runs / self.data / "-".join([*words, f"seed{self.seed}"]).replace("'", "")


def add_options(parser: argparse.ArgumentParser, runs: str, data: Sequence[str], arms: Sequence[str]) -> None:
    """The options that all comparisons have; `runs` is the folder unless `--runs` is given."""
    parser.add_argument("--data", nargs="+", choices=data, default=list(data))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path(runs))


def compare(
    options: argparse.Namespace,
    commands: Callable[[Case], Commands],
    figures: Callable[[Case], Mapping[str, float]],
    headings: Mapping[str, str],
) -> None:
    """Runs all cases, some at a time; prints and writes a table of their figures, and results.json.

    Args:
        options: those of `add_options`.
        commands: the commands of a case, each the words after `python`, run in the repository's root.
        figures: the figures of a case, once its commands have run.
        headings: the table's columns, and the figures in them.
    """
    cores = sorted(os.sched_getaffinity(0))
    if options.jobs * options.threads > len(cores):
        raise SystemExit(
            f"--jobs {options.jobs} --threads {options.threads} need more than the {len(cores)} cores here"
        )
    free: Queue[Sequence[int]] = Queue()
    for i in range(options.jobs):
        free.put(cores[i * options.threads : (i + 1) * options.threads])
    cases = [Case(data, arm, seed) for seed in options.seeds for data in options.data for arm in options.arms]
    results: dict[Case, Mapping[str, float]] = {}

    def run(case: Case) -> None:
        mine = free.get()
        try:
            results[case] = finished(case, options.runs, commands(case), figures, mine)
        finally:
            free.put(mine)
        print(f"{len(results)} of {len(cases)}: {case.data}, {case.arm}, seed {case.seed}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(run, case) for case in cases]
        try:
            for each in running:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    content: dict[str, Any] = {"options": {**vars(options), "runs": str(options.runs)}}
    content["results"] = [
        {**case._asdict(), **figures, "commands": commands(case)} for case, figures in sorted(results.items())
    ]
    (options.runs / "results.json").write_text(json.dumps(content, indent=1))
    text = "\n\n".join(table(data, options.arms, results, headings) for data in options.data)
    (options.runs / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\n{options.runs}/results.json")


def finished(
    case: Case,
    runs: Path,
    commands: Commands,
    figures: Callable[[Case], Mapping[str, float]],
    cores: Sequence[int],
) -> Mapping[str, float]:
    """The figures of a case; runs its commands on these cores, unless the same commands have been run before."""
    folder = case.folder(runs)
    result = folder / "result.json"
    if result.is_file() and (kept := json.loads(result.read_text()))["commands"] == commands:
        return kept["figures"]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    with (folder / "output.txt").open("w") as output:
        for command in commands:
            pinned = ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable, *command]
            done = subprocess.run(pinned, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}; see {output.name}")
    found = figures(case)
    result.write_text(json.dumps({"commands": commands, "figures": found}, indent=1))
    return found


def evaluated(folder: Path) -> dict[str, float]:
    """The figures of an evaluation's folder, by name."""
    found = json.loads((folder / "evaluation.json").read_text())["figures"]
    return {name: figure["value"] for name, figure in found.items()}


def half_lr(config: str) -> float:
    """Half of the learning rate of a configuration of stage 1, for a decoder that trains on; '' is the defaults."""
    given = read_yaml(ROOT / config).get("optim", {}) if config else {}
    return given.get("lr", TokenizerOptimConfig().lr) / 2


def last_step(run: Path) -> int:
    """The step of a run's last line of metrics, which is its evaluation at the end."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def table(
    data: str, arms: Sequence[str], results: Mapping[Case, Mapping[str, float]], headings: Mapping[str, str]
) -> str:
    """A row for each arm: the mean of each figure over the seeds, and its deviation if there are two or more."""
    lines = [f"| {data}, seeds | {' | '.join(headings.values())} |", "|---" * (len(headings) + 1) + "|"]
    for arm in arms:
        found = [figures for case, figures in results.items() if (case.data, case.arm) == (data, arm)]
        if found:
            cells = [spread([figures[name] for figures in found if name in figures]) for name in headings]
            lines.append(f"| {arm}, {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """The mean of values, and their deviation if there are two or more; empty if there are none."""
    if not values:
        return ""
    mean = statistics.mean(values)
    digits = 0 if abs(mean) >= 100 else 3 if abs(mean) < 1 else 2
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{deviation}"
