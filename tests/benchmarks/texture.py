"""What a tokenizer draws on flat areas: flat colours, gradients and sharp edges through it, as figures and pictures.

python tests/benchmarks/texture.py RUN... [SAMPLES.npz ...] [out=runs/texture] [size=PIXELS]

RUN is a stage-1 run, a stage-2 run or a folder with a model, which has no images of its own and needs size=. Each RUN
gets OUT/NAME.png: inputs, below them their reconstructions, below these the differences without their mean, 8 times as
strong, around grey.
Figures are in grey levels of 0 to 255 and leave out one code along the borders of the synthetic images:

- uneven: RMS of the deviation of a flat colour's reconstruction from its own mean colour.
- woven: the part of the error that repeats in each cell of N x N pixels: the root of the mean product of the errors of
  two cells, after each cell's mean is taken away. 0 for noise, and all of the unevenness for a regular weave.
- blockiness: jumps between two pixels on both sides of a cell's border, relative to those inside cells, where a jump is
  the part of the difference that the slopes beside it do not explain. 1 for images without blocks.
- flattest: RMS deviation from their means of the quarter of all cells that are flattest. 0 for images with flat areas.

SAMPLES.npz, of stage2/sample.py, has only the last two figures, with the cells of the first RUN.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from vqgen.cli.runs import run_images
from vqgen.codes import sides
from vqgen.data.images import some_rows
from vqgen.data.samples import load_samples
from vqgen.errors import InputError, require
from vqgen.tokenizers.vqmodel import VQModel, from_uint8, load_tokenizer, to_uint8
from vqgen.training.tracking import image_grid

DIRECTIONS = [(0, 1), (1, 0), (1, 1), (-1, 1)]  # y and x of the way across an edge
PAIRS = [((0, 0, 0), (255, 255, 255)), ((220, 40, 40), (40, 200, 220)), ((250, 220, 60), (60, 60, 200))]
HELD_OUT = 500  # images at most
BATCH = 64


def flat_colours(channels: int, size: tuple[int, int]) -> Tensor:
    """Flat images uint8 (N, C, H, W): each of three levels in each channel, or nine levels of grey."""
    levels = [0, 128, 255] if channels == 3 else [0, 32, 64, 96, 128, 160, 192, 224, 255]
    colours = torch.tensor(list(itertools.product(levels, repeat=channels)), dtype=torch.uint8)
    return repeat(colours, "n c -> n c h w", h=size[0], w=size[1])


def along(direction: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """How far each pixel (H, W) is along a direction, from 0 to 1."""
    y, x = (torch.linspace(-1, 1, side) for side in size)
    place = direction[0] * y[:, None] + direction[1] * x[None, :]
    return (place - place.min()) / (place.max() - place.min())


def between(channels: int, places: Tensor) -> Tensor:
    """Images uint8 (N, C, H, W) from each colour of a pair, where a place (H, W) is 0, to the other, where it is 1."""
    ends = torch.tensor(PAIRS, dtype=torch.float)[..., :channels]  # (pairs, 2, C)
    start, end = ends[:, 0, :, None, None], ends[:, 1, :, None, None]
    return (
        rearrange(torch.stack([start + (end - start) * p for p in places]), "d n c h w -> (n d) c h w").round().byte()
    )


def gradients(channels: int, size: tuple[int, int]) -> Tensor:
    """Linear gradients uint8 (N, C, H, W) in four directions between pairs of colours."""
    return between(channels, torch.stack([along(direction, size) for direction in DIRECTIONS]))


def edges(channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sharp edges uint8 (N, C, H, W) in the same directions, and how many pixels from the edge each pixel is."""
    sharp, distances = [], []
    for direction in DIRECTIONS:
        y, x = (torch.arange(side) + 0.5 - side / 2 for side in size)
        # 2.5 pixels beside the centre, where most grids of cells have a border
        distance = (direction[0] * y[:, None] + direction[1] * x[None, :]) / math.hypot(*direction) - 2.5
        sharp.append((distance > 0).float())
        distances.append(distance.abs())
    return between(channels, torch.stack(sharp)), torch.stack(distances * len(PAIRS))[:, None]  # (N, 1, H, W)


def cells_of(images: Tensor, period: int) -> Tensor:
    """Cuts images (N, C, H, W) into cells of period x period pixels, each minus its mean: (N, C, cells, pixels)."""
    cells = rearrange(images, "n c (h p) (w q) -> n c (h w) (p q)", p=period, q=period)
    return cells - cells.mean(dim=3, keepdim=True)


def woven(errors: Tensor, period: int) -> float:
    """RMS of the part of errors (N, C, H, W) that is the same in all cells of an image, without bias by noise."""
    cells = cells_of(errors, period)
    count = cells.shape[2]
    power = (count * cells.mean(dim=2).square() - cells.square().mean(dim=2)) / (count - 1)
    return power.mean().clamp_min(0).sqrt().item()


def uneven(errors: Tensor) -> float:
    """RMS deviation of each image's errors (N, C, H, W) from their mean."""
    return errors.std(dim=(2, 3), correction=0).square().mean().sqrt().item()


def blockiness(images: Tensor, period: int) -> float:
    """Jumps in images (N, C, H, W) across the borders of cells, relative to jumps inside them."""
    across = inside = 0.0
    for turned in (images, images.mT):
        steps = turned.diff(dim=3)
        jumps = (steps[..., 1:-1] - (steps[..., :-2] + steps[..., 2:]) / 2).abs().mean(dim=(0, 1, 2)).double()
        at_border = torch.arange(2, 2 + len(jumps)) % period == 0  # jump i is between pixels i + 1 and i + 2
        across += jumps[at_border].mean().item()
        inside += jumps[~at_border].mean().item()
    return across / inside if inside else math.nan


def flattest(images: Tensor, period: int) -> float:
    """RMS deviation from their means of the quarter of all cells, of images (N, C, H, W), that are flattest."""
    power = cells_of(images, period).square().mean(dim=(1, 3)).flatten()
    return power.sort().values[: math.ceil(len(power) / 4)].mean().sqrt().item()


def periods(stride: int) -> list[int]:
    """The sides of cells in which a weave may repeat: the stride, and its halves."""
    return [stride >> i for i in range(stride.bit_length()) if stride >> i > 1 and stride % (1 << i) == 0]


@torch.no_grad()
def reconstructed(model: VQModel, images: Tensor) -> Tensor:
    """The reconstructions of images uint8 (N, C, H, W), in the same form."""
    return torch.cat([to_uint8(model.decode(model.encode(from_uint8(x)))) for x in images.split(BATCH)])


def of_synthetic(model: VQModel, size: tuple[int, int], path: Path) -> Iterator[tuple[str, float]]:
    """The figures of flat colours, gradients and edges by name; writes the picture."""
    border = model.stride
    require(min(size) >= 4 * border, f"images of {size[0]} x {size[1]} pixels have less than 4 x 4 codes")
    sharp, distance = edges(model.channels, size)
    parts = {"flat": flat_colours(model.channels, size), "gradient": gradients(model.channels, size), "edge": sharp}
    found = {name: reconstructed(model, images) for name, images in parts.items()}
    inner = (..., slice(border, -border), slice(border, -border))
    errors = {name: found[name][inner].float() - parts[name][inner].float() for name in parts}
    yield "flat: colour is off by", errors["flat"].mean(dim=(2, 3)).abs().mean().item()
    yield "flat: uneven", uneven(errors["flat"])
    for name in ("flat", "gradient"):
        for period in periods(model.stride):
            yield f"{name}: woven, {period} px", woven(errors[name], period)
    yield "gradient: RMS error", errors["gradient"].square().mean().sqrt().item()
    squares, far = errors["edge"].square().mean(dim=1, keepdim=True), distance[inner] > model.stride
    yield "edge: RMS error within a code", squares[~far].mean().sqrt().item()
    yield "edge: RMS error farther away", squares[far].mean().sqrt().item()
    picture(parts, found, path)


def picture(parts: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Writes 8 flat colours, 4 gradients and 4 edges above their reconstructions and the differences."""
    varied = [0, 5, 10, 3]  # another direction each, and all pairs of colours
    rows = {"flat": np.linspace(0, len(parts["flat"]) - 1, 8, dtype=int), "gradient": varied, "edge": varied}
    x, x_rec = (torch.cat([images[name][rows[name]] for name in rows]) for images in (parts, found))
    difference = x_rec.float() - x.float()
    difference = (128 + 8 * (difference - difference.mean(dim=(2, 3), keepdim=True))).clamp(0, 255).byte()
    lines = torch.cat(
        [line for three in zip(*(i.split(8) for i in (x, x_rec, difference)), strict=True) for line in three]
    )
    larger = max(1, 192 // lines.shape[3])
    tiles = repeat(lines, "n c h w -> n (h i) (w j) c", i=larger, j=larger)
    image_grid(tiles.numpy(), columns=8, gap=6).save(path)


def of_images(images: Tensor, stride: int) -> Iterator[tuple[str, float]]:
    """The figures by name of any images uint8 (N, C, H, W)."""
    for period in periods(stride):
        yield f"images: blockiness, {period} px", blockiness(images.float(), period)
    yield "images: flattest", flattest(images.float(), stride)


def table(columns: dict[str, dict[str, float]]) -> str:
    """The figures, a line each, of all columns."""
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = [f"{figures[name]:.2f}" if name in figures else "" for figures in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(places: list[str], out: Path, size: str | None) -> None:
    runs, samples = ([p for p in places if p.endswith(".npz") == is_file] for is_file in (False, True))
    require(bool(runs), "name a run, or a folder with a tokenizer")
    require(size is None or size.isdecimal(), f"size={size}: must be a number of pixels")
    out.mkdir(parents=True, exist_ok=True)
    columns: dict[str, dict[str, float]] = {}
    for run in runs:
        model, _ = load_tokenizer(Path(run))
        own = (Path(run) / "config.yaml").is_file()
        require(own or size is not None, f"{run} does not say how large its images are; give size=")
        held_out = run_images(Path(run), {}, model.channels)[1] if own else None
        shape = sides(int(size)) if size else sides(held_out.image_size)
        model.code_layout(shape)  # raises if the stride does not divide the size
        name = Path(run).as_posix().strip("/.").replace("/", "_")
        columns[run] = dict(of_synthetic(model, shape, out / f"{name}.png"))
        if held_out is not None:
            x = held_out.__getitems__(some_rows(len(held_out), HELD_OUT))[0]
            columns[f"{run}: originals"] = dict(of_images(x, model.stride))
            columns[run] |= dict(of_images(reconstructed(model, x), model.stride))
    stride = load_tokenizer(Path(runs[0]))[0].stride
    for path in samples:
        columns[path] = dict(
            of_images(rearrange(torch.from_numpy(load_samples(Path(path))[0]), "n h w c -> n c h w"), stride)
        )
    print(table(columns))
    print(f"pictures: {out}")


if __name__ == "__main__":
    words = sys.argv[1:]
    own = [word for word in words if word.startswith(("out=", "size="))]
    options = {"out": "runs/texture", **dict(word.split("=", 1) for word in own)}
    try:
        main([word for word in words if word not in own], Path(options["out"]), options.get("size"))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
