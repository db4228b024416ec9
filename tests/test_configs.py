"""Every file in configs/ runs, on the data it is for; those for many GPUs at a tiny size, on other data."""

import numpy as np
import pytest
import torch
from programs import ROOT, needs_shared
from programs import untimed_metrics as metrics

from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.evaluation import perceptual
from vqgen.tokenizers import build_tokenizer
from vqgen.training.schedule import num_parameters
from vqgen.yaml_file import read_yaml

CONFIGS = sorted(path.stem for path in (ROOT / "configs/stage1").glob("*.yaml"))
LARGE = [name for name in CONFIGS if name.startswith("imagenet256")]
TINY = "train.max_steps=2 train.eval_images=32 train.log_every=1 tracking.wandb=disabled"


def test_each_tokenizer_has_its_prior():
    assert sorted(path.stem for path in (ROOT / "configs/stage2").glob("*.yaml")) == CONFIGS


@needs_shared
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in LARGE])
def test_a_config_runs_from_images_to_samples(name, program, tmp_path):
    """Stage 2 takes few of the images where they are many, since it encodes all of them."""
    with np.load(ROOT / "vqgen/data/embedded/digits.npz") as digits:
        np.savez(tmp_path / "few.npz", images=digits["train_images"][:500], labels=digits["train_labels"][:500])
    few = {
        "cifar10": ["data.source=../shared/data/cifar10/train-00000.tar"],
        "fashion_mnist": [f"data.source={tmp_path}/few.npz"],
    }
    tiny = TINY.split()
    run(program, "stage1/train.py", f"configs/stage1/{name}.yaml", f"run_dir={tmp_path}/1", *tiny)
    settings = [f"run_dir={tmp_path}/2", f"stage1={tmp_path}/1", *tiny, *few.get(name, [])]
    run(program, "stage2/train.py", f"configs/stage2/{name}.yaml", *settings)
    run(program, "stage2/sample.py", f"{tmp_path}/2", "num_images=4")
    images = np.load(tmp_path / "2/samples/samples.npz")["images"]
    assert images.shape == {"emoji64": (4, 64, 64, 3), "cifar10": (4, 32, 32, 3), "fashion_mnist": (4, 32, 32)}[name]


@needs_shared
def test_the_gan_config_runs_from_images_to_samples(program, tmp_path):
    run(program, "stage1/train_gan.py", "configs/gan/dcgan_64.yaml", f"run_dir={tmp_path}/gan", *TINY.split())
    run(program, "stage2/sample.py", f"{tmp_path}/gan", "num_images=4")
    assert np.load(tmp_path / "gan/samples/samples.npz")["images"].shape == (4, 64, 64, 3)


def run(program, *arguments: str) -> None:
    code, _, errors = program(*arguments)
    assert code == 0, errors


@pytest.mark.parametrize(("name", "millions", "codes"), [("imagenet256_f16", 72, 16), ("imagenet256_f8", 70, 32)])
def test_a_large_config_has_the_published_networks(name, millions, codes):
    """LlamaGen's README: VQ-16 has 72 M parameters, VQ-8 has 70 M; pix2pix's discriminator for 256 pixels has 2.8 M."""
    config = read_yaml(ROOT / f"configs/stage1/{name}.yaml")
    with torch.device("meta"):
        tokenizer = build_tokenizer(**config["model"])
        disc = PatchDiscriminator(3, **config["discriminator"])
    assert round(num_parameters(tokenizer) / 1e6) == millions
    layout = tokenizer.code_layout(config["data"]["image_size"])
    assert (layout.shapes, layout.codebook_sizes) == (((1, codes, codes),), (16384,))
    disc.check_size(256)
    assert num_parameters(disc) == 2_764_737  # 2,765,633 with batch normalisation


@pytest.mark.parametrize("name", LARGE)
def test_a_large_config_trains_with_all_its_losses_at_a_tiny_size(name, program, tmp_path, monkeypatch):
    """Its steps, on few images, with narrow networks; the codebook keeps its 16,384 codes, more than the batch has."""
    generator = torch.Generator().manual_seed(0)
    np.savez(tmp_path / "few.npz", images=torch.randint(0, 256, (40, 64, 64, 3), generator=generator).byte().numpy())
    trunk, channels, number = {}, 3, 0
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            trunk[f"features.{number}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) / (
                3 * channels
            )
            trunk[f"features.{number}.bias"] = torch.zeros(width)
            number, channels = number + 2, width
        number += 1
    torch.save(trunk, tmp_path / "vgg16.pth")
    heads = {f"lin{i}.model.1.weight": torch.ones(1, w, 1, 1) for i, w in enumerate((64, 128, 256, 512, 512))}
    torch.save(heads, tmp_path / "heads.pth")
    tiny = ["data.image_size=64", "model.width=8", "model.norm_groups=8", "discriminator.width=8", "train.batch_size=4"]
    tiny += [f"loss.perceptual.weights=[{tmp_path}/vgg16.pth,{tmp_path}/heads.pth]", "data.workers=0", *TINY.split()]
    data = [f"data.source={tmp_path}/few.npz", "data.val_source=null", f"run_dir={tmp_path}/run"]
    compare, seen = perceptual._compared, set()
    monkeypatch.setattr(perceptual, "_compared", lambda x, y, head: seen.add(x.dtype) or compare(x, y, head))
    code, _, errors = program("stage1/train.py", f"configs/stage1/{name}.yaml", *tiny, *data)
    assert code == 0, errors
    figures = {key: value for line in metrics(tmp_path / "run") for key, value in line.items()}
    losses = ("rec_loss", "quantizer_loss", "perceptual_loss", "adv_loss", "disc_loss", "grad_norm", "disc_grad_norm")
    assert all(0 < abs(figures[f"train/{key}"]) < np.inf for key in losses)
    assert figures["train/adv_weight"] == 0.5
    assert seen == {torch.bfloat16}
