"""Other projects' VQGAN checkpoints: read, renamed to ours and checked; and ours renamed for diffusers."""

import itertools
import typing
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqgen.errors import InputError, expanded, require, require_choice
from vqgen.quantizers.codebook import CodebookQuantizer
from vqgen.tokenizers.files import Weights, read_file, read_folder, unwrapped
from vqgen.tokenizers.vqgan import VQGAN, Attention, ResidualBlock
from vqgen.tokenizers.vqmodel import VQModel

BETA = 0.25  # in all three projects, unless the user of LlamaGen set another
TRAINED = 1000  # updates after which a codebook's running counts weigh new batches by its decay
# Beginnings of the names of weights that say nothing about codes or images.
UNUSED = ("loss.", "model_ema.", "quantize.codebook_used")


class Names(NamedTuple):
    """A project's names of the network's parts. Level i counts from the finest, k in the order of execution."""

    project: str
    down: str
    down_attention: str
    downsample: str
    up: str
    up_attention: str
    upsample: str
    middle: tuple[str, str, str]  # block, attention, block
    norm_out: str
    shortcut: str
    attention: tuple[str, str, str, str, str]  # norm, query, key, value, out


FAMILIES = {
    "taming": Names(
        project="taming-transformers",
        down="encoder.down.{i}.block.{j}",
        down_attention="encoder.down.{i}.attn.{j}",
        downsample="encoder.down.{i}.downsample.conv",
        up="decoder.up.{i}.block.{j}",
        up_attention="decoder.up.{i}.attn.{j}",
        upsample="decoder.up.{i}.upsample.conv",
        middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
        norm_out="norm_out",
        shortcut="nin_shortcut",
        attention=("norm", "q", "k", "v", "proj_out"),
    ),
    "llamagen": Names(
        project="LlamaGen",
        down="encoder.conv_blocks.{i}.res.{j}",
        down_attention="encoder.conv_blocks.{i}.attn.{j}",
        downsample="encoder.conv_blocks.{i}.downsample.conv",
        up="decoder.conv_blocks.{k}.res.{j}",
        up_attention="decoder.conv_blocks.{k}.attn.{j}",
        upsample="decoder.conv_blocks.{k}.upsample.conv",
        middle=("mid.0", "mid.1", "mid.2"),
        norm_out="norm_out",
        shortcut="nin_shortcut",
        attention=("norm", "q", "k", "v", "proj_out"),
    ),
    "diffusers": Names(
        project="diffusers",
        down="encoder.down_blocks.{i}.resnets.{j}",
        down_attention="encoder.down_blocks.{i}.attentions.{j}",
        downsample="encoder.down_blocks.{i}.downsamplers.0.conv",
        up="decoder.up_blocks.{k}.resnets.{j}",
        up_attention="decoder.up_blocks.{k}.attentions.{j}",
        upsample="decoder.up_blocks.{k}.upsamplers.0.conv",
        middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        norm_out="conv_norm_out",
        shortcut="conv_shortcut",
        attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    ),
}
CODEBOOK, EMA_COUNTS, EMA_SUMS = (f"quantize.embedding.{name}" for name in ("weight", "cluster_size", "embed_avg"))
GUMBEL = {"codebook": "quantize.embed.weight", "projection.weight": "quantize.proj.weight"}
GUMBEL["projection.bias"] = "quantize.proj.bias"


def from_checkpoint(path: str | Path, family: str) -> tuple[VQGAN, list[str]]:
    """The tokenizer of another project's checkpoint, in eval mode, and lines that say what was found and assumed.

    Args:
        path: the checkpoint: a file, or diffusers' folder.
        family: the project, a key of FAMILIES.

    Raises:
        InputError: there is no such project, or the checkpoint does not load, is another project's or no VQ model, or
            is what VQGAN cannot be.
    """
    require_choice("family", family, FAMILIES, "project")
    path = expanded(path)
    weights, settings, notes = read_folder(path) if family == "diffusers" else read_file(path)
    try:
        weights = unwrapped(weights, notes)
        _check_family(weights, family)
        return _tokenizer(weights, settings, family, notes), notes
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def to_diffusers(model: VQModel) -> tuple[dict[str, Any], Weights]:
    """The config.json and the weights of diffusers' VQModel that does the same as this tokenizer.

    Raises:
        InputError: diffusers' VQModel cannot do the same; the message says why.
    """
    require(isinstance(model, VQGAN), f"its architecture is {type(model).__name__}; diffusers has only that of vqgan")
    options = _options(model)
    quantizer = model.quantizer
    plain = isinstance(quantizer, CodebookQuantizer)
    require(plain, f"its quantizer is {type(quantizer).__name__}; diffusers has only a codebook, as of vq and ema")
    assert isinstance(quantizer, CodebookQuantizer)
    require(not quantizer.cosine, "its codes are looked up by cosine; diffusers' VQModel has only the Euclidean lookup")
    require(options["multipliers"][0] == 1, "its first multiplier is not 1; diffusers' VQModel has no other")
    more = options["decoder_blocks"] == options["encoder_blocks"] + 1
    require(more, "decoder_blocks is not encoder_blocks + 1, which diffusers' VQModel takes for granted")
    levels = len(options["multipliers"])
    attended = [{i % levels for i in options[f"{part}_attention"]} for part in ("encoder", "decoder")]
    down = [f"{'Attn' if i in attended[0] else ''}DownEncoderBlock2D" for i in range(levels)]
    up = [f"{'Attn' if i in attended[1] else ''}UpDecoderBlock2D" for i in reversed(range(levels))]
    config = {
        "_class_name": "VQModel",
        "in_channels": model.channels,
        "out_channels": model.channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [round(options["width"] * multiplier) for multiplier in options["multipliers"]],
        "layers_per_block": options["encoder_blocks"],
        "act_fn": "silu",
        "latent_channels": options["latent_channels"],
        "num_vq_embeddings": quantizer.codebook_size,
        "norm_num_groups": options["norm_groups"],
        "vq_embed_dim": quantizer.code_dim,
        "norm_type": "group",
        "mid_block_add_attention": options["mid_attention"],
    }
    state, weights = model.state_dict(), {CODEBOOK: quantizer.codebook.detach()}
    for ours, theirs in weight_names(model, "diffusers").items():
        linear = ".attentions." in theirs and state[ours].ndim == 4  # their attention has no 1x1 convolutions
        weights[theirs] = state[ours][:, :, 0, 0] if linear else state[ours]
    return config, {name: value.contiguous() for name, value in weights.items()}


def weight_names(model: VQGAN, family: str) -> dict[str, str]:
    """A project's name of each weight outside the quantizer, by our name."""
    names = FAMILIES[family]
    inner: dict[type, dict[str, str]] = {
        ResidualBlock: {"shortcut": names.shortcut},
        Attention: dict(zip(("norm", "query", "key", "value", "out"), names.attention, strict=True)),
    }
    ours = [(f"encoder.{i}", part) for i, part in model.encoder.named_children()]
    ours += [("to_code", model.to_code), ("from_code", model.from_code)]
    ours += [(f"decoder.{i}", part) for i, part in model.decoder.named_children()]
    trained = [(name, part) for name, part in ours if list(part.parameters())]
    renamed = {}
    for (name, part), theirs in zip(trained, _parts(names, _options(model)), strict=True):
        for weight, _ in part.named_parameters():
            *module, kind = weight.split(".")
            module = [inner[type(part)].get(module[0], module[0])] if module else []
            renamed[f"{name}.{weight}"] = ".".join([theirs, *module, kind])
    return renamed


def _options(model: VQGAN) -> Mapping[str, Any]:
    """The constructor's arguments, defaults included."""
    return typing.cast(Mapping[str, Any], model._hub_mixin_config)


def _parts(names: Names, options: Mapping[str, Any]) -> Iterator[str]:
    """A project's names of the parts with weights, in the order of execution, which is that of our Sequentials."""
    levels = len(options["multipliers"])
    block, attention, last = names.middle
    middle = [block, attention, last] if options["mid_attention"] else [block, last]

    def blocks(level: int, number: int, block: str, attention: str, attended: list[int]) -> Iterator[str]:
        for j in range(number):
            yield block.format(i=level, k=levels - 1 - level, j=j)
            if level in [i % levels for i in attended]:
                yield attention.format(i=level, k=levels - 1 - level, j=j)

    yield "encoder.conv_in"
    for i in range(levels):
        if i > 0:
            yield names.downsample.format(i=i - 1)
        yield from blocks(i, options["encoder_blocks"], names.down, names.down_attention, options["encoder_attention"])
    yield from (f"encoder.{part}" for part in (*middle, names.norm_out, "conv_out"))
    yield from ("quant_conv", "post_quant_conv")
    yield from (f"decoder.{part}" for part in ("conv_in", *middle))
    for i in reversed(range(levels)):
        yield from blocks(i, options["decoder_blocks"], names.up, names.up_attention, options["decoder_attention"])
        if i > 0:
            yield names.upsample.format(i=i, k=levels - 1 - i)
    yield from (f"decoder.{part}" for part in (names.norm_out, "conv_out"))


def _tokenizer(weights: Weights, settings: Mapping[str, Any], family: str, notes: list[str]) -> VQGAN:
    """The tokenizer with these weights; adds lines to the notes.

    Raises:
        InputError: a weight is missing, has another shape, or has no place in the network.
    """
    network = _network(weights, FAMILIES[family])
    notes.append(_described(network))
    groups = settings.get("norm_num_groups", 32)
    if "norm_num_groups" not in settings:
        notes.append(f"assumed: {groups} groups in each normalisation, and images in [-1, 1], as the project has them")
    else:
        notes.append("assumed: images in [-1, 1], as the project has them")
    quantizer, codes = _quantizer(weights, family, settings, notes)
    with torch.device("meta"):
        model = VQGAN(**network, norm_groups=groups, quantizer=quantizer)
    renamed = weight_names(model, family)
    ours = {name: _convolution(_weight(weights, theirs)) for name, theirs in renamed.items()}
    ours |= {f"quantizer.{name}": value for name, value in codes.items()}
    expected = model.state_dict()
    for name, value in ours.items():
        theirs = renamed.get(name, name)
        shapes = f"has the shape {list(value.shape)}, where the network has {list(expected[name].shape)}"
        remedy = "vqgan has the same widths and blocks in encoder and decoder"
        require(value.shape == expected[name].shape, f"{theirs} {shapes}; {remedy}")
        require(bool(value.isfinite().all()), f"{theirs} holds values that are not finite, so it is damaged")
    known = {*renamed.values(), CODEBOOK, EMA_COUNTS, EMA_SUMS, *GUMBEL.values()}
    further = [name for name in weights if name not in known and name != "quantize.used"]  # which has its own line
    unknown = next((name for name in further if not name.startswith(UNUSED)), None)
    require(unknown is None, f"the network of vqgan has no place for {unknown}")
    if further:
        groups_left = {name.partition(".")[0] + ".*" if "quantize" not in name else name for name in further}
        notes.append(f"left out: {', '.join(sorted(groups_left))} ({len(further)} of {len(weights)} weights)")
    halves = {str(value.dtype).removeprefix("torch.") for value in weights.values() if value.dtype.itemsize == 2}
    if halves:
        notes.append(f"converted: {', '.join(sorted(halves))} to float32")
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in ours.items()}, assign=True)
    return model.eval()


def _network(weights: Weights, names: Names) -> dict[str, Any]:
    """The options of VQGAN that the weights' names and shapes tell."""

    def number(name: Callable[[int], str]) -> int:
        return max(1, sum(1 for _ in takewhile(lambda n: f"{name(n)}.conv1.weight" in weights, itertools.count())))

    levels = number(lambda i: names.down.format(i=i, j=0))

    def attended(attention: str) -> list[int]:
        norms = [f"{attention.format(i=i, k=levels - 1 - i, j=0)}.{names.attention[0]}.weight" for i in range(levels)]
        return [i for i, norm in enumerate(norms) if norm in weights]

    width, channels = _weight(weights, "encoder.conv_in.weight", axes=4).shape[:2]
    firsts = [f"{names.down.format(i=i, j=0)}.conv1.weight" for i in range(levels)]
    multipliers = [len(_weight(weights, first, axes=4)) / width for first in firsts]
    return {
        "channels": channels,
        "width": width,
        "multipliers": [int(multiplier) if multiplier.is_integer() else multiplier for multiplier in multipliers],
        "encoder_blocks": number(lambda j: names.down.format(i=0, j=j)),
        "decoder_blocks": number(lambda j: names.up.format(i=levels - 1, k=0, j=j)),
        "encoder_attention": attended(names.down_attention),
        "decoder_attention": attended(names.up_attention),
        "mid_attention": f"encoder.{names.middle[1]}.{names.attention[0]}.weight" in weights,
        "latent_channels": len(_weight(weights, "encoder.conv_out.weight", axes=4)),
    }


def _described(network: Mapping[str, Any]) -> str:
    """One line that says what the weights' names and shapes told."""
    colour = {1: "grey", 3: "RGB"}.get(network["channels"], f"{network['channels']}-channel")
    stride = 2 ** (len(network["multipliers"]) - 1)
    widths = ", ".join(str(round(network["width"] * multiplier)) for multiplier in network["multipliers"])
    blocks = f"{network['encoder_blocks']} and {network['decoder_blocks']} blocks each in encoder and decoder"
    levels = " and ".join(str(network[f"{part}_attention"]) for part in ("encoder", "decoder"))
    middle = "with" if network["mid_attention"] else "without"
    attention = f"attention at levels {levels}, {middle} attention in the middle"
    return f"found: {colour} images, {stride} pixels a code; widths {widths}; {blocks}; {attention}"


def _quantizer(
    weights: Weights, family: str, settings: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, Any], Weights]:
    """Our quantizer's options and its state; adds lines to the notes.

    Raises:
        InputError: there is no codebook.
    """
    used = weights.get("quantize.used")
    if GUMBEL["projection.weight"] in weights:
        axes = {"codebook": 2, "projection.weight": 4, "projection.bias": 1}
        state = {ours: _weight(weights, theirs, axes[ours]) for ours, theirs in GUMBEL.items()}
        state["projection.weight"] = state["projection.weight"].flatten(1)  # a 1x1 convolution
        if used is not None:
            used = _weight(weights, "quantize.used", axes=1)
            known = ((used >= 0) & (used < min(map(len, state.values())))).all()
            require(bool(known), "quantize.used names codes that the codebook does not have")
            state = {name: value[used.long()] for name, value in state.items()}
            notes.append(f"kept: the {len(used):,} codes of quantize.used, numbered as there, as it draws no others")
        size, dim = state["codebook"].shape
        notes.append(f"found: the Gumbel quantizer with {size:,} codes of dimension {dim}")
        notes.append(
            "assumed: temperature and kl_weight at vqgen's defaults, which matter only if it is trained further"
        )
        return {"name": "gumbel", "codebook_size": size, "code_dim": dim}, state
    kind = "it is no VQ model, perhaps an AutoencoderKL, as of Stable Diffusion, whose latents are no codes"
    require(CODEBOOK in weights, f"has no codebook ({CODEBOOK}): {kind}")
    if used is not None:
        notes.append(
            f"left out: quantize.used, which renumbers {used.numel():,} codes; here all keep their own numbers"
        )
    size, dim = _weight(weights, CODEBOOK, axes=2).shape
    state = {"codebook": weights[CODEBOOK], "counts": torch.ones(size), "num_updates": torch.tensor(TRAINED)}
    name, legacy, how = "vq", family != "llamagen", "trained by gradient"
    if EMA_SUMS in weights:
        state |= {"counts": _weight(weights, EMA_COUNTS), "sums": weights[EMA_SUMS]}
        name, legacy, how = "ema", False, "of running means"
    cosine = family == "llamagen" and settings.get("codebook_l2_norm", True)
    lookup, beta = "cosine" if cosine else "euclidean", settings.get("commit_loss_beta", BETA)
    notes.append(f"found: a codebook of {size:,} codes of dimension {dim}, {how}")
    term = "codebook's term, as in the project's code (legacy_beta)" if legacy else "encoder's term"
    notes.append(f"assumed: {lookup} lookup; if trained further, beta={beta} on the {term}, and no revival of codes")
    options = {"name": name, "codebook_size": size, "code_dim": dim, "lookup": lookup, "commitment_weight": beta}
    return {**options, "legacy_beta": legacy, "revive_below": 0.0}, state


def _weight(weights: Weights, name: str, axes: int | None = None) -> Tensor:
    require(name in weights, f"has no {name}: it is incomplete or another network")
    value = weights[name]
    fits = axes in (None, value.ndim) and value.numel() > 0
    require(fits, f"{name} has the shape {list(value.shape)}, which is not that of VQGAN's")
    return value


def _convolution(weight: Tensor) -> Tensor:
    """A linear layer's weight as that of a 1x1 convolution, and any other as it is."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight


def _check_family(weights: Weights, family: str) -> None:
    """Raises InputError if the names are not this project's, and says whose they are."""
    first = {name: f"{names.down.format(i=0, j=0)}.norm1.weight" for name, names in FAMILIES.items()}
    looks = next((name for name, weight in first.items() if weight in weights), None)
    if looks is None and "to_code.weight" in weights:
        raise InputError("is a model of vqgen already; give its folder where a tokenizer is asked for")
    example = ", ".join(list(weights)[:1]) or "nothing"
    require(looks is not None, f"is no VQGAN: it has no {first[family]}, but {example}")
    require(
        looks == family,
        f"looks like a checkpoint of {FAMILIES[looks or family].project}, not of {FAMILIES[family].project}; "
        f"use --from {looks}",
    )
