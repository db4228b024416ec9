"""Refuses launch options of Accelerate that would end in a traceback."""

import os
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from vqgen.errors import require


def refuse_other_engines() -> None:
    """Refuses DeepSpeed and Megatron-LM; call it before `Accelerator()`, which would import them.

    Raises:
        InputError: the launch asks for DeepSpeed or Megatron-LM.
    """
    for name, engine in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        require(not asked, f"{engine}: is not supported; use accelerate launch --multi_gpu, or --use_fsdp for stage 2")


def refuse_compiled(accelerator: Accelerator, settings: Mapping[str, float]) -> None:
    """Refuses compiled models for what they cannot do, or would compile anew at every other step.

    The first are losses that run a backward pass twice or differentiate it, the second transforms to many sizes.

    Args:
        accelerator: names the TorchDynamo backend that the launch asks for.
        settings: settings by key that turn such a thing on unless they are 0.

    Raises:
        InputError: such a thing is on, and the backend compiles backward passes.
    """
    backend = accelerator.state.dynamo_plugin.backend
    if backend not in (DynamoBackend.NO, DynamoBackend.EAGER):
        off = [f"{key}={type(value)(0)}".lower() for key, value in settings.items() if value]
        flag = f"--dynamo_backend {backend.value.lower()}"
        require(not off, f"{flag}: needs {' '.join(off)}; set that, or launch with --dynamo_backend no")
