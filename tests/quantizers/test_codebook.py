"""The quantizers `ema` and `vq`, whose codebook moves: first their common part, then how each learns."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import as_map, random
from torch import Tensor

from vqgen.quantizers import EMAQuantizer, VQQuantizer, build_quantizer
from vqgen.quantizers.codebook import CodebookQuantizer
from vqgen.quantizers.common import nearest_code

both = pytest.mark.parametrize("name", ["ema", "vq"])


def ready(name: str, codebook_size: int = 64, code_dim: int = 4, **options) -> CodebookQuantizer:
    """A quantizer in the middle of training, with a random codebook and all codes in use."""
    quantizer = build_quantizer(name=name, codebook_size=codebook_size, code_dim=code_dim, **options)
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    state["codebook"] = random(codebook_size, code_dim, seed=1)
    state["counts"].fill_(10.0)
    state["num_updates"].fill_(1000)
    if name == "ema":
        state["sums"] = state["codebook"] * 10.0
    quantizer.load_state_dict(state)
    return quantizer


def kill(quantizer: CodebookQuantizer, codes: list[int]) -> None:
    """Moves codes so far away that no vector is assigned to them, and lets their counts run out."""
    with torch.no_grad():
        quantizer.codebook[codes] = 1000.0
        quantizer.counts[codes] = 1e-3
        if isinstance(quantizer, EMAQuantizer):
            quantizer.sums[codes] = 1.0


def mixture(num_clusters: int, code_dim: int, num_vectors: int, seed: int, spread: float = 0.05) -> Tensor:
    """Vectors (N, D) around K centres, which are the same for every seed; vector i belongs to cluster i mod K."""
    centres = 3 * random(num_clusters, code_dim, seed=100)
    return centres.repeat(num_vectors // num_clusters, 1) + spread * random(num_vectors, code_dim, seed=seed)


# The common part


@both
def test_each_vector_becomes_the_nearest_row_of_the_codebook_at_its_place(name):
    quantizer = ready(name).eval()
    z = random(2, 4, 3, 5)
    q = quantizer(z)
    for b, y, x in np.ndindex(2, 3, 5):
        row = (quantizer.codebook - z[b, :, y, x]).norm(dim=1).argmin()
        assert q.codes[b, 0, y, x] == row
        assert torch.equal(q.z_q[b, :, y, x], quantizer.codebook[row])


@both
@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_a_codebook_that_came_without_counts_is_kept_and_counts_as_long_in_training(name, lookup):
    quantizer = build_quantizer(name=name, codebook_size=64, code_dim=4, lookup=lookup)
    before = F.normalize(random(64, 4, seed=1), dim=1)
    quantizer.codebook.data.copy_(before)
    quantizer.adopt()
    z = random(1, 4, 4, 4)  # 16 vectors, so most codes have none
    codes = quantizer.eval()(z).codes
    for _ in range(3):
        assert torch.equal(quantizer.train()(z).codes, codes)
    unused = torch.ones(64, dtype=torch.bool)
    unused[codes.unique()] = False
    torch.testing.assert_close(quantizer.codebook[unused], before[unused], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.codebook, before, rtol=0, atol=0.2)
    torch.testing.assert_close(quantizer.counts[unused], torch.full_like(quantizer.counts[unused], 0.99**3))


@both
def test_a_codebook_with_counts_is_adopted_as_it_is(name):
    quantizer = ready(name)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.adopt()
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@both
def test_cosine_lookup_takes_the_code_with_the_nearest_direction(name):
    quantizer = ready(name, lookup="cosine").eval()
    z = 7 * random(2, 4, 15)
    q = quantizer(z)
    for b, x in np.ndindex(2, 15):
        row = F.cosine_similarity(quantizer.codebook, z[b, :, x], dim=1).argmax()
        assert q.codes[b, 0, x] == row
        torch.testing.assert_close(q.z_q[b, :, x], F.normalize(quantizer.codebook[row], dim=0))


@both
def test_cosine_lookup_does_not_see_lengths(name):
    a, b = (ready(name, lookup="cosine").train() for _ in range(2))
    z = random(2, 4, 15)
    scales = 0.1 + random(2, 1, 15, seed=3).abs()
    q_a, q_b = a(z), b(z * scales)
    assert torch.equal(q_a.codes, q_b.codes)
    torch.testing.assert_close(q_a.loss, q_b.loss)
    torch.testing.assert_close(a.state_dict(), b.state_dict())


@both
def test_gradient_passes_straight_through(name):
    for training in (True, False):
        z, w = random(2, 4, 3, 3).requires_grad_(), random(2, 4, 3, 3, seed=2)
        (ready(name).train(training)(z).z_q * w).sum().backward()
        assert torch.equal(z.grad, w)


@both
def test_rotation_gradient_differs_in_nothing_but_the_gradient(name):
    z, w = random(2, 4, 9).requires_grad_(), random(2, 4, 9, seed=2)
    straight, rotated = (ready(name, gradient=g).train()(z) for g in ("straight-through", "rotation"))
    assert torch.equal(straight.z_q, rotated.z_q)
    assert torch.equal(straight.loss, rotated.loss)
    (rotated.z_q * w).sum().backward()
    scale = rotated.z_q.detach().norm(dim=1) / z.detach().norm(dim=1)
    torch.testing.assert_close(z.grad.norm(dim=1), scale * w.norm(dim=1))  # rotated and scaled
    assert (z.grad - w).abs().max() > 0.1


@both
@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_beta_scales_the_encoders_term_and_not_the_codebooks(name, beta):
    for training in (True, False):
        z = random(2, 4, 3, 3).requires_grad_()
        quantizer = ready(name, commitment_weight=beta).train(training)
        q = quantizer(z)
        difference = (z - q.z_q).detach()
        mse = difference.square().mean().item()
        assert q.loss.item() == pytest.approx((beta + (name == "vq")) * mse)
        q.loss.backward()
        torch.testing.assert_close(z.grad, 2 * beta * difference / z.numel())
        if name == "vq":  # the codebook's gradient has no beta
            expected = torch.zeros(64, 4).index_add_(
                0, q.codes.flatten(), -2 * difference.movedim(1, -1).reshape(-1, 4) / z.numel()
            )
            torch.testing.assert_close(quantizer.codebook.grad, expected)


def test_legacy_beta_scales_the_codebooks_term_and_not_the_encoders():
    z = random(1, 4, 1).requires_grad_()
    quantizer = ready("vq", commitment_weight=0.25, legacy_beta=True)
    q = quantizer(z)
    assert q.loss.item() == pytest.approx(1.25 * (z - q.z_q).square().mean().item())
    q.loss.backward()
    row = quantizer.codebook.grad[q.codes.item()]
    torch.testing.assert_close(z.grad[0, :, 0], -4 * row)


def test_commitment_and_codebook_gradients_are_in_the_ratio_beta():
    z = random(1, 4, 1).requires_grad_()  # one vector: both terms pull along the same line
    quantizer = ready("vq", commitment_weight=0.25)
    q = quantizer(z)
    q.loss.backward()
    row = quantizer.codebook.grad[q.codes.item()]
    torch.testing.assert_close(z.grad[0, :, 0], -0.25 * row)


@both
def test_first_batch_initialises_every_code(name):
    quantizer = build_quantizer(name=name, codebook_size=32, code_dim=8, kmeans_iterations=0).train()
    z = mixture(64, 8, 1024, seed=0)
    quantizer._initialise(z)
    assert torch.cdist(quantizer.codebook, z).amin(dim=1).max() < 0.01
    assert len(torch.unique(quantizer.codebook.detach().round(decimals=2), dim=0)) == 32


@both
def test_kmeans_initialisation_is_that_of_lloyds_algorithm(name):
    z = mixture(20, 4, 400, seed=0, spread=0.5)
    quantizers = [build_quantizer(name=name, codebook_size=32, code_dim=4, kmeans_iterations=i) for i in (0, 5)]
    for quantizer in quantizers:
        quantizer._initialise(z)
    centres = quantizers[0].codebook.detach().double()
    for _ in range(5):
        nearest = torch.cdist(z.double(), centres).argmin(dim=1)
        for k in nearest.unique():
            centres[k] = z[nearest == k].double().mean(dim=0)
    torch.testing.assert_close(quantizers[1].codebook.detach().double(), centres, atol=1e-4, rtol=1e-4)


@both
def test_initialisation_comes_before_the_first_lookup_and_only_then(name):
    quantizer = build_quantizer(name=name, codebook_size=32, code_dim=4).train()
    z = random(4, 4, 64)
    q = quantizer(z)
    assert (z - q.z_q).square().mean() < 0.5 * z.square().mean()
    assert len(q.codes.unique()) == 32
    place = quantizer.codebook.detach().clone()
    quantizer(random(4, 4, 64, seed=1) + 100)
    assert (quantizer.codebook - place).norm(dim=1).median() < 1


@both
def test_a_dead_code_comes_back_on_a_vector_of_the_batch_and_works_in_the_same_step(name):
    quantizer = ready(name).train()
    dead = [3, 11]
    kill(quantizer, dead)
    z = random(256, 4)
    q = quantizer(as_map(z, 4))
    assert torch.cdist(quantizer.codebook[dead], z).amin(dim=1).max() < 0.01
    assert {3, 11} <= set(q.codes.flatten().tolist())
    assert not torch.equal(quantizer.codebook[3], quantizer.codebook[11])
    # Its statistics are new too, so neither this update nor the next moves the code far or revives it again.
    assert (quantizer.counts[dead] > 0.5 * quantizer.counts.mean()).all()
    if name == "ema":
        torch.testing.assert_close(quantizer.sums[dead], quantizer.codebook[dead] * quantizer.counts[dead, None])
    place = quantizer.codebook[dead].clone()
    quantizer(as_map(random(256, 4, seed=2), 4))
    assert (quantizer.codebook[dead] - place).norm(dim=1).max() < 0.2


@both
def test_a_code_that_dies_again_is_put_elsewhere(name):
    quantizer, z = ready(name).train(), random(64, 4)
    places = []
    for _ in range(4):
        kill(quantizer, [3])
        quantizer(as_map(z, 4))
        places.append(torch.cdist(quantizer.codebook[3:4], z).argmin().item())
    assert len(set(places)) == 4


@both
def test_more_dead_codes_than_a_step_takes_come_back_in_the_next_steps(name):
    quantizer = ready(name).train()
    kill(quantizer, list(range(32)))
    for step in range(8):  # 64 / 16 = 4 per step
        quantizer(as_map(random(512, 4, seed=step), 4))
    assert quantizer.codebook.abs().max() < 10


@both
def test_a_code_in_use_is_not_revived(name):
    quantizer = ready(name).train()
    before = quantizer.codebook.detach().clone()
    quantizer(as_map(random(256, 4), 4))
    assert (quantizer.codebook - before).abs().max() < 0.2


@both
def test_without_revival_the_dead_stay_where_they_are(name):
    quantizer = ready(name, revive_below=0.0).train()
    kill(quantizer, [3])
    place = quantizer.codebook[3].detach().clone()
    for step in range(3):
        quantizer(as_map(random(256, 4, seed=step), 4))
    assert F.cosine_similarity(quantizer.codebook[3], place, dim=0) > 0.99
    assert quantizer.codebook[3].norm() > 100


@both
def test_nearly_all_codes_are_used_on_a_rich_mixture(name):
    quantizer = build_quantizer(name=name, codebook_size=64, code_dim=8).train()
    optimizer = torch.optim.Adam([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        q = quantizer(as_map(mixture(512, 8, 512, seed=step, spread=0.3), 4))
        if name == "vq":
            q.loss.backward()
            optimizer.step()
    q = quantizer.eval()(as_map(mixture(512, 8, 2048, seed=1000, spread=0.3), 4))
    assert len(q.codes.unique()) >= 0.95 * 64


@both
@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_more_codes_than_vectors_in_a_batch_are_all_used_after_some_steps(name, lookup):
    """The batches have half as many vectors as there are codes, as do 32 images of 256 positions for 16,384 codes."""
    quantizer = build_quantizer(name=name, codebook_size=512, code_dim=8, lookup=lookup).train()
    quantizer(random(1, 8, 256, seed=0))
    assert torch.isfinite(quantizer.codebook).all()
    vectors = random(1, 8, 256, seed=0)[0].T
    vectors = F.normalize(vectors, dim=1) if lookup == "cosine" else vectors
    if name == "vq":  # which has not moved yet: each code is a vector of the batch, or the mean of some
        assert torch.cdist(quantizer.codebook, vectors).min(dim=1).values.max() < 1
    for step in range(1, 30):
        quantizer(random(1, 8, 256, seed=step))
    codes = quantizer.eval()(random(1, 8, 32768, seed=100)).codes
    assert len(codes.unique()) > 0.97 * 512


@both
def test_with_a_temperature_training_draws_codes_and_evaluation_does_not(name):
    quantizer = ready(name, temperature=2.0)
    z = random(8, 4, 64)
    nearest = nearest_code(z.movedim(1, -1).reshape(-1, 4), quantizer.codebook.detach()).view(8, 1, 64)
    assert torch.equal(copy.deepcopy(quantizer).eval()(z).codes, nearest)
    torch.manual_seed(0)
    assert (quantizer.train()(z).codes != nearest).float().mean() > 0.2


@both
def test_entropy_loss_wants_sure_and_even_assignments(name):
    z = random(4, 4, 64)
    plain, regular = (ready(name, entropy_weight=w).train()(z).loss for w in (0.0, 0.5))
    codebook = ready(name).codebook.detach()
    p = torch.softmax(-(torch.cdist(z.movedim(1, -1).reshape(-1, 4), codebook) ** 2), dim=1)
    expected = -torch.xlogy(p, p).sum(dim=1).mean() + torch.xlogy(p.mean(dim=0), p.mean(dim=0)).sum()
    torch.testing.assert_close(regular - plain, 0.5 * expected, atol=1e-5, rtol=1e-4)


# How `ema` learns


def reference_step(state: dict, z: np.ndarray, decay: float) -> np.ndarray:
    """VQ-VAE, appendix A.1, in float64: moves the state and returns the codes."""
    codes = ((z[:, None] - state["codebook"]) ** 2).sum(axis=2).argmin(axis=1)
    state["num_updates"] += 1
    weight = max(1 / (1 + 0.1 * state["num_updates"]), 1 - decay)
    for k in range(len(state["counts"])):
        mine = z[codes == k]
        state["counts"][k] = (1 - weight) * state["counts"][k] + weight * len(mine)
        state["sums"][k] = (1 - weight) * state["sums"][k] + weight * mine.sum(axis=0)
    state["codebook"] = state["sums"] / state["counts"][:, None]
    return codes


def test_codebook_follows_its_vectors_as_in_the_paper():
    quantizer = ready("ema", codebook_size=12, decay=0.7, revive_below=0.0).train()
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


def test_ema_gives_the_output_of_the_codebook_before_its_step():
    quantizer = ready("ema").train()
    before = quantizer.codebook.clone()
    q = quantizer(random(4, 4, 64))
    assert torch.equal(q.z_q, F.embedding(q.codes[:, 0], before).movedim(-1, 1))
    assert not torch.equal(quantizer.codebook, before)


def test_ema_codes_follow_data_that_move_away():
    quantizer = EMAQuantizer(codebook_size=16, code_dim=4).train()
    for step in range(20):
        quantizer(as_map(random(256, 4, seed=step), 4))
    for step in range(400):
        quantizer(as_map(random(256, 4, seed=step) + 50, 4))
    assert len(quantizer(as_map(random(256, 4, seed=999) + 50, 4)).codes.unique()) >= 15
    assert (quantizer.codebook - 50).abs().max() < 10


def test_every_cluster_gets_an_ema_code_within_some_steps():
    quantizer = EMAQuantizer(codebook_size=32, code_dim=8).train()
    for step in range(20):
        quantizer(as_map(mixture(8, 8, 256, seed=step), 4))
    centres = mixture(8, 8, 8, seed=0, spread=0.0)
    assert torch.cdist(centres, quantizer.codebook).amin(dim=1).max() < 0.3
    assert torch.cdist(centres, quantizer.codebook).amin(dim=0).max() < 0.3  # and no code stays between them


def test_ema_codes_of_a_cosine_lookup_stay_on_the_sphere():
    quantizer = EMAQuantizer(codebook_size=32, code_dim=4, lookup="cosine").train()
    for step in range(5):
        quantizer(as_map(5 * random(256, 4, seed=step), 4))
        torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(32))


# How `vq` learns


def test_vq_is_trained_by_the_optimizer_alone():
    quantizer = ready("vq", revive_below=0.0).train()
    before = quantizer.codebook.detach().clone()
    q = quantizer(random(4, 4, 64))
    assert torch.equal(quantizer.codebook, before)
    q.loss.backward()
    used = torch.zeros(64, dtype=torch.bool)
    used[q.codes.flatten()] = True
    assert torch.equal(quantizer.codebook.grad.abs().sum(dim=1) > 0, used)


def test_vq_codes_go_to_the_means_of_their_vectors():
    quantizer = VQQuantizer(codebook_size=8, code_dim=4, revive_below=0.0).train()
    z = mixture(8, 4, 256, seed=0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=10.0)
    for _ in range(200):
        optimizer.zero_grad()
        q = quantizer(as_map(z, 4))
        q.loss.backward()
        optimizer.step()
    codes = q.codes.movedim(1, -1).flatten()
    for k in codes.unique():
        torch.testing.assert_close(quantizer.codebook[k].detach(), z[codes == k].mean(dim=0), atol=1e-3, rtol=1e-3)
