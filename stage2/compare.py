"""Compare a GAN, a VQ-VAE with a prior and a VQGAN with a prior, trained on the same images for the same time.

python stage2/compare.py [CONFIG.yaml] [key=value ...]
"""

import json
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from vqgen.adversarial.dcgan import DCGANDiscriminator, DCGANGenerator
from vqgen.cli.parse import load_config
from vqgen.cli.program import run_program
from vqgen.cli.reflect import check_options
from vqgen.cli.sections import STAGE1_SECTIONS
from vqgen.data.images import ImageSet, load_images, some_rows
from vqgen.data.samples import load_samples, save_samples
from vqgen.data.stream import ImageStream
from vqgen.errors import InputError, need, require, section
from vqgen.evaluation.features import FeatureNetwork, cached_features, load_feature_network
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.evaluation.report import Report, cache_folder, evaluation_device, sample_figures, shown, writable_folder
from vqgen.generator import Generator
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import classes_in_turn
from vqgen.settings import CompareConfig, DataConfig, GANConfig, SampleConfig, Stage1Config, Stage2Config
from vqgen.tokenizers.vqmodel import from_uint8, load_tokenizer, to_uint8
from vqgen.training.checkpoints import load_checkpoint
from vqgen.training.tracking import image_grid

ROOT = Path(__file__).parents[1]
MODELS = {"dcgan": "DCGAN", "vqvae": "VQ-VAE + prior", "vqgan": "VQGAN + prior"}
BATCH = 256  # images drawn at a time
SPEED_ROUNDS = 5
SHARED = ("run_dir", "seed", "stage1", "train.max_steps", "train.max_seconds")  # the same for all, as data.* is
REMEDY = "set seconds=, seed=, run_dir= or data.*= of the comparison"
LOWER_IS_BETTER = ("perceptual", "rF", "FD", "FID", "KD", "KID")  # beginnings of figures' names
UNRANKED = ("usage", "parameters", "training seconds")
ROWS, GAP = 6, 28  # rows of images in a panel of the picture; pixels between panels, enough for a title


def main(config: CompareConfig) -> None:
    need("torchmetrics", "evaluation", "stage2/compare.py")
    folder = writable_folder("run_dir", Path(config.run_dir))
    cache = cache_folder(config)
    data = DataConfig(**check_options(DataConfig, config.data, "data"))
    # Loads the images and both networks and checks all settings first, so that errors appear before the long training.
    with section("data"):
        train_set, held_out = load_images(data)
    if isinstance(train_set, ImageStream):
        amount, train_set = train_set.amount, train_set.sample
    else:
        amount = f"{len(train_set):,}"
    accelerator = evaluation_device()
    network = load_feature_network(
        config.features, None, train_set, seed=config.seed, cache=cache, accelerator=accelerator
    )
    if config.perceptual != "none":
        with section("perceptual", name="perceptual"):
            PerceptualDistance(config.perceptual)
    for cls, sections, given in (
        (GANConfig, {"generator": DCGANGenerator, "discriminator": DCGANDiscriminator}, config.gan),
        (Stage1Config, STAGE1_SECTIONS, [*config.tokenizer, *config.vqgan]),
        (Stage2Config, {"model": Prior, "data": DataConfig}, config.prior),
    ):
        load_config(cls, given, sections)
        for setting in given:
            key = setting.split("=")[0]
            require(key not in SHARED, f"{setting}: is the same for all three; {REMEDY}")
            unequal = "could end before its seconds are over" if key == "train.patience" else "has to be guided"
            require(key not in ("train.patience", "class_dropout"), f"{setting}: a prior {unequal}; leave it out")

    # Trains by the usual programs, each of which resumes where it stopped.
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.data.items()}
    settings = [f"data.{key}={text}" for key, text in texts.items() if text != "null"]
    tracking = [f"tracking.{key}={value}" for key, value in asdict(config.tracking).items()]
    images = [train_set.fingerprint, train_set.crop]
    for name in MODELS:
        if name == "dcgan":
            given = [*settings, *tracking, *config.gan]
            train("stage1/train_gan.py", folder / name, config, config.seconds, given, images)
            continue
        stage1, stage2 = folder / name / "stage1", folder / name / "stage2"
        given = [*settings, *tracking, *config.tokenizer, *(config.vqgan if name == "vqgan" else [])]
        train("stage1/train.py", stage1, config, config.seconds * (1 - config.prior_share), given, images)
        given, tokenizer = [f"stage1={stage1}", *tracking, *config.prior], load_tokenizer(stage1)[1]
        train("stage2/train.py", stage2, config, config.seconds * config.prior_share, given, [*images, tokenizer])
    sampled = {name: folder / name if name == "dcgan" else folder / name / "stage2" for name in MODELS}

    # Measures reconstructions by stage1/evaluate.py, and samples by the same functions as stage2/evaluate.py.
    generators = {name: Generator.from_pretrained(run).to(accelerator.device) for name, run in sampled.items()}
    columns: dict[str, dict[str, float]] = {name: {} for name in MODELS}
    real: dict[str, float] = {}
    for name in ("vqvae", "vqgan"):
        report = reconstruction_report(folder / name / "stage1", config)
        kept = ("psnr", "ssim", "perceptual", "r" + network.frechet_name, "usage")
        columns[name] |= {key: report.figures[key].value for key in kept if key in report.figures}
        real |= {key: report.figures[key].floor for key in columns[name] if report.figures[key].floor is not None}
    drawn = {name: samples(name, generator, config, folder) for name, generator in generators.items()}
    for name, part in drawn.items():
        report = sample_report(part, train_set, held_out, network, config, cache, accelerator)
        kept = tuple(key for key in report.figures if not key.startswith("confidence"))
        columns[name] |= {key: report.figures[key].value for key in kept}
        real |= {key: report.figures[key].floor for key in kept if report.figures[key].floor is not None}
    rates = cached(
        folder / "speed.json",
        {name: [generator.checkpoint, generator.options(SampleConfig())] for name, generator in generators.items()}
        | {"on": [str(accelerator.device), platform.node()]},
        lambda: images_per_second(generators),
    )
    for name, generator in generators.items():
        columns[name]["parameters"] = generator.num_parameters
        runs = [sampled[name]] + ([folder / name / "stage1"] if name != "dcgan" else [])
        columns[name]["training seconds"] = sum(load_checkpoint(run)["seconds"] for run in runs)
        columns[name]["images/s when sampling"] = rates[name]

    table = markdown(columns, real)
    heading = f"{amount} training images ({data.source}), {config.seconds:g} s of training each, "
    heading += f"seed {config.seed}, {config.num_images:,} samples; the best of the three in bold"
    (folder / "comparison.md").write_text(f"{heading}\n\n{table}\n")
    picture(drawn, held_out, folder, accelerator.device).save(folder / "comparison.png")
    print(f"{heading}\n\n{table}\n\n{folder / 'comparison.md'}; side by side: {folder / 'comparison.png'}")
    print(f"next: python stage2/sample.py {quote(str(sampled['vqgan']))}")


def train(
    program: str, run: Path, config: CompareConfig, seconds: float, settings: Sequence[str], made_from: list[Any]
) -> None:
    """Runs a training program for its share of the time, unless a run from the same settings and data has finished."""
    seconds = round(seconds, 3)
    budget = ["train.max_steps=null", f"train.max_seconds={seconds}", f"seed={config.seed}"]
    command = [program, f"run_dir={run}", *budget, *settings]

    def until_done() -> None:
        launch(command)
        spent = load_checkpoint(run)["seconds"]
        require(spent >= seconds, f"{run} was stopped after {spent:.0f} of {seconds:.0f} s; repeat the command")

    cached(run / "finished.json", [command, made_from], until_done)


def launch(command: Sequence[str]) -> None:
    """Runs one of the project's programs.

    Raises:
        InputError: the program failed; it has printed the reason.
    """
    print(f"python {' '.join(command)}", flush=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # SIGINT or SIGTERM: the program saves before it ends
            process.terminate()
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code:
        raise InputError(f"{command[0]} ended with exit code {code}; correct what it says, and repeat the command")


def reconstruction_report(run: Path, config: CompareConfig) -> Report:
    """The evaluation report of a tokenizer, made now unless it exists already."""
    made_from = {"checkpoint": load_tokenizer(run)[1], "features": config.features, "perceptual": config.perceptual}
    made_from |= {"num_images": config.num_images, "seed": config.seed}
    options = [f"{key}={made_from[key]}" for key in ("features", "perceptual", "num_images", "seed")]
    options += [f"cache_dir={config.cache_dir}"] if config.cache_dir else []
    cached(run / "evaluation" / "made_from.json", made_from, lambda: launch(["stage1/evaluate.py", str(run), *options]))
    return Report.load(run)


class Drawn:
    """A model's samples, with the part of ImageSet's interface that `cached_features` needs.

    Args:
        images: uint8 (N, H, W, C).
        class_ids: (N,).
        fingerprint: identifies the model and the sampling settings.
    """

    crop: ClassVar[dict[str, int | str]] = {}  # samples are not cropped

    def __init__(self, images: np.ndarray, class_ids: np.ndarray, fingerprint: str):
        self.images, self.class_ids, self.fingerprint = images, class_ids, fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        images = rearrange(torch.from_numpy(self.images[rows]), "n h w c -> n c h w")
        return images, torch.from_numpy(self.class_ids[rows])


def samples(name: str, generator: Generator, config: CompareConfig, folder: Path) -> Drawn:
    """The samples of a model in FOLDER/NAME/samples.npz, drawn now unless they exist already."""
    options = generator.options(SampleConfig())
    made_from = [generator.checkpoint, config.seed, config.num_images, options]
    path = folder / name / "samples.npz"

    def draw() -> None:
        class_ids = classes_in_turn(config.num_images, generator.choices(None))
        images = []
        for start in tqdm(range(0, config.num_images, BATCH), f"sampling {name}", leave=False, disable=None):
            part = class_ids[start : start + BATCH].to(generator.device)
            images.append(generator.draw(part, seed=config.seed, first=start, **options).cpu())
        array = rearrange(torch.cat(images), "n c h w -> n h w c").numpy()
        save_samples(path, array, class_ids.numpy())

    cached(folder / name / "samples.json", made_from, draw)
    return Drawn(*load_samples(path), json.dumps(made_from))


def sample_report(
    drawn: Drawn,
    train_set: ImageSet,
    held_out: ImageSet,
    network: FeatureNetwork,
    config: CompareConfig,
    cache: Path,
    accelerator: Accelerator,
) -> Report:
    """The figures of a model's samples against training images, with those of held-out images for reference."""

    def features_of(images, rows, description):
        options = {"batch_size": BATCH, "cache": cache, "accelerator": accelerator}
        return cached_features(images, rows, network, description=description, **options)

    reference_rows = some_rows(len(train_set), config.num_reference)
    measured = features_of(drawn, np.arange(len(drawn)), "samples")
    known = features_of(train_set, reference_rows, "the reference")
    real = features_of(held_out, some_rows(len(held_out), config.num_images), "held-out images")
    report = Report("images", {"images": drawn.fingerprint})
    protocol = {"reference": train_set.fingerprint, "reference_images": len(reference_rows), "images": len(drawn)}
    sample_figures(report, measured, known, network, protocol, train_set.class_names, real)
    return report


def images_per_second(generators: dict[str, Generator]) -> dict[str, float]:
    """Images per second of each model: medians over rounds in which the models take turns (machine speed drifts)."""
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for first in range(0, (SPEED_ROUNDS + 1) * BATCH, BATCH):
        for name, generator in generators.items():
            class_ids = classes_in_turn(BATCH, generator.choices(None)).to(generator.device)
            options = generator.options(SampleConfig())
            start = time.perf_counter()
            generator.draw(class_ids, seed=0, first=first, **options).cpu()  # cpu() waits for the device
            if first > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: BATCH / statistics.median(each) for name, each in seconds.items()}


def cached(path: Path, made_from: Any, make: Callable[[], Any]) -> Any:
    """The result of `make`, kept in a JSON file and made anew when `made_from` changes."""
    made_from = json.loads(json.dumps(made_from))
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["made_from"] == made_from:
            return kept["value"]
    value = make()
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps({"made_from": made_from, "value": value}))
    beside.rename(path)
    return value


def markdown(columns: dict[str, dict[str, float]], real: dict[str, float]) -> str:
    """A table with a row for each figure, a column for each model, and a column for real images."""
    lines = [f"| | {' | '.join(MODELS.values())} | real images |", "|---" * (len(MODELS) + 2) + "|"]
    longest_first = sorted(columns.values(), key=len, reverse=True)  # reconstructions, which a GAN lacks, come first
    for figure in dict.fromkeys(figure for column in longest_first for figure in column):
        values = [column.get(figure) for column in columns.values()]
        there = [value for value in values if value is not None]
        best = min(there) if figure.startswith(LOWER_IS_BETTER) else max(there)
        bold = {best} if figure not in UNRANKED else set()
        cells = ["" if v is None else f"**{shown(v)}**" if v in bold else shown(v) for v in values]
        lines.append(f"| {figure} | {' | '.join(cells)} | {shown(real[figure]) if figure in real else ''} |")
    return "\n".join(lines)


def picture(drawn: dict[str, Drawn], held_out: ImageSet, folder: Path, device: torch.device) -> Image.Image:
    """Real images and each model's samples, one class per column; below, held-out images and their reconstructions."""
    columns = len(held_out.class_names) if 1 < len(held_out.class_names) <= 16 else 8
    wanted = classes_in_turn(ROWS * columns, range(len(held_out.class_names))).numpy()
    free = {c: iter(np.flatnonzero(held_out.class_ids == c)) for c in np.unique(wanted)}
    rows = np.array([next(free[c], -1) for c in wanted])  # -1 (a white square) if a class has too few images
    real = held_out.__getitems__(rows)[0]
    real[rows < 0] = 255
    panels = {"real images": real}
    for name, part in drawn.items():
        panels[MODELS[name]] = part.__getitems__(np.arange(min(len(part), ROWS * columns)))[0]
    x = held_out.__getitems__(np.linspace(0, len(held_out) - 1, columns, dtype=int))[0]
    lines = [x]
    for name in ("vqvae", "vqgan"):
        tokenizer = load_tokenizer(folder / name / "stage1")[0].to(device)
        lines.append(to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(x.to(device))))).cpu())
    panels["held-out images; below them what VQ-VAE and VQGAN make of them"] = torch.cat(lines)

    grids = [(title, image_grid(rearrange(p, "n c h w -> n h w c").numpy(), columns)) for title, p in panels.items()]
    font = ImageFont.load_default(18)
    width, height = grids[0][1].width, max(grid.height for _, grid in grids)
    canvas = Image.new("RGB", (2 * width + 3 * GAP, 3 * (height + 2 * GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, grid) in enumerate(grids):
        left, top = GAP + i % 2 * (width + GAP), GAP // 2 + i // 2 * (height + 2 * GAP)
        draw.text((left, top), title, "black", font)
        canvas.paste(grid, (left, top + GAP))
    return canvas.crop((0, 0, canvas.width, top + grids[-1][1].height + 2 * GAP))


if __name__ == "__main__":
    run_program(
        main,
        CompareConfig,
        {"data": DataConfig},
        "python stage2/compare.py [CONFIG.yaml] [key=value ...]",
    )
