"""Other projects' checkpoints become tokenizers that do the same, and ours become diffusers'."""

import argparse
import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqgen.errors import InputError
from vqgen.tokenizers import VQGAN, Light, VQModel
from vqgen.tokenizers.interop import from_checkpoint, to_diffusers

diffusers = pytest.importorskip("diffusers")

State = dict[str, Tensor]


def images(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


# The originals in plain torch, straight from their weights' names. `down`, `up` and so on are the parts of the names.

LAYOUTS: dict[str, dict[str, str]] = {
    "taming": {
        "block": "down.{i}.block.{j}",
        "attention": "down.{i}.attn.{j}",
        "downsample": "down.{i}.downsample.conv",
        "up_block": "up.{i}.block.{j}",
        "up_attention": "up.{i}.attn.{j}",
        "upsample": "up.{i}.upsample.conv",
        "middle": "mid.block_1 mid.attn_1 mid.block_2",
    },
    "llamagen": {
        "block": "conv_blocks.{i}.res.{j}",
        "attention": "conv_blocks.{i}.attn.{j}",
        "downsample": "conv_blocks.{i}.downsample.conv",
        "up_block": "conv_blocks.{i}.res.{j}",
        "up_attention": "conv_blocks.{i}.attn.{j}",
        "upsample": "conv_blocks.{i}.upsample.conv",
        "middle": "mid.0 mid.1 mid.2",
    },
}


def conv(s: State, name: str, x: Tensor, **options) -> Tensor:
    weight = s[f"{name}.weight"]
    return F.conv2d(x, weight, s[f"{name}.bias"], **{"padding": weight.shape[2] // 2, **options})


def norm(s: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def block(s: State, name: str, x: Tensor) -> Tensor:
    h = conv(s, f"{name}.conv1", swish(norm(s, f"{name}.norm1", x)))
    h = conv(s, f"{name}.conv2", swish(norm(s, f"{name}.norm2", h)))
    return h + (conv(s, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in s else x)


def attention(s: State, name: str, x: Tensor) -> Tensor:
    h = norm(s, f"{name}.norm", x)
    q, k, v = (conv(s, f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, N)
    weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)  # (B, query, key)
    return x + conv(s, f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))


def level(s: State, part: str, i: int, block_name: str, attention_name: str, h: Tensor) -> Tensor:
    """The blocks at one resolution, each with its attention if it has one."""
    j = 0
    while f"{part}.{block_name.format(i=i, j=j)}.norm1.weight" in s:
        h = block(s, f"{part}.{block_name.format(i=i, j=j)}", h)
        if f"{part}.{attention_name.format(i=i, j=j)}.norm.weight" in s:
            h = attention(s, f"{part}.{attention_name.format(i=i, j=j)}", h)
        j += 1
    return h


def middle(s: State, part: str, names: str, h: Tensor) -> Tensor:
    first, attended, last = (f"{part}.{name}" for name in names.split())
    h = block(s, first, h)
    h = attention(s, attended, h) if f"{attended}.norm.weight" in s else h
    return block(s, last, h)


def reference_encode(s: State, family: str, x: Tensor) -> Tensor:
    names, i, h = LAYOUTS[family], 0, conv(s, "encoder.conv_in", x)
    while f"encoder.{names['block'].format(i=i, j=0)}.norm1.weight" in s:
        h = level(s, "encoder", i, names["block"], names["attention"], h)
        downsample = f"encoder.{names['downsample'].format(i=i)}"
        if f"{downsample}.weight" in s:
            h = conv(s, downsample, F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        i += 1
    h = middle(s, "encoder", names["middle"], h)
    return conv(s, "quant_conv", conv(s, "encoder.conv_out", swish(norm(s, "encoder.norm_out", h))))


def reference_decode(s: State, family: str, z_q: Tensor) -> Tensor:
    names, h = LAYOUTS[family], conv(s, "decoder.conv_in", conv(s, "post_quant_conv", z_q))
    h = middle(s, "decoder", names["middle"], h)
    levels = [i for i in range(9) if f"decoder.{names['up_block'].format(i=i, j=0)}.norm1.weight" in s]
    for i in reversed(levels) if family == "taming" else levels:  # taming counts from the finest
        h = level(s, "decoder", i, names["up_block"], names["up_attention"], h)
        upsample = f"decoder.{names['upsample'].format(i=i)}"
        if f"{upsample}.weight" in s:
            h = conv(s, upsample, h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    return conv(s, "decoder.conv_out", swish(norm(s, "decoder.norm_out", h)))


def reference_codes(s: State, z: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """The codes (B, H, W) and vectors (B, D, H, W) of z (B, D, H, W)."""
    if "quantize.proj.weight" in s:
        indices, codebook = conv(s, "quantize.proj", z).argmax(dim=1), s["quantize.embed.weight"]
        if "quantize.used" in s:
            indices = conv(s, "quantize.proj", z)[:, s["quantize.used"]].argmax(dim=1)
            codebook = codebook[s["quantize.used"]]
    else:
        codebook, z = s["quantize.embedding.weight"], z.movedim(1, -1)
        if cosine:
            codebook, z = (x / x.norm(dim=-1, keepdim=True) for x in (codebook, z))
        indices = (z[..., None, :] - codebook).square().sum(dim=-1).argmin(dim=-1)
    return indices, codebook[indices].movedim(-1, 1)


# Files in their names, of random weights


def random_state(
    family: str, widths=(32, 64, 64), stem=32, channels=3, blocks=1, attended=(1,), mid=True, dim=4
) -> State:
    """The weights of a small network in a project's names, with 24 codes."""
    names, draw, s = LAYOUTS[family], torch.Generator().manual_seed(1), {}

    def add_conv(name: str, inside: int, out: int, kernel: int = 3) -> None:
        scale = 1.0 / (inside * kernel**2) ** 0.5
        s[f"{name}.weight"] = torch.randn(out, inside, kernel, kernel, generator=draw) * scale
        s[f"{name}.bias"] = torch.randn(out, generator=draw) * 0.1

    def add_norm(name: str, width: int) -> None:
        s[f"{name}.weight"] = 1 + torch.randn(width, generator=draw) * 0.3
        s[f"{name}.bias"] = torch.randn(width, generator=draw) * 0.3

    def add_block(name: str, inside: int, out: int) -> None:
        add_norm(f"{name}.norm1", inside)
        add_conv(f"{name}.conv1", inside, out)
        add_norm(f"{name}.norm2", out)
        add_conv(f"{name}.conv2", out, out)
        if inside != out:
            add_conv(f"{name}.nin_shortcut", inside, out, 1)

    def add_attention(name: str, width: int) -> None:
        add_norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add_conv(f"{name}.{part}", width, width, 1)

    def add_middle(part: str, width: int) -> None:
        first, attention, last = (f"{part}.{name}" for name in names["middle"].split())
        add_block(first, width, width)
        if mid:
            add_attention(attention, width)
        add_block(last, width, width)

    add_conv("encoder.conv_in", channels, stem)
    width = stem
    for i, out in enumerate(widths):
        for j in range(blocks):
            add_block(f"encoder.{names['block'].format(i=i, j=j)}", width, out)
            width = out
            if i in attended:
                add_attention(f"encoder.{names['attention'].format(i=i, j=j)}", width)
        if i < len(widths) - 1:
            add_conv(f"encoder.{names['downsample'].format(i=i)}", width, width)
    add_middle("encoder", width)
    add_norm("encoder.norm_out", width)
    add_conv("encoder.conv_out", width, 6)
    add_conv("quant_conv", 6, dim, 1)
    add_conv("post_quant_conv", dim, 6, 1)
    add_conv("decoder.conv_in", 6, width)
    add_middle("decoder", width)
    for i in reversed(range(len(widths))):
        n = i if family == "taming" else len(widths) - 1 - i
        for j in range(blocks + 1):
            add_block(f"decoder.{names['up_block'].format(i=n, j=j)}", width, widths[i])
            width = widths[i]
            if i in attended:
                add_attention(f"decoder.{names['up_attention'].format(i=n, j=j)}", width)
        if i > 0:
            add_conv(f"decoder.{names['upsample'].format(i=n)}", width, width)
    add_norm("decoder.norm_out", width)
    add_conv("decoder.conv_out", width, channels)
    s["quantize.embedding.weight"] = torch.randn(24, dim, generator=draw)
    return s


def plain(s: State) -> State:
    return s


def with_ema(s: State) -> State:
    counts = torch.arange(1.0, 25.0)
    sums = s["quantize.embedding.weight"] * counts[:, None]
    return s | {"quantize.embedding.cluster_size": counts, "quantize.embedding.embed_avg": sums}


def with_gumbel(s: State) -> State:
    s = dict(s)
    s["quantize.embed.weight"] = s.pop("quantize.embedding.weight")
    draw = torch.Generator().manual_seed(2)
    s["quantize.proj.weight"] = torch.randn(24, 4, 1, 1, generator=draw)
    return s | {"quantize.proj.bias": torch.randn(24, generator=draw)}


def with_gumbel_and_remap(s: State) -> State:
    return with_gumbel(s) | {"quantize.used": torch.tensor([3, 1, 20, 7, 8, 15])}


def with_usage(s: State) -> State:
    return s | {"quantize.codebook_used": torch.zeros(65536)}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


CASES: dict[str, tuple[str, dict, Callable[[State], State], str]] = {
    "taming": ("taming", {}, plain, "vq"),
    "taming, two blocks": ("taming", {"widths": (64, 32), "blocks": 2, "attended": (0, 1)}, plain, "vq"),
    "taming, no attention at all": ("taming", {"attended": (), "mid": False}, plain, "vq"),
    "taming, one resolution, grey": ("taming", {"widths": (32,), "attended": (0,), "channels": 1}, plain, "vq"),
    "taming, running means": ("taming", {}, with_ema, "ema"),
    "taming, Gumbel": ("taming", {}, with_gumbel, "gumbel"),
    "taming, Gumbel of some codes": ("taming", {}, with_gumbel_and_remap, "gumbel"),
    "LlamaGen": ("llamagen", {"attended": (2,)}, with_usage, "vq"),
    "LlamaGen, f8": ("llamagen", {"widths": (32, 64, 64, 32), "attended": (3,), "dim": 8}, with_usage, "vq"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "options", "variant", "quantizer"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_a_converted_file_does_the_same_as_the_original(tmp_path, family, options, variant, quantizer):
    s = variant(random_state(family, **options))
    container = {"state_dict": s, "epoch": 3} if family == "taming" else {"model": s, "steps": 3}
    model, notes = from_checkpoint(saved(tmp_path / "x.ckpt", container), family)
    x = images(model.channels)
    z = reference_encode(s, family, x)
    indices, z_q = reference_codes(s, z, cosine=family == "llamagen")
    assert len(indices.unique()) >= 3  # otherwise equality would prove little
    assert torch.equal(model.encode(x)[0][:, 0], indices)
    torch.testing.assert_close(model.quantizer.decode_codes(indices[:, None]), z_q, atol=1e-6, rtol=1e-6)
    x_rec = reference_decode(s, family, z_q)
    assert x_rec.std() > 0.1
    torch.testing.assert_close(model.decode([indices[:, None]]), x_rec, atol=5e-5, rtol=5e-5)
    exact = {name: value.double() for name, value in s.items()}  # without single precision's rounding
    double = copy.deepcopy(model).double()
    z = reference_encode(exact, family, x.double())
    torch.testing.assert_close(double.to_code(double.encoder(x.double())), z, atol=1e-9, rtol=1e-9)
    x_rec = reference_decode(exact, family, z_q.double())
    torch.testing.assert_close(double.decoder(double.from_code(z_q.double())), x_rec, atol=1e-9, rtol=1e-9)
    saved_as = model._hub_mixin_config["quantizer"]["name"]
    assert saved_as == quantizer
    assert all("\n" not in note for note in notes)


def test_what_was_found_taken_and_assumed_is_said(tmp_path):
    s = with_usage(random_state("llamagen")) | {"quantize.used": torch.arange(5)}
    container = {"model": {}, "ema": s, "optimizer": {}, "args": argparse.Namespace(commit_loss_beta=0.5)}
    model, notes = from_checkpoint(saved(tmp_path / "x.pt", container), "llamagen")
    assert notes == [
        "taken: ema; left out: args, model, optimizer",
        "found: RGB images, 4 pixels a code; widths 32, 64, 64; 1 and 2 blocks each in encoder and decoder; "
        "attention at levels [1] and [1], with attention in the middle",
        "assumed: 32 groups in each normalisation, and images in [-1, 1], as the project has them",
        "left out: quantize.used, which renumbers 5 codes; here all keep their own numbers",
        "found: a codebook of 24 codes of dimension 4, trained by gradient",
        "assumed: cosine lookup; if trained further, beta=0.5 on the encoder's term, and no revival of codes",
        f"left out: quantize.codebook_used (1 of {len(s)} weights)",
    ]
    assert (model.quantizer.commitment_weight, model.quantizer.codebook_weight) == (0.5, 1.0)
    lookup = {"model": s, "args": argparse.Namespace(codebook_l2_norm=False)}
    model, notes = from_checkpoint(saved(tmp_path / "x.pt", lookup), "llamagen")
    assert not model.quantizer.cosine
    assert any("assumed: euclidean lookup" in note for note in notes)


def test_tamings_beta_stays_on_the_codebooks_term_and_that_is_said(tmp_path):
    model, notes = from_checkpoint(saved(tmp_path / "x.ckpt", random_state("taming")), "taming")
    assert (model.quantizer.commitment_weight, model.quantizer.codebook_weight) == (1.0, 0.25)
    assert any("beta=0.25 on the codebook's term, as in the project's code (legacy_beta)" in note for note in notes)


def test_running_means_go_on_from_where_they_were(tmp_path):
    s = with_ema(random_state("taming"))
    model, _ = from_checkpoint(saved(tmp_path / "x.ckpt", s), "taming")
    quantizer = model.train().quantizer
    z = torch.randn(2, 4, 5, 5)
    codes = quantizer(z).codes
    count = 0.99 * s["quantize.embedding.cluster_size"] + 0.01 * codes.flatten().bincount(minlength=24)
    total = torch.zeros(24, 4).index_add_(0, codes.flatten(), z.movedim(1, -1).reshape(-1, 4))
    total = 0.99 * s["quantize.embedding.embed_avg"] + 0.01 * total
    smoothed = (count + 1e-5) / (count.sum() + 24e-5) * count.sum()
    torch.testing.assert_close(quantizer.codebook, total / smoothed[:, None])


def test_a_converted_codebook_is_not_initialised_anew_nor_are_its_codes_moved(tmp_path):
    s = random_state("taming")
    model, _ = from_checkpoint(saved(tmp_path / "x.ckpt", s), "taming")
    for _ in range(300):
        model.train().quantizer(torch.zeros(1, 4, 2))  # all but one code are never used
    assert torch.equal(model.quantizer.codebook, s["quantize.embedding.weight"])


CONTAINERS = {
    "a bare state_dict": lambda s: s,
    "Lightning's, with the losses' weights": lambda s: {"state_dict": s | {"loss.logvar": torch.zeros(1)}, "epoch": 1},
    "of DDP": lambda s: {f"module.{name}": value for name, value in s.items()},
    "of DDP and torch.compile": lambda s: {f"_orig_mod.module.{name}": value for name, value in s.items()},
    "of a whole generator": lambda s: {
        "state_dict": {f"first_stage_model.{name}": value for name, value in s.items()}
        | {"transformer.head.weight": torch.zeros(2)}
    },
    "in half precision": lambda s: {name: value.half() for name, value in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_are_unpacked(tmp_path, container):
    s = random_state("taming")
    content = CONTAINERS[container](s)
    model, notes = from_checkpoint(saved(tmp_path / "x.ckpt", content), "taming")
    z = reference_encode(s, "taming", images())
    near = 1e-5 if "half" not in container else 0.05
    torch.testing.assert_close(model.to_code(model.encoder(images())), z, atol=near, rtol=near)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    said = {"Lightning's": "left out: loss.* (1 of", "of a whole": "left out: transformer.*, which lie beside",
            "in half": "converted: float16 to float32"}  # fmt: skip
    for beginning, line in said.items():
        assert any(line in note for note in notes) == container.startswith(beginning)
    if container == "a bare state_dict":
        save_file(s, tmp_path / "x.safetensors")
        again, _ = from_checkpoint(str(tmp_path / "x.safetensors"), "taming")
        assert torch.equal(again(images())[0], model(images())[0])


# diffusers

DIFFUSERS = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
    "block_out_channels": [16, 24, 32],
    "layers_per_block": 2,
    "latent_channels": 6,
    "num_vq_embeddings": 20,
    "norm_num_groups": 8,
    "vq_embed_dim": 4,
}
PLAIN = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
PLAIN |= {"norm_num_groups": 4}
CONFIGS = {
    "attention at different resolutions": {},
    "no attention at all": {**PLAIN, "block_out_channels": [16, 16], "mid_block_add_attention": False},
    "one resolution, dimension of the latents": {
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [16],
        "norm_num_groups": 4,
        "vq_embed_dim": None,
        "layers_per_block": 1,
    },
    "grey": {**PLAIN, "block_out_channels": [8, 16], "in_channels": 1, "out_channels": 1},
}


def their_model(**options) -> torch.nn.Module:
    """A random model of diffusers whose codes differ between and within images."""
    torch.manual_seed(0)
    model = diffusers.VQModel(**{**DIFFUSERS, **options}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0))
        vectors = model.encode(images(model.config.in_channels)).latents.movedim(1, -1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(vectors[:: len(vectors) // 20][:20])
    return model


def assert_same(theirs: torch.nn.Module, ours: VQModel) -> None:
    """Compares codes, reconstructions and decoded images."""
    x = images(ours.channels)
    with torch.no_grad():
        z = theirs.encode(x).latents
        indices = theirs.quantize(z)[2][2].view(len(z), *z.shape[2:])
        assert len(indices.unique()) > 3
        assert torch.equal(ours.encode(x)[0][:, 0], indices)
        torch.testing.assert_close(ours(x)[0], theirs(x).sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode([indices[:, None]]), theirs.decode(z).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_diffusers_model_does_the_same_here_and_back_there(tmp_path, program, options):
    theirs = their_model(**options)
    theirs.save_pretrained(tmp_path / "theirs")
    code, _, errors = program("stage1/convert.py", tmp_path / "theirs", tmp_path / "ours", "--from", "diffusers")
    assert code == 0, errors
    ours = VQModel.from_pretrained(tmp_path / "ours")
    assert type(ours) is VQGAN
    assert_same(theirs, ours)
    code, _, errors = program("stage1/convert.py", tmp_path / "ours", tmp_path / "back", "--to", "diffusers")
    assert code == 0, errors
    back = diffusers.VQModel.from_pretrained(tmp_path / "back")
    assert_same(back.eval(), ours)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert {key: back.config[key] for key in DIFFUSERS} == {
        key: (theirs.config.latent_channels if value is None else value)
        for key, value in {**DIFFUSERS, **options}.items() if key in DIFFUSERS
    }  # fmt: skip


def test_diffusers_old_files_and_names(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = theirs.state_dict()
    for name in list(state):
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                state[name.replace(new, before)] = state.pop(name)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {key: config[key] for key in (*DIFFUSERS, "_class_name")}  # the first files had no other keys
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert_same(theirs, from_checkpoint(tmp_path, "diffusers")[0])


def test_a_codebook_of_running_means_is_diffusers_too(tmp_path):
    torch.manual_seed(0)
    model = ours(quantizer={"name": "ema", "codebook_size": 12, "code_dim": 3}).eval()
    with torch.no_grad():
        vectors = model.to_code(model.encoder(images())).movedim(1, -1).flatten(0, 2)
    model.quantizer.codebook.copy_(vectors[::4][:12])
    config, weights = to_diffusers(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert_same(diffusers.VQModel.from_pretrained(tmp_path).eval(), model)


NOT_DIFFUSERS = {
    "another architecture": (lambda: Light(), "its architecture is Light; diffusers has only that of vqgan"),
    "cosine lookup": (lambda: ours(quantizer={"name": "vq", "lookup": "cosine"}), "looked up by cosine"),
    "no codebook": (lambda: ours(quantizer={"name": "fsq"}), "its quantizer is FSQ; diffusers has only a codebook"),
    "several codebooks": (lambda: ours(quantizer={"name": "residual"}), "its quantizer is ResidualQuantizer"),
    "blocks": (lambda: ours(decoder_blocks=2), "decoder_blocks is not encoder_blocks + 1"),
    "a first multiplier": (lambda: ours(multipliers=[2, 1]), "its first multiplier is not 1"),
}


def ours(**options) -> VQGAN:
    return VQGAN(**{"width": 8, "multipliers": [1, 2], "norm_groups": 4, "latent_channels": 4, **options})


@pytest.mark.parametrize(("model", "message"), NOT_DIFFUSERS.values(), ids=NOT_DIFFUSERS)
def test_what_diffusers_cannot_do_is_not_converted(tmp_path, program, model, message):
    model().save_pretrained(tmp_path / "ours")
    refused(program, tmp_path / "ours", "--to", "diffusers", message=message)
    refused(program, tmp_path / "ours", "--to", "diffusers", message=f"error: {tmp_path}/ours: ")


# The program


def refused(program, checkpoint: Path, *arguments: str, message: str) -> None:
    """Checks that the program refuses a checkpoint in one line and leaves nothing behind."""
    out = checkpoint.parent / "new" / "out"
    code, output, errors = program("stage1/convert.py", checkpoint, out, *arguments)
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert not out.parent.exists()


def without(s: State, name: str) -> State:
    assert name in s
    return {n: value for n, value in s.items() if n != name}


def doubled(s: State, name: str) -> State:
    return s | {name: torch.cat([s[name]] * 2)}


BAD_STATES = {
    "of LlamaGen": (
        lambda: random_state("llamagen"),
        "looks like a checkpoint of LlamaGen, not of taming-transformers; use --from llamagen",
    ),
    "of diffusers": (lambda: their_model().state_dict(), "looks like a checkpoint of diffusers, not of taming"),
    "of vqgen": (lambda: ours().state_dict(), "is a model of vqgen already"),
    "of something else": (
        lambda: {"blocks.0.weight": torch.zeros(3)},
        "is no VQGAN: it has no encoder.down.0.block.0.norm1.weight, but blocks.0.weight",
    ),
    "of an AutoencoderKL": (
        lambda: without(doubled(random_state("taming"), "quant_conv.weight"), "quantize.embedding.weight"),
        "has no codebook (quantize.embedding.weight): it is no VQ model, perhaps an AutoencoderKL",
    ),
    "without a weight": (
        lambda: without(random_state("taming"), "decoder.up.1.upsample.conv.bias"),
        "has no decoder.up.1.upsample.conv.bias: it is incomplete or another network",
    ),
    "without a decoder": (
        lambda: {name: value for name, value in random_state("taming").items() if "decoder" not in name},
        "has no decoder.conv_in.weight: it is incomplete or another network",
    ),
    "with other widths in the decoder": (
        lambda: doubled(random_state("taming"), "decoder.up.0.block.1.conv2.weight"),
        "decoder.up.0.block.1.conv2.weight has the shape [64, 32, 3, 3], where the network has [32, 32, 3, 3]",
    ),
    "with another dimension of the codes": (
        lambda: random_state("taming") | {"quantize.embedding.weight": torch.zeros(24, 5)},
        "quant_conv.weight has the shape [4, 6, 1, 1], where the network has [5, 6, 1, 1]",
    ),
    "with a codebook that is none": (
        lambda: random_state("taming") | {"quantize.embedding.weight": torch.zeros(24)},
        "quantize.embedding.weight has the shape [24], which is not that of VQGAN's",
    ),
    "with more in a block": (
        lambda: random_state("taming") | {"encoder.down.0.block.0.temb_proj.weight": torch.zeros(3)},
        "the network of vqgan has no place for encoder.down.0.block.0.temb_proj.weight",
    ),
    "with remapped codes that are not there": (
        lambda: with_gumbel_and_remap(random_state("taming")) | {"quantize.used": torch.tensor([3, 24])},
        "quantize.used names codes that the codebook does not have",
    ),
    "with a value that is not finite": (
        lambda: random_state("taming") | {"quant_conv.bias": torch.tensor([0, 0, torch.nan, 0])},
        "quant_conv.bias holds values that are not finite, so it is damaged",
    ),
    "with a projection that is none": (
        lambda: with_gumbel(random_state("taming")) | {"quantize.proj.weight": torch.zeros(24)},
        "quantize.proj.weight has the shape [24], which is not that of VQGAN's",
    ),
    "with nothing in a weight": (
        lambda: random_state("taming") | {"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)},
        "encoder.conv_in.weight has the shape [0, 3, 3, 3], which is not that of VQGAN's",
    ),
    "of many channels": (lambda: random_state("taming", channels=7), "channels=7: must be 1 or 3"),
    "of widths that 32 does not divide": (
        lambda: random_state("taming", widths=(48,), attended=()),
        "norm_groups=32: does not divide the width 48",
    ),
    "empty": (lambda: {}, "holds no weights by name; give a saved state_dict"),
    "a list": (lambda: [1, 2], "holds no weights by name, but a list"),
    "settings": (lambda: {"lr": 3}, "holds no weights by name; give a saved state_dict"),
}  # fmt: skip


@pytest.mark.parametrize(("state", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_checkpoint_that_is_not_what_was_said_is_refused_with_the_reason(tmp_path, program, state, message):
    refused(program, saved(tmp_path / "x.ckpt", state()), "--from", "taming", message=message)


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_truncated_file_is_refused(tmp_path, program, name, size):
    path = tmp_path / name
    if name.endswith("ckpt"):
        torch.save(random_state("taming"), path)
    else:
        save_file(random_state("taming"), path)
    path.write_bytes(path.read_bytes()[:size])
    refused(program, path, "--from", "taming", message="x." + name[2:] + " does not load: it is damaged, or no file of")


def test_objects_that_could_run_code_are_not_loaded_and_the_remedy_works(tmp_path, program, monkeypatch):
    module = types.ModuleType("lightning_like")
    exec("class ModelCheckpoint: pass", module.__dict__)
    module.ModelCheckpoint.__module__ = "lightning_like"
    monkeypatch.setitem(sys.modules, "lightning_like", module)
    s = random_state("taming")
    path = saved(tmp_path / "x.ckpt", {"state_dict": s, "callbacks": {module.ModelCheckpoint: {"best": 1}}})
    message = "x.ckpt also holds lightning_like.ModelCheckpoint, which could run code and is not loaded; if you trust"
    refused(program, path, "--from", "taming", message=message)
    with pytest.raises(InputError) as caught:
        from_checkpoint(path, "taming")
    remedy = str(caught.value).partition('python -c "')[2].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(remedy)
    assert torch.equal(
        from_checkpoint(tmp_path / "weights.pt", "taming")[0].decoder[0].weight, s["decoder.conv_in.weight"]
    )


BAD_FOLDERS = {
    "an AutoencoderKL": ({"_class_name": "AutoencoderKL"}, "is diffusers' AutoencoderKL, not its VQModel"),
    "a spatial norm": ({"norm_type": "spatial"}, "norm_type=spatial: its decoder's normalisations depend on codes"),
    "another activation": ({"act_fn": "gelu"}, "has act_fn=gelu; vqgan has only silu"),
    "groups that do not divide": ({"norm_num_groups": 5}, "norm_groups=5: does not divide the width 16"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_another_model_of_diffusers_is_refused_with_the_reason(tmp_path, program, changes, message):
    folder = tmp_path / "theirs"
    their_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(program, folder, "--from", "diffusers", message=message)


def test_paths_of_the_wrong_kind_are_refused(tmp_path, program):
    folder, file = tmp_path / "theirs", saved(tmp_path / "x.ckpt", random_state("taming"))
    their_model().save_pretrained(folder)
    refused(program, folder, "--from", "taming", message="is a folder, not a file; use --from diffusers")
    refused(program, file, "--from", "diffusers", message="is a file, but diffusers' models are folders")
    refused(program, tmp_path / "none", "--from", "taming", message="none: no such file")
    refused(program, tmp_path / "none", "--from", "diffusers", message="none: no such folder")
    refused(program, tmp_path / "none", "--to", "diffusers", message="none is not a tokenizer: it has no config.json")
    (tmp_path / "pipeline").mkdir()
    their_model().save_pretrained(tmp_path / "pipeline/vqvae")
    refused(program, tmp_path / "pipeline", "--from", "diffusers", message=f"give the part {tmp_path}/pipeline/vqvae")
    refused(program, tmp_path / "pipeline", "--from", "taming", message="give the file of weights in it")
    (folder / "config.json").write_text("[")
    refused(program, folder, "--from", "diffusers", message="config.json is not diffusers'")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refused(program, folder, "--from", "diffusers", message="has neither diffusion_pytorch_model.safetensors nor")


def test_the_output_must_be_new_or_empty(tmp_path, program):
    file = saved(tmp_path / "x.ckpt", random_state("taming"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    before = file.read_bytes()
    for out, message in (("full", "exists already; name a new folder"), ("x.ckpt", "exists already; name a new folder"),
                         ("x.ckpt/out", "cannot be written (")):  # fmt: skip
        code, _, errors = program("stage1/convert.py", file, tmp_path / out, "--from", "taming")
        assert (code, len(errors.splitlines())) == (2, 1)
        assert message in errors
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert file.read_bytes() == before
    (tmp_path / "empty").mkdir()
    code, _, errors = program("stage1/convert.py", file, tmp_path / "empty", "--from", "taming")
    assert code == 0, errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "x.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python stage1/convert.py CHECKPOINT OUT --from"),
        (["x"], "usage: python stage1/convert.py CHECKPOINT OUT --from"),
        (["x", "y", "z", "--from", "taming"], "usage: python stage1/convert.py CHECKPOINT OUT --from"),
        (["x", "y"], "give one of --from and --to; usage: python"),
        (["x", "y", "--from", "taming", "--to", "diffusers"], "give one of --from and --to; usage: python"),
        (["x", "y", "--from"], "--from has no value; write --from VALUE"),
        (["x", "y", "--from", "lama"], "from=lama: no such project; there is taming, llamagen, diffusers"),
        (["x", "y", "--to", "taming"], "to=taming: no such project; there is diffusers"),
        (["x", "y", "--form", "taming"], "form: no such key; did you mean from?"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line_are_one_line(program, arguments, message):
    code, output, errors = program("stage1/convert.py", *arguments)
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith(f"error: {message}")


def test_from_python_an_unknown_project_is_one_line_too(tmp_path):
    with pytest.raises(InputError, match=r"^family=lama: no such project; there is taming, llamagen, diffusers$"):
        from_checkpoint(tmp_path / "x.ckpt", "lama")


def test_help_shows_the_flags_as_they_are_written(program):
    code, output, _ = program("stage1/convert.py", "--help")
    assert code == 0
    assert "\n  from=null  (str | null)\n" in output


def test_a_converted_tokenizer_goes_straight_into_evaluation_stage_2_and_sampling(program, tmp_path):
    s = random_state("taming", widths=(32, 32, 32), channels=1)
    path = saved(tmp_path / "x.ckpt", {"state_dict": s})
    out = tmp_path / "ours"
    code, said, errors = program("stage1/convert.py", path, out, "--from", "taming")
    assert code == 0, errors
    assert said.splitlines()[-3].startswith(f"{out}: a tokenizer of 0.")
    assert f"stage1={out}" in said.splitlines()[-1]
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (out / "README.md").read_text()
    assert "converted from x.ckpt of taming-transformers" in card
    assert all(f"- {line}" in card for line in said.splitlines()[:-3])
    model = VQModel.from_pretrained(out)
    assert torch.equal(load_file(out / "model.safetensors")["decoder.0.weight"], s["decoder.conv_in.weight"])
    assert model.code_layout(32).num_tokens == 64

    data = ["data.source=digits", "data.image_size=32", "data.max_images=200", "tracking.wandb=disabled"]
    code, _, errors = program("stage1/evaluate.py", out, *data, "num_images=20", "perceptual=none")
    assert code == 0, errors
    assert (out / "evaluation/evaluation.json").is_file()
    few = ["train.max_steps=2", "train.batch_size=8", "train.eval_images=8", "model.hidden_size=16"]
    few += ["model.num_hidden_layers=1", "model.num_attention_heads=2"]
    code, _, errors = program("stage2/train.py", f"stage1={out}", f"run_dir={tmp_path}/2", *data, *few)
    assert code == 0, errors
    code, _, errors = program("stage2/sample.py", tmp_path / "2", "num_images=2", f"out={tmp_path}/samples")
    assert code == 0, errors
