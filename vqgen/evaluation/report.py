"""Reports: figures, each with its protocol; two reports compare only if their protocols are the same."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import vqgen
from vqgen.data.sources.index import user_cache_folder
from vqgen.errors import InputError, require
from vqgen.evaluation.features import FeatureNetwork, Features
from vqgen.evaluation.metrics import ClassProbe, confidence_score, frechet_distance, kernel_distance, manifold_figures

FORMAT = 1  # format of evaluation.json; it must change when the arithmetic of a figure changes
FILE = "evaluation.json"
SEED = 0  # seed of the random subsets that some figures average over

MEANINGS = {  # the table shows these beside the figures
    "psnr": "dB, of the pooled squared error",
    "psnr_per_image": "dB, mean over the images",
    "ssim": "1 is equal",
    "perceptual": "0 is equal",
    "usage": "share of the codes in use",
    "perplexity": "number of equally frequent codes with the same entropy",
    "code_entropy": "bits per code",
    "frechet": "0 is equal",
    "kernel": "0 is equal",
    "confidence": "higher means surer classes and more variety",
    "precision": "share of samples that look real",
    "recall": "share of the reference that samples cover",
    "density": "1 is as real as the reference",
    "coverage": "share of the reference with a sample nearby",
    "recognised": "share of samples recognised as their class",
    "nll_held_out": "nats per token, on held-out images",
    "nll_train": "nats per token, on training images",
    "unigram_entropy": "nats per token, from the codes' frequencies alone",
    "bigram_entropy": "nats per token, from the previous code alone",
    "code_bits_per_dim": "the codes' rate; not a likelihood of images",
    "bound_bits_per_dim": "bound on the images' likelihood, decoder included",
    "closer_in_pixels": "0.5: as near to training images as held-out images are; 1: copies",
    "near_copies": "share of samples nearer to a training image than the nearest 1 % of held-out images are",
    "closer_in_features": "0.5: as near to training images as held-out images are; 1: copies",
}


@dataclass
class Figure:
    """A number, with how it was made.

    Attributes:
        value: the number.
        meaning: the number's meaning, in words for the table.
        protocol: the conditions that must agree for two such numbers to be comparable.
        spread: standard deviation over subsets; None if the number is not a mean over subsets.
        floor: the same figure of real images that are not in the reference.
        floor_images: the number of those real images.
        value_at_floor: the figure from only `floor_images` images, if there are fewer real images and it matters.
        biased: whether there are too few images for the number to mean anything by itself.
    """

    value: float
    meaning: str
    protocol: dict[str, Any]
    spread: float | None = None
    floor: float | None = None
    floor_images: int | None = None
    value_at_floor: float | None = None
    biased: bool = False


@dataclass
class Report:
    """An evaluation: its figures and its subject.

    Attributes:
        kind: `tokenizer`, `samples` or `images`; two reports compare only if they have the same kind.
        subject: run, checkpoint, seed and sampling settings that were measured; two reports may differ in them.
        figures: figures by name.
        classes: figures of single classes, by class.
        warnings: lines that the reader should not miss.
        versions: versions of the libraries.
    """

    kind: str
    subject: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, value: float, protocol: Mapping[str, Any], name: str | None = None, **more: Any) -> None:
        """Adds a figure; `kind` is a key of MEANINGS, and also the figure's name unless `name` is given.

        Raises:
            InputError: the value is not a finite number, so the images or the model are at fault.
        """
        if not math.isfinite(value):
            raise InputError(f"{name or kind} is {value}: the images or the model hold something that is not a number")
        self.figures[name or kind] = Figure(value, MEANINGS[kind], dict(protocol), **more)

    def numbers(self) -> dict[str, float]:
        """The figures' values by name."""
        return {name: figure.value for name, figure in self.figures.items()}

    def save(self, folder: Path) -> Path:
        """Writes evaluation.json, completely or not at all."""
        names = ("torch", "torchmetrics", "transformers", "accelerate", "numpy", "pillow")
        self.versions = {"vqgen": vqgen.__version__, "python": platform.python_version()}
        self.versions |= {name: version(name) for name in names}
        beside = folder / f"{FILE}.{os.getpid()}.tmp"
        beside.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        return beside.rename(folder / FILE)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads an evaluation.json, given by its path, its folder or its run's folder.

        Raises:
            InputError: there is no such file, or another version wrote it.
        """
        places = [path, path / FILE, path / "evaluation" / FILE]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise InputError(f"{path}: no {FILE} there; run evaluate.py on it first")
        try:
            content = json.loads(found.read_text())
            written = content.pop("format")
            require(written == FORMAT, f"{found} has format {written}, but this version reads {FORMAT}; evaluate again")
            content["figures"] = {name: Figure(**figure) for name, figure in content["figures"].items()}
            return cls(**content)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{found} is not an evaluation ({error}); evaluate again") from error

    def table(self) -> str:
        """A table with a line for each figure, and the figures' protocols below."""
        width = max(map(len, self.figures)) + 2
        lines = [_listed(self.subject.items())]
        for name, figure in self.figures.items():
            value = shown(figure.value) + (f" ± {shown(figure.spread)}" if figure.spread is not None else "")
            meaning = figure.meaning
            if figure.floor is not None:
                meaning += f"; {figure.floor_images:,} real images reach {shown(figure.floor)}"
            if figure.value_at_floor is not None:
                meaning += f", as many of these {shown(figure.value_at_floor)}"
            if figure.biased:
                meaning += "; BIASED: no more images than features"
            lines.append(f"  {name:<{width}}{value:<20}{meaning}")
        protocols = [figure.protocol.items() for figure in self.figures.values()]
        shared = [item for item in protocols[0] if all(item in protocol for protocol in protocols)]
        lines.append("all: " + _listed(shared))
        made: dict[str, list[str]] = {}
        for name, figure in self.figures.items():
            made.setdefault(_listed([item for item in figure.protocol.items() if item not in shared]), []).append(name)
        lines += [f"{', '.join(names)}: {protocol}" for protocol, names in made.items() if protocol]
        if self.classes:
            names = list(next(iter(self.classes.values())))
            wide = max(map(len, self.classes)) + 2
            lines.append("  " + "class".ljust(wide) + "".join(name.ljust(18) for name in names))
            worst_first = sorted(
                self.classes.items(), key=lambda item: item[1][names[-1]], reverse=names[-1] == "perceptual"
            )
            lines += [
                "  " + label.ljust(wide) + "".join(shown(figures[name]).ljust(18) for name in names)
                for label, figures in worst_first[:20]
            ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def compare(first: Path, second: Path) -> str:
    """A table of two evaluations and their differences.

    Raises:
        InputError: one does not exist, or the two were not made alike; the message names the difference.
    """
    a, b = Report.load(first), Report.load(second)
    if a.kind != b.kind:
        raise InputError(f"{first} is an evaluation of {a.kind}, {second} of {b.kind}; these do not compare")
    common = [name for name in a.figures if name in b.figures]
    if not common:
        raise InputError(f"{first} and {second} have no figure in common; evaluate both with the same features=")
    lines = [f"{side}: {_listed(report.subject.items())}" for side, report in (("A", a), ("B", b))]
    lines.append(f"  {'':<26}{'A':>12}{'B':>12}{'B - A':>12}")
    for name in common:
        one, other = a.figures[name], b.figures[name]
        difference = f"{shown(other.value - one.value, sign='+'):>12}"
        for key in sorted(one.protocol.keys() | other.protocol.keys()):
            values = [_short(figure.protocol.get(key)) for figure in (one, other)]
            if one.protocol.get(key) == other.protocol.get(key):
                continue
            if key != "tokenizer":
                raise InputError(
                    f"{first} and {second} were not made alike: for {name}, {key} is {values[0]} in one and "
                    f"{values[1]} in the other; evaluate them the same way"
                )
            difference = "   does not compare: tokens of different tokenizers are different units"
        lines.append(f"  {name:<26}{shown(one.value):>12}{shown(other.value):>12}{difference}")
    for name in sorted((a.figures.keys() | b.figures.keys()) - set(common)):
        lines.append(f"  {name:<26}only in {'A' if name in a.figures else 'B'}")
    if a.versions != b.versions:
        other_versions = [f"{k} {a.versions.get(k)} and {v}" for k, v in b.versions.items() if a.versions.get(k) != v]
        lines.append("note: made with different versions: " + ", ".join(other_versions))
    return "\n".join(lines)


def floor_of(figure: Callable[[Features], float], real: Features | None) -> dict[str, Any]:
    """The floor of a figure, from the kept features of other real images, as keywords for `Report.add`."""
    return {} if real is None else {"floor": figure(real), "floor_images": len(real.kept)}


def network_protocol(network: FeatureNetwork) -> dict[str, Any]:
    """The part of a figure's protocol that describes the feature network."""
    return {"features": network.name, "checksum": network.checksum, "preprocessing": network.preprocessing}


def kept_protocol(images: Features, reference: Features) -> dict[str, Any]:
    """The part of a figure's protocol that gives the number of images whose own features are used."""
    return {"images_kept": len(images.kept), "reference_kept": len(reference.kept)}


def distances(
    report: Report,
    images: Features,
    reference: Features,
    network: FeatureNetwork,
    protocol: Mapping[str, Any],
    real: Features | None,
    prefix: str = "",
) -> None:
    """Adds the Frechet and the kernel distance between images and a reference, and says if the network distorts them.

    Args:
        report: the report to add them to.
        images: features of the measured images.
        reference: features of real images.
        network: the network that the features come from.
        protocol: the figures' protocol, without the network's part.
        real: features of other real images, whose distances are the floor.
        prefix: prefix of the figures' names: r for reconstructions, p for those from perturbed codes.
    """
    if isinstance(size := protocol.get("image_size"), list):  # every network makes a square map of an image
        warning = f"{network.name} sees the images, of {size[0]} x {size[1]} pixels, squeezed to squares"
        report.warnings += [] if warning in report.warnings else [warning]
    protocol = {**protocol, **network_protocol(network)}
    few = min(images.count.item(), reference.count.item()) <= len(images.total)
    floor: dict[str, Any] = {}
    if real is not None:
        floor = {"floor": frechet_distance(real, reference), "floor_images": real.count.item()}
        if len(real.kept) < len(images.kept):  # the distance grows as the number of images falls
            floor["value_at_floor"] = frechet_distance(images.some(len(real.kept)), reference)
    name = prefix + network.frechet_name
    report.add("frechet", frechet_distance(images, reference), protocol, name, biased=few, **floor)
    protocol = {**protocol, **kept_protocol(images, reference)}
    mean, deviation = kernel_distance(images, reference, SEED)
    floor = floor_of(lambda other: kernel_distance(other, reference, SEED)[0], real)
    report.add("kernel", mean, protocol, prefix + network.kernel_name, spread=deviation, **floor)


def sample_figures(
    report: Report,
    images: Features,
    reference: Features,
    network: FeatureNetwork,
    protocol: Mapping[str, Any],
    class_names: list[str],
    real: Features | None,
) -> None:
    """Adds the figures of samples: distances, confidence, precision, recall, density, coverage, recognised classes.

    Args:
        report: the report to add them to.
        images: features of the samples.
        reference: features of real images.
        network: the network that the features come from.
        protocol: the figures' protocol, without the network's part.
        class_names: the classes in the order of their ids, which both sets share; empty if there are none.
        real: features of other real images, whose figures are the floor.
    """
    distances(report, images, reference, network, protocol, real)
    protocol = {**protocol, **network_protocol(network), **kept_protocol(images, reference)}
    mean, deviation = confidence_score(images, SEED)
    enough = real if real is not None and len(real.kept) >= len(images.kept) else None  # fewer images score lower
    floor = floor_of(lambda other: confidence_score(other, SEED)[0], enough)
    report.add("confidence", mean, protocol, network.confidence_name, spread=deviation, **floor)
    count = min(len(images.kept), len(reference.kept))
    floors: dict[str, float] = {}
    if real is not None and len(real.kept) >= count:
        floors = manifold_figures(*_as_many(real, reference, count))
    for kind, value in manifold_figures(*_as_many(images, reference, count)).items():
        floor = {"floor": floors[kind], "floor_images": count} if floors else {}
        report.add(kind, value, {**protocol, "images_each": count}, **floor)
    if len(class_names) > 1 and (images.class_ids >= 0).any() and (reference.class_ids >= 0).any():
        probe = ClassProbe(reference, len(class_names))
        known = real if real is not None and (real.class_ids >= 0).any() else None
        report.add("recognised", probe.accuracy(images), protocol, **floor_of(probe.accuracy, known))


def check_varied(features: Features, name: str, channels: int) -> None:
    """Refuses image sets that cannot be measured.

    Raises:
        InputError: there are fewer than 2 images, they are all the same, or each has one flat colour.
    """
    count = features.count.item()
    if count < 2:
        raise InputError(f"{name}: only {count} image to measure with; give at least 2, better thousands")
    thumbnails = features.thumbnails.view(len(features.thumbnails), channels, -1)
    if (thumbnails.amax(dim=2) == thumbnails.amin(dim=2)).all():
        raise InputError(f"{name}: each of the {count} images has one flat colour; is this the right file?")
    if (thumbnails == thumbnails[:1]).all():
        raise InputError(f"{name}: all {count} images are the same; give different ones")


def cache_folder(config: Any) -> Path:
    """The folder where the features of references are kept.

    Raises:
        InputError: the folder cannot be written.
    """
    if config.cache_dir is not None:
        return writable_folder("cache_dir", Path(config.cache_dir))
    own = user_cache_folder()
    return writable_folder("cache_dir", own)


def writable_folder(key: str, path: Path) -> Path:
    """Makes a folder and tests that it can be written, before the long work whose results it will hold.

    Raises:
        InputError: the folder cannot be written; `key` is the setting that names another one.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / f".{os.getpid()}").touch()
        (path / f".{os.getpid()}").unlink()
    except OSError as error:
        raise InputError(f"{key}={path} cannot be written ({error.strerror}); name another folder") from error
    return path


def evaluation_device(tf32: bool = False) -> Accelerator:
    """The processes and the device to evaluate on: GPUs with float64 (Apple's have none), or the CPU.

    Convolutions use full float32, unless `tf32` asks for 10 mantissa bits in all products. Ampere's default, 10 bits in
    convolutions, changes a Frechet distance in its third digit.

    Raises:
        InputError: `tf32` is asked for, and there is no CUDA GPU.
    """
    require(not tf32 or torch.cuda.is_available(), "tf32=true: only a CUDA GPU has it, and none is here; leave it out")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return Accelerator(cpu=not torch.cuda.is_available())


def shown(value: float, sign: str = "") -> str:
    """A number in the format of the tables."""
    return f"{value:{sign}.4g}" if abs(value) < 1000 else f"{value:{sign},.0f}"


def _listed(items: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in items if value is not None)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _as_many(images: Features, reference: Features, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return images.some(count).kept, reference.some(count).kept
