"""Refuses launch options of Accelerate that would end in a traceback."""

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from vqgen.errors import require


def refuse_other_engines() -> None:
    """Refuses DeepSpeed and Megatron-LM; call it before `Accelerator()`, which would import them.

    Raises:
        InputError: the launch asks for DeepSpeed or Megatron-LM.
    """
    for name, engine in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        require(not asked, f"{engine}: is not supported; use accelerate launch --multi_gpu, or --use_fsdp for stage 2")


def compiled_by(accelerator: Accelerator, setting: bool) -> str | None:
    """What compiles the models' backward passes, as the user has written it; None if nothing does.

    Args:
        accelerator: names the TorchDynamo backend that the launch asks for, which compiles all models.
        setting: `train.compile`.
    """
    backend = accelerator.state.dynamo_plugin.backend
    if backend not in (DynamoBackend.NO, DynamoBackend.EAGER):
        return f"--dynamo_backend {backend.value.lower()}"
    return "train.compile=true" if setting else None


def compile_in_place(model: nn.Module) -> None:
    """Makes torch compile a model when it first runs; its weights and their names stay."""
    torch._dynamo.config.optimize_ddp = False  # DDP's own way to compile refused checkpointing in older versions
    model.compile()


def refuse_compiled(by: str | None, settings: Mapping[str, float]) -> None:
    """Refuses compiled models for what they cannot do, or would compile anew at every other step.

    The first are losses that run a backward pass twice or differentiate it, the second transforms to many sizes.

    Args:
        by: what compiles them, from `compiled_by`.
        settings: settings by key that turn such a thing on unless they are 0.

    Raises:
        InputError: such a thing is on.
    """
    off = [f"{key}={type(value)(0)}".lower() for key, value in settings.items() if value]
    otherwise = "set train.compile=false" if by == "train.compile=true" else "launch with --dynamo_backend no"
    require(by is None or not off, f"{by}: needs {' '.join(off)}; set that, or {otherwise}")
