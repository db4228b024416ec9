"""Guidance that is tuned by sample.py: on the likelihood of held-out codes, or on the distance of samples."""

import re
import shutil

import numpy as np
import pytest
import torch

from vqgen.adversarial.dcgan import DCGANGenerator
from vqgen.cli.runs import run_images
from vqgen.codes import CodeLayout
from vqgen.data.images import some_rows
from vqgen.evaluation.features import collect_features, load_feature_network
from vqgen.evaluation.guidance import SCALES, figures_of_scales
from vqgen.evaluation.likelihood import prior_nll
from vqgen.evaluation.metrics import frechet_distance
from vqgen.evaluation.report import evaluation_device
from vqgen.generator import Generator, Samples
from vqgen.priors.prior import Prior
from vqgen.settings import SampleConfig


class Codes:
    """Code sequences as `TokenStore` has them."""

    def __init__(self, tokens: torch.Tensor, class_ids: torch.Tensor):
        self.tokens, self.class_ids = tokens, class_ids

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[rows], self.class_ids[rows]


@torch.no_grad()
def test_the_likelihood_under_guidance_is_that_of_the_mixed_distribution():
    layout = CodeLayout(((2, 2), (1, 2, 2)), (5, 7))  # has illegal tokens
    torch.manual_seed(0)
    prior = Prior(layout, ["a", "b"], hidden_size=32, num_hidden_layers=2, num_attention_heads=2).eval()
    for p in prior.parameters():
        p.mul_(8)
    ranges = layout.token_ranges()
    tokens = (ranges[:, 0] + torch.rand(30, 8) * (ranges[:, 1] - ranges[:, 0])).long()
    class_ids, scales = torch.arange(30) % 2, [1.0, 3.0, 1.5, 1.0, 0.0, 2.0, 4.0, 1.0]
    given, none = (prior(tokens, ids).double().softmax(-1) for ids in (class_ids, torch.full((30,), -1)))
    mixed = torch.stack([none[:, t] ** (1 - s) * given[:, t] ** s for t, s in enumerate(scales)], dim=1)
    mixed = mixed.nan_to_num()  # of illegal tokens
    expected = -(mixed / mixed.sum(-1, keepdim=True)).gather(2, tokens[..., None]).log().mean()
    found = prior_nll(prior, Codes(tokens, class_ids), 30, 7, torch.device("cpu"), scales)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    plain = prior_nll(prior, Codes(tokens, class_ids), 30, 7, torch.device("cpu"))
    assert prior_nll(prior, Codes(tokens, class_ids), 30, 7, torch.device("cpu"), [1.0] * 8) == pytest.approx(plain)
    assert abs(found - plain) > 0.01


def test_scales_are_tried_until_two_in_a_row_are_worse():
    assert figures_of_scales(lambda s: (s - 1.4) ** 2).keys() == {1.0, 1.25, 1.5, 2.0, 2.5}
    assert figures_of_scales(lambda s: -s).keys() == set(SCALES)
    assert figures_of_scales(lambda s: s).keys() == {1.0, 1.25, 1.5}
    wave = {1.0: 5, 1.25: 6, 1.5: 4, 2.0: 5, 2.5: 3, 3.0: 9, 4.0: 8}
    assert figures_of_scales(wave.__getitem__) == wave


def tried(printed: str) -> dict[float, float]:
    """The figures that the program prints, by scale."""
    return {float(s): float(x) for s, x in re.findall(r"^  cfg_scale=(\S+)  (\S+)$", printed, re.MULTILINE)}


def test_sample_py_tunes_on_held_out_codes_and_draws_with_the_best(runs, program, tmp_path):
    arguments = ["stage2/sample.py", runs / "stage2", "num_images=6", f"out={tmp_path}", "tune=nll", "cfg_start=0.5"]
    code, printed, errors = program(*arguments)
    assert code == 0, errors
    found = tried(printed)
    assert "held-out images' codes, nats a token:\n  cfg_scale=1  " in printed
    assert len(found) >= 3
    best = float(re.search(r"^drawing with cfg_scale=(\S+), the best of these$", printed, re.MULTILINE)[1])
    assert found[best] == min(found.values())
    images = Generator.from_pretrained(runs / "stage2").sample(num_images=6, cfg_scale=best, cfg_start=0.5)
    drawn = np.load(tmp_path / "samples.npz")["images"]
    assert np.array_equal(drawn.reshape(6, 32, 32), np.stack([np.asarray(image) for image in images]))


def test_sample_py_tunes_on_the_distance_of_samples(runs, program, tmp_path):
    arguments = ["stage2/sample.py", runs / "stage2", "num_images=6", f"out={tmp_path}/out", "tune=fd", "seed=4"]
    code, printed, errors = program(*arguments, "tune_images=80", f"cache_dir={runs}/features", "features=lenet")
    assert code == 0, errors
    found = tried(printed)
    assert "FD-LeNet of 80 samples against " in printed
    generator, accelerator = Generator.from_pretrained(runs / "stage2"), evaluation_device()
    train, _, _ = run_images(runs / "stage2", {}, 1)
    shared = {"seed": 0, "cache": runs / "features", "accelerator": accelerator}
    network = load_feature_network("lenet", None, train, **shared)
    reference = collect_features(train, some_rows(len(train), 10_000), network, 256, "")
    for scale in list(found)[:2]:
        samples = Samples(generator, SampleConfig(num_images=80, cfg_scale=scale, seed=5))
        distance = frechet_distance(collect_features(samples, np.arange(80), network, 256, ""), reference)
        assert found[scale] == pytest.approx(distance, rel=1e-3)


def test_a_class_is_tuned_against_its_own_images(runs, program, tmp_path):
    arguments = ["stage2/sample.py", runs / "stage2", "num_images=2", f"out={tmp_path}/out", "tune=fd", "class_ids=[3]"]
    code, printed, errors = program(*arguments, "tune_images=90", f"cache_dir={runs}/features", "features=lenet")
    assert code == 0, errors
    train, _, _ = run_images(runs / "stage2", {}, 1)
    count = (train.class_ids[some_rows(len(train), 10_000)] == 3).sum()
    assert f"FD-LeNet of 90 samples against {count:,} images:\n" in printed
    assert re.search(r"^next: .* cfg_scale=\S+$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("toward=3", "tune: is for images of the training's size and of one class each; leave toward out, or tune"),
        ("size=64", "leave size out, or tune"),
        ("class_ids=[-1]", "tune=nll: guidance does nothing without a class; leave it out"),
        ("data.source=digits.npz", "data.source=digits.npz: no such file or folder"),
    ],
)
def test_settings_that_do_not_go_with_tuning_are_refused(runs, program, tmp_path, setting, message):
    code, _, errors = program("stage2/sample.py", runs / "stage2", "tune=nll", setting, f"out={tmp_path}/out")
    assert code == 2
    assert message in errors


def test_settings_for_measuring_alone_are_refused_without_it(runs, program, tmp_path):
    code, _, errors = program("stage2/sample.py", runs / "stage2", "features=lenet", f"out={tmp_path}/out")
    assert code == 2
    assert "features, cache_dir and data.*: are for tune and best_by=class; leave them out\n" in errors


def test_what_cannot_be_tuned_is_refused(runs, program, tmp_path):
    code, _, errors = program("stage2/sample.py", runs / "stage2", "tune=fid", f"out={tmp_path}/out")
    assert code == 2
    assert "tune: Invalid value 'fid', expected one of ['fd', 'nll']" in errors
    DCGANGenerator(32, 1, ["a", "b"], width=4).save_pretrained(tmp_path / "gan/model/generator")
    code, _, errors = program("stage2/sample.py", tmp_path / "gan", "tune=nll", f"out={tmp_path}/out")
    assert code == 2
    assert "tune=nll: only a prior draws with that, and this model is a GAN; leave it out\n" in errors
    generator = Generator.from_pretrained(runs / "stage2")
    for share, names, message in (
        (
            0.0,
            generator.class_names,
            "tune=nll: the prior was trained with class_dropout=0, so guidance cannot work; leave it out\n",
        ),
        (0.1, [], "tune=nll: guidance does nothing without a class; leave it out\n"),
    ):
        shutil.copytree(runs / "stage2/model", tmp_path / "run/model", dirs_exist_ok=True)
        prior = Prior(generator.model.layout, names, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        prior.class_dropout = share
        prior.save_pretrained(tmp_path / "run/model/prior")
        arguments = ["stage2/sample.py", tmp_path / "run", "tune=nll", "cfg_scale=1", f"out={tmp_path}/out"]
        code, _, errors = program(*arguments)
        assert code == 2
        assert message in errors
