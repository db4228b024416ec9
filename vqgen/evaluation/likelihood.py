"""Likelihood of codes under the prior and under simple counts, and of images under the decoder."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqgen.codes import CodeLayout
from vqgen.data.codes import TokenStore
from vqgen.data.images import some_rows
from vqgen.distributed import all_reduce_sum, rank, world_size
from vqgen.priors.objective import token_losses
from vqgen.priors.prior import Prior

COUNTED_AT_ONCE = 2048
COUNTED = 20_000  # at most this many sequences are counted
SCALE_BINS, SCALE_PRIOR = 16, 10


@torch.no_grad()
def prior_nll(
    model: Prior,
    codes: TokenStore,
    num_images: int,
    batch_size: int,
    device: torch.device,
    scales: Sequence[float] | None = None,
) -> float:
    """Negative log-likelihood of codes given their class, in nats per token; the processes share the work.

    Args:
        model: the prior.
        codes: the codes.
        num_images: largest number of images.
        batch_size: images at a time.
        device: the prior's device.
        scales: scale of classifier-free guidance at each of the N places; None means no guidance.
    """
    chosen = some_rows(len(codes), num_images)[rank() :: world_size()]
    sums = torch.zeros(2, device=device)  # the sum of nats, the number of tokens
    for start in range(0, len(chosen), batch_size):
        tokens, class_ids = (part.to(device) for part in codes.__getitems__(chosen[start : start + batch_size]))
        if scales is None:
            (nats,) = model(tokens, class_ids, targets=tokens)
        else:
            none, given = (
                model(tokens, ids).log_softmax(dim=-1) for ids in (torch.full_like(class_ids, -1), class_ids)
            )
            guided = torch.lerp(none, given, torch.tensor(scales, device=device)[:, None]).nan_to_num(nan=-torch.inf)
            (nats,) = token_losses(guided, tokens, smoothed=False)
        sums += torch.stack([nats * tokens.numel(), torch.tensor(tokens.numel(), device=device)])
    nats, count = all_reduce_sum(sums).tolist()
    return nats / count


def unigram_entropy(codes: TokenStore, layout: CodeLayout) -> float:
    """Entropy of the training codes without any context, in nats per token (mean over the codebooks)."""
    tokens = codes.__getitems__(some_rows(len(codes), COUNTED))[0]
    counts = torch.bincount(tokens.flatten(), minlength=layout.vocab_size)
    totals = torch.zeros_like(counts)
    for first, end in set(map(tuple, layout.token_ranges().tolist())):
        totals[first:end] = counts[first:end].sum()
    return -(torch.xlogy(counts, counts / totals).sum() / counts.sum()).item()


def tokens_that_tell_apart(count: int, layout: CodeLayout) -> int:
    """The smallest number of tokens whose combinations are as many as `count` sequences.

    A prior of enough capacity knows by then which training sequence it is in, and can learn the other tokens by heart.
    """
    sizes = (layout.token_ranges() @ torch.tensor([-1, 1])).double()  # (N,)
    enough = sizes.log2().cumsum(dim=0) >= math.log2(count)
    return int(enough.long().argmax()) + 1 if enough.any() else layout.num_tokens


class CodeCounts:
    """Unigram and bigram models of codes: how often each code occurs, and how often it follows each other code.

    Args:
        codes: the training codes; at most COUNTED sequences are counted.
        layout: the tokens' layout.
    """

    def __init__(self, codes: TokenStore, layout: CodeLayout):
        tokens = codes.__getitems__(some_rows(len(codes), COUNTED))[0]  # (n, N)
        self.vocab_size = layout.vocab_size
        counts = torch.bincount(tokens.flatten(), minlength=self.vocab_size).double() + 1  # Laplace's rule
        self.unigram = torch.zeros(self.vocab_size, dtype=torch.float64)
        for first, end in set(map(tuple, layout.token_ranges().tolist())):
            self.unigram[first:end] = counts[first:end] / counts[first:end].sum()
        pairs = tokens[:, :-1] * self.vocab_size + tokens[:, 1:]
        self.pairs, self.pair_counts = pairs.flatten().unique(return_counts=True)
        before = self.pairs // self.vocab_size
        self.followers = torch.bincount(before, minlength=self.vocab_size).double()
        self.before_counts = torch.zeros(self.vocab_size, dtype=torch.float64)
        self.before_counts.index_add_(0, before, self.pair_counts.double())

    def nll(self, codes: TokenStore, num_images: int) -> tuple[float, float]:
        """Cross-entropy of other codes under the unigram and the bigram model, in nats per token.

        The bigram model falls back on the unigram model by Witten and Bell's rule: a code that had T different
        followers in n occurrences gets a new follower with probability T / (n + T). Without this rule, the entropy of
        bigrams in a finite sample would be far too low.
        """
        rows = some_rows(len(codes), num_images)
        sums, count = torch.zeros(2, dtype=torch.float64), 0
        for block in np.split(rows, range(COUNTED_AT_ONCE, len(rows), COUNTED_AT_ONCE)):
            tokens = codes.__getitems__(block)[0]
            sums += self._nats(tokens)
            count += tokens.numel()
        unigram, bigram = (sums / count).tolist()
        return unigram, bigram

    def _nats(self, tokens: Tensor) -> Tensor:
        """-log p of tokens (n, N) under the unigram and the bigram model, (2,)."""
        unigram = self.unigram[tokens]  # (n, N)
        before = tokens[:, :-1]
        pairs = before * self.vocab_size + tokens[:, 1:]
        place = torch.searchsorted(self.pairs, pairs).clamp_max(len(self.pairs) - 1)
        count = torch.where(self.pairs[place] == pairs, self.pair_counts[place], 0)
        followers, occurrences = self.followers[before], self.before_counts[before]
        known = followers > 0
        mixed = (count + followers * unigram[:, 1:]) / (occurrences + followers).clamp_min(1)
        bigram = torch.cat([unigram[:, :1], torch.where(known, mixed, unigram[:, 1:])], dim=1)
        return -torch.stack([unigram.log().sum(), bigram.log().sum()])


def logistic_nats(images: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """-log p(x | z) of 8-bit images under a discretised logistic around the decoder's output (PixelCNN++, eq. 2).

    The probability of a value v is the logistic's mass between v - 0.5 and v + 0.5; 0 and 255 get the tails as well.

    Args:
        images: uint8 (B, C, H, W).
        means: the decoder's output (B, C, H, W), in the images' units, 0 to 255.
        scales: the logistic's scales, in a shape that broadcasts to the images'.

    Returns:
        Nats (B, C, H, W).
    """
    x = images.double()
    above, below = (x + 0.5 - means) / scales, (x - 0.5 - means) / scales
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)); the right side loses no digits
    log_p = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(-1 / scales))
    log_p = torch.where(images == 0, F.logsigmoid(above), log_p)
    return -torch.where(images == 255, F.logsigmoid(-below), log_p)


class LogisticScales:
    """Scales fitted to images by maximum likelihood: one for each channel and each sixteenth of the decoder's range.

    A decoder is surer of black than of grey, so one scale for both would fit neither. The scale depends only on the
    decoder's output, so the likelihood is a proper one.

    Args:
        channels: number of channels C.
        device: the images' device.
    """

    def __init__(self, channels: int, device: torch.device):
        self.grid = torch.logspace(math.log10(0.05), math.log10(64), 48, dtype=torch.float64, device=device)
        self.nats = torch.zeros(len(self.grid), channels * SCALE_BINS, dtype=torch.float64, device=device)
        self.counts = torch.zeros(channels * SCALE_BINS, dtype=torch.float64, device=device)

    def update(self, images: Tensor, means: Tensor) -> None:
        """Adds images uint8 and the decoder's output for them, both (B, C, H, W)."""
        bins = self._bins(means).flatten()
        self.counts += torch.bincount(bins, minlength=len(self.counts))
        for i, scale in enumerate(self.grid):
            self.nats[i].index_add_(0, bins, logistic_nats(images, means, scale).flatten())

    def fit(self) -> None:
        """Chooses each scale from the grid by the likelihood of all added images, of all processes.

        Each sixteenth of the range also counts SCALE_PRIOR average values of the whole range, as it may have few of its
        own.
        """
        nats, counts = all_reduce_sum(self.nats), all_reduce_sum(self.counts)
        nats = nats + SCALE_PRIOR * nats.sum(dim=1, keepdim=True) / counts.sum()
        self.best = self.grid[nats.argmin(dim=0)]  # (C * SCALE_BINS,)

    def nll(self, images: Tensor, means: Tensor) -> Tensor:
        """-log p(x | z) (B,) of images uint8 (B, C, H, W), in nats, with the fitted scales."""
        return logistic_nats(images, means, self.best[self._bins(means)]).sum(dim=(1, 2, 3))

    def _bins(self, means: Tensor) -> Tensor:
        channel = torch.arange(means.shape[1], device=means.device)[:, None, None]
        return channel * SCALE_BINS + (means / 256 * SCALE_BINS).long().clamp(0, SCALE_BINS - 1)
