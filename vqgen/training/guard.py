"""Updates whose losses are not finite: each is skipped and named, and too many in a row end the attempt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqgen.distributed import all_reduce_sum
from vqgen.training.stop import Stop


class Diverged(Exception):
    """So many steps in a row were not finite that only an earlier checkpoint helps."""


class FiniteGuard:
    """Finds steps whose losses are not finite: each is skipped and named, and too many in a row end the attempt.

    Whether to skip is decided on the device; the names are read a few steps later, when they are there anyway.

    Args:
        max_bad_steps: so many in a row are too many.
        say: prints a line.
        device: of the losses.
        stop: is told at each step whether any process was asked to stop, as that takes no exchange of its own.
    """

    def __init__(self, max_bad_steps: int, say: Callable[[str], None], device: torch.device, stop: Stop):
        self.max_bad_steps, self.say, self.device = max_bad_steps, say, device
        self.stop = stop
        self.lag = 2 if device.type == "cuda" else 0
        self.pending: list[tuple[int, list[str], Tensor, Any]] = []
        self.in_a_row = 0

    def check(self, step: int, **terms: Tensor) -> Tensor:
        """1.0 if a term (a scalar each) is not finite on any process, else 0.0: what a fused optimizer skips a step by.

        Raises:
            Diverged: this is the last of too many bad steps in a row.
        """
        asked = torch.full((), float(self.stop.asked), device=self.device)
        flags = torch.stack([*((~term.detach().isfinite()).float() for term in terms.values()), asked])
        flags = all_reduce_sum(flags)
        event = None
        if self.device.type == "cuda":
            seen = torch.empty(len(flags), pin_memory=True)
            seen.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            seen = flags.cpu()
        self.pending.append((step, list(terms), seen, event))
        if len(self.pending) > self.lag:
            self._read(*self.pending.pop(0))
        return flags[:-1].amax().clamp(max=1)

    def finish(self) -> None:
        """Names the bad ones among the last steps, which no later step will."""
        while self.pending:
            self._read(*self.pending.pop(0))

    def _read(self, step: int, names: list[str], seen: Tensor, event: Any) -> None:
        if event is not None:
            event.synchronize()
        *flags, asked = seen.tolist()
        self.stop.agreed |= asked > 0
        bad = [name for name, flag in zip(names, flags, strict=True) if flag]
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad:
            what = f"step {step}: {' and '.join(bad)} not finite"
            if self.in_a_row >= self.max_bad_steps:
                raise Diverged(f"{what}, for {self.in_a_row} steps in a row")
            self.say(f"{what}; the update is skipped")
