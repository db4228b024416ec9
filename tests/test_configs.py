"""Every file in configs/ runs, on the data it is for."""

import numpy as np
import pytest
from programs import ROOT, needs_shared, shell

CONFIGS = sorted(path.stem for path in (ROOT / "configs/stage1").glob("*.yaml"))
TINY = "train.max_steps=2 train.eval_images=32 train.log_every=1 tracking.wandb=disabled"


def test_each_tokenizer_has_its_prior():
    assert sorted(path.stem for path in (ROOT / "configs/stage2").glob("*.yaml")) == CONFIGS


@needs_shared
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_runs_from_images_to_samples(name, tmp_path):
    """Stage 2 takes few of the images where they are many, since it encodes all of them."""
    with np.load(ROOT / "vqgen/data/embedded/digits.npz") as digits:
        np.savez(tmp_path / "few.npz", images=digits["train_images"][:500], labels=digits["train_labels"][:500])
    few = {
        "cifar10": "data.source=../shared/data/cifar10/train-00000.tar",
        "fashion_mnist": f"data.source={tmp_path}/few.npz",
    }
    shell(f"python stage1/train.py configs/stage1/{name}.yaml run_dir={tmp_path}/1 {TINY}")
    settings = f"run_dir={tmp_path}/2 stage1={tmp_path}/1 {TINY} {few.get(name, '')}"
    shell(f"python stage2/train.py configs/stage2/{name}.yaml {settings}")
    shell(f"python stage2/sample.py {tmp_path}/2 num_images=4")
    images = np.load(tmp_path / "2/samples/samples.npz")["images"]
    assert images.shape == {"emoji64": (4, 64, 64, 3), "cifar10": (4, 32, 32, 3), "fashion_mnist": (4, 32, 32)}[name]


@needs_shared
def test_the_gan_config_runs_from_images_to_samples(tmp_path):
    shell(f"python stage1/train_gan.py configs/gan/dcgan_64.yaml run_dir={tmp_path}/gan {TINY}")
    shell(f"python stage2/sample.py {tmp_path}/gan num_images=4")
    assert np.load(tmp_path / "gan/samples/samples.npz")["images"].shape == (4, 64, 64, 3)
