"""Reconstructions of a VQ-VAE and of a VQGAN after the same time, and of ways to make the VQGAN cheaper.

python tests/benchmarks/vqgan.py [--data emoji64 cifar10] [--seeds 0 1 2] [--arms NAME ...] [--seconds 90]
    [--jobs 1] [--threads 1] [--runs FOLDER]

Prints a table for each data set, of means over the seeds and their standard deviation, and writes it to FOLDER with
results.json. `alex` is the distance that a VQGAN trains with; `vgg`, rKD and rFD are by networks that no arm has seen.
The figures are of all held-out images, `vgg` of 500. Run it alone. The same command again goes on where it stopped.
"""

import argparse

from arms import Case, Commands, add_options, compare, evaluated, half_lr, last_step

from vqgen.settings import VQGAN_SETTINGS

ARMS: dict[str, list[str]] = {
    "VQ-VAE": [],
    "perceptual distance, no discriminator": VQGAN_SETTINGS[:1],
    "VQGAN, as shipped": VQGAN_SETTINGS,
    "VQGAN, four times the images": [*VQGAN_SETTINGS, "loss.perceptual.every=4", "loss.adversarial.every=1"],
    "VQGAN, later start": [*VQGAN_SETTINGS, "loss.perceptual.start=0.75", "loss.adversarial.start=0.85"],
    "VQGAN, DiffAugment": [*VQGAN_SETTINGS, "loss.adversarial.augment=[color,translation,cutout]"],
}
# The last third of the seconds for the decoder alone: the perceptual distance and D learn at once, the decoder from D
# after a third of that time.
AT_ONCE = ["loss.perceptual.start=0", "loss.adversarial.start=0.3", "loss.adversarial.lead=0.3"]
ALONE = {"VQ-VAE, then the decoder alone as a VQGAN": [*VQGAN_SETTINGS, *AT_ONCE]}
HEADINGS = {
    "psnr_per_image": "PSNR, dB",
    "alex": "`alex`",
    "vgg": "`vgg`",
    "rKD-EffLite0": "rKD",
    "rFD-EffLite0": "rFD",
    "steps": "steps",
}


def commands(case: Case, options: argparse.Namespace) -> Commands:
    """The commands in their order: the tokenizer is trained, in some arms its decoder again; it is measured twice."""
    folder = case.folder(options.runs)
    quiet = [f"seed={case.seed}", "tracking.wandb=disabled"]
    always = [f"configs/stage1/{case.data}.yaml", "train.max_steps=null", "train.eval_every=1000000", *quiet]
    always.append("train.checkpoint_every=1000000")
    last = options.seconds / 3 if case.arm in ALONE else 0
    first = [*always, f"run_dir={folder}/first", f"train.max_seconds={options.seconds - last:g}"]
    train = [["stage1/train.py", *first, *ARMS.get(case.arm, [])]]
    if last:
        second = [*always, f"run_dir={folder}/second", f"init_from={folder}/first", f"train.max_seconds={last:g}"]
        second += ["freeze=[encoder,quantizer]", f"optim.lr={half_lr(always[0])}", *ALONE[case.arm]]
        train.append(["stage1/train.py", *second])
    run = f"{folder}/{'second' if last else 'first'}"
    measure = ["stage1/evaluate.py", run, *quiet]
    return [
        *train,
        [*measure, "perceptual=alex", f"out={folder}/alex"],
        [*measure, "perceptual=vgg", f"out={folder}/vgg", "num_images=500"],  # of CIFAR-10's 3,000, as VGG is slow
    ]


def figures(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """The figures of a case whose commands have run; the steps are those of all its runs."""
    folder = case.folder(options.runs)
    found = {name: evaluated(folder / name) for name in ("alex", "vgg")}
    own = {name: value for name, value in found["alex"].items() if name in HEADINGS}
    own |= {name: measured["perceptual"] for name, measured in found.items()}
    runs = ("first", "second") if case.arm in ALONE else ("first",)
    return own | {"steps": sum(last_step(folder / run) for run in runs)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "runs/vqgan_in_the_same_time", ["emoji64", "cifar10"], [*ARMS, *ALONE])
    parser.add_argument("--seconds", type=float, default=90)
    given = parser.parse_args()
    compare(given, lambda case: commands(case, given), lambda case: figures(case, given), HEADINGS)
