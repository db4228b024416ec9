"""The plain GAN, to compare with: noise and a class in, an image out, and no codes.

accelerate launch stage1/train_gan.py [CONFIG.yaml] [key=value ...]
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from einops import rearrange
from PIL import Image
from torch import nn

from vqgen.adversarial.dcgan import DCGANDiscriminator, DCGANGenerator, settle_batch_norm
from vqgen.adversarial.losses import WON_ACCURACY, discriminator_accuracy, discriminator_loss, generator_loss
from vqgen.cli.program import run_program
from vqgen.cli.reflect import check_options
from vqgen.data.images import load_images
from vqgen.data.order import coin_flips, endless_batches, mixed_seed, own_part
from vqgen.data.skipped import count_skipped
from vqgen.distributed import world_size
from vqgen.errors import require
from vqgen.priors.sampling import classes_in_turn, generate_images, latents
from vqgen.settings import GANConfig
from vqgen.tokenizers.vqmodel import from_uint8
from vqgen.training.average import WeightEMA
from vqgen.training.checkpoints import how_resumed, load_checkpoint, open_run, save_checkpoint, written_whole
from vqgen.training.fsdp import refuse_fsdp
from vqgen.training.guard import Diverged, FiniteGuard, going_back
from vqgen.training.launchers import refuse_other_engines
from vqgen.training.means import Means, accumulate
from vqgen.training.schedule import Budget, lr_at, micro_batch_size, parameter_groups
from vqgen.training.stop import Stop
from vqgen.training.tracking import Tracker, image_grid

SETTLING_IMAGES = 1024  # that batch normalisation's statistics are of, in what is evaluated and saved


def main(config: GANConfig) -> None:
    going_back(train, config, "both learning rates", f"optim.lr={config.optim.lr} and disc_lr={config.disc_lr}")


def train(config: GANConfig, rollbacks: int, stop: Stop) -> None:
    budget = Budget(config.train.max_steps, config.train.max_seconds)
    refuse_fsdp()
    refuse_other_engines()
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.accumulation,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # D takes two batches before backward
    )
    fp16 = accelerator.mixed_precision == "fp16"
    require(not fp16, "train.mixed_precision=fp16 is too coarse for a discriminator's gradients; use bf16 or no")
    device, accumulation = accelerator.device, accelerator.gradient_accumulation_steps
    micro_batch = micro_batch_size(config.train.batch_size, accumulation)

    train_set, _ = load_images(config.data)
    config.data.channels = train_set.channels
    config.generator = check_options(DCGANGenerator, config.generator, "generator")
    config.discriminator = check_options(DCGANDiscriminator, config.discriminator, "discriminator")
    torch.manual_seed(config.seed)
    shape, classes = (config.data.image_size, train_set.channels), train_set.class_names
    generator = DCGANGenerator(*shape, classes, **config.generator)
    disc = DCGANDiscriminator(*shape, len(classes), **config.discriminator)
    if accelerator.is_main_process:
        open_run(config)
    accelerator.wait_for_everyone()
    train_set.report_skipped(Path(config.run_dir) / "skipped.txt")

    memory_format = torch.contiguous_format
    if device.type == "cuda":
        memory_format = torch.channels_last
        if world_size() > 1:  # one batch's statistics over all processes, which torch has for GPUs only
            generator, disc = map(nn.SyncBatchNorm.convert_sync_batchnorm, (generator, disc))
    generator, disc = (model.to(device, memory_format=memory_format) for model in (generator, disc))
    betas = (config.optim.beta1, config.optim.beta2)
    optimizer, disc_optimizer = (
        torch.optim.AdamW(
            parameter_groups(model, config.optim.weight_decay), lr=config.optim.lr, betas=betas, fused=True
        )
        for model in (generator, disc)
    )
    ema = WeightEMA(generator, config.train.ema)
    step = evaluated = logged = 0
    run_dir = Path(config.run_dir)
    if state := load_checkpoint(run_dir):
        same = state["data"] == train_set.fingerprint
        require(same, f"{run_dir} was trained with other data than are there now; name another run_dir=")
        step, evaluated, logged, budget.spent = (state[key] for key in ("step", "evaluated", "logged", "seconds"))
        rollbacks = max(rollbacks, state["rollbacks"])
        generator.load_state_dict(state["model"])
        disc.load_state_dict(state["disc"])
        ema.model.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        disc_optimizer.load_state_dict(state["disc_optimizer"])
        if budget.share(step, device) >= 1:
            accelerator.print(f"{run_dir} is finished, at step {step}; name another run_dir= for another run")
            accelerator.end_training()
            return
    bare_generator, bare_disc = generator, disc
    generator, disc, optimizer, disc_optimizer = accelerator.prepare(generator, disc, optimizer, disc_optimizer)
    generator.train()
    disc.train()

    workers = 0 if train_set.in_memory else config.data.workers
    taken = step * accumulation
    batches = endless_batches(train_set, micro_batch, first=taken, seed=config.seed, workers=workers, device=device)
    counts = [sum(p.numel() for p in model.parameters()) for model in (bare_generator, bare_disc)]
    tracker = Tracker(
        run_dir, config, logged=logged, is_main=accelerator.is_main_process, facts={"num_parameters": counts[0]}
    )
    tracker.say(
        f"{run_dir}: {len(train_set)} training images, {len(classes)} classes, {counts[0] / 1e6:.2f} M parameters "
        f"and {counts[1] / 1e6:.2f} M of the discriminator, {world_size()} x {device.type}"
        + how_resumed(state, accumulation, by_pass="batch normalisation", by_process="batch normalisation on CPUs")
    )
    guards = [FiniteGuard(config.train.max_bad_steps, rollbacks, tracker.say, device, stop) for _ in range(2)]
    means, has_won = Means(), False
    if state:
        means.load_state_dict(state["means"], device)
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
                for guard in guards:
                    guard.finish()
        evaluates = step > evaluated and (last or (step % config.train.eval_every == 0 and not stopping))
        healthy = not any(guard.in_a_row for guard in guards)  # a checkpoint is what one can go back to
        saves = step > saved and save_due and (healthy or last)
        if evaluates or saves:
            with budget.paused():
                class_ids = classes_in_turn(SETTLING_IMAGES, range(len(classes))).to(device)
                settle_batch_norm(ema.model, latents(ema.model, class_ids, config.seed), class_ids)
                if evaluates:
                    evaluated = step
                    if accelerator.is_main_process:
                        tracker.picture(step, "samples", samples(ema.model, config.seed, device))
                if saves:
                    state = {
                        "step": step,
                        "evaluated": evaluated,
                        "seconds": budget.seconds,
                        "processes": world_size(),
                        "accumulation": accumulation,
                        "data": train_set.fingerprint,
                        "rollbacks": rollbacks,
                        "means": means.state_dict(),
                        "model": bare_generator.state_dict(),
                        "disc": bare_disc.state_dict(),
                        "ema": ema.model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "disc_optimizer": disc_optimizer.state_dict(),
                    }
                    if accelerator.is_main_process:
                        with written_whole(run_dir / "model") as folder:
                            ema.model.save_pretrained(folder / "generator")
                        state["logged"] = tracker.flush()
                        save_checkpoint(
                            run_dir, step, state, config.train.keep_checkpoints, config.train.milestone_every
                        )
            saved = step if saves else saved
        if last or stopping:
            break

        lr = 0.5**rollbacks * lr_at(share, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for group in disc_optimizer.param_groups:
            group["lr"] = lr * config.disc_lr / config.optim.lr
        terms: dict[str, torch.Tensor] = {}  # of both losses, and what else is logged; means over the accumulation

        # Goodfellow et al. 2014, algorithm 1: a step of D, then a step of G against the new D, on other noise.
        drawn = []  # the class ids of this step's images, which G is asked for too
        for i in range(accumulation):
            x, class_ids = next(batches)
            x = from_uint8(x.to(device, non_blocking=True, memory_format=memory_format))  # (B, C, H, W)
            drawn.append(class_ids.to(device, non_blocking=True))
            if config.data.flip:
                mirrored = coin_flips(0.5, micro_batch, config.seed, step, i, accumulation)
                x = torch.where(mirrored.to(device, non_blocking=True)[:, None, None, None], x.flip(-1), x)
            with torch.no_grad():
                fakes = bare_generator(noise(config, micro_batch, step, i, accumulation, 0, device), drawn[i])
            with accelerator.no_sync(disc) if i < accumulation - 1 else nullcontext():
                real, fake = disc(x, drawn[i]), disc(fakes, drawn[i])  # apart, each normalised by its own batch
                disc_loss = discriminator_loss(config.loss, real, fake)
                accelerator.backward(disc_loss)
            seen = {"disc_loss": disc_loss, "real_logits": real.mean(), "fake_logits": fake.mean()}
            seen["disc_accuracy"] = discriminator_accuracy(config.loss, real, fake)
            accumulate(terms, seen, accumulation)
        terms["disc_grad_norm"] = accelerator.clip_grad_norm_(disc.parameters(), config.optim.grad_clip)
        watched = {name: terms[name] for name in ("disc_loss", "disc_grad_norm")}
        with tracker.closed_on(Diverged):
            disc_optimizer.optimizer.found_inf = guards[0].check(step, **watched)
        disc_optimizer.step()
        disc_optimizer.zero_grad()

        bare_disc.requires_grad_(False)
        for i in range(accumulation):
            with accelerator.no_sync(generator) if i < accumulation - 1 else nullcontext():
                fakes = generator(noise(config, micro_batch, step, i, accumulation, 1, device), drawn[i])
                gen_loss = generator_loss(config.loss, bare_disc(fakes, drawn[i]))
                accelerator.backward(gen_loss)
            accumulate(terms, {"gen_loss": gen_loss}, accumulation)
        bare_disc.requires_grad_(True)
        terms["grad_norm"] = accelerator.clip_grad_norm_(generator.parameters(), config.optim.grad_clip)
        with tracker.closed_on(Diverged):
            optimizer.optimizer.found_inf = guards[1].check(
                step, gen_loss=terms["gen_loss"], grad_norm=terms["grad_norm"]
            )
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        ema.update(bare_generator, step)
        means.add(**terms)

        if step % config.train.log_every == 0:
            speed = (step - window_step) * config.train.batch_size / (budget.seconds - window_start)
            metrics = {**means.compute(), "lr": lr, "images_per_second": speed}
            tracker.log(step, {f"train/{name}": value for name, value in metrics.items()})
            if metrics["disc_accuracy"] > WON_ACCURACY and not has_won:
                tracker.say(
                    f"step {step}: the discriminator has won: it tells {metrics['disc_accuracy']:.1%} of the images, "
                    f"and a generator learns little from that; lower disc_lr or discriminator.width"
                )
            has_won = metrics["disc_accuracy"] > WON_ACCURACY
            share = budget.share(step, device)
            shown = {name: metrics[name] for name in ("disc_loss", "gen_loss", "disc_accuracy", "images_per_second")}
            tracker.progress(step, share, budget.seconds * (1 / share - 1), **shown)
            window_step, window_start = step, budget.seconds
    if count := count_skipped(run_dir / "skipped.txt"):
        tracker.say(f"{count} images did not load; {run_dir / 'skipped.txt'} names them")
    if not last:
        tracker.say(f"{stop.reason}: stopped at step {step}; the same command goes on from step {saved}")
    tracker.close()
    accelerator.end_training()


def noise(
    config: GANConfig, micro_batch: int, step: int, i: int, accumulation: int, turn: int, device: torch.device
) -> torch.Tensor:
    """This process's noise (micro_batch, latent_dim) for pass i of a step, in D's turn (0) or G's (1)."""
    source = torch.Generator().manual_seed(mixed_seed(config.seed, step, turn))
    z = torch.randn(accumulation * world_size() * micro_batch, config.generator["latent_dim"], generator=source)
    z = own_part(z, micro_batch, i)
    return (z.pin_memory() if device.type == "cuda" else z).to(device, non_blocking=True)


def samples(generator: DCGANGenerator, seed: int, device: torch.device) -> Image.Image:
    """A picture of samples, the classes in turn."""
    columns = len(generator.class_names) if 0 < len(generator.class_names) <= 16 else 8
    class_ids = classes_in_turn(8 * columns, range(len(generator.class_names))).to(device)
    images = generate_images(generator, class_ids, seed=seed)
    return image_grid(rearrange(images.cpu(), "n c h w -> n h w c").numpy(), columns)


if __name__ == "__main__":
    run_program(
        main,
        GANConfig,
        {"generator": DCGANGenerator, "discriminator": DCGANDiscriminator},
        "accelerate launch stage1/train_gan.py [CONFIG.yaml] [key=value ...]",
    )
