"""Draw images from a trained prior.

python stage2/sample.py RUN_DIR [num_images=64 class_ids=[3,7] cfg_scale=2.0 ... out=DIR]
"""

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from tqdm import tqdm

from vqgen.cli import run_program
from vqgen.config import SampleConfig, require
from vqgen.errors import InputError
from vqgen.models.prior import Prior
from vqgen.models.vqmodel import load_tokenizer
from vqgen.sampling import class_choices, classes_in_turn, sample_images
from vqgen.tracking import image_grid


def main(run_dir: str, config: SampleConfig) -> None:
    folder = Path(run_dir) / "model"
    require(folder.is_dir(), f"{run_dir}: no model there; give the folder of a stage-2 run, or train one first")
    prior = Prior.from_pretrained(folder / "prior").eval()
    tokenizer, _ = load_tokenizer(folder / "tokenizer")

    choices = class_choices(prior, config.class_ids)
    out = Path(config.out or Path(run_dir) / "samples")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be written ({error.strerror}); name another folder") from error

    state = Accelerator()
    device = state.device
    prior, tokenizer = prior.to(device), tokenizer.to(device)
    class_ids = classes_in_turn(config.num_images, choices)
    starts = range(0, config.num_images, config.batch_size)[state.process_index :: state.num_processes]
    drawn = []
    for start in tqdm(starts, desc="sampling", unit=" batches", disable=None if state.is_main_process else True):
        images = sample_images(
            prior,
            tokenizer,
            class_ids[start : start + config.batch_size].to(device),
            seed=config.seed,
            first=start,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            cfg_scale=config.cfg_scale,
        )
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
