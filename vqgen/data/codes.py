"""The token store: the tokens of a data set, which the tokenizer encodes once, memory-mapped from disk."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vqgen.codes import CodeLayout
from vqgen.data.crops import ENLARGED, Versions
from vqgen.data.images import MAX_THREADS, ImageSet
from vqgen.data.skipped import SkippedFile, read_skipped
from vqgen.data.stream import BEHIND, OrderedStream
from vqgen.distributed import cores_per_process, from_main, rank, world_size
from vqgen.errors import InputError
from vqgen.tokenizers.vqmodel import VQModel, from_uint8

logger = logging.getLogger("vqgen")

LEFT_OUT = -2  # the class id, on disk, of an image that did not load
ENCODED_AT_ONCE = BEHIND  # several threads read these


class TokenStore:
    """Token sequences with their class ids; a dataset for a `DataLoader` whose `collate_fn` returns its argument.

    Args:
        folder: has tokens.npy (n, N), uint16 or uint32, class_ids.npy (n,), and skipped.txt if images did not load.
        crops: number of versions of each image among the n, of which an epoch takes one; 1 if it takes all. Version v
            of an image comes v * n / crops after the first one.

    Raises:
        OSError, EOFError, ValueError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, crops: int = 1):
        self.crops = crops
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        class_ids = np.load(folder / "class_ids.npy")
        if len(class_ids) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} token sequences and {len(class_ids)} class ids")
        self.rows = np.flatnonzero(class_ids != LEFT_OUT)
        self.class_ids = class_ids[self.rows]  # (n,) int64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) and class ids (B,), int64."""
        tokens = torch.from_numpy(self.tokens[self.rows[indices]].astype(np.int64))
        return tokens, torch.from_numpy(self.class_ids[indices])


def encode_images(
    images: ImageSet | OrderedStream,
    model: VQModel,
    cache: Path,
    *,
    tokenizer_hash: str,
    mirror: bool,
    accelerator: Accelerator,
    skipped: Path | None = None,
    order: str = "raster",
    crops: int = 1,
) -> TokenStore:
    """The images as tokens: from the store on disk if it has them; otherwise encoded now, and stored.

    All processes must call it at the same point; they share the work.

    Args:
        images: the images to encode.
        model: the tokenizer, on its device, in eval mode.
        cache: the folder of all stores.
        tokenizer_hash: identifies the tokenizer.
        mirror: whether to store each image and its mirror image.
        accelerator: Accelerate's handle on the processes that share the work.
        skipped: the file that lists the images that do not load, now or when the store was made; see `SkippedFile`.
        order: name of the order of the codes in a sequence; see `CodeLayout`.
        crops: versions of each image to store, of which an epoch takes one: see `Versions`. 1 stores the image, and
            its mirror image with `mirror`; an epoch takes both.

    Raises:
        InputError: the store or that file cannot be written, or no image loads.
    """
    versions = Versions(images, crops, mirror)
    made_from = {"tokenizer": tokenizer_hash, "data": images.fingerprint, "mirror": versions.mirror, **images.crop}
    made_from |= {"order": order} if order != "raster" else {}  # older versions had no other order
    made_from |= {"crops": crops, "enlarged": ENLARGED} if crops > 1 else {}  # nor crops
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder, beside = cache / key, cache / f"{key}.{from_main(os.getpid(), accelerator.device):.0f}.tmp"
    layout = dataclasses.replace(model.code_layout(images.image_size), order=order)
    exists = bool(from_main(accelerator.is_main_process and _is_whole(folder), accelerator.device))
    if not exists:
        try:
            if accelerator.is_main_process:
                count = len(images) * len(versions)
                dtype = np.uint16 if layout.vocab_size <= 1 << 16 else np.uint32
                if crops > 1:
                    size = count * layout.num_tokens * np.dtype(dtype).itemsize / 2**20
                    print(
                        f"encoding {len(images):,} images in {crops} crops each, which takes {crops} times as long as "
                        f"one crop, and {size:,.0f} MiB in {folder}"
                    )
                try:
                    if folder.exists():  # removes a damaged store
                        shutil.rmtree(folder)
                    shutil.rmtree(beside, ignore_errors=True)
                    beside.mkdir(parents=True)
                    _reserve(beside / "tokens.npy", dtype, (count, layout.num_tokens))
                    _reserve(beside / "class_ids.npy", np.int64, (count,))
                    (beside / "made_from.json").write_text(json.dumps(made_from, indent=1))
                except OSError as error:
                    raise InputError(
                        f"{cache} cannot be written ({error.strerror}); name another: codes_dir="
                    ) from error
            accelerator.wait_for_everyone()
            images.report_skipped(beside / "skipped.txt")
            _encode_share(versions, model, layout, beside)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                left_out = int((np.load(beside / "class_ids.npy")[: len(images)] == LEFT_OUT).sum())
                if left_out:
                    logger.warning(f"left out {left_out} of {len(images)} images that do not load")
                try:
                    beside.rename(folder)
                except OSError:
                    if not folder.exists():
                        raise
                    shutil.rmtree(beside)  # another run has made the same store in the meantime
        except BaseException:
            if accelerator.is_main_process:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        accelerator.wait_for_everyone()
    if skipped is not None and accelerator.is_main_process:
        try:
            SkippedFile(skipped).add(read_skipped(folder / "skipped.txt"))
        except OSError as error:
            raise InputError(f"{skipped} cannot be written ({error.strerror}); make room, or name another") from error
    store = TokenStore(folder, crops)
    if len(store) == 0:
        raise InputError(f"none of {len(images)} images loads; repair them or give others")
    return store


def _is_whole(folder: Path) -> bool:
    """Whether a store exists and loads."""
    try:
        TokenStore(folder)
    except (OSError, EOFError, ValueError) as error:
        if folder.exists():
            logger.warning(f"{folder} does not load ({error}); encoding the images again")
        return False
    return True


def _reserve(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """Makes an array's file and reserves its space, because writing to a map on a full disk would kill the process.

    Raises:
        OSError: the disk has too little space.
    """
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on a Mac
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system cannot reserve space
                    raise


@torch.no_grad()
def _encode_share(versions: Versions, model: VQModel, layout: CodeLayout, folder: Path) -> None:
    """Encodes this process's share of the images. Version v of row i is row i + v * len(images)."""
    images = versions.images
    tokens, class_ids = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("tokens", "class_ids"))
    device = next(model.parameters()).device
    share = np.array_split(np.arange(len(images)), world_size())[rank()]
    threads = min(MAX_THREADS, cores_per_process())  # Pillow decodes without the interpreter's lock
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(share), desc="encoding", unit=" images", disable=None if rank() == 0 else True) as bar,
    ):
        for start in range(0, len(share), ENCODED_AT_ONCE):
            rows = share[start : start + ENCODED_AT_ONCE]
            read = zip(rows, pool.map(versions.read, rows), strict=True)
            loaded = [(row, pixels) for row, pixels in read if pixels is not None]
            kept = np.array([row for row, _ in loaded], dtype=int)
            for v in range(len(versions)):
                class_ids[rows + v * len(images)] = LEFT_OUT
                if loaded:
                    x = from_uint8(torch.from_numpy(np.stack([pixels[v] for _, pixels in loaded])).to(device))
                    tokens[kept + v * len(images)] = layout.flatten(model.encode(x)).cpu().numpy()
                    class_ids[kept + v * len(images)] = images.class_ids[kept]
            bar.update(len(rows))
    tokens.flush()
    class_ids.flush()
