"""Stage 1: train the tokenizer, a VQ-VAE, and with a discriminator a VQGAN.

accelerate launch stage1/train.py [CONFIG.yaml] [key=value ...]
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from einops import rearrange
from PIL import Image

from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.adversarial.losses import (
    WON_ACCURACY,
    LeCam,
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from vqgen.cli.program import run_program
from vqgen.cli.reflect import check_options
from vqgen.data.images import ImageSet, load_images
from vqgen.data.order import coin_flips, endless_batches, seed_step
from vqgen.data.skipped import count_skipped
from vqgen.distributed import all_reduce_sum, rank, world_size
from vqgen.errors import require
from vqgen.evaluation.metrics import CodeUsage, psnr
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.quantizers import BASES, QUANTIZERS, quantizer_options
from vqgen.settings import Stage1Config
from vqgen.tokenizers.vqmodel import VQModel, from_uint8, to_uint8
from vqgen.training.average import WeightEMA
from vqgen.training.checkpoints import how_resumed, load_checkpoint, open_run, save_checkpoint, written_whole
from vqgen.training.fsdp import refuse_fsdp
from vqgen.training.guard import Diverged, FiniteGuard, going_back
from vqgen.training.launchers import refuse_compiled_r1, refuse_other_engines
from vqgen.training.means import Means, Stopwatch, accumulate
from vqgen.training.schedule import Budget, lr_at, micro_batch_size, parameter_groups, ramp_at
from vqgen.training.stop import Stop
from vqgen.training.tracking import Tracker, image_grid

REC_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}
DISC_BETAS = (0.5, 0.9)  # VQGAN's
# A hundred times Adam's own: real and generated pull the last bias equally far, and what is left of its gradient,
# which is rounding alone, would move it by whole steps, another way on another number of processes.
DISC_EPS = 1e-6
R1_EVERY = 4  # steps, with so many times the weight (StyleGAN2's lazy regularisation)


def main(config: Stage1Config) -> None:
    lowered, to_lower = "the learning rate", f"optim.lr={config.optim.lr}"
    if config.loss.adversarial.name != "none":
        lowered += " and the adversarial weight"
        to_lower += f", loss.adversarial.weight={config.loss.adversarial.weight} or loss.adversarial.lr"
    going_back(train, config, lowered, to_lower)


def train(config: Stage1Config, rollbacks: int, stop: Stop) -> None:
    adv = config.loss.adversarial
    budget = Budget(config.train.max_steps, config.train.max_seconds)
    refuse_fsdp()
    refuse_other_engines()
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.accumulation,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # the quantizer keeps its own equal
    )
    refuse_compiled_r1(accelerator, adv.r1 if adv.name != "none" else 0)
    device, accumulation = accelerator.device, accelerator.gradient_accumulation_steps
    micro_batch = micro_batch_size(config.train.batch_size, accumulation)

    # The data say how many channels there are, and all defaults are written out, so that config.yaml is whole.
    config.model["quantizer"] = quantizer_options(**config.model.get("quantizer", {}))
    config.data.channels = config.data.channels or config.model.get("channels")
    train_set, val_set = load_images(config.data)
    config.data.channels = train_set.channels
    same = config.model.setdefault("channels", train_set.channels) == train_set.channels
    require(same, f"model.channels={config.model['channels']} and data.channels={train_set.channels} must be the same")
    config.model = check_options(VQModel, config.model, "model")
    config.discriminator = check_options(PatchDiscriminator, config.discriminator, "discriminator")
    torch.manual_seed(config.seed)
    model = VQModel(**config.model)
    model.code_layout(config.data.image_size)  # raises where the size does not suit the stride
    perceptual = disc = lecam = disc_optimizer = None
    if config.loss.perceptual.name != "none":
        perceptual = PerceptualDistance(
            config.loss.perceptual.name,
            config.loss.perceptual.weights,
            "loss.perceptual.name",
            "loss.perceptual.weights",
        )
    if adv.name != "none":
        fp16 = accelerator.mixed_precision == "fp16"
        require(not fp16, "train.mixed_precision=fp16 is too coarse for a discriminator's gradients; use bf16 or no")
        disc, lecam = PatchDiscriminator(config.data.channels, **config.discriminator), LeCam()
        disc.check_size(config.data.image_size)
    if accelerator.is_main_process:
        open_run(config)
    accelerator.wait_for_everyone()
    for images in (train_set, val_set):
        images.report_skipped(Path(config.run_dir) / "skipped.txt")

    betas = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim.weight_decay), lr=config.optim.lr, betas=betas, fused=True
    )
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = model.to(device, memory_format=memory_format)
    ema = WeightEMA(model, config.train.ema)
    if perceptual is not None:
        perceptual = perceptual.to(device, memory_format=memory_format)
    if disc is not None:
        disc, lecam = disc.to(device, memory_format=memory_format), lecam.to(device)
        disc_optimizer = torch.optim.AdamW(
            disc.parameters(), lr=adv.lr, betas=DISC_BETAS, eps=DISC_EPS, weight_decay=0.0, fused=True
        )
    step = evaluated = logged = 0
    run_dir = Path(config.run_dir)
    if state := load_checkpoint(run_dir):
        same = state["data"] == train_set.fingerprint
        require(same, f"{run_dir} was trained with other data than are there now; name another run_dir=")
        step, evaluated, logged, budget.spent = (state[key] for key in ("step", "evaluated", "logged", "seconds"))
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        rollbacks = max(rollbacks, state["rollbacks"])
        if disc is not None:
            disc.load_state_dict(state["disc"])
            lecam.load_state_dict(state["lecam"])
            disc_optimizer.load_state_dict(state["disc_optimizer"])
        if budget.share(step, device) >= 1:
            accelerator.print(f"{run_dir} is finished, at step {step}; name another run_dir= for another run")
            accelerator.end_training()
            return
    bare_model, bare_disc = model, disc
    model, optimizer = accelerator.prepare(model, optimizer)
    if disc is not None:
        disc, disc_optimizer = accelerator.prepare(disc, disc_optimizer)
    if state and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    model.train()

    workers = 0 if train_set.in_memory else config.data.workers
    taken = step * accumulation
    batches = endless_batches(train_set, micro_batch, first=taken, seed=config.seed, workers=workers, device=device)
    num_parameters = sum(p.numel() for p in bare_model.parameters())
    tracker = Tracker(
        run_dir, config, logged=logged, is_main=accelerator.is_main_process, facts={"num_parameters": num_parameters}
    )
    tracker.say(
        f"{run_dir}: {len(train_set)} training and {len(val_set)} held-out images, "
        f"{num_parameters / 1e6:.2f} M parameters, {world_size()} x {device.type}"
        + how_resumed(state, accumulation, by_pass="the codebook, which moves at each pass")
    )
    usage = CodeUsage(bare_model.quantizer.num_codebooks, bare_model.quantizer.codebook_size, device)
    guard = FiniteGuard(config.train.max_bad_steps, rollbacks, tracker.say, device, stop)
    means, stopwatch, has_won = Means(), Stopwatch(device), False
    if state:
        means.load_state_dict(state["means"], device)
        usage.load_state_dict(state["usage"])
    del state  # as large as all of the above
    saved, window_step, window_start = step, step, budget.seconds
    stop.training = True
    budget.start()

    while True:
        share = budget.share(step, device)
        last, stopping = share >= 1, stop.due
        save_due = last or stopping or step % config.train.checkpoint_every == 0
        if save_due:
            with tracker.closed_on(Diverged):
                guard.finish()
        if step > evaluated and (last or (step % config.train.eval_every == 0 and not stopping)):
            evaluated = step
            with budget.paused():
                figures = evaluate(ema.model, val_set, config.train.eval_images, micro_batch, device)
                tracker.log(step, figures)
                tracker.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
                tracker.picture(step, "reconstructions", reconstructions(ema.model, val_set, device))
        healthy = guard.in_a_row == 0  # a checkpoint is what one can go back to
        if step > saved and save_due and (healthy or last):
            with budget.paused():
                state = {
                    "step": step,
                    "evaluated": evaluated,
                    "seconds": budget.seconds,
                    "processes": world_size(),
                    "accumulation": accumulation,
                    "data": train_set.fingerprint,
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
                    "model": bare_model.state_dict(),
                    "ema": ema.model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rollbacks": rollbacks,
                    "means": means.state_dict(),
                    "usage": usage.state_dict(),
                }
                if disc is not None:
                    state["disc"], state["lecam"] = bare_disc.state_dict(), lecam.state_dict()
                    state["disc_optimizer"] = disc_optimizer.state_dict()
                if accelerator.is_main_process:
                    with written_whole(run_dir / "model") as folder:
                        ema.model.save_pretrained(folder)
                    state["logged"] = tracker.flush()
                    save_checkpoint(run_dir, step, state, config.train.keep_checkpoints, config.train.milestone_every)
            saved = step
        if last or stopping:
            break

        lowered = 0.5**rollbacks
        lr = lowered * lr_at(share, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        adv_ramp = ramp_at(share, adv.start, adv.ramp) if disc is not None else 0.0
        disc_learns = disc is not None and share >= adv.start - adv.lead
        if disc_learns:
            disc_lr = lowered * adv.lr
            if share > adv.start:
                falling = replace(config.optim, warmup=0.0)
                disc_lr *= lr_at(share, falling) / lr_at(adv.start, falling)
            for group in disc_optimizer.param_groups:
                group["lr"] = disc_lr
        penalised = adv.r1 > 0 and step % R1_EVERY == 0
        terms: dict[str, torch.Tensor] = {}  # of the loss, and what else is logged; means over the accumulation
        seed_step(config.seed, step)
        for i in range(accumulation):
            x = from_uint8(next(batches)[0].to(device, non_blocking=True, memory_format=memory_format))  # (B, C, H, W)
            if config.data.flip:
                mirrored = coin_flips(0.5, micro_batch, config.seed, step, i, accumulation)
                x = torch.where(mirrored.to(device, non_blocking=True)[:, None, None, None], x.flip(-1), x)
            losses: dict[str, torch.Tensor] = {}
            with accelerator.no_sync(model) if i < accumulation - 1 else nullcontext():
                x_rec, q = model(x)
                losses["quantizer_loss"] = sum(out.loss for out in q)
                # What each loss of the image wants of it is summed up at x_rec, and goes through the tokenizer once.
                # So weighing them by their gradients takes no second backward pass, and leaves none in D's weights.
                y = x_rec.detach().requires_grad_()
                losses["rec_loss"] = REC_LOSSES[config.loss.rec](y, x)
                (gradient,) = torch.autograd.grad(losses["rec_loss"], y)  # (B, C, H, W)
                loss = losses["rec_loss"] + losses["quantizer_loss"]
                if perceptual is not None and share >= config.loss.perceptual.start:
                    with stopwatch.running():
                        every = config.loss.perceptual.every
                        losses["perceptual_loss"] = perceptual(y[::every], x[::every]).mean()
                        (perceptual_gradient,) = torch.autograd.grad(losses["perceptual_loss"], y)
                    gradient = gradient + config.loss.perceptual.weight * perceptual_gradient
                    loss = loss + config.loss.perceptual.weight * losses["perceptual_loss"]
                if adv_ramp > 0:
                    losses["adv_loss"] = generator_loss(adv.name, bare_disc(y))
                    (adv_gradient,) = torch.autograd.grad(losses["adv_loss"], y)
                    adv_weight = torch.full((), adv.weight * adv_ramp * lowered, device=device)
                    if adv.adaptive:
                        adv_weight = adv_weight * adaptive_weight(gradient, adv_gradient, x_rec, bare_model.last_layer)
                    gradient = gradient + adv_weight * adv_gradient
                    loss = loss + adv_weight * losses["adv_loss"]
                    losses["adv_weight"] = adv_weight
                accelerator.backward(losses["quantizer_loss"] + (x_rec * gradient).sum())
            if disc_learns:
                with accelerator.no_sync(disc) if i < accumulation - 1 else nullcontext():
                    real, fake = disc(torch.cat([x.requires_grad_(penalised), y.detach()])).chunk(2)
                    losses["disc_loss"] = disc_loss = discriminator_loss(adv.name, real, fake)
                    if adv.lecam > 0:
                        losses["lecam_loss"] = lecam(real, fake)
                        disc_loss = disc_loss + adv.lecam * losses["lecam_loss"]
                    if penalised:
                        losses["r1_loss"] = r1_penalty(real, x)
                        disc_loss = disc_loss + adv.r1 * R1_EVERY * losses["r1_loss"]
                    accelerator.backward(disc_loss)
                losses |= {"real_logits": real.mean(), "fake_logits": fake.mean()}
                losses["disc_accuracy"] = discriminator_accuracy(adv.name, real, fake)
            losses |= {"loss": loss, "mse": F.mse_loss(y, x)}
            accumulate(terms, losses, accumulation)
            usage.update(q[0].codes)
        terms["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        if disc_learns:
            terms["disc_grad_norm"] = accelerator.clip_grad_norm_(disc.parameters(), config.optim.grad_clip)
        watched = ("_loss", "grad_norm") if accelerator.scaler is None else ("_loss",)  # a scaler skips such gradients
        with tracker.closed_on(Diverged):
            bad = guard.check(step, **{name: value for name, value in terms.items() if name.endswith(watched)})
        for each in [optimizer, disc_optimizer] if disc_learns else [optimizer]:
            if accelerator.scaler is None:
                each.optimizer.found_inf = bad
            each.step()
            each.zero_grad()
        step += 1
        ema.update(bare_model, step)
        means.add(**terms)

        if step % config.train.log_every == 0:
            metrics = means.compute()
            metrics |= {"psnr": psnr(torch.tensor(metrics["mse"])).item(), **usage.compute(), "lr": lr}
            seconds = budget.seconds - window_start
            metrics["images_per_second"] = (step - window_step) * config.train.batch_size / seconds
            if perceptual is not None:
                metrics["perceptual_time"] = stopwatch.seconds() / seconds
            tracker.log(step, {f"train/{name}": value for name, value in metrics.items()})
            accuracy = metrics.get("disc_accuracy", 0.0)
            if accuracy > WON_ACCURACY and not has_won:
                tracker.say(
                    f"step {step}: the discriminator has won: it tells {accuracy:.1%} of the patches, and a decoder "
                    f"learns little from that; lower loss.adversarial.lr, or raise loss.adversarial.r1 or lecam"
                )
            has_won = accuracy > WON_ACCURACY
            share = budget.share(step, device)
            shown = {name: metrics[name] for name in ("loss", "psnr", "usage", "images_per_second")}
            tracker.progress(step, share, budget.seconds * (1 / share - 1), **shown)
            window_step, window_start = step, budget.seconds
    if count := count_skipped(run_dir / "skipped.txt"):
        tracker.say(f"{count} images did not load; {run_dir / 'skipped.txt'} names them")
    if not last:
        tracker.say(f"{stop.reason}: stopped at step {step}; the same command goes on from step {saved}")
    tracker.close()
    accelerator.end_training()


@torch.no_grad()
def evaluate(
    model: VQModel, images: ImageSet, num_images: int, batch_size: int, device: torch.device
) -> dict[str, float]:
    """PSNR (of the pooled squared error) and use of the codebook on held-out images, shared out over the processes."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), num_images), dtype=int)[rank() :: world_size()]
    usage = CodeUsage(model.quantizer.num_codebooks, model.quantizer.codebook_size, device)
    sums = torch.zeros(2, device=device)  # of squared errors, of images
    for start in range(0, len(chosen), batch_size):
        x = from_uint8(images.__getitems__(chosen[start : start + batch_size])[0].to(device))
        x_rec, q = model(x)
        squared_errors = (x_rec.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
        sums += torch.stack([squared_errors.sum(), torch.tensor(len(x), device=device)])
        usage.update(q[0].codes)
    mse, count = all_reduce_sum(sums)
    figures = {"psnr": psnr(mse / count), **usage.compute()}
    return {f"val/{name}": figure.item() for name, figure in figures.items()}


@torch.no_grad()
def reconstructions(model: VQModel, images: ImageSet, device: torch.device) -> Image.Image:
    """A picture of held-out images, and below each row of them what the model makes of it."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), 16), dtype=int)
    x = images.__getitems__(chosen)[0]
    x_rec = to_uint8(model(from_uint8(x.to(device)))[0]).cpu()
    rows = [part for pair in zip(x.split(8), x_rec.split(8), strict=True) for part in pair]
    return image_grid(rearrange(torch.cat(rows), "n c h w -> n h w c").numpy(), columns=min(8, len(x)))


if __name__ == "__main__":
    run_program(
        main,
        Stage1Config,
        {
            "model": VQModel,
            "model.quantizer": QUANTIZERS,
            "model.quantizer.base": BASES,
            "discriminator": PatchDiscriminator,
        },
        "accelerate launch stage1/train.py [CONFIG.yaml] [key=value ...]",
    )
