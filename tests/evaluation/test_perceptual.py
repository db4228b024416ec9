"""The perceptual distance against the values of its weights' package, and as a loss."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from data.server import serving
from torch import Tensor

from vqgen.errors import InputError
from vqgen.evaluation import perceptual, weights
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.evaluation.weights import installed_file

# Values of stlpips_pytorch 0.0.2's own code on `pair`, measured with its missing imports stubbed out.
GOLDEN = {
    ("alex", 64): [0.09155569970607758, 0.31524330377578735],
    ("vgg", 64): [0.3151978552341461, 0.37007057666778564],
    ("alex", 28): [0.2629937529563904, 0.44688138365745544],
    ("vgg", 28): [0.3233867883682251, 0.368574321269989],
}


def pair(size: int) -> tuple[Tensor, Tensor]:
    """Two pairs of images (2, 3, size, size) made of ramps."""
    ramp = torch.linspace(-1, 1, 64)
    x = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp[:, None] * ramp])[None]
    y = x.roll(3, 3) * 0.8
    x, y = x[..., :size, :size], y[..., :size, :size]
    return torch.cat([x, y.flip(1)]), torch.cat([y, x])


def torchvisions_vgg16() -> dict[str, Tensor]:
    """Random weights that keep the activations' size, in the names of torchvision's vgg16."""
    generator = torch.Generator().manual_seed(0)
    trunk, number, channels = {"classifier.0.weight": torch.zeros(1)}, 0, 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            number += 1
            continue
        std = (2 / (9 * channels)) ** 0.5
        trunk[f"features.{number}.weight"] = std * torch.randn(width, channels, 3, 3, generator=generator)
        trunk[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
        number, channels = number + 2, width
    return trunk


@pytest.fixture(scope="module")
def alex() -> PerceptualDistance:
    return PerceptualDistance()


@pytest.mark.parametrize(("name", "size"), GOLDEN)
def test_it_gives_the_values_of_the_package_that_the_weights_are_from(name, size):
    assert PerceptualDistance(name)(*pair(size)).tolist() == pytest.approx(GOLDEN[name, size], rel=1e-5)


def test_equal_images_are_at_distance_0_and_the_order_of_a_pair_does_not_matter(alex):
    x, y = pair(32)
    assert alex(x, x).tolist() == [0, 0]
    assert torch.allclose(alex(x, y), alex(y, x))


def test_grey_is_the_same_in_one_channel_as_in_three(alex):
    x, y = (image[:, :1] for image in pair(28))
    assert torch.equal(alex(x, y), alex(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("size", [8, 16, 24])
def test_smaller_images_work_too(alex, size):
    x, y = pair(size)
    assert (alex(x, y) > 0).all()


def test_more_noise_is_further_away(alex):
    x, noise = pair(64)[0], torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    distances = [alex(x, (x + level * noise).clamp(-1, 1)).mean().item() for level in (0.02, 0.1, 0.3)]
    assert distances == sorted(distances)


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_reach_the_images_and_not_the_weights(alex, flat):
    x, y = (torch.zeros(2, 3, 32, 32) if flat else image for image in pair(32))
    x = x.clone().requires_grad_()
    alex.train()(x, y).sum().backward()
    assert x.grad.isfinite().all()
    assert flat or x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in alex.parameters())
    assert not alex.training


def test_a_step_along_the_gradient_brings_images_nearer(alex):
    x, y = pair(32)
    x = x.clone().requires_grad_()
    before = alex(x, y)
    before.sum().backward()
    assert alex(x - 0.01 * x.grad / x.grad.abs().max(), y).sum() < before.sum()


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_under_bf16_autocast_the_gradient_keeps_its_direction_and_length(name):
    """Measured on a blurred noisy image, whose PSNR is a reconstruction's; the trunk's convolutions are in bf16."""
    network, x = PerceptualDistance(name), pair(64)[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) + 0.1 * noise
    distances, gradients, dtypes = [], [], set()
    network.trunk[1].register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    for bf16 in (False, True):
        z = y.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            distances.append(network(z, x))
        gradients.append(torch.autograd.grad(distances[-1].mean(), z)[0].flatten())
    assert dtypes == {torch.float32, torch.bfloat16}
    assert distances[1].dtype == gradients[1].dtype == torch.float32
    assert distances[1].tolist() == pytest.approx(distances[0].tolist(), rel=0.05)
    assert F.cosine_similarity(*gradients, dim=0) > 0.95
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.05)


def test_what_it_sees_is_compared_in_float32_under_bf16_autocast(alex):
    x, y = (torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    expected = perceptual._compared(x.float(), y.float(), alex.heads[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perceptual._compared(x, y, alex.heads[0]), expected)
        assert alex(images := pair(32)[0], images).tolist() == [0, 0]


def test_under_fp16_autocast_it_computes_in_float32(alex):
    x, y = pair(32)
    with torch.autocast("cpu", torch.float16):
        distance = alex(x, y)
    assert torch.equal(distance, alex(x, y))


def test_it_compiles_as_one_graph(alex):
    x, y = pair(32)
    compiled = torch.compile(alex, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, y), alex(x, y))


def test_the_original_lpips_from_torchvisions_file_and_its_heads(tmp_path):
    """Compares with the network as torchvision and LPIPS write it, with torchvision's names and random weights."""
    trunk = torchvisions_vgg16()
    torch.save(trunk, tmp_path / "vgg16.pth")
    heads = installed_file("torchmetrics", "functional/image/lpips_models/vgg.pth", "")
    ours = PerceptualDistance("lpips-vgg", [str(tmp_path / "vgg16.pth"), str(heads)])

    x, y = pair(32)
    head = torch.load(heads, map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    both = (torch.cat([x, y]) - shift[:, None, None]) / scale[:, None, None]
    expected, taken = torch.zeros(2), 0
    for number in range(30):
        if f"features.{number}.weight" in trunk:
            both = F.relu(
                F.conv2d(both, trunk[f"features.{number}.weight"], trunk[f"features.{number}.bias"], padding=1)
            )
        elif f"features.{number - 1}.weight" not in trunk:
            both = F.max_pool2d(both, 2)
        if number in (3, 8, 15, 22, 29):
            unit = F.normalize(both, dim=1, eps=1e-10)
            expected += F.conv2d((unit[:2] - unit[2:]).square(), head[f"lin{taken}.model.1.weight"]).mean(dim=(1, 2, 3))
            taken += 1
    assert ours(x, y).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server with a VGG16 of random weights in torchvision's names, where the original's weights are fetched from."""
    (tmp_path / "served").mkdir()
    torch.save(torchvisions_vgg16(), file := tmp_path / "served/vgg16.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with serving(tmp_path / "served") as server:
        monkeypatch.setattr(perceptual, "VGG16_URL", f"{server.url}/vgg16.pth")
        monkeypatch.setattr(perceptual, "VGG16_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
        yield server


def test_the_original_is_fetched_once_and_its_heads_are_torchmetrics_or_lpips(published, tmp_path, monkeypatch, caplog):
    first = PerceptualDistance("lpips-vgg")
    (said,) = caplog.messages
    assert said.startswith(
        f"name=lpips-vgg: fetching {published.url}/vgg16.pth, once, to {tmp_path}/home/hub/checkpoints/"
    )
    heads = installed_file("torchmetrics", "functional/image/lpips_models/vgg.pth", "")
    (tmp_path / "lpips/weights/v0.1").mkdir(parents=True)
    shutil.copy(heads, tmp_path / "lpips/weights/v0.1/vgg.pth")
    (tmp_path / "lpips/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    again = PerceptualDistance("lpips-vgg")
    given = PerceptualDistance("lpips-vgg", [str(tmp_path / "served/vgg16.pth"), str(heads)])
    assert first.checksum == again.checksum == given.checksum
    assert published.counts["GET /vgg16.pth"] == 1
    x, y = pair(32)
    assert first(x, y).min() > 0
    assert torch.equal(first(x, y), given(x, y))


def test_the_original_that_cannot_be_fetched_is_one_line(published, tmp_path, monkeypatch, capsys):
    remedy = f"; fetch it elsewhere and put it into {tmp_path}/home/hub/checkpoints, or set name=none$"
    published.answers["/vgg16.pth"] = 503
    with pytest.raises(
        InputError, match=rf"^name=lpips-vgg: http\S+ cannot be downloaded \(HTTP Error 503.*\){remedy}"
    ):
        PerceptualDistance("lpips-vgg")
    published.answers.clear()
    published.cuts["/vgg16.pth"] = [1000, 1000]  # the thread of the 503 may still be running, and take one
    with pytest.raises(InputError, match=rf"cannot be downloaded \(.*\){remedy}"):
        PerceptualDistance("lpips-vgg")
    assert not list((tmp_path / "home").rglob("vgg16*"))
    monkeypatch.setattr(perceptual, "HEADS", {"no_such_package": "a.pth", "torchmetrics": "b.pth"})
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package torchmetrics, which is missing; pip install 'vqgen\[evaluation\]'"):
        PerceptualDistance("lpips-vgg")


def test_what_is_wrong_with_the_weights_is_said(tmp_path):
    file = installed_file("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth", "")
    with pytest.raises(InputError, match=r"^name=squeeze is not known; use alex, vgg, lpips-vgg or none"):
        PerceptualDistance("squeeze")
    with pytest.raises(InputError, match=r"^name=lpips-vgg has two files of weights, .*; give weights="):
        PerceptualDistance("lpips-vgg", [str(file)])
    with pytest.raises(InputError, match="belong to another network"):
        PerceptualDistance("vgg", [str(file)])
    with pytest.raises(InputError, match=r"^weights=.*none\.pth: no such file"):
        PerceptualDistance("alex", [str(tmp_path / "none.pth")])
    with pytest.raises(InputError, match=r"is missing; pip install it"):
        installed_file("no_such_package", "weights.pth", "pip install it")


@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"<html>not found</html>", {}, {1: torch.zeros(1)}, [torch.zeros(1)], {"a": 1},
                {"features.conv.weight": torch.zeros(1)}, {"features.34.weight": torch.zeros(1)}],
)  # fmt: skip
def test_files_that_are_something_else_are_one_line(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for name, count in (("alex", 1), ("lpips-vgg", 2)):
        with pytest.raises(InputError, match=r"^[^\n]+$"):
            PerceptualDistance(name, [str(path)] * count)


def test_a_damaged_file_in_the_package_is_noticed(tmp_path, monkeypatch):
    package = tmp_path / "stlpips_pytorch"
    shutil.copytree(installed_file("stlpips_pytorch", "", ""), package, ignore=shutil.ignore_patterns("vgg*"))
    path = Path(package / "weights/vST0.0/alex_shift_tolerant.pth")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="is damaged or another file"):
        PerceptualDistance()
