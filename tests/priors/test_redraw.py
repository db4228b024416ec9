"""Codes that a prior draws anew, and the decoder that learns from them."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vqgen.data.images import load_images
from vqgen.data.order import BatchOrder, mixed_seed
from vqgen.errors import InputError
from vqgen.priors.prior import Prior
from vqgen.priors.redraw import prior_of, redraw_codes
from vqgen.settings import DataConfig
from vqgen.tokenizers.vqmodel import from_uint8, load_tokenizer

CLASSES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def digits():
    return load_images(DataConfig(channels=1))[0]


@pytest.fixture(scope="module")
def loaded(runs):
    return Prior.from_pretrained(runs / "stage2"), load_tokenizer(runs / "stage1")[0]


def images(digits, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x, class_ids = digits.__getitems__(rows)
    return from_uint8(x), class_ids


def test_codes_that_are_not_kept_follow_the_prior_given_the_true_codes_before(loaded, digits):
    prior, tokenizer = loaded
    x, class_ids = images(digits, [5])
    x, class_ids = x.expand(4000, -1, -1, -1), class_ids.expand(4000)
    true = tokenizer.encode(x[:1])[0]
    torch.manual_seed(0)
    drawn = redraw_codes(prior, tokenizer, x, class_ids, keep=0.0)
    expected = prior(prior.layout.flatten([true]), class_ids[:1]).softmax(dim=-1)[0].view(*true.shape[2:], 64)
    found = F.one_hot(drawn[:, 0], 64).float().mean(dim=0)
    assert (found - expected).abs().max() < 0.04
    assert (found - expected).abs().sum(dim=-1).max() < 0.25  # at each position, over all codes
    kept = redraw_codes(prior, tokenizer, x, class_ids, keep=0.7) == true
    chance = expected.gather(-1, true[0, 0][..., None])[..., 0]
    assert (kept.float().mean(dim=0)[0] - (0.7 + 0.3 * chance)).abs().max() < 0.04
    assert torch.equal(redraw_codes(prior, tokenizer, x[:3], class_ids[:3], keep=1.0), true.expand(3, -1, -1, -1))


def test_the_decoder_learns_from_them_alone(runs, program, tmp_path, digits, loaded):
    settings = [f"init_from={runs}/stage1", "freeze=[encoder,quantizer]", f"redraw.stage2={runs}/stage2"]
    settings += ["redraw.keep=0.4", "train.max_steps=1", "train.log_every=1", "train.batch_size=16"]
    settings += [f"run_dir={tmp_path}", "tracking.wandb=disabled", "train.eval_images=32"]
    code, _, errors = program("stage1/train.py", *settings)
    assert code == 0, errors
    prior, tokenizer = loaded
    (rows,) = itertools.islice(BatchOrder(len(digits), 16, first=0, seed=0), 1)
    x, class_ids = images(digits, rows)
    torch.manual_seed(mixed_seed(0, 0, 0))
    codes = redraw_codes(prior, tokenizer, x, class_ids, keep=0.4)
    assert 0.3 < (codes != tokenizer.encode(x)[0]).float().mean() < 0.7
    expected = F.mse_loss(tokenizer.decode([codes]), x).item()
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["train/rec_loss"] == pytest.approx(expected, rel=1e-4)
    assert logged["train/quantizer_loss"] == 0
    before, after = (load_file(run / "model/model.safetensors") for run in (runs / "stage1", tmp_path))
    changed = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"from_code", "decoder"}


def test_a_prior_of_other_codes_maps_or_classes_is_refused(runs, loaded, tmp_path):
    _, tokenizer = loaded
    run, layout = runs / "stage2", tokenizer.code_layout(32)
    assert not any(p.requires_grad for p in prior_of(run, tokenizer, layout, CLASSES).parameters())
    with pytest.raises(InputError, match=r"^stage2=.*: its prior writes maps of .* use its data\.image_size"):
        prior_of(run, tokenizer, tokenizer.code_layout(64), CLASSES)
    with pytest.raises(InputError, match=r"^stage2=.*: its prior has other classes than the images"):
        prior_of(run, tokenizer, layout, CLASSES[::-1])
    with pytest.raises(InputError, match=r"^stage2=.*: no prior there"):
        prior_of(runs / "stage1", tokenizer, layout, CLASSES)
    other = load_tokenizer(runs / "stage1")[0]
    next(other.decoder.parameters()).add_(1)  # the decoder may differ: it may have been trained like this before
    prior_of(run, other, layout, CLASSES)
    other.quantizer.codebook[0] += 1
    with pytest.raises(InputError, match=r"^stage2=.*: its prior is for the codes of another tokenizer than init_from"):
        prior_of(run, other, layout, CLASSES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("redraw.stage2={runs}/stage2", "use freeze=[encoder,quantizer], and init_from=ITS_TOKENIZER"),
        (
            "redraw.stage2={runs}/stage2 init_from={runs}/stage1 freeze=[encoder,quantizer] perturb.images=0.1",
            "redraw.stage2: the prior replaces the codes; use perturb.images=0 and equivariance.share=0",
        ),
        (
            "redraw.stage2={runs}/missing init_from={runs}/stage1 freeze=[encoder,quantizer]",
            "missing: no prior there; give the folder of a stage-2 run",
        ),
        ("redraw.keep=2", "redraw.keep=2.0: is a share of the codes, from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(runs, program, tmp_path, settings, said):
    code, _, errors = program("stage1/train.py", *settings.format(runs=runs).split(), f"run_dir={tmp_path}/run")
    assert (code, errors.count("\n")) == (2, 1)
    assert said in errors
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_to_the_same_bits(runs, program, tmp_path):
    settings = [f"init_from={runs}/stage1", "freeze=[encoder,quantizer]", f"redraw.stage2={runs}/stage2"]
    settings += ["train.max_steps=2", "train.checkpoint_every=1", "train.batch_size=16", "train.eval_images=32"]
    settings += [f"run_dir={tmp_path}", "tracking.wandb=disabled"]
    code, _, errors = program("stage1/train.py", *settings)
    assert code == 0, errors
    whole = load_file(tmp_path / "model/model.safetensors")
    shutil.rmtree(tmp_path / "checkpoints/step_00000002")
    code, output, errors = program("stage1/train.py", *settings)
    assert code == 0, errors
    assert "going on from step 1" in output
    after = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(whole[key], after[key]) for key in whole)


def test_a_prior_goes_on_with_the_decoder_that_learned_from_it(runs, program, tmp_path):
    """As the page on tokenizers says: the codes are the same, so only the tokenizer's files change."""
    run = shutil.copytree(runs / "stage2", tmp_path / "stage2")
    settings = [f"init_from={runs}/stage1", "freeze=[encoder,quantizer]", f"redraw.stage2={run}", "train.max_steps=2"]
    settings += [f"run_dir={tmp_path}/stage1", "tracking.wandb=disabled", "train.eval_images=32"]
    code, _, errors = program("stage1/train.py", *settings)
    assert code == 0, errors
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "stage1/model" / file, run / "model/tokenizer" / file)
    code, _, errors = program("stage2/sample.py", run, "num_images=4", f"out={tmp_path}/out")
    assert code == 0, errors
    assert (Path(tmp_path) / "out/samples.npz").is_file()
