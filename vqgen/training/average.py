"""The running average of the weights, which evaluations use and model/ holds."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vqgen.distributed import rank
from vqgen.training.fsdp import gathered, shard_like


class WeightEMA:
    """A running average of a model's weights whose window grows with the run (EDM2, Karras et al. 2024, section 3.1).

    After t steps, the weights of step s count in proportion to s^gamma, so one setting fits a run of any length.
    Codebooks and buffers are copied instead: they are averages already, or contain codes that jump when revived.

    Args:
        model: the model to average.
        width: standard deviation of this profile as a share of the run so far (EDM2's sigma_rel); it must be below
            0.28, where gamma would be zero; 0 copies the model.
    """

    def __init__(self, model: nn.Module, width: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.shards: list[Tensor] = []  # holds the averages under FSDP; the model's own tensors are then empty
        self.gamma = np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max() if width else None  # EDM2, algorithm 2

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Adds the model's weights after step number `step`, counted from 1 (EDM2, eq. 127)."""
        weight = 1 - (1 - 1 / step) ** (self.gamma + 1) if self.gamma is not None else 1.0
        averages, weights = ([p.detach() for p in m.parameters()] for m in (self.model, model))
        torch._foreach_lerp_(self.shards or averages, weights, weight)
        for (name, copied), parameter in zip(self.model.named_parameters(), model.parameters(), strict=True):
            if name.endswith("codebook"):
                copied.copy_(parameter)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    def shard_like(self, model: nn.Module) -> None:
        """Shards the averages if FSDP has sharded the model's weights; `whole` then puts them together."""
        if any(isinstance(p, DTensor) for p in model.parameters()):
            averages = (p.detach() for p in self.model.parameters())
            self.shards = [shard_like(*pair) for pair in zip(averages, model.parameters(), strict=True)]
            self._put_back()

    @contextmanager
    def whole(self, for_main: bool = False) -> Iterator[Any]:
        """Yields the averaged model with complete weights. All processes must call it.

        Args:
            for_main: only the main process gets the weights, on its CPU if they are sharded, because they may not fit
                on one GPU beside its shards.
        """
        try:
            for parameter, shard in zip(self.model.parameters(), self.shards, strict=False):
                complete = gathered(shard)
                if not for_main or rank() == 0:
                    parameter.data = complete.cpu() if for_main else complete
            yield self.model
        finally:
            self._put_back()

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged model's own state, with the shards if there are some."""
        state = self.model.state_dict()
        shards = {id(p): x for p, x in zip(self.model.parameters(), self.shards, strict=False)}
        named = self.model.named_parameters(remove_duplicate=False)
        return state | {name: shards[id(p)] for name, p in named if id(p) in shards}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads a state from `state_dict`, of complete weights or of shards, also into sharded averages."""
        if not self.shards:
            self.model.load_state_dict(state)
            return
        for name, own in self.state_dict().items():
            own.copy_(shard_like(state[name], own))

    def _put_back(self) -> None:
        for parameter, _ in zip(self.model.parameters(), self.shards, strict=False):
            parameter.data = parameter.new_empty(0)
