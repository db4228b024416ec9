"""Measurements at each step that do not wait for the device."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vqgen.distributed import all_gather, all_reduce_sum, rank, world_size


class Means:
    """Means of named numbers over several steps, kept on the device; reading them at each step would stall it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Adds scalars by name; a name may be absent in some steps, but then on all processes."""
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
        """The sums since the last `compute`, of each process. All processes must call it."""
        sums = all_gather(torch.stack(list(self.sums.values()))) if self.sums else torch.zeros(world_size(), 0)
        return {"counts": dict(self.counts), "sums": sums}  # (world_size, n)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the sums: bit for bit on the same number of processes, otherwise their mean over the processes."""
        sums = state["sums"].to(self.device)
        sums = sums[rank()] if len(sums) == world_size() else sums.mean(dim=0)
        self.counts, self.sums = dict(state["counts"]), dict(zip(state["counts"], sums, strict=True))


def accumulate(terms: dict[str, Tensor], values: Mapping[str, Tensor], passes: int) -> None:
    """Adds the values of one pass, divided by the number of passes, to the terms of a step."""
    for name, value in values.items():
        terms[name] = terms.get(name, 0) + value.detach() / passes


class Stopwatch:
    """Measures the time that parts of steps take on the device; only `seconds` waits for the device."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measures the time spent inside the context."""
        start = self._now()
        yield
        self.spans.append((start, self._now()))

    def seconds(self) -> float:
        """The seconds measured since the last call."""
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
