"""The real steps of all programs on torch's device `meta`, where tensors have no values.

What needs a value raises there: `.item()`, a branch on a tensor, a copy to the CPU, a tensor left on the CPU. On a GPU
the CPU would wait at the first three, and the last fails. A copy from the CPU, which may wait too, is not seen.
"""

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from programs import ROOT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqgen.codes import CodeLayout
from vqgen.evaluation.features import LeNet
from vqgen.evaluation.inception import InceptionV3
from vqgen.planning.cost import META, passes_on_meta, without_memory
from vqgen.planning.step import PriorStep, bare_run
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import log_likelihood, sample_tokens
from vqgen.quantizers import QUANTIZERS
from vqgen.quantizers.common import nearest_code
from vqgen.settings import GANConfig, Stage2Config
from vqgen.tokenizers import build_tokenizer
from vqgen.tokenizers.vqmodel import to_uint8
from vqgen.training.guard import FiniteGuard
from vqgen.training.run import Run

sys.path.append(BENCHMARKS := str(ROOT / "tests/benchmarks"))
from step import Step, configuration

sys.path.remove(BENCHMARKS)  # its data.py would hide tests/data
DEBUG = ROOT / "configs/debug/stage1.yaml"
TINY = {"data__image_size": 16, "model__widths": [16, 32], "train__mixed_precision": "no"}
VQGAN = {
    "loss__perceptual__name": "alex",
    "loss__perceptual__start": 0.0,
    "loss__adversarial__name": "hinge",
    "loss__adversarial__start": 0.0,
    "loss__adversarial__lecam": 0.1,
    "loss__adversarial__r1": 1.0,
    "discriminator__width": 8,
    "discriminator__layers": 1,
}


@pytest.fixture(autouse=True)
def what_meta_lacks(monkeypatch):
    """Autocast, and the copy of the guard's flags to the CPU, for which nothing waits on a GPU: all are zero here."""
    monkeypatch.setattr(FiniteGuard, "_fetched", lambda guard, flags: (torch.zeros(len(flags), device="cpu"), None))
    with passes_on_meta():
        yield


class NoFloat64(TorchDispatchMode):
    """Refuses tensors in float64 on the device, which Apple's GPUs do not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            assert not (isinstance(x, Tensor) and x.device == META and x.dtype == torch.float64), f"{func}: float64"
        return made


@pytest.fixture
def no_float64():
    with NoFloat64():
        yield


def program(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3] + "_on_meta", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_meta(*modules: nn.Module) -> None:
    """Moves networks made on the CPU; their parameters stay the same objects, which their optimizers know."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            torch.utils.swap_tensors(tensor, _like(tensor))


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device=META)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def stage1_step(**changes: Any) -> Step:
    """The networks are made inside `without_memory`, and run outside, where new tensors are on the CPU by default."""
    with without_memory(torch.float32):
        step = Step(configuration(DEBUG, **TINY, **changes), 4, META)
    step.nets.tokenizer.quantizer.initialised = True  # the first batch's k-means may wait, once in a run
    return step


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_step_of_stage_1_needs_no_value(name):
    options = {} if name in ("fsq", "lfq", "residual") else {"codebook_size": 32}
    step = stage1_step(model__quantizer={"name": name, **options})
    for _ in range(2):
        step()
    assert all(p.device == META for p in step.nets.tokenizer.parameters())
    assert step.run.means.counts["loss"] == 2


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize(
    "changes",
    [
        VQGAN,
        {**VQGAN, "loss__adversarial__augment": ["color", "translation", "cutout"]},
        {**VQGAN, "loss__adversarial__name": "least_squares", "loss__adversarial__adaptive": False},
        {**VQGAN, "loss__adversarial__name": "non_saturating", "loss__perceptual__name": "lpips-vgg"},
        {"perturb__images": 0.5, "perturb__nearest": 4, "loss__rec": "l1"},
        {"equivariance__share": 1.0, "optim__name": "adamw"},
        {"train__activation_checkpointing": True},
    ],
    ids=["hinge", "augment", "least squares", "non-saturating", "perturb", "equivariance", "checkpointing"],
)
def test_a_step_with_each_loss_needs_no_value(changes):
    step = stage1_step(**changes)
    for step.now.step in (16, 17):  # R1 is in the first
        step()
    assert step.run.means.counts["loss"] == 2
    assert step.run.means.counts.get("r1_loss", 0) == ("r1" in "".join(changes))


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize(
    "changes", [{}, {"random_orders": 0.0}, {"label_smoothing": 0.1, "embedding_loss": 0.3}, {"again": True}], ids=str
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_a_step_of_stage_2_needs_no_value(model_type, changes):
    stage2 = program("stage2/train.py")
    config = Stage2Config(model={"model_type": model_type}, **{k: v for k, v in changes.items() if k != "again"})
    config.train.activation_checkpointing = "again" in changes
    config.data["image_size"] = 16
    with without_memory(torch.float32):
        tokenizer = build_tokenizer(channels=1, widths=[16, 32], quantizer={"codebook_size": 32})
        step = PriorStep(stage2, config, tokenizer, ["a", "b"], 4, META)
    for step.share in (0.0, 0.9):
        step()
    smoothed = {"uniform_loss": 2, "embedding_loss": 2} if "label_smoothing" in changes else {}
    assert step.run.means.counts == {"loss": 2, "grad_norm": 2, **smoothed}
    assert {p.device for p in step.nets.prior.parameters()} == {META}


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("name", ["non_saturating", "hinge", "least_squares", "minimax"])
def test_a_step_of_the_gan_needs_no_value(name, monkeypatch):
    gan = program("stage1/train_gan.py")
    config = GANConfig(loss=name)
    config.data.image_size, config.generator, config.discriminator = 16, {"latent_dim": 8, "width": 8}, {"width": 8}
    run = bare_run(config, META)
    run.micro_batch = 4
    images = SimpleNamespace(channels=3, class_names=["a", "b"])
    run.device = torch.device("cpu")
    nets = gan.build(config, run, images)
    run.device = META
    to_meta(nets.generator, nets.disc, nets.average.model)
    optimizer, disc_optimizer = run.accelerator.prepare(nets.optimizer, nets.disc_optimizer)
    nets = nets._replace(optimizer=optimizer, disc_optimizer=disc_optimizer)
    x, class_ids = torch.zeros(4, 3, 16, 16, device=META), torch.zeros(4, dtype=torch.int64, device=META)
    now = SimpleNamespace(step=0)
    fakes = nets.bare_generator(gan.noise(config, run, now, 0, turn=0), class_ids).detach()
    Run.add(run, gan.discriminator_pass(nets, x, fakes, class_ids, config.loss, run))
    Run.update(run, disc_grad_norm=(nets.disc, nets.disc_optimizer))
    Run.add(run, gan.generator_pass(nets, gan.noise(config, run, now, 0, turn=1), class_ids, config.loss, run))
    Run.update(run, grad_norm=(nets.generator, nets.optimizer))
    nets.average.update(nets.bare_generator, 1)
    assert {"disc_loss", "gen_loss", "grad_norm", "disc_grad_norm"} <= run.means.counts.keys()


OPTIONS = [
    {},
    {"cfg_scale": 2.0, "cfg_power": 1.0, "cfg_start": 0.3},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.0},
    {"cuda_graph": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_sampling_needs_no_value(model_type, options):
    prior = Prior(CodeLayout(((1, 4, 4),), (32,)), ["a", "b"], model_type).eval()
    to_meta(prior)
    class_ids = torch.zeros(3, dtype=torch.int64, device=META)
    tokens = sample_tokens(prior, class_ids, **options)
    assert (tokens.shape, tokens.device) == ((3, 16), META)
    assert log_likelihood(prior, tokens, class_ids).shape == (3,)


@pytest.mark.usefixtures("no_float64")
def test_networks_of_evaluation_need_no_value(tmp_path):
    tokenizer = build_tokenizer(channels=3, widths=[16, 32], quantizer={"codebook_size": 32}).eval()
    lenet, inception = LeNet(3, 10).eval(), InceptionV3().eval()
    to_meta(tokenizer, lenet, inception)
    images = to_uint8(tokenizer.decode(tokenizer.encode(torch.zeros(2, 3, 32, 32, device=META))))
    assert (images.shape, images.device) == ((2, 3, 32, 32), META)
    for network in (lenet, inception):
        features, logits = network(images)
        assert features.device == logits.device == META


class Counted(TorchDispatchMode):
    """Counts the operators that make or change tensors, each at least one launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_the_lookup_takes_few_launches_for_many_vectors_and_codes():
    z, codebook = torch.empty(65_536, 8, device=META), torch.empty(16_384, 8, device=META)
    with Counted() as counted:
        assert nearest_code(z, codebook).shape == (65_536,)
    assert counted.count < 100


def test_float64_on_the_device_is_found(no_float64):
    torch.zeros(1, device="cpu").double()
    with pytest.raises(AssertionError, match="float64"):
        torch.zeros(1, device=META).double()


def test_what_needs_a_value_is_found():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device=META).item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros(1, device=META) > 0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device=META) + torch.zeros(2, device="cpu")
