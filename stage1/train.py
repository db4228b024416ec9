"""Stage 1: train the tokenizer, a VQ-VAE; with a discriminator it is a VQGAN.

accelerate launch stage1/train.py [CONFIG.yaml] [key=value ...]
"""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from vqgen.adversarial.augment import diff_augment
from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.adversarial.losses import (
    DiscriminatorWatch,
    LeCam,
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from vqgen.cli.program import run_program
from vqgen.cli.reflect import complete_options
from vqgen.cli.sections import STAGE1_SECTIONS as SECTIONS
from vqgen.data.images import ImageSet, load_images
from vqgen.data.order import image_batches, mixed_seed
from vqgen.data.stream import ImageStream
from vqgen.distributed import all_reduce_sum, rank, world_size
from vqgen.errors import require, section
from vqgen.evaluation.metrics import CodeUsage, image_psnr, psnr
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.priors.redraw import prior_of, redraw_codes
from vqgen.quantizers import LEARNING
from vqgen.settings import Stage1Config
from vqgen.tokenizers import build_tokenizer
from vqgen.tokenizers.latents import draw_replacements, draw_transform, smallest_latent
from vqgen.tokenizers.vqmodel import VQModel, from_uint8, load_tokenizer, to_uint8
from vqgen.training.average import WeightEMA
from vqgen.training.launchers import compile_in_place, compiled_by, refuse_compiled
from vqgen.training.means import Stopwatch
from vqgen.training.muon import Muon, muon_groups
from vqgen.training.origin import merged
from vqgen.training.run import Now, Run, attempts
from vqgen.training.schedule import lr_at, num_parameters, parameter_groups, ramp_at, set_lr
from vqgen.training.state import TrainState
from vqgen.training.tracking import image_grid

REC_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}
DISC_BETAS = (0.5, 0.9)  # VQGAN's
# This is 100 times Adam's default. Real and generated images pull D's last bias equally hard in opposite directions, so
# its gradient is rounding noise. With Adam's default, this noise would cause full-size steps, which would differ with
# the number of processes.
DISC_EPS = 1e-6
R1_EVERY = 4  # steps between R1 penalties; each has 4 times the weight (StyleGAN2's lazy regularisation)


class Nets(NamedTuple):
    """The networks that are trained, and the networks that their losses need.

    Attributes:
        model: the tokenizer, wrapped by `Accelerator.prepare`.
        tokenizer: the same tokenizer without the wrapper.
        average: the average of the tokenizer's weights.
        optimizer: the tokenizer's optimizer.
        perceptual: the perceptual distance; None if the loss has none.
        disc: the discriminator D, wrapped by `Accelerator.prepare`; None for a VQ-VAE.
        bare_disc: the same D without the wrapper.
        disc_optimizer: D's optimizer.
        lecam: D's regularisation.
        prior: draws codes anew for the decoder to learn from; None if `redraw` is off.
    """

    model: nn.Module
    tokenizer: VQModel
    average: WeightEMA
    optimizer: Any
    perceptual: PerceptualDistance | None
    disc: nn.Module | None
    bare_disc: PatchDiscriminator | None
    disc_optimizer: Any
    lecam: LeCam | None
    prior: Any


def main(config: Stage1Config) -> None:
    lowered, to_lower = "the learning rate", f"optim.lr={config.optim.lr}"
    if config.loss.adversarial.name != "none":
        lowered += " and the adversarial weight"
        to_lower += f", loss.adversarial.weight={config.loss.adversarial.weight} or loss.adversarial.lr"
    for run in attempts(config, lowered=lowered, to_lower=to_lower):
        with run:
            train(config, run)


def tokenizer_pass(
    nets: Nets, x: Tensor, class_ids: Tensor, config: Stage1Config, run: Run, now: Now, stopwatch: Stopwatch
) -> tuple[dict[str, Tensor], list[Tensor], Tensor, Tensor]:
    """One pass of the tokenizer: its losses, their weighted sum, and the gradient; D judges, but does not learn here.

    Args:
        nets: the tokenizer, and the networks that its losses need.
        x: images (B, C, H, W) in [-1, 1].
        class_ids: their classes (B,), -1 for none; for the prior.
        config: names and weights of the losses.
        run: runs the backward pass, and says how far the adversarial weight is lowered.
        now: decides which losses have started.
        stopwatch: measures the perceptual network's time.

    Returns:
        The losses by name; the codes of each code map, (B, Q, *S); the images that the decoder was asked for, which are
        x unless equivariance transformed them; the reconstructions, detached.
    """
    perceptual, adversarial = config.loss.perceptual, config.loss.adversarial
    losses: dict[str, Tensor] = {}
    asked, changes = latent_changes(nets, x, class_ids, config, run, now)
    x_rec, q = nets.model(x, **changes)
    x = asked
    losses["quantizer_loss"] = sum(out.loss for out in q)
    # The image losses are differentiated with respect to x_rec alone, and the weighted sum of their gradients goes
    # through the tokenizer once. So the adaptive weight needs no second backward pass, and D's weights get no gradient.
    y = x_rec.detach().requires_grad_()
    losses["rec_loss"] = REC_LOSSES[config.loss.rec](y, x)
    (gradient,) = torch.autograd.grad(losses["rec_loss"], y)  # (B, C, H, W)
    loss = losses["rec_loss"] + losses["quantizer_loss"]
    if nets.perceptual is not None and now.share >= perceptual.start:
        with stopwatch.running(), run.accelerator.autocast():
            shown = (every_nth(images, perceptual.every, now) for images in (y, x))
            losses["perceptual_loss"] = nets.perceptual(*shown).mean()
            (perceptual_gradient,) = torch.autograd.grad(losses["perceptual_loss"], y)
        gradient = gradient + perceptual.weight * perceptual_gradient
        loss = loss + perceptual.weight * losses["perceptual_loss"]
    if nets.bare_disc is not None and (ramp := ramp_at(now.share, adversarial.start, adversarial.ramp)) > 0:
        shown = diff_augment(every_nth(y, adversarial.every, now), adversarial.augment)
        losses["adv_loss"] = generator_loss(adversarial.name, nets.bare_disc(shown))
        (adv_gradient,) = torch.autograd.grad(losses["adv_loss"], y)
        adv_weight = torch.full((), adversarial.weight * ramp * run.lowered, device=run.device)
        if adversarial.adaptive:
            adv_weight = adv_weight * adaptive_weight(gradient, adv_gradient, x_rec, nets.tokenizer.last_layer)
        gradient = gradient + adv_weight * adv_gradient
        loss = loss + adv_weight * losses["adv_loss"]
        losses["adv_weight"] = adv_weight
    run.accelerator.backward(losses["quantizer_loss"] + (x_rec * gradient).sum())
    losses |= {"loss": loss, "mse": F.mse_loss(y, x)}
    return losses, [out.codes for out in q], x, y.detach()


def every_nth(images: Tensor, n: int, now: Now) -> Tensor:
    """Every n-th of a pass's images (B, C, H, W), at least one; the first is another one at the next step.

    `draw_replacements` changes the first images of a pass, so a fixed choice would see those too often.
    """
    return images[now.step % min(n, len(images)) :: n]


def latent_changes(
    nets: Nets, x: Tensor, class_ids: Tensor, config: Stage1Config, run: Run, now: Now
) -> tuple[Tensor, dict[str, Any]]:
    """The images to ask the decoder for, given images x (B, C, H, W) of classes (B,); and the model's other arguments.

    All passes and processes of a step have the same transform, so that the step has one size of images. The first step
    has none, because the quantizer initialises its codebook from it, and small latents have few vectors.
    """
    if nets.prior is not None:
        with run.accelerator.autocast():
            return x, {"codes": redraw_codes(nets.prior, nets.tokenizer, x, class_ids, keep=config.redraw.keep)}
    changes: dict[str, Any] = {}
    if config.equivariance.share == config.perturb.images == 0:
        return x, changes
    shape = nets.tokenizer.code_layout(list(x.shape[2:])).shapes[0]  # (Q, H, W)
    random = np.random.default_rng(mixed_seed(config.seed, now.step, 0, 1))  # four numbers that no other draw has
    transform = draw_transform(config.equivariance, shape[1:], random) if now.step > 0 else None
    if transform is not None:
        changes["transform"], x = transform, transform(x, nets.tokenizer.stride)
        shape = nets.tokenizer.code_layout(list(x.shape[2:])).shapes[0]
    replacements = draw_replacements(config.perturb, len(x), shape, now.share, run.device)
    return x, changes if replacements is None else changes | {"replacements": replacements}


def discriminator_pass(
    nets: Nets, x: Tensor, x_rec: Tensor, config: Stage1Config, run: Run, now: Now
) -> dict[str, Tensor]:
    """One pass of D on images and their reconstructions, both (B, C, H, W): D's losses by name, and their gradient."""
    adversarial = config.loss.adversarial
    losses: dict[str, Tensor] = {}
    penalised = adversarial.r1 > 0 and now.step % R1_EVERY == 0
    x, x_rec = (every_nth(images, adversarial.every, now) for images in (x, x_rec))
    shown = diff_augment(torch.cat([x.requires_grad_(penalised), x_rec]), adversarial.augment)
    real, fake = nets.disc(shown).chunk(2)
    losses["disc_loss"] = loss = discriminator_loss(adversarial.name, real, fake)
    if adversarial.lecam > 0:
        losses["lecam_loss"] = nets.lecam(real, fake)
        loss = loss + adversarial.lecam * losses["lecam_loss"]
    if penalised:
        losses["r1_loss"] = r1_penalty(real, x)
        loss = loss + adversarial.r1 * R1_EVERY * losses["r1_loss"]
    run.accelerator.backward(loss)
    losses |= {"real_logits": real.mean(), "fake_logits": fake.mean()}
    losses["disc_accuracy"] = discriminator_accuracy(adversarial.name, real, fake)
    return losses


def train(config: Stage1Config, run: Run) -> None:
    adversarial = config.loss.adversarial
    run.find_origin("model", VQModel.from_pretrained)
    train_set, val_set = load_data(config, run)
    nets = build(config, run, train_set.class_names)
    run.open(train_set, val_set)
    usage = CodeUsage(nets.tokenizer.code_layout(config.data.image_size), run.device)
    model, optimizer, disc, disc_optimizer = run.prepare(nets.model, nets.optimizer, nets.disc, nets.disc_optimizer)
    nets = nets._replace(model=model.train(), optimizer=optimizer, disc=disc, disc_optimizer=disc_optimizer)
    state = TrainState(
        model=nets.tokenizer,
        ema=nets.average,
        optimizer=nets.optimizer,
        disc=nets.bare_disc,
        lecam=nets.lecam,
        disc_optimizer=nets.disc_optimizer,
        usage=usage,
    )
    held_out = val_set.fingerprint if config.data.val_source else None
    then = f"accelerate launch stage2/train.py stage1={quote(config.run_dir)}"
    if run.resume(state, then, data=train_set.fingerprint, held_out=held_out):
        return
    size = num_parameters(nets.tokenizer)
    run.start(
        f"{train_set.amount} training and {len(val_set)} held-out images, {size / 1e6:.2f} M parameters",
        size,
        by_pass="the codebook, which moves at each pass",
        stream_workers=max(1, config.data.workers) if isinstance(train_set, ImageStream) else None,
        faster_in_bf16=True,
    )
    batches = image_batches(train_set, run.place, data=config.data, device=run.device)
    stopwatch, watch = Stopwatch(run.device), DiscriminatorWatch()

    for now in run.steps():
        if now.evaluates:
            with run.paused():
                figures = evaluate(nets.average.model, val_set, config.train.eval_images, run.micro_batch, run.device)
                run.report(now, figures, reconstructions=reconstructions(nets.average.model, val_set, run.device))
        if now.saves:
            run.save(now, state, {"": nets.average})
        if now.ends:
            break

        lr = set_lr(nets.optimizer, run.lowered * lr_at(now.share, config.optim))
        disc_learns = nets.disc is not None and now.share >= adversarial.start - adversarial.lead
        for x, class_ids in run.passes(batches, nets.model, nets.disc):  # (B, C, H, W) in [-1, 1] and (B,)
            terms, codes, asked, x_rec = tokenizer_pass(nets, x, class_ids, config, run, now, stopwatch)
            if disc_learns:
                terms |= discriminator_pass(nets, asked, x_rec, config, run, now)
            run.add(terms)
            usage.update(codes)
        learning = {"grad_norm": (nets.model, nets.optimizer)}
        if disc_learns:
            set_lr(nets.disc_optimizer, run.lowered * disc_lr_at(now.share, config))
            learning["disc_grad_norm"] = (nets.disc, nets.disc_optimizer)
        run.update(**learning)
        nets.average.update(nets.tokenizer, now.step + 1)

        if now.logs:
            figures = run.means.compute() | {"lr": lr}
            figures |= {"psnr": psnr(torch.tensor(figures["mse"])), **usage.compute()}
            if nets.perceptual is not None:
                figures["perceptual_time"] = stopwatch.seconds() / run.seconds_of_window
            run.log(now, figures, shown=("loss", "psnr", "usage"))
            if watch.has_just_won(figures):
                run.say(
                    f"step {now.step + 1}: the discriminator has won: it tells {figures['disc_accuracy']:.1%} of the "
                    "patches apart, so the decoder learns little from it; lower loss.adversarial.lr, or raise "
                    "loss.adversarial.r1 or lecam"
                )
    run.close("the tokenizer", then)


def load_data(config: Stage1Config, run: Run) -> tuple[ImageSet | ImageStream, ImageSet]:
    """The training and the held-out images; completes the configuration with settings that follow from the images."""
    if run.origin is not None:
        own = complete_options(SECTIONS, "model", run.origin.model.options)
        run.origin.check("data", {"channels": config.data.channels or own["channels"]}, own)
        run.origin.check("model", config.model, own, free=LEARNING)
        config.model = merged(own, config.model)
    config.data.channels = config.data.channels or config.model.get("channels")
    with section("data"):
        train_set, val_set = load_images(config.data)
    run.show_data(train_set, val_set)
    config.data.channels = train_set.channels
    same = config.model.setdefault("channels", train_set.channels) == train_set.channels
    require(same, f"model.channels={config.model['channels']} and data.channels={train_set.channels} must be the same")
    config.model = complete_options(SECTIONS, "model", config.model)
    config.discriminator = complete_options(SECTIONS, "discriminator", config.discriminator)
    return train_set, val_set


def build(config: Stage1Config, run: Run, class_names: list[str]) -> Nets:
    """The networks on their device, their optimizers and the average, in their state before the first step."""
    device = run.device
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    torch.manual_seed(config.seed)
    with section("model", image_size="data.image_size"):
        tokenizer = build_tokenizer(**config.model)
        layout = tokenizer.code_layout(config.data.image_size)  # raises if the stride does not divide the size
    if run.origin is not None:
        run.origin.fill(tokenizer)
        run.origin.kept += [f"{' and '.join(config.freeze)} frozen"] if config.freeze else []
    tokenizer.freeze(config.freeze)
    prior = None
    if config.redraw.stage2 is not None:
        # A run that goes on loads its weights later, but its model/ has the same frozen parts.
        its = load_tokenizer(run.dir)[0] if run.origin is None else tokenizer
        with section("redraw"):
            prior = prior_of(Path(config.redraw.stage2), its, layout, class_names).to(device)
    if config.train.activation_checkpointing:
        with section("train"):
            tokenizer.checkpoint_activations()
    if config.perturb.images > 0:
        with section("perturb"):
            tokenizer.quantizer.check_nearest(config.perturb.nearest)
    if config.equivariance.share > 0:
        refuse_compiled(
            compiled_by(run.accelerator, config.train.compile), {"equivariance.share": config.equivariance.share}
        )
    perceptual = disc = lecam = disc_optimizer = None
    if config.loss.perceptual.name != "none":
        with section("loss.perceptual"), run.accelerator.local_main_process_first():  # which may have to fetch weights
            perceptual = PerceptualDistance(config.loss.perceptual.name, config.loss.perceptual.weights)
        perceptual = perceptual.to(device, memory_format=memory_format)
    if config.loss.adversarial.name != "none":
        disc, lecam, disc_optimizer = build_discriminator(config, run, tokenizer, memory_format)
    tokenizer = tokenizer.to(device, memory_format=memory_format)
    groups = parameter_groups(tokenizer, config.optim.weight_decay)
    adam = {"lr": config.optim.lr, "betas": (config.optim.beta1, config.optim.beta2), "fused": True}
    if config.optim.name == "muon":
        optimizer = Muon(muon_groups(groups, (tokenizer.last_layer, *tokenizer.quantizer.parameters())), **adam)
    else:
        optimizer = torch.optim.AdamW(groups, **adam)
    average = WeightEMA(tokenizer, config.train.ema)
    if config.train.compile:
        compile_in_place(tokenizer)
    return Nets(tokenizer, tokenizer, average, optimizer, perceptual, disc, disc, disc_optimizer, lecam, prior)


def build_discriminator(
    config: Stage1Config, run: Run, tokenizer: VQModel, memory_format: torch.memory_format
) -> tuple[PatchDiscriminator, LeCam, torch.optim.Optimizer]:
    """D on its device, its regularisation, and its optimizer, in their state before the first step."""
    adversarial = config.loss.adversarial
    fp16 = run.accelerator.mixed_precision == "fp16"
    require(not fp16, "train.mixed_precision=fp16 is too coarse for a discriminator's gradients; use bf16 or no")
    by = compiled_by(run.accelerator, config.train.compile)
    twice = ("adaptive",) if by == "train.compile=true" else ("r1", "adaptive")  # the setting leaves D alone
    refuse_compiled(by, {f"loss.adversarial.{name}": getattr(adversarial, name) for name in twice})
    with section("discriminator"):
        disc = PatchDiscriminator(config.data.channels, **config.discriminator)
        disc.check_size(config.data.image_size)
        if config.equivariance.share > 0:  # D sees the transformed images
            shape = tokenizer.code_layout(config.data.image_size).shapes[0][1:]
            smallest = [tokenizer.stride * side for side in smallest_latent(config.equivariance, shape)]
            disc.check_size(smallest, f", which equivariance.scale={config.equivariance.scale} makes")
    lecam = LeCam()
    if run.origin is not None and run.origin.fill_part("disc", disc, "discriminator"):
        lecam.load_state_dict(run.origin.state["lecam"])
    disc, lecam = disc.to(run.device, memory_format=memory_format), lecam.to(run.device)
    optimizer = torch.optim.AdamW(
        disc.parameters(), lr=adversarial.lr, betas=DISC_BETAS, eps=DISC_EPS, weight_decay=0.0, fused=True
    )
    return disc, lecam, optimizer


def disc_lr_at(share: float, config: Stage1Config) -> float:
    """D's learning rate after a share of the run: constant until the decoder sees D, then falling as the decoder's."""
    adversarial, falling = config.loss.adversarial, replace(config.optim, warmup=0.0)
    if share <= adversarial.start:
        return adversarial.lr
    return adversarial.lr * (lr_at(share, falling) / lr_at(adversarial.start, falling))


@torch.no_grad()
def evaluate(
    model: VQModel, images: ImageSet, num_images: int, batch_size: int, device: torch.device
) -> dict[str, float]:
    """PSNR and codebook usage on held-out images, divided among the processes.

    Returns:
        `psnr`, of the pooled squared error; `psnr_per_image`, the mean over the images, of pixels rounded to uint8; and
        the figures of CodeUsage.
    """
    chosen = np.linspace(0, len(images) - 1, min(len(images), num_images), dtype=int)[rank() :: world_size()]
    usage = CodeUsage(model.code_layout(images.image_size), device)
    sums = torch.zeros(3, device=device)  # of squared errors, of PSNR, and the number of images
    for start in range(0, len(chosen), batch_size):
        pixels = images.__getitems__(chosen[start : start + batch_size])[0].to(device)  # uint8 (B, C, H, W)
        x = from_uint8(pixels)
        x_rec, q = model(x)
        squared_errors = (x_rec.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
        per_image = image_psnr(to_uint8(x_rec), pixels)
        sums += torch.stack([squared_errors.sum(), per_image.sum(), torch.tensor(len(x), device=device)])
        usage.update([out.codes for out in q])
    mse, per_image, count = all_reduce_sum(sums)
    figures = {"psnr": psnr(mse / count), "psnr_per_image": per_image / count, **usage.compute()}
    return {name: figure.item() for name, figure in figures.items()}


@torch.no_grad()
def reconstructions(model: VQModel, images: ImageSet, device: torch.device) -> Image.Image:
    """A picture of held-out images, with each row's reconstructions below it."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), 16), dtype=int)
    x = images.__getitems__(chosen)[0]
    x_rec = to_uint8(model(from_uint8(x.to(device)))[0]).cpu()
    rows = [part for pair in zip(x.split(8), x_rec.split(8), strict=True) for part in pair]
    return image_grid(rearrange(torch.cat(rows), "n c h w -> n h w c").numpy(), columns=min(8, len(x)))


if __name__ == "__main__":
    run_program(
        main,
        Stage1Config,
        SECTIONS,
        "accelerate launch stage1/train.py [CONFIG.yaml] [key=value ...]",
    )
