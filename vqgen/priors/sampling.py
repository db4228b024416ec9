"""Sampling: from class ids to tokens to images; for a GAN, from noise to images."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqgen.adversarial.dcgan import DCGANGenerator
from vqgen.data.order import mixed_seed
from vqgen.priors.decoder import Places, cache_bytes, decoder_of, is_plain
from vqgen.priors.prior import Prior
from vqgen.tokenizers.vqmodel import VQModel, to_uint8

Judge = Callable[[Tensor, Tensor], Tensor]
CACHE_BYTES = 2 << 30  # on a CPU, the largest cache of keys and values, if it has more than ROWS sequences
GPU_SHARE = 0.25  # on a GPU, its share of the memory; of all of it, as what is free changes, and the images with it
ROWS = 32  # batches are padded to a multiple of this, because matrix products of few rows round differently


@torch.no_grad()
def sample_tokens(
    prior: Prior,
    class_ids: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    cfg_scale: float = 1.0,
    cfg_power: float = 0.0,
    cfg_start: float = 0.0,
    toward: Tensor | None = None,
    blend: Tensor | None = None,
    known: Tensor | None = None,
    generator: Sequence[np.random.Generator] | None = None,
    precision: str = "no",
    cuda_graph: bool = False,
) -> Tensor:
    """Draws token sequences from the prior, with a cache of keys and values.

    Args:
        prior: the prior, in eval mode.
        class_ids: (B,) int64, -1 for no class.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; 0 means all tokens.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        min_p: draw from tokens that are at least this share as likely as the likeliest (Nguyen et al. 2024).
        cfg_scale: s of classifier-free guidance, logits = none + s (class - none), where `none` are the logits without
            a class (Ho and Salimans 2022); 1 turns it off.
        cfg_power: how late s rises along the sequence; 0 means a constant s. See `guidance`.
        cfg_start: share of the tokens that are drawn before guidance begins.
        toward: (B,) int64, second classes that the first ones are mixed with.
        blend: (B,) float, shares of the second classes: log p is (1 - blend) log p(class) + blend log p(toward).
        known: (B, N) tokens that are given, -1 where one is to be drawn. Those drawn depend on given tokens before them
            only; on all given ones, if the prior was trained in random orders to the end.
        generator: a NumPy generator for each sequence, such as `np.random.default_rng(seed)`, so that a sequence is
            the same in any batch; None uses torch's global generator.
        precision: `no`, or `bf16` for the prior's pass.
        cuda_graph: replay the step as a CUDA graph, if `LlamaDecoder` serves the prior.

    Returns:
        Tokens (B, N), int64.
    """
    batch, device, length = len(class_ids), class_ids.device, prior.layout.num_tokens
    tokens = class_ids.new_full((batch, length), -1) if known is None else known.clone()  # -1: not drawn yet
    last = tokens < 0 if prior.random_orders else torch.zeros_like(tokens, dtype=torch.bool)
    order = last.byte().sort(dim=1, stable=True).indices  # (B, N), the places of the tokens in the order of the draw
    tokens = tokens.gather(1, order)
    noise = uniform(batch, length, generator, device)  # (B, N): each token is drawn by one uniform number
    scales = guidance(cfg_scale, cfg_power, cfg_start, length)
    # On a GPU the CPU would have to wait for the answer.
    without_class = class_ids.device.type == "cpu" and toward is None and not (class_ids >= 0).any()
    if not prior.class_names or without_class:
        scales = [1.0] * length
    scale = torch.tensor(scales, device=device)
    # Each group has B sequences: one of the classes, one of the second classes, and, for guidance, one of no class.
    conditions = [class_ids] if toward is None else [class_ids, toward]
    plain = len(conditions)
    if any(s != 1 for s in scales):
        conditions.append(torch.full_like(class_ids, -1))
    groups, starts = len(conditions), prior.class_tokens(torch.cat(conditions))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    order_of_all = order.repeat(groups, 1)  # (groups B, N)
    added = None if prior.places is None else prior.places(order_of_all)
    decoder = decoder_of(prior.lm, batch, length, groups=groups, dtype=dtype, added=added)
    # The first place where something is drawn.
    first = 0 if known is None else int((tokens >= 0).all(dim=0).long().cumprod(dim=0).sum())
    current = tokens[:, first - 1, None].repeat(groups, 1) if first else starts.clone()

    def step(places: Places, rows: slice) -> None:
        """Fills one place of the tokens, whose predecessor is `current`."""
        logits = decoder(current[rows], rows, places)  # (groups B, V)
        logits = prior.legal(logits[:, None], order_of_all[rows, places])[:, 0].float()
        if rows.stop > batch:
            log_p = logits.log_softmax(dim=1).unflatten(0, (-1, batch))  # (groups, B, V)
            logits = log_p[0] if blend is None else torch.lerp(log_p[0], log_p[1], blend[:, None])
            if len(log_p) > plain:
                logits = torch.lerp(log_p[-1], logits, scale[places])
            logits = logits.nan_to_num(nan=-torch.inf)  # of tokens that are illegal in all groups
        token = draw(logits, noise[:, places][:, 0], temperature, top_k, top_p, min_p)[:, None]
        token = torch.where(tokens[:, places] < 0, token, tokens[:, places])
        tokens[:, places] = token
        current.copy_(token.repeat(groups, 1))

    advance = captured(step, device) if cuda_graph and is_plain(prior.lm) else step
    cached = [0] * groups  # numbers of tokens that the decoder has of each group
    with torch.inference_mode():  # which spares each operation the bookkeeping of autograd
        for place in range(first, length):
            active = plain + (scales[place] != 1)
            for group in range(active):
                rows, seen = slice(group * batch, (group + 1) * batch), cached[group]
                if seen < place:
                    inputs = torch.cat([starts[rows], tokens], dim=1)  # (B, 1 + N)
                    decoder(inputs[:, seen:place], rows, slice(seen, place))
                cached[group] = place + 1
            advance(slice(place, place + 1), slice(0, active * batch))
    return torch.empty_like(tokens).scatter_(1, order, tokens)


def guidance(scale: float, power: float, start: float, length: int) -> list[float]:
    """The scale of guidance at each of the N places of a sequence.

    It rises by a cosine of a power, 1 + (s - 1) (1 - cos(pi (t / N)^power)) / 2 at place t (Yu et al. 2024, RAR), which
    is constant for the power 0; and is 1, no guidance, for the share `start` of the places.
    """
    rise = ((1 - math.cos(math.pi * (t / length) ** power)) / 2 for t in range(length))
    return [1 + (scale - 1) * r if t >= start * length else 1.0 for t, r in enumerate(rise)]


def uniform(batch: int, length: int, generator: Sequence[np.random.Generator] | None, device: torch.device) -> Tensor:
    """Numbers (B, N), uniform in [0, 1), from a NumPy generator for each row or from torch's global one."""
    single = device.type == "mps"  # Apple's GPUs have no float64
    if generator is None:
        return torch.rand(batch, length, dtype=torch.float32 if single else torch.float64).to(device)
    drawn = [g.random(length, np.float32 if single else np.float64) for g in generator]
    return torch.from_numpy(np.stack(drawn)).to(device)


def captured(step: Callable[[Places, slice], None], device: torch.device) -> Callable[[slice, slice], None]:
    """The step as a CUDA graph, which replays its kernels without the time that Python takes to launch them.

    The place is a tensor's content, so that one graph serves all places. On other devices that is all.
    """
    places = torch.zeros(1, dtype=torch.int64, device=device)
    graphs: dict[int, Any] = {}  # by the number of rows

    def advance(place: slice, rows: slice) -> None:
        places.fill_(place.start)
        if rows.stop in graphs:
            graphs[rows.stop].replay()
        elif device.type != "cuda":
            step(places, rows)
        else:  # CUDA libraries set themselves up in a first step, which no graph may hold.
            with torch.cuda.device(device):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    step(places, rows)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    step(places, rows)
            graphs[rows.stop] = graph

    return advance


def draw(
    logits: Tensor, noise: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Draws tokens (B,) from logits (B, V): inverts the distribution function at noise (B,), uniform in [0, 1).

    Tokens as likely as the last that top_k or top_p leaves stay, too.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    p = ((logits - logits.amax(dim=1, keepdim=True)) / temperature).softmax(dim=1)  # no overflow
    kept = min(top_k or p.shape[1], p.shape[1])
    if kept < p.shape[1] or top_p < 1:
        falling = sorted_falling(p)[:, :kept]  # (B, k)
        total = falling.cumsum(dim=1, dtype=noise.dtype)
        asked = total - falling < top_p * total[:, -1:]  # the likelier tokens do not have top_p yet
        least = falling.gather(1, asked.sum(dim=1, keepdim=True) - 1)
        p = p.masked_fill(p < least, 0.0)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(dim=1, keepdim=True), 0.0)
    cumulative = p.cumsum(dim=1, dtype=noise.dtype)  # in float64, or a rare token could never be drawn
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]


def sorted_falling(p: Tensor) -> Tensor:
    """Each row of p (B, V) from its largest to its smallest."""
    if p.device.type == "cpu":
        return torch.from_numpy(np.sort(p.numpy(), axis=1)).flip(1)  # in a tenth of the time of torch's sort
    return p.sort(dim=1, descending=True).values


@torch.no_grad()
def sample_images(
    prior: Prior,
    tokenizer: VQModel,
    class_ids: Tensor,
    *,
    seed: int,
    first: int = 0,
    each: Mapping[str, Any] = MappingProxyType({}),
    best_of: int = 1,
    judge: Judge | None = None,
    **options: Any,
) -> Tensor:
    """Draws images uint8 (B, C, H, W) for class ids (B,).

    Image i depends only on the seed, on first + i, on its class, and on its part of `each`; on a GPU also, by rounding,
    on how many are drawn at a time. That is all of them, up to `drawn_together`.

    Args:
        prior: the prior, in eval mode.
        tokenizer: its tokenizer, in eval mode.
        class_ids: (B,) int64, -1 for no class.
        seed: the seed of the images.
        first: number of the first image.
        each: those options of `sample_tokens` that have a row for each image: `known`, `toward` and `blend`.
        best_of: each image is drawn so often, and the best is kept.
        judge: scores images uint8 (B, C, H, W) of classes (B,); the best has the largest score (B,). None takes the
            likelihood of the tokens.
        options: those of `sample_maps`.
    """
    count = len(class_ids)
    padded = torch.arange(count + -count % ROWS, device=class_ids.device) % count
    class_ids, each = class_ids[padded], {name: tensor[padded] for name, tensor in each.items()}

    def pictures(maps: list[Tensor], wanted: int) -> Tensor:
        pixels, usual = (math.prod(of[-2:]) * tokenizer.stride**2 for of in (maps[-1].shape, prior.layout.shapes[-1]))
        together = decoded_together(pixels, 32 * 32 if class_ids.device.type == "cpu" else usual)
        parts = zip(*(codes[: wanted + -wanted % together].split(together) for codes in maps), strict=True)
        return torch.cat([to_uint8(tokenizer.decode(list(part))) for part in parts])[:wanted]

    def scores(maps: list[Tensor]) -> Tensor:
        score: Judge = judge or functools.partial(log_likelihood, prior)
        asked = prior.layout.flatten(maps) if judge is None else pictures(maps, len(padded))
        return torch.cat([score(*part) for part in zip(asked.split(ROWS), class_ids.split(ROWS), strict=True)])

    groups = 1 + ("toward" in each) + (options.get("cfg_scale", 1) != 1)
    together = drawn_together(prior, groups, options.get("precision", "no"))
    drawn = []  # the maps of each attempt
    for attempt in range(best_of):
        generator = image_generators(seed, first, len(padded), attempt)
        parts = []
        for part in (slice(i, i + together) for i in range(0, len(padded), together)):
            here = {name: tensor[part] for name, tensor in each.items()}
            parts.append(sample_maps(prior, class_ids[part], generator=generator[part], **here, **options))
        drawn.append([torch.cat(codes) for codes in zip(*parts, strict=True)])
    if best_of == 1:
        return pictures(drawn[0], count)
    best = torch.stack([scores(maps) for maps in drawn]).argmax(dim=0)
    rows = torch.arange(len(padded), device=class_ids.device)
    return pictures([torch.stack(codes)[best, rows] for codes in zip(*drawn, strict=True)], count)


def drawn_together(prior: Prior, groups: int, precision: str) -> int:
    """The number of images whose tokens are drawn at a time: a multiple of ROWS, so that a CPU gives the same images.

    Their keys and values have at most CACHE_BYTES, or GPU_SHARE of a GPU's memory, unless ROWS images have more.

    Args:
        prior: the prior, on its device.
        groups: sequences of an image: 1, and one each for a second class and for guidance.
        precision: that of `sample_tokens`.
    """
    device, room = next(prior.parameters()).device, CACHE_BYTES
    if device.type == "cuda":
        room = int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    each = groups * cache_bytes(prior.lm, prior.layout.num_tokens, dtype)
    return max(1, room // (ROWS * each)) * ROWS


def decoded_together(pixels: int, usual: int) -> int:
    """The number of images of so many pixels that are decoded at a time: ROWS, of `usual` pixels, or a part of it.

    It does not depend on how many are asked for, because convolutions of other numbers of images round differently. It
    is small for large images, so that a single one does not cost many, and does not take the memory of many.
    """
    return max(n for n in range(1, ROWS + 1) if ROWS % n == 0 and n <= max(1, ROWS * usual // pixels))


@torch.no_grad()
def sample_maps(prior: Prior, class_ids: Tensor, grid: tuple[int, int] | None = None, **options: Any) -> list[Tensor]:
    """Draws code maps [(B, Q, H, W), ...] of the layout's size; or of a larger one, in windows that overlap by half.

    This is VQGAN's sliding window (Esser et al. 2021, section 3.3), but it moves by half of its side, not by a code.

    Args:
        prior: the prior, in eval mode.
        class_ids: (B,) int64, -1 for no class.
        grid: height and width of the coarsest map; None means the layout's.
        options: those of `sample_tokens`; none with a row of tokens for each image, if there is a grid.
    """
    layout = prior.layout
    if grid is None:
        return layout.unflatten(sample_tokens(prior, class_ids, **options))
    height, width = layout.shapes[0][1:]
    factors = [shape[1] // height for shape in layout.shapes]
    maps = [
        class_ids.new_full((len(class_ids), shape[0], f * grid[0], f * grid[1]), -1)
        for shape, f in zip(layout.shapes, factors, strict=True)
    ]
    for top, left in itertools.product(steps(grid[0], height), steps(grid[1], width)):
        window = [
            codes[:, :, f * top : f * (top + height), f * left : f * (left + width)]
            for codes, f in zip(maps, factors, strict=True)
        ]
        unknown = layout.in_order([codes < 0 for codes in window])
        known = layout.flatten(window).masked_fill(unknown, -1)
        drawn = layout.unflatten(sample_tokens(prior, class_ids, known=known, **options))
        for part, codes in zip(window, drawn, strict=True):
            part.copy_(codes)
    return maps


def steps(length: int, window: int) -> list[int]:
    """Where windows begin that overlap by at least half and cover the length."""
    return [*range(0, length - window, max(1, window // 2)), length - window]


@torch.no_grad()
def log_likelihood(prior: Prior, tokens: Tensor, class_ids: Tensor) -> Tensor:
    """log p(tokens | class) (B,) of token sequences (B, N), in nats."""
    log_p = prior(tokens, class_ids).float().log_softmax(dim=-1)
    return log_p.gather(-1, tokens[..., None])[..., 0].sum(dim=1)


def image_generators(seed: int, first: int, count: int, attempt: int = 0) -> list[np.random.Generator]:
    """NumPy's random generators for the images number `first` to `first + count - 1` of a seed.

    torch's CPU generator uses only the low 32 bits of a seed, so about 116 pairs among a million images would be equal.
    NumPy's SeedSequence spreads the seed, the image's number and the attempt's over 128 bits.
    """
    attempts = (attempt,) if attempt else ()  # an image's first attempt is what it is without others
    sources = (np.random.SeedSequence(seed, spawn_key=(i, *attempts)) for i in range(first, first + count))
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
