"""Trains tokenizers whose codes differ, and a prior on each for as long, to see which codes give the best samples.

python tests/benchmarks/codes_for_the_prior.py [--data digits emoji64] [--seeds 0 1 2] [--arms NAME ...]
    [--stage1-seconds 90] [--stage2-seconds 90] [--images 2000] [--jobs 1] [--threads 1] [--runs FOLDER]

Prints a table for each data set, of means over the seeds and their standard deviation, and writes it to FOLDER with
results.json. Samples are drawn without guidance (cfg_scale=1, top_p=1). `--jobs` runs that many arms at a time, each on
`--threads` cores of its own. The same command again goes on where it stopped, and does not repeat what is finished.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from vqgen.tokenizers import Light
from vqgen.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, list[str]] = {"digits": ["", ""], "emoji64": [f"configs/stage{n}/emoji64.yaml" for n in (1, 2)]}
ARMS: dict[str, list[str]] = {  # settings of stage 1; stage 2 is always as shipped
    "as shipped": [],
    "perturbation, a tenth of the images": ["perturb.images=0.1"],
    "perturbation, half of the images": ["perturb.images=0.5"],
    "equivariance": ["equivariance.share=0.5"],
    "equivariance, scale only": ["equivariance.share=0.5", "equivariance.rotate=false"],
    "perturbation and equivariance": ["perturb.images=0.1", "equivariance.share=0.5"],
    "2,048 codes": ["model.quantizer.codebook_size=2048"],
    "four times the codes per image": ["model.patch_size={half}"],
}
# Arms that spend the last third of stage 1's seconds on the decoder alone, after the prior has been trained.
ALONE = ["freeze=[encoder,quantizer]", "optim.lr=4e-3", "optim.warmup=0.05"]
DECODERS: dict[str, list[str]] = {
    "decoder trained on, on the images' codes": ALONE,
    "decoder trained on, on the prior's codes": [*ALONE, "redraw.stage2={stage2}"],
}
FIGURES = {  # columns of the table: the stage whose evaluation has the figure, and its heading
    "FD-EffLite0": (2, "`FD-EffLite0`"),
    "recognised": (2, "`recognised`"),
    "nll_held_out": (2, "`nll_held_out`"),
    "code_bits_per_dim": (2, "`code_bits_per_dim`"),
    "rFD-EffLite0": (1, "`rFD-EffLite0`"),
    "pFD-EffLite0": (1, "`pFD-EffLite0`"),
    "psnr": (1, "`psnr`"),
    "perplexity": (1, "`perplexity`"),
}


def half_patch(data: str) -> int:
    """Half of the patch size that a data set's configuration has, for codes twice as dense along each side."""
    model = (read_yaml(ROOT / CONFIGS[data][0]) if CONFIGS[data][0] else {}).get("model", {})
    return model.get("patch_size", inspect.signature(Light).parameters["patch_size"].default) // 2


class Case(NamedTuple):
    """One tokenizer and its prior: the data set, the arm and the seed."""

    data: str
    arm: str
    seed: int

    def folder(self, runs: Path) -> Path:
        words = self.arm.replace(",", "").split()
        return runs / self.data / "-".join([*words, f"seed{self.seed}"]).replace("'", "")

    def tokenizer(self, runs: Path) -> Path:
        """The run whose tokenizer decodes the samples."""
        return self.folder(runs) / ("decoder" if self.arm in DECODERS else "stage1")

    def commands(self, options: argparse.Namespace) -> list[list[str]]:
        """The commands in their order: both stages are trained, in some arms the decoder again; both are measured."""
        folder = self.folder(options.runs)
        quiet = [f"seed={self.seed}", "tracking.wandb=disabled"]
        rare = ["train.max_steps=null", "train.eval_every=1000000", "train.checkpoint_every=1000000"]
        first, second = ([config] if config else [] for config in CONFIGS[self.data])
        seconds = options.stage1_seconds
        last = seconds / 3 if self.arm in DECODERS else 0
        decoder = [*first, f"run_dir={folder}/decoder", f"train.max_seconds={last:g}", *rare, *quiet]
        decoder += [f"init_from={folder}/stage1", *DECODERS.get(self.arm, [])]
        first += [f"run_dir={folder}/stage1", f"train.max_seconds={seconds - last:g}", *rare, *quiet]
        second += [f"run_dir={folder}/stage2", f"train.max_seconds={options.stage2_seconds}", *rare, *quiet]
        unguided = ["cfg_scale=1", "top_p=1", f"num_images={options.images}"]
        copy = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
        again = [
            ["stage1/train.py", *(setting.format(stage2=folder / "stage2") for setting in decoder)],
            ["-c", copy, f"{folder}/decoder/model", f"{folder}/stage2/model/tokenizer"],
        ]
        return [
            ["stage1/train.py", *first, *(s.format(half=half_patch(self.data)) for s in ARMS.get(self.arm, []))],
            ["stage2/train.py", *second, f"stage1={folder}/stage1"],
            *(again if self.arm in DECODERS else []),
            ["stage1/evaluate.py", str(self.tokenizer(options.runs)), "perceptual=none", *quiet],
            ["stage2/evaluate.py", f"{folder}/stage2", *unguided, *quiet],
        ]


def figures_of(case: Case, options: argparse.Namespace, cores: Sequence[int]) -> dict[str, float]:
    """The figures of a case; runs its commands on these cores, unless the same commands have been run before."""
    folder, commands = case.folder(options.runs), case.commands(options)
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
    figures: dict[str, float] = {}
    for stage, run in ((1, case.tokenizer(options.runs)), (2, folder / "stage2")):
        found = json.loads((run / "evaluation/evaluation.json").read_text())["figures"]
        figures |= {name: found[name]["value"] for name, (of, _) in FIGURES.items() if of == stage and name in found}
        figures[f"steps of stage {stage}"] = last_step(run)
    result.write_text(json.dumps({"commands": commands, "figures": figures}, indent=1))
    return figures


def last_step(run: Path) -> int:
    """The step of a run's last line of metrics, which is its evaluation at the end."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def table(data: str, results: dict[Case, dict[str, float]]) -> str:
    """A row for each arm: the mean of each figure over the seeds, and its deviation if there are two or more."""
    names = [*FIGURES, "steps of stage 1", "steps of stage 2"]
    headings = [FIGURES[name][1] if name in FIGURES else name for name in names]
    lines = [f"| {data}, seeds | {' | '.join(headings)} |", "|---" * (len(names) + 1) + "|"]
    for arm in [*ARMS, *DECODERS]:
        found = [figures for case, figures in results.items() if (case.data, case.arm) == (data, arm)]
        if found:
            cells = [spread([figures[name] for figures in found if name in figures]) for name in names]
            lines.append(f"| {arm}, {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    digits = 0 if abs(mean) >= 100 else 3 if abs(mean) < 1 else 2
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{deviation}"


def main(options: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if options.jobs * options.threads > len(cores):
        raise SystemExit(
            f"--jobs {options.jobs} --threads {options.threads} need more than the {len(cores)} cores here"
        )
    free: Queue[Sequence[int]] = Queue()
    for i in range(options.jobs):
        free.put(cores[i * options.threads : (i + 1) * options.threads])
    cases = [Case(data, arm, seed) for seed in options.seeds for data in options.data for arm in options.arms]
    results: dict[Case, dict[str, float]] = {}

    def run(case: Case) -> None:
        mine = free.get()
        try:
            results[case] = figures_of(case, options, mine)
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
    content: dict[str, Any] = {"options": {**vars(options), "runs": str(options.runs)}, "arms": ARMS | DECODERS}
    content["results"] = [{**case._asdict(), **figures} for case, figures in sorted(results.items())]
    (options.runs / "results.json").write_text(json.dumps(content, indent=1))
    text = "\n\n".join(table(data, results) for data in options.data)
    (options.runs / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\n{options.runs}/results.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *DECODERS], default=[*ARMS, *DECODERS], metavar="NAME")
    parser.add_argument("--stage1-seconds", type=float, default=90)
    parser.add_argument("--stage2-seconds", type=float, default=90)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/codes_for_the_prior"))
    main(parser.parse_args())
