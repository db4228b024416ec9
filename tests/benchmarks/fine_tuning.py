"""Fine-tunes a tokenizer on another set of images, beside training from scratch on it.

python tests/benchmarks/fine_tuning.py [seeds=0,1] [seconds=30] [scratch=30,60,90,120] [before=90] [images=0]
    [lr=8e-3] [warmup=0.05] [runs=runs/fine_tuning]

For each seed it trains a tokenizer on CIFAR-10 (configs/stage1/cifar10.yaml) for `before` seconds, and goes on from its
weights on emoji at 32 pixels for `seconds`; then it trains the same tokenizer on the emoji from scratch for each of the
numbers of seconds in `scratch`. `images` takes only so many of the emoji; 0 takes all. Existing runs are not repeated;
measure on a quiet machine. Prints the mean per-image PSNR on the held-out emoji, and the share of the codes in use.
"""

import subprocess
import sys
from pathlib import Path

import torch

from vqgen.data.images import load_images
from vqgen.evaluation.metrics import CodeUsage, image_psnr
from vqgen.settings import DataConfig
from vqgen.tokenizers.vqmodel import from_uint8, load_tokenizer, to_uint8

ROOT = Path(__file__).parents[2]
CONFIG = "configs/stage1/cifar10.yaml"  # the model and the recipe of all runs
EMOJI = "../shared/data/emoji64"
DEFAULTS = {"seeds": "0,1", "seconds": "30", "scratch": "30,60,90,120", "before": "90", "images": "0"}
DEFAULTS |= {"lr": "8e-3", "warmup": "0.05", "runs": "runs/fine_tuning"}


def train(folder: Path, seconds: str, *settings: str) -> Path:
    """Trains a tokenizer with these settings for some seconds, unless the run is there; returns its folder."""
    command = [sys.executable, "stage1/train.py", *settings, f"run_dir={folder}", "train.max_steps=null"]
    command += [f"train.max_seconds={seconds}", "train.eval_every=1000000", "train.checkpoint_every=1000000"]
    subprocess.run([*command, "tracking.wandb=disabled"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return ROOT / folder


@torch.no_grad()
def figures(run: Path, data: DataConfig) -> tuple[float, float, int]:
    """The mean per-image PSNR in dB on the held-out images, the share of codes in use, and the steps of a run."""
    model, (_, held_out) = load_tokenizer(run)[0], load_images(data)
    psnr, usage = [], CodeUsage(model.code_layout(held_out.image_size), torch.device("cpu"))
    for rows in torch.arange(len(held_out)).split(64):
        x = held_out.__getitems__(rows.numpy())[0]  # uint8 (B, C, H, W)
        codes = model.encode(from_uint8(x))
        psnr.append(image_psnr(to_uint8(model.decode(codes)), x))
        usage.update(codes)
    step = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
    return torch.cat(psnr).mean().item(), usage.compute()["usage"].item(), step


def main(options: dict[str, str]) -> None:
    settings = [CONFIG, f"data.source={EMOJI}", "data.val_source=null", "data.flip=false"]
    settings += [f"data.max_images={options['images']}"] if options["images"] != "0" else []
    shown = DataConfig(source=str(ROOT / EMOJI), image_size=32)  # all held-out emoji, whatever the run trained on
    print("| seed | from | seconds | steps | PSNR | codes in use |\n|---|---|---|---|---|---|")
    for seed in options["seeds"].split(","):
        runs = Path(options["runs"])
        before = train(runs / f"cifar10_{seed}", options["before"], CONFIG, f"seed={seed}")
        tuned = [
            f"init_from={before}",
            f"optim.lr={options['lr']}",
            f"optim.warmup={options['warmup']}",
        ]
        made = {("CIFAR-10", "0"): before}
        label = f"tuned_{options['seconds']}_{options['lr']}_{options['warmup']}_{options['images']}_{seed}"
        run = train(runs / label, options["seconds"], *settings, *tuned, f"seed={seed}")
        made["CIFAR-10", options["seconds"]] = run
        for seconds in options["scratch"].split(","):
            label = f"scratch_{seconds}_{options['images']}_{seed}"
            made["scratch", seconds] = train(runs / label, seconds, *settings, f"seed={seed}")
        for (start, seconds), run in made.items():
            psnr, used, step = figures(run, shown)
            print(f"| {seed} | {start} | {seconds} | {step} | {psnr:.2f} dB | {100 * used:.1f} % |", flush=True)


if __name__ == "__main__":
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    unknown = given.keys() - DEFAULTS.keys()
    if unknown:
        print(f"error: {', '.join(sorted(unknown))}: no such option; there is {', '.join(DEFAULTS)}", file=sys.stderr)
        sys.exit(2)
    main(DEFAULTS | given)
