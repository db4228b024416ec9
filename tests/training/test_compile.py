"""train.compile: the same training by compiled networks, and what they cannot do."""

from functools import partialmethod

import pytest
import torch
from programs import untimed_metrics
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from vqgen.priors import prior
from vqgen.training.stop import explained

LARGE = ["train.activation_checkpointing=true", "train.mixed_precision=bf16"]  # as large runs have it
STAGES = {
    "stage1": ["loss.adversarial.name=hinge", "loss.adversarial.start=0.5", "loss.adversarial.adaptive=false"],
    "stage2": ["label_smoothing=0.1", "stage1={runs}/stage1"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_networks_train_as_others(program, runs, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(prior, "LOGITS_AT_ONCE", 2**12)
    settings = [f"{stage}/train.py", f"configs/debug/{stage}.yaml", "tracking.wandb=disabled", "train.log_every=1"]
    settings += ["train.max_steps=6", "train.eval_every=6", *LARGE, *(part.format(runs=runs) for part in STAGES[stage])]
    assert program(*settings, f"run_dir={tmp_path}/plain")[0] == 0

    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counted))  # needs no compiler
    torch._dynamo.reset()
    code, _, errors = program(*settings, f"run_dir={tmp_path}/compiled", "train.compile=true")
    assert code == 0, errors
    one, other = (untimed_metrics(tmp_path / name) for name in ("plain", "compiled"))
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert b == pytest.approx(a, rel=0.02, abs=0.02)
    # None anew at each step; stage 2 has one for a context with noise, and one for the last quarter, without it.
    assert 0 < len(graphs) <= (16 if stage == "stage1" else 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["loss.adversarial.name=hinge"], "train.compile=true: needs loss.adversarial.adaptive=false; set that, or"),
        (
            ["equivariance.share=0.5"],
            "train.compile=true: needs equivariance.share=0.0; set that, or set ",
        ),
    ],
)
def test_what_compiled_networks_cannot_do_is_refused(program, tmp_path, settings, said):
    given = ["configs/debug/stage1.yaml", "tracking.wandb=disabled", "train.compile=true", f"run_dir={tmp_path}/run"]
    code, _, errors = program("stage1/train.py", *given, *settings)
    assert code == 2
    assert said in errors
    assert not (tmp_path / "run").exists()


def test_a_machine_without_a_compiler_is_told_in_one_line():
    error = RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx")
    assert "torch finds no compiler (CPU: g++, GPU: triton); install it, or leave out" in explained(error)
