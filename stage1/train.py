"""Stage 1: train the tokenizer, a VQ-VAE.

accelerate launch stage1/train.py [CONFIG.yaml] [key=value ...]
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from einops import rearrange
from PIL import Image

from vqgen.cli import run_program
from vqgen.config import Stage1Config, check_options, require
from vqgen.data.images import ImageSet, load_images
from vqgen.distributed import all_reduce_sum, rank, world_size
from vqgen.metrics import CodeUsage, psnr
from vqgen.models.vqmodel import VQModel, from_uint8, to_uint8
from vqgen.quantizers import BASES, QUANTIZERS, quantizer_options
from vqgen.tracking import Tracker, image_grid
from vqgen.training import (
    Budget,
    WeightEMA,
    coin_flips,
    endless_batches,
    load_checkpoint,
    lr_at,
    micro_batch_size,
    open_run,
    parameter_groups,
    save_checkpoint,
    seed_step,
    written_whole,
)

REC_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


def main(config: Stage1Config) -> None:
    budget = Budget(config.train.max_steps, config.train.max_seconds)
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.accumulation,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # the quantizer keeps its own equal
    )
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
    torch.manual_seed(config.seed)
    model = VQModel(**config.model)
    model.code_layout(config.data.image_size)  # raises where the size does not suit the stride
    if accelerator.is_main_process:
        open_run(config)
    accelerator.wait_for_everyone()

    betas = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim.weight_decay), lr=config.optim.lr, betas=betas, fused=True
    )
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = model.to(device, memory_format=memory_format)
    ema = WeightEMA(model, config.train.ema)
    step = 0
    run_dir = Path(config.run_dir)
    if state := load_checkpoint(run_dir):
        same = state["data"] == train_set.fingerprint
        require(same, f"{run_dir} was trained with other data than are there now; name another run_dir=")
        step, budget.spent = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        if budget.share(step, device) >= 1:
            accelerator.print(f"{run_dir} is finished, at step {step}; name another run_dir= for another run")
            accelerator.end_training()
            return
    bare_model = model
    model, optimizer = accelerator.prepare(model, optimizer)
    if state and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    model.train()

    workers = 0 if train_set.in_memory else config.data.workers
    taken = step * accumulation
    batches = endless_batches(train_set, micro_batch, first=taken, seed=config.seed, workers=workers, device=device)
    num_parameters = sum(p.numel() for p in bare_model.parameters())
    tracker = Tracker(
        run_dir, config, step=step, is_main=accelerator.is_main_process, facts={"num_parameters": num_parameters}
    )
    tracker.say(
        f"{run_dir}: {len(train_set)} training and {len(val_set)} held-out images, "
        f"{num_parameters / 1e6:.2f} M parameters, {world_size()} x {device.type}"
        + (f"; going on from step {step}" if step else "")
    )
    usage = CodeUsage(bare_model.quantizer.num_codebooks, bare_model.quantizer.codebook_size, device)
    totals = torch.zeros(5, device=device)  # on the device: reading them at every step would stall it
    first_step, window_step, window_start = step, step, budget.seconds
    budget.start()

    while True:
        share = budget.share(step, device)
        last = share >= 1
        if step > first_step and (last or step % config.train.eval_every == 0):
            with budget.paused():
                figures = evaluate(ema.model, val_set, config.train.eval_images, micro_batch, device)
                tracker.log(step, figures)
                tracker.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
                tracker.picture(step, "reconstructions", reconstructions(ema.model, val_set, device))
        if step > first_step and (last or step % config.train.checkpoint_every == 0):
            with budget.paused():
                if accelerator.is_main_process:
                    with written_whole(run_dir / "model") as folder:
                        ema.model.save_pretrained(folder)
                    state = {
                        "step": step,
                        "seconds": budget.seconds,
                        "data": train_set.fingerprint,
                        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
                        "model": bare_model.state_dict(),
                        "ema": ema.model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    }
                    save_checkpoint(run_dir, step, state, config.train.keep_checkpoints)
        if last:
            break

        lr = lr_at(share, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seed_step(config.seed, step)
        for i in range(accumulation):
            x = from_uint8(next(batches)[0].to(device, non_blocking=True, memory_format=memory_format))  # (B, C, H, W)
            if config.data.flip:
                mirrored = coin_flips(0.5, micro_batch, config.seed, step * accumulation + i)
                x = torch.where(mirrored.to(device, non_blocking=True)[:, None, None, None], x.flip(-1), x)
            with accelerator.no_sync(model) if i < accumulation - 1 else nullcontext():
                x_rec, q = model(x)
                rec_loss = REC_LOSSES[config.loss.rec](x_rec, x)
                quantizer_loss = sum(out.loss for out in q)
                loss = rec_loss + quantizer_loss
                accelerator.backward(loss)
            with torch.no_grad():
                mse = F.mse_loss(x_rec, x)
                totals[:4] += torch.stack([loss, rec_loss, quantizer_loss, mse]) / accumulation
                usage.update(q[0].codes)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        ema.update(bare_model, step)
        totals[4] += grad_norm

        if step % config.train.log_every == 0:
            means = all_reduce_sum(totals) / (world_size() * (step - window_step))
            metrics = dict(zip(("loss", "rec_loss", "quantizer_loss", "mse", "grad_norm"), means.tolist(), strict=True))
            metrics |= {"psnr": psnr(means[3]).item(), **usage.compute(), "lr": lr}
            seconds = budget.seconds - window_start
            metrics["images_per_second"] = (step - window_step) * config.train.batch_size / seconds
            tracker.log(step, {f"train/{name}": value for name, value in metrics.items()})
            share = budget.share(step, device)
            shown = {name: metrics[name] for name in ("loss", "psnr", "usage", "images_per_second")}
            tracker.progress(step, share, budget.seconds * (1 / share - 1), **shown)
            totals.zero_()
            window_step, window_start = step, budget.seconds
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
        {"model": VQModel, "model.quantizer": QUANTIZERS, "model.quantizer.base": BASES},
        "accelerate launch stage1/train.py [CONFIG.yaml] [key=value ...]",
    )
