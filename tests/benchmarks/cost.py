"""What a stage-1 configuration costs, without training it: parameters, FLOPs, memory, and hours on GPUs.

python tests/benchmarks/cost.py CONFIG.yaml [gpus=8] [utilisation=0.35]

The networks are on torch's device `meta`, without memory, and the passes of stage1/train.py run on them. FLOPs are
those of convolutions and matrix products, two per multiplication and addition. Activations are all tensors that are
alive at the worst moment of the passes, in the types that autocast chooses on CUDA; a real allocator needs somewhat
more.
"""

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from step import Step, configuration, stage1
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vqgen.errors import InputError, require
from vqgen.settings import Stage1Config
from vqgen.training.schedule import num_parameters

GPUS = {"A100": 312e12, "H100": 989e12}  # name: FLOP/s in bf16 without sparsity, by their data sheets
IMAGENET = 1_281_167  # training images
LEAST = 4  # images of a measured pass


class Meter(TorchDispatchMode):
    """Measures what runs inside. Unlike torch's own counters it allows calls of autograd.grad.

    Attributes:
        flops: FLOPs so far.
        most: the most bytes, at any time, in tensors that were made inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in given | self.alive:
                self.alive.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.bytes -= size


@contextmanager
def no_autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Does nothing, as a context or as a decorator."""
    yield


@contextmanager
def passes_on_meta() -> Iterator[None]:
    """Inside, networks on the device `meta` can run, with an autocast that does nothing, and be trained."""
    fused = "_get_fused_kernels_supported_devices"  # the fused optimizers run there, but torch does not list it
    with (
        patch.object(torch, "autocast", no_autocast),
        patch.object(torch, "is_autocast_enabled", lambda *args: False),
        patch.object(sys.modules["torch.optim.optimizer"], fused, lambda: ["cpu", "meta"]),
    ):
        yield


@contextmanager
def without_memory(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors have shapes and no memory, and autocast to this type is as on CUDA.

    The device `meta` has no autocast, so convolutions convert their arguments themselves, and torch's group norm its
    input to float32. Nothing can be moved from it.
    """
    conv2d, norm = F.conv2d, nn.GroupNorm.forward

    def converted(*args: Any, **kwargs: Any) -> Tensor:
        return conv2d(*(x.to(dtype) if isinstance(x, Tensor) else x for x in args), **kwargs)

    with (
        torch.device("meta"),
        patch.object(F, "conv2d", converted),
        patch.object(nn.GroupNorm, "forward", lambda layer, x: norm(layer, x.float())),
        passes_on_meta(),
        patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),
    ):
        yield


def measured(config: Stage1Config) -> dict[str, Any]:
    """The figures of a configuration: parameters and forward FLOPs by part; FLOPs and bytes of its passes per image."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.mixed_precision or "no", torch.float32)
    with without_memory(dtype):
        most = {}
        # So many images that the losses which see every N-th image see their share of them.
        small = max(LEAST, config.loss.perceptual.every, config.loss.adversarial.every)
        for batch in (small, 2 * small):
            step = Step(config, batch, torch.device("meta"))
            step.nets.tokenizer.quantizer.initialised = True  # the first batch's k-means is not a step's cost
            step.now.share = 0.999
            step.backward()  # makes the gradients, which then stay
            with Meter() as meter:
                step.backward()
            most[batch] = meter.most
        step_flops = 0.0  # of the whole run's mean step
        for share, part in phases(config):
            for number in range(stage1.R1_EVERY):
                step.now.share, step.now.step = share, number
                with Meter() as meter:
                    step.backward()
                step_flops += part * meter.flops / stage1.R1_EVERY
        optimizers = [
            optimizer for optimizer in (step.nets.optimizer, step.nets.disc_optimizer) if optimizer is not None
        ]
        weights = sum(  # float32: a gradient, and Muon's or Adam's one or two moments
            (4 + (4 if group.get("muon") else 8)) * p.numel()
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        )
        forward = {}
        with torch.no_grad():
            for name, (parameters, pass_) in parts(step).items():
                with Meter() as meter:
                    pass_()
                forward[name] = parameters, meter.flops / batch
    each = (most[2 * small] - most[small]) / small
    counts = {name: count for name, (count, _) in forward.items()}
    weights += 4 * (sum(counts.values()) + counts["encoder"] + counts["quantizer"] + counts["decoder"])  # the average
    fixed = weights + most[small] - small * each
    return {"parts": forward, "step": step_flops / batch, "each": each, "fixed": fixed}


def parts(step: Step) -> dict[str, tuple[int, Callable[[], object]]]:
    """The number of parameters and the forward pass of each part of a training step, by name."""
    tokenizer, x = step.nets.tokenizer, step.x
    h = tokenizer.encoder(x)
    z = tokenizer.to_code(h)
    h_q = tokenizer.from_code(z)
    found: dict[str, tuple[list[nn.Module], Callable[[], object]]] = {
        "encoder": ([tokenizer.encoder, tokenizer.to_code], lambda: (tokenizer.encoder(x), tokenizer.to_code(h))),
        "quantizer": ([tokenizer.quantizer], lambda: tokenizer.quantizer(z)),
        "decoder": ([tokenizer.decoder, tokenizer.from_code], lambda: (tokenizer.from_code(z), tokenizer.decoder(h_q))),
    }
    if (disc := step.nets.bare_disc) is not None:
        found["discriminator"] = [disc], lambda: disc(x)
    if (perceptual := step.nets.perceptual) is not None:
        found["perceptual"] = [perceptual], lambda: perceptual(x, x)
    return {name: (sum(map(num_parameters, modules)), pass_) for name, (modules, pass_) in found.items()}


def phases(config: Stage1Config) -> list[tuple[float, float]]:
    """A share of the run in each of the phases between the starts of its losses, and the share that the phase takes."""
    adversarial = config.loss.adversarial
    starts = {0.0, config.loss.perceptual.start, adversarial.start - adversarial.lead, adversarial.start, 1.0}
    return [((a + b) / 2, b - a) for a, b in itertools.pairwise(sorted(s for s in starts if 0 <= s <= 1))]


def main(path: Path, gpus: int, utilisation: float) -> None:
    config = configuration(path)
    length = "train.max_steps is null, so the run's length is not known; give it a number there"
    require(config.train.max_steps is not None, f"{path}: {length}")
    require(gpus > 0, f"gpus={gpus}: must be 1 or more")
    passed, rest = divmod(config.train.batch_size, gpus * config.train.accumulation)
    require(rest == 0, f"gpus={gpus}: train.batch_size={config.train.batch_size} does not divide over them; use fewer")
    plain, again = (measured(configuration(path, train__activation_checkpointing=on)) for on in (False, True))
    print(f"{path}: {config.data.image_size} pixels, {config.train.mixed_precision or 'no'} mixed precision\n")
    print("| part | parameters | forward, GFLOP per image |\n|---|---|---|")
    for name, (count, flops) in plain["parts"].items():
        print(f"| {name} | {count / 1e6:.2f} M | {flops / 1e9:.1f} |")
    images = config.train.batch_size * config.train.max_steps
    print("\n| | | with activation checkpointing |\n|---|---|---|")

    def row(name: str, figure: Callable[[dict[str, Any]], str]) -> None:
        print(f"| {name} | {figure(plain)} | {figure(again)} |")

    row("a training step, mean of the run, TFLOP per image", lambda cost: f"{cost['step'] / 1e12:.2f}")
    row("activations, GB per image", lambda cost: f"{cost['each'] / 1e9:.2f}")
    row("weights, gradients, optimizers, average, GB", lambda cost: f"{cost['fixed'] / 1e9:.2f}")
    row(
        f"memory at {passed} images a pass, GB",
        lambda cost: f"{(cost['fixed'] + passed * cost['each']) / 1e9:.1f}",
    )
    for gpu, peak in GPUS.items():
        seconds = images / (gpus * utilisation * peak)
        row(
            f"hours on {gpus} {gpu}, at {utilisation:.0%} of {peak / 1e12:.0f} TFLOP/s",
            lambda cost, seconds=seconds: f"{seconds * cost['step'] / 3600:.0f}",
        )
    print(f"\nLength: {images / 1e6:.1f} M images, {images / IMAGENET:.0f} epochs of ImageNet.")


if __name__ == "__main__":
    options = {"gpus": "8", "utilisation": "0.35"}
    given = [word for word in sys.argv[1:] if word.startswith(tuple(f"{key}=" for key in options))]
    paths = [word for word in sys.argv[1:] if word not in given]
    options |= dict(word.split("=", 1) for word in given)
    try:
        require(len(paths) == 1, "usage: python tests/benchmarks/cost.py CONFIG.yaml [gpus=8] [utilisation=0.35]")
        main(Path(paths[0]), int(options["gpus"]), float(options["utilisation"]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
