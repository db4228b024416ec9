"""What is measured at each step, without waiting for the device."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vqgen.distributed import all_gather, all_reduce_sum, rank, world_size


class Means:
    """Means of named numbers over a stretch of steps, kept on the device: reading them at every step would stall it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Takes in scalars; a name may come in some steps only, though on all processes."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def compute(self) -> dict[str, float]:
        """The means since the last call, over all processes."""
        sums = all_reduce_sum(torch.stack(list(self.sums.values()))) / world_size()
        means = {name: s / self.counts[name] for name, s in zip(self.sums, sums.tolist(), strict=True)}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last `compute`, by each process, who all must ask."""
        sums = all_gather(torch.stack(list(self.sums.values()))) if self.sums else torch.zeros(world_size(), 0)
        return {"counts": dict(self.counts), "sums": sums}  # (world_size, n)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there: to the bit on as many processes, else with the mean of theirs."""
        sums = state["sums"].to(self.device)
        sums = sums[rank()] if len(sums) == world_size() else sums.mean(dim=0)
        self.counts, self.sums = dict(state["counts"]), dict(zip(state["counts"], sums, strict=True))


def accumulate(terms: dict[str, Tensor], values: Mapping[str, Tensor], passes: int) -> None:
    """Takes the values of one of so many passes into the terms of a step, which become their means."""
    for name, value in values.items():
        terms[name] = terms.get(name, 0) + value.detach() / passes


class Stopwatch:
    """Time that parts of steps take on the device, which is not waited for before `seconds` is asked."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what is done inside."""
        start = self._now()
        yield
        self.spans.append((start, self._now()))

    def seconds(self) -> float:
        """What was counted since the last call."""
        if self.on_cuda:
            torch.cuda.synchronize()
            total = sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        else:
            total = sum(end - start for start, end in self.spans)
        self.spans = []
        return total

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
