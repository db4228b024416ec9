"""A run's folder: the settings that made it, and checkpoints that are either complete or absent."""

import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second run out of a run's folder
    fcntl = None  # type: ignore[assignment]

import torch
from torch import Tensor

from vqgen.distributed import computed_by_main, object_from_main, rank, world_size
from vqgen.errors import InputError
from vqgen.training.files import CHECKSUMS, HashedFile, begun, beside, old, put_in_place, sha256
from vqgen.training.shards import BackgroundWriter, placed, read_shards, split
from vqgen.yaml_file import WORKING_DIR, as_saved, read_yaml, save_config

logger = logging.getLogger("vqgen")

# A run may resume with other values of these settings. Most of them do not affect the result.
FREE_SETTINGS = ["run_dir", WORKING_DIR, "tracking", "data.workers", "train.log_every", "train.checkpoint_every"]
FREE_SETTINGS += ["train.keep_checkpoints", "train.milestone_every", "train.max_hours", "train.eval_every"]
FREE_SETTINGS += ["train.activation_checkpointing", "train.sharded_checkpoints"]
FREE_SETTINGS += ["train.compile"]  # changes rounding
FREE_SETTINGS += ["train.accumulation"]  # changes rounding, and data.workers a stream; `how_resumed` says so
# The data and the tokenizer may have moved; `check_made_from` checks that they are the same.
FREE_SETTINGS += ["data.source", "data.val_source", "data.cache_gb", "stage1", "codes_dir"]

# What settings stood for before versions wrote them.
BEFORE: dict[str, Any] = {"model.name": "light", "order": "raster", "data.crops": 1}
BEFORE |= {"data.stream": False, "data.shuffle_buffer": 10000, "freeze": []}
BEFORE |= {"model.block": "residual", "model.head_width": 0, "optim.name": "adamw"}
BEFORE |= {"model.quantizer.legacy_beta": False, "model.quantizer.base.legacy_beta": False}
BEFORE |= {"perturb.images": 0.0, "perturb.codes": 1.0, "perturb.nearest": 12, "perturb.end": 0.5}
BEFORE |= {"equivariance.share": 0.0, "equivariance.scale": 0.25}
BEFORE |= {"equivariance.rotate": True, "equivariance.flip": False, "redraw.keep": 0.7}
BEFORE |= {"loss.adversarial.every": 1, "loss.adversarial.augment": []}
BEFORE |= {"context_noise": 0.0, "label_smoothing": 0.0}

NAMED = 5  # further settings that a refusal names
STATE = "state.pt"
SHARDS = "shards"  # in a checkpoint: the folder of the tensors that are not in its state.pt


@contextmanager
def open_run(config: Any) -> Iterator[None]:
    """Makes the run's folder with its config.yaml, or checks that an existing one has the same settings.

    Inside the context, no other process can open the run. A run without a checkpoint starts anew, so its settings may
    change.

    Raises:
        InputError: the folder holds a run with other settings, is in use, or cannot be written.
    """
    run_dir = Path(config.run_dir)
    path, model, checkpoints = run_dir / "config.yaml", run_dir / "model", run_dir / "checkpoints"
    exists = os.path.exists  # unlike Path.exists, it returns False for a name that is too long
    for folder in (checkpoints, model):
        if exists(folder) and not exists(path):
            raise InputError(
                f"run_dir={run_dir} has a {folder.name} but no config.yaml, so it is not a run; name another"
            )
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            take = stack.enter_context(_lock(run_dir))
            if exists(before := old(model)) and not exists(model):
                before.rename(model)  # a process was killed between the two renames in put_in_place
            if not exists(model) and not has_checkpoint(run_dir):
                save_config(config, path)
            else:
                _check_settings(config)
            take()
        except OSError as error:
            raise InputError(f"run_dir={run_dir} cannot be written ({error.strerror}); name another") from error
        yield


def _check_settings(config: Any) -> None:
    """Raises InputError if settings differ from the run's config.yaml that may not change."""
    run_dir = Path(config.run_dir)
    there, asked = BEFORE | _flat(read_yaml(run_dir / "config.yaml")), _flat(asdict(config))
    if there.get("train.mixed_precision") is None:
        there["train.mixed_precision"] = asked["train.mixed_precision"]  # older versions left it open
    # init_from comes first, because the options of the model follow from it.
    differing = [
        key
        for key in sorted(there.keys() | asked.keys(), key=lambda key: (key != "init_from", key))
        if not any(key == name or key.startswith(f"{name}.") for name in FREE_SETTINGS)
        and there.get(key) != asked.get(key)
        and (key in asked or key not in BEFORE)
    ]
    if "model.name" in differing:  # its options are then others in any case
        differing = [key for key in differing if key == "model.name" or not key.startswith("model.")]
    if differing:
        key, *others = differing
        raise other_settings(run_dir, key, there.get(key), asked.get(key), others, there.get("train.max_steps"))


def other_settings(
    run_dir: Path, key: str, there: Any, asked: Any, others: Sequence[str] = (), max_steps: int | None = None
) -> InputError:
    """The refusal of a setting that differs from the run's own, with what to do instead.

    Args:
        run_dir: the run's folder.
        key: the setting.
        there: its value in the run's config.yaml.
        asked: its value now.
        others: further settings that differ.
        max_steps: the run's own `train.max_steps`.
    """
    step = max(map(_step, _all_checkpoints(run_dir)), default=0)
    finished = max_steps is not None and step >= max_steps
    what = f"is finished, at step {step}," if finished else "holds a run"
    remedy = "" if finished else "repeat its own settings to go on with it, or "
    remedy += "name another run_dir="
    if not any(
        name.startswith(("model.", "generator.", "order", "random_orders", "init_from")) for name in (key, *others)
    ):
        remedy += f"; to train on from its weights: {train_on(run_dir)}"
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    also = f"; also other than there: {', '.join(others[:NAMED])}{more}" if others else ""
    return InputError(f"{run_dir} {what} with {key}={there}, but {key}={asked} is asked for{also}; {remedy}")


def train_on(run_dir: Path) -> str:
    """The settings of a new run that starts from a run's weights."""
    return f"init_from={quote(str(run_dir))} run_dir=NEW"


@contextmanager
def _lock(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Keeps other processes out of a run's folder, and yields a function that writes this process's id into the lock.

    The system releases the lock when this process ends, however it ends. Processes that load data do not inherit it.

    Raises:
        InputError: another process holds the lock.
        OSError: the folder cannot be written.
    """
    try:
        file = (run_dir / ".lock").open("a+")
    except OSError:
        if not (run_dir / "config.yaml").exists():
            raise
        yield lambda: None  # on a read-only disk, where a finished run may be asked for, no process changes a run
        return
    with file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            remedy = "wait for it, stop it, or name another run_dir="
            raise InputError(f"{run_dir} is in use by {owner}; {remedy}") from error
        except OSError:
            logger.warning(f"{run_dir}: its file system has no locks, so nothing keeps a second run out of it")

        def take() -> None:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

        yield take


def check_made_from(config: Any, state: Mapping[str, Any], made_from: Mapping[str, str | None]) -> None:
    """Checks that a run resumes with the data and the tokenizer that it was made from; their paths may differ.

    Args:
        config: the run's configuration.
        state: the checkpoint's state.
        made_from: hashes of the run's inputs, by their names in the checkpoint.

    Raises:
        InputError: an input has changed.
    """
    words = {"data": "other data", "held_out": "other held-out images", "tokenizer": "another tokenizer"}
    for name, now in made_from.items():
        if name in state and state[name] != now:
            raise InputError(f"{config.run_dir} was trained with {words[name]} than now; name another run_dir=")
    there, asked = _flat(read_yaml(Path(config.run_dir) / "config.yaml")), _flat(asdict(config))
    key = "data.val_source"
    if "held_out" not in state and there.get(key) != asked.get(key):  # older versions did not hash these images
        raise InputError(
            f"{config.run_dir} holds a run with {key}={there.get(key)}, but {key}={asked.get(key)} is asked for; "
            f"its version did not record which images these were, so repeat the setting, or name another run_dir="
        )


def update_config(config: Any) -> None:
    """Writes changed settings to the run's config.yaml, so that it names the current place of the data."""
    path = Path(config.run_dir) / "config.yaml"
    if read_yaml(path) != as_saved(config):
        save_config(config, path)


def save_checkpoint(
    run_dir: Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    milestone_every: int | None = None,
    writer: BackgroundWriter | None = None,
) -> None:
    """Writes checkpoints/step_XXXXXXXX, completely or not at all, and then removes older checkpoints.

    Args:
        run_dir: the run's folder.
        step: the number of steps so far.
        state: a state that torch.load(weights_only=True) can read back.
        keep: how many of the newest checkpoints stay; this one always stays.
        milestone_every: the first checkpoint at or after each multiple of this number of steps stays too.
        writer: writes the larger tensors in shards while the caller goes on. All processes must then call this
            function; otherwise only the main process.
    """
    folder = run_dir / "checkpoints" / f"step_{step:08d}"

    if writer is None:
        with begun(folder) as new:
            _write_state(new, state)
            put_in_place(folder)
        _remove_others(folder, keep, milestone_every)
        return

    def end(checksums: dict[str, str]) -> None:
        with (beside(folder) / CHECKSUMS).open("a") as file:
            file.writelines(f"{checksum}  {SHARDS}/{name}\n" for name, checksum in sorted(checksums.items()))
        put_in_place(folder)
        _remove_others(folder, keep, milestone_every)

    def begin() -> None:
        with begun(folder) as new:
            _write_state(new, numbers)
            (new / SHARDS).mkdir()

    try:
        writer.wait()
    except OSError as error:  # the disk may have room again
        logger.warning(f"{error}: the checkpoint before step {step} was not written; this one is tried")
    tensors: dict[str, Tensor] = {}
    numbers = split(state, tensors)
    computed_by_main(begin)  # and all wait for it
    writer.write(beside(folder) / SHARDS, tensors, then=end)


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    with HashedFile(folder / STATE) as file:  # torch.save's own open would hide why writing failed
        torch.save(state, file)
    (folder / CHECKSUMS).write_text(f"{file.sha256()}  {STATE}\n")


def _remove_others(newest: Path, keep: int, milestone_every: int | None) -> None:
    """Removes the checkpoints that need not stay, and what was left half-written."""
    step, checkpoints = _step(newest), _all_checkpoints(newest.parents[1])
    done = [path for path in checkpoints if _step(path) <= step]
    for path in set(checkpoints) - set(done):  # these later checkpoints are damaged: the run would have resumed there
        path.rename(path.with_name(path.name + ".damaged"))
    kept = set(done[-max(1, keep) :])
    if milestone_every:
        first = {_step(path) // milestone_every: path for path in reversed(done)}
        kept |= {path for number, path in first.items() if number > 0}
    for path in newest.parent.glob("step_*"):  # also finds partial folders of a process that was killed
        if path not in kept and path.suffix != ".damaged":
            shutil.rmtree(path, ignore_errors=True)  # network file systems keep a file that a reader has open


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """The state of `newest_checkpoint`, as `load_state` gives it; None if there is no checkpoint."""
    folder = newest_checkpoint(run_dir)
    return None if folder is None else load_state(folder)


def load_state(folder: Path, mmap: bool = True) -> dict[str, Any]:
    """A checkpoint's state, on the CPU; `with_tensors` reads the tensors that are in shards, here on `meta`.

    Args:
        folder: the checkpoint.
        mmap: read a tensor when it is used, which must be before the checkpoint is removed.
    """
    return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=mmap)


def with_tensors(folder: Path, state: Any, own: Any = None) -> Any:
    """A checkpoint's state, or a part of it, from `load_state`, with the tensors that are in shards.

    Args:
        folder: the checkpoint.
        state: the state.
        own: a state whose tensors are read into where they fit, which saves their copies; see `placed`.
    """
    into = placed(state, own)
    read_shards(folder / SHARDS, state, into)
    return into


def how_resumed(
    state: dict[str, Any] | None,
    accumulation: int,
    *,
    by_pass: str = "",
    by_process: str = "",
    workers: int | None = None,
) -> str:
    """Says where a run goes on, and what a new number of processes, passes or workers changes about its result.

    Args:
        state: the checkpoint's state; None if there is no checkpoint.
        accumulation: passes per step now.
        by_pass: the part of the model whose numbers depend on the passes per step, in words.
        by_process: the part whose numbers depend on the number of processes, in words.
        workers: the number of workers that read a stream in each process; None if the data are no stream.
    """
    if state is None:
        return ""
    text = f"; going on from step {state['step']}"
    before, now = (state["processes"], state["accumulation"]), (world_size(), accumulation)
    if workers is not None and (*before, state["workers"]) != (*now, workers):
        return f"{text} with other batches of the stream, because processes, passes or data.workers have changed"
    if before == now:
        return text
    differ = by_pass if before[1] != now[1] else by_process
    text += (
        f" by {now[0]} x {now[1]} passes per step after {before[0]} x {before[1]}: the same batches; the same numbers"
    )
    return f"{text} except for rounding, random draws inside the model{f', and {differ}' if differ else ''}"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint with a correct checksum, the same on all processes; None if there is no checkpoint yet.

    A warning names each damaged checkpoint.

    Raises:
        InputError: all checkpoints are damaged.
        OSError: a checkpoint cannot be read, which does not mean that it is damaged.
    """
    newest, damaged = None, False
    if rank() == 0:
        for folder in reversed(_all_checkpoints(run_dir)):
            if (fault := damage(folder)) is None:
                newest = folder
                break
            if folder.exists():  # its run may have removed it in the meantime
                logger.warning(f"{folder} is damaged ({fault}): the one before it is used")
                damaged = True
        if newest is None and damaged:
            remedy = "remove the folder to start anew, or name another run_dir="
            raise InputError(f"all checkpoints in {run_dir / 'checkpoints'} are damaged; {remedy}")
    return object_from_main(newest)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run has a checkpoint, damaged or not, so that it goes on from there."""
    return bool(_all_checkpoints(run_dir))


def _all_checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoints of a run, damaged or not, oldest first."""
    found = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in found if path.name[5:].isdecimal()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if its checksums are correct."""
    try:
        lines = (folder / CHECKSUMS).read_text("ascii").removesuffix("\n").split("\n")
        checksums = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
        shards = [f"{SHARDS}/{path.name}" for path in (folder / SHARDS).glob("*")]
        if unnamed := {STATE, *shards} - checksums.keys():
            return f"{CHECKSUMS} does not name {min(unnamed)}"
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: sha256(folder / name), checksums)
            changed = [name for name, checksum in zip(checksums, found, strict=True) if checksum != checksums[name]]
        return f"{changed[0]} is not what {CHECKSUMS} says" if changed else None
    except UnicodeDecodeError:
        return f"{CHECKSUMS} does not read"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
