"""The budget of a run, the learning rates that depend on it, and the batch size of one pass."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vqgen.distributed import from_main, world_size
from vqgen.errors import InputError
from vqgen.settings import OptimConfig

CLOCK_EVERY = 10  # steps between looks at the clock on several processes: agreeing on the time makes them wait


class Budget:
    """The spent share of a run, in steps or in seconds of training, whichever is larger.

    Args:
        max_steps: the run ends after this many steps; None sets no bound.
        max_seconds: the run ends after this many seconds of training, not counting `paused`; None sets no bound.

    Raises:
        InputError: neither bound is given, or one is not positive.
    """

    def __init__(self, max_steps: int | None, max_seconds: float | None):
        for name, bound in (("max_steps", max_steps), ("max_seconds", max_seconds)):
            if bound is not None and not 0 < bound < math.inf:
                raise InputError(f"train.{name}={bound}: must be positive")
        if max_steps is None and max_seconds is None:
            raise InputError(
                "train.max_steps and train.max_seconds are both null: give one of them, or the run never ends"
            )
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self.spent = 0.0
        self.started: float | None = None
        self.by_clock: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.spent + (0.0 if self.started is None else time.monotonic() - self.started)

    def share(self, step: int, device: torch.device) -> float:
        """The share of the budget that is spent after `step` steps: 0 at the start, 1 or more at the end."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        if self.max_seconds and (self.by_clock is None or world_size() == 1 or step % CLOCK_EVERY == 0):
            self.by_clock = from_main(self.seconds, device) / self.max_seconds
        return max(by_steps, self.by_clock or 0.0)

    def start(self) -> None:
        """Starts the clock."""
        self.started = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside, for work that is not training."""
        self.spent, self.started = self.seconds, None
        try:
            yield
        finally:
            self.start()


def lr_at(share: float, optim: OptimConfig) -> float:
    """Learning rate after a share of the budget: linear warm-up, then a cosine to zero."""
    share = min(max(share, 0.0), 1.0)
    warmup = min(1.0, (share + 1e-3) / optim.warmup) if optim.warmup > 0 else 1.0
    return optim.lr * warmup * 0.5 * (1 + math.cos(math.pi * share))


def set_lr(optimizer: Any, lr: float) -> float:
    """Gives all parameters of an optimizer this learning rate, and returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def ramp_at(share: float, start: float, ramp: float) -> float:
    """Rises from 0 after a share of the budget, `start`, linearly to 1 over another, `ramp`."""
    if share < start or start >= 1:
        return 0.0
    return min(1.0, (share - start) / ramp) if ramp > 0 else 1.0


def num_parameters(model: nn.Module) -> int:
    """The number of values in a model's parameters."""
    return sum(p.numel() for p in model.parameters())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay for matrices and convolutions only.

    Biases and norms have none (their scale matters), and neither have a quantizer's parameters: weight decay would pull
    all codes to the origin.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and not name.startswith("quantizer.")]
    kept = [p for name, p in named if p.ndim < 2 or name.startswith("quantizer.")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def micro_batch_size(batch_size: int, accumulation: int) -> int:
    """Images per forward pass of one process.

    Raises:
        InputError: the batch does not divide evenly over the processes and accumulation steps.
    """
    parts = world_size() * accumulation
    if batch_size % parts:
        near = max(1, round(batch_size / parts)) * parts
        raise InputError(
            f"train.batch_size={batch_size} does not divide over {world_size()} processes x "
            f"{accumulation} accumulation steps; use {near}"
        )
    return batch_size // parts
