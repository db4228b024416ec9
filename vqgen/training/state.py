"""The state that a run resumes from, as one object that saves and loads itself."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vqgen.training.fsdp import load_optimizer, moments, shard_like

LARGE = 2**30  # bytes


class TrainState:
    """The parts of a training program that a checkpoint holds, by their names in the checkpoint.

    Args:
        parts: objects with `state_dict` and `load_state_dict`: models (without DDP's wrapper), averages, optimizers,
            counters. A part that is None is left out.
    """

    def __init__(self, **parts: Any):
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts, FSDP's tensors as shards. All processes must call it."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def places(self, state: dict[str, Any]) -> dict[str, Any]:
        """Tensors to read such a state into, as far as there are some before it is loaded. All processes must call it.

        Args:
            state: a state that has at least the tensors' shapes.
        """
        own = self.state_dict()
        for name, part in self.parts.items():
            if hasattr(part, "param_groups"):  # an optimizer has no tensors before its first step
                own[name]["state"] = moments(part, state[name])
        return own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads all parts; call it after `Accelerator.prepare`, when FSDP has sharded the weights.

        Raises:
            KeyError, RuntimeError, ValueError: the state does not match the parts.
        """
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                own = part.state_dict()
                part.load_state_dict({key: shard_like(x, own.get(key, x)) for key, x in state[name].items()})
            elif hasattr(part, "param_groups"):
                load_optimizer(part, state[name])
            else:
                part.load_state_dict(state[name])


def is_large(state: Any) -> bool:
    """Whether a state is better written in shards: it has many bytes, or FSDP's shards."""
    tensors = list(_tensors(state))
    return any(isinstance(x, DTensor) for x in tensors) or sum(x.nbytes for x in tensors) >= LARGE


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, Tensor):
        yield state
