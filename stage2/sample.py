"""Draw images from a trained prior, or from a GAN.

python stage2/sample.py RUN_DIR [num_images=64 class_ids=[3,cat] cfg_scale=2.0 png=true ... out=DIR]
python stage2/sample.py RUN_DIR image=FILE keep_rows=0.5|mask=FILE|vary=0.3 [...]
"""

import json
from pathlib import Path
from shlex import quote

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from tqdm import tqdm

from vqgen.cli.program import run_program
from vqgen.data.describe import SHOWN_CLASSES, short_name
from vqgen.data.pixels import read_picture
from vqgen.data.samples import check_free, save_samples, save_single_files
from vqgen.errors import InputError
from vqgen.generator import Generator
from vqgen.priors.sampling import classes_in_turn
from vqgen.settings import SampleFilesConfig
from vqgen.training.tracking import image_grid
from vqgen.yaml_file import read_yaml


def main(run_dir: str, config: SampleFilesConfig) -> None:
    state = Accelerator()
    device = state.device
    generator = Generator.from_pretrained(run_dir).to(device)
    choices, options = generator.choices(config.class_ids), generator.options(config)
    out = Path(config.out or Path(run_dir) / ("samples/png" if config.png else "samples"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be written ({error.strerror}); name another folder") from error
    if config.png:
        check_free(out)
    if state.is_main_process:
        print(class_list(generator.class_names, Path(run_dir)))

    class_ids = classes_in_turn(config.num_images, choices)
    image = None if config.image is None else read_picture(config.image, "image")
    mask = None if config.mask is None else read_picture(config.mask, "mask")
    each = generator.of_each(config, image, mask)
    if "known" in each and state.is_main_process:
        drawn_codes, all_codes = int((each["known"][0] < 0).sum()), each["known"].shape[1]
        seen = "all that stay and those drawn before" if generator.model.random_orders else "those before it"
        print(f"{drawn_codes} of the image's {all_codes} codes are drawn, each from {seen}")
    starts = range(0, config.num_images, config.batch_size)[state.process_index :: state.num_processes]
    drawn = []
    for start in tqdm(starts, desc="sampling", unit=" batches", disable=None if state.is_main_process else True):
        rows = slice(start, start + config.batch_size)
        here = {name: tensor[rows] for name, tensor in each.items()}
        images = generator.draw(class_ids[rows].to(device), seed=config.seed, first=start, each=here, **options)
        drawn.append((start, rearrange(images, "n c h w -> n h w c").cpu().numpy()))
    drawn = gather_object(drawn)
    state.end_training()  # otherwise a process may abort if it exits while another still sends data to it
    if not state.is_main_process:
        return
    array = np.concatenate([images for _, images in sorted(drawn, key=lambda part: part[0])])
    save_samples(out / "samples.npz", array, class_ids.numpy())
    print(f"{config.num_images} images by {state.num_processes} x {device.type}: {out / 'samples.npz'}")
    with_classes = config.png and save_single_files(out, array, class_ids.numpy(), generator.class_names)
    if config.png:
        print(f"single files{', a folder for each class' if with_classes else ''}: data.source={quote(str(out))}")
    if with_classes or not config.png:  # beside single files without folders the picture would be one of the images
        columns = len(choices) if 1 < len(choices) <= 16 else 8
        image_grid(array[: 16 * columns], min(columns, len(array))).save(out / "grid.png")
        print(f"the first of them as a picture: {out / 'grid.png'}")
    print(f"next: {next_command(run_dir, out, generator)}")


def class_list(class_names: list[str], run: Path) -> str:
    """A line with the first classes: their ids, names, and numbers of training images if the run's data.json says."""
    try:
        found = json.loads((run / "data.json").read_text("utf-8"))
        counts = {} if "stream" in found else found["classes"]  # of a stream only some images were counted
    except (OSError, ValueError, KeyError):  # an older run, or a model/ alone
        counts = {}
    listed = []
    for class_id, name in enumerate(class_names[:SHOWN_CLASSES]):
        count = f" ({counts[name]:,})" if name in counts else ""
        listed.append((name if name == str(class_id) else f"{class_id} = {short_name(name)}") + count)
    more = len(class_names) - len(listed)
    listed += [f"... and {more:,} more"] if more > 0 else []
    return f"classes: {', '.join(listed) or 'none'}"


def next_command(run_dir: str, out: Path, generator: Generator) -> str:
    """The command that measures these samples."""
    if not generator.is_gan:
        return f"python stage2/evaluate.py {quote(run_dir)}"
    config = Path(run_dir) / "config.yaml"
    reference = quote(read_yaml(config)["data"]["source"]) if config.is_file() else "REAL_IMAGES"
    return f"python stage2/evaluate.py --images {quote(str(out / 'samples.npz'))} --reference {reference}"


if __name__ == "__main__":
    run_program(main, SampleFilesConfig, {}, "python stage2/sample.py RUN_DIR [key=value ...]", run_dir="required")
