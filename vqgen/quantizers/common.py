"""What the quantizers share: interface, lookup, gradient estimators, entropy."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqgen.distributed import all_reduce_sum, rank, world_size
from vqgen.errors import require, require_choice

BLOCK_ELEMENTS = 1 << 22  # of (N, K) probabilities that are held at a time
MAX_CODES, MAX_DIM = 1 << 31, 1 << 16  # of a codebook


class QuantizerOutput(NamedTuple):
    """What a quantizer returns, always.

    Attributes:
        z_q: (B, D, *S) the quantized vectors, whose gradient reaches z.
        codes: (B, Q, *S) int64 indices into the codebook; never squeezed, also when Q = 1.
        loss: scalar, already weighted.
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor


class Quantizer(nn.Module):
    """The interface of every quantizer: vectors to codes and back.

    A quantizer implements `quantize` and `decode`, on vectors in fp32 with the dimension last, and `bound` if its codes
    lie in a bounded space; what is here brings maps of any number of spatial axes to that shape.

    Attributes:
        codebook_size: number of codes K.
        num_codebooks: codes per position Q; 1 except for residual quantizers.
        code_dim: dimension D of the vectors.
        residual_scale: how much smaller what is left over is than what was quantized, in each dimension or in all; 1
            where a codebook finds out by itself.
        refused: options of other quantizers that would mean nothing here, and why.
    """

    codebook_size: int
    num_codebooks: int = 1
    code_dim: int
    residual_scale: float | Tensor = 1.0
    refused: ClassVar[dict[str, str]] = {}

    @classmethod
    def complete(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The constructor's options, with the options of a quantizer inside this one completed by their defaults."""
        return options

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantizes z of shape (B, D, *S); in training mode a codebook may move too."""
        assert z.shape[1] == self.code_dim, f"{z.shape[1]} channels for code_dim={self.code_dim}"
        # Distances, statistics and rounding are in fp32 whatever autocast says: bf16 takes near codes for one another.
        with torch.autocast(z.device.type, enabled=False):
            vectors = rearrange(z.float(), "b d ... -> b (...) d").contiguous()
            z_q, codes, loss = self.quantize(self.bound(vectors))
            z_q = z_q.movedim(-1, 1).reshape(z.shape)  # (B, D, *S)
            return QuantizerOutput(z_q, codes.movedim(-1, 1).reshape(len(z), -1, *z.shape[2:]), loss)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, Q, *S) to vectors (B, D, *S), fp32."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.decode(codes.movedim(1, -1)).movedim(-1, 1)

    def bound(self, z: Tensor) -> Tensor:
        """Vectors (..., D) as they are quantized: a quantizer of residuals takes them in the space of the codes."""
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
    """Returns z_q, bit for bit, with the gradient of the identity in z and none in z_q (VQ-VAE, section 3.2).

    z + (z_q - z).detach() says the same, at three more passes over memory and some lost bits.
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

    beta, the commitment weight, is the encoder's: it scales the gradient of z, and the codebook's weight that of z_q.
    The terms have the same value, so both take one pass over memory, where two calls of mse_loss take four.
    """
    return _VQLoss.apply(z, z_q, commitment_weight, codebook_weight)


def rotation_trick(z: Tensor, z_q: Tensor) -> Tensor:
    """Returns z_q, bit for bit, with the gradient of the rotation and scaling that take z (..., D) to z_q.

    Both are constants to the gradient (Fifty et al. 2024, section 4.2), so it turns with the codes, where
    straight-through moves it unturned.
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
    """The function (z, z_q) -> z_q by which the decoder's gradient passes the quantizer.

    Raises:
        InputError: there is none of this name, or the rotation trick means nothing for such codes.
    """
    require_choice("gradient", gradient, ESTIMATORS, "gradient")
    require(
        not (temperature and gradient == "rotation"),
        f"temperature={temperature} with gradient=rotation: a drawn code may lie on any side of the vector, and the "
        f"rotation onto it would turn the gradient around; use gradient=straight-through or temperature=0",
    )
    require(
        not (code_dim == 1 and gradient == "rotation"),
        "code_dim=1 with gradient=rotation: a line has but two directions; use gradient=straight-through",
    )
    return ESTIMATORS[gradient]


def require_weights(**weights: float) -> None:
    """Raises InputError for a weight of a loss that is negative."""
    for key, weight in weights.items():
        require(weight >= 0, f"{key}={weight}: must be 0 or more")


def nearest_code(z: Tensor, codebook: Tensor, temperature: float = 0.0) -> Tensor:
    """Index of the Euclidean-nearest codebook row of each vector: (N, D), (K, D) -> (N,) int64.

    With a temperature the index is drawn instead, from softmax(-|z - e|^2 / temperature). Call it in fp32.

    argmin |z - e|^2 = argmax z.e - |e|^2 / 2, so matrix multiplies do it, and of the (N, K) scores a block exists at a
    time: on a CPU one that stays in its cache.
    """
    bias = -0.5 * codebook.square().sum(dim=1)
    on_cpu = z.device.type == "cpu"
    num_codes = min(len(codebook), 1024) if on_cpu else len(codebook)
    num_vectors = max(1, (1 << 19 if on_cpu else 1 << 23) // num_codes)
    block = z.new_empty(num_vectors * num_codes)  # one for all: the first touch of new memory costs as much as the sums
    indices = []
    for part in z.split(num_vectors):
        best, index = part.new_full((len(part),), -torch.inf), part.new_zeros(len(part), dtype=torch.int64)
        for i, (rows, row_bias) in enumerate(zip(codebook.split(num_codes), bias.split(num_codes), strict=True)):
            scores = block[: len(part) * len(rows)].view(len(part), len(rows))
            torch.addmm(row_bias, part, rows.T, out=scores)
            if temperature:  # the Gumbel-max trick; scores are -|z - e|^2 / 2 and what all codes have in common
                scores -= 0.5 * temperature * torch.empty_like(scores).exponential_().log()
            score, where = _row_max(scores)
            better = score > best
            best, index = torch.where(better, score, best), torch.where(better, where + i * num_codes, index)
        indices.append(index)
    return torch.cat(indices)


def _row_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of (N, K), and where it is.

    On a CPU torch finds a maximum several times faster than its place, so the maxima of 32 groups come first.
    """
    if x.shape[1] % 32:
        return x.max(dim=1)
    groups = x.view(len(x), -1, 32)  # (N, members, 32): the members of a group are 32 columns apart
    best, group = groups.amax(dim=1).max(dim=1)
    members = groups[torch.arange(len(x), device=x.device), :, group]
    return best, members.max(dim=1).indices * 32 + group


def spread_vectors(z: Tensor, count: int, draw: Tensor) -> Tensor:
    """(count, D) vectors spread evenly over the global batch, of which z (N, D) is this process's part.

    The golden-ratio sequence goes on from draw to draw, so all processes agree without a random state, and the choice
    does not depend on their number. What is not finite counts as zero, or a code would be lost there.
    """
    k = torch.arange(count, device=z.device) + draw * count
    share = (k % 2**31) * 1327217885 % 2**31  # of 2^31, and the factor its golden section: no overflow in int64
    index = (share * (world_size() * len(z)) >> 31) - rank() * len(z)
    mine = (index >= 0) & (index < len(z))
    vectors = torch.nan_to_num(z[index.clamp(0, len(z) - 1)], 0.0, 0.0, 0.0)
    return all_reduce_sum(torch.where(mine[:, None], vectors, 0.0))


def assigned(z: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors of the global batch each code has, (K,), and their sums, (K, D); z (N, D), indices (N,)."""
    count = z.new_zeros(codebook_size).index_add_(0, indices, torch.ones_like(z[:, 0]))
    total = torch.zeros(codebook_size, z.shape[1], device=z.device).index_add_(0, indices, z)
    return all_reduce_sum(count), all_reduce_sum(total)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions over the last dimension."""
    return -torch.xlogy(p, p.clamp_min(1e-30)).sum(dim=-1)


def soft_assignment(
    z: Tensor, codebook: Tensor, temperature: float, target: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What p = softmax(-|z - e|^2 / temperature) over the codes (K, D) says of vectors (N, D).

    The (N, K) probabilities exist a block at a time, in the backward pass too.

    Returns:
        The mean under p of `target` (K, E) for each vector, (N, E); the mean entropy of p; the mean p, (K,).
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
    """The mean entropy () of each vector's distribution, less that of their mean (K,) over all processes.

    It wants each vector near one code and all codes equally frequent (MAGVIT-v2, eq. 5).
    """
    # With the gradient of the local mean: DDP takes the mean of gradients by itself.
    mean = mean + (all_reduce_sum(mean.detach().clone()) / world_size() - mean.detach())
    return each - diversity * entropy(mean)
