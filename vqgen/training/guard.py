"""Steps whose losses are not finite: skipped, named, and if there are too many, the way back."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen.distributed import all_reduce_sum, rank
from vqgen.errors import InputError
from vqgen.training.checkpoints import newest_checkpoint
from vqgen.training.stop import Stop

MAX_ROLLBACKS = 5  # a 32nd of what was set: what that does not cure has another cause


class Diverged(Exception):
    """So many steps in a row were not finite that only an earlier checkpoint helps."""

    def __init__(self, message: str, rollbacks: int):
        super().__init__(message)
        self.rollbacks = rollbacks


class FiniteGuard:
    """Finds steps whose losses are not finite: each is skipped and named, and too many in a row end the attempt.

    Whether to skip is decided on the device; the names are read a few steps later, when they are there anyway.

    Args:
        max_bad_steps: so many in a row are too many.
        rollbacks: how often the run went back before, for `Diverged`.
        say: prints a line.
        device: of the losses.
        stop: is told at each step whether any process was asked to stop, as that takes no exchange of its own.
    """

    def __init__(
        self, max_bad_steps: int, rollbacks: int, say: Callable[[str], None], device: torch.device, stop: Stop
    ):
        self.max_bad_steps, self.rollbacks, self.say, self.device = max_bad_steps, rollbacks, say, device
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
                raise Diverged(f"{what}, for {self.in_a_row} steps in a row", self.rollbacks)
            self.say(f"{what}; the update is skipped")


def going_back(train: Callable[[Any, int, Stop], None], config: Any, lowered: str, to_lower: str) -> None:
    """Calls train(config, rollbacks, stop), and again from the newest checkpoint each time it ends in `Diverged`.

    Going back is resuming. With the same settings it would end the same way, so train halves some for each rollback,
    its own or its checkpoint's.

    Args:
        train: the training program.
        config: its configuration.
        lowered: what it halves, in words.
        to_lower: the settings that the user should lower if that is not enough.

    Raises:
        InputError: going back does not help, or there is no checkpoint to go back to.
        SystemExit: a signal stopped the run, and its exit code is not 0.
    """
    rollbacks, stop = 0, Stop(config.train.max_hours)
    with stop.listening():
        while True:
            try:
                train(config, rollbacks, stop)
                break
            except Diverged as error:
                remedy = f"lower {to_lower}, and name another run_dir="
                checkpoint = newest_checkpoint(Path(config.run_dir))
                if checkpoint is None or error.rollbacks == MAX_ROLLBACKS:
                    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
                    raise InputError(f"{error}; {kept}; {remedy}") from error
                rollbacks = error.rollbacks + 1
                if rank() == 0:
                    print(f"{error}: going back to {checkpoint} with {lowered} at 1/{2**rollbacks} of what is set")
            gc.collect()  # or the failed attempt's models would lie beside those of the next
    if stop.exit_code:
        sys.exit(stop.exit_code)
