"""Trains tokenizers whose codes differ, and a prior on each for as long, to see which codes give the best samples.

python tests/benchmarks/codes_for_the_prior.py [--data digits emoji64] [--seeds 0 1 2] [--arms NAME ...]
    [--stage1-seconds 90] [--stage2-seconds 90] [--images 2000] [--jobs 1] [--threads 1] [--runs FOLDER]
    [--measure-rates RATES.json | --rates RATES.json]

Prints a table for each data set, of means over the seeds and their standard deviation, and writes it to FOLDER with
results.json. Samples are drawn without guidance (cfg_scale=1, top_p=1). `--jobs` runs that many arms at a time, each on
`--threads` cores of its own. The same command again goes on where it stopped, and does not repeat what is finished.

Where the seconds of one machine count but another one trains: `--measure-rates` on the first writes how many steps a
second each arm makes there (run it alone), and `--rates` on the second trains for as many steps as those seconds give.
"""

import argparse
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from arms import ROOT, Case, Commands, add_options, compare, evaluated, half_lr, last_step

from vqgen.tokenizers import Light
from vqgen.yaml_file import read_yaml

CONFIGS: dict[str, list[str]] = {"digits": ["", ""], "emoji64": [f"configs/stage{n}/emoji64.yaml" for n in (1, 2)]}
ARMS: dict[str, list[str]] = {  # settings of stage 1; stage 2 is always as shipped
    "as shipped": [],
    "perturbation, a tenth of the images": ["perturb.images=0.1"],
    "perturbation, half of the images": ["perturb.images=0.5"],
    "equivariance": ["equivariance.share=0.5"],
    "equivariance, scale only": ["equivariance.share=0.5", "equivariance.rotate=false"],
    "perturbation and equivariance": ["perturb.images=0.1", "equivariance.share=0.5"],
    "2,048 codes": ["model.quantizer.codebook_size=2048"],
    "four times the codes per image": ["model.patch_size={half_patch}"],
}
# Arms that spend the last third of stage 1's seconds on the decoder alone, after the prior has been trained.
ALONE = ["freeze=[encoder,quantizer]", "optim.lr={half_lr}"]
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


def halves(data: str) -> dict[str, float]:
    """Half of a data set's patch size, for codes twice as dense along each side; and half of its learning rate."""
    config = read_yaml(ROOT / CONFIGS[data][0]) if CONFIGS[data][0] else {}
    patch_size = inspect.signature(Light).parameters["patch_size"].default
    return {
        "half_patch": config.get("model", {}).get("patch_size", patch_size) // 2,
        "half_lr": half_lr(CONFIGS[data][0]),
    }


def tokenizer(case: Case, runs: Path) -> Path:
    """The run whose tokenizer decodes the samples."""
    return case.folder(runs) / ("decoder" if case.arm in DECODERS else "stage1")


def length(case: Case, part: str, seconds: float, options: argparse.Namespace) -> list[str]:
    """The settings that train a part for these seconds, or for the steps that another machine makes in them."""
    if options.rates is None:
        return [f"train.max_seconds={seconds:g}", "train.max_steps=null"]
    name = f"{case.data}, {case.arm}, {part}"
    if name not in options.rates:
        raise SystemExit(f"--rates: nothing is known of {name}; measure it with --measure-rates")
    return [f"train.max_steps={round(seconds * options.rates[name])}"]


def commands(case: Case, options: argparse.Namespace) -> Commands:
    """The commands in their order: both stages are trained, in some arms the decoder again; both are measured."""
    folder = case.folder(options.runs)
    quiet = [f"seed={case.seed}", "tracking.wandb=disabled"]
    rare = ["train.eval_every=1000000", "train.checkpoint_every=1000000", *quiet]
    first, second = ([config] if config else [] for config in CONFIGS[case.data])
    seconds, decoder = options.stage1_seconds, []
    if case.arm in DECODERS:
        decoder = [*first, f"run_dir={folder}/decoder", *length(case, "decoder", seconds / 3, options), *rare]
        decoder += [f"init_from={folder}/stage1"]
        decoder += [setting.format(stage2=folder / "stage2", **halves(case.data)) for setting in DECODERS[case.arm]]
        seconds -= seconds / 3
    first += [f"run_dir={folder}/stage1", *length(case, "stage1", seconds, options), *rare]
    first += [setting.format(**halves(case.data)) for setting in ARMS.get(case.arm, [])]
    second += [f"run_dir={folder}/stage2", *length(case, "stage2", options.stage2_seconds, options), *rare]
    copy = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
    again = [
        ["stage1/train.py", *decoder],
        ["-c", copy, f"{folder}/decoder/model", f"{folder}/stage2/model/tokenizer"],
    ]
    unguided = ["cfg_scale=1", "top_p=1", f"num_images={options.images}"]
    return [
        ["stage1/train.py", *first],
        ["stage2/train.py", *second, f"stage1={folder}/stage1"],
        *(again if decoder else []),
        ["stage1/evaluate.py", str(tokenizer(case, options.runs)), "perceptual=none", *quiet],
        ["stage2/evaluate.py", f"{folder}/stage2", *unguided, *quiet],
    ]


def figures(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """The figures of a case whose commands have run."""
    runs = {1: tokenizer(case, options.runs), 2: case.folder(options.runs) / "stage2"}
    found = {stage: evaluated(run / "evaluation") for stage, run in runs.items()}
    own = {name: found[stage][name] for name, (stage, _) in FIGURES.items() if name in found[stage]}
    return own | {f"steps of stage {stage}": last_step(run) for stage, run in runs.items()}


def measure_rates(options: argparse.Namespace) -> None:
    """Writes the steps a second that each part of each arm makes here, the better of two short runs that take turns."""
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        changes = {"runs": Path(folder), "stage1_seconds": 8, "stage2_seconds": 8, "rates": None}
        short = argparse.Namespace(**{**vars(options), **changes})
        for case in (Case(data, arm, turn) for turn in range(2) for data in options.data for arm in options.arms):
            trainings = (words for words in commands(case, short) if words[0].endswith("/train.py"))
            for command in trainings:
                subprocess.run([sys.executable, *command, "train.log_every=5"], cwd=ROOT, check=True)
                run = Path(next(word for word in command if word.startswith("run_dir=")).removeprefix("run_dir="))
                lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                speeds = [line["train/images_per_second"] for line in lines if "train/images_per_second" in line]
                batch = read_yaml(run / "config.yaml")["train"]["batch_size"]
                name = f"{case.data}, {case.arm}, {run.name}"
                rates[name] = max(rates.get(name, 0.0), statistics.median(speeds) / batch)
    options.measure_rates.write_text(json.dumps(rates, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "runs/codes_for_the_prior", list(CONFIGS), [*ARMS, *DECODERS])
    parser.add_argument("--stage1-seconds", type=float, default=90)
    parser.add_argument("--stage2-seconds", type=float, default=90)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--measure-rates", type=Path, metavar="RATES.json")
    parser.add_argument("--rates", type=lambda path: json.loads(Path(path).read_text()), metavar="RATES.json")
    given = parser.parse_args()
    if given.measure_rates:
        measure_rates(given)
    else:
        headings = {name: heading for name, (_, heading) in FIGURES.items()}
        headings |= {name: name for name in ("steps of stage 1", "steps of stage 2")}
        compare(given, lambda case: commands(case, given), lambda case: figures(case, given), headings)
