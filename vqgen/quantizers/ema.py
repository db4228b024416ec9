"""Vector quantization with a codebook that follows its vectors by exponential moving average."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vqgen.distributed import all_reduce_sum, rank, world_size
from vqgen.quantizers.common import Quantizer, QuantizerOutput, nearest_code, straight_through


class EMAQuantizer(Quantizer):
    """A codebook of running means of the vectors assigned to each code (VQ-VAE, appendix A.1).

    A code that is hardly ever used is put back on a vector of the current batch. Since at the start no code has ever
    been used, the first batch initialises the whole codebook by the same rule.

    Args:
        codebook_size: number of codes K.
        code_dim: dimension D of a code.
        decay: of the moving averages, per step.
        commitment_weight: beta, on the encoder's term (VQ-VAE, eq. 3); the codebook has no loss of its own here.
        revive_below: a code is revived when its running count falls below this share of the mean count.
    """

    num_codebooks = 1
    codebook: Tensor  # (K, D)
    counts: Tensor  # (K,) N_k of appendix A.1
    sums: Tensor  # (K, D) m_k of appendix A.1
    num_updates: Tensor

    def __init__(
        self,
        codebook_size: int = 512,
        code_dim: int = 8,
        decay: float = 0.99,
        commitment_weight: float = 0.5,
        revive_below: float = 0.1,
    ):
        super().__init__()
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.revive_below = revive_below
        self.register_buffer("codebook", torch.zeros(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantizes z of shape (B, D, *S); in training mode the codebook moves too."""
        with torch.autocast(z.device.type, enabled=False):
            flat = rearrange(z.float(), "b d ... -> (b ...) d")
            indices = nearest_code(flat.detach(), self.codebook)
            codes = indices.view(z.shape[0], 1, *z.shape[2:])  # (B, 1, *S)
            z_q = self.decode_codes(codes)
            loss = self.commitment_weight * F.mse_loss(z.float(), z_q)
            if self.training:
                self._update(flat.detach(), indices)
            return QuantizerOutput(straight_through(z.float(), z_q), codes, loss)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, 1, *S) to vectors (B, D, *S), fp32."""
        return F.embedding(codes[:, 0], self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def _update(self, z: Tensor, indices: Tensor) -> None:
        """One step of appendix A.1 on vectors z (N, D) and their codes (N,), then revival; the same on all ranks."""
        count, total, candidates = torch.zeros_like(self.counts), torch.zeros_like(self.sums), self._candidates(z)
        count.index_add_(0, indices, torch.ones_like(z[:, 0]))
        total.index_add_(0, indices, z)
        stats = all_reduce_sum(torch.cat([count[:, None], total, candidates], dim=1))  # one collective for all three
        count, total, candidates = stats[:, 0], stats[:, 1 : 1 + self.code_dim], stats[:, 1 + self.code_dim :]

        # A young average takes in more, since the encoder moves fastest at first (+0.2 dB after 800 steps on digits).
        weight = (1 / (1 + 0.1 * self.num_updates)).clamp_min(1 - self.decay)
        self.counts.lerp_(count, weight)
        self.sums.lerp_(total, weight)
        # Masks instead of indices: no data-dependent shape, so no host sync. A revived code starts with the mean count,
        # so that it has many steps to find its vectors before it can be judged again.
        mean_count = self.counts.mean()
        dead = (self.counts < self.revive_below * mean_count) | (self.num_updates == 0)
        self.counts.copy_(torch.where(dead, mean_count, self.counts))
        self.sums.copy_(torch.where(dead[:, None], candidates * mean_count, self.sums))
        smoothed = (self.counts + 1e-5) / (1 + 1e-5 * self.codebook_size / self.counts.sum())  # Laplace
        self.codebook.copy_(self.sums / smoothed[:, None])
        self.num_updates.add_(1)

    def _candidates(self, z: Tensor) -> Tensor:
        """(K, D) vectors spread over the global batch, of which this rank fills in its own and leaves zero the others.

        The golden-ratio sequence goes on from step to step, so that each draw is even over the batch, all ranks agree
        without a random state, and the choice does not depend on the number of ranks.
        """
        k = torch.arange(self.codebook_size, device=z.device) + self.num_updates * self.codebook_size
        share = (k % 2**31) * 1327217885 % 2**31  # of 2^31, and the factor its golden section: no overflow in int64
        index = (share * (world_size() * len(z)) >> 31) - rank() * len(z)
        mine = (index >= 0) & (index < len(z))
        return torch.where(mine[:, None], z[index.clamp(0, len(z) - 1)], 0.0)
