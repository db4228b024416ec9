"""The EMA quantizer: the contract of every quantizer, then oracles of its own."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqgen.errors import InputError
from vqgen.quantizers import EMAQuantizer, build_quantizer, common
from vqgen.quantizers.common import nearest_code

SHAPES = [(5,), (3, 4), (2, 3, 2)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kill(quantizer: EMAQuantizer, codes: list[int]) -> None:
    """Puts codes so far off that no vector is assigned to them, and lets their counts run out."""
    quantizer.codebook[codes] = 1000.0
    quantizer.counts[codes] = 1e-3
    quantizer.sums[codes] = 1.0


def ready(codebook_size: int = 16, code_dim: int = 4, **options) -> EMAQuantizer:
    """A quantizer in the midst of training: a random codebook, all codes in use."""
    quantizer = EMAQuantizer(codebook_size, code_dim, **options)
    quantizer.codebook.copy_(random(codebook_size, code_dim, seed=1))
    quantizer.counts.fill_(10.0)
    quantizer.sums.copy_(quantizer.codebook * 10.0)
    quantizer.num_updates.fill_(1000)
    return quantizer


def as_map(vectors: Tensor, batch: int) -> Tensor:
    """Vectors (N, D) as z (B, D, N / B)."""
    return vectors.view(batch, -1, vectors.shape[1]).movedim(-1, 1)


def mixture(num_clusters: int, code_dim: int, num_vectors: int, seed: int, spread: float = 0.05) -> Tensor:
    """Vectors (N, D) around so many centres, which are the same for every seed; vector i is of cluster i mod K."""
    centres = 3 * random(num_clusters, code_dim, seed=100)
    return centres.repeat(num_vectors // num_clusters, 1) + spread * random(num_vectors, code_dim, seed=seed)


# The contract


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_dtypes(shape, training):
    quantizer = ready().train(training)
    q = quantizer(random(2, 4, *shape))
    assert (q.z_q.shape, q.z_q.dtype) == ((2, 4, *shape), torch.float32)
    assert (q.codes.shape, q.codes.dtype) == ((2, 1, *shape), torch.int64)
    assert (q.loss.shape, q.loss.dtype) == ((), torch.float32)
    assert (quantizer.codebook_size, quantizer.num_codebooks, quantizer.code_dim) == (16, 1, 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoded_codes_are_z_q_bit_for_bit(shape):
    quantizer = ready().eval()
    q = quantizer(random(3, 4, *shape))
    assert torch.equal(quantizer.decode_codes(q.codes), q.z_q)


def test_each_vector_becomes_the_nearest_row_of_the_codebook_at_its_place():
    quantizer = ready().eval()
    z = random(2, 4, 3, 5)
    q = quantizer(z)
    for b, y, x in np.ndindex(2, 3, 5):
        row = (quantizer.codebook - z[b, :, y, x]).norm(dim=1).argmin()
        assert q.codes[b, 0, y, x] == row
        assert torch.equal(q.z_q[b, :, y, x], quantizer.codebook[row])


def test_eval_mode_changes_nothing():
    quantizer = ready().eval()
    before = copy.deepcopy(quantizer.state_dict())
    first, second = quantizer(random(2, 4, 8)), quantizer(random(2, 4, 8))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal(first.z_q, second.z_q)


def test_state_survives_saving():
    quantizer = ready().train()
    quantizer(random(2, 4, 8))
    restored = EMAQuantizer(16, 4).train()
    restored.load_state_dict(quantizer.state_dict())
    for _ in range(2):
        assert torch.equal(quantizer(random(2, 4, 8)).codes, restored(random(2, 4, 8)).codes)
    assert torch.equal(quantizer.codebook, restored.codebook)


# The lookup


@pytest.mark.parametrize("elements", [1, 64, 1 << 22], ids=["a row at a time", "in chunks", "at once"])
def test_nearest_code_against_brute_force(monkeypatch, elements):
    monkeypatch.setattr(common, "LOOKUP_ELEMENTS", elements)
    z, codebook = random(101, 8), random(16, 8, seed=1)
    expected = torch.cdist(z.double(), codebook.double()).argmin(dim=1)
    found = nearest_code(z, codebook)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_lookup_holds_no_more_scores_than_it_may(monkeypatch):
    monkeypatch.setattr(common, "LOOKUP_ELEMENTS", 64)
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a: (out := addmm(*a), sizes.append(out.numel()))[0])
    nearest_code(random(101, 8), random(16, 8))
    assert max(sizes) <= 64
    assert sum(sizes) == 101 * 16


def test_autocast_changes_neither_codes_nor_precision():
    quantizer = ready(codebook_size=256, code_dim=16).eval()
    z = random(4, 16, 100)
    outside = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z)
    assert torch.equal(inside.codes, outside.codes)
    assert inside.z_q.dtype == torch.float32
    assert torch.equal(inside.z_q, outside.z_q)
    assert torch.equal(inside.loss, outside.loss)


def test_bf16_input_is_looked_up_in_fp32_and_gets_its_gradient():
    quantizer = ready(codebook_size=256, code_dim=16).train()
    z = random(4, 16, 100).bfloat16().requires_grad_()
    expected = torch.cdist(z.detach().double().movedim(1, -1), quantizer.codebook.double()).argmin(dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        q = quantizer(z)
    assert torch.equal(q.codes[:, 0], expected)
    assert q.z_q.dtype == torch.float32
    q.z_q.sum().backward()
    assert (z.grad == 1).all()


# Gradients


@pytest.mark.parametrize("training", [True, False])
def test_gradient_passes_straight_through(training):
    z, w = random(2, 4, 3, 3).requires_grad_(), random(2, 4, 3, 3, seed=2)
    (ready().train(training)(z).z_q * w).sum().backward()
    assert torch.equal(z.grad, w)


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("training", [True, False])
def test_beta_scales_the_gradient_of_the_commitment_term(beta, training):
    z = random(2, 4, 3, 3).requires_grad_()
    q = ready(commitment_weight=beta).train(training)(z)
    difference = (z - q.z_q).detach()
    assert q.loss.item() == pytest.approx(beta * difference.square().mean().item())
    q.loss.backward()
    torch.testing.assert_close(z.grad, 2 * beta * difference / z.numel())


# The codebook


def reference_step(state: dict, z: np.ndarray, decay: float) -> np.ndarray:
    """VQ-VAE, appendix A.1, in float64: moves the state and returns the codes."""
    codes = ((z[:, None] - state["codebook"]) ** 2).sum(axis=2).argmin(axis=1)
    weight = max(1 / (1 + 0.1 * state["num_updates"]), 1 - decay)
    for k in range(len(state["counts"])):
        mine = z[codes == k]
        state["counts"][k] = (1 - weight) * state["counts"][k] + weight * len(mine)
        state["sums"][k] = (1 - weight) * state["sums"][k] + weight * mine.sum(axis=0)
    state["codebook"] = state["sums"] / state["counts"][:, None]
    state["num_updates"] += 1
    return codes


def test_codebook_follows_its_vectors_as_in_the_paper():
    quantizer = ready(codebook_size=12, code_dim=4, decay=0.7, revive_below=0.0).train()
    quantizer.codebook.copy_(mixture(12, 4, 12, seed=0, spread=0.3))
    quantizer.sums.copy_(quantizer.codebook * 10)
    quantizer.num_updates.fill_(20)  # the weight falls to 1 - decay at the 24th update
    state = {name: value.double().numpy().copy() for name, value in quantizer.state_dict().items()}
    for step in range(8):
        z = mixture(12, 4, 96, seed=step) + 0.05 * step
        codes = reference_step(state, z.double().numpy(), decay=0.7)
        assert quantizer(as_map(z, 4)).codes.flatten().tolist() == codes.tolist()
        np.testing.assert_allclose(quantizer.counts, state["counts"], rtol=1e-5)
        np.testing.assert_allclose(quantizer.sums, state["sums"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(quantizer.codebook, state["codebook"], rtol=1e-4, atol=1e-4)
    assert quantizer.num_updates == 28


def test_output_is_that_of_the_codebook_before_the_step():
    quantizer = ready().train()
    before = quantizer.codebook.clone()
    q = quantizer(random(2, 4, 8))
    assert torch.equal(q.z_q, F.embedding(q.codes[:, 0], before).movedim(-1, 1))
    assert not torch.equal(quantizer.codebook, before)


def test_first_batch_initialises_every_code():
    quantizer = EMAQuantizer(codebook_size=32, code_dim=8).train()
    z = mixture(64, 8, 1024, seed=0)
    quantizer(as_map(z, 4))
    distance = torch.cdist(quantizer.codebook, z).amin(dim=1)
    assert distance.max() < 0.01
    assert len(torch.unique(quantizer.codebook.round(decimals=2), dim=0)) == 32


def test_every_cluster_gets_a_code_within_some_steps():
    quantizer = EMAQuantizer(codebook_size=32, code_dim=8).train()
    for step in range(20):
        quantizer(as_map(mixture(8, 8, 256, seed=step), 4))
    centres = mixture(8, 8, 8, seed=0, spread=0.0)
    assert torch.cdist(centres, quantizer.codebook).amin(dim=1).max() < 0.3
    assert torch.cdist(centres, quantizer.codebook).amin(dim=0).max() < 0.3  # and no code is left between them


def test_nearly_all_codes_are_used_on_a_rich_mixture():
    quantizer = EMAQuantizer(codebook_size=64, code_dim=8).train()
    for step in range(60):
        quantizer(as_map(mixture(512, 8, 512, seed=step, spread=0.3), 4))
    q = quantizer.eval()(as_map(mixture(512, 8, 2048, seed=1000, spread=0.3), 4))
    assert len(q.codes.unique()) >= 0.95 * 64


def test_a_dead_code_comes_back_on_a_vector_of_the_batch_in_the_same_step():
    quantizer = ready(decay=0.99, revive_below=0.1).train()
    dead = [3, 11]
    kill(quantizer, dead)
    z = random(64, 4)
    quantizer(as_map(z, 4))
    distance = torch.cdist(quantizer.codebook[dead], z).amin(dim=1)
    assert distance.max() < 1e-3
    assert not torch.equal(quantizer.codebook[3], quantizer.codebook[11])
    assert (quantizer.counts[dead] > 0.5 * quantizer.counts.mean()).all()  # so the next step does not revive it again
    place = quantizer.codebook[dead].clone()
    quantizer(as_map(random(64, 4, seed=2), 4))
    assert (quantizer.codebook[dead] - place).norm(dim=1).max() < 0.2


def test_a_code_that_dies_again_is_put_elsewhere():
    quantizer, z = ready().train(), random(64, 4)
    places = []
    for _ in range(4):
        kill(quantizer, [3])
        quantizer(as_map(z, 4))
        places.append(torch.cdist(quantizer.codebook[3:4], z).argmin().item())
    assert len(set(places)) == 4


def test_a_code_in_use_is_not_revived():
    quantizer = ready(codebook_size=16, decay=0.99).train()
    before = quantizer.codebook.clone()
    quantizer(as_map(random(64, 4), 4))
    assert (quantizer.codebook - before).abs().max() < 0.1


def test_codes_follow_data_that_move_away():
    quantizer = EMAQuantizer(codebook_size=16, code_dim=4, decay=0.99, revive_below=0.1).train()
    for step in range(20):
        quantizer(as_map(random(256, 4, seed=step), 4))
    for step in range(400):
        quantizer(as_map(random(256, 4, seed=step) + 50, 4))
    assert len(quantizer(as_map(random(256, 4, seed=999) + 50, 4)).codes.unique()) >= 15
    assert (quantizer.codebook - 50).abs().max() < 10


def test_training_repeats_bit_for_bit():
    runs = []
    for _ in range(2):
        quantizer = EMAQuantizer(16, 4).train()
        for step in range(5):
            torch.rand(3)  # its choices do not depend on torch's random state
            quantizer(as_map(random(64, 4, seed=step), 4))
        runs.append(quantizer.codebook)
    assert torch.equal(*runs)


def test_more_codes_than_vectors_works():
    quantizer = EMAQuantizer(codebook_size=64, code_dim=4).train()
    for step in range(3):
        q = quantizer(random(2, 4, 5, seed=step))
    assert torch.isfinite(quantizer.codebook).all()
    assert q.codes.shape == (2, 1, 5)


# Compilation


def test_training_step_compiles_without_a_graph_break_and_gives_the_same_codes():
    eager = EMAQuantizer(16, 4).train()
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for i in range(3):
        z, z_c = (random(2, 4, 5, 5, seed=i).requires_grad_() for _ in range(2))
        q, q_c = eager(z), step(z_c)
        assert torch.equal(q.codes, q_c.codes)
        (q.z_q.square().mean() + q.loss).backward()
        (q_c.z_q.square().mean() + q_c.loss).backward()
        torch.testing.assert_close(z.grad, z_c.grad)
    torch.testing.assert_close(eager.state_dict(), compiled.state_dict())


# build_quantizer


def test_build_quantizer_gives_what_is_named():
    quantizer = build_quantizer(name="ema", codebook_size=32, decay=0.5)
    assert isinstance(quantizer, EMAQuantizer)
    assert (quantizer.codebook_size, quantizer.decay, quantizer.code_dim) == (32, 0.5, EMAQuantizer().code_dim)
    assert isinstance(build_quantizer(), EMAQuantizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "emma"}, "model.quantizer.name=emma: no such quantizer; there is ema"),
        ({"codebok_size": 3}, "did you mean model.quantizer.codebook_size"),
        ({"codebook_size": "large"}, "^model.quantizer.codebook_size: "),
    ],
)
def test_build_quantizer_refuses_what_it_does_not_know(options, message):
    with pytest.raises(InputError, match=message):
        build_quantizer(**options)
