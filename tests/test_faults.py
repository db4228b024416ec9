"""Signals, full disks, full memory, killed processes: one clear line, and nothing lost. soak/faults.py does more."""

import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from programs import ENVIRONMENT, ROOT, launch_two, untimed_metrics
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from vqgen.settings import GANConfig, SampleConfig, Stage1Config, TrainConfig
from vqgen.training.checkpoints import newest_checkpoint
from vqgen.training.guard import FiniteGuard
from vqgen.training.stop import Stop, explained

QUIET = "tracking.wandb=disabled"
# Lines of metrics, evaluations and checkpoints fall on different steps; with accumulation, mirror images and dropout.
UNEVEN = ["train.log_every=7", "train.eval_every=9", "train.checkpoint_every=11", "train.accumulation=2", QUIET]
UNEVEN += ["train.max_steps=30", "train.eval_images=32"]
VQGAN = ["loss.adversarial.name=hinge", "loss.adversarial.start=0.2", "loss.adversarial.lecam=0.01"]
VQGAN += ["discriminator.width=8", "model.quantizer.temperature=0.01", "perturb.images=0.3"]
VQGAN += ["equivariance.share=0.5", "equivariance.scale=0.75", "equivariance.flip=true"]
PROGRAMS = {
    "stage1/train": ["configs/debug/stage1.yaml", "data.flip=true", *VQGAN],
    "stage1/train_gan": ["configs/debug/gan.yaml", "data.flip=true"],
    "stage2/train": ["configs/debug/stage2.yaml", "model.attention_dropout=0.1"],
}


def settings(name: str, runs: Path, run_dir: Path) -> list[str]:
    given = [f"{name}.py", *PROGRAMS[name], *UNEVEN, f"run_dir={run_dir}"]
    return [*given, f"stage1={runs}/stage1"] if name == "stage2/train" else given


def check_same_state(a: Path, b: Path) -> None:
    """Checks that two runs ended in the same state to the bit, except for figures that depend on time."""
    a, b = (torch.load(newest_checkpoint(run) / "state.pt", weights_only=True) for run in (a, b))
    for key in ("seconds", "logged"):  # the speed's number of characters varies
        assert a.pop(key) > 0 < b.pop(key)
    for name in {"data", "held_out", "tokenizer", "vqgen", "started_from", "ended"} & a.keys():
        assert a.pop(name) == b.pop(name)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def at_step(monkeypatch):
    """Does something in the middle of a step, once."""

    def arrange(step: int, do) -> None:
        check = FiniteGuard.check

        def check_and_do(guard, now, **terms):
            if now == step and not done:
                done.append(now)
                do(guard)
            return check(guard, now, **terms)

        done: list[int] = []
        monkeypatch.setattr(FiniteGuard, "check", check_and_do)

    return arrange


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bits(runs, program, at_step, tmp_path, name):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert program(*settings(name, runs, whole))[0] == 0
    # Before an evaluation that is due, between two lines of metrics, and right after a checkpoint.
    for step, number, code in ((8, signal.SIGTERM, 0), (12, signal.SIGINT, 130), (21, signal.SIGUSR1, 0)):
        at_step(step, lambda guard, number=number: os.kill(os.getpid(), number))
        found, output, errors = program(*settings(name, runs, stopped))
        assert (found, errors) == (code, "")
        assert f"{number.name}: stopped at step {step + 1}; the same command goes on from step {step + 1}" in output
        assert newest_checkpoint(stopped).name == f"step_{step + 1:08d}"
    code, output, _ = program(*settings(name, runs, stopped))
    assert code == 0
    assert "going on from step 22" in output
    assert untimed_metrics(stopped) == untimed_metrics(whole)
    check_same_state(stopped, whole)


def test_the_clock_stops_a_run_too(program, at_step, tmp_path):
    def time_is_up(guard) -> None:
        assert 3000 < guard.stop.deadline - time.monotonic() < 3600
        guard.stop.deadline = time.monotonic()

    at_step(7, time_is_up)
    arguments = ["stage1/train.py", "configs/debug/stage1.yaml", QUIET, "train.max_hours=1"]
    code, output, _ = program(*arguments, f"run_dir={tmp_path}/run")
    assert code == 0
    assert "train.max_hours: stopped at step 8; the same command goes on from step 8" in output
    assert newest_checkpoint(tmp_path / "run").name == "step_00000008"


def test_a_run_that_is_stopped_among_bad_steps_goes_back_to_a_good_one(program, at_step, monkeypatch, tmp_path):
    """The adversarial weight makes gradients overflow from its start, step 30, until it has been lowered far enough."""
    arguments = ["stage1/train.py", "configs/debug/stage1.yaml", QUIET, "discriminator.width=8", "train.max_steps=40"]
    arguments += ["loss.adversarial.name=hinge", "loss.adversarial.adaptive=false", "loss.adversarial.weight=1e21"]
    arguments += ["loss.adversarial.start=0.75", "loss.adversarial.ramp=0", "discriminator.norm=none"]
    arguments += ["train.max_bad_steps=4", "train.eval_every=100", f"run_dir={tmp_path}/run"]
    at_step(31, lambda guard: os.kill(os.getpid(), signal.SIGTERM))
    code, output, _ = program(*arguments)
    assert code == 0
    assert "SIGTERM: stopped at step 32; the same command goes on from step 20" in output
    assert newest_checkpoint(tmp_path / "run").name == "step_00000020"
    code, output, errors = program(*arguments)
    assert code == 0, errors
    assert "going back to" in output
    assert newest_checkpoint(tmp_path / "run").name == "step_00000040"


def test_what_comes_after_a_signal_is_not_the_reason():
    stop = Stop()
    stop.training = True
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # the same Ctrl-C also ends the launcher
    assert (stop.reason, stop.exit_code) == ("SIGINT", 130)


def test_a_second_sigint_ends_at_once_and_one_before_the_first_step_too():
    for before_training in (True, False):
        child = os.fork()
        if child == 0:
            stop = Stop()
            try:
                with stop.listening():
                    stop.training = not before_training
                    for _ in range(1 if before_training else 2):
                        os.kill(os.getpid(), signal.SIGINT)
            except SystemExit as ended:
                os._exit(ended.code)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_a_full_disk_is_one_line_and_loses_nothing(runs, program, tmp_path):
    run = shutil.copytree(runs / "stage1", tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step_00000040")
    arguments = ["stage1/train.py", "configs/debug/stage1.yaml", f"run_dir={run}", QUIET]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        code, _, errors = program(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "File too large; make room, and the same command then goes on from the newest checkpoint" in errors
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000020"]
    assert program(*arguments)[0] == 0
    check_same_state(run, runs / "stage1")


def test_a_killed_data_worker_is_one_line_and_leaves_no_process(program, at_step, tmp_path):
    for i in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (32, 32), 30 * i).save(tmp_path / f"images/{i}.png")
    before = set(psutil.Process().children())

    def workers() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if child not in before]

    at_step(3, lambda guard: workers()[0].kill())
    data = [f"data.source={tmp_path}/images", "data.cache_gb=0", "data.workers=2", "train.batch_size=4"]
    code, _, errors = program(
        "stage1/train.py",
        "configs/debug/stage1.yaml",
        QUIET,
        *data,
        f"run_dir={tmp_path}/run",
        "train.max_steps=1000000",
    )
    assert code == 1
    assert "a process that loads data was killed" in errors.splitlines()[-1]
    assert "lower data.workers=" in errors.splitlines()[-1]
    psutil.wait_procs(workers(), timeout=5)
    assert not workers()


def test_faults_of_the_machine_are_told_in_one_line_and_bugs_are_not(tmp_path):
    config = Stage1Config(run_dir="runs/a", train=TrainConfig(batch_size=96, accumulation=2))
    with pytest.raises(RuntimeError) as full_memory:
        torch.empty(1 << 60)
    # A GPU's memory cannot be filled here, so the test makes torch's errors by hand.
    for error in (full_memory.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")):
        line = explained(error, config)
        assert "train.batch_size=96" in line
        assert "48 images per pass; set train.accumulation=4, or lower train.batch_size" in line
        assert "lower batch_size=" in explained(error, SampleConfig())
    single = GANConfig(train=TrainConfig(batch_size=2, accumulation=2))
    assert "one image per pass already" in explained(MemoryError(), single)

    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(Exception, match=r"left|unexpected pos") as full_disk,
    ):
        torch.save({"w": torch.zeros(100_000)}, file)
    assert explained(full_disk.value, config).startswith("runs/a: No space left on device; make room")
    with pytest.raises(Exception, match="os error 2") as no_folder:
        save_file({"w": torch.zeros(1)}, tmp_path / "missing/w.safetensors")
    assert explained(no_folder.value, config) is None
    with pytest.raises(PermissionError) as denied:
        raise PermissionError(13, "Permission denied", "runs/a/checkpoints")
    assert explained(denied.value, config).startswith("runs/a/checkpoints: Permission denied; correct that")

    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"):
        assert "set train.accumulation=4" in explained(RuntimeError(text), config)
    with pytest.raises(IndexError) as in_a_worker:
        next(iter(DataLoader([0], num_workers=1, collate_fn=lambda batch: batch[1])))
    assert explained(in_a_worker.value, config) is None
    bugs = [EOFError("No data left in file"), KeyError("x"), FileNotFoundError(2, "x")]
    bugs += [RuntimeError("mat1 and mat2 shapes cannot be multiplied")]
    bugs[1].__context__ = denied.value  # raised while the first error was handled
    for bug in bugs:
        assert explained(bug, config) is None


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


def working_on(run: Path) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if f"run_dir={run}" in (process.info["cmdline"] or [])]


@pytest.mark.parametrize("fault", ["SIGTERM to the launcher", "a rank that dies"])
def test_two_processes_end_together(tmp_path, fault):
    run = tmp_path / "run"
    arguments = f"stage1/train.py configs/debug/stage1.yaml {QUIET} train.max_steps=1000000 run_dir={run}"
    with (tmp_path / "log").open("w") as log:
        command = [*launch_two().split(), *arguments.split()]
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    wait_for((run / "checkpoints/step_00000020").exists, process)
    if fault == "SIGTERM to the launcher":
        process.terminate()
    else:
        next(other for other in working_on(run) if other.environ().get("RANK") == "1").kill()
    assert process.wait(timeout=30) != 0
    psutil.wait_procs(working_on(run), timeout=30)
    assert not working_on(run)
    said = (tmp_path / "log").read_text()
    if fault == "SIGTERM to the launcher":
        assert f"SIGTERM: stopped at step {int(newest_checkpoint(run).name[5:])}; " in said
    else:
        assert "error: another process of this run has ended" in said
        assert newest_checkpoint(run) is not None
