"""Start-up time and memory with 1.28 million images, of one process and of eight.

python tests/benchmarks/index.py [shards|folder] [IMAGES] [FOLDER]

Makes the images up in FOLDER (tiny ones; 2.6 GB for the shards), and removes them again if it made the folder. Prints,
for the first start, which makes the index, and for a later one, which finds it: seconds until `load_images` returns,
seconds until the fingerprint is known, and the memory that a process has alone (USS) since before the first of both:
of the main process, and the most of any other. Quiet machines only.
"""

import io
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import psutil
import torch.distributed as dist
from PIL import Image

from vqgen.data.images import load_images

PER_SHARD, CLASSES = 1000, 1000


def tiny() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def make_shards(folder: Path, count: int) -> str:
    """Shards with an image and its class per sample."""
    image = tiny()
    for shard in range(count // PER_SHARD):
        with tarfile.open(folder / f"train-{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(PER_SHARD):
                number = shard * PER_SHARD + i
                for extension, content in (("jpg", image), ("cls", b"%d" % (number % CLASSES))):
                    member = tarfile.TarInfo(f"{number:08}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "train-*.tar")


def make_folder(folder: Path, count: int) -> str:
    """ImageNet's tree with links to few files, because a file system has no million inodes to spare."""
    per_file = 50_000
    (folder / "links").mkdir()
    for class_id in range(CLASSES):
        (folder / "train" / f"n{class_id:08}").mkdir(parents=True)
    for i in range(count):
        if i % per_file == 0:
            original = folder / "links" / f"{i}.bin"
            original.write_bytes(tiny())
        os.link(original, folder / "train" / f"n{i % CLASSES:08}" / f"{i:08}.JPEG")
    return str(folder / "train")


def rank_main(rank: int, world_size: int, source: str, folder: str) -> None:
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
    memory = psutil.Process().memory_full_info().uss
    start = time.perf_counter()
    train, held_out = load_images(source, image_size=8, cache_gb=0, channels=3)
    loaded = time.perf_counter() - start
    train.fingerprint  # noqa: B018  # computed here
    figures = {
        "images": len(train) + len(held_out),
        "loaded": loaded,
        "fingerprint": time.perf_counter() - start - loaded,
        "memory": psutil.Process().memory_full_info().uss - memory,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(figures))
    if world_size > 1:
        dist.barrier()
    os._exit(0)


def measure(world_size: int, source: str) -> dict[str, float]:
    """The slowest rank's seconds, the main process's memory and the most of any other."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=rank_main, args=(r, world_size, source, folder)) for r in range(world_size)]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join()
        found = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(world_size)]
    figures = {key: max(one[key] for one in found) for key in ("images", "loaded", "fingerprint")}
    return figures | {"memory": found[0]["memory"], "others": max((one["memory"] for one in found[1:]), default=0)}


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "shards"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 1_280_000
    root = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(tempfile.mkdtemp())
    keeps = root.exists() and len(sys.argv) > 3
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    try:
        images = root / kind
        if not images.exists():
            images.mkdir(parents=True)
            {"shards": make_shards, "folder": make_folder}[kind](images, count)
        source = str(images / "train-*.tar" if kind == "shards" else images / "train")
        if kind == "folder":
            time.sleep(3)  # a folder that has just changed is not trusted
        few = root / "few"
        if not few.exists():
            few.mkdir()
            for i in range(10):
                (few / f"{i}.jpg").write_bytes(tiny())
        print(f"{'':24} {'images':>10} {'load, s':>9} {'fingerprint, s':>15} {'main, MiB':>11} {'others, MiB':>12}")
        for label, world_size, where in (
            ("a few images", 1, str(few)),
            ("first start, 1 process", 1, source),
            ("later, 1 process", 1, source),
            ("later, 8 processes", 8, source),
        ):
            one = measure(world_size, where)
            print(
                f"{label:24} {one['images']:>10,} {one['loaded']:>9.1f} {one['fingerprint']:>15.1f} "
                f"{one['memory'] / 2**20:>11.0f} {one['others'] / 2**20:>12.0f}",
                flush=True,
            )
    finally:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"])
        if not keeps:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
