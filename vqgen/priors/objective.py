"""What changes the prior's objective: random tokens in its context, and smoothed targets."""

import torch
from torch import Tensor


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


def uniform_loss(logits: Tensor) -> Tensor:
    """Cross entropy of logits (M, V) for targets that have all legal tokens alike; illegal ones have the logit -inf."""
    log_p, legal = logits.log_softmax(dim=1), logits.isfinite()
    return -(log_p.masked_fill(~legal, 0.0).sum(dim=1) / legal.sum(dim=1)).mean()
