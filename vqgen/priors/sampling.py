"""From class ids to tokens to images; or, with a GAN, from noise."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqgen.adversarial.dcgan import DCGANGenerator, load_gan
from vqgen.data.order import mixed_seed
from vqgen.errors import require
from vqgen.priors.prior import Prior
from vqgen.tokenizers.vqmodel import VQModel, load_tokenizer, to_uint8

ROWS = 32  # batches are padded to a multiple of this, as matrix multiplies of few rows round differently


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
    generator: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draws token sequences from the prior, with a key-value cache.

    Args:
        prior: in eval mode.
        class_ids: (B,) int64, -1 for no class.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; 0 is all.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        cfg_scale: s of classifier-free guidance, logits = none + s (class - none) (Ho and Salimans 2022); 1 is none.
        prefix: (B, P) tokens to go on from.
        generator: one CPU generator for each sequence, so that each is the same in any batch; None takes torch's own.

    Returns:
        Tokens (B, N), int64.
    """
    batch, device, num_tokens = len(class_ids), class_ids.device, prior.layout.num_tokens
    precision = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    if generator is None:
        noise = torch.rand(batch, num_tokens, dtype=precision)
    else:
        noise = torch.stack([torch.rand(num_tokens, generator=g, dtype=precision) for g in generator])
    noise = noise.to(device)  # (B, N): one uniform number decides one token
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
    """Tokens (B,) from logits (B, V) by inverting the distribution function at noise (B,), uniform in [0, 1)."""
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(dim=1)
    if top_p < 1:
        sorted_p, order = probabilities.sort(dim=1, descending=True)
        beyond = sorted_p.cumsum(dim=1) - sorted_p >= top_p  # the tokens before it suffice already
        probabilities = probabilities.masked_fill(beyond.scatter(1, order, beyond), 0.0)
    cumulative = probabilities.cumsum(dim=1)
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]


@torch.no_grad()
def sample_images(
    prior: Prior, tokenizer: VQModel, class_ids: Tensor, *, seed: int, first: int = 0, **options: float
) -> Tensor:
    """Draws images uint8 (B, C, H, W) for class ids (B,), with the options of sample_tokens.

    Image i of a seed depends on nothing but the seed, first + i and its class.
    """
    count = len(class_ids)
    padding = -count % ROWS
    class_ids = torch.cat([class_ids, class_ids[:1].expand(padding)])
    generators = [torch.Generator().manual_seed(mixed_seed(seed, first + i)) for i in range(count + padding)]
    tokens = sample_tokens(prior, class_ids, generator=generators, **options)  # type: ignore[arg-type]
    codes = [prior.layout.unflatten(part) for part in tokens.split(ROWS)]
    return torch.cat([to_uint8(tokenizer.decode(part)) for part in codes])[:count]


def latents(generator: DCGANGenerator, class_ids: Tensor, seed: int, first: int = 0) -> Tensor:
    """Noise (B, latent_dim) for images number `first` and on of a seed, on the device of their class ids (B,)."""
    sources = [torch.Generator().manual_seed(mixed_seed(seed, first + i)) for i in range(len(class_ids))]
    return torch.stack([torch.randn(generator.latent_dim, generator=g) for g in sources]).to(class_ids.device)


@torch.no_grad()
def generate_images(generator: DCGANGenerator, class_ids: Tensor, *, seed: int, first: int = 0) -> Tensor:
    """Images uint8 (B, C, H, W) of a GAN in eval mode, for class ids (B,).

    Image i of a seed depends on nothing but the seed, first + i and its class.
    """
    padding = -len(class_ids) % ROWS
    padded = torch.cat([class_ids, class_ids[:1].expand(padding)])
    z = latents(generator, padded, seed, first)
    images = [to_uint8(generator(*part)) for part in zip(z.split(ROWS), padded.split(ROWS), strict=True)]
    return torch.cat(images)[: len(class_ids)]


class Sampler(NamedTuple):
    """What draws a run's images, whatever kind of run it is.

    Attributes:
        draw: class ids (B,) and the keywords seed and first, for a prior also the options of sample_tokens, to images
            uint8 (B, C, H, W).
        class_names: the classes in the order of their ids.
        num_parameters: of all that takes part.
        checkpoint: SHA-256 of the models' files.
        is_gan: whether it draws from noise, and not from codes.
    """

    draw: Callable[..., Tensor]
    class_names: list[str]
    num_parameters: int
    checkpoint: str
    is_gan: bool


def load_sampler(run_dir: Path, device: torch.device) -> Sampler:
    """The sampler of a stage-2 or GAN run, on a device.

    Raises:
        InputError: there is no such run, or its model does not load.
    """
    folder = run_dir / "model"
    gan = (folder / "generator").is_dir()
    require(
        gan or (folder / "prior").is_dir(),
        f"{run_dir}: no model there to sample; give the folder of a stage-2 or GAN run, or train one first",
    )
    files = sorted(path for path in folder.rglob("*") if path.name == "config.json" or path.suffix == ".safetensors")
    checkpoint = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    if gan:
        generator = load_gan(folder / "generator").to(device)
        models: list[torch.nn.Module] = [generator]
        draw, class_names = partial(generate_images, generator), generator.class_names
    else:
        prior = Prior.from_pretrained(folder / "prior").eval().to(device)
        tokenizer = load_tokenizer(folder / "tokenizer")[0].to(device)
        models = [prior, tokenizer]
        draw, class_names = partial(sample_images, prior, tokenizer), prior.class_names
    count = sum(p.numel() for model in models for p in model.parameters())
    return Sampler(draw, class_names, count, checkpoint, gan)


def class_choices(class_names: Sequence[str], class_ids: Sequence[int] | None, no_class: bool = True) -> Sequence[int]:
    """The classes to draw: those asked for, or all that the model knows.

    Args:
        class_names: of the model.
        class_ids: those asked for, if any.
        no_class: whether a model that knows classes can do without.

    Raises:
        InputError: the model knows no such class.
    """
    num_classes = len(class_names)
    if class_ids is None:
        return range(num_classes)
    known = f"0 to {num_classes - 1}" + (", or -1 for none" if no_class else "")
    known = known if num_classes else "-1 only, as it was trained without classes"
    least = -1 if no_class or not num_classes else 0
    for class_id in class_ids:
        require(least <= class_id < num_classes, f"class_ids: {class_id} is no class of this run; it takes {known}")
    return class_ids


def classes_in_turn(count: int, choices: Sequence[int]) -> Tensor:
    """(count,) int64 class ids: the choices over and over, or -1 throughout where there are none."""
    ids = torch.tensor(choices if len(choices) else [-1])
    return ids[torch.arange(count) % len(ids)]
