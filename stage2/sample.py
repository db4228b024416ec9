"""Draw images from a trained prior, or from a GAN.

python stage2/sample.py RUN_DIR [num_images=64 class_ids=[3,7] cfg_scale=2.0 ... out=DIR]
"""

from pathlib import Path
from shlex import quote

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from tqdm import tqdm

from vqgen.cli.program import run_program
from vqgen.errors import InputError
from vqgen.generator import Generator
from vqgen.priors.sampling import classes_in_turn
from vqgen.settings import SampleConfig
from vqgen.training.tracking import image_grid
from vqgen.yaml_file import read_yaml


def main(run_dir: str, config: SampleConfig) -> None:
    state = Accelerator()
    device = state.device
    generator = Generator.from_pretrained(run_dir).to(device)
    choices, options = generator.choices(config.class_ids), generator.options(config)
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
        images = generator.draw(part, seed=config.seed, first=start, **options)
        drawn.append((start, rearrange(images, "n c h w -> n h w c").cpu().numpy()))
    drawn = gather_object(drawn)
    state.end_training()  # otherwise a process may abort when it exits while the other still talks to it
    if not state.is_main_process:
        return
    array = np.concatenate([images for _, images in sorted(drawn, key=lambda part: part[0])])
    np.savez_compressed(out / "samples.npz", images=array, class_ids=class_ids.numpy())
    columns = len(choices) if 1 < len(choices) <= 16 else 8
    image_grid(array[: 16 * columns], min(columns, len(array))).save(out / "grid.png")
    print(f"{config.num_images} images by {state.num_processes} x {device.type}: {out / 'samples.npz'}")
    print(f"the first of them as a picture: {out / 'grid.png'}")
    print(f"next: {next_command(run_dir, out, generator)}")


def next_command(run_dir: str, out: Path, generator: Generator) -> str:
    """The command that measures these samples."""
    if not generator.is_gan:
        return f"python stage2/evaluate.py {quote(run_dir)}"
    config = Path(run_dir) / "config.yaml"
    reference = quote(read_yaml(config)["data"]["source"]) if config.is_file() else "REAL_IMAGES"
    return f"python stage2/evaluate.py --images {quote(str(out / 'samples.npz'))} --reference {reference}"


if __name__ == "__main__":
    run_program(main, SampleConfig, {}, "python stage2/sample.py RUN_DIR [key=value ...]", run_dir="required")
