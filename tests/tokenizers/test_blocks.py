"""Group norm under autocast; activation checkpointing, with the same bits from fewer saved activations."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.adversarial.losses import adaptive_weight, generator_loss
from vqgen.errors import InputError
from vqgen.tokenizers import ARCHITECTURES, VQModel, blocks, build_tokenizer

QUANTIZER = {"codebook_size": 32, "code_dim": 4}
OPTIONS = {
    "light": {"patch_size": 2, "widths": [16, 32], "encoder_blocks": 2, "decoder_blocks": 2},
    "vqgan": {
        "width": 16,
        "multipliers": [1, 2],
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "norm_groups": 4,
        "latent_channels": 8,
    },
}
NAMES = list(ARCHITECTURES)


def pair(name: str) -> tuple[VQModel, VQModel]:
    """Two equal tokenizers in training mode, of which the second checkpoints its activations."""
    torch.manual_seed(0)
    plain = build_tokenizer(name, **OPTIONS[name], quantizer=QUANTIZER).train()
    for p in plain.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)  # blocks that start as the identity would hide wrong gradients
    checkpointing = copy.deepcopy(plain)
    checkpointing.checkpoint_activations()
    return plain, checkpointing


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def step(model: nn.Module, x: Tensor, bf16: bool = False) -> list[Tensor]:
    """The reconstructions of a training step, and all gradients."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        x_rec, q = model(x)
    (F.mse_loss(x_rec.float(), x) + q[0].loss).backward()
    return [x_rec.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Appends, at its end, the bytes of the activations that were saved inside for a backward pass, each counted once.

    The tensors stay alive inside, so that no two of them can have the same address.
    """
    kept: dict[int, Tensor] = {}
    total: list[int] = []

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield total
    total.append(sum(x.untyped_storage().nbytes() for x in kept.values()))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_the_same_bits(name, bf16):
    plain, checkpointing = pair(name)
    for x in (images(), images(3)):  # the second time with a codebook that has learnt
        assert equal(step(plain, x, bf16), step(checkpointing, x, bf16))


@pytest.mark.parametrize("name", NAMES)
def test_fewer_activations_are_saved(name):
    x, sizes = images(), []
    for model in pair(name):
        with saved_bytes() as size:
            model(x)
        sizes += size
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_backward_pass_nothing_is_recomputed(name, monkeypatch):
    plain, checkpointing = pair(name)
    monkeypatch.setattr(blocks, "checkpoint", None)
    with torch.no_grad():
        assert torch.equal(checkpointing(images())[0], plain(images())[0])
    assert torch.equal(checkpointing.eval()(images())[0], plain.eval()(images())[0])
    with pytest.raises(TypeError, match="not callable"):
        checkpointing.train()(images())


@pytest.mark.parametrize("name", NAMES)
def test_the_adaptive_weight_and_the_pass_after_it_are_the_same_bits(name):
    """Stage 1's order: two products with the last layer's Jacobian, then one pass through the whole tokenizer."""
    disc = PatchDiscriminator(3, layers=2, width=8)
    results = []
    for model in pair(name):
        x_rec, q = model(images())
        y = x_rec.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.mse_loss(y, images()), y)
        (adv_gradient,) = torch.autograd.grad(generator_loss("hinge", disc.eval()(y)), y)
        weight = adaptive_weight(gradient, adv_gradient, x_rec, model.last_layer)
        (q[0].loss + (x_rec * (gradient + weight * adv_gradient)).sum()).backward()
        results.append([weight, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_it_works_under_ddp(name, tmp_path):
    """One process is enough: DDP's hooks on the gradients, which a second forward pass could confuse, are the same."""
    plain, checkpointing = pair(name)
    expected = step(plain, images())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert equal(step(DistributedDataParallel(checkpointing), images()), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_as_one_graph(name):
    plain, checkpointing = pair(name)
    step(plain, images())  # the first batch initialises the codebook, which is not for a compiler
    step(checkpointing, images())
    compiled = torch.compile(checkpointing, fullgraph=True, backend="aot_eager" if name == "light" else "eager")
    for one, other in zip(step(plain, images()), step(compiled, images()), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_model_that_was_saved_does_not_depend_on_it(tmp_path):
    plain, checkpointing = pair("light")
    for model, folder in ((plain, "a"), (checkpointing, "b")):
        model.save_pretrained(tmp_path / folder)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert not VQModel.from_pretrained(tmp_path / "b").encoder.checkpointing


def test_an_architecture_without_blocks_says_so():
    class Bare(VQModel):
        def __init__(self):
            super().__init__(3, 1, QUANTIZER)

    with pytest.raises(InputError, match=r"^activation_checkpointing=true: Bare has no Stack"):
        Bare().checkpoint_activations()


def test_group_norm_keeps_the_type_of_its_input_and_float32_keeps_its_bits(monkeypatch):
    norm, x = blocks.GroupNorm(2, 8), torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(norm.weight)
    expected, original, seen = F.group_norm(x, 2, norm.weight, norm.bias), F.group_norm, []

    def group_norm(x: Tensor, groups: int, weight: Tensor, *others: object) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), weight.dtype))
        return original(x, groups, weight, *others)

    monkeypatch.setattr(F, "group_norm", group_norm)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.bfloat16())
        assert torch.equal(norm(x), expected)
    assert seen[0] == (False, torch.bfloat16)  # on CUDA autocast would make it float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.01)
