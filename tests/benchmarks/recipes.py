"""Trains priors by different recipes for as long, on the codes of one tokenizer, to see where each recipe pays.

python tests/benchmarks/recipes.py [--data digits emoji64 fashion_mnist cifar10] [--seeds 0 1 2] [--arms NAME ...]
    [--stage1-seconds 90] [--seconds 90] [--images 2000] [--jobs 1] [--threads 1] [--runs FOLDER]

Prints a table for each data set, of means over the prior's seeds and their standard deviation, and writes it to FOLDER
with results.json. Samples are drawn without guidance (cfg_scale=1, top_p=1), and digits are also judged by LeNet. An
arm whose setting a configuration has already is the same as the first. `--jobs` runs that many arms at a time, each on
`--threads` cores of its own. The same command again goes on where it stopped, and does not repeat what is finished.
"""

import argparse
import subprocess
import sys

from arms import ROOT, Case, Commands, add_options, compare, evaluated, last_step

DATA = ("digits", "emoji64", "fashion_mnist", "cifar10")
ADAMW = ["optim.name=adamw", "optim.lr=3e-3"]  # what the defaults were before Muon
ARMS: dict[str, list[str]] = {  # settings of stage 2
    "as shipped": [],
    "earlier defaults": [*ADAMW, "train.batch_size=128", "context_noise=0", "class_dropout=0.1"],
    "AdamW, batch 32": ["optim.name=adamw", "optim.lr=2e-3", "train.batch_size=32"],
    "batch 32": ["train.batch_size=32"],
    "half the learning rate": ["optim.lr=3e-3"],
    "learning rate 1e-2": ["optim.lr=1e-2"],
    "2 layers": ["model.num_hidden_layers=2"],
    "3 layers": ["model.num_hidden_layers=3"],
    "width 96": ["model.hidden_size=96"],
    "width 160, 3 layers": ["model.hidden_size=160", "model.num_hidden_layers=3"],
    "norms of queries and keys": ["model.model_type=qwen3"],
    "tied embeddings": ["model.tie_word_embeddings=true"],
    "attention dropout 0.1": ["model.attention_dropout=0.1"],
    "context noise 0.5": ["context_noise=0.5"],
    "no context noise": ["context_noise=0"],
    "label smoothing 0.05": ["label_smoothing=0.05"],
    "class dropout 0.1": ["class_dropout=0.1"],
    "one crop": ["data.crops=1"],
}
HEADINGS = {
    "FD-EffLite0": "`FD-EffLite0`",
    "FD-LeNet": "`FD-LeNet`",
    "recognised": "`recognised`",
    "nll_held_out": "`nll_held_out`",
    "gap": "gap to training",
    "steps": "steps",
}


def configuration(data: str, stage: int) -> list[str]:
    """The configuration of a data set, as the command's first words; none for the built-in digits."""
    return [] if data == "digits" else [f"configs/stage{stage}/{data}.yaml"]


def commands(case: Case, options: argparse.Namespace) -> Commands:
    """The commands in their order: the prior is trained, and measured once or twice."""
    folder, tokenizer = case.folder(options.runs), options.runs / case.data / "stage1"
    quiet = [f"seed={case.seed}", "tracking.wandb=disabled"]
    train = [*configuration(case.data, 2), f"run_dir={folder}/stage2", f"stage1={tokenizer}", *ARMS[case.arm], *quiet]
    train += [f"train.max_seconds={options.seconds:g}", "train.max_steps=null"]
    train += ["train.eval_every=1000000", "train.checkpoint_every=1000000"]
    measure = [
        "stage2/evaluate.py",
        f"{folder}/stage2",
        "cfg_scale=1",
        "top_p=1",
        f"num_images={options.images}",
        *quiet,
    ]
    second = [[*measure, "features=lenet", f"out={folder}/lenet"]] if case.data == "digits" else []
    return [["stage2/train.py", *train], measure, *second]


def figures(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """The figures of a case whose commands have run; LeNet's, where there are some, come last."""
    folder = case.folder(options.runs)
    found = evaluated(folder / "stage2/evaluation")
    if (folder / "lenet").is_dir():
        found |= evaluated(folder / "lenet")
    own = {name: found[name] for name in HEADINGS if name in found}
    return {**own, "gap": found["nll_held_out"] - found["nll_train"], "steps": last_step(folder / "stage2")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "runs/recipes", DATA, list(ARMS))
    parser.add_argument("--stage1-seconds", type=float, default=90)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--images", type=int, default=2000)
    given = parser.parse_args()
    for data in given.data:
        tokenizer = [*configuration(data, 1), f"run_dir={given.runs / data / 'stage1'}", "tracking.wandb=disabled"]
        tokenizer += [f"train.max_seconds={given.stage1_seconds:g}", "train.max_steps=null"]
        subprocess.run([sys.executable, "stage1/train.py", *tokenizer], cwd=ROOT, check=True)
    compare(given, lambda case: commands(case, given), lambda case: figures(case, given), HEADINGS)
