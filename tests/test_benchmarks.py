"""The figures of tests/benchmarks/, on inputs whose figures are known; and that measuring a run does not change it."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from benchmarks import texture, time_to_quality
from benchmarks.arms import Case, compare
from benchmarks.texture import blockiness, flattest, uneven, woven
from benchmarks.time_to_quality import TheirQuantizer, TheirTokenizer, time_to
from programs import ROOT
from torch import Tensor

from vqgen.cli.parse import load_config
from vqgen.cli.sections import STAGE1_SECTIONS
from vqgen.codes import CodeLayout
from vqgen.data.samples import save_samples
from vqgen.errors import InputError
from vqgen.priors.prior import Prior
from vqgen.settings import DataConfig, Stage1Config, Stage2Config, Stage2EvaluateConfig, TrackingConfig
from vqgen.training.schedule import num_parameters

FEW = ["data.max_images=32", "model.widths=[16,32]", "model.quantizer.codebook_size=64", "train.batch_size=8"]
FEW += ["train.max_steps=20", "train.max_seconds=null"]
OPTIONS = {"data": "digits", "seconds": "1", "seeds": "0", "arms": "ours,vqp,diffusers", "peer_lr": "1e-3"}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Texture


def test_a_weave_is_found_at_its_period_and_noise_is_none():
    pattern = noise(1, 3, 4, 4)
    pattern -= pattern.mean(dim=(2, 3), keepdim=True)
    rms = pattern.square().mean().sqrt().item()
    weave = pattern.tile(1, 1, 8, 8)
    assert woven(weave, 4) == pytest.approx(rms, rel=1e-5)
    assert woven(weave, 8) == pytest.approx(rms, rel=1e-5)
    assert woven(weave + 50, 4) == pytest.approx(rms, rel=1e-4)  # a wrong colour is no weave
    assert woven(weave, 2) < rms
    assert woven(pattern[..., :2, :2].tile(1, 1, 16, 16), 2) == pytest.approx(uneven(pattern[..., :2, :2]), rel=1e-5)
    assert uneven(weave + 50) == pytest.approx(rms, rel=1e-4)

    rough = 10 * noise(16, 3, 32, 32)
    assert uneven(rough) == pytest.approx(10, rel=0.02)
    assert woven(rough, 4) < 1
    assert woven(rough + 5 * weave, 4) == pytest.approx(5 * rms, rel=0.1)


def test_blocks_are_jumps_at_borders_and_nowhere_else():
    smooth = noise(4, 3, 32, 32).cumsum(dim=2).cumsum(dim=3)
    assert blockiness(smooth, 8) == pytest.approx(1, abs=0.25)
    blocks = smooth + 200 * noise(4, 3, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    assert blockiness(blocks, 8) > 5
    assert 1 < blockiness(blocks, 4) < blockiness(blocks, 8)  # half of its borders are inside blocks
    assert blockiness(blocks.roll((3, 3), dims=(2, 3)), 8) < 1
    ramp = torch.arange(32.0).expand(1, 1, 32, 32) * 20
    assert blockiness(blocks + ramp, 8) == pytest.approx(blockiness(blocks, 8), rel=1e-3)  # a slope is no jump


def test_the_flattest_cells_are_those_of_the_flat_part():
    images = 50 * noise(2, 3, 32, 32)
    images[..., :8] = 7.0  # a quarter
    assert flattest(images, 8) == 0
    board = 3 * (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32))
    assert flattest(images + board, 8) == pytest.approx(3, rel=1e-5)
    assert flattest(noise(2, 3, 32, 32) * 50, 8) > 30


def test_the_periods_are_the_stride_and_its_halves():
    assert [texture.periods(stride) for stride in (1, 2, 8, 12)] == [[], [2], [8, 4, 2], [12, 6, 3]]


def test_the_texture_of_runs_and_samples_is_shown(runs, tmp_path, capsys):
    samples = tmp_path / "samples.npz"
    board = 128 + 5 * (-1) ** (np.arange(32)[:, None] + np.arange(32))
    save_samples(samples, np.tile(board[..., None].astype(np.uint8), (3, 1, 1, 1)), np.zeros(3, dtype=np.int64))
    texture.main([str(runs / "stage1"), str(runs / "stage2"), str(samples)], tmp_path, None)
    header, _, *lines = capsys.readouterr().out.splitlines()
    names = [f"{runs}/{name}" for name in ("stage1", "stage1: originals", "stage2", "stage2: originals")]
    assert header == f"| | {' | '.join([*names, str(samples)])} |"
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:7]] for cells in (line.split("|") for line in lines[:-1])
    }
    assert rows["flat: uneven"][0] == rows["flat: uneven"][2]  # it is the same tokenizer
    assert rows["flat: uneven"][1] == ""
    assert float(rows["flat: woven, 8 px"][0]) <= float(rows["flat: uneven"][0]) + 0.01
    assert float(rows["images: flattest"][1]) == 0  # digits are black around
    assert float(rows["images: flattest"][0]) > 0
    assert float(rows["images: flattest"][4]) == 5
    assert rows["flat: uneven"][4] == ""
    assert len(list(tmp_path.glob("*.png"))) == 2
    with pytest.raises(InputError, match="give size="):
        texture.main([str(runs / "stage1/model")], tmp_path, None)


# Quality over time


def test_a_level_is_reached_between_the_points_around_it():
    seconds, quality = [1.0, 3.0, 5.0, 9.0], [10.0, 14.0, 13.0, 20.0]
    assert time_to(12, seconds, quality) == 2
    assert time_to(14, seconds, quality) == 3
    assert time_to(15, seconds, quality) == pytest.approx(5 + 4 * 2 / 7)
    assert time_to(8, seconds, quality) == 1
    assert time_to(21, seconds, quality) is None


def test_their_tokenizer_is_diffusers_own_at_the_size_of_ours():
    torch.manual_seed(0)
    model = TheirTokenizer(3, 8, CodeLayout(((1, 4, 4),), (64,)), 8, parameters=400_000)
    assert num_parameters(model) == pytest.approx(400_000, rel=0.1)
    x = noise(2, 3, 32, 32)
    x_rec, [q] = model(x)
    own = model.net(x)
    torch.testing.assert_close(x_rec, own.sample)
    torch.testing.assert_close(q.loss, own.commit_loss)
    assert q.codes.shape == (2, 1, 4, 4)
    codebook = model.net.quantize.embedding.weight
    torch.testing.assert_close(codebook[q.codes[:, 0]].movedim(3, 1), q.z_q)


def test_their_quantizer_keeps_our_interface():
    torch.manual_seed(0)
    quantizer = TheirQuantizer(16, 4)
    z = noise(8, 4, 6, 6)
    quantizer(z)
    q = quantizer.eval()(z)
    assert q.codes.shape == (8, 1, 6, 6)
    torch.testing.assert_close(quantizer.decode_codes(q.codes), q.z_q)


def test_a_race_measures_all_and_changes_nothing(program, tmp_path, capsys):
    out = tmp_path / "out"
    time_to_quality.main({**OPTIONS, "out": str(out), "profile": "false"}, FEW)
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "figures.jsonl").read_text().splitlines()]
    quarters = [row for row in rows if "psnr" in row]
    assert [row["arm"] for row in quarters] == ["ours"] * 4 + ["vqp"] * 4 + ["diffusers"] * 4
    assert [row["share"] for row in quarters] == [0.25, 0.5, 0.75, 1] * 3
    assert len(rows) == 3 * 20  # each of 20 steps passes a mark
    for row in quarters:
        assert 0 < row["usage"] <= 1
        assert 0 < row["train_usage"] <= 1
        assert row["psnr"] == pytest.approx(row["curve_psnr"], abs=1e-4)  # all images are few enough for the curve
        assert row["images_per_second"] > 0
    assert printed.count("\n| vqgen |") == 4
    assert printed.count("vqgen against ") == 2
    assert (out / "curves.png").stat().st_size > 10_000

    code, _, errors = program("stage1/train.py", *FEW, f"run_dir={tmp_path}/plain", "tracking.wandb=disabled")
    assert code == 0, errors
    models = [(folder / "model/model.safetensors").read_bytes() for folder in (out / "ours-0", tmp_path / "plain")]
    assert models[0] == models[1]
    logged = [json.loads(line) for line in (tmp_path / "plain/metrics.jsonl").read_text().splitlines()]
    assert quarters[3]["psnr"] == pytest.approx(logged[-1]["val/psnr_per_image"], abs=1e-3)
    assert quarters[3]["usage"] == pytest.approx(logged[-1]["val/usage"])
    with pytest.raises(InputError, match="is there already"):
        time_to_quality.main({**OPTIONS, "out": str(out), "profile": "false"}, FEW)


def test_the_profile_is_of_whole_steps(capsys):
    time_to_quality.main({**OPTIONS, "out": "", "profile": "true"}, FEW)
    printed = capsys.readouterr().out
    shares = [
        float(line.split("|")[2].strip(" %")) for line in printed.splitlines() if line.endswith("|") and "%" in line
    ]
    assert sum(shares) == pytest.approx(100, abs=1.5)  # rounding
    products = [
        float(line.split("|")[2].strip(" %")) for line in printed.splitlines() if "| aten::" in line and "conv" in line
    ]
    found = float(printed.rpartition("matrix products: ")[2].partition("%")[0])
    assert sum(products) <= found + 1 < 100
    assert products
    assert math.isfinite(found)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"data": "emoji46"}, "data=emoji46"), ({"arms": "ours,theirs"}, "arms='?theirs")]
)
def test_an_unknown_race_is_refused(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        time_to_quality.main({**OPTIONS, "out": str(tmp_path / "out"), "profile": "false", **wrong}, FEW)


# Comparisons of arms


@pytest.fixture
def benchmarks(monkeypatch) -> None:
    """Benchmarks import each other as programs in one folder do."""
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    monkeypatch.chdir(ROOT)


def test_stage_1_takes_the_settings_of_every_arm(benchmarks, tmp_path):
    import codes_for_the_prior
    import vqgan

    options = argparse.Namespace(runs=tmp_path, seconds=9, stage1_seconds=9, stage2_seconds=9, images=9, rates=None)
    arms = {codes_for_the_prior: "ARMS DECODERS", vqgan: "ARMS ALONE"}
    for module, names in arms.items():
        for arm in [arm for name in names.split() for arm in getattr(module, name)]:
            commands = module.commands(Case("emoji64", arm, 0), options)
            trained = [
                load_config(Stage1Config, words, STAGE1_SECTIONS) for first, *words in commands if "1/tr" in first
            ]
            assert sum(config.train.max_seconds for config in trained) == 9
            assert [bool(config.freeze) for config in trained] == [False, True][: len(trained)]


def test_stage_2_takes_the_settings_of_every_recipe(benchmarks, tmp_path):
    import recipes

    options = argparse.Namespace(runs=tmp_path, seconds=9, images=9)
    for data in recipes.DATA:
        for arm in recipes.ARMS:
            [train, *measure] = recipes.commands(Case(data, arm, 0), options)
            config = load_config(Stage2Config, train[1:], {"model": Prior, "data": DataConfig})
            assert config.train.max_seconds == 9
            assert len(measure) == (2 if data == "digits" else 1)
            for _, run, *words in measure:
                measured = load_config(Stage2EvaluateConfig, words, {"data": DataConfig, "tracking": TrackingConfig})
                assert (run, measured.cfg_scale, measured.top_p) == (f"{config.run_dir}", 1.0, 1.0)


def test_the_table_of_sampling_speeds(benchmarks, capsys):
    import sampling

    sampling.main(sampling.parsed(["--shapes", "4,2", "--rounds", "1", "--guided"]))
    [_, _, row] = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "4, 2"
    times = [float(cell) for cell in cells[1:]]
    assert times[5] == pytest.approx(times[1] / times[0], rel=0.02)  # the ratio of rounded times
    assert times[4] == pytest.approx(2 / (4 * times[0] / 1000), rel=0.02)


def test_an_arm_that_is_finished_is_not_run_again(tmp_path, capsys):
    options = argparse.Namespace(data=["digits"], seeds=[0, 1], arms=["one"], jobs=1, threads=1, runs=tmp_path)

    def commands(case: Case) -> list[list[str]]:
        return [["-c", f"open({str(tmp_path / str(case.seed))!r}, 'a').write('x')"]]

    def figures(case: Case) -> dict[str, float]:
        return {"psnr": 20.0 + 2 * case.seed}

    for _ in range(2):
        compare(options, commands, figures, {"psnr": "PSNR"})
        assert "| one, 2 | 21.00 ± 1.41 |" in capsys.readouterr().out
    assert [(tmp_path / seed).read_text() for seed in "01"] == ["x", "x"]
    with pytest.raises(SystemExit, match=r"exit code 3; see .*output\.txt"):
        compare(options, lambda case: [["-c", "raise SystemExit(3)"]], figures, {"psnr": "PSNR"})
