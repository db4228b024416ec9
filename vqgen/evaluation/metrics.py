"""Quality figures of reconstructions, codes and samples; torchmetrics computes the standard ones."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.codes import CodeLayout
from vqgen.distributed import all_reduce_sum, rank
from vqgen.errors import need
from vqgen.evaluation.features import Features

EXTRA = "evaluation"  # the extra of vqgen that installs torchmetrics, which training does not need
KID_SUBSETS, KID_SUBSET_SIZE = 50, 1000
BLOCK = 512  # rows of a distance matrix that are in memory at a time
# So many products of numbers from -128 to 127 come to at most 2^24, and float32 has all integers up to there.
EXACT = 1024


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, from the mean squared error of images in [-1, 1]."""
    return 10 * torch.log10(4.0 / mse.clamp_min(1e-10))  # the peak is 2, from -1 to 1


def image_psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR (B,) in dB of each pair of images uint8 (B, C, H, W); 100 where they are equal."""
    mse = ((x.float() - y.float()) / 127.5).square().mean(dim=(1, 2, 3))  # as in [-1, 1]
    return psnr(mse).clamp_max(100)


def image_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (B,) of each pair of images uint8 (B, C, H, W) (Wang et al. 2004)."""
    metrics = need("torchmetrics.functional.image", EXTRA, "SSIM")
    x, y = x.float(), y.float()
    side = min(11, 2 * ((min(x.shape[2:]) - 1) // 2) + 1)  # the window must not be larger than the image
    return metrics.structural_similarity_index_measure(
        x, y, gaussian_kernel=side == 11, kernel_size=side, data_range=255.0, reduction="none"
    )


class CodeUsage:
    """Counts codes on their device, and computes how many different codes are in use.

    Args:
        layout: layout of the code maps; the codes of each codebook are counted separately.
        device: the codes' device.
    """

    def __init__(self, layout: CodeLayout, device: torch.device):
        sizes = [k for shape, k in zip(layout.shapes, layout.codebook_sizes, strict=True) for _ in range(shape[0])]
        self.sizes = torch.tensor(sizes, device=device)  # (Q,) the sizes of all codebooks of all maps
        self.counts = torch.zeros(len(sizes), max(sizes), dtype=torch.int64, device=device)

    def update(self, codes: Sequence[Tensor]) -> None:
        """Counts code maps [(B, Q, *S), ...]."""
        first = 0
        for part in codes:
            rows = self.counts[first : (first := first + part.shape[1])]
            offset = rows.shape[1] * torch.arange(len(rows), device=part.device)
            flat = (part.flatten(2) + offset[:, None]).flatten()
            rows.view(-1).index_add_(0, flat, torch.ones_like(flat))

    def compute(self) -> dict[str, Tensor]:
        """Figures of the codes that all processes have counted since the last call, as means over the codebooks.

        Returns:
            `usage`, the share of the codes in use; `entropy`, the entropy of the codes' distribution in nats;
            `perplexity`, the exponential of each codebook's entropy.
        """
        counts = all_reduce_sum(self.counts.clone()).float()  # (Q, K)
        self.counts.zero_()
        p = counts / counts.sum(dim=1, keepdim=True)
        entropy = -torch.xlogy(p, p).sum(dim=1)  # (Q,)
        used = (counts > 0).sum(dim=1) / self.sizes  # (Q,)
        return {"usage": used.mean(), "entropy": entropy.mean(), "perplexity": entropy.exp().mean()}

    def state_dict(self) -> dict[str, Tensor]:
        """The counts since the last `compute`, summed over all processes. All processes must call it."""
        return {"counts": all_reduce_sum(self.counts.clone())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads a state that any number of processes have saved."""
        if rank() == 0:
            self.counts.copy_(state["counts"])


# Comparing two sets of images by their features


def frechet_distance(a: Features, b: Features) -> float:
    """Frechet distance between the Gaussians of two sets' features (Heusel et al. 2017, eq. 6)."""
    fid = need("torchmetrics.image.fid", EXTRA, "the Frechet distance")
    with _quiet():
        metric = fid.FrechetInceptionDistance(feature=_AsTheyAre(len(a.total)), sync_on_compute=False)
        for side, features in (("fake", a), ("real", b)):  # torchmetrics would make the same sums
            setattr(metric, f"{side}_features_sum", features.total)
            setattr(metric, f"{side}_features_cov_sum", features.outer)
            setattr(metric, f"{side}_features_num_samples", features.count[0])
        metric.orig_dtype = torch.float64
        return metric.compute().clamp_min(0).item()  # clamp_min keeps NaN


def kernel_distance(a: Features, b: Features, seed: int) -> tuple[float, float | None]:
    """Squared maximum mean discrepancy, cubic kernel (KID, Binkowski et al. 2018): mean and deviation over subsets.

    The estimate is unbiased, so it may be a little below 0. The deviation is None if one subset holds all features.
    """
    kid = need("torchmetrics.image.kid", EXTRA, "the kernel distance")
    size = min(KID_SUBSET_SIZE, len(a.kept), len(b.kept))
    subsets = KID_SUBSETS if max(len(a.kept), len(b.kept)) > size else 1
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metric = kid.KernelInceptionDistance(_AsTheyAre(a.kept.shape[1]), subsets, size, sync_on_compute=False)
        metric.update(a.kept, real=False)
        metric.update(b.kept, real=True)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item() if subsets > 1 else None


def confidence_score(a: Features, seed: int) -> tuple[float, float]:
    """exp of the mean KL divergence between an image's class probabilities and their mean (Salimans et al. 2016).

    With the Inception network it is the Inception score. Returns mean and deviation over ten splits.
    """
    inception = need("torchmetrics.image.inception", EXTRA, "the Inception score")
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metric = inception.InceptionScore(
            _AsTheyAre(a.logits.shape[1]), splits=min(10, len(a.logits) // 2), sync_on_compute=False
        )
        metric.update(a.logits)
        mean, deviation = metric.compute()
    return mean.item(), deviation.nan_to_num().item()


def manifold_figures(fake: Tensor, real: Tensor) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, k = 3), density and coverage (Naeem et al. 2020, k = 5).

    Around each image of a set lies a ball that reaches to the image's k-th neighbour in the set. Precision is the share
    of fake images in at least one real ball. Recall is the share of real images in at least one fake ball. Density is
    the mean number of real balls around a fake image, divided by k. Coverage is the share of real balls that contain a
    fake image.

    Args:
        fake, real: features (n, D) of the two sets, which have the same size n.
    """
    centre = real.double().mean(dim=0)
    fake, real = fake.double() - centre, real.double() - centre
    k = min(5, len(real) - 1)
    # Radii to the 3rd neighbour of fake images, and to the 1st, ..., k-th neighbour of real images.
    fake_radius, real_radius = _radii(fake, k)[:, min(2, k - 1)], _radii(real, k)
    in_real, count, nearest, in_fake = [], 0.0, torch.full((len(real),), torch.inf, dtype=torch.float64), None
    for block, radius in zip(fake.split(BLOCK), fake_radius.split(BLOCK), strict=True):
        distance = torch.cdist(block, real)
        in_real.append((distance <= real_radius[:, min(2, k - 1)]).any(dim=1))
        count += (distance < real_radius[:, k - 1]).sum().item()
        nearest = torch.minimum(nearest, distance.amin(dim=0))
        inside = (distance <= radius[:, None]).any(dim=0)
        in_fake = inside if in_fake is None else in_fake | inside
    assert in_fake is not None
    return {
        "precision": torch.cat(in_real).double().mean().item(),
        "recall": in_fake.double().mean().item(),
        "density": count / (k * len(fake)),
        "coverage": (nearest <= real_radius[:, k - 1]).double().mean().item(),
    }


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (n,) of each query (n, D) from its nearest reference (m, D), and that reference's index (n,)."""
    centre = references.double().mean(dim=0)
    references = references.double() - centre
    found = [torch.cdist(block.double() - centre, references).min(dim=1) for block in queries.split(BLOCK)]
    return torch.cat([block.values for block in found]), torch.cat([block.indices for block in found])


def nearest_pixels(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """The squared distance (n,) int64 of each query from its nearest reference, and the first such reference (n,).

    The distances are exact on every device: EXACT products at a time are summed in float32, in whatever order, and
    these sums as integers. Float64 takes twice as long on a CPU, and longer on GPUs that compute little in it.

    Args:
        queries: uint8 (n, P), on the device to compute on, with P at most 10,000.
        references: uint8 (m, P), on the same device.
    """
    references = references.float() - 128
    columns = [part.T.contiguous() for part in references.split(EXACT, dim=1)]
    lengths = references.double().square().sum(dim=1)
    squares, indices = [], []
    with _whole_products():
        for block in queries.split(BLOCK):
            block = block.float() - 128
            products = torch.zeros(len(block), len(references), dtype=torch.int32, device=block.device)
            for part, other in zip(block.split(EXACT, dim=1), columns, strict=True):
                products += (part @ other).int()
            least = torch.sub(lengths.int(), products, alpha=2).min(dim=1)  # |r|^2 - 2 q r
            squares.append(least.values + block.double().square().sum(dim=1).long())
            indices.append(least.indices)
    return torch.cat(squares), torch.cat(indices)


def share_closer(a: Tensor, b: Tensor) -> float:
    """The probability that a random value of a is below a random value of b; ties count half (Mann and Whitney's U)."""
    b = b.sort().values
    below, up_to = torch.searchsorted(b, a), torch.searchsorted(b, a, right=True)
    return (1 - (below + up_to).double().mean() / (2 * len(b))).item()


class ClassProbe:
    """A linear classifier on a reference's features, which tells whether an image shows its class.

    Args:
        reference: features with class ids; images without a class are left out.
        num_classes: number of classes K.
    """

    def __init__(self, reference: Features, num_classes: int):
        known = reference.class_ids >= 0
        x, y = reference.kept[known], reference.class_ids[known]
        self.mean, self.scale = x.mean(dim=0), x.std(dim=0) + 1e-6
        self.linear = nn.Linear(x.shape[1], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        x = (x - self.mean) / self.scale
        optimizer = torch.optim.LBFGS(self.linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(self.linear(x), y) + 1e-3 * self.linear.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def accuracy(self, features: Features) -> float:
        """Share of the images that are recognised as their class; images without a class are left out."""
        known = features.class_ids >= 0
        return (self.log_p(features.kept[known]).argmax(dim=1) == features.class_ids[known]).double().mean().item()

    @torch.no_grad()
    def log_p(self, x: Tensor) -> Tensor:
        """log p(class | image) (B, K) of the images' features (B, D)."""
        return self.linear((x - self.mean) / self.scale).log_softmax(dim=1)


def _radii(x: Tensor, k: int) -> Tensor:
    """Distances (n, k) of each vector in x (n, D) from its 1st, ..., k-th neighbour."""
    return torch.cat([torch.cdist(block, x).topk(k + 1, largest=False).values[:, 1:] for block in x.split(BLOCK)])


@contextmanager
def _whole_products() -> Iterator[None]:
    """Computes products of float32 numbers in float32, and not in TF32, whose sums need not be exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _AsTheyAre(nn.Module):
    """Takes the place of torchmetrics' feature network and returns its input, which are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torchmetrics' warnings about memory use and about sums from elsewhere; both are intended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
