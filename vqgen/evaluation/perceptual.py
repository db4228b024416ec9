"""The perceptual distance of two images: LPIPS, in its shift-tolerant form (Ghildyal and Liu 2022) or the original."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from vqgen.errors import InputError
from vqgen.evaluation.weights import fetched_file, installed_file, read_weights

ST_FOLDER = "weights/vST0.0"
SHIFT_TOLERANT = {  # name: file in the package stlpips_pytorch, and its SHA-256
    "alex": ("alex_shift_tolerant.pth", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"),
    "vgg": ("vgg_shift_tolerant.pth", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"),
}
VGG16_URL, VGG16_SHA256 = "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"  # torchvision's
HEADS = {  # package: the file of LPIPS 0.1's linear heads for VGG16 in it, the same file in both
    "lpips": "weights/v0.1/vgg.pth",
    "torchmetrics": "functional/image/lpips_models/vgg.pth",
}
HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
PERCEPTUAL = (*SHIFT_TOLERANT, "lpips-vgg")
REMEDY = "pip install 'vqgen[perceptual]', or set name=none"
SMALLEST = 24  # pixels; the trunks pad by reflection, which fails for images below 21 pixels


class PerceptualDistance(nn.Module):
    """Distance between images by the activations of an ImageNet classifier (LPIPS, Zhang et al. 2018, eq. 1).

    The weights are frozen, but gradients reach the images. The classifier computes in bf16 under bf16 autocast, else in
    float32; what it sees is always compared in float32.

    Args:
        name: `alex` or `vgg`, the shift-tolerant AlexNet and VGG16 (Ghildyal and Liu 2022) with the weights in the
            package stlpips-pytorch; or `lpips-vgg`, the original on torchvision's VGG16, which is fetched once, with
            the linear heads in the package lpips or torchmetrics.
        weights: files to take the weights from instead: for `alex` and `vgg` one file in that package's layout; for
            `lpips-vgg` two files, torchvision's vgg16 and LPIPS's linear heads.

    Attributes:
        checksum: SHA-256 of the files of weights.

    Raises:
        InputError: no network has this name, or its weights are missing or belong to another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str = "alex", weights: Sequence[str] = ()):
        super().__init__()
        self.name = name
        state, self.checksum = _weights_of(name, weights)
        self._build()
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"name={name}: its weights belong to another network: {reason}") from error

    def _build(self) -> None:
        """Makes the layers, with random weights in the trunk and zeros in the heads."""
        stages = _alexnet() if self.name == "alex" else _vgg16(shift_tolerant=self.name == "vgg")
        self.trunk = nn.ModuleList(nn.Sequential(OrderedDict((str(i), m) for i, m in s.items())) for s in stages)
        widths = [64, 192, 384, 256, 256] if self.name == "alex" else [64, 128, 256, 512, 512]
        self.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in widths)
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Keeps the network in eval mode, whatever the mode."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of images x and y (B, C, H, W) in [-1, 1], grey or RGB; 0 means no difference."""
        kind = x.device.type
        bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):  # never fp16, in which the gradients would be 0
            x, y = self._normalised(x), self._normalised(y)
            distance = torch.zeros(len(x), device=x.device)
            for stage, head in zip(self.trunk, self.heads, strict=True):
                x, y = stage(x), stage(y)  # two calls, so that an image without a gradient costs no backward pass
                distance = distance + _compared(x, y, head)
            return distance

    def _normalised(self, x: Tensor) -> Tensor:
        """Prepares images (B, C, H, W) in [-1, 1] for the trunk: three channels, normalised, large enough."""
        x = x.float()
        if min(x.shape[2:]) < SMALLEST:
            x = F.interpolate(x, size=[max(side, SMALLEST) for side in x.shape[2:]], mode="bilinear", antialias=True)
        return (x.expand(-1, 3, -1, -1) - self.shift) / self.scale


def _weights_of(name: str, files: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """The state of the network with this name, from these files or as it is published; the files' SHA-256."""
    if name in SHIFT_TOLERANT:
        if len(files) > 1:
            raise InputError(f"name={name} takes one file of weights, not {len(files)}")
        if files:
            state, checksum = _given_weights(files[0])
        else:
            file, expected = SHIFT_TOLERANT[name]
            path = installed_file("stlpips_pytorch", f"{ST_FOLDER}/{file}", REMEDY)
            state, checksum = read_weights(path, expected)
        return {_own_name(key): value for key, value in state.items()}, checksum
    if name != "lpips-vgg":
        raise InputError(f"name={name} is not known; use {', '.join(PERCEPTUAL)} or none")
    if len(files) not in (0, 2):
        two = "has two files of weights, torchvision's and LPIPS's"
        raise InputError(f"name=lpips-vgg {two}; give weights=[VGG16.pth,HEADS.pth], or leave them out")
    (trunk, first), (heads, second) = map(_given_weights, files) if files else _published_lpips()
    place = {str(i): stage for stage, layers in enumerate(_vgg16(shift_tolerant=False)) for i in layers}
    kept = {key: value for key, value in trunk.items() if key.startswith("features.")}
    state = {f"trunk.{place.get(key.split('.')[1])}.{key[9:]}": value for key, value in kept.items()}
    state |= {_own_name(key): value for key, value in heads.items()}
    state |= {"shift": _column(-0.030, -0.088, -0.188), "scale": _column(0.458, 0.448, 0.450)}  # LPIPS's own
    return state, f"{first}+{second}"


def _given_weights(path: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file in the option `weights`, and its SHA-256."""
    try:
        return read_weights(Path(path), None)
    except InputError as error:
        raise InputError(f"weights={error}") from error.__cause__


def _published_lpips() -> tuple[tuple[dict[str, Tensor], str], tuple[dict[str, Tensor], str]]:
    """The tensors of torchvision's VGG16 and of LPIPS's heads for it, each with its file's SHA-256."""
    package = next((name for name in HEADS if find_spec(name)), "torchmetrics")
    heads = installed_file(package, HEADS[package], "pip install 'vqgen[evaluation]', or set name=none")
    trunk = fetched_file(VGG16_URL, VGG16_SHA256, "name=lpips-vgg", "or set name=none")
    return read_weights(trunk, VGG16_SHA256), read_weights(heads, HEADS_SHA256)


class BlurPool(nn.Module):
    """Halves the resolution after a 1-2-1 filter (Zhang 2019), with the wide padding of the shift-tolerant networks."""

    filt: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, floor((H + 1) / 2) + 1, floor((W + 1) / 2) + 1)."""
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


# The trunks are stages of layers, with the layers' numbers in the files of weights. The square root in `_directions`
# has no finite gradient at 0, but it is 0 only if all activations of a position are, and there ReLU passes no gradient.


def _compared(x: Tensor, y: Tensor, head: Tensor) -> Tensor:
    """Distances (B,) of a stage's activations (B, C, H, W), in float32: LPIPS, eq. 1, with w^2 = head (1, C, 1, 1)."""
    difference = _directions(x.float()) - _directions(y.float())
    return reduce(difference.square() * head, "b c h w -> b h w", "sum").mean(dim=(1, 2))


def _directions(x: Tensor) -> Tensor:
    """Scales the activations (B, C, H, W) at each position to a vector of length 1."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _alexnet() -> list[dict[int, nn.Module]]:
    return [
        {0: nn.Conv2d(3, 64, 11, padding=2), 1: BlurPool(64), 2: nn.ReLU()},
        {3: nn.MaxPool2d(3, 1), 4: BlurPool(64), 5: nn.Conv2d(64, 192, 5, padding=2), 6: nn.ReLU()},
        {7: nn.MaxPool2d(3, 1), 8: BlurPool(192), 9: nn.Conv2d(192, 384, 3, padding=1), 10: nn.ReLU()},
        {11: nn.Conv2d(384, 256, 3, padding=1), 12: nn.ReLU()},
        {13: nn.Conv2d(256, 256, 3, padding=1), 14: nn.ReLU()},
    ]


def _vgg16(shift_tolerant: bool) -> list[dict[int, nn.Module]]:
    stages: list[dict[int, nn.Module]] = []
    channels, i = 3, 0
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers: list[nn.Module] = []
        if stages:
            layers += [nn.MaxPool2d(2, 1), BlurPool(channels)] if shift_tolerant else [nn.MaxPool2d(2)]
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        stages.append(dict(enumerate(layers, start=i)))
        i += len(layers)
    return stages


def _own_name(key: str) -> str:
    """The name here of a parameter, from its name in the files of stlpips-pytorch and LPIPS."""
    key = re.sub(r"^net\.slice(\d)\.", lambda match: f"trunk.{int(match[1]) - 1}.", key)
    return re.sub(r"^lin(\d)\.model\.1\.weight$", r"heads.\1", key).removeprefix("scaling_layer.")


def _column(*values: float) -> Any:
    return rearrange(torch.tensor(values), "c -> 1 c 1 1")
