"""What a run resumes from, as one object that saves and loads itself."""

from typing import Any

from torch import nn

from vqgen.training.fsdp import load_optimizer, shard_like, whole


class TrainState:
    """The parts of a training program that a checkpoint holds, by the names that they have there.

    Args:
        parts: anything with `state_dict` and `load_state_dict`: models (without their wrapper of DDP), averages,
            optimizers, counters. A part that is None is left out.
    """

    def __init__(self, **parts: Any):
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """All parts' states. All processes must call it, since FSDP's shards are put together on the main one."""
        return {name: whole(part.state_dict()) for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads all parts, after `Accelerator.prepare`: FSDP has cut the weights by then.

        Raises:
            KeyError, RuntimeError, ValueError: the state is of other parts.
        """
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                own = part.state_dict()
                part.load_state_dict({key: shard_like(x, own.get(key, x)) for key, x in state[name].items()})
            elif hasattr(part, "param_groups"):
                load_optimizer(part, state[name])
            else:
                part.load_state_dict(state[name])
