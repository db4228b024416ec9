"""The common part of `ema` and `vq`, which differ only in how their codebook learns."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgen.errors import require, require_choice, require_size
from vqgen.quantizers.common import (
    MAX_CODES,
    MAX_DIM,
    Quantizer,
    QuantizerOutput,
    assigned,
    entropy_loss,
    gradient_estimator,
    nearest_code,
    require_weights,
    soft_assignment,
    spread_vectors,
    vq_loss,
)


class CodebookQuantizer(Quantizer):
    """Replaces each vector by the nearest row of a codebook (VQ-VAE, van den Oord et al. 2017, eq. 2).

    The first training batch initialises the codebook. A code that is hardly ever used is revived: it moves to a vector
    of the current batch before the lookup, so it is used in the same step.

    Args:
        codebook_size: number of codes K.
        code_dim: dimension D of a code.
        lookup: `euclidean` takes the nearest code; `cosine` first scales vectors and codes to unit length.
        gradient: how the decoder's gradient reaches the encoder, `straight-through` or `rotation`.
        commitment_weight: beta, on the encoder's term (VQ-VAE, eq. 3).
        legacy_beta: whether beta is on the codebook's term instead, and the encoder's has weight 1, as in VQGAN's code.
        decay: decay of the running averages per forward pass.
        kmeans_iterations: iterations of k-means on the first batch, which initialises the codebook.
        revive_below: a code is revived if its running count is below this share of the mean count; 0 revives none.
        temperature: training draws codes from softmax(-distance^2 / temperature); 0 takes the nearest code.
        entropy_weight: weight of a loss that draws each vector to one code and makes all codes equally frequent.
        entropy_temperature: temperature of the softmax over -distance^2 in that loss.
    """

    codebook_weight: float  # weight of the codebook's term in the loss
    codebook: Tensor  # (K, D)
    counts: Tensor  # (K,) running counts: N_k of appendix A.1
    num_updates: Tensor

    def __init__(
        self,
        codebook_size: int = 512,
        code_dim: int = 8,
        lookup: Literal["euclidean", "cosine"] = "euclidean",
        gradient: Literal["straight-through", "rotation"] = "straight-through",
        commitment_weight: float = 0.5,
        legacy_beta: bool = False,
        decay: float = 0.99,
        kmeans_iterations: int = 10,
        revive_below: float = 0.1,
        temperature: float = 0.0,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 1.0,
    ):
        super().__init__()
        require_size("codebook_size", codebook_size, MAX_CODES)
        require_size("code_dim", code_dim, MAX_DIM)
        require_choice("lookup", lookup, ("euclidean", "cosine"), "lookup")
        require_size("kmeans_iterations", kmeans_iterations, 1000, least=0)
        require_weights(commitment_weight=commitment_weight, entropy_weight=entropy_weight)
        require(entropy_temperature > 0, f"entropy_temperature={entropy_temperature}: must be above 0")
        require(0 < decay < 1, f"decay={decay}: must be above 0 and below 1")
        require(0 <= revive_below < 1, f"revive_below={revive_below}: must be at least 0 and below 1, the mean")
        require(temperature >= 0, f"temperature={temperature}: must be 0 (the nearest code) or more")
        require(
            not legacy_beta or self.codebook_weight > 0,
            "legacy_beta=True: ema's codebook has no term in the loss that beta could weigh; use vq, or leave it out",
        )
        require(
            not (code_dim == 1 and lookup == "cosine"),
            "code_dim=1 with lookup=cosine: a line has only two directions; use lookup=euclidean or a larger code_dim",
        )
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.cosine = lookup == "cosine"
        self.estimator = gradient_estimator(gradient, code_dim, temperature)
        self.commitment_weight = commitment_weight
        if legacy_beta:
            self.commitment_weight, self.codebook_weight = 1.0, commitment_weight
        self.decay = decay
        self.kmeans_iterations = kmeans_iterations
        self.revive_below = revive_below
        self.temperature = temperature
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._register(torch.zeros(codebook_size, code_dim))
        self.initialised = False  # equals num_updates > 0, but reading that would wait for the device

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Quantizes vectors z (B, N, D) to z_q (B, N, D), codes (B, N, 1) and the loss."""
        z = self._onto_sphere(z)
        vectors = z.detach().flatten(0, 1)  # (B N, D)
        if self.training:
            if not self.initialised:
                self._initialise(vectors)
                self.initialised = True
            elif self.revive_below:
                self._revive(vectors)
            self.num_updates.add_(1)
        codebook = self._onto_sphere(self.codebook)
        indices = nearest_code(vectors, codebook.detach(), self.temperature if self.training else 0.0)
        z_q = F.embedding(indices, codebook).view_as(z)
        loss = vq_loss(z, z_q, self.commitment_weight, self.codebook_weight)
        if self.entropy_weight and self.training:
            seen = codebook.clone()  # ema would change the original before the backward pass
            _, each, mean = soft_assignment(z.flatten(0, 1), seen, self.entropy_temperature)
            loss = loss + self.entropy_weight * entropy_loss(each, mean)
        if self.training:
            self._learn(vectors, indices)
        return QuantizerOutput(self.estimator(z, z_q), indices.view(*z.shape[:2], 1), loss)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to vectors (..., D)."""
        return F.embedding(codes[..., 0], self._onto_sphere(self.codebook))

    @torch.no_grad()
    def adopt(self) -> None:
        """Makes a codebook that came without running counts one long in training: no k-means, all codes alike in use.

        With counts of zero, the first steps would move every code to the first batches.
        """
        if self.num_updates == 0:
            every = torch.arange(self.codebook_size, device=self.codebook.device)
            dead = torch.ones_like(every, dtype=torch.bool)
            self._place(every, dead, self.codebook.detach().clone(), torch.ones_like(self.counts[0]))
            self.num_updates.fill_(round(10 / (1 - self.decay)))  # `_weight` has then fallen to 1 - decay
            self.initialised = True

    def _weight(self) -> Tensor:
        """The weight of this step in the running averages.

        It is larger at the start of a run, when the encoder changes fastest (+0.2 dB after 800 steps on digits).
        """
        return (1 / (1 + 0.1 * self.num_updates)).clamp_min(1 - self.decay)

    def _register(self, codebook: Tensor) -> None:
        """Registers the codebook (K, D) as a buffer or as a parameter."""
        raise NotImplementedError

    def _learn(self, z: Tensor, indices: Tensor) -> None:
        """Learns from the vectors z (N, D) and their codes (N,)."""
        raise NotImplementedError

    def _place(self, codes: Tensor, dead: Tensor, vectors: Tensor, count: Tensor) -> None:
        """Moves each of the codes (R,) that is dead (R,) to its vector (R, D), and sets its running count."""
        self.codebook.index_copy_(0, codes, torch.where(dead[:, None], vectors, self.codebook[codes]))
        self.counts.index_copy_(0, codes, torch.where(dead, count, self.counts[codes]))

    def _onto_sphere(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.cosine else x

    @torch.no_grad()
    def _initialise(self, z: Tensor) -> None:
        """Moves the codes to the centres that k-means finds in the vectors (N, D) of the first batch."""
        centres = spread_vectors(z, self.codebook_size, self.num_updates)
        for _ in range(self.kmeans_iterations):
            count, total = assigned(z, nearest_code(z, centres), self.codebook_size)
            means = self._onto_sphere(total / count.clamp_min(1)[:, None])
            used = (count > 0) & torch.isfinite(means.sum(dim=1))
            centres = torch.where(used[:, None], means, centres)
        every = torch.arange(self.codebook_size, device=z.device)
        self._place(every, torch.ones_like(every, dtype=torch.bool), centres, torch.ones_like(self.counts[0]))

    @torch.no_grad()
    def _revive(self, z: Tensor) -> None:
        """Moves codes that are hardly ever used to vectors of the batch (N, D).

        It always looks at the least used 16th of all codes. So shapes do not depend on the data, the CPU does not wait
        for the device, and processes exchange little.
        """
        rarest = self.counts.argsort(stable=True)[: max(1, self.codebook_size // 16)]  # (R,)
        mean_count = self.counts.mean()
        dead = self.counts[rarest] < self.revive_below * mean_count
        # A revived code starts with the mean count, so it has many steps to find its vectors before it can die again.
        self._place(rarest, dead, spread_vectors(z, len(rarest), self.num_updates), mean_count)

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.initialised = bool(self.num_updates > 0)
