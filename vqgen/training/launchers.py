"""Which launches of Accelerate's the programs refuse, before they fail in a traceback."""

import os

from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from vqgen.errors import require


def refuse_other_engines() -> None:
    """Call it before `Accelerator()`, which would import the engine.

    Raises:
        InputError: the launch asks for DeepSpeed or Megatron-LM.
    """
    for name, engine in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        require(not asked, f"{engine}: is not supported; use accelerate launch --multi_gpu, or --use_fsdp for stage 2")


def refuse_compiled_r1(accelerator: Accelerator, r1: float) -> None:
    """R1 differentiates a gradient, which TorchDynamo's compiled backward passes do not allow.

    Args:
        accelerator: knows the backend that the launch asks for.
        r1: weight of the penalty.

    Raises:
        InputError: R1 is on, and a backend compiles backward passes.
    """
    plugin = accelerator.state.dynamo_plugin
    uncompiled = plugin.backend in (DynamoBackend.NO, DynamoBackend.EAGER)
    require(
        r1 == 0 or uncompiled,
        f"--dynamo_backend {plugin.backend.value.lower()}: compiles no gradient penalty; "
        "launch with --dynamo_backend no, or set loss.adversarial.r1=0",
    )
