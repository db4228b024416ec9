"""Inflicts faults on real runs, and prints the table of docs/faults.md, a row for each fault.

python tests/soak/faults.py [PART ...] [kills=20] [mutations=200] [hours=1] [seed=0] [folder=FOLDER]

Without PART it does all parts in about two hours; the last part takes one of them. Faults that need their own disk
(full, read-only) mount one in a namespace of child processes, which needs Linux, and root or user namespaces.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from programs import ENVIRONMENT, ROOT, launch_two

from vqgen.training.stop import SIGNALS

QUIET = ["tracking.wandb=disabled"]
# Uses workers, accumulation, mirror images, drawn codes and every loss, with a line of metrics every 3 steps.
PROGRAMS = {
    "stage1": [
        "stage1/train.py",
        "configs/debug/stage1.yaml",
        "data.source={folder}/images",
        "data.cache_gb=0",
        "data.workers=2",
        "data.flip=true",
        "train.accumulation=2",
        "loss.perceptual.name=alex",
        "loss.perceptual.every=8",
        "loss.adversarial.name=hinge",
        "loss.adversarial.start=0.4",
        "loss.adversarial.lecam=0.01",
        "discriminator.width=8",
        "model.quantizer.temperature=0.01",
    ],
    "stage2": [
        "stage2/train.py",
        "configs/debug/stage2.yaml",
        "stage1={folder}/tokenizer",
        "train.accumulation=2",
        "model.attention_dropout=0.1",
    ],
    "gan": [
        "stage1/train_gan.py",
        "configs/debug/gan.yaml",
        "data.source={folder}/images",
        "data.cache_gb=0",
        "data.workers=2",
        "data.flip=true",
        "train.accumulation=2",
    ],
}
PROGRAMS["shards"] = [*PROGRAMS["stage1"], "train.sharded_checkpoints=true"]  # of stage 1's checkpoints
OFTEN = ["train.max_steps=60", "train.log_every=3", "train.eval_every=7", "train.checkpoint_every=2"]
OFTEN += ["train.eval_images=32", "train.batch_size=16"]

Row = tuple[str, str, str]  # the fault, the expected outcome, the outcome


def start(arguments: list[str], log: Path, launcher: str = "python", limits: str = "") -> subprocess.Popen[bytes]:
    """Starts a program in its own process group, with its output in a file."""
    command = f"{limits} exec {launcher} {' '.join(arguments)}"
    with log.open("wb") as file:
        return subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        )


def run(arguments: list[str], log: Path, launcher: str = "python", limits: str = "") -> tuple[int, str]:
    """Runs a program to its end; returns its exit code and its output."""
    code = start(arguments, log, launcher, limits).wait()
    return code, log.read_text()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Waits until something has happened; returns False if the process ended before."""
    while not happened():
        if process.poll() is not None:
            return happened()
        time.sleep(0.002)
    return True


def checked(code: int, printed: str) -> None:
    assert code == 0, printed


def given(name: str, folder: Path, run_dir: Path, *more: str) -> list[str]:
    settings = [argument.format(folder=folder) for argument in PROGRAMS[name]]
    return [*settings, f"run_dir={run_dir}", *QUIET, *OFTEN, *more]


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_????????"))


def state(run_dir: Path) -> dict:
    from vqgen.training.checkpoints import load_state, with_tensors

    newest = checkpoints(run_dir)[-1]
    return with_tensors(newest, load_state(newest))


def equal(a: object, b: object) -> bool:
    """Whether two states are the same to the bit, except for figures that depend on time."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or (a.shape == b.shape and bool((a.isnan() & b.isnan() | (a == b)).all()))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key not in ("seconds", "logged"))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def metrics(run_dir: Path) -> list[dict]:
    timed = ("train/images_per_second", "train/data_time", "train/perceptual_time")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def same_run(a: Path, b: Path) -> bool:
    """Whether two runs have the same last checkpoint, shared model and metrics, to the bit."""
    files = [path.relative_to(a) for path in (a / "model").rglob("*") if path.is_file()]
    models = all((a / file).read_bytes() == (b / file).read_bytes() for file in files)
    return models and len(files) > 0 and equal(state(a), state(b)) and metrics(a) == metrics(b)


def last_line(printed: str) -> str:
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    return errors[-1] if errors else "no error line"


def children_left(run_dir: Path) -> int:
    """The number of processes that still work on a run some seconds after its end."""
    time.sleep(6)  # a data worker looks for its parent every 5 s
    return len(working_on(run_dir))


# The parts


def kill(folder: Path, rng: random.Random, kills: int) -> Iterator[Row]:
    """SIGKILL at random moments from the first step on."""
    log = folder / "log"
    for name, processes, count in [*((name, 1, kills) for name in PROGRAMS), ("stage1", 2, 3), ("shards", 2, 3)]:
        whole = folder / f"whole-{name}-{processes}"
        launcher = "python" if processes == 1 else launch_two()
        process = start(given(name, folder, whole), log, launcher)
        wait_for(lambda: " x cpu" in log.read_text(), process)
        began = time.monotonic()
        checked(process.wait(), log.read_text())
        span = time.monotonic() - began
        done = saving = ended = same = 0
        finished = False
        while done < count or not finished:
            run_dir = folder / f"killed-{name}-{processes}-{ended}"
            process = start(given(name, folder, run_dir), log, launcher)
            wait_for(lambda: " x cpu" in log.read_text(), process)
            if done < count:
                time.sleep(rng.uniform(0, 0.6) * span)
                end_at_once(process, run_dir)
            finished = process.wait() == 0
            if finished:
                same += same_run(whole, run_dir)
                ended += 1
            else:
                assert process.returncode == -signal.SIGKILL, log.read_text()
                done += 1
                saving += any(run_dir.glob("*.tmp")) or any(run_dir.glob("checkpoints/*.tmp"))
        what = f"kill -9 of {name}{', two processes,' if processes > 1 else ''} {count} times, {saving} while it saved"
        yield what, "each run ends bit-equal to the undisturbed one", f"{same} of {ended} runs bit-equal"


def end_at_once(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Sends SIGKILL to all processes of a run."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for other in working_on(run_dir):  # torchrun's processes have their own groups
        other.kill()


def working_on(run_dir: Path) -> list[psutil.Process]:
    """The processes that work on a run."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if f"run_dir={run_dir}" in (process.info["cmdline"] or [])]


def damage(folder: Path, rng: random.Random) -> Iterator[Row]:
    """Flips a byte in the newest checkpoint, or cuts its file short."""
    from vqgen.training.checkpoints import load_checkpoint

    for name in ("stage1", "shards"):
        source = made(folder, f"damage-{name}", name, "train.keep_checkpoints=2")
        newest, before = checkpoints(source)[::-1]
        files = [path.relative_to(source) for path in sorted(newest.rglob("*")) if path.is_file()]
        detected = loaded = 0
        for i in range(20):
            run_dir = shutil.copytree(source, folder / f"damaged-{name}-{i}")
            file = run_dir / files[i % len(files)]
            content = bytearray(file.read_bytes())
            place = rng.randrange(len(content))
            if i // len(files) % 2:
                del content[place:]
            else:
                content[place] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
            step = load_checkpoint(run_dir)["step"]
            detected += step == int(before.name[5:])
            loaded += step == int(newest.name[5:])
        kind = " in shards" if name == "shards" else ""
        yield (
            f"20 checkpoints{kind} with a bit flipped or cut short",
            "20 detected, 0 loaded",
            f"{detected} detected, {loaded} loaded",
        )
        run_dir = shutil.copytree(source, folder / f"damaged-{name}")
        os.truncate(run_dir / max(files, key=lambda path: (source / path).stat().st_size), 5000)
        code, printed = run(given(name, folder, run_dir), folder / "log")
        same = same_run(source, run_dir)
        said = "is named" if f"{newest.name} is damaged" in printed else "is not named"
        yield (
            f"one more{kind}, cut short, resumed",
            "it is named, and the end is bit-equal",
            f"{said}, exit code {code}, equal: {same}",
        )


def made(folder: Path, run_name: str, name: str, *more: str) -> Path:
    """A run that was never disturbed."""
    run_dir = folder / run_name
    checked(*run(given(name, folder, run_dir, *more), folder / "log"))
    return run_dir


def stop(folder: Path, rng: random.Random) -> Iterator[Row]:
    """Signals to end a run, and the clock."""
    whole = {name: made(folder, f"stop-whole-{name}", name) for name in PROGRAMS}
    log, to_launcher = folder / "log", "accelerate launch"
    cases = [(name, number, "python") for number in SIGNALS for name in PROGRAMS]
    cases += [("stage1", number, to_launcher) for number in (signal.SIGTERM, signal.SIGUSR1)]
    cases += [("stage2", signal.SIGTERM, launch_two())]
    for name, number, launcher in cases:
        run_dir = folder / f"stop-{name}-{number.name}-{launcher.split()[-1]}"
        process = start(given(name, folder, run_dir), log, launcher)
        wait_for(lambda run_dir=run_dir: len(checkpoints(run_dir)) > 0, process)
        time.sleep(rng.uniform(0, 0.5))
        sent = time.monotonic()
        process.send_signal(number)
        code = process.wait()
        while working_on(run_dir):
            time.sleep(0.01)
        seconds, step = time.monotonic() - sent, int(checkpoints(run_dir)[-1].name[5:])
        said = f"stopped at step {step}; the same command goes on from step {step}" in log.read_text()
        found = f"exit code {code}, all gone after {seconds:.1f} s at step {step}{'' if said else ', nothing said'}"
        what, expected = f"{number.name}, {name}", f"exit code {130 if number == signal.SIGINT else 0}"
        if launcher != "python":
            what, expected = f"{number.name} to `accelerate launch`, {name}", "all end"
        if launcher in ("python", to_launcher):
            checked(*run(given(name, folder, run_dir), log))
            found += f", resumed to the same bits: {same_run(whole[name], run_dir)}"
        else:
            what += ", two processes"
            found += f", checkpoint {'whole' if load_ok(run_dir) else 'damaged'}"
        yield what, f"{expected}, saved, to the same bits", found

    run_dir = folder / "stop-twice"
    process = start(given("stage1", folder, run_dir, "train.max_steps=100000"), log)
    wait_for(lambda: len(checkpoints(run_dir)) > 0, process)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    while process.poll() is None and time.monotonic() - sent < 0.02:
        process.send_signal(signal.SIGINT)
    code, seconds = process.wait(), time.monotonic() - sent
    whole_one = "whole" if load_ok(run_dir) else "damaged"
    found = f"exit code {code} after {seconds:.1f} s, newest checkpoint {whole_one}"
    found += f", {children_left(run_dir)} processes left"
    yield "SIGINT twice", "ends at once", found

    run_dir = folder / "stop-clock"
    code, printed = run(given("stage1", folder, run_dir, "train.max_steps=100000", "train.max_hours=0.005"), log)
    said = re.findall(r"train.max_hours: stopped at step \d+", printed)
    yield (
        "train.max_hours=0.005 (18 s)",
        "exit code 0, saved",
        f"exit code {code}, {said[0] if said else 'nothing said'}",
    )


def load_ok(run_dir: Path) -> bool:
    """Whether the newest checkpoint is whole."""
    from vqgen.training.checkpoints import newest_checkpoint

    newest = checkpoints(run_dir)[-1]
    return newest_checkpoint(run_dir) == newest


def disk(folder: Path, rng: random.Random) -> Iterator[Row]:
    """A disk that is full, or read-only."""
    whole = made(folder, "disk-whole", "stage1", "train.keep_checkpoints=99")
    log, mounted, kept = folder / "log", folder / "mounted", folder / "disk-full"
    mounted.mkdir()
    room = 5 * sum(file.stat().st_size for file in checkpoints(whole)[0].iterdir())
    mount = f"mount -t tmpfs -o size={room} tmpfs {mounted}"
    command = " ".join(["python", *given("stage1", folder, mounted / "run", "train.keep_checkpoints=99")])
    namespace = "unshare -m" if os.geteuid() == 0 else "unshare -rm"
    code, printed = run(
        ["-c", f"'{mount}; {command}; code=$?; cp -r {mounted}/run {kept}; exit $code'"], log, f"{namespace} bash"
    )
    left = sorted(
        path.name for path in (kept / "checkpoints").iterdir() if not path.name.startswith("step_") or "." in path.name
    )
    found = f"exit code {code}, `{last_line(printed)}`, newest checkpoint {'whole' if load_ok(kept) else 'damaged'}"
    found += f", half-written: {len(left)}"
    arguments = given("stage1", folder, kept, "train.keep_checkpoints=99")
    checked(*run(arguments, log))
    found += f"; with room again to the same bits: {same_run(whole, kept)}"
    yield "the disk full while saving", "exit code 1, one line, nothing lost", found

    ended = shutil.copytree(kept, folder / "disk-read-only")
    shutil.rmtree(checkpoints(ended)[-1])
    bind = f"mount --bind {ended} {ended} && mount -o remount,ro,bind {ended}"
    command = " ".join(["python", *given("stage1", folder, ended, "train.keep_checkpoints=99")])
    code, printed = run(["-c", f"'{bind} && {command}'"], log, f"{namespace} bash")
    whole_one = "whole" if load_ok(ended) else "damaged"
    yield (
        "a read-only disk",
        "one line, nothing lost",
        f"exit code {code}, `{last_line(printed)}`, newest checkpoint {whole_one}",
    )

    for file in [ended, *ended.rglob("*")]:
        file.chmod(file.stat().st_mode & ~0o222)
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups " if os.geteuid() == 0 else ""  # root may do all
    arguments = given("stage1", folder, ended, "train.keep_checkpoints=99")
    code, printed = run(arguments, log, f"env HOME={folder} {nobody}{sys.executable}")
    whole_one = "whole" if load_ok(ended) else "damaged"
    found = f"exit code {code}, `{last_line(printed)}`, newest checkpoint {whole_one}"
    yield "a run of which nothing may be written", "one line, nothing lost", found


def machine(folder: Path, rng: random.Random) -> Iterator[Row]:
    """Kills a data worker or a process, and fills the memory."""
    log = folder / "log"
    run_dir = folder / "worker"
    process = start(given("stage1", folder, run_dir, "train.max_steps=100000"), log)
    wait_for(lambda: len(checkpoints(run_dir)) > 1, process)
    workers = [child for child in psutil.Process(process.pid).children() if "torch" not in child.name()]
    workers[0].kill()
    code = process.wait()
    whole_one = "whole" if load_ok(run_dir) else "damaged"
    found = f"exit code {code}, `{last_line(log.read_text())}`, newest checkpoint {whole_one}"
    yield (
        "kill -9 of a data worker",
        "exit code 1, one line, no orphans",
        f"{found}, {children_left(run_dir)} processes left",
    )

    run_dir = folder / "memory"
    big = ["stage1/train_gan.py", "train.batch_size=1000000", "train.accumulation=2", f"run_dir={run_dir}", *QUIET]
    code, printed = run(big, log, limits="ulimit -v 7000000;")
    yield "memory that is full", "exit code 1, one line with what to set", f"exit code {code}, `{last_line(printed)}`"

    run_dir = folder / "rank"
    process = start(given("stage1", folder, run_dir, "train.max_steps=100000", "data.workers=0"), log, launch_two())
    wait_for(lambda: len(checkpoints(run_dir)) > 1, process)
    ranks = [other for other in working_on(run_dir) if other.environ().get("RANK") == "1"]
    ranks[0].kill()
    began = time.monotonic()
    code = process.wait()
    seconds = time.monotonic() - began
    whole_one = "whole" if load_ok(run_dir) else "damaged"
    found = f"all gone after {seconds:.1f} s, exit code {code}, `{last_line(log.read_text())}`"
    found += f", newest checkpoint {whole_one}"
    yield (
        "kill -9 of one of two processes",
        "the other ends, one line",
        f"{found}, {children_left(run_dir)} processes left",
    )


def processes(folder: Path, rng: random.Random) -> Iterator[Row]:
    """Two processes against one, a change of their number, and fewer images than processes."""
    from safetensors.torch import load_file

    log = folder / "log"
    vqgan = ["loss.perceptual.name=alex", "loss.perceptual.every=8", "loss.perceptual.start=0"]
    vqgan += ["loss.adversarial.name=non_saturating", "loss.adversarial.start=0.4", "discriminator.width=8"]
    steps = ["train.max_steps=20", "train.log_every=1", "train.eval_every=20", "train.checkpoint_every=10", *QUIET]
    for name, more in {
        "stage 1": ["stage1/train.py", "configs/debug/stage1.yaml"],
        "stage 1 with discriminator": ["stage1/train.py", "configs/debug/stage1.yaml", *vqgan],
        "stage 2": ["stage2/train.py", "configs/debug/stage2.yaml", f"stage1={folder}/tokenizer"],
    }.items():
        slug = name.replace(" ", "-")
        one, two, changed = (folder / f"{slug}-{kind}" for kind in ("one", "two", "changed"))
        for run_dir, launcher in ((one, "python"), (two, launch_two())):
            checked(*run([*more, *steps, f"run_dir={run_dir}"], log, launcher))
        shutil.copytree(one, changed)
        shutil.rmtree(checkpoints(changed)[-1])
        code, printed = run([*more, *steps, f"run_dir={changed}"], log, launch_two())
        checked(code, printed)
        said = "said so" if "by 2 x 1 passes per step after 1 x 1" in printed else "said nothing"
        for run_dir, what in ((two, "two processes"), (changed, "from one to two processes at step 10")):
            pairs = list(zip(metrics(one), metrics(run_dir), strict=True))
            gaps = [
                abs(a[key] - b[key]) for a, b in pairs for key in a if "loss" in key or "nll" in key or "mse" in key
            ]
            found = f"losses within {max(gaps):.1e}"
            if name != "stage 2":
                books = [load_file(path / "model/model.safetensors")["quantizer.codebook"] for path in (one, run_dir)]
                found += f", codebooks within {(books[0] - books[1]).abs().max():.1e}"
            found += f", {said}" if run_dir == changed else ""
            yield f"{what}, {name}, 20 steps", "losses within 1e-4 of one process", found

    few = folder / "few"
    few.mkdir()
    for i, image in enumerate(sorted((folder / "images").rglob("*.png"))[:4]):
        shutil.copy(image, few / f"{i}.png")
    began = time.monotonic()
    data = [f"data.source={few}", "data.val_fraction=0.3", *steps, "train.batch_size=6"]
    checked(*run(["stage1/train.py", "configs/debug/stage1.yaml", *data, f"run_dir={folder}/few-1"], log, launch_two()))
    stage2 = ["stage2/train.py", "configs/debug/stage2.yaml", f"stage1={folder}/few-1", f"run_dir={folder}/few-2"]
    checked(*run([*stage2, *steps, "train.batch_size=6"], log, launch_two()))
    checked(*run(["stage2/sample.py", f"{folder}/few-2", "num_images=1"], log, launch_two()))
    yield "4 images, 2 processes, batches of 6; 1 sample", "nothing hangs", f"done in {time.monotonic() - began:.0f} s"


def images(folder: Path, rng: random.Random) -> Iterator[Row]:
    """500 hostile or broken files among 2,000."""
    from hostile import make_hostile, make_valid

    from vqgen.data.skipped import one_line

    source = folder / "strangers"
    make_valid(source, 1500, seed=0)
    broken = make_hostile(source, 500, seed=0)
    for name, more in {"in memory": [], "streamed by two workers": ["data.cache_gb=0", "data.workers=2"]}.items():
        run_dir = folder / f"strangers-{name.split()[0]}"
        arguments = ["stage1/train.py", "configs/debug/stage1.yaml", f"data.source={source}", f"run_dir={run_dir}"]
        # Batches of 32: 150 steps see each of the training images twice.
        code, _ = run([*arguments, *QUIET, *more, "train.max_steps=150", "train.eval_images=2000"], folder / "log")
        skipped = {line.split("\t")[0] for line in (run_dir / "skipped.txt").read_text().splitlines()}
        rightly = len(skipped & {one_line(name) for name in broken})
        found = f"exit code {code}, {len(skipped)} in skipped.txt, {rightly} of them rightly"
        yield f"500 hostile files among 2,000, {name}", "training goes through, 500 counted and named", found

    source = folder / "not-numbers"
    source.mkdir()
    for i in range(40):
        pixels = np.full((32, 32), [np.nan, np.inf, -np.inf, 0.5][i % 4], np.float32)
        pixels[::2] = np.linspace(0, 1, 32)
        Image.fromarray(pixels).save(source / f"{i}.tif")
    arguments = [
        "stage1/train.py",
        "configs/debug/stage1.yaml",
        f"data.source={source}",
        f"run_dir={folder}/no-numbers",
    ]
    code, _ = run([*arguments, *QUIET], folder / "log")
    finite = all(x.isfinite().all() for x in state(folder / "no-numbers")["model"].values())
    yield "NaN and infinities in the images", "a run of finite numbers", f"exit code {code}, weights finite: {finite}"


def configs(folder: Path, rng: random.Random, mutations: int) -> Iterator[Row]:
    """Mutated configuration files."""
    from mutations import run_mutations

    counts = run_mutations(mutations, seed=rng.randrange(1000), folder=folder / "mutations")
    del counts["failures"]  # the output has printed these already
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    yield f"{mutations} mutated configuration files", "each a clear error or a valid run", found


def hour(folder: Path, rng: random.Random, hours: float) -> Iterator[Row]:
    """Memory and file handles over many steps."""
    run_dir = folder / "hour"
    endless = ["train.max_steps=100000000", "train.eval_every=500", "train.log_every=50", "train.checkpoint_every=500"]
    process = start(given("stage1", folder, run_dir, *endless, f"train.max_hours={hours}"), folder / "log-hour")
    watched, seen = psutil.Process(process.pid), []
    while process.poll() is None:
        time.sleep(5)
        try:
            step = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
            if watched.status() != psutil.STATUS_ZOMBIE:
                seen.append((step, watched.memory_info().rss / 2**20, watched.num_fds()))
        except (OSError, LookupError, ValueError, psutil.Error):  # not there yet, incomplete, or ended in the meantime
            pass
    steps, memory, handles = np.array(seen[len(seen) // 10 :]).T  # caches fill in the first tenth
    slope = np.polyfit(steps, memory, 1)[0] * 1000
    what = f"{int(steps[-1]):,} steps of stage 1 in {hours:g} h, two workers, evaluations and checkpoints every 500"
    found = f"{slope:+.3f} MB per 1,000 steps, {memory[0]:.0f} MB to {memory[-1]:.0f} MB"
    found += f"; handles {int(handles.min())} to {int(handles.max())}; exit code {process.returncode}"
    yield what, "under 1 MB per 1,000 steps, handles flat", found


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    part.__name__: part for part in (kill, damage, stop, disk, machine, processes, images, configs, hour)
}


def main() -> None:
    words = [word for word in sys.argv[1:] if "=" not in word]
    options = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    folder, seed = Path(options.pop("folder", Path(tempfile.gettempdir()) / "faults")), int(options.pop("seed", 0))
    numbers = {"kills": 20, "mutations": 200, "hours": 1.0}
    numbers |= {key: type(numbers[key])(value) for key, value in options.items()}
    unknown = set(words) - PARTS.keys()
    assert not unknown, f"no such part: {unknown}; there is {' '.join(PARTS)}"
    shutil.rmtree(folder, ignore_errors=True)
    prepare(folder)
    takes = {"kill": "kills", "configs": "mutations", "hour": "hours"}
    print("| what was done | asked | found |\n|---|---|---|", flush=True)
    for name in words or PARTS:
        more = {takes[name]: numbers[takes[name]]} if name in takes else {}
        for row in PARTS[name](folder, random.Random(seed), **more):
            print("| " + " | ".join(row) + " |", flush=True)


def prepare(folder: Path) -> None:
    """300 of the built-in digits as files, with classes, and a tokenizer trained on them."""
    from vqgen.data.images import load_images
    from vqgen.settings import DataConfig

    digits = load_images(DataConfig())[0]
    pixels, class_ids = digits.__getitems__(np.arange(300))
    for i, (image, class_id) in enumerate(zip(pixels.numpy(), class_ids.tolist(), strict=True)):
        (folder / "images" / str(class_id)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / "images" / str(class_id) / f"{i}.png")
    arguments = ["stage1/train.py", "configs/debug/stage1.yaml", *QUIET, f"run_dir={folder}/tokenizer"]
    checked(*run(arguments, folder / "log"))


if __name__ == "__main__":
    main()
