"""embedding_loss of stage 2: the heads' formula, a step's gradient against plain autograd, and whole runs."""

import importlib.util
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from programs import ROOT, launch_two, shell, state, untimed_metrics
from safetensors.torch import load_file
from torch import Tensor

from vqgen.planning.step import PriorStep
from vqgen.priors.objective import CodeHeads
from vqgen.priors.prior import Prior
from vqgen.settings import Stage2Config
from vqgen.tokenizers.vqmodel import load_tokenizer

WEIGHT = 0.3


def test_the_heads_loss_is_the_mean_cosine_distance_of_the_code_read_and_of_the_next():
    torch.manual_seed(0)
    vectors, early, late = torch.randn(7, 3), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    tokens = torch.randint(7, (2, 4))
    heads = CodeHeads(5, vectors)
    current, following = [], []
    for b in range(2):
        for n in range(4):
            following.append(1 - F.cosine_similarity(heads.next(late[b, n]), vectors[tokens[b, n]], dim=0))
            if n > 0:  # the first state has read the class alone
                current.append(1 - F.cosine_similarity(heads.current(early[b, n]), vectors[tokens[b, n - 1]], dim=0))
    expected = torch.stack(current).mean() + torch.stack(following).mean()
    torch.testing.assert_close(heads(early, late, tokens), expected)


@pytest.mark.parametrize("random_orders", [None, 0.5])
def test_a_step_s_gradient_is_that_of_both_losses(runs, random_orders):
    spec = importlib.util.spec_from_file_location("stage2_train", ROOT / "stage2/train.py")
    stage2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage2)
    tokenizer = load_tokenizer(runs / "stage1")[0]
    config = Stage2Config(embedding_loss=WEIGHT, context_noise=0, random_orders=random_orders)
    config.model, config.data["image_size"] = {"num_hidden_layers": 4}, 32
    step = PriorStep(stage2, config, tokenizer, ["a", "b"], 3, torch.device("cpu"))
    torch.manual_seed(0)
    codes = torch.randint(tokenizer.quantizer.codebook_size, (3, 1, 4, 4))
    step.tokens, step.class_ids, step.share = codes.flatten(1), torch.tensor([0, 1, -1]), 1.0
    step.backward()
    prior = step.nets.prior
    gradients = {name: p.grad.clone() for name, p in prior.named_parameters()}

    prior.zero_grad()
    seen: dict[int, Tensor] = {}
    for i in (0, 2):  # the first layer, and the third of four
        prior.lm.model.layers[i].register_forward_hook(lambda layer, inputs, out, i=i: seen.__setitem__(i, out))
    tokens, places = step.tokens, None
    if random_orders is not None:
        chosen, noise = step.noise[:, :1] < random_orders, step.noise[:, 1:17]
        places = torch.where(chosen, noise.argsort(dim=1), torch.arange(16))
        tokens = tokens.gather(1, places)
    logits = prior(tokens, step.class_ids, places)
    vectors = tokenizer.quantizer.decode_codes(codes).flatten(2).mT  # (3, 16, D)
    if places is not None:
        vectors = vectors.gather(1, places[..., None].expand_as(vectors))
    one, three = (seen[i][0] if isinstance(seen[i], tuple) else seen[i] for i in (0, 2))
    current = 1 - F.cosine_similarity(prior.heads.current(one[:, 1:]), vectors[:, :-1], dim=2)
    following = 1 - F.cosine_similarity(prior.heads.next(three), vectors, dim=2)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    (loss + WEIGHT * (current.mean() + following.mean())).backward()
    for name, p in prior.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert gradients["heads.current.weight"].abs().max() > 0


def arguments(runs, folder, *more: str) -> list[str]:
    quiet = [f"codes_dir={folder}/codes", "tracking.wandb=disabled", "train.max_steps=6", "train.log_every=1"]
    settings = [f"stage1={runs}/stage1", f"embedding_loss={WEIGHT}", "train.checkpoint_every=3", *quiet, *more]
    return ["stage2/train.py", "configs/debug/stage2.yaml", *settings]


def test_a_run_learns_by_both_losses_goes_on_to_the_same_bits_and_saves_a_plain_prior(runs, program, tmp_path):
    code, _, errors = program(*arguments(runs, tmp_path, f"run_dir={tmp_path}/a"))
    assert code == 0, errors
    lines = [line for line in untimed_metrics(tmp_path / "a") if "train/embedding_loss" in line]
    assert 1 < lines[0]["train/embedding_loss"] < 3  # 2 at random
    assert lines[-1]["train/embedding_loss"] < lines[0]["train/embedding_loss"]
    assert "heads.next.weight" in state(tmp_path / "a", 6)["model"]
    weights = load_file(tmp_path / "a/model/prior/model.safetensors")
    assert not any("heads" in name for name in weights)
    assert Prior.from_pretrained(tmp_path / "a").heads is None

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step_00000006")
    code, output, errors = program(*arguments(runs, tmp_path, f"run_dir={tmp_path}/b"))
    assert (code, "going on from step 3" in output) == (0, True), errors
    again = load_file(tmp_path / "b/model/prior/model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in weights.items())


def test_two_processes_equal_one(runs, program, tmp_path):
    more = ("optim.name=adamw", "optim.lr=1e-3")
    code, _, errors = program(*arguments(runs, tmp_path, f"run_dir={tmp_path}/one", *more))
    assert code == 0, errors
    words = arguments(runs, tmp_path, f"run_dir={tmp_path}/two", *more)
    assert "2 x cpu" in shell(f"{launch_two()} {' '.join(words)}")
    for a, b in zip(*(untimed_metrics(tmp_path / name) for name in ("one", "two")), strict=True):
        assert b == pytest.approx(a, rel=1e-3)
        assert all(math.isfinite(value) for value in b.values())


def test_what_has_no_code_vectors_is_refused(runs, program, tmp_path):
    quiet = ["tracking.wandb=disabled", "train.max_steps=1"]
    stage1 = ["stage1/train.py", f"run_dir={tmp_path}/1", "model.quantizer.name=residual", "data.max_images=100"]
    assert program(*stage1, *quiet)[0] == 0
    words = ["stage2/train.py", f"run_dir={tmp_path}/2", f"stage1={tmp_path}/1", *quiet]
    code, _, errors = program(*words, "embedding_loss=0.1")
    assert code == 2
    assert errors == "error: embedding_loss: needs one code at each position, whose vector is known; use 0\n"
    code, _, errors = program(*words, "embedding_loss=-1")
    assert (code, errors) == (2, "error: embedding_loss=-1.0: must be 0 or more\n")
