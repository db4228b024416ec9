"""Launches that the programs refuse, and output whose reader ends early."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import ENVIRONMENT, ROOT

from vqgen.cli import launch
from vqgen.training.checkpoints import newest_checkpoint

STAGE1 = ["stage1/train.py", "configs/debug/stage1.yaml", "tracking.wandb=disabled"]
VQGAN = ["loss.adversarial.name=hinge", "discriminator.width=8"]


@pytest.mark.parametrize(
    ("variable", "value", "settings", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", [], "DeepSpeed: is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", [], "Megatron-LM: is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", VQGAN, "set that, or launch with --dynamo_backend no"),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "AOT_EAGER",
            [*VQGAN, "loss.adversarial.adaptive=false"],
            "--dynamo_backend aot_eager: needs loss.adversarial.r1=0.0; ",
        ),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "AOT_EAGER",
            [*VQGAN, "loss.adversarial.r1=0"],
            "--dynamo_backend aot_eager: needs loss.adversarial.adaptive=false; ",
        ),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "AOT_EAGER",
            ["equivariance.share=0.5"],
            "--dynamo_backend aot_eager: needs equivariance.share=0.0; ",
        ),
    ],
)
def test_launches_that_would_end_in_a_traceback_are_refused(
    program, monkeypatch, tmp_path, variable, value, settings, said
):
    monkeypatch.setenv(variable, value)  # as `accelerate launch` does
    code, _, errors = program(*STAGE1, *settings, f"run_dir={tmp_path}/run")
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert said in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("load", "processes", "threads"),
    [([1, 2, 0, 3], 1, 4), ([97, 2, 0, 3], 1, 3), ([99, 50, 60, 3], 1, 2), ([100] * 4, 1, 1), ([99, 0, 0, 0], 2, 1)],
)
def test_threads_leave_the_cores_of_other_programs_alone(monkeypatch, capsys, load, processes, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(launch, "available_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(launch.psutil, "cpu_percent", lambda interval, percpu: load)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv(launch.CHOSEN, "")
    try:
        launch._use_free_cores(processes)
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == threads
        assert os.environ[launch.CHOSEN] == "1"
        busy = sum(part > 50 for part in load)
        assert ("keep" in (said := capsys.readouterr().out)) == (busy > 0)
        assert "OMP_NUM_THREADS= sets another number" in said or not busy
    finally:
        torch.set_num_threads(before)


def test_a_backend_that_compiles_nothing_takes_every_loss(program, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    settings = [*VQGAN, "loss.adversarial.start=0", "train.max_steps=2", f"run_dir={tmp_path}/run"]
    code, _, errors = program(*STAGE1, *settings)
    assert code == 0, errors


def read_until(start: str, command: list[str], errors: Path, **environment: str) -> tuple[int, str]:
    """Runs a command, and reads its output only until a line starts so; returns its exit code and the first line."""
    with errors.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
    first = line = process.stdout.readline()
    while line and not line.startswith(start):
        line = process.stdout.readline()
    process.stdout.close()
    return process.wait(timeout=300), first


@pytest.mark.parametrize("launched", [False, True])
def test_a_run_whose_output_no_one_reads_is_saved_and_ends_quietly(tmp_path, launched):
    run = tmp_path / "run"
    command = [sys.executable, *STAGE1, f"run_dir={run}", "train.max_steps=1000000", "train.checkpoint_every=1000000"]
    command.append("train.mixed_precision=no")  # with null, a hint about bf16 may follow the line below
    # The program only has to see a launcher; what the launcher does with the exit code is not tested.
    environment = {"TORCHELASTIC_RUN_ID": "test"} if launched else {}
    code, line = read_until(f"{run}: 20000 training", command, tmp_path / "errors", **environment)
    assert line.startswith("images: 20,000 to train on")
    assert code == (0 if launched else 141)
    assert (tmp_path / "errors").read_text() == ""
    assert newest_checkpoint(run) is not None  # the step whose line could not be written


def test_text_that_is_still_in_the_buffer_at_the_end_ends_quietly_too(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "errors").open("w") as errors:
        command = [sys.executable, "stage2/sample.py", "--help"]  # shorter than the buffer
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=errors).returncode
    os.close(writer)
    assert (code, (tmp_path / "errors").read_text()) == (141, "")


def test_a_library_that_is_only_imported_leaves_messages_to_its_host():
    code = "import logging, warnings; before = list(warnings.filters); import vqgen.cli.program; "
    code += "print([f for f in warnings.filters if f not in before and 'PIL' in str(f)], logging.getLogger().handlers)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
