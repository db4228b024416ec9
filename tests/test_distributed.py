"""Two processes are one: the same numbers, the same codebook, the same samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import launch_two, shell
from safetensors.torch import load_file

# Sums round otherwise on two processes: k-means, with its hard choices on the first batch, makes more of that than the
# tolerances here allow (a vector that changes its code moves every figure by some 1e-3).
STAGE1 = "model.quantizer.kmeans_iterations=0 train.max_steps=20 train.log_every=1"


@pytest.fixture(scope="module")
def one(runs, tmp_path_factory) -> Path:
    """What two processes are compared with: stage 1 without k-means, and the second stage of `runs`."""
    folder = tmp_path_factory.mktemp("one")
    command = f"stage1/train.py configs/debug/stage1.yaml run_dir={folder}/stage1 tracking.wandb=disabled {STAGE1}"
    shell(f"accelerate launch {command}")
    (folder / "stage2").symlink_to(runs / "stage2")
    return folder


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory) -> Path:
    """The runs of `runs`, by two processes each; the second stage on the first stage of `runs`."""
    folder = tmp_path_factory.mktemp("two")
    for stage, more in (("stage1", STAGE1), ("stage2", f"stage1={runs}/stage1 codes_dir={folder}/codes")):
        command = f"{stage}/train.py configs/debug/{stage}.yaml run_dir={folder}/{stage} tracking.wandb=disabled {more}"
        assert "2 x cpu" in shell(f"{launch_two()} {command}")
    return folder


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_train_as_one_does(one, two, stage):
    files = (run / stage / "metrics.jsonl" for run in (one, two))
    a, b = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(a) == len(b)
    for one, both in zip(a, b, strict=True):
        one.pop("train/images_per_second", None)
        both.pop("train/images_per_second", None)
        losses = {key: value for key, value in one.items() if key.endswith(("loss", "mse", "nll"))}
        assert {key: both[key] for key in losses} == pytest.approx(losses, rel=0, abs=1e-4)
        assert both == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_two_processes_learn_the_same_codebook(one, two):
    a, b = (load_file(run / "stage1/model/model.safetensors") for run in (one, two))
    assert torch.allclose(a["quantizer.codebook"], b["quantizer.codebook"], atol=1e-5)


def test_two_processes_encode_the_same_codes(runs, two):
    for store in (runs / "stage1/codes").iterdir():
        other = two / "codes" / store.name
        assert np.array_equal(np.load(store / "tokens.npy"), np.load(other / "tokens.npy"))
        assert np.array_equal(np.load(store / "class_ids.npy"), np.load(other / "class_ids.npy"))


def test_two_processes_draw_the_same_samples(runs, tmp_path):
    arguments = f"stage2/sample.py {runs}/stage2 num_images=50 batch_size=16"
    assert "50 images by 2 x cpu" in shell(f"{launch_two()} {arguments} out={tmp_path}/two")
    assert "50 images by 1 x cpu" in shell(f"python {arguments} out={tmp_path}/one")
    two, one = (np.load(tmp_path / name / "samples.npz") for name in ("two", "one"))
    assert np.array_equal(two["images"], one["images"])
    assert np.array_equal(two["class_ids"], one["class_ids"])
