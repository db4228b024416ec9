"""The README.md of a trained model: what it is, what it was trained on and how to load it, and nothing untrue."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vqgen
from vqgen.data.describe import Description, listed_classes, shown_size

SHOWN_CLASSES = 100
GENERATOR = """from vqgen import Generator
generator = Generator.from_pretrained(".")  # the path of this folder
images = generator.sample(num_images=16)  # PIL images"""
TOKENIZER = """import torch
from vqgen import VQModel
tokenizer = VQModel.from_pretrained(".")  # the path of this folder
codes = tokenizer.encode(torch.zeros(1, {channels}, {height}, {width}))  # of images in [-1, 1]; decode() inverts it"""


def model_card(
    folder: Path,
    step: int,
    num_parameters: int,
    found: Description,
    figures: Mapping[str, float],
    started_from: str = "",
) -> str:
    """The text of a model's README.md.

    Args:
        folder: the model's folder, which has all its other files.
        step: updates so far.
        num_parameters: parameters of the model that was trained.
        found: the images.
        figures: the figures of this step's evaluation on held-out images, by name.
        started_from: the model whose weights the run started from; empty if it started from scratch.
    """
    size = f"{num_parameters / 1e6:.2f} M parameters"
    code = GENERATOR
    if (folder / "prior").is_dir():
        model_type = _config(folder / "prior")["model_type"]
        kind = f"An image generator of two stages. `prior/` is an autoregressive prior ({model_type}, {size}) over the "
        kind += f"codes of the tokenizer in `tokenizer/` ({_names(folder / 'tokenizer')})."
    elif (folder / "generator").is_dir():
        kind = f"The generator of a plain GAN (DCGAN, {size})."
    else:
        kind = f"An image tokenizer ({_names(folder)}, {size})."
        height, width = found.size
        code = TOKENIZER.format(channels=found.channels, height=height, width=width)
    colour = "grey" if found.channels == 1 else "RGB"
    counted = f" (counted among {found.train:,} of the images)" if found.stream and found.classes else ""
    amount = found.stream or f"{found.train:,}"
    facts = [
        f"Images: {colour}, {shown_size(found.image_size)} pixels; trained on {amount} images.",
        f"Classes: {listed_classes(found.classes, SHOWN_CLASSES)}{counted}.",
        f"Training: {step:,} steps, with vqgen {vqgen.__version__}.",
    ]
    if started_from:
        facts.append(f"Started from the weights of {started_from}.")
    if figures:
        facts.append(f"On held-out images: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}.")
    listed = "\n".join(f"- {fact}" for fact in facts)
    return f"---\nlibrary_name: vqgen\n---\n\n# A model of vqgen\n\n{kind}\n\n{listed}\n\n```python\n{code}\n```\n"


def _names(tokenizer: Path) -> str:
    config = _config(tokenizer)
    return f"architecture {config['name']}, quantizer {config['quantizer']['name']}"


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))
