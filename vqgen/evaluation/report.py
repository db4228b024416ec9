"""Figures with their provenance: how each was made, beside it; and two evaluations compared only if made alike."""

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
from vqgen.data.sources.listing import user_cache_folder
from vqgen.errors import InputError, require
from vqgen.evaluation.features import FeatureNetwork, Features
from vqgen.evaluation.metrics import ClassProbe, confidence_score, frechet_distance, kernel_distance, manifold_figures

FORMAT = 1  # of evaluation.json; a figure whose arithmetic changes makes it another
FILE = "evaluation.json"
SEED = 0  # of the subsets that some figures are means over

MEANINGS = {  # what the table says beside a figure
    "psnr": "dB, of the pooled squared error",
    "psnr_per_image": "dB, mean over the images",
    "ssim": "1 is equal",
    "perceptual": "0 is equal",
    "usage": "share of the codes in use",
    "perplexity": "codes, if all were as frequent",
    "code_entropy": "bits a code",
    "frechet": "0 is equal",
    "kernel": "0 is equal",
    "confidence": "higher is surer and more varied",
    "precision": "share of samples that look real",
    "recall": "share of the reference that samples cover",
    "density": "1 is as real as the reference",
    "coverage": "share of the reference with a sample near",
    "recognised": "share of samples recognised as their class",
    "nll_held_out": "nats a token, on held-out images",
    "nll_train": "nats a token, on training images",
    "unigram_entropy": "nats a token, knowing only how often each code comes",
    "bigram_entropy": "nats a token, knowing only the code before",
    "code_bits_per_dim": "the codes' rate; no likelihood of images",
    "bound_bits_per_dim": "bound on the images' likelihood, decoder included",
    "closer_in_pixels": "0.5: as near to training images as held-out ones; 1: copies",
    "near_copies": "share of samples nearer to a training image than 1 % of held-out ones are",
    "closer_in_features": "0.5: as near to training images as held-out ones; 1: copies",
}


@dataclass
class Figure:
    """A number and how it was made.

    Attributes:
        value: the number.
        meaning: what it says, for a reader of the table.
        protocol: what must be the same for two such numbers to be compared.
        spread: standard deviation, where it is a mean over subsets.
        floor: what real images reach that are not in the reference.
        floor_images: how many of those there were.
        value_at_floor: the number from as few images, where there were fewer real ones and it matters.
        biased: whether there are too few images for the number to be worth anything by itself.
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
    """An evaluation: its figures, and what they are of.

    Attributes:
        kind: `tokenizer`, `samples` or `images`; only the same kinds compare.
        subject: what was measured: run, checkpoint, seed, sampling settings. Two evaluations may differ in it.
        figures: by name.
        classes: figures of single classes.
        warnings: what the reader should not miss.
        versions: of the libraries.
    """

    kind: str
    subject: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, value: float, protocol: Mapping[str, Any], name: str | None = None, **more: Any) -> None:
        """Adds a figure, of one of the kinds in MEANINGS, which is also its name if it has no other.

        Raises:
            InputError: it is not a number, as then something is wrong with the images.
        """
        if not math.isfinite(value):
            raise InputError(f"{name or kind} is {value}: the images or the model hold something that is not a number")
        self.figures[name or kind] = Figure(value, MEANINGS[kind], dict(protocol), **more)

    def numbers(self) -> dict[str, float]:
        """The figures' values alone."""
        return {name: figure.value for name, figure in self.figures.items()}

    def save(self, folder: Path) -> Path:
        """Writes evaluation.json, whole or not at all."""
        names = ("torch", "torchmetrics", "transformers", "accelerate", "numpy", "pillow")
        self.versions = {"vqgen": vqgen.__version__, "python": platform.python_version()}
        self.versions |= {name: version(name) for name in names}
        beside = folder / f"{FILE}.{os.getpid()}.tmp"
        beside.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        return beside.rename(folder / FILE)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads an evaluation.json, or that of a run's folder.

        Raises:
            InputError: there is none, or it is from another version.
        """
        places = [path, path / FILE, path / "evaluation" / FILE]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise InputError(f"{path}: no {FILE} there; run evaluate.py on it first")
        try:
            content = json.loads(found.read_text())
            written = content.pop("format")
            require(written == FORMAT, f"{found} is of format {written}, now it is {FORMAT}; evaluate again")
            content["figures"] = {name: Figure(**figure) for name, figure in content["figures"].items()}
            return cls(**content)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{found} is no evaluation ({error}); evaluate again") from error

    def table(self) -> str:
        """The figures, a line each, and below them how they were made."""
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
        InputError: one is not there, or they were not made alike; the message names the field.
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
            difference = "   does not compare: a token of another tokenizer is another unit"
        lines.append(f"  {name:<26}{shown(one.value):>12}{shown(other.value):>12}{difference}")
    for name in sorted((a.figures.keys() | b.figures.keys()) - set(common)):
        lines.append(f"  {name:<26}only in {'A' if name in a.figures else 'B'}")
    if a.versions != b.versions:
        other_versions = [f"{k} {a.versions.get(k)} and {v}" for k, v in b.versions.items() if a.versions.get(k) != v]
        lines.append("note: made with different versions: " + ", ".join(other_versions))
    return "\n".join(lines)


def floor_of(figure: Callable[[Features], float], real: Features | None) -> dict[str, Any]:
    """A figure of the features that are kept of other real images, as `Report.add` takes it."""
    return {} if real is None else {"floor": figure(real), "floor_images": len(real.kept)}


def network_protocol(network: FeatureNetwork) -> dict[str, Any]:
    """What figures of a network's features depend on."""
    return {"features": network.name, "checksum": network.checksum, "preprocessing": network.preprocessing}


def kept_protocol(images: Features, reference: Features) -> dict[str, Any]:
    """How many images' own features a figure is of, where it is not of sums over all."""
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
    """Adds the Frechet and the kernel distance of images to a reference.

    Args:
        report: takes the figures.
        images: what is measured.
        reference: real images.
        network: that the features are of.
        protocol: of these figures, the network's apart.
        real: other real images, whose distance is the floor.
        prefix: of the figures' names: r for reconstructions.
    """
    protocol = {**protocol, **network_protocol(network)}
    few = min(images.count.item(), reference.count.item()) <= len(images.total)
    floor: dict[str, Any] = {}
    if real is not None:
        floor = {"floor": frechet_distance(real, reference), "floor_images": real.count.item()}
        if len(real.kept) < len(images.kept):  # the fewer images, the larger the distance
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
    """Adds what tells good samples: distances, confidence, precision and recall, and whether the classes are right.

    Args:
        report: takes the figures.
        images: the samples.
        reference: real images.
        network: that the features are of.
        protocol: of these figures, the network's apart.
        class_names: of the class ids, which are the same in both sets; empty if there are none.
        real: other real images, to compare the samples' figures with.
    """
    distances(report, images, reference, network, protocol, real)
    protocol = {**protocol, **network_protocol(network), **kept_protocol(images, reference)}
    mean, deviation = confidence_score(images, SEED)
    enough = real if real is not None and len(real.kept) >= len(images.kept) else None  # fewer would look less varied
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
    """Refuses sets that no figure can be made of.

    Raises:
        InputError: there are fewer than 2 images, they are all the same, or each is of one flat colour.
    """
    count = features.count.item()
    if count < 2:
        raise InputError(f"{name}: only {count} image to measure with; give at least 2, better some thousand")
    thumbnails = features.thumbnails.view(len(features.thumbnails), channels, -1)
    if (thumbnails.amax(dim=2) == thumbnails.amin(dim=2)).all():
        raise InputError(f"{name}: each of the {count} images is of one flat colour; is the file what it should be?")
    if (thumbnails == thumbnails[:1]).all():
        raise InputError(f"{name}: all {count} images are the same; give different ones")


def cache_folder(config: Any) -> Path:
    """Where the features of references are kept.

    Raises:
        InputError: it cannot be written.
    """
    if config.cache_dir is not None:
        return writable_folder("cache_dir", Path(config.cache_dir))
    own = user_cache_folder()
    return writable_folder("cache_dir", own)


def writable_folder(key: str, path: Path) -> Path:
    """Makes a folder, before anything long is done for what will lie in it.

    Raises:
        InputError: it cannot be written; `key` is the setting that names another.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / f".{os.getpid()}").touch()
        (path / f".{os.getpid()}").unlink()
    except OSError as error:
        raise InputError(f"{key}={path} cannot be written ({error.strerror}); name another folder") from error
    return path


def evaluation_device() -> Accelerator:
    """The processes and the device to evaluate on: GPUs with float64, which Apple's do not have, or the CPU.

    Convolutions are in full float32: with the 10 bits that are Ampere's default a Frechet distance moves in its third
    digit.
    """
    torch.backends.cudnn.allow_tf32 = False
    return Accelerator(cpu=not torch.cuda.is_available())


def shown(value: float, sign: str = "") -> str:
    """A number as a table shows it."""
    return f"{value:{sign}.4g}" if abs(value) < 1000 else f"{value:{sign},.0f}"


def _listed(items: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in items if value is not None)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _as_many(images: Features, reference: Features, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return images.some(count).kept, reference.some(count).kept
