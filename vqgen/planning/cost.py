"""FLOPs and memory of a training step from its shapes alone, on the device `meta`: tensors have no memory there."""

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vqgen.planning.step import PriorStep, TokenizerStep
from vqgen.priors.prior import LOGITS_AT_ONCE
from vqgen.settings import Stage1Config, Stage2Config
from vqgen.tokenizers.vqmodel import VQModel
from vqgen.training.schedule import num_parameters

META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEAST = 4  # images of a measured pass
USUAL = 64  # sequences; a prior whose loss is in blocks only in larger batches is measured without them
fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flops_of_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _flops_of_attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    fused_attention: _flops_of_attention,
    fused_attention_backward: _flops_of_attention_backward,
}


@dataclass(frozen=True)
class Cost:
    """What a training step costs.

    Attributes:
        parameters: of the model.
        flops: of a step, for one example; the mean of the run. Those of convolutions and matrix products, two for each
            multiplication and addition.
        each: bytes that one more example in a pass takes.
        fixed: bytes besides: weights, gradients, the optimizers' moments, the average, and what does not grow.
        parts: parameters and FLOPs of a forward pass of one example, by the part's name.
    """

    parameters: int
    flops: float
    each: float
    fixed: float
    parts: dict[str, tuple[int, float]] = field(default_factory=dict)

    def memory(self, batch: int) -> float:
        """Bytes at so many examples in a pass; a real allocator takes somewhat more."""
        return self.fixed + batch * self.each


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
        if (packet := func._overloadpacket) in FLOPS:
            self.flops += FLOPS[packet](*args, **kwargs, out_val=result)
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


def attention_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's attention by a fused kernel, as on GPUs, which keeps no probabilities; `meta` would choose another."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return fused_attention(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def without_memory(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors have shapes and no memory, and autocast to this type is as on CUDA.

    The device `meta` has no autocast, so convolutions and products of weights convert their arguments themselves, and
    torch's group norm its input to float32. Nothing can be moved from it.
    """
    conv2d, linear, norm = F.conv2d, F.linear, nn.GroupNorm.forward

    def converted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            return function(*(x.to(dtype) if isinstance(x, Tensor) else x for x in args), **kwargs)

        return call

    with (
        META,
        patch.object(F, "conv2d", converted(conv2d)),
        patch.object(F, "linear", converted(linear)),
        patch.object(F, "scaled_dot_product_attention", attention_on_cuda),
        patch.object(nn.GroupNorm, "forward", lambda layer, x: norm(layer, x.float())),
        passes_on_meta(),
        patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),
    ):
        yield


def tokenizer_cost(program: ModuleType, config: Stage1Config) -> Cost:
    """The cost of a configuration of stage 1.

    Args:
        program: stage1/train.py.
        config: the configuration.
    """
    with without_memory(DTYPES.get(config.train.mixed_precision or "no", torch.float32)):
        most = {}
        # So many images that the losses which see every N-th image see their share of them.
        small = max(LEAST, config.loss.perceptual.every, config.loss.adversarial.every)
        for batch in (small, 2 * small):
            step = TokenizerStep(program, config, batch, META)
            step.nets.tokenizer.quantizer.initialised = True  # the first batch's k-means is not a step's cost
            step.now.share = 0.999
            step.backward()  # makes the gradients, which then stay
            with Meter() as meter:
                step.backward()
            most[batch] = meter.most
        flops = 0.0  # of the whole run's mean step
        for share, part in phases(config):
            for number in range(program.R1_EVERY):
                step.now.share, step.now.step = share, number
                with Meter() as meter:
                    step.backward()
                flops += part * meter.flops / program.R1_EVERY
        forward = {}
        with torch.no_grad():
            for name, (parameters, pass_) in _parts(step).items():
                with Meter() as meter:
                    pass_()
                forward[name] = parameters, meter.flops / batch
    each = (most[2 * small] - most[small]) / small
    counts = {name: count for name, (count, _) in forward.items()}
    own = counts["encoder"] + counts["quantizer"] + counts["decoder"]
    weights = _moments(step.nets.optimizer, step.nets.disc_optimizer) + 4 * (sum(counts.values()) + own)  # the average
    return Cost(own, flops / batch, each, weights + most[small] - small * each, forward)


def prior_cost(program: ModuleType, config: Stage2Config, tokenizer: VQModel, class_names: list[str]) -> Cost:
    """The cost of a configuration of stage 2.

    Args:
        program: stage2/train.py.
        config: the configuration.
        tokenizer: the tokenizer; its weights do not matter.
        class_names: the classes.
    """
    most, flops = {}, 0
    with without_memory(DTYPES.get(config.train.mixed_precision or "no", torch.float32)):
        layout = tokenizer.code_layout(config.data["image_size"])
        in_blocks = LOGITS_AT_ONCE // (layout.num_tokens * layout.vocab_size) + 1  # the smallest such batch
        small = in_blocks if LEAST < in_blocks < USUAL else LEAST
        for batch in (small, 2 * small):
            step = PriorStep(program, config, tokenizer, class_names, batch, META)
            step.backward()
            with Meter() as meter:
                step.backward()
            most[batch], flops = meter.most, meter.flops
    each = (most[2 * small] - most[small]) / small
    count = num_parameters(step.nets.prior)
    weights = _moments(step.nets.optimizer) + 2 * 4 * count  # and the average
    return Cost(count, flops / batch, each, weights + most[small] - small * each)


def _moments(*optimizers: Any) -> int:
    """Bytes of gradients, and of Muon's one or Adam's two moments, in float32."""
    groups = [group for optimizer in optimizers if optimizer is not None for group in optimizer.param_groups]
    return sum((4 + (4 if group.get("muon") else 8)) * p.numel() for group in groups for p in group["params"])


def _parts(step: TokenizerStep) -> dict[str, tuple[int, Callable[[], object]]]:
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
