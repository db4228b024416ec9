"""The quantizers' common parts: interface, lookup, gradient estimators, entropy."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqgen.distributed import all_reduce_sum, rank, world_size
from vqgen.errors import require, require_choice

BLOCK_ELEMENTS = 1 << 22  # elements of the (N, K) probabilities that are in memory at a time
MAX_CODES, MAX_DIM = 1 << 31, 1 << 16  # the largest codebook
MAX_SEARCHED = 1 << 18  # the largest codebook that is searched for the neighbours of codes
# Options that say how a quantizer learns, not what its codes mean: training from given weights may change them.
LEARNING: tuple[str, ...] = (
    "gradient",
    "commitment_weight",
    "decay",
    "kmeans_iterations",
    "revive_below",
    "dropout",
    "temperature",
)
LEARNING += ("entropy_weight", "entropy_temperature", "diversity", "kl_weight", "legacy_beta")


class QuantizerOutput(NamedTuple):
    """The output of every quantizer.

    Attributes:
        z_q: (B, D, *S) the quantized vectors, through which the gradient reaches z.
        codes: (B, Q, *S) int64 indices into the codebook; never squeezed, not even if Q = 1.
        loss: scalar, already weighted.
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor


class Replacements(NamedTuple):
    """Which codes are replaced, and by which of their neighbours.

    Attributes:
        ranks: int64, in the shape of the codes: r takes the r-th nearest other code, and 0 keeps the code.
        nearest: the largest rank that may occur.
    """

    ranks: Tensor
    nearest: int


class Quantizer(nn.Module):
    """The interface of every quantizer: vectors to codes and back.

    A quantizer implements `quantize` and `decode` on fp32 vectors whose last axis is D, and `bound` if its codes lie in
    a bounded space. This class reshapes maps with any number of spatial axes to such vectors and back.

    Attributes:
        codebook_size: number of codes K.
        num_codebooks: codes per position Q; 1 except for residual quantizers.
        code_dim: dimension D of the vectors.
        residual_scale: size of the residual relative to the quantized vector, for each dimension or for all; 1 if the
            codebook learns the size itself.
        refused: options of other quantizers that make no sense for this one, with the reason.
    """

    codebook_size: int
    num_codebooks: int = 1
    code_dim: int
    residual_scale: float | Tensor = 1.0
    refused: ClassVar[dict[str, str]] = {}

    @classmethod
    def complete(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The constructor's options; those of a quantizer inside this one are completed by their defaults."""
        return options

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantizes z of shape (B, D, *S); in training mode it may also update the codebook."""
        assert z.shape[1] == self.code_dim, f"{z.shape[1]} channels for code_dim={self.code_dim}"
        # Distances, statistics and rounding stay in fp32 under autocast, because bf16 confuses codes that are close.
        with torch.autocast(z.device.type, enabled=False):
            vectors = rearrange(z.float(), "b d ... -> b (...) d").contiguous()
            z_q, codes, loss = self.quantize(self.bound(vectors))
            z_q = z_q.movedim(-1, 1).reshape(z.shape)  # (B, D, *S)
            return QuantizerOutput(z_q, codes.movedim(-1, 1).reshape(len(z), -1, *z.shape[2:]), loss)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """The vectors (B, D, *S) in fp32 of codes (B, Q, *S)."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.decode(codes.movedim(1, -1)).movedim(-1, 1)

    def check_nearest(self, count: int) -> None:
        """Raises InputError if a code does not have so many neighbours, or has too many to search."""
        codes = self.codebook_size
        require(codes <= MAX_SEARCHED, f"nearest={count}: not for {codes} codes; {MAX_SEARCHED} are the most to search")
        require(count < codes, f"nearest={count}: a code has only {codes - 1} others; use that, or fewer")

    @torch.no_grad()
    def replace(self, codes: Tensor, by: Replacements) -> Tensor:
        """Codes (B, Q, *S) with some of them replaced by near ones, in the same shape."""
        with torch.autocast(codes.device.type, enabled=False):
            near = self.neighbours(rearrange(codes, "b q ... -> (b ...) q"), by.nearest)  # (B S, Q, 1 + nearest)
            chosen = near.gather(-1, rearrange(by.ranks, "b q ... -> (b ...) q 1"))
        return chosen.view(len(codes), *codes.shape[2:], codes.shape[1]).movedim(-1, 1)

    def perturbed(self, q: QuantizerOutput, by: Replacements) -> Tensor:
        """z_q (B, D, *S) with some codes of the first images replaced, as many images as `by` is for.

        The gradient passes a replaced vector as it passes the original one, on the way to z (RobusTok, Qiu et al. 2025,
        latent_perturbation.py). The codes in q and its loss stay those of the images.
        """
        with torch.no_grad():
            first, others = q.z_q.tensor_split([len(by.ranks)])
            vectors = self.decode_codes(self.replace(q.codes[: len(first)], by))
            replaced = (by.ranks > 0).any(dim=1, keepdim=True)  # (n, 1, *S)
            z_q = torch.cat([torch.where(replaced, vectors, first), others])
        return straight_through(q.z_q, z_q)

    def neighbours(self, codes: Tensor, count: int) -> Tensor:
        """Each of the codes (N, Q), then the `count` others with the nearest vectors: (N, Q, 1 + count)."""
        every = torch.arange(self.codebook_size, device=codes.device)
        return nearest_others(codes[:, 0], self.decode(every[:, None]), count)[:, None]

    def bound(self, z: Tensor) -> Tensor:
        """Maps vectors (..., D) to the space of the codes; residual quantizers do so once, before the first level."""
        return z

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Bounded vectors z (B, N, D) to z_q (B, N, D), codes (B, N, Q) and the loss."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., Q) to vectors (..., D)."""
        raise NotImplementedError


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, z_q: Tensor) -> Tensor:
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """Returns z_q, bit for bit; passes its gradient to z unchanged, and none to z_q (VQ-VAE, section 3.2).

    z + (z_q - z).detach() does the same, but takes three more passes over memory and rounds.
    """
    return _StraightThrough.apply(z, z_q.detach())


class _VQLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, z_q: Tensor, commitment_weight: float, codebook_weight: float) -> Tensor:
        difference = z - z_q
        ctx.save_for_backward(difference)
        ctx.weights = commitment_weight, codebook_weight
        mse = torch.linalg.vector_norm(difference).square() / difference.numel()
        return (commitment_weight + codebook_weight) * mse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (difference,), (commitment_weight, codebook_weight) = ctx.saved_tensors, ctx.weights
        scale = 2 * gradient / difference.numel()
        for_z_q = difference * (-codebook_weight * scale) if ctx.needs_input_grad[1] else None
        return difference * (commitment_weight * scale), for_z_q, None, None


def vq_loss(z: Tensor, z_q: Tensor, commitment_weight: float, codebook_weight: float = 1.0) -> Tensor:
    """The last two terms of VQ-VAE's eq. 3, as means: codebook_weight |sg(z) - z_q|^2 + beta |z - sg(z_q)|^2.

    The commitment weight beta scales the gradient of z (the encoder), and codebook_weight scales the gradient of z_q.
    Both terms have the same value, so one pass over memory computes both; two calls of mse_loss would take four.
    """
    return _VQLoss.apply(z, z_q, commitment_weight, codebook_weight)


def rotation_trick(z: Tensor, z_q: Tensor) -> Tensor:
    """Returns z_q, bit for bit, with the gradient of the rotation and scaling that map z (..., D) to z_q.

    The rotation and the scaling count as constants (Fifty et al. 2024, section 4.2). So the gradient keeps its angle to
    the vector on its way from z_q to z, while straight-through keeps its direction.
    """
    with torch.no_grad():
        u, q = F.normalize(z, dim=-1), F.normalize(z_q, dim=-1)
        w = F.normalize(u + q, dim=-1)
        scale = z_q.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    rotated = z - 2 * w * (w * z).sum(dim=-1, keepdim=True) + 2 * q * (u * z).sum(dim=-1, keepdim=True)
    return straight_through(scale * rotated, z_q)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight-through": straight_through,
    "rotation": rotation_trick,
}


def gradient_estimator(gradient: str, code_dim: int, temperature: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The function (z, z_q) -> z_q that carries the decoder's gradient through the quantizer.

    Raises:
        InputError: no function has this name, or the rotation trick makes no sense for such codes.
    """
    require_choice("gradient", gradient, ESTIMATORS, "gradient")
    require(
        not (temperature and gradient == "rotation"),
        f"temperature={temperature} with gradient=rotation: a drawn code may lie on any side of the vector, and the "
        f"rotation onto it would turn the gradient around; use gradient=straight-through or temperature=0",
    )
    require(
        not (code_dim == 1 and gradient == "rotation"),
        "code_dim=1 with gradient=rotation: a line has only two directions; use gradient=straight-through",
    )
    return ESTIMATORS[gradient]


def require_weights(**weights: float) -> None:
    """Raises InputError for a negative weight of a loss."""
    for key, weight in weights.items():
        require(weight >= 0, f"{key}={weight}: must be 0 or more")


def nearest_code(z: Tensor, codebook: Tensor, temperature: float = 0.0) -> Tensor:
    """Index of the Euclidean-nearest codebook row of each vector: (N, D), (K, D) -> (N,) int64.

    With a temperature the index is drawn from softmax(-|z - e|^2 / temperature) instead. Call it in fp32.

    argmin |z - e|^2 = argmax z.e - |e|^2 / 2, so matrix products compute the (N, K) scores. Only one block of them
    exists at a time. On a CPU this block stays in the cache; elsewhere it has 256 MiB, or the launches of many small
    blocks would take longer than their products.
    """
    bias = -0.5 * codebook.square().sum(dim=1)
    on_cpu = z.device.type == "cpu"
    num_codes = min(len(codebook), 1024) if on_cpu else len(codebook)
    num_vectors = max(1, min(len(z), (1 << 19 if on_cpu else 1 << 26) // num_codes))
    block = z.new_empty(num_vectors * num_codes)  # reused: the first write to new memory takes as long as the products
    indices = []
    for part in z.split(num_vectors):
        for i, (rows, row_bias) in enumerate(zip(codebook.split(num_codes), bias.split(num_codes), strict=True)):
            scores = block[: len(part) * len(rows)].view(len(part), len(rows))
            torch.addmm(row_bias, part, rows.T, out=scores)
            if temperature:  # the Gumbel-max trick; scores are -|z - e|^2 / 2 plus a constant that all codes share
                scores -= 0.5 * temperature * torch.empty_like(scores).exponential_().log()
            score, where = _row_max(scores)
            if i == 0:
                best, index = score, where
            else:
                better = score > best
                best, index = torch.where(better, score, best), torch.where(better, where + i * num_codes, index)
        indices.append(index)
    return torch.cat(indices)


def _row_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of x (N, K), and its index.

    On a CPU torch finds a maximum several times faster than its index, so this first takes the maxima of 32 groups.
    """
    if x.shape[1] % 32 or x.device.type != "cpu":
        return x.max(dim=1)
    groups = x.view(len(x), -1, 32)  # (N, members, 32): the members of a group are 32 columns apart
    best, group = groups.amax(dim=1).max(dim=1)
    members = groups[torch.arange(len(x), device=x.device), :, group]
    return best, members.max(dim=1).indices * 32 + group


def nearest_others(indices: Tensor, codebook: Tensor, count: int) -> Tensor:
    """The codebook rows (K, D) nearest to some of them, (N,) -> (N, 1 + count): each row itself, then the others."""
    bias = -0.5 * codebook.square().sum(dim=1)
    found = []
    for part in indices.split(max(1, BLOCK_ELEMENTS // len(codebook))):
        scores = torch.addmm(bias, codebook[part], codebook.T)
        scores.scatter_(1, part[:, None], torch.inf)  # the row itself comes first, even if others are equal to it
        found.append(scores.topk(1 + count).indices)
    return torch.cat(found)


def spread_vectors(z: Tensor, count: int, draw: Tensor) -> Tensor:
    """Chooses vectors (count, D) spread evenly over the global batch; z (N, D) is this process's part of the batch.

    The choice follows the golden-ratio sequence, which goes on from draw to draw. So all processes agree without a
    random state, and the choice does not depend on their number. Values that are not finite count as zero, because a
    code that moved to them would be lost.
    """
    k = torch.arange(count, device=z.device) + draw * count
    # A share of 2^31; the factor is the golden section of 2^31, and int64 does not overflow.
    share = (k % 2**31) * 1327217885 % 2**31
    index = (share * (world_size() * len(z)) >> 31) - rank() * len(z)
    mine = (index >= 0) & (index < len(z))
    vectors = torch.nan_to_num(z[index.clamp(0, len(z) - 1)], 0.0, 0.0, 0.0)
    return all_reduce_sum(torch.where(mine[:, None], vectors, 0.0))


def assigned(z: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """The number (K,) and the sum (K, D) of each code's vectors in the global batch, from z (N, D), indices (N,)."""
    count = z.new_zeros(codebook_size).index_add_(0, indices, torch.ones_like(z[:, 0]))
    total = torch.zeros(codebook_size, z.shape[1], device=z.device).index_add_(0, indices, z)
    return all_reduce_sum(count), all_reduce_sum(total)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions over the last dimension."""
    return -torch.xlogy(p, p.clamp_min(1e-30)).sum(dim=-1)


def soft_assignment(
    z: Tensor, codebook: Tensor, temperature: float, target: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns vectors z (N, D) softly to the codes (K, D), by p = softmax(-|z - e|^2 / temperature).

    Only one block of the (N, K) probabilities exists at a time, in the backward pass too.

    Returns:
        For each vector, the mean of `target` (K, E) under p, (N, E); the mean entropy of p, (); the mean of p, (K,).
    """

    def block(part: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = -codebook.square().sum(dim=1) / temperature
        logits = torch.addmm(bias, part, codebook.T, alpha=2 / temperature)
        p = torch.softmax(logits, dim=1)
        entropies = torch.logsumexp(logits, dim=1) - (p * logits).sum(dim=1)
        return part.new_zeros(len(part), 0) if target is None else p @ target, entropies.sum(), p.sum(dim=0)

    parts = z.split(max(1, BLOCK_ELEMENTS // len(codebook)))
    results = [checkpoint(block, part, codebook, use_reentrant=False, preserve_rng_state=False) for part in parts]
    means, entropies, sums = zip(*results, strict=True)
    return torch.cat(means), torch.stack(entropies).sum() / len(z), torch.stack(sums).sum(dim=0) / len(z)


def entropy_loss(each: Tensor, mean: Tensor, diversity: float = 1.0) -> Tensor:
    """The mean entropy `each` () of the vectors' distributions, minus the entropy of their `mean` (K,), all processes'.

    It draws each vector to one code and makes all codes equally frequent (MAGVIT-v2, eq. 5).
    """
    # The value is the mean over all processes, the gradient only the local one, because DDP averages the gradients.
    mean = mean + (all_reduce_sum(mean.detach().clone()) / world_size() - mean.detach())
    return each - diversity * entropy(mean)
