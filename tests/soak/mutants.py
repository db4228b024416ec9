"""Plants one bug at a time in a copy of the project, runs the tests that should notice, and prints a table.

python tests/soak/mutants.py [WORDS ...]    # mutants whose description has all these words; without words, all mutants

A mutant whose tests fail is killed. A mutant that survives shows a fault that the tests do not see. All mutants take
about twenty minutes on two cores.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
JOBS = 2
LOOPS, GAN, FAULTS = "tests/test_loops.py", "tests/test_gan.py", "tests/test_faults.py"
INIT = "tests/test_init_from.py"
TRAINING, CODEBOOK = "tests/training/test_training.py", "tests/quantizers/test_codebook.py"


class Mutant(NamedTuple):
    """A bug in words, its file, the old and the new text, and the tests that should notice it (pytest's -k)."""

    bug: str
    file: str
    old: str
    new: str
    tests: str
    chosen: str = ""


MUTANTS = [
    # Codes that a prior draws anew
    Mutant(
        "the decoder sees the images' own codes, not those drawn anew",
        "vqgen/priors/redraw.py",
        "torch.where(kept, tokens, drawn)",
        "torch.where(kept, tokens, tokens)",
        "tests/priors/test_redraw.py",
        "follow",
    ),
    Mutant(
        "codes drawn anew are the likeliest",
        "vqgen/priors/redraw.py",
        "drawn = (logits - torch.empty_like(logits).exponential_().log())",
        "drawn = logits",
        "tests/priors/test_redraw.py",
        "follow",
    ),
    # The start from other weights, and frozen parts
    Mutant(
        "a run starts from the weights of the last step, not from their average",
        "vqgen/training/origin.py",
        'self.model.load_state_dict(state["ema"])',
        'self.model.load_state_dict(state["model"])',
        INIT,
    ),
    Mutant(
        "a run starts from init_from again instead of its own checkpoint",
        "vqgen/training/run.py",
        "if not object_from_main(has_checkpoint(self.dir)):",
        "if True:",
        INIT,
    ),
    Mutant(
        "a codebook that came without counts moves to the first batches",
        "vqgen/quantizers/codebook.py",
        "self.num_updates.fill_(round(10 / (1 - self.decay)))",
        "self.num_updates.fill_(1)",
        CODEBOOK,
    ),
    Mutant(
        "classes keep their weights by their number, not by their name",
        "vqgen/training/origin.py",
        "(first + i, first + place[name])",
        "(first + i, first + i)",
        INIT,
    ),
    Mutant(
        "a frozen quantizer goes on moving its codes",
        "vqgen/tokenizers/vqmodel.py",
        "            getattr(self, name).eval()\n",
        "            pass\n",
        "tests/tokenizers/test_vqmodel.py",
        "frozen or codes_that",
    ),
    # Codes for the prior
    Mutant(
        "the images are not transformed as their latents are",
        "stage1/train.py",
        "    x = asked\n",
        "",
        LOOPS,
        "changed_latents",
    ),
    Mutant(
        "the discriminator sees the transformed images mirrored",
        "stage1/train.py",
        "discriminator_pass(nets, asked, x_rec",
        "discriminator_pass(nets, asked.flip(3), x_rec",
        LOOPS,
        "changed_latents",
    ),
    Mutant(
        "no gradient passes replaced codes",
        "vqgen/quantizers/common.py",
        "return straight_through(q.z_q, z_q)",
        "return z_q + 0 * q.z_q.sum()",
        "tests/quantizers/test_neighbours.py",
    ),
    Mutant(
        "a code is its own neighbour's equal",
        "vqgen/quantizers/common.py",
        "scores.scatter_(1, part[:, None], torch.inf)",
        "pass",
        "tests/quantizers/test_neighbours.py",
    ),
    Mutant(
        "small batches have no replaced codes",
        "vqgen/tokenizers/latents.py",
        'int(config.images * batch + torch.rand((), device="cpu").item())',
        "int(config.images * batch)",
        "tests/tokenizers/test_latents.py",
    ),
    Mutant(
        "pFD is of codes that are not perturbed",
        "stage1/evaluate.py",
        "maps.append(model.quantizer.replace(part, Replacements(ranks.to(part.device), nearest)))",
        "maps.append(part)",
        "tests/test_evaluate.py",
        "pfd_is",
    ),
    # The average, which is evaluated and saved
    Mutant(
        "the average is updated with the wrong step number",
        "stage1/train.py",
        "nets.average.update(nets.tokenizer, now.step + 1)",
        "nets.average.update(nets.tokenizer, now.step + 2)",
        LOOPS,
        "average",
    ),
    Mutant(
        "the prior's average is updated with the wrong step number",
        "stage2/train.py",
        "nets.average.update(nets.prior, now.step + 1)",
        "nets.average.update(nets.prior, 10 * now.step + 1)",
        LOOPS,
        "average",
    ),
    Mutant(
        "the GAN's average follows D's step number twice",
        "stage1/train_gan.py",
        "nets.average.update(nets.bare_generator, now.step + 1)",
        "nets.average.update(nets.bare_generator, 2 * now.step + 1)",
        LOOPS,
        "average",
    ),
    Mutant(
        "validation of stage 1 is of training images",
        "stage1/train.py",
        "evaluate(nets.average.model, val_set,",
        "evaluate(nets.average.model, train_set,",
        LOOPS,
        "validation",
    ),
    Mutant(
        "validation of stage 1 is of the raw weights",
        "stage1/train.py",
        "evaluate(nets.average.model, val_set,",
        "evaluate(nets.tokenizer, val_set,",
        LOOPS,
        "validation",
    ),
    Mutant(
        "val/nll is of training codes",
        "stage2/train.py",
        "prior_nll(prior, val_codes,",
        "prior_nll(prior, train_codes,",
        LOOPS,
        "validation",
    ),
    Mutant(
        "val/nll is of the raw weights",
        "stage2/train.py",
        "prior_nll(prior, val_codes,",
        "prior_nll(nets.prior, val_codes,",
        LOOPS,
        "validation",
    ),
    Mutant(
        "stage 1 shares the raw weights in place of the average",
        "stage1/train.py",
        'run.save(now, state, {"": nets.average})',
        'run.save(now, state, {"": nets.tokenizer})',
        LOOPS,
        "average",
    ),
    Mutant(
        "stage 2 shares the raw weights in place of the average",
        "stage2/train.py",
        'run.save(now, state, {"prior": nets.average,',
        'run.save(now, state, {"prior": nets.prior,',
        LOOPS,
        "average",
    ),
    Mutant(
        "queries and keys are rotated the other way",
        "vqgen/priors/decoder.py",
        "torch.complex(cos, sin)",
        "torch.complex(cos, -sin)",
        "tests/priors/test_decoder.py",
        "transformers",
    ),
    Mutant(
        "torch's fused attention on CPUs",
        "vqgen/priors/decoder.py",
        "if q.is_cuda:",
        "if True:",
        "tests/priors/test_sampling.py",
        "batches",
    ),
    Mutant(
        "the sequences without a class do not catch up when guidance begins",
        "vqgen/priors/sampling.py",
        "if seen < place:",
        "if seen < place and group == 0:",
        "tests/priors/test_sampling.py",
        "schedule",
    ),
    Mutant(
        "the random tokens of the context are targets too",
        "stage2/train.py",
        "targets=tokens,",
        "targets=context,",
        LOOPS,
        "prior",
    ),
    Mutant(
        "what is drawn comes before what is known",
        "vqgen/priors/sampling.py",
        "last = tokens < 0 if prior.random_orders",
        "last = tokens >= 0 if prior.random_orders",
        "tests/priors/test_sampling.py",
        "order",
    ),
    Mutant(
        "a prior of any order does not learn which place comes next",
        "vqgen/priors/prior.py",
        "return self.next(order) + F.pad",
        "return F.pad",
        "tests/priors/test_prior.py",
        "order",
    ),
    Mutant(
        "random orders are for the context alone",
        "stage2/train.py",
        "context, tokens = context.gather(1, order), tokens.gather(1, order)",
        "context = context.gather(1, order)",
        LOOPS,
        "prior",
    ),
    Mutant(
        "windows of a larger image know nothing of each other",
        "vqgen/priors/sampling.py",
        "known = layout.flatten(window).masked_fill(unknown, -1)",
        "known = layout.flatten(window).fill_(-1)",
        "tests/test_control.py",
        "windows",
    ),
    Mutant(
        "the worst scale of guidance is taken",
        "stage2/sample.py",
        "best = min(figures",
        "best = max(figures",
        "tests/test_tuning.py",
        "tunes",
    ),
    Mutant(
        "the least likely class is kept",
        "stage2/sample.py",
        "return log_p.gather(1, class_ids[:, None])[:, 0]",
        "return -log_p.gather(1, class_ids[:, None])[:, 0]",
        "tests/test_control.py",
        "classifier",
    ),
    Mutant(
        "a run that ends early keeps its last prior",
        "stage2/train.py",
        "nets.average.load_state_dict(best.weights)",
        "pass",
        LOOPS,
        "best",
    ),
    Mutant(
        "Muon moves the tables of tokens too",
        "stage2/train.py",
        "muon_groups(groups, prior.tables_and_scales)",
        "muon_groups(groups, [])",
        LOOPS,
        "muon",
    ),
    Mutant(
        "the GAN shares the raw weights in place of the average",
        "stage1/train_gan.py",
        '{"generator": nets.average}',
        '{"generator": nets.bare_generator}',
        LOOPS,
        "average",
    ),
    Mutant(
        "the average takes codebooks in slowly",
        "vqgen/training/average.py",
        'if name.endswith("codebook"):',
        'if name.endswith("codes"):',
        TRAINING,
        "codebooks",
    ),
    Mutant(
        "usage ignores all but the first code map",
        "vqgen/evaluation/metrics.py",
        "for part in codes:",
        "for part in codes[:1]:",
        "tests/evaluation/test_metrics.py",
        "usage",
    ),
    Mutant(
        "training's usage ignores all but the first code map",
        "stage1/train.py",
        "usage.update(codes)",
        "usage.update(codes[:1])",
        LOOPS,
        "all_code_maps",
    ),
    Mutant(
        "validation's usage ignores all but the first code map",
        "stage1/train.py",
        "usage.update([out.codes for out in q])",
        "usage.update([q[0].codes])",
        LOOPS,
        "all_code_maps",
    ),
    # The step of stage 1
    Mutant(
        "data.flip is ignored",
        "vqgen/data/order.py",
        "place.flips(0.5) if data.flip else",
        "place.flips(0.5) if False else",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "flips turn images upside down",
        "vqgen/data/order.py",
        "x.flip(-1), x)",
        "x.flip(-2), x)",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "the perceptual gradient has the wrong sign",
        "stage1/train.py",
        "gradient = gradient + perceptual.weight * perceptual_gradient",
        "gradient = gradient - perceptual.weight * perceptual_gradient",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "the perceptual weight is left out of the gradient",
        "stage1/train.py",
        "gradient = gradient + perceptual.weight * perceptual_gradient",
        "gradient = gradient + perceptual_gradient",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "the adversarial gradient has the wrong sign",
        "stage1/train.py",
        "gradient = gradient + adv_weight * adv_gradient",
        "gradient = gradient - adv_weight * adv_gradient",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "the adaptive weight forgets the perceptual gradient",
        "stage1/train.py",
        "adaptive_weight(gradient, adv_gradient,",
        "adaptive_weight(torch.autograd.grad(F.mse_loss(y, x), y)[0], adv_gradient,",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "the quantizer's loss has no gradient",
        "stage1/train.py",
        'run.accelerator.backward(losses["quantizer_loss"] + (x_rec * gradient).sum())',
        "run.accelerator.backward((x_rec * gradient).sum())",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "the decoder's adversarial loss also trains D",
        "stage1/train.py",
        '(adv_gradient,) = torch.autograd.grad(losses["adv_loss"], y)',
        '(adv_gradient,) = torch.autograd.grad(losses["adv_loss"], y, retain_graph=True)\n'
        '        losses["adv_loss"].backward()',
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "R1 is not weighted for the steps it leaves out",
        "stage1/train.py",
        'loss = loss + adversarial.r1 * R1_EVERY * losses["r1_loss"]',
        'loss = loss + adversarial.r1 * losses["r1_loss"]',
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "LeCam's loss is logged and not learned",
        "stage1/train.py",
        'loss = loss + adversarial.lecam * losses["lecam_loss"]',
        "loss = loss",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "D always sees the first images, which are the perturbed ones",
        "stage1/train.py",
        "return images[now.step % min(n, len(images)) :: n]",
        "return images[::n]",
        LOOPS,
        "changed_latents",
    ),
    Mutant(
        "D learns from images that are not changed",
        "stage1/train.py",
        "diff_augment(torch.cat([x.requires_grad_(penalised), x_rec]), adversarial.augment)",
        "diff_augment(torch.cat([x.requires_grad_(penalised), x_rec]), [])",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "the decoder's judge sees images that are not changed",
        "stage1/train.py",
        "diff_augment(every_nth(y, adversarial.every, now), adversarial.augment)",
        "every_nth(y, adversarial.every, now)",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "D learns from reconstructions as if they were real",
        "stage1/train.py",
        "torch.cat([x.requires_grad_(penalised), x_rec])",
        "torch.cat([x_rec, x.requires_grad_(penalised)])",
        LOOPS,
        "vqgan",
    ),
    Mutant(
        "D has the tokenizer's learning rate",
        "stage1/train.py",
        "run.lowered * disc_lr_at(now.share, config)",
        "run.lowered * lr_at(now.share, config.optim)",
        LOOPS,
        "vqgan",
    ),
    # The common part of all loops
    Mutant(
        "gradients are not clipped",
        "vqgen/training/run.py",
        "self.accelerator.clip_grad_norm_(model.parameters(), self.config.optim.grad_clip)",
        "self.accelerator.clip_grad_norm_(model.parameters(), 1e9)",
        LOOPS,
        "update_of",
    ),
    Mutant(
        "accumulation does not divide",
        "vqgen/training/run.py",
        "gradient_accumulation_steps=config.train.accumulation,",
        "",
        LOOPS,
        "update_of",
    ),
    Mutant(
        "passes are summed in the log",
        "vqgen/training/run.py",
        "accumulate(self._terms, terms, self.accumulation)",
        "accumulate(self._terms, terms, 1)",
        LOOPS,
        "update_of",
    ),
    Mutant(
        "a resumed run forgets accumulation",
        "vqgen/training/run.py",
        "first=self.step * self.accumulation)",
        "first=self.step)",
        FAULTS,
        "again_and_again",
    ),
    Mutant(
        "a resumed run starts its epoch anew",
        "vqgen/training/run.py",
        "first=self.step * self.accumulation)",
        "first=0)",
        FAULTS,
        "again_and_again",
    ),
    Mutant(
        "weight decay on norms and biases",
        "vqgen/training/schedule.py",
        '{"params": kept, "weight_decay": 0.0}',
        '{"params": kept, "weight_decay": weight_decay}',
        f"{LOOPS} {TRAINING}",
        "update_of or parameter_groups",
    ),
    Mutant(
        "the learning rate ignores warm-up",
        "vqgen/training/schedule.py",
        "return optim.lr * warmup * 0.5",
        "return optim.lr * 0.5",
        f"{LOOPS} {TRAINING}",
        "update_of or warm",
    ),
    Mutant(
        "the learning rate is computed and not set",
        "vqgen/training/schedule.py",
        '        group["lr"] = lr\n',
        "        pass\n",
        LOOPS,
        "update_of",
    ),
    Mutant(
        "rollbacks lower nothing",
        "vqgen/training/run.py",
        "return 0.5**self.rollbacks",
        "return 1.0",
        f"{TRAINING} {GAN}",
        "halved or overflows",
    ),
    Mutant(
        "a step that is not finite is taken",
        "vqgen/training/run.py",
        "optimizer.optimizer.found_inf = bad",
        "pass",
        TRAINING,
        "not_finite",
    ),
    Mutant(
        "each step repeats the same random numbers",
        "vqgen/training/run.py",
        "seed_step(self.config.seed, self.step)",
        "seed_step(self.config.seed, 0)",
        TRAINING,
        "random_numbers",
    ),
    Mutant(
        "the optimizer's state is not resumed",
        "vqgen/training/state.py",
        "load_optimizer(part, state[name])",
        "pass",
        FAULTS,
        "again_and_again",
    ),
    Mutant(
        "the random numbers of a step depend on what came before",
        "vqgen/training/run.py",
        "        seed_step(self.config.seed, self.step)\n",
        "",
        FAULTS,
        "again_and_again",
    ),
    Mutant(
        "a stopped run's means start anew",
        "vqgen/training/run.py",
        'self.means.load_state_dict(saved["means"])',
        "pass",
        FAULTS,
        "again_and_again",
    ),
    Mutant(
        "a checkpoint of other data is taken",
        "vqgen/training/checkpoints.py",
        "if name in state and state[name] != now:",
        "if False:",
        "tests/training/test_checkpoints.py",
        "moved",
    ),
    Mutant(
        "evaluation's time counts as training",
        "vqgen/training/schedule.py",
        "self.spent, self.started = self.seconds, None",
        "pass",
        TRAINING,
        "paused",
    ),
    # Crops and parts
    Mutant(
        "random crops are all in the upper left corner",
        "vqgen/data/crops.py",
        "+ place * (1 - share) * side - 0.5",
        "- 0.5",
        "tests/data/test_crops.py",
    ),
    Mutant(
        "all steps have the same random crops",
        "vqgen/data/order.py",
        "mixed_seed(self.seed, step, 0, 0)",
        "mixed_seed(self.seed, 0, 0, 0)",
        "tests/data/test_crops.py",
    ),
    Mutant(
        "the versions of images are drawn alike in each epoch",
        "vqgen/data/order.py",
        "random.integers(self.versions",
        "np.random.default_rng(0).integers(self.versions",
        "tests/training/test_training.py",
        "version",
    ),
    Mutant(
        "a part of the images leaves classes out",
        "vqgen/data/images.py",
        "np.concatenate([drawn[firsts], np.delete(drawn, firsts)])",
        "drawn",
        "tests/data/test_images.py",
        "at_most",
    ),
    # Stage 2 and the GAN
    Mutant(
        "class dropout is never applied",
        "vqgen/data/order.py",
        "return tokens, class_ids.masked_fill(hidden.to(device, non_blocking=True), -1)",
        "return tokens, class_ids",
        LOOPS,
        "prior",
    ),
    Mutant(
        "the prior predicts the token before",
        "vqgen/priors/prior.py",
        "tokens[:, :-1]",
        "tokens[:, 1:]",
        "tests/priors/test_prior.py",
    ),
    Mutant(
        "the GAN's D loss also trains G",
        "stage1/train_gan.py",
        "            with torch.no_grad():\n                fakes",
        "            with torch.enable_grad():\n                fakes",
        LOOPS,
        "gan",
    ),
    Mutant(
        "G's loss also trains D",
        "stage1/train_gan.py",
        "nets.bare_disc.requires_grad_(False)",
        "nets.bare_disc.requires_grad_(True)",
        LOOPS,
        "gan",
    ),
    Mutant(
        "G is trained on D's noise",
        "stage1/train_gan.py",
        "noise(config, run, now, i, turn=1)",
        "noise(config, run, now, i, turn=0)",
        LOOPS,
        "gan",
    ),
    Mutant(
        "G is trained to be told apart",
        "vqgen/adversarial/losses.py",
        '    assert name == "non_saturating", name\n    return F.softplus(-fake).mean()',
        '    assert name == "non_saturating", name\n    return F.softplus(fake).mean()',
        LOOPS,
        "gan",
    ),
    # Codebooks
    Mutant(
        "codes that fall out of use stay there",
        "vqgen/quantizers/codebook.py",
        "            elif self.revive_below:\n                self._revive(vectors)",
        "            elif self.revive_below:\n                pass",
        CODEBOOK,
    ),
    Mutant(
        "the encoder does not feel the commitment term",
        "vqgen/quantizers/common.py",
        "return difference * (commitment_weight * scale), for_z_q, None, None",
        "return difference * (codebook_weight * scale), for_z_q, None, None",
        f"{CODEBOOK} tests/quantizers/test_oracle.py",
    ),
    # Plans, and steps that wait for nothing
    Mutant(
        "a prior's pass waits for the GPU",
        "vqgen/priors/prior.py",
        'cache = {"past_key_values": NothingKept()} if self._attends_only else {}',
        "cache: dict[str, Any] = {}",
        "tests/test_meta.py",
        "stage_2",
    ),
    Mutant(
        "a prior's activations are kept, whatever the setting says",
        "vqgen/priors/prior.py",
        "layer.gradient_checkpointing = True",
        "layer.gradient_checkpointing = False",
        "tests/priors/test_prior.py",
        "computed_again",
    ),
    Mutant(
        "a plan forgets the memory of an evaluation",
        "vqgen/planning/choose.py",
        "max(cost.memory(own // passes), cost.fixed + evaluation)",
        "cost.memory(own // passes)",
        "tests/planning",
    ),
    Mutant(
        "a plan takes the largest prior for any number of images",
        "vqgen/planning/choose.py",
        "parameters > PARAMETERS_PER_TOKEN * learned_from",
        "parameters < 0 * learned_from",
        "tests/planning",
    ),
    Mutant(
        "a plan counts on a GPU's peak",
        "vqgen/planning/choose.py",
        "batch / (budget.utilisation * peak)",
        "batch / peak",
        "tests/planning",
    ),
    Mutant(
        "a plan writes its own data settings beside the user's",
        "stage1/plan.py",
        " if setting.key not in given]",
        "]",
        "tests/test_plan.py",
        "own_settings",
    ),
    Mutant(
        "the FLOPs of attention do not count in a plan",
        "vqgen/planning/cost.py",
        "    fused_attention: _flops_of_attention,\n",
        "",
        "tests/planning",
    ),
    # Checkpoints in shards, and losses in blocks
    Mutant(
        "each process writes all tensors",
        "vqgen/training/shards.py",
        "if owner == rank():",
        "if True:",
        "tests/training/test_shards.py",
        "share",
    ),
    Mutant(
        "metadata of shards may name any code",
        "vqgen/training/shards.py",
        "        if not plain:\n",
        "        if False:\n",
        "tests/training/test_shards.py",
        "code",
    ),
    Mutant(
        "shards that no checksum names are taken",
        "vqgen/training/checkpoints.py",
        "{STATE, *shards} - checksums.keys()",
        "{STATE} - checksums.keys()",
        "tests/training/test_shards.py",
        "damaged",
    ),
    Mutant(
        "shards are written from the tensors that training changes",
        "vqgen/training/shards.py",
        "writer = _Writer(folder, then)",
        "writer = _Writer(folder, then)\n        writer.stage = lambda state: state",
        "tests/training/test_shards.py",
        "change",
    ),
    Mutant(
        "a run does not wait for its last shards",
        "vqgen/training/shards.py",
        "        self._writing, self._told = writing, False\n",
        "        self._told = False\n",
        "tests/training/test_shards.py",
    ),
    Mutant(
        "a checkpoint that is being written dies with its run",
        "vqgen/training/run.py",
        "            self._writer.close()  # the run's lock",
        "            pass  # the run's lock",
        "tests/training/test_shards.py",
        "outlives",
    ),
    Mutant(
        "FSDP rounds its losses to bf16",
        "vqgen/training/fsdp.py",
        "replace(policy, output_dtype=None)",
        "policy",
        "tests/test_fsdp.py",
        "float32",
    ),
    Mutant(
        "the search for copies sums in float32 alone",
        "vqgen/evaluation/metrics.py",
        "EXACT = 1024",
        "EXACT = 1 << 20",
        "tests/evaluation/test_metrics.py",
    ),
    Mutant(
        "a large batch is drawn whole",
        "vqgen/priors/sampling.py",
        "return max(1, room // (ROWS * each)) * ROWS",
        "return 1 << 20",
        "tests/priors/test_sampling.py",
    ),
    Mutant(
        "FSDP's moments are read whole",
        "vqgen/training/fsdp.py",
        "torch.empty_like(parameters[i], dtype=x.dtype)",
        "torch.empty_like(x, device='cpu')",
        "tests/training/test_shards.py",
        "moments",
    ),
    Mutant(
        "the last block of a loss counts as much as the others",
        "vqgen/priors/prior.py",
        "(len(targets) / count)",
        "(rows / count)",
        "tests/priors/test_objective.py",
        "blocks",
    ),
    Mutant(
        "blocks of a loss have no illegal tokens",
        "vqgen/priors/prior.py",
        "logits = self.legal(head(x), *places)",
        "logits = head(x)",
        "tests/priors/test_objective.py",
        "blocks",
    ),
]


def outcome(mutant: Mutant, runs: Path) -> str:
    """Plants one mutant in a copy, and returns `killed`, `SURVIVED` or the reason why it could not tell."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", "__pycache__"))
        text = (copy / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            return f"NOT PLANTED: the text is there {text.count(mutant.old)} times"
        (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        command += ["-k", mutant.chosen] if mutant.chosen else []
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "VQGEN_TEST_RUNS": str(runs)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        return {0: "SURVIVED", 1: "killed"}.get(done.returncode, f"NO VERDICT: pytest exits with {done.returncode}")


def main(words: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.bug for word in words)]
    print("| bug | file | tests | outcome |\n|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(JOBS) as pool, tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"  # runs of the project without a bug, made by the first tests that need them
        used = dict.fromkeys((mutant.tests, mutant.chosen) for mutant in chosen)
        without = [Mutant("none", "README.md", "# vqgen\n", "# vqgen\n", tests, k) for tests, k in used]
        # A failure means something only if the same tests pass without any bug.
        sound = dict(
            zip(used, (found == "SURVIVED" for found in pool.map(partial(outcome, runs=runs), without)), strict=True)
        )
        outcomes = []
        for mutant, found in zip(chosen, pool.map(partial(outcome, runs=runs), chosen), strict=True):
            found = found if sound[mutant.tests, mutant.chosen] else "NO VERDICT: the tests fail without it"
            tests = mutant.tests + (f" -k '{mutant.chosen}'" if mutant.chosen else "")
            print(f"| {mutant.bug} | {mutant.file} | {tests} | {found} |", flush=True)
            outcomes.append(found)
    print(f"{outcomes.count('killed')} of {len(outcomes)} killed")
    return int(outcomes.count("killed") != len(outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
