"""Trains every quantizer for a while on the digits and on emoji64, to see whether its codebook stays in use.

python tests/benchmarks/collapse.py [seconds=60] [seed=0] [jobs=1] [runs=runs/collapse] [only=NAME]

Prints a table from the held-out figures of each run; existing runs are not repeated. With jobs=2 and OMP_NUM_THREADS=1
two runs use one core each.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = {"digits": [], "emoji64": ["configs/stage1/emoji64.yaml"]}
LEVELS = {512: "[8,8,8]", 4096: "[8,8,8,8]"}


def quantizers(size: int) -> dict[str, list[str]]:
    """The settings of each quantizer with a codebook of this size."""
    codebook = f"codebook_size={size}"
    return {
        "ema": ["name=ema", codebook],
        "vq": ["name=vq", codebook],
        "simvq": ["name=simvq", codebook],
        "fsq": ["name=fsq", f"levels={LEVELS[size]}"],
        "lfq": ["name=lfq", codebook],
        "lfq, spherical": ["name=lfq", codebook, "spherical=true"],
        "ibq": ["name=ibq", codebook],
        "residual, 2 of ema": ["name=residual", "num_quantizers=2", "base.name=ema", f"base.{codebook}"],
    }


def train(data: str, size: int, name: str, options: dict[str, str]) -> dict[str, float]:
    """The last held-out figures of a run; trains the run first if it does not exist."""
    label = "_".join([data, str(size), *name.replace(",", "").split(), f"seed{options['seed']}"])
    folder = Path(options["runs"]) / label
    command = [sys.executable, "stage1/train.py", *DATA[data], f"run_dir={folder}", f"seed={options['seed']}"]
    command += [f"model.quantizer.{setting}" for setting in quantizers(size)[name]]
    command += [f"train.max_seconds={options['seconds']}", "train.max_steps=null", "train.eval_every=1000000"]
    command += ["train.checkpoint_every=1000000", "tracking.wandb=disabled"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (ROOT / folder / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "val/psnr" in line)


def main(options: dict[str, str]) -> None:
    runs = [
        (data, size, name)
        for data in DATA
        for size in LEVELS
        for name in quantizers(size)
        if options["only"] in (name, "")
    ]
    print("| data | K | quantizer | usage | perplexity | PSNR | steps |\n|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(int(options["jobs"])) as pool:
        for (data, size, name), figures in zip(runs, pool.map(lambda run: train(*run, options), runs), strict=True):
            usage, perplexity, psnr = (figures[f"val/{key}"] for key in ("usage", "perplexity", "psnr"))
            row = f"{100 * usage:.1f} % | {perplexity:.0f} | {psnr:.2f} dB | {figures['step']:.0f}"
            print(f"| {data} | {size} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main({"seconds": "60", "seed": "0", "jobs": "1", "runs": "runs/collapse", "only": "", **given})
