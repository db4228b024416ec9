"""VQGAN's network: the originals' size and cost, its options, and its training by the program."""

import copy
import shutil

import pytest
import torch
from programs import ROOT
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from vqgen.codes import CodeLayout
from vqgen.errors import InputError
from vqgen.tokenizers import VQGAN, VQModel, build_tokenizer
from vqgen.tokenizers.vqgan import Attention

SMALL = {
    "width": 8,
    "multipliers": [1, 2, 2],
    "encoder_blocks": 1,
    "decoder_blocks": 2,
    "latent_channels": 16,
    "norm_groups": 4,
    "quantizer": {"name": "vq", "codebook_size": 16, "code_dim": 4, "kmeans_iterations": 0},
}


def small(**changes) -> VQGAN:
    """A tokenizer of stride 4 whose codes differ between images."""
    torch.manual_seed(0)
    model = VQGAN(**{**SMALL, **changes}).eval()
    model.quantizer.codebook.data.normal_(std=0.3)
    return model


def images(batch: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


# The originals' layers, one a line: kind, channels in and out, side of the output for 256 pixels, how many.

F16 = """
conv 3 128 256 1
block 128 128 256 2
conv 128 128 128 1
block 128 128 128 2
conv 128 128 64 1
block 128 256 64 1
block 256 256 64 1
conv 256 256 32 1
block 256 256 32 2
conv 256 256 16 1
block 256 512 16 1
block 512 512 16 1
attention 512 512 16 2
block 512 512 16 2
attention 512 512 16 1
norm 512 512 16 1
conv 512 256 16 1

conv 256 512 16 1
block 512 512 16 2
attention 512 512 16 1
block 512 512 16 3
attention 512 512 16 3
conv 512 512 32 1
block 512 256 32 1
block 256 256 32 2
conv 256 256 64 1
block 256 256 64 3
conv 256 256 128 1
block 256 128 128 1
block 128 128 128 2
conv 128 128 256 1
block 128 128 256 3
norm 128 128 256 1
conv 128 3 256 1
"""
F8 = """
conv 3 128 256 1
block 128 128 256 2
conv 128 128 128 1
block 128 {0} 128 1
block {0} {0} 128 1
conv {0} {0} 64 1
block {0} 256 64 1
block 256 256 64 1
conv 256 256 32 1
block 256 512 32 1
block 512 512 32 1
attention 512 512 32 2
block 512 512 32 2
attention 512 512 32 1
norm 512 512 32 1
conv 512 256 32 1

conv 256 512 32 1
block 512 512 32 2
attention 512 512 32 1
block 512 512 32 3
attention 512 512 32 3
conv 512 512 64 1
block 512 256 64 1
block 256 256 64 2
conv 256 256 128 1
block 256 {0} 128 1
block {0} {0} 128 2
conv {0} {0} 256 1
block {0} 128 256 1
block 128 128 256 2
norm 128 128 256 1
conv 128 3 256 1
"""
ORIGINALS = {  # their layers, our options, and the quantizer's name, size and dimension
    "taming-transformers f16": (F16, {}, "vq", 16384, 256),
    "taming-transformers gumbel-f8": (F8.format(128), {"multipliers": [1, 1, 2, 4]}, "gumbel", 8192, 256),
    "LlamaGen VQ-16": (F16, {}, "vq", 16384, 8),
    "LlamaGen VQ-8": (F8.format(256), {"multipliers": [1, 2, 2, 4]}, "vq", 16384, 8),
}
PUBLISHED = {"LlamaGen VQ-16": "72M", "LlamaGen VQ-8": "70M"}  # its README, codebook included


def cost_of_conv(inside: int, out: int, side: int, kernel: int = 3) -> tuple[int, int]:
    return out * (inside * kernel**2 + 1), 2 * side**2 * out * inside * kernel**2


def cost(kind: str, inside: int, out: int, side: int) -> tuple[int, int]:
    """Parameters and FLOPs (two per multiplication) of an original's layer; only convolutions and products count."""
    norms = {"conv": 0, "norm": 2 * inside, "block": 2 * inside + 2 * out, "attention": 2 * inside}[kind]
    convs = {
        "conv": [(inside, out, side)],
        "norm": [],
        "block": [(inside, out, side), (out, out, side)] + ([(inside, out, side, 1)] if inside != out else []),
        "attention": [(inside, inside, side, 1)] * 4,
    }[kind]
    parameters, flops = (sum(cost_of_conv(*conv)[i] for conv in convs) for i in range(2))
    products = 2 * 2 * inside * side**4 if kind == "attention" else 0
    return norms + parameters, flops + products


@pytest.mark.parametrize("name", ORIGINALS)
def test_parameters_and_flops_are_the_originals(name):
    layers, options, quantizer, codebook_size, code_dim = ORIGINALS[name]
    parameters, flops = codebook_size * code_dim, 0
    if quantizer == "gumbel":
        parameters += cost_of_conv(code_dim, codebook_size, 1, kernel=1)[0]
    side = 256 // 2 ** (len(options.get("multipliers", range(5))) - 1)
    for line in layers.split("\n"):
        if line:
            kind, *numbers, count = line.split()
            each = cost(kind, *map(int, numbers))
            parameters, flops = parameters + int(count) * each[0], flops + int(count) * each[1]
    for inside, out in ((256, code_dim), (code_dim, 256)):  # quant_conv and post_quant_conv
        each = cost_of_conv(inside, out, side, kernel=1)
        parameters, flops = parameters + each[0], flops + each[1]

    with torch.device("meta"):
        sizes = {"codebook_size": codebook_size, "code_dim": code_dim}
        model = build_tokenizer("vqgan", **options, quantizer={"name": quantizer, **sizes})
        with FlopCounterMode(display=False) as counted:
            x = torch.empty(1, 3, 256, 256)
            x_rec = model.decoder(model.from_code(model.to_code(model.encoder(x))))
    assert x_rec.shape == x.shape
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counted.get_total_flops() == flops
    if name in PUBLISHED:
        assert f"{parameters / 1e6:.0f}M" == PUBLISHED[name]
    (row,) = [line for line in (ROOT / "docs/tokenizers.md").read_text().splitlines() if line.startswith(f"| {name} |")]
    assert row.endswith(f" | {parameters / 1e6:.1f} M | {flops / 1e9:.0f} GFLOP |")


# Options


def attention_levels(part: torch.nn.Sequential) -> list[int]:
    """The widths at which a part has attention, in order."""
    return [module.out.weight.shape[0] for module in part if isinstance(module, Attention)]


@pytest.mark.parametrize(
    ("changes", "encoder", "decoder"),
    [
        ({}, [16, 16], [16, 16, 16]),
        ({"mid_attention": False}, [16], [16, 16]),
        ({"encoder_attention": [], "decoder_attention": [0]}, [16], [16, 8, 8]),
        ({"encoder_attention": [0, -3, 1]}, [8, 16, 16], [16, 16, 16]),  # 0 and -3 are the same resolution
        ({"encoder_attention": [], "decoder_attention": [], "mid_attention": False}, [], []),
    ],
    ids=str,
)
def test_attention_is_where_it_is_asked_for(changes, encoder, decoder):
    model = small(**changes)
    assert attention_levels(model.encoder) == encoder
    assert attention_levels(model.decoder) == decoder
    assert model(images())[0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("changes", "stride"),
    [
        ({}, 4),
        ({"multipliers": [1]}, 1),
        ({"multipliers": [2, 1, 1.5, 3]}, 8),  # widths 16, 8, 12, 24 after a first convolution of 8
        ({"encoder_blocks": 3, "decoder_blocks": 1, "latent_channels": 3}, 4),
        ({"width": 6, "norm_groups": 3, "channels": 1}, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
def test_shapes_follow_the_stride_and_images_need_not_be_square(changes, stride, size):
    model = small(**changes)
    x = images(2, *size)[:, : model.channels]
    x_rec, (q,) = model(x)
    assert x_rec.shape == x.shape
    assert q.codes.shape == (2, 1, size[0] // stride, size[1] // stride)
    assert model.code_layout(size) == CodeLayout((tuple(q.codes.shape[1:]),), (16,))
    assert model.last_layer.shape == (model.channels, model.decoder[-3].num_channels, 3, 3)


def test_attention_is_the_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer, x = Attention(8, 4), torch.randn(2, 8, 3, 5)
    q, k, v = (part(layer.norm(x)).flatten(2) for part in (layer.query, layer.key, layer.value))  # (B, C, N)
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 8**0.5, dim=2)
    expected = x + layer.out(torch.einsum("bnm,bcm->bcn", weights, v).view_as(x))
    torch.testing.assert_close(layer(x), expected)


REFUSED = {
    "no resolution": ({"multipliers": []}, "multipliers=[]: must be 1 to 16 numbers"),
    "nothing wide": ({"multipliers": [1, 0]}, "multipliers=[1, 0]: times width=8 must be from 1 to 65536, but are"),
    "too wide": ({"multipliers": [1, 1e9]}, "multipliers=[1, 1000000000.0]: times width=8 must be from 1 to 65536"),
    "groups that do not divide": (
        {"width": 12, "norm_groups": 8},
        "norm_groups=8: does not divide the width 12 (width=12 times the multipliers [1, 2, 2]); use a divisor",
    ),
    "groups that do not divide a later width": (
        {"multipliers": [1, 1.25]},
        "norm_groups=4: does not divide the width 10 (width=8 times the multipliers [1, 1.25]); use a divisor",
    ),
    "no group": ({"norm_groups": 0}, "norm_groups=0: must be at least 1"),
    "no block": ({"decoder_blocks": 0}, "decoder_blocks=0: must be at least 1"),
    "no latent channels": ({"latent_channels": 0}, "latent_channels=0: must be at least 1"),
    "attention at a resolution beyond the last": (
        {"encoder_attention": [3]},
        "encoder_attention=[3]: has no resolution 3; there are 3, from 0, the finest, to 2; -1 is the coarsest",
    ),
    "attention at a resolution before the first": ({"decoder_attention": [-4]}, "decoder_attention=[-4]: has no"),
    "light's option": ({"widths": [8, 8]}, "widths: vqgan has no such option; did you mean width?"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_options_are_named(options, message):
    with pytest.raises(InputError) as caught:
        build_tokenizer("vqgan", **{**SMALL, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# Behaviour


@torch.no_grad()
def test_decode_of_encode_is_the_reconstruction_bit_for_bit():
    model, x = small(), images()
    codes = model.encode(x)
    assert len(codes[0].unique()) > 3  # otherwise equality would prove little
    assert torch.equal(model.decode(codes), model(x)[0])


def test_saved_model_comes_back_bit_for_bit(tmp_path):
    model = small(decoder_attention=[0], multipliers=[1, 1.5])
    model.save_pretrained(tmp_path)
    back = VQModel.from_pretrained(tmp_path)
    assert type(back) is VQGAN
    assert torch.equal(back(images())[0], model(images())[0])


def test_gradient_reaches_every_parameter():
    model = small().train()
    x_rec, (q,) = model(images())
    ((x_rec - images()).square().mean() + q.loss).backward()
    for name, p in model.named_parameters():
        if not name.endswith("key.bias"):  # it adds the same to all scores of a query, which the softmax ignores
            assert p.grad.abs().sum() > 0, name


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    eager, x = small(multipliers=[1, 2], decoder_blocks=1, encoder_attention=[]).train(), images()
    compiled = copy.deepcopy(eager)
    (x_rec, q), (x_rec_c, q_c) = eager(x), torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(q[0].codes, q_c[0].codes)
    torch.testing.assert_close(x_rec, x_rec_c)
    (x_rec.square().mean() + q[0].loss).backward()
    (x_rec_c.square().mean() + q_c[0].loss).backward()
    for p, p_c in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, p_c.grad)


def test_channels_last_gives_the_same_and_stays():
    model = small()
    expected = model(images())[0]
    model, x = model.to(memory_format=torch.channels_last), images().contiguous(memory_format=torch.channels_last)
    x_rec = model(x)[0]
    torch.testing.assert_close(x_rec, expected)
    assert x_rec.is_contiguous(memory_format=torch.channels_last)


def test_bf16_autocast_is_near_and_its_gradient_finite():
    model = small().train()
    x = images()
    exact = model.to_code(model.encoder(x))
    with torch.autocast("cpu", torch.bfloat16):
        near = model.to_code(model.encoder(x))
        x_rec, (q,) = model(x)
        loss = x_rec.float().square().mean() + q.loss
    loss.backward()
    assert near.dtype == torch.bfloat16
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# Training by the program

TINY = ["model.name=vqgan", "model.width=8", "model.multipliers=[1,1,2]", "model.norm_groups=4"]
TINY += ["model.latent_channels=8", "model.encoder_blocks=1", "model.decoder_blocks=1", "data.image_size=16"]
TINY += ["train.max_steps=3", "train.batch_size=8", "train.eval_images=16", "tracking.wandb=disabled"]
VQGAN_LOSSES = ["loss.perceptual.name=alex", "loss.perceptual.start=0", "data.image_size=32", "discriminator.layers=1"]
VQGAN_LOSSES += ["loss.adversarial.name=hinge", "loss.adversarial.start=0", "discriminator.width=4"]


@pytest.mark.parametrize("losses", [[], VQGAN_LOSSES], ids=["plain", "perceptual and adversarial"])
def test_it_trains_and_goes_on_where_it_was_stopped(program, tmp_path, losses):
    arguments = ["stage1/train.py", *TINY, *losses, f"run_dir={tmp_path}", "train.checkpoint_every=1"]
    code, _, errors = program(*arguments)
    assert code == 0, errors
    whole = load_file(tmp_path / "model/model.safetensors")
    shutil.rmtree(tmp_path / "checkpoints/step_00000003")
    shutil.rmtree(tmp_path / "model")
    code, output, _ = program(*arguments)
    assert "going on from step 2" in output
    again = load_file(tmp_path / "model/model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert type(VQModel.from_pretrained(tmp_path)) is VQGAN
