"""Drawing tokens against brute force; and images that depend only on seed, number and class."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vqgen.adversarial.dcgan import DCGANGenerator
from vqgen.codes import CodeLayout
from vqgen.data.order import mixed_seed
from vqgen.priors import sampling
from vqgen.priors.decoder import LlamaDecoder, cache_bytes, decoder_of
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import (
    ROWS,
    classes_in_turn,
    decoded_together,
    draw,
    drawn_together,
    generate_images,
    guidance,
    image_generators,
    sample_images,
    sample_tokens,
)
from vqgen.tokenizers.light import Light
from vqgen.tokenizers.vqmodel import VQModel

PLAIN = CodeLayout(((1, 4, 4),), (16,))
MANY = CodeLayout(((2, 2), (1, 2, 2)), (5, 7))


def small(layout: CodeLayout = PLAIN, model_type: str = "llama") -> Prior:
    """An untrained prior whose tokens depend strongly on the class and on each other."""
    torch.manual_seed(0)
    names = ["a", "b", "c"]
    prior = Prior(layout, names, model_type, hidden_size=32, num_hidden_layers=2, num_attention_heads=2).eval()
    with torch.no_grad():
        for p in prior.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return prior


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


@torch.no_grad()
def sample_uncached(
    prior: Prior,
    class_ids: Tensor,
    cfg_scale: float | list[float],
    temperature: float = 0.0,
    known: Tensor | None = None,
) -> Tensor:
    """A simple version of sample_tokens, which computes the whole sequence anew for each token."""
    scales = cfg_scale if isinstance(cfg_scale, list) else [cfg_scale] * prior.layout.num_tokens
    noise = torch.from_numpy(np.stack([g.random(prior.layout.num_tokens) for g in generators(99)]))
    tokens = torch.zeros(len(class_ids), prior.layout.num_tokens, dtype=torch.int64)
    for t in range(prior.layout.num_tokens):
        given, none = (prior(tokens, ids)[:, t].double() for ids in (class_ids, torch.full_like(class_ids, -1)))
        legal = given.isfinite()
        logits = torch.where(legal, none + scales[t] * (given - none), -torch.inf)
        tokens[:, t] = draw(logits, noise[: len(tokens), t], temperature, 0, 1.0)
        if known is not None:
            tokens[:, t] = torch.where(known[:, t] < 0, tokens[:, t], known[:, t])
    return tokens


# draw


def drawn_shares(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The share of each token in 20,000 draws with evenly spread noise."""
    count = 20000
    noise = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(logits.expand(count, -1), noise, temperature, top_k, top_p, min_p)
    return drawn.bincount(minlength=len(logits)) / count


def random_logits(size: int = 12, seed: int = 0) -> Tensor:
    return 2 * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_temperature_zero_takes_the_likeliest():
    logits = torch.stack([random_logits(seed=s) for s in range(50)])
    noise = torch.rand(50, dtype=torch.float64)
    assert torch.equal(draw(logits, noise, 0, 3, 0.5), logits.argmax(dim=1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature):
    logits = random_logits()
    expected = (logits / temperature).exp() / (logits / temperature).exp().sum()
    torch.testing.assert_close(drawn_shares(logits, temperature), expected.float(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("top_k", [1, 3, 12, 100])
def test_top_k_draws_from_the_k_likeliest(top_k):
    logits = random_logits()
    likeliest = sorted(range(12), key=lambda i: -logits[i])[:top_k]
    kept = torch.zeros(12, dtype=torch.float64)
    kept[likeliest] = logits[likeliest].exp()
    torch.testing.assert_close(drawn_shares(logits, top_k=top_k), (kept / kept.sum()).float(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_top_p_draws_from_the_fewest_tokens_that_have_this_probability(top_p, temperature):
    logits = random_logits(seed=1)
    p = (logits / temperature).softmax(dim=0)
    kept, total = torch.zeros(12, dtype=torch.float64), 0.0
    for i in sorted(range(12), key=lambda i: -p[i]):
        if total < top_p:
            kept[i] = p[i]
            total += p[i].item()
    shares = drawn_shares(logits, temperature, top_p=top_p)
    torch.testing.assert_close(shares, (kept / kept.sum()).float(), rtol=0, atol=2e-4)


def test_top_p_is_of_what_top_k_leaves():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    # Among the two likeliest alone, the first has 4/7 < 0.6; among all four, 0.75 would need three.
    assert (drawn_shares(logits, top_k=2, top_p=0.55) > 0).tolist() == [True, False, False, False]
    assert (drawn_shares(logits, top_p=0.75) > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("min_p", [0.15, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_min_p_draws_from_tokens_with_that_share_of_the_likeliest(min_p, temperature):
    logits = random_logits(seed=2)
    p = (logits / temperature).softmax(dim=0)
    kept = torch.where(p >= min_p * p.max(), p, 0.0)
    torch.testing.assert_close(
        drawn_shares(logits, temperature, min_p=min_p), (kept / kept.sum()).float(), rtol=0, atol=2e-4
    )
    assert 0 < (kept == 0).sum() < 12


def test_rare_tokens_are_drawn_in_float32_too():
    """Their probability is below what 1 - p can tell in float32."""
    logits = torch.tensor([0.0, -20.0])
    noise = torch.tensor([1 - 1e-9, 1 - 1e-8], dtype=torch.float64)
    assert draw(logits.expand(2, -1), noise, 1.0).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_probability_is_never_drawn(dtype):
    logits = torch.full((3, 9), -torch.inf, dtype=dtype)
    logits[:, [2, 3, 6]] = torch.tensor([0.1, -3.0, 0.2], dtype=dtype)
    least, most = 0.0, 1 - 2.0**-53  # the largest value of torch.rand in float64
    for noise, token in ((least, 2), (most, 6)):
        assert draw(logits, torch.full((3,), noise, dtype=torch.float64), 1.0, 0, 1.0).tolist() == [token] * 3
    assert (drawn_shares(logits[0]) > 0).nonzero().flatten().tolist() == [2, 3, 6]


def test_extreme_noise_stays_in_the_vocabulary():
    most = torch.full((200,), 1 - 2.0**-53, dtype=torch.float64)
    logits = torch.stack([random_logits(1000, seed=s) for s in range(200)])
    assert draw(logits, most, 1.0, 0, 1.0).max() < 1000


# sample_tokens


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mistral"])
@pytest.mark.parametrize("layout", [PLAIN, MANY], ids=["plain", "several codebooks"])
def test_the_cache_changes_nothing(layout, model_type):
    prior, class_ids = small(layout, model_type), torch.tensor([0, 1, 2, -1])
    tokens = sample_tokens(prior, class_ids, temperature=0.0)
    assert (tokens.shape, tokens.dtype) == ((4, layout.num_tokens), torch.int64)
    assert torch.equal(tokens, sample_uncached(prior, class_ids, 1.0))
    assert len(tokens.unique(dim=0)) > 1  # the classes matter


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("layout", [PLAIN, MANY], ids=["plain", "several codebooks"])
def test_guidance_is_none_plus_s_times_class_minus_none(layout, cfg_scale):
    prior, class_ids = small(layout), torch.tensor([0, 1, 2, 0, -1, 1])
    tokens = sample_tokens(prior, class_ids, cfg_scale=cfg_scale, generator=generators(6))
    assert torch.equal(tokens, sample_uncached(prior, class_ids, cfg_scale, temperature=1.0))
    assert not torch.equal(tokens, sample_tokens(prior, class_ids, generator=generators(6)))


@pytest.mark.parametrize(("power", "start"), [(2.0, 0.0), (0.0, 0.5), (1.0, 0.3)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", [PLAIN, MANY], ids=["plain", "several codebooks"])
def test_guidance_follows_its_schedule(layout, model_type, power, start):
    prior, class_ids = small(layout, model_type), torch.tensor([0, 1, 2, 0, -1, 1])
    scales = guidance(4.0, power, start, layout.num_tokens)
    options = {"cfg_scale": 4.0, "cfg_power": power, "cfg_start": start}
    tokens = sample_tokens(prior, class_ids, **options, generator=generators(6))
    assert torch.equal(tokens, sample_uncached(prior, class_ids, scales, temperature=1.0))
    assert not torch.equal(tokens, sample_tokens(prior, class_ids, cfg_scale=4.0, generator=generators(6)))


def test_the_schedule_of_guidance():
    assert guidance(3.0, 0.0, 0.0, 4) == [3.0] * 4
    assert guidance(3.0, 0.0, 0.5, 4) == [1.0, 1.0, 3.0, 3.0]
    np.testing.assert_allclose(guidance(3.0, 1.0, 0.0, 4), [1, 2 - 0.5**0.5, 2, 2 + 0.5**0.5])
    rise = guidance(3.0, 2.5, 0.25, 1000)
    assert rise[:250] == [1.0] * 250
    assert (np.diff(rise) >= 0).all() and rise[-1] > 2.99  # noqa: PT018
    assert guidance(1.0, 2.0, 0.0, 3) == [1.0] * 3


def test_only_the_tokens_that_the_schedule_asks_for_are_guided(monkeypatch):
    rows = []
    call = LlamaDecoder.__call__
    monkeypatch.setattr(
        LlamaDecoder, "__call__", lambda self, *given: rows.append(given[0].shape) or call(self, *given)
    )
    sample_tokens(small(), torch.tensor([0, 1]), cfg_scale=2.0, cfg_start=0.75)
    assert rows == [(2, 1)] * 12 + [(2, 12)] + [(4, 1)] * 4


def test_guidance_of_one_is_none_at_all():
    prior, class_ids = small(), torch.tensor([0, 1, 2])
    guided = sample_tokens(prior, class_ids, cfg_scale=1.0, generator=generators(3))
    assert torch.equal(guided, sample_uncached(prior, class_ids, 1.0, temperature=1.0))
    almost = sample_tokens(prior, class_ids, cfg_scale=1.0 + 1e-12, generator=generators(3))  # through the guided code
    assert torch.equal(guided, almost)


def test_guidance_does_nothing_without_a_class():
    prior, class_ids = small(), torch.tensor([-1, -1])
    plain, guided = (sample_tokens(prior, class_ids, cfg_scale=s, generator=generators(2)) for s in (1.0, 4.0))
    assert torch.equal(plain, guided)


@pytest.mark.parametrize("length", [0, 1, 9, 15, 16])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_prefix_is_kept_and_completed_as_if_it_had_been_drawn(length, cfg_scale):
    prior, class_ids = small(), torch.tensor([0, 1, 2])
    whole = sample_tokens(prior, class_ids, cfg_scale=cfg_scale, generator=generators(3))
    known = whole.clone()
    known[:, length:] = -1
    tokens = sample_tokens(prior, class_ids, cfg_scale=cfg_scale, generator=generators(3), known=known)
    assert torch.equal(tokens, whole)


def test_another_prefix_is_kept_and_changes_what_follows():
    prior, class_ids = small(), torch.tensor([0, 1, 2])
    whole = sample_tokens(prior, class_ids, generator=generators(3))
    known = torch.full_like(whole, -1)
    known[:, :6] = (whole[:, :6] + 1) % 16
    tokens = sample_tokens(prior, class_ids, generator=generators(3), known=known)
    assert torch.equal(tokens[:, :6], known[:, :6])
    assert not torch.equal(tokens[:, 6:], whole[:, 6:])


@pytest.mark.parametrize("cfg_start", [0.0, 0.5])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_two_classes_are_mixed_by_their_log_probabilities(model_type, cfg_scale, cfg_start):
    prior, first, second = small(PLAIN, model_type), torch.tensor([0, 1, 2, 1]), torch.tensor([1, 2, 0, -1])
    blend = torch.tensor([0.0, 0.3, 1.0, 0.5])
    options = {"cfg_scale": cfg_scale, "cfg_start": cfg_start, "generator": generators(4, 99)}
    tokens = sample_tokens(prior, first, toward=second, blend=blend, **options)
    noise = torch.from_numpy(np.stack([g.random(16) for g in generators(4, 99)]))
    expected = torch.zeros(4, 16, dtype=torch.int64)
    for t in range(16):
        a, b, none = (prior(expected, ids)[:, t].log_softmax(1) for ids in (first, second, torch.full_like(first, -1)))
        logits = (1 - blend[:, None]) * a + blend[:, None] * b
        if t >= cfg_start * 16:
            logits = none + cfg_scale * (logits - none)
        expected[:, t] = draw(logits, noise[:, t], 1.0)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_tokens_that_are_known_stay_and_count_for_those_after_them(cfg_scale, model_type):
    prior, class_ids = small(PLAIN, model_type), torch.tensor([0, 1, 2])
    known = torch.full((3, 16), -1)
    known[:, :2], known[:, 7:9], known[0, 12] = 3, torch.tensor([5, 0]), 11
    known[2, 1] = -1
    tokens = sample_tokens(prior, class_ids, cfg_scale=cfg_scale, generator=generators(3), known=known)
    assert torch.equal(tokens[known >= 0], known[known >= 0])
    assert torch.equal(tokens, sample_uncached(prior, class_ids, cfg_scale, temperature=1.0, known=known))


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", [PLAIN, MANY], ids=["plain", "several codebooks"])
def test_a_prior_of_any_order_draws_from_all_known_tokens(layout, model_type, cuda_graph):
    prior, class_ids, scale = small(layout, model_type), torch.tensor([0, 1, 2]), 3.0
    prior.add_places(0.5)
    with torch.no_grad():
        for table in prior.places.parameters():
            table.mul_(20)
    known = torch.full((3, layout.num_tokens), -1)
    known[:, 2], known[0, 5], known[1:, 3], known[:, -1] = 1, 6, 7, layout.vocab_size - 1
    known[2, :2] = torch.tensor([2, 6 % layout.token_ranges()[1, 1]])
    tokens, noise = torch.zeros_like(known), np.stack([g.random(layout.num_tokens) for g in generators(3)])
    for i in range(3):
        order = [t for t in range(layout.num_tokens) if known[i, t] >= 0]
        order += [t for t in range(layout.num_tokens) if known[i, t] < 0]
        drawn = torch.zeros(1, layout.num_tokens, dtype=torch.int64)
        for j, t in enumerate(order):
            with torch.no_grad():
                given, none = (
                    prior(drawn, ids, torch.tensor([order]))[0, j].double()
                    for ids in (class_ids[i, None], torch.tensor([-1]))
                )
            logits = torch.where(given.isfinite(), none + scale * (given - none), -torch.inf)
            drawn[0, j] = known[i, t]
            if known[i, t] < 0:
                drawn[0, j] = draw(logits[None], torch.tensor([noise[i, j]]), 1.0)[0]
            tokens[i, t] = drawn[0, j]
    options = {"cfg_scale": scale, "cuda_graph": cuda_graph}
    assert torch.equal(sample_tokens(prior, class_ids, known=known, generator=generators(3), **options), tokens)
    prior.add_places(0.0)  # ends in the layout's order
    tokens = sample_tokens(prior, class_ids, known=known, generator=generators(3), **options)
    assert torch.equal(tokens, sample_uncached(prior, class_ids, scale, temperature=1.0, known=known))


@pytest.mark.parametrize("layout", [PLAIN, MANY], ids=["plain", "several codebooks"])
def test_a_step_whose_place_is_a_tensor_s_content_draws_the_same(layout):
    """That step is what a CUDA graph holds; here it runs without one."""
    prior, class_ids = small(layout), torch.tensor([0, 1, 2, -1])
    options = {"cfg_scale": 3.0, "cfg_start": 0.5, "top_p": 0.9, "min_p": 0.01}
    expected = sample_tokens(prior, class_ids, generator=generators(4), **options)
    tokens = sample_tokens(prior, class_ids, generator=generators(4), cuda_graph=True, **options)
    assert torch.equal(tokens, expected)


def test_bf16_draws_nearly_the_same():
    prior, class_ids = small(), torch.arange(60) % 4 - 1
    tokens, rough = (sample_tokens(prior, class_ids, generator=generators(60), precision=p) for p in ("no", "bf16"))
    assert not torch.equal(tokens, rough)
    assert (tokens == rough)[:, 0].double().mean() > 0.8  # the later tokens follow from different ones


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 4.0}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 100.0}])
def test_every_token_is_legal_where_it_stands(options):
    tokens, ranges = sample_tokens(small(MANY), torch.arange(60) % 4 - 1, **options), MANY.token_ranges()
    assert (tokens >= ranges[:, 0]).all()
    assert (tokens < ranges[:, 1]).all()


def test_a_sequence_depends_on_its_generator_and_not_on_the_others():
    prior = small()
    together = sample_tokens(prior, torch.tensor([0, 1, 2]), generator=generators(3))
    alone = sample_tokens(prior, torch.tensor([1]), generator=generators(3)[1:2])
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together, sample_tokens(prior, torch.tensor([0, 1, 2]), generator=generators(3, seed=1)))


def test_without_generators_torch_s_own_seed_decides():
    prior, draws = small(), []
    with torch.random.fork_rng():
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            draws.append(sample_tokens(prior, torch.tensor([0, 1, 2])))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# image_generators

# Images of seed 0 whose 32-bit seeds are equal: all such pairs among the first 300,000.
EQUAL_IN_32_BITS = [
    (32393, 87090), (63486, 100812), (173612, 195554), (133617, 234920), (168666, 254584), (286264, 293018),
]  # fmt: skip


def test_images_whose_32_bit_seeds_are_equal_differ():
    for pair in EQUAL_IN_32_BITS:
        assert mixed_seed(0, pair[0]) == mixed_seed(0, pair[1])
        first, second = (image_generators(0, i, 1)[0].random(16) for i in pair)
        assert not np.isclose(first, second).any()


def test_every_image_has_noise_of_its_own():
    """Compares images and seeds that are next to each other, and far apart."""
    places = [(0, 0, 4000), (1, 0, 4000), (0, 1 << 31, 4000), (2**32 - 1, 0, 2000), (2**63, 0, 2000)]
    drawn = [g.random() for place in places for g in image_generators(*place)]
    assert len(set(drawn)) == len(drawn) == 16000


# sample_images


@pytest.fixture(scope="module")
def tokenizer() -> VQModel:
    torch.manual_seed(0)
    model = Light(widths=(16, 32), quantizer={"codebook_size": 16, "code_dim": 8}).eval().requires_grad_(False)
    model.quantizer.codebook.normal_(std=3)
    return model


def in_batches(tokenizer: VQModel, class_ids: Tensor, batch_size: int, seed: int = 0, cfg_scale: float = 2.0) -> Tensor:
    """Draws images in batches as stage2/sample.py does, from a prior that is sensitive to rounding."""
    starts, prior = range(0, len(class_ids), batch_size), small()
    with torch.no_grad():
        prior.lm.lm_head.weight += 1e5  # adds the same to each logit, so that their differences are in the last digits
    parts = [class_ids[i : i + batch_size] for i in starts]
    images = [
        sample_images(prior, tokenizer, part, seed=seed, first=i, cfg_scale=cfg_scale, top_p=0.9)
        for i, part in zip(starts, parts, strict=True)
    ]
    return torch.cat(images)


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    """A number of threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_images_are_the_same_in_batches_of_any_size(tokenizer, cfg_scale, threads):
    class_ids = classes_in_turn(40, [0, 1, 2, -1])
    whole = in_batches(tokenizer, class_ids, 64, cfg_scale=cfg_scale)
    assert (whole.shape, whole.dtype) == ((40, 3, 32, 32), torch.uint8)
    assert len(whole.flatten(1).unique(dim=0)) == 40
    for batch_size in (1, 7, 16):
        assert torch.equal(in_batches(tokenizer, class_ids, batch_size, cfg_scale=cfg_scale), whole), batch_size


def test_of_large_images_few_are_decoded_at_a_time_and_always_as_many(tokenizer, monkeypatch):
    prior, sizes, decode = small(CodeLayout(((1, 8, 8),), (16,))), [], tokenizer.decode  # 64 x 64 pixels
    monkeypatch.setattr(tokenizer, "decode", lambda codes: sizes.append(len(codes[0])) or decode(codes))
    class_ids = classes_in_turn(19, [0, 1, 2])
    whole = sample_images(prior, tokenizer, class_ids, seed=0)
    few = sample_images(prior, tokenizer, class_ids[:3], seed=0)
    assert sizes == [8, 8, 8, 8]
    assert torch.equal(whole[:3], few)
    expected = {16: 32, 32: 32, 45: 16, 64: 8, 256: 1, 1024: 1}
    assert {side: decoded_together(side**2, 32**2) for side in expected} == expected


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 2.0, "best_of": 2}, {"toward": True}], ids=str)
def test_a_bound_on_the_cache_changes_no_bit(tokenizer, monkeypatch, options):
    prior, class_ids, batches = small(), classes_in_turn(150, range(3)), []
    with torch.no_grad():
        prior.lm.lm_head.weight += 1e5  # as above
    each = {}
    if options.get("toward"):
        each = {"toward": class_ids.flip(0), "blend": torch.linspace(0, 1, 150)}
    options = {name: value for name, value in options.items() if name != "toward"}

    def recorded(lm: Any, batch: int, *args: Any, **more: Any) -> Any:
        decoder = decoder_of(lm, batch, *args, **more)
        assert decoder.cache.nbytes <= sampling.CACHE_BYTES
        batches.append(batch)
        return decoder

    monkeypatch.setattr(sampling, "decoder_of", recorded)
    whole = sample_images(prior, tokenizer, class_ids, seed=0, each=each, **options)
    assert set(batches) == {160}
    batches.clear()
    groups = 2 if each or "cfg_scale" in options else 1
    monkeypatch.setattr(sampling, "CACHE_BYTES", 70 * groups * cache_bytes(prior.lm, 16, torch.float32))
    parts = sample_images(prior, tokenizer, class_ids, seed=0, each=each, **options)
    assert batches == [64, 64, 32] * options.get("best_of", 1)
    assert torch.equal(parts, whole)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_the_bytes_of_a_cache_are_those_it_has(model_type):
    prior = Prior(PLAIN, ["a"], model_type, hidden_size=32, num_hidden_layers=3, num_attention_heads=4).eval()
    decoder = decoder_of(prior.lm, 5, 16)
    decoder(torch.zeros(5, 16, dtype=torch.int64), slice(0, 5), slice(0, 16))
    if model_type == "gpt2":
        held = sum(x.nbytes for layer in decoder.caches[0].layers for x in (layer.keys, layer.values))
    else:
        held = decoder.cache.nbytes
    assert 5 * cache_bytes(prior.lm, 16, torch.float32) == held


def test_the_cache_of_a_usual_prior_is_not_bounded_and_that_of_a_large_one_is():
    usual = Prior(CodeLayout(((1, 4, 4),), (512,)), ["a"])
    assert drawn_together(usual, 2, "no") >= 1024
    with torch.device("meta"):
        large = Prior(CodeLayout(((1, 16, 16),), (16,)), ["a"], hidden_size=1280, num_hidden_layers=36,
                      num_attention_heads=20)  # fmt: skip
    each = 36 * 2 * 1280 * 256 * 4
    assert [drawn_together(large, groups, "no") for groups in (1, 2)] == [ROWS, ROWS]  # the fewest there are
    assert (2 << 30) < 2 * ROWS * each < 256 * 2 * each


def test_fewer_images_are_the_first_of_more(tokenizer):
    class_ids = classes_in_turn(70, range(3))
    many = in_batches(tokenizer, class_ids, 256)
    for count in (1, 33, 69):
        assert torch.equal(in_batches(tokenizer, class_ids[:count], 256), many[:count]), count


def test_another_seed_gives_other_images(tokenizer):
    class_ids = torch.zeros(4, dtype=torch.int64)
    first, second = (in_batches(tokenizer, class_ids, 4, seed=seed) for seed in (0, 1))
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_images_whose_32_bit_seeds_are_equal_are_not(tokenizer):
    prior, gan = small(), DCGANGenerator(8, 1, [], width=4).eval()
    a_class, no_class = torch.tensor([1]), torch.tensor([-1])
    for pair in EQUAL_IN_32_BITS[:2]:
        first, second = (sample_images(prior, tokenizer, a_class, seed=0, first=i) for i in pair)
        assert not torch.equal(first, second)
        first, second = (generate_images(gan, no_class, seed=0, first=i) for i in pair)
        assert not torch.equal(first, second)


def test_images_are_the_tokenizer_s_decoding_of_the_tokens(tokenizer):
    prior, class_ids = small(), torch.arange(32) % 3
    images = sample_images(prior, tokenizer, class_ids, seed=0, temperature=0.0)
    tokens = sample_tokens(prior, class_ids, temperature=0.0)
    expected = (tokenizer.decode(PLAIN.unflatten(tokens)).clamp(-1, 1) + 1) * 127.5
    assert (images - expected).abs().max() <= 0.501


def test_classes_come_in_turn():
    assert classes_in_turn(7, [4, 2, 9]).tolist() == [4, 2, 9, 4, 2, 9, 4]
    assert classes_in_turn(2, range(5)).tolist() == [0, 1]
    assert classes_in_turn(3, []).tolist() == [-1, -1, -1]
    assert classes_in_turn(3, range(0)).dtype == torch.int64
