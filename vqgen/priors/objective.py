"""What changes the prior's objective: random tokens in its context, random orders, smoothed targets, code vectors."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class CodeHeads(nn.Module):
    """Two linear maps from hidden states to code vectors, for a loss in training (reAR, He et al. 2025).

    Args:
        width: width of the transformer.
        vectors: (V, D), the code vector of each token.
    """

    vectors: Tensor

    def __init__(self, width: int, vectors: Tensor):
        super().__init__()
        self.current, self.next = (nn.Linear(width, vectors.shape[1]) for _ in range(2))
        self.register_buffer("vectors", F.normalize(vectors, dim=1), persistent=False)

    def forward(self, early: Tensor, late: Tensor, tokens: Tensor) -> Tensor:
        """The mean cosine distance of what they predict: the vector of the last token that was read, and of the next.

        Args:
            early: (B, N, width), states that have read the class and all tokens (B, N) but the last.
            late: the same, of a later layer.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            current, following = self.current(early[:, 1:].float()), self.next(late.float())
        vectors = self.vectors[tokens]  # (B, N, D)
        distances = (
            1 - F.cosine_similarity(x, y, dim=2) for x, y in ((current, vectors[:, :-1]), (following, vectors))
        )
        return torch.stack([distance.mean() for distance in distances]).sum()


def with_random_tokens(tokens: Tensor, ranges: Tensor, most: float, noise: Tensor) -> Tensor:
    """Tokens of which each sequence has a random share, up to `most`, replaced by random legal ones.

    reAR (He et al. 2025, section 3.2) trains with such a context and the true targets.

    Args:
        tokens: (B, N).
        ranges: (N, 2), the legal tokens at each position.
        most: the largest share.
        noise: (B, 1 + 2 N), uniform in [0, 1): for the share, the choice of tokens, and what replaces them.
    """
    share, chosen, value = noise.split([1, *[tokens.shape[1]] * 2], dim=1)
    first, end = ranges.unbind(dim=1)  # (N,)
    drawn = first + (value * (end - first)).long().clamp_max(end - first - 1)  # rounding could reach the end
    return torch.where(chosen < most * share, drawn, tokens)


def random_orders(share: float, noise: Tensor) -> Tensor:
    """Orders (B, N) of the N places, a share of them random ones and the others 0, 1, 2, ... (Yu et al. 2024, RAR).

    Args:
        share: the share.
        noise: (B, 1 + N), uniform in [0, 1): for the choice, and the order.
    """
    in_turn = torch.arange(noise.shape[1] - 1, device=noise.device)
    return torch.where(noise[:, :1] < share, noise[:, 1:].argsort(dim=1), in_turn)


def annealed(last: float, share: float) -> float:
    """The share of random orders at this share of a run: 1 in the first half, `last` from three quarters on."""
    return last + (1 - last) * min(1.0, max(0.0, 3 - 4 * share))


def token_losses(logits: Tensor, targets: Tensor, smoothed: bool) -> Tensor:
    """Mean cross entropy of logits (B, N, V) for the targets (B, N), (1,); if `smoothed`, and their uniform loss, (2,).

    Illegal tokens have the logit -inf.
    """
    logits = rearrange(logits.float(), "b n v -> (b n) v")
    losses = [F.cross_entropy(logits, rearrange(targets, "b n -> (b n)"))]
    return torch.stack([*losses, uniform_loss(logits)] if smoothed else losses)


def uniform_loss(logits: Tensor) -> Tensor:
    """Cross entropy of logits (M, V) for targets that have all legal tokens alike; illegal ones have the logit -inf."""
    log_p, legal = logits.log_softmax(dim=1), logits.isfinite()
    return -(log_p.masked_fill(~legal, 0.0).sum(dim=1) / legal.sum(dim=1)).mean()
