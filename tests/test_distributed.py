"""Two processes give the results of one: the same losses, the same codebook, the same samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from programs import launch_two, shell, untimed_metrics

from vqgen.data.images import load_images
from vqgen.settings import DataConfig
from vqgen.tokenizers.vqmodel import from_uint8, load_tokenizer

# Two processes add in another order than one, so their sums differ by 1e-7. Slow learning of the encoder keeps this
# difference small for 20 steps: vectors hardly ever cross the border of two codes. k-means would amplify it, because it
# chooses codes ten times; and Muon, because it makes the smallest directions of a gradient as large as the others.
STAGE1 = "model.quantizer.kmeans_iterations=0 optim.name=adamw optim.lr=2e-4 train.max_steps=20 train.log_every=1"


@pytest.fixture(scope="module")
def one(runs, tmp_path_factory) -> Path:
    """Runs by one process: stage1/ with the settings STAGE1, stage2/ of `runs`."""
    folder = tmp_path_factory.mktemp("one")
    command = f"stage1/train.py configs/debug/stage1.yaml run_dir={folder}/stage1 tracking.wandb=disabled {STAGE1}"
    shell(f"accelerate launch {command}")
    (folder / "stage2").symlink_to(runs / "stage2")
    return folder


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory) -> Path:
    """The same runs by two processes; stage2/ uses the tokenizer of `runs` in both."""
    folder = tmp_path_factory.mktemp("two")
    for stage, more in (("stage1", STAGE1), ("stage2", f"stage1={runs}/stage1 codes_dir={folder}/codes")):
        command = f"{stage}/train.py configs/debug/{stage}.yaml run_dir={folder}/{stage} tracking.wandb=disabled {more}"
        assert "2 x cpu" in shell(f"{launch_two()} {command}")
    return folder


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_train_as_one_does(one, two, stage):
    # A step of stage 1 has 2,048 vectors. If one takes another code, the losses change by about 1/2048, the codes'
    # entropy by up to log(2048) / 2048, and their usage by up to 1/64. The tolerances allow a few such vectors.
    tolerance = 5e-3 if stage == "stage1" else 1e-4
    for a, b in zip(untimed_metrics(one / stage), untimed_metrics(two / stage), strict=True):
        assert a.keys() == b.keys()
        by_code = {key for key in a if key.endswith(("usage", "entropy", "perplexity"))}
        assert {key: b[key] for key in by_code} == pytest.approx({key: a[key] for key in by_code}, rel=0.05, abs=0.05)
        others = a.keys() - by_code
        assert {key: b[key] for key in others} == pytest.approx({key: a[key] for key in others}, rel=tolerance)


def test_two_processes_learn_the_same_codebook(one, two):
    x = from_uint8(load_images(DataConfig())[1].__getitems__(np.arange(128))[0])
    models = (load_tokenizer(run / "stage1")[0] for run in (one, two))
    a, b = (model.quantizer.decode_codes(model.encode(x)[0]) for model in models)  # (B, D, H, W)
    # Codes are farther apart than 1 % of their length, so a vector that takes another code counts as different.
    same = (a - b).norm(dim=1) < 0.01 * a.norm(dim=1)
    assert same.float().mean() > 0.95


def test_two_processes_encode_the_same_codes(runs, two):
    for store in (runs / "stage1/codes").iterdir():
        other = two / "codes" / store.name
        assert np.array_equal(np.load(store / "tokens.npy"), np.load(other / "tokens.npy"))
        assert np.array_equal(np.load(store / "class_ids.npy"), np.load(other / "class_ids.npy"))


def test_two_processes_draw_the_same_samples(runs, tmp_path):
    arguments = f"stage2/sample.py {runs}/stage2 num_images=40 batch_size=16"  # three batches, one of 8
    assert "40 images by 2 x cpu" in shell(f"{launch_two()} {arguments} out={tmp_path}/two")
    assert "40 images by 1 x cpu" in shell(f"python {arguments} out={tmp_path}/one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["grid.png", "samples.npz"]
    two, one = (np.load(tmp_path / name / "samples.npz") for name in ("two", "one"))
    assert np.array_equal(two["images"], one["images"])
    assert np.array_equal(two["class_ids"], one["class_ids"])


def test_two_processes_tune_as_one_does(runs, tmp_path):
    arguments = (
        f"stage2/sample.py {runs}/stage2 num_images=10 batch_size=8 features=lenet cache_dir={runs}/features best_of=2"
    )
    arguments += " tune=fd tune_images=30 best_by=class"
    two = shell(f"{launch_two()} {arguments} out={tmp_path}/two")
    one = shell(f"python {arguments} out={tmp_path}/one")
    chosen = [
        [line for line in printed.splitlines() if "cfg_scale=" in line and "%" not in line] for printed in (two, one)
    ]
    assert chosen[0][:-1] == chosen[1][:-1]  # the last has the run's own command
    images = [np.load(tmp_path / name / "samples.npz")["images"] for name in ("two", "one")]
    assert np.array_equal(*images)


def test_two_processes_train_a_decoder_alone_as_one_does(runs, program, tmp_path):
    settings = "train.max_steps=4 train.log_every=1 train.batch_size=32 train.eval_images=32 tracking.wandb=disabled"
    command = f"stage1/train.py init_from={runs}/stage1 freeze=[encoder,quantizer] data.max_images=200 {settings}"
    assert "1 x cpu" in program(*command.split(), f"run_dir={tmp_path}/one")[1]
    assert "2 x cpu" in shell(f"{launch_two()} {command} run_dir={tmp_path}/two")
    for a, b in zip(untimed_metrics(tmp_path / "one"), untimed_metrics(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    before, one, two = (
        load_tokenizer(run)[0].state_dict() for run in (runs / "stage1", tmp_path / "one", tmp_path / "two")
    )
    for name, value in before.items():
        if name.startswith(("decoder.", "from_code.")):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
            assert not torch.equal(two[name], value)
        else:
            assert torch.equal(two[name], value)
