"""Quality figures against their formulas, torchmetrics, and common sense."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from vqgen.codes import CodeLayout
from vqgen.data.images import load_images
from vqgen.evaluation.features import EfficientNetLite0, Features, collect_features
from vqgen.evaluation.metrics import (
    ClassProbe,
    CodeUsage,
    confidence_score,
    frechet_distance,
    image_psnr,
    image_ssim,
    kernel_distance,
    manifold_figures,
    nearest,
    nearest_pixels,
    psnr,
    share_closer,
)
from vqgen.settings import DataConfig

CPU = torch.device("cpu")


def test_psnr_is_that_of_the_images_in_uint8_range():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    mse = (x * 255 - y * 255).square().mean().item()
    expected = 20 * np.log10(255) - 10 * np.log10(mse)
    assert psnr(((2 * x - 1) - (2 * y - 1)).square().mean()).item() == pytest.approx(expected, rel=1e-12)


def test_psnr_of_equal_images_is_finite():
    assert 100 < psnr(torch.tensor(0.0)).item() < 200


def random_images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def test_pooled_psnr_is_torchmetrics():
    x, y = random_images(4), random_images(4, seed=1)
    metric = PeakSignalNoiseRatio(data_range=255.0)
    metric.update(x.double(), y.double())
    mse = ((x / 127.5 - 1) - (y / 127.5 - 1)).double().square().mean()
    assert psnr(mse).item() == pytest.approx(metric.compute().item(), rel=1e-5)


def test_figures_of_single_images_are_torchmetrics_of_each():
    x, y = random_images(4), (random_images(4).float() * 0.9).byte()
    for i in range(4):
        a, b = x[i : i + 1].float(), y[i : i + 1].float()
        ssim = structural_similarity_index_measure(a, b, data_range=255.0)
        assert image_ssim(x, y)[i].item() == pytest.approx(ssim.item(), rel=1e-4)
        mse = (a - b).square().mean().item()
        assert image_psnr(x, y)[i].item() == pytest.approx(10 * np.log10(255**2 / mse), rel=1e-5)


def test_equal_images_are_as_similar_as_can_be():
    x = random_images(3)
    assert image_ssim(x, x).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert image_psnr(x, x).tolist() == [100, 100, 100]


@pytest.mark.parametrize("size", [3, 8, 10])
def test_ssim_of_images_smaller_than_its_window(size):
    x, y = random_images(2, size), random_images(2, size, seed=1)
    assert image_ssim(x, y).isfinite().all()
    assert (image_ssim(x, x) > image_ssim(x, y)).all()


def test_code_usage_and_perplexity_of_several_batches():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(12, (2, 1, 3, 3), generator=generator) ** 2 % 16 for _ in range(3)]
    usage = CodeUsage(CodeLayout(((1, 3, 3),), (16,)), CPU)
    for codes in batches:
        usage.update([codes])
    counts = np.bincount(torch.cat(batches).flatten().numpy(), minlength=16)
    p = counts[counts > 0] / counts.sum()
    figures = usage.compute()
    assert figures["usage"].item() == pytest.approx((counts > 0).mean())
    assert figures["entropy"].item() == pytest.approx(-(p * np.log(p)).sum())
    assert figures["perplexity"].item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_perplexity_runs_from_one_code_to_all():
    usage = CodeUsage(CodeLayout(((1, 1),), (8,)), CPU)
    usage.update([torch.full((5, 1, 1), 3)])
    assert [v.item() for v in usage.compute().values()] == pytest.approx([1 / 8, 0, 1])
    usage.update([torch.arange(8).view(8, 1, 1)])
    assert [v.item() for v in usage.compute().values()] == pytest.approx([1, np.log(8), 8])


def test_code_usage_starts_anew_after_each_compute():
    usage = CodeUsage(CodeLayout(((1, 3),), (4,)), CPU)
    usage.update([torch.tensor([[[0, 1, 2]]])])
    usage.compute()
    usage.update([torch.tensor([[[3]]])])
    assert usage.compute()["usage"].item() == 0.25


def test_code_usage_of_several_codebooks_is_their_mean():
    usage = CodeUsage(CodeLayout(((2, 4),), (4,)), CPU)
    usage.update([torch.tensor([[[0, 0, 0, 0], [0, 1, 2, 3]]])])  # (B, Q, S): the first uses one code, the second all
    figures = usage.compute()
    assert figures["usage"].item() == pytest.approx((1 / 4 + 1) / 2)
    assert figures["entropy"].item() == pytest.approx(np.log(4) / 2)
    assert figures["perplexity"].item() == pytest.approx((1 + 4) / 2)


def test_code_usage_counts_every_code_map():
    usage = CodeUsage(CodeLayout(((1, 1, 1), (1, 2, 2)), (2, 4)), CPU)
    usage.update([torch.tensor([[[[1]]]]), torch.tensor([[[[0, 1], [2, 3]]]])])  # half of two codes, and all of four
    figures = usage.compute()
    assert figures["usage"].item() == pytest.approx((1 / 2 + 1) / 2)
    assert figures["perplexity"].item() == pytest.approx((1 + 4) / 2)


# Two sets by their features


def features_of(kept: Tensor, class_ids: Tensor | None = None, logits: Tensor | None = None) -> Features:
    """Features in the form that `FeatureCollector` returns."""
    count, exact = len(kept), kept.double()
    return Features(
        total=exact.sum(dim=0),
        outer=exact.T @ exact,
        count=torch.tensor([count]),
        rows=torch.arange(count),
        kept=kept.float(),
        logits=torch.zeros(count, 2) if logits is None else logits,
        thumbnails=torch.zeros(count, 1, dtype=torch.uint8),
        class_ids=torch.full((count,), -1) if class_ids is None else class_ids,
    )


def gaussian(count: int, dims: int = 16, seed: int = 0, mean: float = 0, scale: float = 1) -> Tensor:
    return mean + scale * torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


class GivenFeatures(torch.nn.Module):
    num_features = 16

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_frechet_distance_is_torchmetrics_own():
    a, b = gaussian(300, mean=0.3), gaussian(400, seed=1, scale=1.5)
    metric = FrechetInceptionDistance(GivenFeatures())
    metric.set_dtype(torch.float64)
    for half in a.double().chunk(2):
        metric.update(half, real=False)
    metric.update(b.double(), real=True)
    assert frechet_distance(features_of(a), features_of(b)) == pytest.approx(metric.compute().item(), rel=1e-9)


def test_frechet_distance_of_gaussians_is_the_formulas():
    a, b = gaussian(200_000, 2), gaussian(200_000, 2, seed=1, mean=1, scale=2)
    expected = 2 * (1 + (2 - 1) ** 2)  # (difference of means)^2 + (difference of deviations)^2, in each dimension
    assert frechet_distance(features_of(a), features_of(b)) == pytest.approx(expected, rel=0.02)


def test_what_is_not_a_number_is_not_taken_for_0():
    a, b = gaussian(20, 4), gaussian(20, 4, seed=1)
    a[0, 0] = torch.nan
    assert np.isnan(frechet_distance(features_of(a), features_of(b)))


def test_kernel_distance_of_whole_sets_is_torchmetrics_mmd():
    a, b = gaussian(200, mean=0.3), gaussian(200, seed=1)
    mean, deviation = kernel_distance(features_of(a), features_of(b), seed=0)
    assert mean == pytest.approx(poly_mmd(b, a).item(), rel=1e-3)
    assert deviation is None  # there is only one subset


def test_a_kernel_distance_does_not_disturb_the_random_state():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    a = features_of(gaussian(50))
    assert kernel_distance(a, a, seed=0) == kernel_distance(a, a, seed=0)
    confidence_score(a, seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_confidence_is_1_for_indifference_and_the_number_of_classes_at_best():
    sure = 50 * torch.eye(4).repeat(50, 1)
    assert confidence_score(features_of(gaussian(200), logits=sure), 0)[0] == pytest.approx(4, rel=0.1)
    assert confidence_score(features_of(gaussian(200), logits=0 * sure), 0)[0] == pytest.approx(1)


def test_identical_sets_are_at_distance_0_with_precision_and_recall_1():
    x = gaussian(1500)
    a = features_of(x)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert kernel_distance(a, a, seed=0)[0] == pytest.approx(0, abs=0.02)  # two subsets of 1,000 each
    assert manifold_figures(x, x) == {"precision": 1, "recall": 1, "density": pytest.approx(1), "coverage": 1}


def test_precision_and_density_see_bad_samples_recall_and_coverage_missing_ones():
    real = torch.cat([gaussian(300), gaussian(300, seed=1, mean=20)])
    half = torch.cat([gaussian(300, seed=2), gaussian(300, seed=3)])  # one of the two clusters, twice
    far = torch.cat([gaussian(300, seed=2), gaussian(300, seed=3, mean=-20)])
    one_sided, wrong = manifold_figures(half, real), manifold_figures(far, real)
    assert one_sided["precision"] > 0.6
    assert one_sided["recall"] < 0.5
    assert one_sided["coverage"] < 0.5
    assert wrong["precision"] < 0.5
    assert wrong["density"] < one_sided["density"]


def test_manifold_figures_are_their_definitions():
    fake, real = gaussian(40, 4), gaussian(40, 4, seed=1, mean=0.5)
    within = [torch.cdist(x, x).sort(dim=1).values for x in (fake, real)]
    distance = torch.cdist(fake, real)  # (fake, real)
    figures = manifold_figures(fake, real)
    assert figures["precision"] == pytest.approx((distance <= within[1][:, 3]).any(dim=1).float().mean().item())
    assert figures["recall"] == pytest.approx((distance <= within[0][:, 3:4]).any(dim=0).float().mean().item())
    assert figures["density"] == pytest.approx((distance < within[1][:, 5]).float().sum().item() / (5 * 40))
    assert figures["coverage"] == pytest.approx((distance.amin(dim=0) <= within[1][:, 5]).float().mean().item())


def test_two_images_of_each_are_enough_for_all_figures():
    a, b = gaussian(2, 4), gaussian(2, 4, seed=1)
    assert all(np.isfinite(value) for value in manifold_figures(a, b).values())
    assert np.isfinite(frechet_distance(features_of(a), features_of(b)))
    assert np.isfinite(kernel_distance(features_of(a), features_of(b), 0)[0])
    assert np.isfinite(confidence_score(features_of(a), 0)).all()


def test_nearest_finds_the_nearest_and_copies_at_distance_0():
    references = 100 + gaussian(700, 8)
    distance, index = nearest(torch.cat([references[[5, 600]], references[[7]] + 0.01]), references)
    assert index.tolist() == [5, 600, 7]
    assert distance.tolist() == pytest.approx([0, 0, 0.01 * 8**0.5], abs=1e-4)


@pytest.mark.parametrize(("width", "brightest"), [(5, 255), (1024, 255), (3072, 255), (3072, 50)])
def test_nearest_pixels_is_exact_and_takes_the_first_of_equals(width, brightest):
    """Of dark images the sum of 3,072 products is above 2^24, where float32 has no odd numbers."""
    generator = torch.Generator().manual_seed(0)
    queries, references = (
        torch.randint(0, brightest + 1, (count, width), dtype=torch.uint8, generator=generator) for count in (600, 40)
    )
    references[:2] = torch.tensor([[0], [255]])  # white from black is the largest distance there is
    references[5] = references[4]
    queries[:2], queries[2] = 255 - references[:2], references[4]
    queries[3] = references[4]
    queries[3, 0] ^= 1
    brute = (queries.numpy().astype(np.int64)[:, None] - references.numpy().astype(np.int64)[None]) ** 2
    squares, indices = nearest_pixels(queries, references)
    assert squares.tolist() == brute.sum(axis=2).min(axis=1).tolist()
    assert indices.tolist() == brute.sum(axis=2).argmin(axis=1).tolist()
    assert (squares[2:4].tolist(), indices[2:4].tolist()) == ([0, 1], [4, 4])
    assert nearest_pixels(queries[:1], 255 - queries[:1])[0].tolist() == [width * 255**2]


def test_share_closer_is_the_share_of_pairs():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0])
    assert share_closer(a, b) == pytest.approx((2 + 1.5 + 1) / 6)
    assert share_closer(a, a) == 0.5
    assert share_closer(a - 10, b) == 1


def test_the_class_probe_tells_classes_apart_and_leaves_out_images_without_one():
    class_ids = torch.arange(600) % 3
    class_ids[::10] = -1
    x = gaussian(600) + 4 * torch.nn.functional.one_hot(class_ids.clamp_min(0), 16).float()
    probe = ClassProbe(features_of(x[:300], class_ids[:300]), 3)
    assert probe.accuracy(features_of(x[300:], class_ids[300:])) > 0.95
    wrong = torch.where(class_ids[300:] >= 0, (class_ids[300:] + 1) % 3, -1)
    assert probe.accuracy(features_of(x[300:], wrong)) < 0.05


# The purpose of figures: worse images have worse figures


class Given:
    """Images in memory, as a set."""

    def __init__(self, images: Tensor, class_ids: Tensor):
        self.images, self.class_ids = images, class_ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.images[rows], self.class_ids[rows]


def worse_and_worse(kind: str, images: Tensor, class_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    if kind == "blur":
        smoothed = [torch.nn.functional.avg_pool2d(images.float(), k, 1, k // 2).byte() for k in (3, 7, 13)]
        return [(images, class_ids), *[(part, class_ids) for part in smoothed]]
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        noisy = [(images + level * noise).clamp(0, 255).byte() for level in (0, 4, 12, 40)]
        return [(part, class_ids) for part in noisy]
    kept = [(class_ids < classes).nonzero()[:, 0] for classes in (10, 6, 3, 1)]
    return [(images[rows], class_ids[rows]) for rows in (k.repeat(10)[: len(images)] for k in kept)]


@pytest.mark.parametrize("kind", ["blur", "noise", "dropped classes"])
def test_worse_images_have_worse_figures(kind):
    network, (_, held_out) = EfficientNetLite0(), load_images(DataConfig())
    images, class_ids = held_out.__getitems__(np.arange(120))

    def features(*part: Tensor) -> Features:
        return collect_features(Given(*part), np.arange(len(part[0])), network, 100, "")

    reference = features(images, class_ids)
    sets = [features(*part) for part in worse_and_worse(kind, images, class_ids)]
    frechet = [frechet_distance(part, reference) for part in sets]
    kernel = [kernel_distance(part, reference, 0)[0] for part in sets]
    manifold = [manifold_figures(part.kept, reference.kept) for part in sets]
    assert frechet[0] == pytest.approx(0, abs=1e-2)
    assert all(np.diff(frechet) > 0)
    assert all(np.diff(kernel) > 0)
    for name in ("recall", "coverage") if kind == "dropped classes" else ("precision", "coverage"):
        values = [figures[name] for figures in manifold]
        assert values[0] == 1
        assert all(np.diff(values) <= 0)
        assert values[-1] < values[0]
