"""Draw images from a trained prior, or from a GAN.

python stage2/sample.py RUN_DIR [num_images=64 class_ids=[3,cat] cfg_scale=2.0 png=true ... out=DIR]
python stage2/sample.py RUN_DIR image=FILE keep_rows=0.5|mask=FILE|vary=0.3 [...]
python stage2/sample.py RUN_DIR tune=fd|nll [...]
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from vqgen.cli.program import run_program
from vqgen.cli.runs import run_images, writable_codes_folder
from vqgen.data.codes import encode_images
from vqgen.data.describe import SHOWN_CLASSES, short_name
from vqgen.data.images import some_rows
from vqgen.data.pixels import read_picture
from vqgen.data.samples import check_free, save_samples, save_single_files
from vqgen.distributed import computed_by_main, gathered_by_main
from vqgen.errors import InputError, need, require
from vqgen.evaluation.features import Features, cached_features, collect_features, load_feature_network
from vqgen.evaluation.guidance import figures_of_scales
from vqgen.evaluation.likelihood import prior_nll
from vqgen.evaluation.metrics import ClassProbe, frechet_distance
from vqgen.evaluation.report import cache_folder, evaluation_device
from vqgen.generator import Generator, Samples
from vqgen.priors.sampling import classes_in_turn, guidance
from vqgen.settings import DataConfig, SampleFilesConfig, Stage2EvaluateConfig
from vqgen.training.tracking import image_grid
from vqgen.yaml_file import read_yaml


def main(run_dir: str, config: SampleFilesConfig) -> None:
    measures = config.tune is not None or config.best_by == "class"
    state = evaluation_device() if measures else Accelerator()
    device = state.device
    generator = Generator.from_pretrained(run_dir).to(device)
    choices, options = generator.choices(config.class_ids), generator.options(config)
    image = None if config.image is None else read_picture(config.image, "image")
    mask = None if config.mask is None else read_picture(config.mask, "mask")
    each = generator.of_each(config, image, mask)
    out = Path(config.out or Path(run_dir) / ("samples/png" if config.png else "samples"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be written ({error.strerror}); name another folder") from error
    if config.png:
        check_free(out)
    if state.is_main_process:
        print(class_list(generator.class_names, Path(run_dir)))

    if measures:
        options |= measured(Path(run_dir), generator, config, choices, state)
    class_ids = classes_in_turn(config.num_images, choices)
    if "known" in each and state.is_main_process:
        drawn_codes, all_codes = int((each["known"][0] < 0).sum()), each["known"].shape[1]
        seen = "all that stay and those drawn before" if generator.model.random_orders else "those before it"
        print(f"{drawn_codes} of the image's {all_codes} codes are drawn, each from {seen}")
    rounds = range(0, config.num_images, config.batch_size * state.num_processes)  # of a batch of each process
    file = TemporaryFile(dir=out)  # noqa: SIM115  # on the disk, as the images may not fit in the memory; it has no name
    for first in tqdm(rounds, desc="sampling", unit=" batches", disable=None if state.is_main_process else True):
        start, images = first + state.process_index * config.batch_size, np.empty(0, np.uint8)
        rows = slice(start, start + config.batch_size)
        if start < config.num_images:
            here = {name: tensor[rows] for name, tensor in each.items()}
            drawn = generator.draw(class_ids[rows].to(device), seed=config.seed, first=start, each=here, **options)
            images = rearrange(drawn, "n c h w -> n h w c").contiguous().cpu().numpy()
        parts = gathered_by_main(images)
        computed_by_main(lambda parts=parts: sum(map(file.write, parts)))  # so a full disk ends all processes
    state.end_training()  # otherwise a process may abort if it exits while another still sends data to it
    if not state.is_main_process:
        return
    array = np.memmap(file, np.uint8, "r", shape=(config.num_images, *images.shape[1:]))
    save_samples(out / "samples.npz", array, class_ids.numpy())
    print(f"{config.num_images} images by {state.num_processes} x {device.type}: {out / 'samples.npz'}")
    with_classes = config.png and save_single_files(out, array, class_ids.numpy(), generator.class_names)
    if config.png:
        print(f"single files{', a folder for each class' if with_classes else ''}: data.source={quote(str(out))}")
    if with_classes or not config.png:  # beside single files without folders the picture would be one of the images
        columns = len(choices) if 1 < len(choices) <= 16 else 8
        image_grid(array[: 16 * columns], min(columns, len(array))).save(out / "grid.png")
        print(f"the first of them as a picture: {out / 'grid.png'}")
    tuned = f" cfg_scale={options['cfg_scale']:g}" if config.tune else ""
    print(f"next: {next_command(run_dir, out, generator)}{tuned}")


def measured(
    run: Path, generator: Generator, config: SampleFilesConfig, choices: Sequence[int], accelerator: Accelerator
) -> dict[str, Any]:
    """The options that need the training's images: the judge of best_by=class, and the tuned scale of guidance.

    Raises:
        InputError: these do nothing for this model, or the images that it was trained on are not there.
    """
    what = "best_by=class" if config.tune is None else f"tune={config.tune}"
    require(not generator.is_gan, f"{what}: only a prior draws with that, and this model is a GAN; leave it out")
    known, several = any(i >= 0 for i in choices), len(generator.class_names) > 1 and min(choices, default=-1) >= 0
    require(config.tune is None or known, f"{what}: guidance does nothing without a class; leave it out")
    unguided = f"{what}: the prior was trained with class_dropout=0, so guidance cannot work; leave it out"
    require(config.tune is None or generator.model.class_dropout != 0, unguided)
    judged = config.best_by == "class"
    require(several or not judged, "best_by=class: needs a class for each image, and two to tell apart; leave it out")
    train, held_out, own = run_images(run, config.data, generator.channels)
    own = own and train.class_names == generator.class_names
    require(own, f"{what}: these are not the images that the prior was trained on; give data.source=, or leave it out")
    cache, batch = cache_folder(config), config.batch_size
    shared: dict[str, Any] = {"cache": cache, "accelerator": accelerator}
    rows = some_rows(len(train), Stage2EvaluateConfig.num_reference)
    found: dict[str, Any] = {}
    if judged or config.tune == "fd":
        need("torchmetrics", "evaluation", what)
        network = load_feature_network(config.features, None, train, seed=0, **shared)

    def features_of(chosen: np.ndarray) -> Features | None:
        return cached_features(train, chosen, network, batch_size=batch, description="training images", **shared)

    if judged:
        known_features = features_of(rows)
        probe = computed_by_main(lambda: ClassProbe(known_features, len(generator.class_names)))

        def judge(images: Tensor, class_ids: Tensor) -> Tensor:
            log_p = probe.log_p(network(images)[0].cpu()).to(class_ids.device)
            return log_p.gather(1, class_ids[:, None])[:, 0]

        found["judge"] = judge
    if config.tune is None:
        return found
    if config.tune == "nll":
        prior = generator.model
        codes = encode_images(
            held_out, generator.tokenizer, writable_codes_folder(run, cache), tokenizer_hash=generator.tokenizer_hash,
            mirror=False, accelerator=accelerator, order=prior.layout.order,
        )  # fmt: skip
        title = f"NLL of {len(codes):,} held-out images' codes, nats a token"

        def figure(scale: float) -> float:
            scales = guidance(scale, config.cfg_power, config.cfg_start, prior.layout.num_tokens)
            return prior_nll(prior, codes, len(codes), batch, accelerator.device, scales)
    else:
        chosen = rows[np.isin(train.class_ids[rows], choices)] if config.class_ids else rows
        reference = features_of(chosen)
        few = computed_by_main(lambda: config.tune_images <= len(reference.total))
        title = f"{network.frechet_name} of {config.tune_images:,} samples against {len(chosen):,} images"
        title += "; too large, as there are no more samples than features" if few else ""

        def figure(scale: float) -> float:
            # Another seed than the samples' own: their later evaluation then has none that the choice was made by.
            drawn = replace(config, cfg_scale=scale, num_images=config.tune_images, seed=config.seed + 1)
            samples = Samples(generator, drawn, **found)
            features = collect_features(samples, np.arange(len(samples)), network, batch, f"cfg_scale={scale:g}")
            return computed_by_main(lambda: frechet_distance(features, reference))

    figures = figures_of_scales(figure)
    best = min(figures, key=lambda scale: figures[scale])
    if accelerator.is_main_process:
        print(f"{title}:", *(f"  cfg_scale={scale:g}  {value:.4g}" for scale, value in figures.items()), sep="\n")
        print(f"drawing with cfg_scale={best:g}, the best of these")
    return {**found, "cfg_scale": best}


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
    run_program(
        main,
        SampleFilesConfig,
        {"data": DataConfig},
        "python stage2/sample.py RUN_DIR [key=value ...]",
        run_dir="required",
    )
