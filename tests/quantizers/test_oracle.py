"""Our quantizers against those of vector-quantize-pytorch, on equal weights."""

import pytest
import torch
import vector_quantize_pytorch as oracle
from helpers import random
from torch import Tensor

from vqgen.quantizers import FSQ, LFQ, SimVQ, build_quantizer

K, D = 64, 6


def maps(seed: int = 0, dim: int = D) -> Tensor:
    return random(4, dim, 8, 8, seed=seed)


def assert_same(ours, theirs, z: Tensor, w: Tensor, loss: bool = True) -> None:
    """Checks that both give the same codes, outputs, losses and gradients in z."""
    z_a, z_b = z.clone().requires_grad_(), z.clone().requires_grad_()
    q, (z_q, codes, *their_loss) = ours(z_a), theirs(z_b)
    assert torch.equal(q.codes.squeeze(1), codes)
    torch.testing.assert_close(q.z_q, z_q, atol=1e-5, rtol=1e-5)
    if loss:
        torch.testing.assert_close(q.loss, their_loss[0].squeeze(), atol=1e-5, rtol=1e-5)
        ((q.z_q * w).sum() + q.loss).backward()
        ((z_q * w).sum() + their_loss[0].squeeze()).backward()
    else:
        (q.z_q * w).sum().backward()
        (z_q * w).sum().backward()
    torch.testing.assert_close(z_a.grad, z_b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_ema(lookup, gradient):
    theirs = oracle.VectorQuantize(
        D,
        codebook_size=K,
        decay=0.9,
        commitment_weight=0.25,
        threshold_ema_dead_code=0,
        use_cosine_sim=lookup == "cosine",
        rotation_trick=gradient == "rotation",
        accept_image_fmap=True,
    ).train()
    ours = build_quantizer(
        name="ema",
        codebook_size=K,
        code_dim=D,
        decay=0.9,
        commitment_weight=0.25,
        revive_below=0.0,
        lookup=lookup,
        gradient=gradient,
    ).train()
    codebook = theirs._codebook
    codebook.embed.copy_(random(1, K, D, seed=1))
    if lookup == "cosine":
        codebook.embed.copy_(torch.nn.functional.normalize(codebook.embed, dim=-1))
    codebook.embed_avg.copy_(codebook.embed)
    ours.load_state_dict(
        {
            "codebook": codebook.embed[0],
            "sums": codebook.embed_avg[0],
            "counts": codebook.cluster_size[0],
            "num_updates": torch.tensor(1000),  # past our faster average of early steps, which theirs lacks
        }
    )
    for step in range(5):  # the averages move, so later steps compare other codebooks
        assert_same(ours, theirs, maps(step), maps(100 + step))
        torch.testing.assert_close(ours.counts, codebook.cluster_size[0])
        torch.testing.assert_close(ours.codebook, codebook.embed[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_vq(gradient):
    # Their loss is commitment_weight |z - e|^2 with a gradient for both sides: beta = 1.
    theirs = oracle.VectorQuantize(
        D,
        codebook_size=K,
        commitment_weight=1.0,
        threshold_ema_dead_code=0,
        ema_update=False,
        learnable_codebook=True,
        rotation_trick=gradient == "rotation",
        accept_image_fmap=True,
    ).train()
    ours = build_quantizer(
        name="vq", codebook_size=K, code_dim=D, commitment_weight=1.0, revive_below=0.0, gradient=gradient
    ).train()
    ours.load_state_dict(
        {
            "codebook": theirs._codebook.embed[0].detach(),
            "counts": torch.ones(K),
            "num_updates": torch.tensor(1000),
        }
    )
    optimizers = [torch.optim.SGD(q.parameters(), lr=1.0) for q in (ours, theirs)]
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        z_a, z_b = maps(step).requires_grad_(), maps(step).requires_grad_()
        q, (z_q, codes, loss) = ours(z_a), theirs(z_b)
        assert torch.equal(q.codes.squeeze(1), codes)
        torch.testing.assert_close(q.z_q, z_q, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(q.loss, 2 * loss.squeeze())  # both terms have the same value
        ((q.z_q * maps(9)).sum() + q.loss).backward()
        ((z_q * maps(9)).sum() + loss.squeeze()).backward()
        torch.testing.assert_close(z_a.grad, z_b.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.codebook.grad, theirs._codebook.embed.grad[0], atol=1e-6, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_simvq(gradient):
    theirs = oracle.SimVQ(D, K, channel_first=True, rotation_trick=gradient == "rotation").train()
    ours = SimVQ(K, D, gradient=gradient).train()
    ours.load_state_dict(
        {"frozen_codebook": theirs.frozen_codebook, "projection.weight": theirs.code_transform.weight.detach()}
    )
    assert_same(ours, theirs, maps(), maps(1))
    torch.testing.assert_close(ours.projection.weight.grad, theirs.code_transform.weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("levels", [[8, 8, 8], [8, 5, 5, 5], [7, 5, 5, 5, 5], [3, 4]], ids=str)
def test_fsq(levels):
    theirs, ours = oracle.FSQ(levels).train(), FSQ(levels).train()
    z = 2 * maps(dim=len(levels))
    assert_same(ours, theirs, z, maps(1, len(levels)), loss=False)
    every_code = torch.arange(ours.codebook_size)
    torch.testing.assert_close(ours.decode(every_code[:, None]), theirs._indices_to_codes(every_code))


@pytest.mark.parametrize("spherical", [False, True])
def test_lfq(spherical):
    # Their distances lack a factor of ours. Both projects' codes on the sphere have unit length.
    settings = {"entropy_loss_weight": 0.1, "diversity_gamma": 0.7, "commitment_loss_weight": 0.25}
    theirs = oracle.LFQ(codebook_size=K, spherical=spherical, **settings).train()
    ours = LFQ(K, spherical, commitment_weight=0.25, entropy_weight=0.1, diversity=0.7, entropy_temperature=0.5).train()
    z = 0.3 * maps()
    inv_temperature = 1 / ours.scale**2 / 0.5
    assert_same(ours, lambda x: theirs(x, inv_temperature=inv_temperature), z, maps(1))


@pytest.mark.parametrize("base", ["ema", "vq"])
def test_residual(base):
    learned = base == "vq"
    theirs = oracle.ResidualVQ(
        dim=D,
        num_quantizers=3,
        codebook_size=K,
        commitment_weight=1.0,
        threshold_ema_dead_code=0,
        rotation_trick=False,
        ema_update=not learned,
        learnable_codebook=learned,
        decay=0.9,
    ).train()
    options = {"name": base, "codebook_size": K, "code_dim": D, "commitment_weight": 1.0, "revive_below": 0.0}
    ours = build_quantizer(name="residual", num_quantizers=3, base={**options, "decay": 0.9}).train()
    for i, level in enumerate(theirs.layers):
        with torch.no_grad():
            level._codebook.embed.copy_(random(1, K, D, seed=1 + i) / 2**i)
            level._codebook.embed_avg.copy_(level._codebook.embed)
        state = {
            "codebook": level._codebook.embed[0].detach(),
            "counts": torch.ones(K),
            "num_updates": torch.tensor(1000),
        }
        if not learned:
            state["sums"] = state["codebook"]
        ours.levels[i].load_state_dict(state)
    for step in range(3):
        z_a, z_b = maps(step).requires_grad_(), maps(step).requires_grad_()
        q, (z_q, codes, losses) = ours(z_a), theirs(z_b.flatten(2).mT)  # theirs takes (B, N, D)
        z_q = z_q.mT.view_as(z_b)
        assert torch.equal(q.codes.flatten(2).mT, codes)
        torch.testing.assert_close(q.z_q, z_q, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(q.loss, losses.sum() * (1 + learned), atol=1e-5, rtol=1e-5)
        ((q.z_q * maps(9)).sum() + q.loss).backward()
        ((z_q * maps(9)).sum() + losses.sum()).backward()
        # Each of their three levels passes on the decoder's gradient; ours pass it once. Commitment gradients agree.
        torch.testing.assert_close(z_a.grad + 2 * maps(9), z_b.grad, atol=1e-5, rtol=1e-4)
