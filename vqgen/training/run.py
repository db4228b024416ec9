"""The common frame of all training loops: processes, folder, resume, clock, stop, finite steps, checkpoints, log.

A loop calls its `Run`; a `Run` never calls a loop's code, and knows no model and no loss.
"""

import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from PIL import Image
from torch import Tensor, nn

import vqgen
from vqgen.data.describe import Description, describe
from vqgen.data.images import ImageSet
from vqgen.data.order import Place, seed_step
from vqgen.data.skipped import count_skipped
from vqgen.data.stream import ImageStream
from vqgen.distributed import all_agree, keep_group, object_from_main, rank, world_size
from vqgen.errors import InputError
from vqgen.training.average import WeightEMA
from vqgen.training.card import model_card
from vqgen.training.checkpoints import (
    check_made_from,
    has_checkpoint,
    how_resumed,
    load_state,
    newest_checkpoint,
    open_run,
    other_settings,
    save_checkpoint,
    train_on,
    update_config,
    with_tensors,
)
from vqgen.training.cpu import computes_bf16, keep_threads
from vqgen.training.files import written_whole
from vqgen.training.fsdp import check_fsdp, gathered, refuse_fsdp, whole
from vqgen.training.guard import Diverged, FiniteGuard
from vqgen.training.launchers import refuse_other_engines
from vqgen.training.means import Means, accumulate
from vqgen.training.origin import Origin, differing, merged
from vqgen.training.schedule import Budget, micro_batch_size
from vqgen.training.shards import BackgroundWriter
from vqgen.training.state import TrainState, is_large
from vqgen.training.stop import Stop, explained
from vqgen.training.tracking import Tracker
from vqgen.yaml_file import read_yaml

logger = logging.getLogger("vqgen")
MAX_ROLLBACKS = 5  # the settings are then at 1/32; a run that still diverges has another fault
T = TypeVar("T")


class Now(NamedTuple):
    """Where a run is before an update, and what is due there.

    Attributes:
        step: updates so far.
        share: share of the run's budget that is spent, from 0 to 1 or a little more.
        evaluates: whether an evaluation is due.
        saves: whether a checkpoint is due.
        ends: whether the run ends here, without another update.
        logs: whether a line of the log is due after the next update.
    """

    step: int
    share: float
    evaluates: bool
    saves: bool
    ends: bool
    logs: bool


def attempts(config: Any, *, lowered: str, to_lower: str, fsdp: bool = False) -> Iterator["Run"]:
    """Yields a run to train with; after a run has diverged, yields another that starts from the newest checkpoint.

    The same settings would diverge again, so a program multiplies some of its settings by `Run.lowered`.

    Args:
        config: a training program's configuration.
        lowered: the settings that the program lowers, in words.
        to_lower: the settings that the user should lower if that is not enough.
        fsdp: whether FSDP can shard the program's models.

    Raises:
        InputError: the run still diverges after `MAX_ROLLBACKS` rollbacks, or has no checkpoint to go back to.
        SystemExit: a signal stopped the run, and its exit code is not 0.
    """
    stop, rollbacks = Stop(config.train.max_hours), 0
    while True:
        with stop.listening():  # `with run` listens from then on
            run = Run(config, rollbacks, stop, fsdp)
        yield run
        if run.diverged is None:
            break
        remedy = f"lower {to_lower}, and name another run_dir="
        checkpoint = newest_checkpoint(run.dir)
        if checkpoint is None or run.rollbacks == MAX_ROLLBACKS:
            kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
            raise InputError(f"{run.diverged}; {kept}; {remedy}") from run.diverged
        rollbacks = run.rollbacks + 1
        if rank() == 0:
            print(f"{run.diverged}: going back to {checkpoint} with {lowered} at 1/{2**rollbacks} of the setting")
        del run
        gc.collect()  # frees the models of the failed attempt before the next one builds its own
    if stop.exit_code:
        sys.exit(stop.exit_code)


class Run:
    """One attempt at a training run; `with run:` listens for signals and stores a `Diverged` in `run.diverged`.

    Args:
        config: a training program's configuration, with the sections `optim`, `train` and `tracking`, `run_dir` and
            `seed`. Its `train.mixed_precision` is set to the value that Accelerate chose.
        rollbacks: how often the run went back to a checkpoint so far.
        stop: tells whether to end the run.
        fsdp: whether FSDP can shard the program's models.

    Attributes:
        accelerator: Accelerate's handle on the processes.
        device: this process's device.
        dir: the run's folder.
        micro_batch: examples per forward pass of this process.
        accumulation: passes per update.
        lowered: factor of the settings that are lowered after each rollback.
        diverged: why the run must go back to a checkpoint; None as long as all is well.
        means: means of the logged numbers since the last line of the log.
        origin: the weights that the run starts from, until `start`; None if it goes on from its own checkpoint, or
            starts from scratch.

    Raises:
        InputError: a setting is invalid, or the program was launched in a way that it does not support.
    """

    def __init__(self, config: Any, rollbacks: int, stop: Stop, fsdp: bool = False):
        self.config, self.rollbacks, self.stop = config, rollbacks, stop
        self.dir = Path(config.run_dir)
        self.budget = Budget(config.train.max_steps, config.train.max_seconds)
        refuse_other_engines()
        if not fsdp:
            refuse_fsdp()
        self.accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            gradient_accumulation_steps=config.train.accumulation,
            # Quantizers keep their buffers equal on all processes. Sending buffers out again before each forward pass
            # would break the GAN's D, which runs two forward passes before one backward pass.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        keep_group()
        if fsdp:
            check_fsdp(self.accelerator)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        precision = self.accelerator.mixed_precision
        self._precision_is_open = config.train.mixed_precision is None and precision == "no"
        config.train.mixed_precision = precision
        self.accumulation = self.accelerator.gradient_accumulation_steps
        self.micro_batch = micro_batch_size(config.train.batch_size, self.accumulation)
        self.diverged: Diverged | None = None
        self.means = Means(self.device)
        self.step = self.evaluated = self.saved = 0
        self.origin: Origin | None = None
        self._started_from = ""
        self._found: Description | None = None
        self._num_parameters = 0
        self._workers: int | None = None  # that read a stream
        self._figures: dict[str, float] = {}  # of the newest evaluation
        self._guards: dict[str, FiniteGuard] = {}
        self._waited = 0.0  # seconds for batches since the last line of the log
        self._kept: tuple[int, dict[str, float]] | None = None  # the model's step and figures, if not the newest
        self._ended = ""  # why the program ended the run before its budget was spent
        self._terms: dict[str, Tensor] = {}  # means over the passes since the last update
        self._made_from: dict[str, Any] = {}
        self._state: dict[str, Any] | None = None
        self._threads = ""
        self._open = ExitStack()
        self._writer = BackgroundWriter()
        self._share_disk = True
        self._tracker: Tracker | None = None

    def __enter__(self) -> "Run":
        self._open.enter_context(self.stop.listening())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            self._writer.close()  # the run's lock is still held; the newest checkpoint must not end with the run
        except Exception as fault:
            if error is None:
                raise
            logger.warning(f"the newest checkpoint was not written ({fault})")
        if isinstance(error, Diverged):
            self.diverged = error.with_traceback(None)  # a traceback would keep this attempt's models in memory
            self._open.callback(self.accelerator.free_memory)
            self._open.callback(self.tracker.close)  # the next attempt opens it again
        self._open.close()
        return isinstance(error, Diverged)

    @property
    def lowered(self) -> float:
        """1, halved once for each rollback."""
        return 0.5**self.rollbacks

    @property
    def place(self) -> Place:
        """Where the run is in the endless stream of batches."""
        return Place(self.config.seed, self.micro_batch, self.accumulation, first=self.step * self.accumulation)

    @property
    def tracker(self) -> Tracker:
        """The run's tracker; `start` opens it."""
        assert self._tracker is not None, "start the run first"
        return self._tracker

    # Before the first step

    def find_origin(self, section: str, load: Callable[[Path], Any]) -> None:
        """Finds where the weights start: the run's own newest checkpoint, else `init_from`, else scratch.

        A run that goes on from its own checkpoint takes its model's options from its config.yaml, so it does not need
        the folder `init_from` any more.

        Args:
            section: the configuration's section that has the model's options.
            load: returns the model in a run's folder, or in a model's own folder.

        Raises:
            InputError: `init_from` has no such model; or the run's own model has other options than the given ones.
        """
        config, own = self.config, self.dir / "config.yaml"
        if config.init_from is None:
            return
        if not object_from_main(has_checkpoint(self.dir)):
            self.origin = Origin(config.init_from, load)
        elif own.is_file():
            options, given = read_yaml(own)[section], getattr(config, section)
            if found := list(differing(section, given, options)):
                (key, asked, there), *others = found
                raise other_settings(self.dir, key, there, asked, [name for name, *_ in others])
            setattr(config, section, merged(options, given))

    def show_data(self, train: ImageSet | ImageStream, held_out: ImageSet) -> None:
        """Says what the images are, on the main process; a run that went back to a checkpoint has said it before."""
        if self.is_main:
            self._found = describe(train, held_out, self.config.train.batch_size)
            if not self.rollbacks:
                print(*self._found.short_lines(), sep="\n", flush=True)

    def open(self, *image_sets: Any) -> None:
        """Makes the run's folder, or checks that an existing one has the same settings; reports skipped images.

        Raises:
            InputError: the folder holds a run with other settings, is in use by another process, or cannot be written.
        """
        if self.is_main:
            self._open.enter_context(open_run(self.config))
        self.accelerator.wait_for_everyone()
        self._share_disk = all_agree((self.dir / "config.yaml").is_file())
        if not self._share_disk:
            self.accelerator.print(
                f"run_dir={self.dir}: not all processes see it, so the main process alone writes checkpoints, and "
                "the run goes on from them only after you have copied them to each machine"
            )
        for images in image_sets:
            images.report_skipped(self.dir / "skipped.txt")

    def prepare(self, *parts: Any) -> list[Any]:
        """`Accelerator.prepare` for two or more models and optimizers; a part that is None comes back as None."""
        prepared = iter(self.accelerator.prepare(*(part for part in parts if part is not None)))
        return [part if part is None else next(prepared) for part in parts]

    def resume(self, state: TrainState, then: str, **made_from: str | None) -> bool:
        """Loads the newest checkpoint, if there is one, into the state; call it after `prepare`.

        Args:
            state: the program's part of the checkpoint; the run adds its own numbers.
            then: the next command, printed if the run is finished.
            made_from: hashes of the run's inputs, such as its data; None for an input that the run does not have.

        Returns:
            Whether the run is finished; a line on the screen says so.

        Raises:
            InputError: the checkpoint has other inputs, or a version with other parts wrote it.
        """
        self._made_from = made_from
        checkpoint = newest_checkpoint(self.dir)
        saved = self._state = None if checkpoint is None else load_state(checkpoint, mmap=False)
        if checkpoint is not None and saved is not None:
            check_made_from(self.config, saved, made_from)
            try:
                self.step, self.evaluated, self.budget.spent = (saved[k] for k in ("step", "evaluated", "seconds"))
                self.rollbacks = max(self.rollbacks, saved["rollbacks"])
                state.load_state_dict(with_tensors(checkpoint, saved, state.places(saved)))
                self.means.load_state_dict(saved["means"])
                if self.accelerator.scaler:
                    self.accelerator.scaler.load_state_dict(saved["scaler"])
            except (KeyError, RuntimeError, ValueError) as error:
                if explained(error, self.config):  # the machine's fault, and not the version's
                    raise
                by = f"vqgen {saved.get('vqgen', 'before 0.2')}"
                raise InputError(
                    f"{self.dir}: its checkpoint was written by {by} and does not fit {vqgen.__version__} "
                    f"({' '.join(str(error).split())[:150]}); go on with that version, or name another run_dir="
                ) from error
            self.saved = self.step
            self._started_from = saved.get("started_from", "")
            self._threads = keep_threads(saved.get("threads")) if self.device.type == "cpu" else ""
            self._ended = saved.get("ended", "")
        if saved is not None and (self._ended or self.budget.share(self.step, self.device) >= 1):
            done = f"{self.dir} is finished, at step {self.step}; to train on from its weights: {train_on(self.dir)}"
            self.accelerator.print(f"{done}; next: {then}")
            self.accelerator.end_training()
            return True
        if saved is not None and self.is_main:
            update_config(self.config)
        return False

    def start(
        self,
        what: str,
        num_parameters: int,
        *,
        by_pass: str = "",
        by_process: str = "",
        stream_workers: int | None = None,
        faster_in_bf16: bool = False,
    ) -> None:
        """Opens the log, and prints what the run trains and the step it goes on from.

        Args:
            what: the model's size and the number of examples, in words.
            num_parameters: the model's number of parameters, for the tracker.
            by_pass: the part of the model whose numbers depend on the number of passes per update, in words.
            by_process: the part whose numbers depend on the number of processes, in words.
            stream_workers: the number of workers that read a stream in each process; None if the data are no stream.
            faster_in_bf16: whether a CPU with instructions for bf16 trains the model faster with them.
        """
        saved, self._state = self._state, None  # frees memory: the state is as large as the models and optimizers
        self._num_parameters, self._workers = num_parameters, stream_workers
        if self._found is not None:
            (self.dir / "data.json").write_text(self._found.as_json(), "utf-8")
        self._tracker = Tracker(
            self.dir,
            self.config,
            logged=saved["logged"] if saved else 0,
            is_main=self.is_main,
            facts={"num_parameters": num_parameters},
        )
        resumed = how_resumed(saved, self.accumulation, by_pass=by_pass, by_process=by_process, workers=stream_workers)
        self.say(f"{self.dir}: {what}, {world_size()} x {self.device.type}{resumed}{self._threads}")
        if faster_in_bf16 and saved is None and self._precision_is_open and computes_bf16(self.device):
            self.say("hint: this CPU computes in bf16 too: train.mixed_precision=bf16 may be 1.5 times as fast")
        if self.origin is not None:
            self._started_from = f"{self.origin.path}{self.origin.at}"
            self.say(f"starts from {self.origin}")
            self.origin = None  # frees memory

    # The loop

    def steps(self) -> Iterator[Now]:
        """Yields before each update, and once more at the end, so that the last update can be evaluated and saved."""
        self.stop.training = True
        self._window_step = self.step
        self.budget.start()
        self._window_start = self.budget.seconds
        while True:
            self._last = now = self._now()
            yield now
            if now.ends:
                return
            self.step += 1

    def _now(self) -> Now:
        train, step = self.config.train, self.step
        share = self.budget.share(step, self.device)
        last, stopping = share >= 1, self.stop.due
        save_due = last or stopping or step % train.checkpoint_every == 0
        if save_due:
            for guard in self._guards.values():
                guard.finish()
        healthy = not any(guard.in_a_row for guard in self._guards.values())  # a rollback needs a sound checkpoint
        return Now(
            step,
            share,
            evaluates=step > self.evaluated and (last or (step % train.eval_every == 0 and not stopping)),
            saves=step > self.saved and save_due and (healthy or last),
            ends=last or stopping,
            logs=(step + 1) % train.log_every == 0,
        )

    def end(self, now: Now, reason: str) -> Now:
        """The place as one where the run ends for good, before its budget is spent; `close` says the reason."""
        self._ended = reason
        self._last = now._replace(share=1.0, saves=now.step > self.saved, ends=True)
        return self._last

    def keep(self, step: int, figures: Mapping[str, float]) -> None:
        """Says of which earlier step, with these figures, the model is that the next `save` writes."""
        self._kept = (step, dict(figures))

    def passes(self, batches: Iterator[T], *models: nn.Module | None) -> Iterator[T]:
        """Yields a batch for each pass of an update; only the last pass exchanges the gradients of the models."""
        seed_step(self.config.seed, self.step)
        for i in range(self.accumulation):
            with ExitStack() as unsynced:
                if i < self.accumulation - 1:
                    for model in filter(None, models):
                        unsynced.enter_context(self.accelerator.no_sync(model))
                start = time.perf_counter()
                batch = next(batches)
                self._waited += time.perf_counter() - start
                yield batch

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds the scalars of one pass, by name; the log shows their mean over the passes."""
        accumulate(self._terms, terms, self.accumulation)

    def update(self, **groups: tuple[nn.Module, Any]) -> None:
        """Ends an update of some models: clips their gradients, steps their optimizers, and zeroes the gradients.

        If a loss or a gradient norm is not finite on any process, no model changes. The device decides this, so that
        the CPU need not wait for it, except on Apple's GPUs.

        Args:
            groups: each model with its optimizer; the key is the name of its gradient norm in the log.

        Raises:
            Diverged: losses or norms were not finite for too many updates in a row.
        """
        terms, self._terms = self._terms, {}
        for name, (model, _) in groups.items():
            norm = self.accelerator.clip_grad_norm_(model.parameters(), self.config.optim.grad_clip)
            terms[name] = gathered(norm)
        scaled = self.accelerator.scaler is not None  # a scaler itself skips updates whose gradients are not finite
        watched = [name for name in terms if name.endswith("_loss")] or ["loss"]
        watched += [] if scaled else list(groups)
        if (first := next(iter(groups))) not in self._guards:
            bad_steps = self.config.train.max_bad_steps
            self._guards[first] = FiniteGuard(bad_steps, self.say, self.device, self.stop)
        bad = self._guards[first].check(self.step, **{name: terms[name] for name in watched})
        # torch's fused AdamW for Apple's GPUs ignored found_inf at least until June 2026 (pytorch pull request 186360).
        left_out = self.device.type == "mps" and not scaled and bool(bad)
        for _, optimizer in groups.values():
            if not scaled:
                optimizer.optimizer.found_inf = bad
            if not left_out:
                optimizer.step()
            optimizer.zero_grad()
        self.means.add(**terms)

    def log(self, now: Now, figures: Mapping[str, Any], shown: tuple[str, ...]) -> None:
        """Logs the figures after an update, the speed, and `data_time`, the share of the time spent on getting batches.

        A GPU need not be idle in that time, because the CPU runs ahead of it.

        Args:
            now: where the run is.
            figures: the figures.
            shown: names of the figures that the screen shows.
        """
        step, seconds = now.step + 1, self.seconds_of_window
        if (fault := self._writer.new_fault()) is not None:
            self.say(f"step {step}: the checkpoint of step {self.saved} was not written ({fault}); the next is tried")
        speed = (step - self._window_step) * self.config.train.batch_size / seconds
        figures = {**figures, "images_per_second": speed, "data_time": self._waited / seconds}
        self._waited = 0.0
        self.tracker.log(step, {f"train/{name}": value for name, value in figures.items()})
        share = self.budget.share(step, self.device)
        left = self.budget.seconds * (1 / share - 1)
        self.tracker.progress(step, share, left, **{name: figures[name] for name in (*shown, "images_per_second")})
        self._window_step, self._window_start = step, self.budget.seconds

    @property
    def seconds_of_window(self) -> float:
        """Seconds of training since the last line of the log."""
        return self.budget.seconds - self._window_start

    def paused(self) -> AbstractContextManager[None]:
        """Stops the clock of the budget inside, for work that is not training."""
        return self.budget.paused()

    def report(self, now: Now, figures: Mapping[str, float], **pictures: Image.Image | None) -> None:
        """Logs and prints an evaluation's figures and saves its pictures; only the main process needs the pictures."""
        self.evaluated, self._figures = now.step, dict(figures)
        if figures:
            named = {f"val/{name}": value for name, value in figures.items()}
            self.tracker.log(now.step, named)
            self.say(f"step {now.step}  " + "  ".join(f"{name} {value:.4g}" for name, value in named.items()))
        for name, picture in pictures.items():
            if picture is not None:
                self.tracker.picture(now.step, name, picture)

    def save(self, now: Now, state: TrainState, model: Mapping[str, Any]) -> None:
        """Writes the models that people share to model/, and a checkpoint; all processes must call it.

        Args:
            now: where the run is.
            state: the program's part of the checkpoint; the run adds its own numbers.
            model: models with `save_pretrained`, or their averages, by their folder inside model/.
        """
        with self.paused():
            self._save(now, state, model)
        self.saved = now.step

    def _save(self, now: Now, state: TrainState, model: Mapping[str, Any]) -> None:
        train = self.config.train
        saved = {
            "vqgen": vqgen.__version__,
            "step": now.step,
            "evaluated": self.evaluated,
            "seconds": self.budget.seconds,
            "processes": world_size(),
            "accumulation": self.accumulation,
            "threads": torch.get_num_threads(),
            "workers": self._workers,
            "rollbacks": self.rollbacks,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "means": self.means.state_dict(),
            "started_from": self._started_from,
            "ended": self._ended,
            **self._made_from,
            **state.state_dict(),
        }
        with ExitStack() as stack:
            models = {
                name: stack.enter_context(part.whole(for_main=True)) if isinstance(part, WeightEMA) else part
                for name, part in model.items()
            }
            if self.is_main:
                with written_whole(self.dir / "model") as folder:
                    for name, part in models.items():
                        part.save_pretrained(folder / name)
                    if self._found is not None:
                        newest = now.step, self._figures if self.evaluated == now.step else {}
                        step, figures = self._kept or newest
                        found, started_from = self._found, self._started_from
                        card = model_card(folder, step, self._num_parameters, found, figures, started_from)
                        (folder / "README.md").write_text(card, "utf-8")
                saved["logged"] = self.tracker.flush()
        how = (train.keep_checkpoints, train.milestone_every)
        in_shards = train.sharded_checkpoints
        if in_shards or (in_shards is None and self._share_disk and is_large(saved)):
            save_checkpoint(self.dir, now.step, saved, *how, self._writer)
        else:
            complete = whole(saved)
            if self.is_main:
                save_checkpoint(self.dir, now.step, complete, *how)

    def say(self, text: str) -> None:
        """Prints a line, on the main process."""
        self.tracker.say(text)

    def close(self, made: str, then: str) -> None:
        """Ends the run, and prints what it made, the folder, and the next command to type.

        Args:
            made: the contents of the run's model/, in words.
            then: the next command.
        """
        self._writer.close()
        if count := count_skipped(self.dir / "skipped.txt"):
            self.say(f"{count} images did not load; {self.dir / 'skipped.txt'} names them")
        max_steps = self.config.train.max_steps
        if self._last.share < 1:
            self.say(
                f"{self.stop.reason}: stopped at step {self.step}; the same command goes on from step {self.saved}"
            )
        else:
            if self._ended:
                self.say(f"{self._ended}, at step {self.step}")
            elif max_steps and self.step < max_steps:
                seconds = self.config.train.max_seconds
                self.say(f"train.max_seconds={seconds:g} ended the run at step {self.step} of {max_steps}")
            of = f" of step {self._kept[0]}, the best on held-out images" if self._kept else ""
            self.say(f"{made}{of}: {self.dir / 'model'}; next: {then}")
        self.tracker.close()
        self.accelerator.end_training()
