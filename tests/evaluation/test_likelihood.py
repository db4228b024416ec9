"""Likelihoods against their definitions."""

import math

import pytest
import torch

from vqgen.codes import CodeLayout
from vqgen.evaluation.likelihood import (
    CodeCounts,
    LogisticScales,
    logistic_nats,
    prior_nll,
    tokens_that_tell_apart,
    unigram_entropy,
)
from vqgen.priors.prior import Prior

CPU = torch.device("cpu")


class Codes:
    """Tokens in memory, as a token store."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, rows):
        return self.tokens[rows], torch.full((len(rows),), -1)


def markov(count: int, length: int, matrix: torch.Tensor, seed: int) -> Codes:
    """Sequences of a Markov chain that starts uniformly."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(matrix), (count, 1), generator=generator)
    for _ in range(length - 1):
        tokens = torch.cat([tokens, torch.multinomial(matrix[tokens[:, -1]], 1, generator=generator)], dim=1)
    return Codes(tokens)


@pytest.mark.parametrize("scale", [0.05, 0.7, 30.0])
@pytest.mark.parametrize("mean", [-20.0, 0.0, 3.3, 127.5, 255.0, 300.0])
def test_the_256_values_of_a_pixel_have_probability_1_together(mean, scale):
    values = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    nats = logistic_nats(values, torch.tensor(mean, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-12)


def test_scales_are_those_that_the_noise_had_in_each_channel_and_range():
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(64, 2, 32, 32, dtype=torch.float64, generator=generator)
    means = torch.tensor([40.0, 200.0]).repeat_interleave(16)[:, None].expand(64, 2, 32, 32).double()
    scales = torch.tensor([[2.0, 6.0], [4.0, 9.0]], dtype=torch.float64)  # (channel, dark or bright)
    noise = torch.log(u / (1 - u)) * scales.repeat_interleave(16, dim=1)[:, :, None]
    images = (means + noise).round().clamp(0, 255).byte()
    fitted = LogisticScales(2, CPU)
    fitted.update(images[:20], means[:20])
    fitted.update(images[20:], means[20:])
    fitted.fit()
    best = fitted.best.view(2, 16)[:, [2, 12]]
    assert torch.allclose(best, scales, rtol=0.12)  # the grid's step
    expected = logistic_nats(images, means, scales.repeat_interleave(16, dim=1)[:, :, None]).sum(dim=(1, 2, 3))
    assert fitted.nll(images, means).mean().item() == pytest.approx(expected.mean().item(), rel=2e-3)


def test_a_range_that_was_never_seen_has_the_scale_of_all_the_others():
    generator = torch.Generator().manual_seed(0)
    means = torch.full((4, 1, 16, 16), 100.0, dtype=torch.float64)
    images = (means + 8 * torch.randn(means.shape, generator=generator)).round().byte()
    scales = LogisticScales(1, CPU)
    scales.update(images, means)
    scales.fit()
    assert scales.best.unique().numel() == 1
    elsewhere = scales.nll(images + 100, means + 100) / 256
    assert elsewhere.mean().item() == pytest.approx(scales.nll(images, means).mean().item() / 256)


def test_unigram_and_bigram_models_reach_the_entropies_of_a_markov_chain():
    matrix = torch.tensor([[0.90, 0.05, 0.05], [0.10, 0.80, 0.10], [0.30, 0.30, 0.40]])
    layout = CodeLayout(((1, 40),), (3,))
    train, other = markov(3000, 40, matrix, 0), markov(1000, 40, matrix, 1)
    unigram, bigram = CodeCounts(train, layout).nll(other, 1000)
    stationary = torch.linalg.matrix_power(matrix, 200)[0]
    rate = -(stationary[:, None] * torch.xlogy(matrix, matrix)).sum().item()
    assert unigram == pytest.approx(unigram_entropy(other, layout), abs=0.01)
    assert rate < bigram < rate + math.log(3) / 40 + 0.02  # the first of 40 codes has no code before it
    assert bigram < unigram


def test_the_bigram_model_is_no_better_than_chance_where_there_is_nothing_to_know():
    """The plain entropy of bigrams would be about half the truth, because 10,000 pairs fill few of 65,536 cells."""
    codes = [Codes(torch.randint(256, (100, 100), generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    unigram, bigram = CodeCounts(codes[0], CodeLayout(((1, 100),), (256,))).nll(codes[1], 100)
    assert unigram == pytest.approx(math.log(256), abs=0.02)
    assert bigram >= unigram


def test_the_count_models_give_every_code_some_probability_and_all_of_them_1():
    layout = CodeLayout(((2, 3),), (4,))  # two codebooks: tokens 0 to 3 and 4 to 7 in turn
    train = Codes(torch.tensor([[0, 4, 1, 5, 0, 4], [0, 5, 1, 4, 0, 4]]))
    counts = CodeCounts(train, layout)
    for start, following in ((0, range(4, 8)), (4, range(4)), (3, range(4, 8))):  # 3 was never seen
        pairs = torch.tensor([[start, code] for code in following])
        p = [math.exp(-2 * counts.nll(Codes(pair[None]), 1)[1]) / counts.unigram[start].item() for pair in pairs]
        assert sum(p) == pytest.approx(1)
        assert min(p) > 0


def test_prior_nll_is_the_mean_over_all_tokens_whatever_the_batch_size():
    layout = CodeLayout(((1, 6),), (5,))
    torch.manual_seed(0)
    prior = Prior(layout, [], hidden_size=16, num_hidden_layers=1, num_attention_heads=2).eval()
    codes = Codes(torch.randint(5, (9, 6)))
    with torch.no_grad():
        log_p = prior(codes.tokens, torch.full((9,), -1)).log_softmax(dim=-1)
    expected = -log_p.gather(2, codes.tokens[..., None]).mean().item()
    for batch_size in (2, 9, 100):
        assert prior_nll(prior, codes, 9, batch_size, CPU) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "layout", "tokens"),
    [
        (20_000, CodeLayout(((1, 4, 4),), (512,)), 2),
        (512, CodeLayout(((1, 4, 4),), (512,)), 1),
        (513, CodeLayout(((1, 4, 4),), (512,)), 2),
        (64, CodeLayout(((2, 1, 1), (1, 2, 2)), (2, 16)), 3),  # 2 x 2 x 16
        (10**6, CodeLayout(((1, 2, 2),), (4,)), 4),  # all are too few
        (1, CodeLayout(((1, 2, 2),), (4,)), 1),
    ],
)
def test_how_many_tokens_tell_sequences_apart(count, layout, tokens):
    assert tokens_that_tell_apart(count, layout) == tokens
