"""PROGRAM [ARGUMENTS]: runs the program and makes Accelerate, which does FSDP on GPUs only, see a GPU per process.

The prior's loss is computed in blocks, as that of a large prior.
At the end, each process prints which modules are gathered one by one, and its share of the training state.
"""

import gc
import json
import os
import runpy
import sys

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

import vqgen.priors.prior
from vqgen.training.average import WeightEMA


def end_training(accelerator: Accelerator) -> None:
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    (average,) = (thing for thing in gc.get_objects() if type(thing) is WeightEMA)
    kept = {
        "weights": list(model.parameters()),
        "averages": average.shards,
        "optimizer": [x for of_one in optimizer.state.values() for x in of_one.values() if x.ndim],
    }
    shares = {
        name: sum(x.to_local().numel() for x in tensors) / sum(x.numel() for x in tensors)
        for name, tensors in kept.items()
    }
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    shape = model.lm.get_input_embeddings().weight.shape
    plain = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    whole = sum(x.untyped_storage().nbytes() for x in plain if x.shape == shape)
    print(json.dumps({"units": units, "shares": shares, "whole": whole}))
    plain_end(accelerator)


plain_end, Accelerator.end_training = Accelerator.end_training, end_training
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "False"}
vqgen.priors.prior.LOGITS_AT_ONCE = 2**12
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
