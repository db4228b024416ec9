"""Support for FSDP 2, which Accelerate's own configuration turns on: shards tensors, and gathers them again."""

import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vqgen.distributed import rank
from vqgen.errors import require


def check_fsdp(accelerator: Accelerator) -> None:
    """Checks before `prepare` that FSDP, if the launch asks for it, is FSDP 2 on GPUs.

    Raises:
        InputError: it is not. Without GPUs, Accelerate would start one unconnected run for each process.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        require(accelerator.is_fsdp2, "FSDP: needs fsdp_version 2, and a GPU for each process")
        # Every process has the weights already. Sending them out from the main process would separate tied weights.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        if (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
            # Accelerate would round what the module returns, its losses, to bf16.
            accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module.*returned a view")  # no code changes the view in place


def refuse_fsdp() -> None:
    """Refuses FSDP for programs whose models fit on any GPU.

    Raises:
        InputError: the launch asks for FSDP.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    require(not asked, "FSDP: is only for the prior of stage 2; use accelerate launch --multi_gpu here")


def shard_like(x: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of x if FSDP has sharded a parameter of the same shape; otherwise x itself."""
    if isinstance(parameter, DTensor) and not isinstance(x, DTensor) and x.shape == parameter.shape:
        return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)
    return x


def gathered(x: Tensor) -> Tensor:
    """The complete tensor, from the shards of all processes, on each process. All processes must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole(state: Any) -> Any:
    """A state dict whose sharded tensors are complete on the main process's CPU, and None on the other processes.

    All processes must call it.
    """
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        tensor = gathered(state)
        return tensor.cpu() if rank() == 0 else None
    return state


def moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    """New tensors for those of an optimizer's state that have the shapes of their weights, sharded like these."""
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return {
        i: {
            name: torch.empty_like(parameters[i], dtype=x.dtype)
            for name, x in of.items()
            if x.shape == parameters[i].shape
        }
        for i, of in state["state"].items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state for complete weights into an optimizer whose weights FSDP may have sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {i: {name: shard_like(x, parameters[i]) for name, x in of.items()} for i, of in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})
