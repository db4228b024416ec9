"""Train the plain GAN, for comparison: noise and a class in, an image out, no codes.

accelerate launch stage1/train_gan.py [CONFIG.yaml] [key=value ...]
"""

from shlex import quote
from typing import Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from vqgen.adversarial.dcgan import DCGANDiscriminator, DCGANGenerator, load_gan, settle_batch_norm
from vqgen.adversarial.losses import DiscriminatorWatch, discriminator_accuracy, discriminator_loss, generator_loss
from vqgen.cli.program import run_program
from vqgen.cli.reflect import check_options
from vqgen.codes import shown
from vqgen.data.images import ImageSet, load_images
from vqgen.data.order import image_batches, mixed_seed, own_part
from vqgen.data.stream import ImageStream
from vqgen.distributed import world_size
from vqgen.errors import require, section
from vqgen.priors.sampling import classes_in_turn, generate_images, latents
from vqgen.settings import GANConfig
from vqgen.training.average import WeightEMA
from vqgen.training.origin import class_rows
from vqgen.training.run import Now, Run, attempts
from vqgen.training.schedule import lr_at, num_parameters, parameter_groups, set_lr
from vqgen.training.state import TrainState
from vqgen.training.tracking import image_grid

SETTLING_IMAGES = 1024  # batch normalisation's statistics come from this many images before an evaluation or a save


class Nets(NamedTuple):
    """The networks that are trained; those named `bare_` lack the wrapper of `Accelerator.prepare`."""

    generator: nn.Module
    bare_generator: DCGANGenerator
    average: WeightEMA
    optimizer: Any
    disc: nn.Module
    bare_disc: DCGANDiscriminator
    disc_optimizer: Any


def main(config: GANConfig) -> None:
    to_lower = f"optim.lr={config.optim.lr} and disc_lr={config.disc_lr}"
    for run in attempts(config, lowered="both learning rates", to_lower=to_lower):
        with run:
            train(config, run)


def discriminator_pass(
    nets: Nets, x: Tensor, fakes: Tensor, class_ids: Tensor, name: str, run: Run
) -> dict[str, Tensor]:
    """One pass of D on real and on generated images, both (B, C, H, W): its loss, and the loss' gradient."""
    real, fake = nets.disc(x, class_ids), nets.disc(fakes, class_ids)  # two calls: each batch is normalised by itself
    loss = discriminator_loss(name, real, fake)
    run.accelerator.backward(loss)
    terms = {"disc_loss": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}
    return terms | {"disc_accuracy": discriminator_accuracy(name, real, fake)}


def generator_pass(nets: Nets, z: Tensor, class_ids: Tensor, name: str, run: Run) -> dict[str, Tensor]:
    """One pass of G on noise (B, latent_dim), judged by D, which does not learn from it: G's loss, and its gradient."""
    loss = generator_loss(name, nets.bare_disc(nets.generator(z, class_ids), class_ids))
    run.accelerator.backward(loss)
    return {"gen_loss": loss}


def train(config: GANConfig, run: Run) -> None:
    run.find_origin("generator", load_gan)
    train_set = load_data(config, run)
    nets = build(config, run, train_set)
    run.open(train_set)
    generator, disc, optimizer, disc_optimizer = run.prepare(
        nets.generator, nets.disc, nets.optimizer, nets.disc_optimizer
    )
    nets = nets._replace(
        generator=generator.train(), disc=disc.train(), optimizer=optimizer, disc_optimizer=disc_optimizer
    )
    state = TrainState(
        model=nets.bare_generator,
        disc=nets.bare_disc,
        ema=nets.average,
        optimizer=nets.optimizer,
        disc_optimizer=nets.disc_optimizer,
    )
    then = f"python stage2/sample.py {quote(config.run_dir)}"
    if run.resume(state, then, data=train_set.fingerprint, held_out=None):
        return
    classes = range(len(train_set.class_names))
    size = num_parameters(nets.bare_generator)
    run.start(
        f"{train_set.amount} training images, {len(classes)} classes, {size / 1e6:.2f} M parameters "
        f"and {num_parameters(nets.bare_disc) / 1e6:.2f} M of the discriminator",
        size,
        by_pass="batch normalisation",
        by_process="batch normalisation on CPUs",
        stream_workers=max(1, config.data.workers) if isinstance(train_set, ImageStream) else None,
    )
    batches = image_batches(train_set, run.place, data=config.data, device=run.device)
    watch = DiscriminatorWatch()

    for now in run.steps():
        if now.evaluates or now.saves:
            with run.paused():
                class_ids = classes_in_turn(SETTLING_IMAGES, classes).to(run.device)
                z = latents(nets.average.model, class_ids, config.seed)
                settle_batch_norm(nets.average.model, z, class_ids)
                if now.evaluates:
                    picture = samples(nets.average.model, config.seed, run.device) if run.is_main else None
                    run.report(now, {}, samples=picture)
        if now.saves:
            run.save(now, state, {"generator": nets.average})
        if now.ends:
            break

        # Goodfellow et al. 2014, algorithm 1: an update of D, then one of G against the new D, on other noise.
        lr = set_lr(nets.optimizer, run.lowered * lr_at(now.share, config.optim))
        set_lr(nets.disc_optimizer, lr * config.disc_lr / config.optim.lr)
        drawn: list[Tensor] = []  # the class ids of D's passes; G's passes use the same
        for i, (x, class_ids) in enumerate(run.passes(batches, nets.disc)):  # (B, C, H, W) in [-1, 1], and (B,)
            with torch.no_grad():
                fakes = nets.bare_generator(noise(config, run, now, i, turn=0), class_ids)
            run.add(discriminator_pass(nets, x, fakes, class_ids, config.loss, run))
            drawn.append(class_ids)
        run.update(disc_grad_norm=(nets.disc, nets.disc_optimizer))

        nets.bare_disc.requires_grad_(False)
        for i, class_ids in enumerate(run.passes(iter(drawn), nets.generator)):
            run.add(generator_pass(nets, noise(config, run, now, i, turn=1), class_ids, config.loss, run))
        nets.bare_disc.requires_grad_(True)
        run.update(grad_norm=(nets.generator, nets.optimizer))
        nets.average.update(nets.bare_generator, now.step + 1)

        if now.logs:
            figures = run.means.compute() | {"lr": lr}
            run.log(now, figures, shown=("disc_loss", "gen_loss", "disc_accuracy"))
            if watch.has_just_won(figures):
                run.say(
                    f"step {now.step + 1}: the discriminator has won: it tells {figures['disc_accuracy']:.1%} of the "
                    "images apart, so the generator learns little from it; lower disc_lr or discriminator.width"
                )
    run.close("the generator", then)


def load_data(config: GANConfig, run: Run) -> ImageSet | ImageStream:
    """The training images; completes the configuration with settings that follow from them."""
    if run.origin is not None:
        its = run.origin.model
        config.data.channels = config.data.channels or its.channels
        run.origin.check("data", {"channels": config.data.channels}, vars(its))
        size = f"draws images of data.image_size={shown(its.image_size)}; give that, or train from scratch"
        require(its.image_size == config.data.image_size, f"init_from={config.init_from}: {size}")
        run.origin.check("generator", config.generator, vars(its))
        config.generator = {"latent_dim": its.latent_dim, "width": its.width}
    with section("data"):
        train_set, held_out = load_images(config.data)
    run.show_data(train_set, held_out)
    config.data.channels = train_set.channels
    config.generator = check_options(DCGANGenerator, config.generator, "generator")
    config.discriminator = check_options(DCGANDiscriminator, config.discriminator, "discriminator")
    return train_set


def build(config: GANConfig, run: Run, train_set: ImageSet | ImageStream) -> Nets:
    """Both networks on their device, their optimizers and the average, in their state before the first step."""
    fp16 = run.accelerator.mixed_precision == "fp16"
    require(not fp16, "train.mixed_precision=fp16 is too coarse for a discriminator's gradients; use bf16 or no")
    torch.manual_seed(config.seed)
    shape, classes = (config.data.image_size, train_set.channels), train_set.class_names
    with section("generator", image_size="data.image_size"):
        generator: Any = DCGANGenerator(*shape, classes, **config.generator)
    with section("discriminator"):
        disc: Any = DCGANDiscriminator(*shape, len(classes), **config.discriminator)
    if run.origin is not None:
        no_class = [(len(classes), len(run.origin.model.class_names))]
        run.origin.fill_by_class(generator, generator.class_tables, no_class, 0, classes)
        rows = [*no_class, *class_rows(classes, run.origin.model.class_names)]
        run.origin.fill_part("disc", disc, "discriminator", disc.class_tables, rows)
    memory_format = torch.contiguous_format
    if run.device.type == "cuda":
        memory_format = torch.channels_last
        if world_size() > 1:  # statistics of the whole batch, over all processes; torch offers this on GPUs only
            generator, disc = map(nn.SyncBatchNorm.convert_sync_batchnorm, (generator, disc))
    generator, disc = (model.to(run.device, memory_format=memory_format) for model in (generator, disc))
    betas = (config.optim.beta1, config.optim.beta2)
    optimizer, disc_optimizer = (
        torch.optim.AdamW(
            parameter_groups(model, config.optim.weight_decay), lr=config.optim.lr, betas=betas, fused=True
        )
        for model in (generator, disc)
    )
    average = WeightEMA(generator, config.train.ema)
    return Nets(generator, generator, average, optimizer, disc, disc, disc_optimizer)


def noise(config: GANConfig, run: Run, now: Now, i: int, *, turn: int) -> Tensor:
    """This process's noise (micro_batch, latent_dim) for pass i of a step, in D's turn (0) or G's (1)."""
    source = torch.Generator().manual_seed(mixed_seed(config.seed, now.step, turn))
    size = run.accumulation * world_size() * run.micro_batch
    z = own_part(torch.randn(size, config.generator["latent_dim"], generator=source), run.micro_batch, i)
    return (z.pin_memory() if run.device.type == "cuda" else z).to(run.device, non_blocking=True)


def samples(generator: DCGANGenerator, seed: int, device: torch.device) -> Image.Image:
    """A picture of samples that cycles through the classes."""
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
