"""Draw images from a trained prior, or from a GAN.

python stage2/sample.py RUN_DIR [num_images=64 class_ids=[3,cat] cfg_scale=2.0 png=true ... out=DIR]
python stage2/sample.py RUN_DIR image=FILE keep_rows=0.5|mask=FILE|vary=0.3 [...]
python stage2/sample.py RUN_DIR tune=fd|nll [...]
"""

import json
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from vqgen.cli.program import run_program
from vqgen.cli.runs import codes_folder, run_images
from vqgen.data.codes import encode_images
from vqgen.data.describe import SHOWN_CLASSES, short_name
from vqgen.data.images import ImageSet, some_rows
from vqgen.data.pixels import read_picture
from vqgen.data.samples import check_free, save_samples, save_single_files
from vqgen.errors import InputError, need, require
from vqgen.evaluation.features import (
    FeatureNetwork,
    Features,
    cached_features,
    collect_features,
    load_feature_network,
)
from vqgen.evaluation.guidance import Samples, figures_of_scales
from vqgen.evaluation.likelihood import prior_nll
from vqgen.evaluation.metrics import ClassProbe, frechet_distance
from vqgen.evaluation.report import cache_folder, evaluation_device
from vqgen.generator import Generator
from vqgen.priors.sampling import Judge, classes_in_turn, guidance
from vqgen.settings import SampleFilesConfig
from vqgen.training.tracking import image_grid
from vqgen.yaml_file import read_yaml

REFERENCE = 10_000  # at most so many training images


def main(run_dir: str, config: SampleFilesConfig) -> None:
    measures = config.tune is not None or config.best_by == "class"
    state = evaluation_device() if measures else Accelerator()
    device = state.device
    generator = Generator.from_pretrained(run_dir).to(device)
    choices = generator.choices(config.class_ids)
    judge = judge_of_classes(Path(run_dir), generator, config, state) if config.best_by == "class" else None
    options = generator.options(config, judge)
    out = Path(config.out or Path(run_dir) / ("samples/png" if config.png else "samples"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be written ({error.strerror}); name another folder") from error
    if config.png:
        check_free(out)
    if state.is_main_process:
        print(class_list(generator.class_names, Path(run_dir)))

    if config.tune:
        figure, found = tuned(Path(run_dir), generator, config, state)
        options["cfg_scale"] = min(found, key=lambda scale: found[scale])
        if state.is_main_process:
            print(f"{figure}:", *(f"  cfg_scale={scale:g}  {value:.4g}" for scale, value in found.items()), sep="\n")
            print(f"drawing with cfg_scale={options['cfg_scale']:g}, the best of these")
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


def tuned(
    run: Path, generator: Generator, config: SampleFilesConfig, accelerator: Accelerator
) -> tuple[str, dict[float, float]]:
    """The figure that `config.tune` asks for, in words, and its value for scales of guidance; less is better.

    Raises:
        InputError: guidance does nothing for this model, or the images that it was trained on are not there.
    """
    remedy = "leave tune out"
    require(not generator.is_gan, f"tune: only a prior is guided, and this model is a GAN; {remedy}")
    prior, tokenizer = generator.model, generator.tokenizer
    require(bool(prior.class_names), f"tune: the prior has no classes, so guidance does nothing; {remedy}")
    unknown = "tune: the prior was trained with class_dropout=0, so guidance cannot work"
    require(prior.class_dropout != 0, f"{unknown}; {remedy}")
    train, held_out, own = run_images(run, {}, tokenizer.channels)
    require(own, f"tune: the images that the prior was trained on are not there any more; {remedy}")
    batch = config.batch_size
    if config.tune == "nll":
        codes = encode_images(
            held_out, tokenizer, codes_folder(run), tokenizer_hash=generator.tokenizer_hash, mirror=False,
            accelerator=accelerator, order=prior.layout.order,
        )  # fmt: skip

        def nll(scale: float) -> float:
            scales = guidance(scale, config.cfg_power, config.cfg_start, prior.layout.num_tokens)
            return prior_nll(prior, codes, len(codes), batch, accelerator.device, scales)

        return f"NLL of {len(codes):,} held-out images' codes, nats a token", figures_of_scales(nll)

    need("torchmetrics", "evaluation", "tune=fd")
    network, reference = features_of(train, config, accelerator)

    def distance(scale: float) -> float:
        # Another seed than the samples' own: their later evaluation then has none that the choice was made by.
        drawn = replace(config, cfg_scale=scale, num_images=config.tune_images, seed=config.seed + 1)
        samples = Samples(generator, drawn)
        features = collect_features(samples, np.arange(len(samples)), network, batch, f"cfg_scale={scale:g}")
        return frechet_distance(features, reference)

    count = int(reference.count)
    what = f"{network.frechet_name} of {config.tune_images:,} samples against {count:,} training images"
    return what, figures_of_scales(distance)


def judge_of_classes(run: Path, generator: Generator, config: SampleFilesConfig, accelerator: Accelerator) -> Judge:
    """Scores images by log p(their class | image), which a linear classifier on the training images' features has.

    Raises:
        InputError: the model has no two classes, or the images that it was trained on are not there.
    """
    remedy = "use best_by=likelihood"
    require(not generator.is_gan, "best_by: only a prior draws several to choose from, and this model is a GAN")
    several = len(generator.class_names) > 1 and -1 not in generator.choices(config.class_ids)
    require(several, f"best_by=class: needs a class for each image, and two to tell apart; {remedy}")
    train, _, own = run_images(run, {}, generator.channels)
    require(own, f"best_by=class: the images that the prior was trained on are not there any more; {remedy}")
    network, reference = features_of(train, config, accelerator)
    probe = ClassProbe(reference, len(generator.class_names))

    def judge(images: Tensor, class_ids: Tensor) -> Tensor:
        log_p = probe.log_p(network(images)[0].cpu()).to(class_ids.device)
        return log_p.gather(1, class_ids[:, None])[:, 0]

    return judge


def features_of(
    train: ImageSet, config: SampleFilesConfig, accelerator: Accelerator
) -> tuple[FeatureNetwork, Features]:
    """The feature network, and its features of the training images."""
    shared: dict[str, Any] = {"cache": cache_folder(config), "accelerator": accelerator}
    network = load_feature_network(config.features, None, train, seed=0, **shared)
    how = {"batch_size": config.batch_size, "description": "training images", **shared}
    return network, cached_features(train, some_rows(len(train), REFERENCE), network, **how)


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
