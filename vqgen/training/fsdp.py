"""FSDP 2, which Accelerate's own configuration turns on: cutting whole tensors to shards and back for checkpoints."""

import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vqgen.distributed import rank
from vqgen.errors import require


def check_fsdp(accelerator: Accelerator) -> None:
    """Call it before `prepare`: sees to it that FSDP, where it is asked for, is of the kind that this module is for.

    Raises:
        InputError: it is not; without GPUs, Accelerate would start as many unconnected runs as processes.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        require(accelerator.is_fsdp2, "FSDP: needs fsdp_version 2, and a GPU for each process")
        # Every process has the weights already; to send them out from the main one would untie tied ones.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        warnings.filterwarnings("ignore", "FSDP2-wrapped module.*returned a view")  # which nothing changes in place


def refuse_fsdp() -> None:
    """For programs whose models fit on any GPU.

    Raises:
        InputError: FSDP is asked for.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    require(not asked, "FSDP: is for the prior of stage 2 alone; use accelerate launch --multi_gpu here")


def shard_like(x: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of x, cut as FSDP has cut a parameter of its shape; otherwise x itself."""
    if isinstance(parameter, DTensor) and x.shape == parameter.shape:
        return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)
    return x


def gathered(x: Tensor) -> Tensor:
    """A tensor with the shards of all processes put together, on each of them. All must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole(state: Any) -> Any:
    """A state dict with its shards put together on the main process's CPU, None on the others. All must call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        tensor = gathered(state)
        return tensor.cpu() if rank() == 0 else None
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the state of whole weights into an optimizer of weights that FSDP may have cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {i: {name: shard_like(x, parameters[i]) for name, x in of.items()} for i, of in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})
