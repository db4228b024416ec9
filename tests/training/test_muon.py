import copy

import pytest
import torch
from torch import nn

from vqgen.tokenizers import build_tokenizer
from vqgen.training.muon import Muon, muon_groups, orthogonalised
from vqgen.training.schedule import parameter_groups

ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "fused": True}


@pytest.mark.parametrize("shape", [(3, 24, 80), (2, 80, 24), (1, 16, 16)])
def test_orthogonalised_keeps_singular_vectors_and_evens_out_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    inside = u.mT @ orthogonalised(x).double() @ vh.mT  # diagonal in the same singular vectors
    values = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(values), atol=1e-3, rtol=0)
    large = s > 0.1 * s.amax(dim=1, keepdim=True)  # five iterations do not lift much smaller ones all the way
    assert large.double().mean() > 0.8
    assert (values[large] > 0.6).all()
    assert (values < 1.3).all()


def test_orthogonalised_of_nothing_is_nothing():
    assert not orthogonalised(torch.zeros(1, 16, 32)).any()


def test_steps_follow_the_formula_and_adamw_trains_the_others():
    generator = torch.Generator().manual_seed(0)
    w, b = (torch.randn(shape, generator=generator) for shape in ((16, 16, 3, 3), (16,)))
    trained = [nn.Parameter(w.clone()), nn.Parameter(b.clone())]
    groups = [
        {"params": trained[:1], "weight_decay": 0.1, "muon": True},
        {"params": trained[1:], "weight_decay": 0.0, "muon": False},
    ]
    muon = Muon(groups, momentum=0.9, **ADAM)
    reference = nn.Parameter(b.clone())
    adamw = torch.optim.AdamW([reference], weight_decay=0.0, **ADAM)
    expected, m = w.flatten(1).double(), torch.zeros(16, 144, dtype=torch.float64)
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=generator) for p in trained]
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient.clone()
        muon.step()
        muon.zero_grad()
        g = gradients[0].flatten(1).double()
        m = 0.9 * m + g
        direction = orthogonalised((g + 0.9 * m)[None])[0]
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 144**0.5 * direction
        reference.grad = gradients[1].clone()
        adamw.step()
    torch.testing.assert_close(trained[0].flatten(1).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(trained[1], reference)


def test_a_step_is_as_large_as_one_of_adamw():
    w = nn.Parameter(torch.zeros(32, 64))
    muon = Muon([{"params": [w], "weight_decay": 0.0, "muon": True}], **ADAM)
    w.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    muon.step()
    assert w.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)  # Moonlight, eq. 4


def test_weights_of_one_shape_do_not_influence_each_other():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(16, 32, generator=generator) for _ in range(2)]

    def after(chosen):
        weights = [nn.Parameter(torch.zeros(16, 32)) for _ in chosen]
        muon = Muon([{"params": weights, "weight_decay": 0.0, "muon": True}], **ADAM)
        for p, i in zip(weights, chosen, strict=True):
            p.grad = gradients[i].clone()
        muon.step()
        return weights

    torch.testing.assert_close(after([0, 1])[1], after([1])[0], atol=1e-6, rtol=0)


def test_a_step_that_is_not_finite_changes_nothing():
    weights = [nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))]
    groups = [{"params": [p], "weight_decay": 0.1, "muon": p.ndim == 2} for p in weights]
    muon = Muon(groups, **ADAM)
    for bad in (0.0, 1.0):
        for p in weights:
            p.grad = torch.full_like(p, torch.nan if bad else 1.0)
        muon.found_inf = torch.tensor(bad)
        muon.step()
        if not bad:
            before = copy.deepcopy((weights, muon.state[weights[0]]["momentum"]))
    assert all(torch.equal(p, q) for p, q in zip(weights, before[0], strict=True))
    assert torch.equal(muon.state[weights[0]]["momentum"], before[1])


@pytest.mark.parametrize("name", ["light", "vqgan"])
def test_groups_leave_edges_and_depthwise_convolutions_to_adamw(name):
    options = {"width": 32, "norm_groups": 16} if name == "vqgan" else {"widths": [32]}
    model = build_tokenizer(name, **options)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = muon_groups(parameter_groups(model, 0.1), (model.last_layer, *model.quantizer.parameters()))
    by_muon = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    all_names = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(all_names) == sorted(names.values())
    assert all(model.get_parameter(key).ndim >= 2 for key in by_muon)
    assert all(group["weight_decay"] == 0.1 for group in groups if group["muon"])
    last = next(key for key, p in model.named_parameters() if p is model.last_layer)
    stem = next(key for key, _ in model.encoder.named_parameters(prefix="encoder"))
    assert not by_muon & {last, stem, "to_code.weight", "from_code.weight"}
    assert not any("depthwise" in key for key in by_muon)
    assert len(by_muon) > 5


@pytest.mark.parametrize("quantizer", ["vq", "simvq", "gumbel"])
def test_groups_leave_the_quantizer_to_adamw(quantizer):
    options = {"name": quantizer, "codebook_size": 64, "code_dim": 32}
    model = build_tokenizer(widths=[32], quantizer=options)
    groups = [
        group
        for group in muon_groups(parameter_groups(model, 0.1), (model.last_layer, *model.quantizer.parameters()))
        if group["muon"]
    ]
    by_muon = {id(p) for group in groups for p in group["params"]}
    own = {id(p) for p in model.quantizer.parameters()}
    assert own
    assert not by_muon & own
