"""Sampling: from class ids to tokens to images; for a GAN, from noise to images."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqgen.adversarial.dcgan import DCGANGenerator
from vqgen.data.order import mixed_seed
from vqgen.priors.prior import Prior
from vqgen.tokenizers.vqmodel import VQModel, to_uint8

ROWS = 32  # batches are padded to a multiple of this, because matrix products of few rows round differently


@torch.no_grad()
def sample_tokens(
    prior: Prior,
    class_ids: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_scale: float = 1.0,
    prefix: Tensor | None = None,
    generator: Sequence[np.random.Generator] | None = None,
) -> Tensor:
    """Draws token sequences from the prior, with a key-value cache.

    Args:
        prior: the prior, in eval mode.
        class_ids: (B,) int64, -1 for no class.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; 0 means all tokens.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        cfg_scale: s of classifier-free guidance, logits = none + s (class - none), where `none` are the logits without
            a class (Ho and Salimans 2022); 1 turns it off.
        prefix: (B, P) tokens that the sequences start with.
        generator: a NumPy generator for each sequence, such as `np.random.default_rng(seed)`, so that a sequence is
            the same in any batch; None uses torch's global generator.

    Returns:
        Tokens (B, N), int64.
    """
    batch, device, num_tokens = len(class_ids), class_ids.device, prior.layout.num_tokens
    precision = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    if generator is None:
        noise = torch.rand(batch, num_tokens, dtype=precision)
    else:
        dtype = np.float32 if precision == torch.float32 else np.float64
        noise = torch.from_numpy(np.stack([g.random(num_tokens, dtype) for g in generator]))
    noise = noise.to(device)  # (B, N): each token is drawn by one uniform number
    tokens = prefix if prefix is not None else class_ids.new_empty(batch, 0)
    guided = cfg_scale != 1.0 and bool((class_ids >= 0).any())

    starts = prior.class_tokens(torch.cat([class_ids, torch.full_like(class_ids, -1)]) if guided else class_ids)
    inputs = torch.cat([starts, tokens.repeat(2, 1) if guided else tokens], dim=1)
    cache = None
    while tokens.shape[1] < num_tokens:
        position = tokens.shape[1]
        output = prior.lm(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        logits = prior.legal(output.logits[:, -1:], start=position)[:, 0].to(precision)  # (B or 2 B, vocab_size)
        if guided:
            conditional, unconditional = logits.log_softmax(dim=1).chunk(2)
            logits = torch.lerp(unconditional, conditional, cfg_scale).nan_to_num(nan=-torch.inf)
        token = draw(logits, noise[:, position], temperature, top_k, top_p)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        token = token.repeat(2)[:, None] if guided else token[:, None]
        inputs = token if cache is not None else torch.cat([inputs, token], dim=1)
    return tokens


def draw(logits: Tensor, noise: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draws tokens (B,) from logits (B, V): inverts the distribution function at noise (B,), uniform in [0, 1)."""
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(dim=1)
    if top_p < 1:
        sorted_p, order = probabilities.sort(dim=1, descending=True)
        beyond = sorted_p.cumsum(dim=1) - sorted_p >= top_p  # the likelier tokens together reach top_p already
        probabilities = probabilities.masked_fill(beyond.scatter(1, order, beyond), 0.0)
    cumulative = probabilities.cumsum(dim=1)
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]


@torch.no_grad()
def sample_images(
    prior: Prior, tokenizer: VQModel, class_ids: Tensor, *, seed: int, first: int = 0, **options: float
) -> Tensor:
    """Draws images uint8 (B, C, H, W) for class ids (B,), with the options of sample_tokens.

    Image i depends only on the seed, on first + i and on its class.
    """
    count = len(class_ids)
    padding = -count % ROWS
    class_ids = torch.cat([class_ids, class_ids[:1].expand(padding)])
    tokens = sample_tokens(
        prior,
        class_ids,
        generator=image_generators(seed, first, count + padding),
        **options,  # type: ignore[arg-type]
    )
    codes = [prior.layout.unflatten(part) for part in tokens.split(ROWS)]
    return torch.cat([to_uint8(tokenizer.decode(part)) for part in codes])[:count]


def image_generators(seed: int, first: int, count: int) -> list[np.random.Generator]:
    """NumPy's random generators for the images number `first` to `first + count - 1` of a seed.

    torch's CPU generator uses only the low 32 bits of a seed, so about 116 pairs among a million images would be equal.
    NumPy's SeedSequence spreads the seed and the image's number over 128 bits.
    """
    sources = (np.random.SeedSequence(seed, spawn_key=(i,)) for i in range(first, first + count))
    return [np.random.default_rng(source) for source in sources]


def latents(generator: DCGANGenerator, class_ids: Tensor, seed: int, first: int = 0) -> Tensor:
    """Noise (B, latent_dim) for `settle_batch_norm` in training, on the device of the class ids (B,).

    Its seeds have 32 bits, unlike those of samples: other noise would change the result of every GAN's training.
    """
    sources = [torch.Generator().manual_seed(mixed_seed(seed, first + i)) for i in range(len(class_ids))]
    return torch.stack([torch.randn(generator.latent_dim, generator=g) for g in sources]).to(class_ids.device)


@torch.no_grad()
def generate_images(generator: DCGANGenerator, class_ids: Tensor, *, seed: int, first: int = 0) -> Tensor:
    """Draws images uint8 (B, C, H, W) from a GAN in eval mode, for class ids (B,).

    Image i depends only on the seed, on first + i and on its class.
    """
    padding = -len(class_ids) % ROWS
    padded = torch.cat([class_ids, class_ids[:1].expand(padding)])
    noise = [g.standard_normal(generator.latent_dim, np.float32) for g in image_generators(seed, first, len(padded))]
    z = torch.from_numpy(np.stack(noise)).to(class_ids.device)  # (B, latent_dim)
    images = [to_uint8(generator(*part)) for part in zip(z.split(ROWS), padded.split(ROWS), strict=True)]
    return torch.cat(images)[: len(class_ids)]


def classes_in_turn(count: int, choices: Sequence[int]) -> Tensor:
    """Class ids (count,) int64 that cycle through the choices; all are -1 if there are no choices."""
    ids = torch.tensor(choices if len(choices) else [-1])
    return ids[torch.arange(count) % len(ids)]
