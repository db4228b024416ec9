"""The token store: a data set, encoded once by the tokenizer, memory-mapped from disk."""

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

from vqgen.data.images import ImageSet
from vqgen.distributed import from_main, rank, world_size
from vqgen.errors import InputError
from vqgen.models.vqmodel import VQModel, from_uint8

logger = logging.getLogger("vqgen")

LEFT_OUT = -2  # the class id in the store of an image that did not load
ENCODED_AT_ONCE = 64


class TokenStore:
    """Token sequences with their class ids; a dataset of a `DataLoader` whose collate_fn returns its argument.

    Args:
        folder: holds tokens.npy (n, N), uint16 or uint32, and class_ids.npy (n,).
    """

    def __init__(self, folder: Path):
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        class_ids = np.load(folder / "class_ids.npy")
        self.rows = np.flatnonzero(class_ids != LEFT_OUT)
        self.class_ids = class_ids[self.rows]  # (n,) int64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) and class ids (B,), int64."""
        tokens = torch.from_numpy(self.tokens[self.rows[indices]].astype(np.int64))
        return tokens, torch.from_numpy(self.class_ids[indices])


def encode_images(
    images: ImageSet,
    model: VQModel,
    cache: Path,
    *,
    tokenizer_hash: str,
    mirror: bool,
    accelerator: Accelerator,
) -> TokenStore:
    """The images as tokens: from the store on disk if these very ones are there, else encoded now and kept.

    Args:
        images: what to encode.
        model: the tokenizer, on its device, in eval mode.
        cache: the folder that holds the stores.
        tokenizer_hash: identifies the tokenizer.
        mirror: store each image and its mirror image.
        accelerator: of the processes that share the work.
    """
    made_from = {"tokenizer": tokenizer_hash, "data": images.fingerprint, "mirror": mirror, **images.crop}
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder, beside = cache / key, cache / f"{key}.{from_main(os.getpid(), accelerator.device):.0f}.tmp"
    exists = bool(from_main(folder.exists(), accelerator.device))
    if not exists:
        layout = model.code_layout(images.image_size)
        count = len(images) * (2 if mirror else 1)
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            try:
                beside.mkdir(parents=True)
            except OSError as error:
                raise InputError(f"{cache} cannot be written ({error.strerror}); name another: codes_dir=") from error
            dtype = np.uint16 if layout.vocab_size <= 1 << 16 else np.uint32
            np.lib.format.open_memmap(beside / "tokens.npy", mode="w+", dtype=dtype, shape=(count, layout.num_tokens))
            np.lib.format.open_memmap(beside / "class_ids.npy", mode="w+", dtype=np.int64, shape=(count,))
            (beside / "made_from.json").write_text(json.dumps(made_from, indent=1))
        accelerator.wait_for_everyone()
        _encode_share(images, model, beside, mirror)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            left_out = int((np.load(beside / "class_ids.npy") == LEFT_OUT).sum())
            if left_out:
                logger.warning(f"left out {left_out} of {count} images that do not load")
            try:
                beside.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                shutil.rmtree(beside)  # another run has made the same store meanwhile
        accelerator.wait_for_everyone()
    return TokenStore(folder)


@torch.no_grad()
def _encode_share(images: ImageSet, model: VQModel, folder: Path, mirror: bool) -> None:
    """Encodes this process's stretch of the images; a mirror image's row is its image's plus their number."""
    tokens, class_ids = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("tokens", "class_ids"))
    layout, device = model.code_layout(images.image_size), next(model.parameters()).device
    stretch = np.array_split(np.arange(len(images)), world_size())[rank()]
    threads = max(1, min(8, (os.cpu_count() or 1) // world_size()))  # Pillow decodes without the interpreter's lock
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(stretch), desc="encoding", unit=" images", disable=None if rank() == 0 else True) as bar,
    ):
        for start in range(0, len(stretch), ENCODED_AT_ONCE):
            rows = stretch[start : start + ENCODED_AT_ONCE]
            read = zip(rows, pool.map(images.read, rows), strict=True)
            loaded = [(row, pixels) for row, pixels in read if pixels is not None]
            class_ids[rows] = LEFT_OUT
            if loaded:
                kept = np.array([row for row, _ in loaded])
                x = from_uint8(torch.from_numpy(np.stack([pixels for _, pixels in loaded])).to(device))
                for i, version in enumerate([x, x.flip(-1)] if mirror else [x]):
                    tokens[kept + i * len(images)] = layout.flatten(model.encode(version)).cpu().numpy()
                    class_ids[kept + i * len(images)] = images.class_ids[kept]
            if mirror:
                class_ids[rows + len(images)] = class_ids[rows]
            bar.update(len(rows))
    tokens.flush()
    class_ids.flush()
