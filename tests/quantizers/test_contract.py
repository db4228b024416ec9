"""The contract of every quantizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import VARIANTS, built, random, seeded, trained
from torch import nn

from vqgen.codes import CodeLayout
from vqgen.quantizers import QUANTIZERS

SHAPES = [(5,), (3, 4), (2, 3, 2)]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def test_every_quantizer_has_a_variant():
    assert {options["name"] for options in VARIANTS.values()} == set(QUANTIZERS)


@every_variant
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_dtypes(variant, shape, training):
    quantizer = built(variant).train(training)
    z = random(2, quantizer.code_dim, *shape)
    q = quantizer(z)
    assert (q.z_q.shape, q.z_q.dtype) == (z.shape, torch.float32)
    assert (q.codes.shape, q.codes.dtype) == ((2, quantizer.num_codebooks, *shape), torch.int64)
    assert (q.loss.shape, q.loss.dtype) == ((), torch.float32)
    assert torch.isfinite(q.loss)
    assert q.codes.min() >= 0
    assert q.codes.max() < quantizer.codebook_size


@every_variant
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoded_codes_are_z_q_bit_for_bit(variant, shape):
    quantizer = trained(variant).eval()
    q = quantizer(random(3, quantizer.code_dim, *shape))
    assert torch.equal(quantizer.decode_codes(q.codes), q.z_q)
    assert len(q.codes.unique()) > 4


@every_variant
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_round_trip_through_the_layout(variant, shape):
    quantizer = trained(variant).eval()
    codes = quantizer(random(3, quantizer.code_dim, *shape)).codes
    layout = CodeLayout(((quantizer.num_codebooks, *shape),), (quantizer.codebook_size,))
    tokens = layout.flatten([codes])
    ranges = layout.token_ranges()
    assert (tokens >= ranges[:, 0]).all()
    assert (tokens < ranges[:, 1]).all()
    assert torch.equal(layout.unflatten(tokens)[0], codes)


@every_variant
def test_positions_are_independent(variant):
    quantizer = trained(variant).eval()
    z = random(2, quantizer.code_dim, 3, 4)
    whole = quantizer(z)
    for b, y, x in [(0, 0, 0), (1, 2, 1), (0, 1, 3)]:
        alone = quantizer(z[b : b + 1, :, y : y + 1, x : x + 1])
        assert torch.equal(alone.codes[0, :, 0, 0], whole.codes[b, :, y, x])
        assert torch.equal(alone.z_q[0, :, 0, 0], whole.z_q[b, :, y, x])


@every_variant
def test_eval_mode_changes_nothing(variant):
    quantizer = trained(variant).eval()
    before = copy.deepcopy(quantizer.state_dict())
    first, second = (quantizer(random(2, quantizer.code_dim, 8)) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal(first.z_q, second.z_q)


@every_variant
@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_neither_codes_nor_precision(variant, training):
    outside, inside = trained(variant).train(training), trained(variant).train(training)
    z = random(4, outside.code_dim, 100)
    expected = seeded(outside, z)
    with torch.autocast("cpu", torch.bfloat16):
        q = seeded(inside, z)
        decoded = inside.decode_codes(q.codes)
    assert torch.equal(q.codes, expected.codes)
    assert torch.equal(q.z_q, expected.z_q)
    assert torch.equal(q.loss, expected.loss)
    assert (q.z_q.dtype, decoded.dtype) == (torch.float32, torch.float32)
    for name, value in inside.state_dict().items():
        assert torch.equal(value, outside.state_dict()[name])


@every_variant
def test_bf16_input_is_quantized_in_fp32_and_gets_its_gradient(variant):
    quantizer = trained(variant).eval()
    z = random(4, quantizer.code_dim, 100).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        q = quantizer(z)
    assert torch.equal(q.codes, quantizer(z.detach().float()).codes)
    q.z_q.square().sum().backward()
    assert z.grad.dtype == torch.bfloat16
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options", [{"name": "ema", "codebook_size": 3000}, {"name": "fsq", "levels": [8, 8, 8, 8]}], ids=str
)
def test_indices_beyond_what_bf16_can_count(options):
    quantizer = QUANTIZERS[options.pop("name")](**options).train()
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer(random(50, quantizer.code_dim, 100)).codes
    assert len(codes.unique()) > 2000  # bf16 has few distinct values from 2048 to 4096


@every_variant
def test_what_is_not_finite_has_codes_too_and_does_no_lasting_harm(variant):
    quantizer = trained(variant)
    z = random(4, quantizer.code_dim, 30)
    z[0, :, 3], z[1, 0, 5], z[2, :, 7] = torch.nan, torch.inf, -torch.inf
    for broken in (quantizer(z), trained(variant, steps=0)(z)):  # in the middle of training, and in the first batch
        assert broken.codes.min() >= 0
        assert broken.codes.max() < quantizer.codebook_size
    q = quantizer(random(4, quantizer.code_dim, 30))
    assert torch.isfinite(q.z_q).all()
    assert torch.isfinite(q.loss)


def test_the_wrong_number_of_channels_is_noticed():
    with pytest.raises(AssertionError, match="5 channels for code_dim=4"):
        built("ema")(random(2, 5, 3))


@every_variant
def test_the_gradient_reaches_z_and_everything_that_is_trained(variant):
    quantizer = trained(variant)
    z = random(8, quantizer.code_dim, 16).requires_grad_()
    q = quantizer(z)
    (F.mse_loss(q.z_q, random(*z.shape, seed=5)) + q.loss).backward()
    assert (z.grad.flatten(2).abs().sum(dim=1) > 0).all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@every_variant
def test_state_survives_saving(variant):
    quantizer = trained(variant)
    restored = built(variant).train()
    restored.load_state_dict(quantizer.state_dict())
    for step in range(2):
        z = random(16, quantizer.code_dim, 32, seed=step)
        assert torch.equal(seeded(quantizer, z).codes, seeded(restored, z).codes)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


def autoencode(variant: str, steps: int) -> tuple[nn.Module, float]:
    """Trains the quantizer between two linear maps on a mixture of 40 clusters; the last squared error."""
    quantizer = built(variant).train()
    encoder, decoder = nn.Conv1d(10, quantizer.code_dim, 1), nn.Conv1d(quantizer.code_dim, 10, 1)
    parameters = [*encoder.parameters(), *quantizer.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    centres = random(40, 10, seed=7)
    for step in range(steps):
        x = (centres[torch.arange(512) % 40] + 0.1 * random(512, 10, seed=step)).view(8, 64, 10).movedim(-1, 1)
        q = quantizer(encoder(x))
        error = F.mse_loss(decoder(q.z_q), x)
        optimizer.zero_grad()
        (error + q.loss).backward()
        optimizer.step()
    return quantizer, error.item()


@every_variant
def test_an_autoencoder_learns_through_it(variant):
    _, error = autoencode(variant, 150)
    # 0.99 is the data's variance; 0.6 is the error of four linear dimensions without quantization
    assert error < 0.8


@every_variant
def test_training_repeats_bit_for_bit(variant):
    (first, _), (second, _) = autoencode(variant, 5), autoencode(variant, 5)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@every_variant
def test_training_compiles_without_a_graph_break_and_gives_the_same(variant):
    torch._dynamo.reset()
    eager = built(variant).train()  # from the first batch on, so initialisation and revival compile too
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for i in range(3):
        z, z_c = (random(2, eager.code_dim, 5, 7, seed=i).requires_grad_() for _ in range(2))
        q, q_c = seeded(eager, z), seeded(step, z_c)
        assert torch.equal(q.codes, q_c.codes)
        (q.z_q.square().mean() + q.loss).backward()
        (q_c.z_q.square().mean() + q_c.loss).backward()
        torch.testing.assert_close(z.grad, z_c.grad)
    torch.testing.assert_close(eager.state_dict(), compiled.state_dict())
