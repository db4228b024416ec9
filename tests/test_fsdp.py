"""FSDP on two CPU processes: the numbers and the checkpoints of one process, with half of the memory on each."""

import json
from pathlib import Path

import pytest
import torch
from programs import as_it_was, shell, untimed_metrics

from vqgen.training.checkpoints import load_state, with_tensors

FSDP = (
    "accelerate launch --config_file configs/accelerate/fsdp.yaml --num_processes 2 --mixed_precision no "
    "--main_process_port 0 tests/fsdp_on_cpu.py"
)


def check_same(one: Path, other: Path) -> None:
    """Checks that two runs logged the same at each step and ended in the same state."""
    for x, y in zip(untimed_metrics(one), untimed_metrics(other), strict=True):
        assert x == pytest.approx(y, rel=0, abs=1e-4)
    folders = [run / "checkpoints/step_00000024" for run in (one, other)]
    a, b = (with_tensors(folder, load_state(folder)) for folder in folders)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    of_each = [(a["optimizer"]["state"][i], b["optimizer"]["state"][i]) for i in a["optimizer"]["state"]]
    for x, y in [(a["model"], b["model"]), (a["ema"], b["ema"]), *of_each]:
        torch.testing.assert_close(dict(x), dict(y), rtol=0, atol=1e-4)


def test_fsdp_goes_on_with_a_run_of_one_process_and_one_process_goes_on_with_that(program, runs, tmp_path):
    plain, sharded, on, alone = (tmp_path / name for name in ("plain", "sharded", "on", "alone"))
    # Tied embeddings are one parameter with two names. Only the last of several passes may reduce the gradients.
    settings = (
        f"configs/debug/stage2.yaml stage1={runs}/stage1 tracking.wandb=disabled model.tie_word_embeddings=true "
        "train.accumulation=2 train.max_steps=24 train.eval_every=12 train.log_every=1 train.checkpoint_every=4 "
        "train.keep_checkpoints=99 optim.name=adamw"
    )
    assert program("stage2/train.py", *settings.split(), f"run_dir={plain}")[0] == 0

    said = shell(f"{FSDP} stage2/train.py {settings} run_dir={as_it_was(plain, 4, sharded)}")
    assert "2 x cpu; going on from step 4" in said
    check_same(plain, sharded)
    reports = [json.loads(line) for line in said.splitlines() if line.startswith('{"units"')]
    assert len(reports) == 2
    for report in reports:
        assert report["units"] == ["", "lm.model.layers.0", "lm.model.layers.1"]
        assert report["shares"] == pytest.approx({"weights": 0.5, "averages": 0.5, "optimizer": 0.5}, abs=0.01)
        assert report["whole"] == 0  # bytes of embeddings that are not sharded

    # From its own shards, too, which each process reads its part of.
    said = shell(f"{FSDP} stage2/train.py {settings} run_dir={as_it_was(sharded, 16, on)}")
    assert "2 x cpu; going on from step 16" in said
    check_same(plain, on)

    code, said, _ = program("stage2/train.py", *settings.split(), f"run_dir={as_it_was(sharded, 16, alone)}")
    assert code == 0
    assert "1 x cpu; going on from step 16" in said
    check_same(plain, alone)


def test_fsdp_in_bf16_has_its_loss_in_float32(runs, tmp_path):
    settings = f"configs/debug/stage2.yaml stage1={runs}/stage1 tracking.wandb=disabled run_dir={tmp_path}/run"
    settings += " optim.name=adamw train.max_steps=3 train.log_every=1 train.eval_every=9 train.mixed_precision=bf16"
    shell(f"{FSDP.replace('--num', '--mixed_precision bf16 --num', 1)} stage2/train.py {settings}")
    losses = torch.tensor([line["train/loss"] for line in untimed_metrics(tmp_path / "run") if "train/loss" in line])
    assert len(losses) == 3
    assert (losses * 128 % 1 != 0).any()  # unlike means of two bf16 numbers from 2 to 8


def test_fsdp_that_accelerate_does_not_do_is_refused(program, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    settings = ("configs/debug/stage2.yaml", f"stage1={runs}/stage1", f"run_dir={tmp_path}/run")
    code, _, said = program("stage2/train.py", *settings)
    assert code == 2
    assert "FSDP: needs fsdp_version 2, and a GPU for each process" in said
    assert not (tmp_path / "run").exists()


def test_fsdp_refuses_muon(runs, tmp_path):
    settings = f"configs/debug/stage2.yaml stage1={runs}/stage1 tracking.wandb=disabled run_dir={tmp_path}/run"
    with pytest.raises(AssertionError, match=r"optim\.name=muon: FSDP shards the matrices that Muon needs whole; use"):
        shell(f"{FSDP} stage2/train.py {settings}")
