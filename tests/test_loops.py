"""The inside of the three loops, against plain autograd and formulas written out here.

After one update, Adam's first moment is the gradient, clipped and scaled. It is compared with the gradient of the
summed loss, since rounding moves a gradient only a little. The weights are then compared with AdamW's formula for that
moment.
"""

import ast
import itertools
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import ROOT, metrics, state
from safetensors.torch import load_file
from torch import Tensor, nn

from vqgen.adversarial.dcgan import DCGANDiscriminator, DCGANGenerator
from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.codes import CodeLayout
from vqgen.data.images import ImageSet, load_images
from vqgen.data.order import BatchOrder, coin_flips, mixed_seed
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.priors.prior import Prior
from vqgen.quantizers import QuantizerOutput, build_quantizer
from vqgen.settings import DataConfig
from vqgen.tokenizers import ARCHITECTURES, build_tokenizer
from vqgen.tokenizers.light import Light
from vqgen.tokenizers.vqmodel import load_tokenizer
from vqgen.training.muon import orthogonalised
from vqgen.training.run import Run
from vqgen.yaml_file import read_yaml

QUIET = "tracking.wandb=disabled"
STEP = [
    "train.max_steps=1",
    "train.log_every=1",
    "train.batch_size=16",
    "train.accumulation=2",
    "data.flip=true",
    QUIET,
]
STEP += ["optim.grad_clip=0.02", "optim.weight_decay=0.3", "optim.warmup=0.5", "train.eval_images=100"]
CLIP, DECAY, WARMUP = 0.02, 0.3, 1e-3 / 0.5  # the learning rate's factor before the first update


def first_batches(num_passes: int, size: int, step: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The images of a step's passes in [-1, 1], half of them mirrored, and class ids, of the built-in digits."""
    train_set, _ = load_images(DataConfig(channels=1))
    order = BatchOrder(len(train_set), size, first=step * num_passes, seed=0)
    found = []
    for i, rows in enumerate(itertools.islice(order, num_passes)):
        pixels, class_ids = train_set.__getitems__(rows)
        x = pixels.float() / 127.5 - 1
        mirrored = coin_flips(0.5, size, 0, step, i, num_passes)
        assert 0 < mirrored.sum() < size
        x[mirrored] = x[mirrored].flip(-1)
        found.append((x, class_ids))
    return found


def clipped(model: nn.Module, largest: float = CLIP) -> tuple[dict[str, Tensor], float]:
    """A model's gradients by name, scaled down to a norm of at most `largest`, and their norm before."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt().item()
    assert norm > largest  # otherwise clipping would not show
    return {name: g * largest / norm for name, g in gradients.items()}, norm


def check_update(saved: dict, part: str, optimizer: str, before: nn.Module, gradients: dict, settings: dict) -> None:
    """Checks a checkpoint's moments and weights of one update: AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
    betas, eps, lr, decay = settings["betas"], settings["eps"], settings["lr"], settings["decay"]
    groups, moments = saved[optimizer]["param_groups"], saved[optimizer]["state"]
    numbers = [number for group in groups for number in group["params"]]
    named = dict(before.named_parameters())
    matrices = {name for name, p in named.items() if p.ndim >= 2 and not name.startswith("quantizer.")}
    order = [n for n in named if n in matrices] + [n for n in named if n not in matrices]
    order = list(named) if len(groups) == 1 else order
    assert len(numbers) == len(order) == len(gradients)
    largest = max(g.abs().max() for g in gradients.values())
    for number, name in zip(numbers, order, strict=True):
        m, v = moments[number]["exp_avg"], moments[number]["exp_avg_sq"]
        torch.testing.assert_close(m / (1 - betas[0]), gradients[name], rtol=1e-3, atol=1e-4 * largest, msg=name)
        adam = m / (1 - betas[0]) / ((v / (1 - betas[1])).sqrt() + eps)
        expected = named[name] * (1 - lr * (decay if name in matrices else 0.0)) - lr * adam
        torch.testing.assert_close(saved[part][name], expected, rtol=1e-5, atol=1e-3 * lr, msg=name)


@pytest.mark.parametrize("every", [1, 2])
def test_one_update_of_a_vqgan_is_that_of_the_summed_loss(program, tmp_path, monkeypatch, every):
    """With every=2 D sees half of the images, and them changed: here darkened and upside down, not at random."""
    shown = (lambda x: 0.5 * x[::2].flip(2)) if every == 2 else (lambda x: x)
    monkeypatch.setattr("vqgen.adversarial.augment.diff_augment", lambda x, kinds: 0.5 * x.flip(2) if kinds else x)
    settings = [f"loss.adversarial.every={every}", *(["loss.adversarial.augment=[cutout]"] if every == 2 else [])]
    settings += ["loss.perceptual.name=alex", "loss.perceptual.start=0", "loss.perceptual.weight=0.5"]
    settings += ["loss.perceptual.every=4", "loss.adversarial.name=non_saturating", "loss.adversarial.start=0"]
    settings += ["loss.adversarial.ramp=0", "loss.adversarial.weight=0.7", "loss.adversarial.lecam=0.1"]
    settings += ["loss.adversarial.r1=0.01", "optim.name=adamw"]
    settings += ["discriminator.width=8", "discriminator.layers=2", *STEP]
    code, _, errors = program("stage1/train.py", "configs/debug/stage1.yaml", f"run_dir={tmp_path}", *settings)
    assert code == 0, errors
    config = read_yaml(tmp_path / "config.yaml")
    torch.manual_seed(0)
    model = build_tokenizer(**config["model"])
    perceptual = PerceptualDistance("alex", [])
    disc = PatchDiscriminator(1, **config["discriminator"])
    means: dict[str, float] = {}
    lecam = torch.zeros(2)
    for x, _ in first_batches(2, 8):
        x_rec, q = model(x)
        image_loss = (rec := F.mse_loss(x_rec, x)) + 0.5 * (distance := perceptual(x_rec[::4], x[::4]).mean())
        adv = F.softplus(-disc(shown(x_rec))).mean()
        norms = [torch.autograd.grad(term, model.last_layer, retain_graph=True)[0].norm() for term in (image_loss, adv)]
        weight = 0.7 * (norms[0] / (norms[1] + 1e-6)).detach()
        loss = image_loss + q[0].loss + weight * adv
        for p, g in zip(params := list(model.parameters()), torch.autograd.grad(loss, params), strict=True):
            p.grad = g / 2 if p.grad is None else p.grad + g / 2

        x.requires_grad_()
        real, fake = disc(torch.cat([shown(x), shown(x_rec.detach())])).chunk(2)  # once: a call changes spectral norm
        disc_loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        drift = F.relu(real - lecam[1]).square().mean() + F.relu(lecam[0] - fake).square().mean()
        slope = 0.5 * torch.autograd.grad(real.sum(), x, create_graph=True)[0].square().sum() / len(real)
        for p, g in zip(
            params := list(disc.parameters()),
            torch.autograd.grad(disc_loss + 0.1 * drift + 4 * 0.01 * slope, params),
            strict=True,
        ):
            p.grad = g / 2 if p.grad is None else p.grad + g / 2
        lecam = lecam + 0.01 * (torch.stack([real.mean(), fake.mean()]).detach() - lecam)
        terms = {"loss": loss, "rec_loss": rec, "perceptual_loss": distance, "adv_loss": adv, "adv_weight": weight}
        terms |= {"disc_loss": disc_loss, "lecam_loss": drift, "r1_loss": slope, "quantizer_loss": q[0].loss}
        for name, value in terms.items():
            means[name] = means.get(name, 0.0) + value.item() / 2

    saved, logged = state(tmp_path, 1), metrics(tmp_path)
    gradients, norm = clipped(model)
    disc_gradients, disc_norm = clipped(disc)
    means |= {"grad_norm": norm, "disc_grad_norm": disc_norm, "lr": 1e-2 * WARMUP}
    assert {name: logged[f"train/{name}"] for name in means} == pytest.approx(means, rel=2e-3)
    torch.manual_seed(0)
    before = build_tokenizer(**config["model"])
    PerceptualDistance("alex", [])
    disc_before = PatchDiscriminator(1, **config["discriminator"])
    adam = {"betas": (0.9, 0.99), "eps": 1e-8, "lr": 1e-2 * WARMUP, "decay": DECAY}
    check_update(saved, "model", "optimizer", before, gradients, adam)
    adam = {"betas": (0.5, 0.9), "eps": 1e-6, "lr": 2e-3, "decay": 0.0}
    check_update(saved, "disc", "disc_optimizer", disc_before, disc_gradients, adam)
    torch.testing.assert_close(torch.stack([saved["lecam"]["real_mean"], saved["lecam"]["fake_mean"]]), lecam)


def test_an_update_with_changed_latents_asks_for_the_images_so_transformed(program, tmp_path):
    """The second update, as the first has no transform. Half of the images have codes replaced before the decoder."""
    settings = ["train.max_steps=2", "train.checkpoint_every=1", "train.log_every=1", "train.batch_size=16", QUIET]
    settings += ["data.flip=true", "optim.grad_clip=1e9", "equivariance.share=1", "equivariance.flip=true"]
    settings += [
        "loss.adversarial.every=4",
        "perturb.images=0.5",
        "perturb.codes=0.6",
        "perturb.nearest=5",
        "perturb.end=1",
    ]
    settings += ["loss.adversarial.name=non_saturating", "loss.adversarial.start=0", "loss.adversarial.ramp=0"]
    settings += ["loss.adversarial.adaptive=false", "loss.adversarial.r1=0", "discriminator.layers=1"]
    settings += ["discriminator.width=8", "equivariance.scale=0.5", "optim.name=adamw"]
    settings += ["model.patch_size=4", "model.widths=[16,32]"]
    code, _, errors = program("stage1/train.py", "configs/debug/stage1.yaml", f"run_dir={tmp_path}", *settings)
    assert code == 0, errors
    config, first, second = read_yaml(tmp_path / "config.yaml"), state(tmp_path, 1), state(tmp_path, 2)
    model, disc = build_tokenizer(**config["model"]).train(), PatchDiscriminator(1, **config["discriminator"]).train()
    model.load_state_dict(first["model"])
    disc.load_state_dict(first["disc"])
    ((x, _),) = first_batches(1, 16, step=1)

    random = np.random.default_rng(mixed_seed(0, 1, 0, 1))
    assert random.random() < 1
    side, quarters, mirrored = random.integers(2, 4), random.integers(1, 4), random.random() < 0.5  # of a 4 x 4 latent
    change = {"mode": "bilinear", "antialias": True}
    z = F.interpolate(model.to_code(model.encoder(x)), size=(side, side), **change).rot90(quarters, (2, 3))
    asked = F.interpolate(x, size=(8 * side, 8 * side), **change).rot90(quarters, (2, 3))
    z, asked = (t.flip(3) if mirrored else t for t in (z, asked))
    q = model.quantizer(z)
    torch.manual_seed(mixed_seed(0, 1, 0))
    torch.rand(())  # decides between 8 and 9 images, of exactly 8
    chosen = torch.rand(8, 1, side, side) < 0.6
    ranks = torch.randint(1, 6, chosen.shape)
    vectors = model.quantizer.codebook[q.codes[:8]].squeeze(1)  # (8, H, W, D); the codebook has moved with z
    order = torch.cdist(vectors.flatten(0, 2), model.quantizer.codebook).argsort(dim=1)  # the code itself is first
    others = order.gather(1, ranks.view(-1, 1)).view(8, side, side)
    near = model.quantizer.codebook[others].movedim(3, 1)
    z_q = torch.cat([torch.where(chosen, near, q.z_q[:8]), q.z_q[8:]])
    x_rec = model.decoder(model.from_code(q.z_q + (z_q - q.z_q).detach()))
    rec, adv = F.mse_loss(x_rec, asked), F.softplus(-disc(x_rec[1::4])).mean()  # the second step's choice
    (rec + q.loss + 0.3 * adv).backward()
    real, fake = disc(torch.cat([asked[1::4], x_rec[1::4].detach()])).chunk(2)
    disc_loss = F.softplus(-real).mean() + F.softplus(fake).mean()
    logged = metrics(tmp_path)
    expected = {"rec_loss": rec, "adv_loss": adv, "disc_loss": disc_loss, "quantizer_loss": q.loss}
    expected |= {"grad_norm": nn.utils.clip_grad_norm_(model.parameters(), 1e9)}
    assert {name: logged[f"train/{name}"] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )
    torch.testing.assert_close(second["model"]["quantizer.codebook"], model.quantizer.codebook, rtol=1e-4, atol=1e-5)
    before, after = (saved["optimizer"]["state"] for saved in (first, second))
    numbers = [number for group in first["optimizer"]["param_groups"] for number in group["params"]]
    named = dict(model.named_parameters())
    order = [n for n, p in named.items() if p.ndim >= 2] + [n for n, p in named.items() if p.ndim < 2]
    largest = max(p.grad.abs().max() for p in named.values())
    for number, name in zip(numbers, order, strict=True):
        gradient = (after[number]["exp_avg"] - 0.9 * before[number]["exp_avg"]) / 0.1
        torch.testing.assert_close(gradient, named[name].grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("changed", [False, True], ids=["as it is", "context noise, random orders and label smoothing"])
def test_one_update_of_the_prior_is_that_of_its_loss_for_the_classes_that_were_not_hidden(
    runs, program, tmp_path, monkeypatch, changed
):
    def others(tokens: Tensor, ranges: Tensor, most: float, noise: Tensor) -> Tensor:
        assert (ranges == layout.token_ranges()).all()
        assert most == 0.4  # before the first step
        seen.append(noise)
        return torch.where(torch.arange(tokens.shape[1]) % 3 == 1, tokens.flip(0), tokens)

    def turned(share: float, noise: Tensor) -> Tensor:
        assert share == 1.0  # before the first step
        assert noise.shape == (8, 1 + layout.num_tokens)
        ordering.append(noise)
        return torch.stack([torch.arange(layout.num_tokens).roll(i + 1) for i in range(8)])

    seen: list[Tensor] = []
    ordering: list[Tensor] = []
    monkeypatch.setattr("vqgen.priors.objective.with_random_tokens", others)
    monkeypatch.setattr("vqgen.priors.objective.random_orders", turned)
    layout = load_tokenizer(runs / "stage1")[0].code_layout(32)
    arguments = [f"run_dir={tmp_path}", f"stage1={runs}/stage1", f"codes_dir={tmp_path}/codes", "class_dropout=0.5"]
    changes = ["context_noise=0.4", "random_orders=0.2", "label_smoothing=0.3"]
    arguments += changes if changed else ["context_noise=0"]
    code, _, errors = program("stage2/train.py", "configs/debug/stage2.yaml", *arguments, "optim.name=adamw", *STEP)
    assert code == 0, errors
    config = read_yaml(tmp_path / "config.yaml")
    tokenizer, _ = load_tokenizer(runs / "stage1")
    train_set, _ = load_images(DataConfig(channels=1))
    layout = tokenizer.code_layout(32)
    torch.manual_seed(0)
    prior = Prior(layout, train_set.class_names, **config["model"])
    if changed:
        prior.add_places(0.2)
    before = {name: p.detach().clone() for name, p in prior.named_parameters()}
    total, order = 0.0, BatchOrder(2 * len(train_set), 8, first=0, seed=0)  # each image and its mirror image
    for i, rows in enumerate(itertools.islice(order, 2)):
        rows = np.array(rows)
        pixels, class_ids = train_set.__getitems__(rows % len(train_set))
        x = pixels.float() / 127.5 - 1
        mirrored = torch.from_numpy(rows >= len(train_set))
        x[mirrored] = x[mirrored].flip(-1)
        tokens = layout.flatten(tokenizer.encode(x))
        hidden = coin_flips(0.5, 8, 0, 0, i, 2)
        class_ids = torch.where(hidden, -1, class_ids)
        if changed:
            places = turned(1.0, torch.empty(8, 1 + layout.num_tokens))
            context = others(tokens, layout.token_ranges(), 0.4, tokens).gather(1, places)
            logits, tokens = prior(context, class_ids, places), tokens.gather(1, places)
        else:
            logits = prior(tokens, class_ids)
        log_p = logits.log_softmax(dim=-1)
        loss = -log_p.gather(-1, tokens[..., None]).mean()
        total += loss.item() / 2
        if changed:
            loss = 0.7 * loss - 0.3 * log_p.mean()
        (loss / 2).backward()
    if changed:
        first, second = seen[:2]  # the two passes of the program
        assert first.shape == second.shape == (8, 1 + 2 * layout.num_tokens)
        assert not torch.equal(first, second)
        assert not torch.isin(torch.cat(ordering[:2]), torch.cat([first, second])).any()  # numbers of its own
    gradients, norm = clipped(prior)
    logged = metrics(tmp_path)
    assert logged["train/loss"] == pytest.approx(total, rel=1e-5)
    assert logged["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert logged["train/lr"] == pytest.approx(6e-3 * WARMUP)
    with torch.no_grad():
        for name, p in prior.named_parameters():
            p.copy_(before[name])
    adam = {"betas": (0.9, 0.95), "eps": 1e-8, "lr": 6e-3 * WARMUP, "decay": DECAY}
    check_update(state(tmp_path, 1), "model", "optimizer", prior, gradients, adam)


def test_muon_moves_the_prior_s_hidden_matrices_and_adamw_the_tables_of_tokens(runs, program, tmp_path):
    arguments = [f"run_dir={tmp_path}", f"stage1={runs}/stage1", f"codes_dir={tmp_path}/codes", *STEP]
    arguments += ["class_dropout=0", "context_noise=0", "data.flip=false", "train.accumulation=1"]
    code, _, errors = program("stage2/train.py", "configs/debug/stage2.yaml", *arguments)
    assert code == 0, errors
    tokenizer, _ = load_tokenizer(runs / "stage1")
    train_set, _ = load_images(DataConfig(channels=1))
    layout = tokenizer.code_layout(32)
    torch.manual_seed(0)
    prior = Prior(layout, train_set.class_names, **read_yaml(tmp_path / "config.yaml")["model"])
    before = {name: p.detach().clone() for name, p in prior.named_parameters()}
    pixels, class_ids = train_set.__getitems__(np.array(next(iter(BatchOrder(len(train_set), 16, first=0, seed=0)))))
    tokens = layout.flatten(tokenizer.encode(pixels.float() / 127.5 - 1))
    F.cross_entropy(prior(tokens, class_ids).transpose(1, 2), tokens).backward()
    gradients, _ = clipped(prior)
    after, lr, by_muon = state(tmp_path, 1)["model"], 6e-3 * WARMUP, 0
    for name, gradient in gradients.items():
        if ".layers." not in name or gradient.ndim == 1:
            continue
        by_muon += 1
        wide = gradient if len(gradient) <= gradient.shape[1] else gradient.T
        step = orthogonalised(wide[None])[0]  # of g + 0.95 g, whose size does not matter
        step = step if len(gradient) <= gradient.shape[1] else step.T
        expected = before[name] * (1 - lr * DECAY) - 0.2 * max(gradient.shape) ** 0.5 * lr * step
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=2e-3 * lr, msg=name)
    assert by_muon == 2 * 7  # q, k, v, o, gate, up and down of two layers
    groups = state(tmp_path, 1)["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups if group["muon"]) == by_muon


def test_a_prior_that_gets_no_better_ends_early_and_the_best_is_kept(runs, program, tmp_path, monkeypatch):
    """The held-out NLL is given here, evaluation by evaluation."""
    given, seen = iter([3.0, 2.0, 2.5, 2.1]), []

    def prior_nll(prior: Prior, *others: object) -> float:
        seen.append({name: p.clone() for name, p in prior.state_dict().items()})
        return next(given)

    monkeypatch.setattr("vqgen.evaluation.likelihood.prior_nll", prior_nll)
    arguments = [f"run_dir={tmp_path}", f"stage1={runs}/stage1", f"codes_dir={tmp_path}/codes", QUIET]
    arguments += ["train.eval_every=3", "train.patience=2", "train.max_steps=100", "train.checkpoint_every=1000"]
    code, printed, errors = program("stage2/train.py", "configs/debug/stage2.yaml", *arguments)
    assert code == 0, errors
    assert len(seen) == 4
    assert "train.patience=2: 2 evaluations had no lower held-out NLL, at step 12" in printed
    assert "the prior and its tokenizer of step 6, the best on held-out images:" in printed
    kept = Prior.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(kept[name], p) for name, p in seen[1].items())
    assert not all(torch.equal(kept[name], p) for name, p in seen[3].items())
    assert all(torch.equal(kept[name], p) for name, p in state(tmp_path, 12)["ema"].items())  # what init_from takes
    card = (tmp_path / "model/README.md").read_text()
    assert "6 steps" in card
    assert "2.5" not in card
    code, printed, errors = program("stage2/train.py", "configs/debug/stage2.yaml", *arguments)
    assert code == 0, errors
    assert "is finished, at step 12" in printed


def test_a_run_that_goes_on_knows_the_best_prior_so_far(runs, program, tmp_path, monkeypatch):
    given = iter([2.0, 3.0, 2.5, 2.4])
    monkeypatch.setattr("vqgen.evaluation.likelihood.prior_nll", lambda *given_to_it: next(given))
    save, stops = Run.save, iter([False, True])

    def interrupted(self: Run, *arguments: object) -> None:
        save(self, *arguments)
        if next(stops, False):
            raise RuntimeError("stopped here")

    arguments = [f"run_dir={tmp_path}", f"stage1={runs}/stage1", f"codes_dir={tmp_path}/codes", QUIET]
    arguments += ["train.eval_every=3", "train.patience=3", "train.checkpoint_every=4", "train.max_steps=100"]
    monkeypatch.setattr(Run, "save", interrupted)
    with pytest.raises(RuntimeError, match="stopped here"):  # after the checkpoint of step 8
        program("stage2/train.py", "configs/debug/stage2.yaml", *arguments)
    monkeypatch.setattr(Run, "save", save)
    saved = state(tmp_path, 8)["best"]
    assert (saved["figure"], saved["step"], saved["waited"]) == (2.0, 3, 1)
    code, printed, errors = program("stage2/train.py", "configs/debug/stage2.yaml", *arguments)
    assert code == 0, errors
    assert "going on from step 8" in printed
    assert "3 evaluations had no lower held-out NLL, at step 12" in printed
    assert "of step 3, the best on held-out images" in printed
    kept = Prior.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(kept[name], saved["weights"][name]) for name in kept)


def test_d_of_the_gan_learns_nothing_from_the_loss_of_g(program, tmp_path):
    """Any gradient of G's loss in D's weights would be part of D's second update."""
    arguments = [f"run_dir={tmp_path}", *STEP, "train.max_steps=2", "train.checkpoint_every=1", "optim.grad_clip=1e9"]
    code, _, errors = program("stage1/train_gan.py", "configs/debug/gan.yaml", *arguments)
    assert code == 0, errors
    config, first, second = read_yaml(tmp_path / "config.yaml"), state(tmp_path, 1), state(tmp_path, 2)
    generator = DCGANGenerator(32, 1, [str(i) for i in range(10)], **config["generator"])
    disc = DCGANDiscriminator(32, 1, 10, **config["discriminator"])
    generator.load_state_dict(first["model"])
    disc.load_state_dict(first["disc"])
    noise = torch.randn(16, 100, generator=torch.Generator().manual_seed(mixed_seed(0, 1, 0)))
    for i, (x, class_ids) in enumerate(first_batches(2, 8, step=1)):
        fakes = generator(noise[8 * i : 8 * (i + 1)], class_ids).detach()
        loss = F.softplus(-disc(x, class_ids)).mean() + F.softplus(disc(fakes, class_ids)).mean()
        (loss / 2).backward()
    before, after = (saved["disc_optimizer"]["state"] for saved in (first, second))
    numbers = [number for group in first["disc_optimizer"]["param_groups"] for number in group["params"]]
    named = dict(disc.named_parameters())
    order = [n for n, p in named.items() if p.ndim >= 2] + [n for n, p in named.items() if p.ndim < 2]
    largest = max(p.grad.abs().max() for p in named.values())
    for number, name in zip(numbers, order, strict=True):
        gradient = (after[number]["exp_avg"] - 0.5 * before[number]["exp_avg"]) / 0.5
        torch.testing.assert_close(gradient, named[name].grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_one_update_of_the_gan_is_a_step_of_d_and_then_one_of_g_against_it(program, tmp_path):
    arguments = [f"run_dir={tmp_path}", *STEP, "optim.grad_clip=0.001"]
    code, _, errors = program("stage1/train_gan.py", "configs/debug/gan.yaml", *arguments)
    assert code == 0, errors
    config, saved, logged = read_yaml(tmp_path / "config.yaml"), state(tmp_path, 1), metrics(tmp_path)

    def built() -> tuple[DCGANGenerator, DCGANDiscriminator]:
        torch.manual_seed(0)
        generator = DCGANGenerator(32, 1, [str(i) for i in range(10)], **config["generator"])
        return generator, DCGANDiscriminator(32, 1, 10, **config["discriminator"])

    def noise(turn: int, i: int) -> Tensor:
        source = torch.Generator().manual_seed(mixed_seed(0, 0, turn))
        return torch.randn(16, config["generator"]["latent_dim"], generator=source)[8 * i : 8 * (i + 1)]

    generator, disc = built()
    batches, disc_loss, gen_loss = first_batches(2, 8), 0.0, 0.0
    for i, (x, class_ids) in enumerate(batches):
        fakes = generator(noise(0, i), class_ids).detach()
        loss = F.softplus(-disc(x, class_ids)).mean() + F.softplus(disc(fakes, class_ids)).mean()
        (loss / 2).backward()
        disc_loss += loss.item() / 2
    disc_gradients, disc_norm = clipped(disc, 0.001)
    adam = {"betas": (0.5, 0.999), "eps": 1e-8, "lr": 2e-4 * WARMUP, "decay": DECAY}
    check_update(saved, "disc", "disc_optimizer", built()[1], disc_gradients, adam)

    with torch.no_grad():
        for name, p in disc.named_parameters():
            p.copy_(saved["disc"][name])  # the D that G learns against
    for i, (_, class_ids) in enumerate(batches):
        loss = F.softplus(-disc(generator(noise(1, i), class_ids), class_ids)).mean()
        for p, g in zip(
            params := list(generator.parameters()), torch.autograd.grad(loss, params), strict=True
        ):  # D does not learn
            p.grad = g / 2 if p.grad is None else p.grad + g / 2
        gen_loss += loss.item() / 2
    gradients, norm = clipped(generator, 0.001)
    expected = {"disc_loss": disc_loss, "gen_loss": gen_loss, "grad_norm": norm, "disc_grad_norm": disc_norm}
    assert {name: logged[f"train/{name}"] for name in expected} == pytest.approx(expected, rel=1e-3)
    check_update(saved, "model", "optimizer", built()[0], gradients, adam | {"lr": 1e-3 * WARMUP})


# The average, which is evaluated and saved


FIVE = [
    "train.max_steps=5",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=9",
    "train.eval_every=5",
    "train.ema=0.2",
]
FIVE += ["train.eval_images=100", QUIET]


@pytest.mark.parametrize("name", ["stage1/train", "stage1/train_gan", "stage2/train"])
def test_the_average_follows_its_formula_and_is_what_is_saved(runs, program, tmp_path, name):
    config = {"stage1/train_gan": "gan"}.get(name, name.split("/")[0])
    arguments = [f"configs/debug/{config}.yaml", f"run_dir={tmp_path}", *FIVE]
    arguments += [f"stage1={runs}/stage1"] if name == "stage2/train" else []
    code, _, errors = program(f"{name}.py", *arguments)
    assert code == 0, errors
    # EDM2's power profile: for a width sigma, gamma solves sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    gamma = max(root.real for root in np.roots([1, 7, 16 - 25, 12 - 25]))
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.2**2)
    steps = [state(tmp_path, step) for step in range(1, 6)]
    (file,) = (path for path in tmp_path.glob("model/**/model.safetensors") if "tokenizer" not in path.parts)
    shared = {key.removeprefix("model."): x for key, x in load_file(file).items()}
    averaged = 0
    for key, last in steps[-1]["model"].items():
        if not last.is_floating_point() or "running" in key:
            continue
        expected = torch.zeros_like(last)
        for t, saved in enumerate(steps, start=1):
            expected = expected + (1 - (1 - 1 / t) ** (gamma + 1)) * (saved["model"][key] - expected)
        is_average = "quantizer" not in key
        torch.testing.assert_close(steps[-1]["ema"][key], expected if is_average else last, rtol=1e-4, atol=1e-6)
        averaged += is_average and not torch.equal(expected, last)
        in_file = [x for k, x in shared.items() if k == key or key.endswith(k)]
        assert any(x.shape == last.shape and torch.equal(x, steps[-1]["ema"][key]) for x in in_file), key
    assert averaged > 10


def test_validation_of_stage1_is_of_the_shared_model_on_held_out_images(program, tmp_path):
    arguments = [f"run_dir={tmp_path}", *FIVE, "data.val_fraction=0.1"]
    code, _, errors = program("stage1/train.py", "configs/debug/stage1.yaml", *arguments)
    assert code == 0, errors
    model, _ = load_tokenizer(tmp_path)
    train_set, held_out = load_images(DataConfig(channels=1))
    rows = np.linspace(0, len(held_out) - 1, 100, dtype=int)
    x = held_out.__getitems__(rows)[0].float() / 127.5 - 1
    x_rec = model.decode(codes := model.encode(x))
    mse = (x_rec.clamp(-1, 1) - x).square().mean().item()
    used = [len(part.unique()) for part in codes]
    logged = metrics(tmp_path)
    assert logged["val/psnr"] == pytest.approx(10 * math.log10(4 / mse), abs=1e-3)
    assert logged["val/usage"] == pytest.approx(used[0] / 64)
    pixels, rounded = (np.round((y.detach().numpy().astype(float) + 1) * 127.5).clip(0, 255) for y in (x, x_rec))
    per_image = 10 * np.log10(255**2 / np.square(rounded - pixels).mean(axis=(1, 2, 3)))
    assert logged["val/psnr_per_image"] == pytest.approx(per_image.mean(), abs=1e-3)
    assert per_image.mean() > logged["val/psnr"] + 1e-3  # Jensen's inequality: the two figures differ
    others = train_set.__getitems__(rows)[0].float() / 127.5 - 1
    raw = build_tokenizer(**read_yaml(tmp_path / "config.yaml")["model"]).eval()
    raw.load_state_dict(state(tmp_path, 5)["model"])
    for wrong_model, wrong_x in ((model, others), (raw, x)):
        mse = (wrong_model.decode(wrong_model.encode(wrong_x)).clamp(-1, 1) - wrong_x).square().mean().item()
        assert logged["val/psnr"] != pytest.approx(10 * math.log10(4 / mse), abs=2e-3)


def test_validation_of_stage2_is_of_the_shared_prior_on_held_out_codes(runs, program, tmp_path):
    arguments = [f"run_dir={tmp_path}", f"stage1={runs}/stage1", *FIVE]
    code, _, errors = program("stage2/train.py", "configs/debug/stage2.yaml", *arguments, "train.eval_images=2000")
    assert code == 0, errors
    prior = Prior.from_pretrained(tmp_path / "model/prior").eval()
    tokenizer, _ = load_tokenizer(tmp_path / "model/tokenizer")
    nll = {}
    for name, images in zip(("train", "val"), load_images(DataConfig(channels=1)), strict=True):
        pixels, class_ids = images.__getitems__(np.arange(2000))
        tokens = prior.layout.flatten(tokenizer.encode(pixels.float() / 127.5 - 1))
        log_p = prior(tokens, class_ids).log_softmax(dim=-1).gather(-1, tokens[..., None])
        nll[name] = -log_p.mean().item()
    logged = metrics(tmp_path)
    assert logged["val/nll"] == pytest.approx(nll["val"], rel=1e-5)
    assert logged["val/nll"] != pytest.approx(nll["train"], rel=2e-5)
    assert logged["val/code_bits_per_dim"] == pytest.approx(nll["val"] / math.log(2) * 16 / 32**2, rel=1e-5)


class TwoMaps(Light):
    """An architecture with a second code map, of eight codes, from the same vectors as the first map."""

    def __init__(self, channels: int = 3, widths: Sequence[int] = (8, 16), quantizer: dict[str, Any] | None = None):
        super().__init__(channels=channels, widths=widths, quantizer=quantizer)
        self.second = build_quantizer(name="ema", codebook_size=8, code_dim=self.quantizer.code_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, list[QuantizerOutput]]:
        z = self.to_code(self.encoder(x))
        q = [self.quantizer(z), self.second(z)]
        return self.decoder(self.from_code(q[0].z_q + q[1].z_q)), q

    def code_layout(self, size: int) -> CodeLayout:
        shape = super().code_layout(size).shapes[0]
        return CodeLayout((shape, shape), (self.quantizer.codebook_size, 8))


def test_usage_is_of_all_code_maps(program, monkeypatch, tmp_path):
    monkeypatch.setitem(ARCHITECTURES, "two", TwoMaps)
    arguments = [
        f"run_dir={tmp_path}",
        "model.name=two",
        "model.quantizer.codebook_size=4096",
        *FIVE,
        "train.log_every=5",
    ]
    code, _, errors = program("stage1/train.py", *arguments)
    assert code == 0, errors
    model = build_tokenizer(**read_yaml(tmp_path / "config.yaml")["model"]).eval()
    model.load_state_dict(state(tmp_path, 5)["ema"])
    held_out = load_images(DataConfig(channels=1))[1]
    x = held_out.__getitems__(np.linspace(0, len(held_out) - 1, 100, dtype=int))[0].float() / 127.5 - 1
    used = [len(out.codes.unique()) for out in model(x)[1]]
    assert used[0] < 1000  # of 4,096 codes, so the second map's share differs
    logged = metrics(tmp_path)
    assert logged["val/usage"] == pytest.approx((used[0] / 4096 + used[1] / 8) / 2)
    assert logged["train/usage"] > 0.5  # the second map's 8 codes, nearly all used, count as much as the first's 4,096


# The shape of the house


FLOORS = [  # from low to high; a room may import from lower lines and from its own line
    ["errors", "codes", "distributed"],
    ["settings", "yaml_file"],
    ["adversarial", "quantizers"],
    ["tokenizers"],
    ["data"],
    ["training"],
    ["priors"],
    ["evaluation"],
    ["generator", "planning"],
    ["cli"],
]


def test_no_room_imports_from_above_it():
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    for path in (ROOT / "vqgen").rglob("*.py"):
        room = path.relative_to(ROOT / "vqgen").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                parts = name.split(".")
                if name == "vqgen" and isinstance(node, ast.ImportFrom):
                    assert path.parts[-2:] == ("vqgen", "__init__.py"), f"{path} imports a public name, by any room"
                if parts[0] == "vqgen" and len(parts) > 1:
                    above = floor[parts[1]] > floor[room]
                    assert not above, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("name", ["stage1/train.py", "stage1/train_gan.py", "stage2/train.py"])
def test_a_loop_fits_on_a_screen_and_nothing_calls_it_back(name):
    tree = ast.parse((ROOT / name).read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    train = functions["train"]
    assert train.end_lineno - train.lineno + 1 <= 100
    handed_on = [
        argument.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(argument, ast.Name) and argument.id in functions
    ]
    assert handed_on == ["main"]  # to run_program, which frames a program, not a loop
    assert not any(isinstance(node, ast.Lambda) for node in ast.walk(tree))


def test_the_time_spent_on_getting_batches_is_logged(tmp_path, monkeypatch, program):
    wait, take = 0.05, ImageSet.__getitems__

    def slow(self: ImageSet, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        time.sleep(wait)
        return take(self, indices)

    monkeypatch.setattr(ImageSet, "__getitems__", slow)
    settings = ["train.max_steps=4", "train.log_every=2", "train.batch_size=16", "train.accumulation=2", QUIET]
    code, _, errors = program("stage1/train.py", "configs/debug/stage1.yaml", f"run_dir={tmp_path}/run", *settings)
    assert code == 0, errors
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "train/data_time" in line):
        seconds = 2 * 16 / line["train/images_per_second"]  # of the two steps
        assert 4 * wait <= line["train/data_time"] * seconds <= seconds
