"""Draw images from a trained prior, or from a GAN.

python stage2/sample.py RUN_DIR [num_images=64 class_ids=[3,7] cfg_scale=2.0 ... out=DIR]
"""

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from tqdm import tqdm

from vqgen.cli.program import run_program
from vqgen.errors import InputError, require
from vqgen.priors.sampling import class_choices, classes_in_turn, load_sampler
from vqgen.settings import SampleConfig
from vqgen.training.tracking import image_grid


def main(run_dir: str, config: SampleConfig) -> None:
    state = Accelerator()
    device = state.device
    sampler = load_sampler(Path(run_dir), device)
    choices = class_choices(sampler.class_names, config.class_ids, no_class=not sampler.is_gan)
    options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "cfg_scale")}
    if sampler.is_gan:
        for name, value in options.items():
            unchanged = value == getattr(SampleConfig(), name)
            require(
                unchanged, f"{name}={value}: only a prior draws with that, and {run_dir} is a GAN's run; leave it out"
            )
        options = {}
    out = Path(config.out or Path(run_dir) / "samples")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be written ({error.strerror}); name another folder") from error

    class_ids = classes_in_turn(config.num_images, choices)
    starts = range(0, config.num_images, config.batch_size)[state.process_index :: state.num_processes]
    drawn = []
    for start in tqdm(starts, desc="sampling", unit=" batches", disable=None if state.is_main_process else True):
        part = class_ids[start : start + config.batch_size].to(device)
        images = sampler.draw(part, seed=config.seed, first=start, **options)
        drawn.append((start, rearrange(images, "n c h w -> n h w c").cpu().numpy()))
    drawn = gather_object(drawn)
    state.end_training()  # or a process that exits while the other still talks to it may abort
    if not state.is_main_process:
        return
    array = np.concatenate([images for _, images in sorted(drawn, key=lambda part: part[0])])
    np.savez_compressed(out / "samples.npz", images=array, class_ids=class_ids.numpy())
    columns = len(choices) if 1 < len(choices) <= 16 else 8
    image_grid(array[: 16 * columns], min(columns, len(array))).save(out / "grid.png")
    print(f"{config.num_images} images by {state.num_processes} x {device.type}: {out / 'samples.npz'}")
    print(f"the first of them as a picture: {out / 'grid.png'}")


if __name__ == "__main__":
    run_program(main, SampleConfig, {}, "python stage2/sample.py RUN_DIR [key=value ...]", run_dir="required")
