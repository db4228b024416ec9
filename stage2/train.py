"""Stage 2: fit the prior, an autoregressive transformer over the tokenizer's codes.

accelerate launch stage2/train.py [CONFIG.yaml] [key=value ...]
"""

import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from PIL import Image

from vqgen.cli.parse import read_yaml
from vqgen.cli.program import run_program
from vqgen.cli.reflect import check_options
from vqgen.data.codes import encode_images
from vqgen.data.images import load_images
from vqgen.data.order import coin_flips, endless_batches, seed_step
from vqgen.data.skipped import count_skipped
from vqgen.distributed import world_size
from vqgen.errors import require
from vqgen.evaluation.likelihood import prior_nll, unigram_entropy
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import classes_in_turn, sample_images
from vqgen.settings import DataConfig, SampleConfig, Stage2Config
from vqgen.tokenizers.vqmodel import VQModel, load_tokenizer
from vqgen.training.average import WeightEMA
from vqgen.training.checkpoints import how_resumed, load_checkpoint, open_run, save_checkpoint, written_whole
from vqgen.training.fsdp import check_fsdp, gathered, load_optimizer, whole
from vqgen.training.guard import Diverged, FiniteGuard, going_back
from vqgen.training.launchers import refuse_other_engines
from vqgen.training.means import Means, accumulate
from vqgen.training.schedule import Budget, lr_at, micro_batch_size, parameter_groups
from vqgen.training.stop import Stop
from vqgen.training.tracking import Tracker, image_grid


def main(config: Stage2Config) -> None:
    going_back(train, config, "the learning rate", f"optim.lr={config.optim.lr}")


def train(config: Stage2Config, rollbacks: int, stop: Stop) -> None:
    budget = Budget(config.train.max_steps, config.train.max_seconds)
    refuse_other_engines()
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision, gradient_accumulation_steps=config.train.accumulation
    )
    check_fsdp(accelerator)
    device, accumulation = accelerator.device, accelerator.gradient_accumulation_steps
    micro_batch = micro_batch_size(config.train.batch_size, accumulation)

    # The data are the tokenizer's own unless told otherwise, key by key.
    tokenizer, tokenizer_hash = load_tokenizer(Path(config.stage1))
    stage1_config = Path(config.stage1) / "config.yaml"
    stage1_data = read_yaml(stage1_config).get("data", {}) if stage1_config.is_file() else {}
    config.data = {**stage1_data, **config.data}
    config.data["channels"] = config.data.get("channels") or tokenizer.channels
    require("source" in config.data, f"{config.stage1} does not say which images it is for; give data.source=")
    require(
        config.data["channels"] == tokenizer.channels,
        f"data.channels={config.data['channels']}: the tokenizer in {config.stage1} has {tokenizer.channels}",
    )
    config.data = check_options(DataConfig, config.data, "data")
    data = DataConfig(**config.data)
    train_images, val_images = load_images(data)
    layout = tokenizer.code_layout(data.image_size)
    torch.manual_seed(config.seed)
    config.model = check_options(Prior, config.model, "model")
    model = Prior(layout, train_images.class_names, **config.model)
    if accelerator.is_main_process:
        open_run(config)
    accelerator.wait_for_everyone()

    # Each image becomes tokens once, whatever the number of epochs and of runs.
    tokenizer.to(device)
    codes_dir = Path(config.codes_dir or Path(config.stage1) / "codes")
    train_codes, val_codes = (
        encode_images(
            images,
            tokenizer,
            codes_dir,
            tokenizer_hash=tokenizer_hash,
            mirror=mirror,
            accelerator=accelerator,
            skipped=Path(config.run_dir) / "skipped.txt",
        )
        for images, mirror in ((train_images, data.flip), (val_images, False))
    )
    fingerprint = train_images.fingerprint
    del train_images, val_images

    betas = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim.weight_decay), lr=config.optim.lr, betas=betas, fused=True
    )
    model = model.to(device)
    ema = WeightEMA(model, config.train.ema)
    step = evaluated = logged = 0
    run_dir = Path(config.run_dir)
    if state := load_checkpoint(run_dir):
        for name, now in (("tokenizer", tokenizer_hash), ("data", fingerprint)):
            require(state[name] == now, f"{run_dir} was trained with another {name} than now; name another run_dir=")
        step, evaluated, logged, budget.spent = (state[key] for key in ("step", "evaluated", "logged", "seconds"))
        rollbacks = max(rollbacks, state["rollbacks"])
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        if budget.share(step, device) >= 1:
            accelerator.print(f"{run_dir} is finished, at step {step}; name another run_dir= for another run")
            accelerator.end_training()
            return
    bare_model = model
    model, optimizer = accelerator.prepare(model, optimizer)
    ema.shard_like(bare_model)
    if state:
        load_optimizer(optimizer, state["optimizer"])
    if state and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    model.train()

    taken = step * accumulation
    batches = endless_batches(train_codes, micro_batch, first=taken, seed=config.seed, workers=0, device=device)
    num_parameters = sum(p.numel() for p in bare_model.parameters())
    tracker = Tracker(
        run_dir, config, logged=logged, is_main=accelerator.is_main_process, facts={"num_parameters": num_parameters}
    )
    tracker.say(
        f"{run_dir}: {len(train_codes)} training and {len(val_codes)} held-out sequences "
        f"of {layout.num_tokens} tokens, {len(bare_model.class_names)} classes, "
        f"{num_parameters / 1e6:.2f} M parameters, {world_size()} x {device.type}" + how_resumed(state, accumulation)
    )
    unigram = unigram_entropy(train_codes, layout)
    dims_per_token = tokenizer.channels * data.image_size**2 / layout.num_tokens
    guard, means = FiniteGuard(config.train.max_bad_steps, rollbacks, tracker.say, device, stop), Means()
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
                guard.finish()
        if step > evaluated and (last or (step % config.train.eval_every == 0 and not stopping)):
            evaluated = step
            with budget.paused(), ema.whole() as averaged:
                nll = prior_nll(averaged, val_codes, config.train.eval_images, micro_batch, device)
                figures = {
                    "nll": nll,  # nats per token
                    "unigram_entropy": unigram,  # nats per token: what a prior that learned nothing but counts reaches
                    "code_bits_per_dim": nll / math.log(2) / dims_per_token,
                }
                tracker.log(step, {f"val/{name}": value for name, value in figures.items()})
                tracker.say(f"step {step}  " + "  ".join(f"val/{name} {v:.4g}" for name, v in figures.items()))
                if accelerator.is_main_process:
                    tracker.picture(step, "samples", samples(averaged, tokenizer, config.seed, device))
        healthy = guard.in_a_row == 0  # a checkpoint is what one can go back to
        if step > saved and save_due and (healthy or last):
            with budget.paused(), ema.whole() as averaged:
                state = {
                    "step": step,
                    "evaluated": evaluated,
                    "seconds": budget.seconds,
                    "processes": world_size(),
                    "accumulation": accumulation,
                    "tokenizer": tokenizer_hash,
                    "data": fingerprint,
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
                    "model": whole(bare_model.state_dict()),
                    "ema": averaged.state_dict(),
                    "optimizer": whole(optimizer.state_dict()),
                    "rollbacks": rollbacks,
                    "means": means.state_dict(),
                }
                if accelerator.is_main_process:
                    with written_whole(run_dir / "model") as folder:
                        averaged.save_pretrained(folder / "prior")
                        tokenizer.save_pretrained(folder / "tokenizer")
                    state["logged"] = tracker.flush()
                    save_checkpoint(run_dir, step, state, config.train.keep_checkpoints, config.train.milestone_every)
                del state  # or the average, which FSDP gathered for it, would stay in memory
            saved = step
        if last or stopping:
            break

        lr = 0.5**rollbacks * lr_at(share, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        terms: dict[str, torch.Tensor] = {}  # means over the accumulation
        seed_step(config.seed, step)
        for i in range(accumulation):
            tokens, class_ids = (part.to(device, non_blocking=True) for part in next(batches))  # (B, N), (B,)
            dropped = coin_flips(config.class_dropout, micro_batch, config.seed, step, i, accumulation)
            class_ids = class_ids.masked_fill(dropped.to(device, non_blocking=True), -1)
            with accelerator.no_sync(model) if i < accumulation - 1 else nullcontext():
                logits = model(tokens, class_ids)
                logits = rearrange(logits.float(), "b n v -> (b n) v")  # FSDP's mixed precision does not widen them
                loss = F.cross_entropy(logits, rearrange(tokens, "b n -> (b n)"))
                accelerator.backward(loss)
            accumulate(terms, {"loss": loss}, accumulation)
        terms["grad_norm"] = gathered(accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip))
        watched = ("loss", "grad_norm") if accelerator.scaler is None else ("loss",)  # a scaler skips such gradients
        with tracker.closed_on(Diverged):
            bad = guard.check(step, **{name: terms[name] for name in watched})
        if accelerator.scaler is None:
            optimizer.optimizer.found_inf = bad
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        ema.update(bare_model, step)
        means.add(**terms)

        if step % config.train.log_every == 0:
            speed = (step - window_step) * config.train.batch_size / (budget.seconds - window_start)
            metrics = {**means.compute(), "lr": lr, "images_per_second": speed}
            tracker.log(step, {f"train/{name}": value for name, value in metrics.items()})
            share = budget.share(step, device)
            tracker.progress(
                step, share, budget.seconds * (1 / share - 1), loss=metrics["loss"], images_per_second=speed
            )
            window_step, window_start = step, budget.seconds
    if count := count_skipped(run_dir / "skipped.txt"):
        tracker.say(f"{count} images did not load; {run_dir / 'skipped.txt'} names them")
    if not last:
        tracker.say(f"{stop.reason}: stopped at step {step}; the same command goes on from step {saved}")
    tracker.close()
    accelerator.end_training()


def samples(model: Prior, tokenizer: VQModel, seed: int, device: torch.device) -> Image.Image:
    """A picture of samples at the default settings, the classes in turn."""
    columns = len(model.class_names) if 0 < len(model.class_names) <= 16 else 8
    class_ids = classes_in_turn(8 * columns, range(len(model.class_names))).to(device)
    settings = SampleConfig()
    options = {"cfg_scale": settings.cfg_scale, "top_p": settings.top_p}
    images = sample_images(model, tokenizer, class_ids, seed=seed, **options)
    return image_grid(rearrange(images.cpu(), "n c h w -> n h w c").numpy(), columns)


if __name__ == "__main__":
    run_program(
        main,
        Stage2Config,
        {"model": Prior, "data": DataConfig},
        "accelerate launch stage2/train.py [CONFIG.yaml] [key=value ...]",
    )
