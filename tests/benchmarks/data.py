"""Images per second of each kind of source, beside plain Pillow and other packages at the same work.

python tests/benchmarks/data.py [IMAGES]

The work is: from the files to uint8 squares of 64 pixels, in order. All kinds hold the same images, made up from smooth
noise: 64x64 PNG with transparency, and JPEG photos of 256 and 1024 pixels. Measured on one thread unless a line says
otherwise, in turn, several times; the table has medians, and the ratio to plain Pillow at the same files. The last
lines say what training eats: a forward and backward pass of two shipped tokenizers on one thread. Quiet machines only.
"""

import io
import itertools
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from vqgen.data.images import load_images
from vqgen.distributed import cores_per_process
from vqgen.errors import InputError

SIZE, ROUNDS = 64, 5


def picture(seed: int, side: int) -> Image.Image:
    """Smooth noise, which packs about as well as a photo."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side * 3 // 4 if side > SIZE else side), Image.Resampling.BICUBIC)


def encoded(kind: str, count: int) -> dict[str, bytes]:
    side = {"png": SIZE, "photo": 256, "large": 1024}[kind]
    files = {}
    for i in range(count):
        image, buffer = picture(i, side), io.BytesIO()
        if kind == "png":
            image.putalpha(Image.radial_gradient("L").resize(image.size))
        image.save(buffer, "PNG" if kind == "png" else "JPEG", quality=90)
        files[f"{'ab'[i % 2]}/{i:06}.{'png' if kind == 'png' else 'jpg'}"] = buffer.getvalue()
    return files


def plain(content: bytes | Path) -> np.ndarray:
    """What people write with Pillow alone."""
    image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC))


def write(root: Path, files: dict[str, bytes]) -> dict[str, str]:
    """The same images as each kind of source: {kind: source}."""
    for name, content in files.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(content)
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with tarfile.open(root / "images.tar", "w") as tar:
        for i, (name, content) in enumerate(files.items()):
            for extension, part in ((name.rpartition(".")[2], content), ("cls", b"%d" % (i % 2))):
                member = tarfile.TarInfo(f"{i:06}.{extension}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    sources = {"folder": "folder", "zip": "images.zip", "tar": "images.tar"}
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"bytes": content, "path": name} for name, content in files.items()]
        labels = [i % 2 for i in range(len(files))]
        pq.write_table(pa.table({"image": rows, "label": labels}), root / "images.parquet")
        sources["parquet"] = "images.parquet"
    except ImportError:
        print("parquet: not measured, as pyarrow is not installed")
    return {kind: str(root / name) for kind, name in sources.items()}


def ours(source: str) -> Callable[[], int]:
    """All images, decoded one by one as a `DataLoader`'s worker does."""
    sets = load_images(source, image_size=SIZE, cache_gb=0, channels=3)
    return lambda: sum(images.read(i) is not None for images in sets for i in range(len(images)))


def ours_into_memory(source: str) -> Callable[[], int]:
    return lambda: sum(len(images) for images in load_images(source, image_size=SIZE, cache_gb=8))


def others(sources: dict[str, str], files: dict[str, bytes]) -> Iterator[tuple[str, Callable[[], int]]]:
    """Plain Pillow, and the packages that are installed."""
    paths = [Path(sources["folder"]) / name for name in files]
    yield "Pillow alone, files", lambda: sum(plain(path) is not None for path in paths)
    try:
        import datasets

        datasets.disable_progress_bars()
        folder = datasets.load_dataset("imagefolder", data_dir=sources["folder"], split="train")
        yield "datasets, folder", lambda: sum(fit(row["image"]) is not None for row in folder)
        if "parquet" in sources:
            parquet = datasets.load_dataset("parquet", data_files=sources["parquet"], split="train")
            parquet = parquet.cast_column("image", datasets.Image())
            yield "datasets, parquet", lambda: sum(fit(row["image"]) is not None for row in parquet)
    except ImportError:
        print("datasets: not measured, as it is not installed")
    try:
        import webdataset

        def shards() -> int:
            samples = webdataset.WebDataset(sources["tar"], shardshuffle=False, empty_check=False)
            return sum(plain(sample.get("jpg") or sample["png"]) is not None for sample in samples)

        yield "webdataset, tar", shards
    except ImportError:
        print("webdataset: not measured, as it is not installed")


def fit(image: Image.Image) -> np.ndarray:
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC))


def speeds(work: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Median images per second of each, measured in turn."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            start = time.perf_counter()
            count = run()
            found[name].append(count / (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in found.items()}


def training_speed() -> Iterator[tuple[str, float]]:
    """Images per second that a training step of two shipped configurations eats, on random images."""
    from vqgen.settings import DataConfig
    from vqgen.tokenizers import build_tokenizer
    from vqgen.yaml_file import read_yaml

    for name in ("cifar10", "emoji64"):
        config = read_yaml(Path(__file__).parents[2] / f"configs/stage1/{name}.yaml")
        options = {**config.get("model", {}), "channels": 3}
        try:
            model = build_tokenizer(**options)
        except (InputError, TypeError):
            continue
        batch = config.get("train", {}).get("batch_size", 64)
        x = torch.rand(batch, 3, *DataConfig(**config["data"]).size) * 2 - 1

        def step(model: torch.nn.Module = model, x: torch.Tensor = x) -> int:
            x_rec, q = model(x)
            ((x_rec - x).square().mean() + sum(out.loss for out in q)).backward()
            return len(x)

        step()
        yield f"a step of configs/stage1/{name}.yaml", speeds({name: step})[name]


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    torch.set_num_threads(1)
    print("| images | source | images/s | times plain Pillow |\n| --- | --- | --- | --- |")
    for kind in ("png", "photo", "large"):
        with tempfile.TemporaryDirectory() as root:
            files = encoded(kind, count if kind == "png" else count // 4)
            sources = write(Path(root), files)
            work = dict(others(sources, files))
            work |= {f"vqgen, {name}": ours(source) for name, source in sources.items()}
            if kind == "png":
                work[f"vqgen, folder into memory, {cores_per_process()} threads"] = ours_into_memory(sources["folder"])
            found = speeds(work)
            for name, speed in found.items():
                print(f"| {kind} | {name} | {speed:,.0f} | {speed / found['Pillow alone, files']:.2f} |", flush=True)
    for name, speed in itertools.islice(training_speed(), 4):
        print(f"| | {name} | {speed:,.0f} | |", flush=True)


if __name__ == "__main__":
    main()
