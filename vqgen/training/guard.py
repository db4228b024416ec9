"""The guard against updates whose losses are not finite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqgen.distributed import all_reduce_sum
from vqgen.training.stop import Stop


class Diverged(Exception):
    """Too many steps in a row were not finite, so the run must go back to an earlier checkpoint."""


class FiniteGuard:
    """Skips each step whose losses are not finite, names these losses, and raises after too many such steps in a row.

    The device decides whether to skip a step. The CPU reads the result a few steps later, so it never waits.

    Args:
        max_bad_steps: this many bad steps in a row raise `Diverged`.
        say: prints a line.
        device: the losses' device.
        stop: learns at each step whether any process was asked to stop; this shares the guard's own exchange.
    """

    def __init__(self, max_bad_steps: int, say: Callable[[str], None], device: torch.device, stop: Stop):
        self.max_bad_steps, self.say, self.device = max_bad_steps, say, device
        self.stop = stop
        self.lag = 2 if device.type == "cuda" else 0
        self.pending: list[tuple[int, list[str], Tensor, Any]] = []
        self.in_a_row = 0

    def check(self, step: int, **terms: Tensor) -> Tensor:
        """1.0 if a term (a scalar) is not finite on any process, else 0.0; a fused optimizer skips a step at 1.0.

        Raises:
            Diverged: too many steps in a row were bad.
        """
        asked = torch.full((), float(self.stop.asked), device=self.device)
        flags = torch.stack([*((~term.detach().isfinite()).float() for term in terms.values()), asked])
        flags = all_reduce_sum(flags)
        self.pending.append((step, list(terms), *self._fetched(flags)))
        if len(self.pending) > self.lag:
            self._read(*self.pending.pop(0))
        return flags[:-1].amax().clamp(max=1)

    def finish(self) -> None:
        """Reports the bad steps among the last ones, whose results no later step would read."""
        while self.pending:
            self._read(*self.pending.pop(0))

    def _fetched(self, flags: Tensor) -> tuple[Tensor, Any]:
        """The flags on the CPU, and the event after which they are there, if they are not there yet."""
        if self.device.type != "cuda":
            return flags.cpu(), None
        seen = torch.empty(len(flags), pin_memory=True)
        seen.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return seen, event

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
