"""The state that a run resumes from, as one object that saves and loads itself."""

from typing import Any

from torch import nn

from vqgen.training.fsdp import load_optimizer, shard_like, whole


class TrainState:
    """The parts of a training program that a checkpoint holds, by their names in the checkpoint.

    Args:
        parts: objects with `state_dict` and `load_state_dict`: models (without DDP's wrapper), averages, optimizers,
            counters. A part that is None is left out.
    """

    def __init__(self, **parts: Any):
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts. All processes must call it: each sends its FSDP shards to the main process."""
        return {name: whole(part.state_dict()) for name, part in self.parts.items()}

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
