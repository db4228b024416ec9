"""What a stage-1 configuration costs, without training it: parameters, FLOPs, memory, and hours on GPUs.

python tests/benchmarks/cost.py CONFIG.yaml [gpus=8] [utilisation=0.35]

All figures are from the shapes alone (vqgen/planning/cost.py). Activations are all tensors that are alive at the worst
moment of the passes, in the types that autocast chooses on CUDA; a real allocator needs somewhat more.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from step import configuration, stage1

from vqgen.errors import InputError, require
from vqgen.planning.cost import Cost, tokenizer_cost

GPUS = {"A100": 312e12, "H100": 989e12}  # name: FLOP/s in bf16 without sparsity, by their data sheets
IMAGENET = 1_281_167  # training images


def main(path: Path, gpus: int, utilisation: float) -> None:
    config = configuration(path)
    length = "train.max_steps is null, so the run's length is not known; give it a number there"
    require(config.train.max_steps is not None, f"{path}: {length}")
    require(gpus > 0, f"gpus={gpus}: must be 1 or more")
    passed, rest = divmod(config.train.batch_size, gpus * config.train.accumulation)
    require(rest == 0, f"gpus={gpus}: train.batch_size={config.train.batch_size} does not divide over them; use fewer")
    plain, again = (
        tokenizer_cost(stage1, configuration(path, train__activation_checkpointing=on)) for on in (False, True)
    )
    print(f"{path}: {config.data.image_size} pixels, {config.train.mixed_precision or 'no'} mixed precision\n")
    print("| part | parameters | forward, GFLOP per image |\n|---|---|---|")
    for name, (count, flops) in plain.parts.items():
        print(f"| {name} | {count / 1e6:.2f} M | {flops / 1e9:.1f} |")
    images = config.train.batch_size * config.train.max_steps
    print("\n| | | with activation checkpointing |\n|---|---|---|")

    def row(name: str, figure: Callable[[Cost], str]) -> None:
        print(f"| {name} | {figure(plain)} | {figure(again)} |")

    row("a training step, mean of the run, TFLOP per image", lambda cost: f"{cost.flops / 1e12:.2f}")
    row("activations, GB per image", lambda cost: f"{cost.each / 1e9:.2f}")
    row("weights, gradients, optimizers, average, GB", lambda cost: f"{cost.fixed / 1e9:.2f}")
    row(
        f"memory at {passed} images a pass, GB",
        lambda cost: f"{cost.memory(passed) / 1e9:.1f}",
    )
    for gpu, peak in GPUS.items():
        seconds = images / (gpus * utilisation * peak)
        row(
            f"hours on {gpus} {gpu}, at {utilisation:.0%} of {peak / 1e12:.0f} TFLOP/s",
            lambda cost, seconds=seconds: f"{seconds * cost.flops / 3600:.0f}",
        )
    print(f"\nLength: {images / 1e6:.1f} M images, {images / IMAGENET:.0f} epochs of ImageNet.")


if __name__ == "__main__":
    options = {"gpus": "8", "utilisation": "0.35"}
    given = [word for word in sys.argv[1:] if word.startswith(tuple(f"{key}=" for key in options))]
    paths = [word for word in sys.argv[1:] if word not in given]
    options |= dict(word.split("=", 1) for word in given)
    try:
        require(len(paths) == 1, "usage: python tests/benchmarks/cost.py CONFIG.yaml [gpus=8] [utilisation=0.35]")
        main(Path(paths[0]), int(options["gpus"]), float(options["utilisation"]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
