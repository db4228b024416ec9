"""Stage 2: fit the prior, an autoregressive transformer over the tokenizer's codes.

accelerate launch stage2/train.py [CONFIG.yaml] [key=value ...]
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from vqgen.cli.program import run_program
from vqgen.cli.reflect import check_options
from vqgen.cli.runs import run_data
from vqgen.codes import sides
from vqgen.data.codes import TokenStore, encode_images
from vqgen.data.images import ImageSet, load_images
from vqgen.data.order import token_batches
from vqgen.data.stream import ImageStream, OrderedStream
from vqgen.errors import require, section
from vqgen.evaluation.likelihood import prior_nll, tokens_that_tell_apart, unigram_entropy
from vqgen.priors.objective import annealed, random_orders, with_random_tokens
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import ROWS, classes_in_turn, sample_images
from vqgen.settings import DataConfig, SampleConfig, Stage2Config
from vqgen.tokenizers.vqmodel import VQModel, load_tokenizer
from vqgen.training.average import WeightEMA
from vqgen.training.best import Best
from vqgen.training.launchers import compile_in_place
from vqgen.training.muon import Muon, muon_groups
from vqgen.training.origin import differing
from vqgen.training.run import Run, attempts
from vqgen.training.schedule import lr_at, num_parameters, parameter_groups, set_lr
from vqgen.training.state import TrainState
from vqgen.training.tracking import image_grid


class Nets(NamedTuple):
    """The prior and the objects that train it.

    Attributes:
        model: the prior, wrapped by `Accelerator.prepare`.
        prior: the same prior without the wrapper.
        average: the average of the prior's weights.
        optimizer: the prior's optimizer.
        ranges: (N, 2), the legal tokens at each position; see `CodeLayout.token_ranges`.
    """

    model: nn.Module
    prior: Prior
    average: WeightEMA
    optimizer: Any
    ranges: Tensor


def main(config: Stage2Config) -> None:
    for run in attempts(config, lowered="the learning rate", to_lower=f"optim.lr={config.optim.lr}", fsdp=True):
        with run:
            train(config, run)


def prior_pass(
    nets: Nets, tokens: Tensor, class_ids: Tensor, noise: Tensor, config: Stage2Config, share: float, run: Run
) -> dict[str, Tensor]:
    """One pass of the prior on tokens (B, N) of classes (B,), -1 for no class: its loss, and the loss' gradient.

    Uniform noise (B, ...) decides the orders, if they are random, with 1 + N numbers of each sequence, and which tokens
    of the context are random ones, with 1 + 2 N.
    """
    noise = noise.to(run.device, non_blocking=True)
    length, order = tokens.shape[1], None
    most = config.context_noise * max(0.0, 1 - share / 0.75)
    context = with_random_tokens(tokens, nets.ranges, most, noise[:, -1 - 2 * length :]) if most else tokens
    if config.random_orders is not None:
        order = random_orders(annealed(config.random_orders, share), noise[:, : 1 + length])
        context, tokens = context.gather(1, order), tokens.gather(1, order)
    losses = nets.model(
        context,
        class_ids,
        order,
        targets=tokens,
        smoothed=config.label_smoothing > 0,
        with_states=config.embedding_loss > 0,
    )
    losses, *states = losses if config.embedding_loss else (losses,)
    terms = {"loss": losses[0]}
    loss = losses[0]
    if config.label_smoothing:
        terms["uniform_loss"] = losses[1]
        loss = torch.lerp(loss, losses[1], config.label_smoothing)
    if config.embedding_loss:
        terms["embedding_loss"] = nets.prior.heads(*states, tokens)
        loss = loss + config.embedding_loss * terms["embedding_loss"]
    run.accelerator.backward(loss)
    return terms


def train(config: Stage2Config, run: Run) -> None:
    tokenizer, tokenizer_hash = load_tokenizer(Path(config.stage1))
    run.find_origin("model", Prior.from_pretrained)
    train_images, val_images = load_data(config, run, tokenizer)
    nets = build(config, run, tokenizer, tokenizer_hash, train_images.class_names)
    run.open()
    tokenizer.to(run.device)
    mirror, crops = config.data["flip"], config.data["crops"]
    train_codes = encode(train_images, tokenizer, tokenizer_hash, config, run, mirror=mirror, crops=crops)
    val_codes = encode(val_images, tokenizer, tokenizer_hash, config, run, mirror=False)
    held_out = val_images.fingerprint if config.data["val_source"] else None
    hashes = {"tokenizer": tokenizer_hash, "data": train_images.fingerprint, "held_out": held_out}
    for prior in (nets.prior, nets.average.model):
        prior.class_dropout = max(config.class_dropout, float((train_codes.class_ids < 0).mean()))
    del train_images, val_images  # frees memory: from here on only the codes are needed

    model, optimizer = run.prepare(nets.model, nets.optimizer)
    nets = nets._replace(model=model.train(), optimizer=optimizer)
    nets.average.shard_like(nets.prior)
    best = None if config.train.patience is None else Best(config.train.patience)
    state = TrainState(model=nets.prior, ema=nets.average, optimizer=nets.optimizer, best=best)
    then = f"python stage2/sample.py {quote(config.run_dir)}"
    if run.resume(state, then, **hashes):
        return
    layout, unigram = nets.prior.layout, unigram_entropy(train_codes, nets.prior.layout)
    size, each = num_parameters(nets.prior), f" ({crops} crops of each image, one in an epoch)" if crops > 1 else ""
    enough = tokens_that_tell_apart(len(train_codes), layout)
    run.start(
        f"{len(train_codes)} training{each} and {len(val_codes)} held-out sequences of {layout.num_tokens} tokens "
        f"({enough} can tell them apart, and long training learns the others by heart), "
        f"{len(nets.prior.class_names)} classes, {size / 1e6:.2f} M parameters",
        size,
    )
    batches = token_batches(train_codes, run.place, class_dropout=config.class_dropout, device=run.device)
    for_order = 0 if config.random_orders is None else 1 + layout.num_tokens
    noise = run.place.uniforms(for_order + (1 + 2 * layout.num_tokens if config.context_noise else 0))
    dims_per_token = tokenizer.channels * math.prod(sides(config.data["image_size"])) / layout.num_tokens

    for now in run.steps():
        if now.evaluates:
            with run.paused(), nets.average.whole() as prior:
                nll = prior_nll(prior, val_codes, config.train.eval_images, run.micro_batch, run.device)
                figures = {
                    "nll": nll,  # nats per token
                    "unigram_entropy": unigram,  # nats per token of a prior that knows only the codes' frequencies
                    "code_bits_per_dim": nll / math.log(2) / dims_per_token,
                }
                picture = samples(prior, tokenizer, config.seed, run.device) if run.is_main else None
                run.report(now, figures, samples=picture)
                if best is not None:
                    best.offer(nll, now.step, figures, prior)
        if best is not None and best.is_over:
            now = run.end(now, f"train.patience={best.patience}: {best.patience} evaluations had no lower held-out NLL")
        if now.saves:
            if best is not None and now.share >= 1:
                nets.average.load_state_dict(best.weights)
                run.keep(best.step, best.figures)
            run.save(now, state, {"prior": nets.average, "tokenizer": tokenizer})
        if now.ends:
            break

        lr = set_lr(nets.optimizer, run.lowered * lr_at(now.share, config.optim))
        for tokens, class_ids in run.passes(batches, nets.model):  # (B, N) and (B,)
            run.add(prior_pass(nets, tokens, class_ids, next(noise), config, now.share, run))
        run.update(grad_norm=(nets.model, nets.optimizer))
        nets.average.update(nets.prior, now.step + 1)

        if now.logs:
            run.log(now, run.means.compute() | {"lr": lr}, shown=("loss",))
    run.close("the prior and its tokenizer", then)


def load_data(config: Stage2Config, run: Run, tokenizer: VQModel) -> tuple[ImageSet | OrderedStream, ImageSet]:
    """The training and the held-out images; each data setting that is not given is taken from the tokenizer's run."""
    data, _, taken = run_data(Path(config.stage1), config.data, tokenizer.channels)
    if taken:
        run.accelerator.print(taken)
    config.data = asdict(data)
    with section("data"):
        train_images, val_images = load_images(data)
    run.show_data(train_images, val_images)
    return OrderedStream(train_images) if isinstance(train_images, ImageStream) else train_images, val_images


def build(config: Stage2Config, run: Run, tokenizer: VQModel, tokenizer_hash: str, class_names: list[str]) -> Nets:
    """The prior on its device, its optimizer and the average, in their state before the first step."""
    with section("data"):
        layout = replace(tokenizer.code_layout(config.data["image_size"]), order=config.order)
    torch.manual_seed(config.seed)
    if run.origin is not None:
        its, dropout = run.origin.model, [option for option in config.model if "drop" in option]
        differ = differing("codes", asdict(layout), asdict(its.layout))
        codes = [f"{key}={there}, here {here}" for key, here, there in differ]
        other = f"is for codes of another tokenizer, size or order: {'; '.join(codes)}; train from scratch"
        require(not codes, f"init_from={config.init_from}: {other}")
        same = (config.random_orders is None) == (its.places is None)
        orders = f"its random_orders is {its.random_orders}, here {config.random_orders}".replace("None", "null")
        remedy = "both must be null, or both numbers; or train from scratch"
        require(same, f"init_from={config.init_from}: {orders}; {remedy}")
        run.origin.check("model", config.model, its.all_options, free=dropout)
        config.model = its.options | config.model
    config.model = check_options(Prior, config.model, "model")
    with section("model"):
        prior = Prior(layout, class_names, **config.model)
    if config.random_orders is not None:
        prior.add_places(config.random_orders)
    if config.train.activation_checkpointing:
        with section("train"):
            prior.checkpoint_activations()
    if run.origin is not None:
        first = layout.vocab_size + 1  # the token of the first class
        run.origin.fill_by_class(prior, prior.token_tables, [(i, i) for i in range(first)], first, class_names)
        if run.origin.state.get("tokenizer", tokenizer_hash) != tokenizer_hash:
            run.origin.fresh.append("the tokenizer, whose codes may mean something else")
    if config.embedding_loss:
        single = layout.shapes[0][0] == len(layout.shapes) == 1
        require(single, "embedding_loss: needs one code at each position, whose vector is known; use 0")
        require(not run.accelerator.is_fsdp2, "embedding_loss: FSDP would divide its heads; use 0")
        codes = torch.arange(layout.vocab_size)[None, None]  # (1, Q, V)
        with torch.no_grad():
            prior.add_heads(tokenizer.quantizer.decode_codes(codes)[0].T)
    prior.to(run.device)
    groups = parameter_groups(prior, config.optim.weight_decay)
    adam = {"lr": config.optim.lr, "betas": (config.optim.beta1, config.optim.beta2), "fused": True}
    if config.optim.name == "muon":
        remedy = "FSDP shards the matrices that Muon needs whole; use optim.name=adamw"
        require(not run.accelerator.is_fsdp2, f"optim.name=muon: {remedy}")
        optimizer = Muon(muon_groups(groups, prior.tables_and_scales), **adam)
    else:
        optimizer = torch.optim.AdamW(groups, **adam)
    average = WeightEMA(prior, config.train.ema)
    if config.train.compile:
        require(not run.accelerator.is_fsdp2, "train.compile=true: FSDP gathers the weights layer by layer; use false")
        compile_in_place(prior)
    return Nets(prior, prior, average, optimizer, layout.token_ranges().to(run.device))


def encode(
    images: ImageSet | OrderedStream,
    tokenizer: VQModel,
    tokenizer_hash: str,
    config: Stage2Config,
    run: Run,
    *,
    mirror: bool,
    crops: int = 1,
) -> TokenStore:
    """The images as tokens, which are encoded once and serve all epochs and later runs."""
    return encode_images(
        images,
        tokenizer,
        Path(config.codes_dir or Path(config.stage1) / "codes"),
        tokenizer_hash=tokenizer_hash,
        mirror=mirror,
        accelerator=run.accelerator,
        skipped=run.dir / "skipped.txt",
        order=config.order,
        crops=crops,
    )


def samples(model: Prior, tokenizer: VQModel, seed: int, device: torch.device) -> Image.Image:
    """A picture of samples at the default settings that cycles through the classes."""
    columns = len(model.class_names) if 0 < len(model.class_names) <= 16 else 8
    class_ids = classes_in_turn(8 * columns, range(len(model.class_names))).to(device)
    settings = SampleConfig()
    options = {"cfg_scale": 1.0 if model.class_dropout == 0 else settings.cfg_scale, "top_p": settings.top_p}
    parts = class_ids.split(ROWS)  # as all at a time could take more memory than a training step
    drawn = (sample_images(model, tokenizer, p, seed=seed, first=i * ROWS, **options) for i, p in enumerate(parts))
    images = torch.cat(list(drawn))
    return image_grid(rearrange(images.cpu(), "n c h w -> n h w c").numpy(), columns)


if __name__ == "__main__":
    run_program(
        main,
        Stage2Config,
        {"model": Prior, "data": DataConfig},
        "accelerate launch stage2/train.py [CONFIG.yaml] [key=value ...]",
    )
