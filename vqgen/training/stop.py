"""What ends a run early: a signal, the clock, or the machine it is on."""

import errno
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch

from vqgen.data.skipped import PASSING
from vqgen.distributed import rank, world_size

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
DISK_ERRORS = FULL | UNWRITABLE | PASSING | {errno.EIO}
NO_MEMORY = "can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory"
GOES_ON = "the same command then goes on from the newest checkpoint"


class Stop:
    """The wish to end a run early and save it: SIGTERM, SIGINT, SIGUSR1, the clock, or output that no one reads.

    Until training begins there is nothing to save, and a signal ends the process at once; so does a second SIGINT.

    Args:
        max_hours: stop after so many hours by the clock; None is never.
    """

    def __init__(self, max_hours: float | None = None):
        self.deadline = time.monotonic() + 3600 * (max_hours or float("inf"))
        self.signal: signal.Signals | None = None
        self.training = False
        self.agreed = False  # set by what all processes exchange at each step

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals inside."""
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None or time.monotonic() > self.deadline or output_is_unread()

    @property
    def due(self) -> bool:
        """Whether to stop now, all processes at the same step."""
        return self.asked if world_size() == 1 else self.agreed

    @property
    def reason(self) -> str:
        """What asked for it, in a word or two."""
        if self.signal is not None:
            return self.signal.name
        if output_is_unread():
            return "SIGPIPE"
        return "train.max_hours" if self.asked else "another process's wish"

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, as shells have it; else 0, since whoever sent the signal had it planned."""
        return 130 if self.signal == signal.SIGINT else 0

    def _take(self, number: int, frame: Any) -> None:
        twice = self.signal == number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number)  # the launcher's end, which follows, is not the reason
        if twice:
            end_workers()
            os._exit(130)
        if not self.training:
            if rank() == 0:  # not by print, which the signal may have interrupted
                os.write(1, f"{self.reason} before the first step: the same command starts again\n".encode())
            sys.exit(self.exit_code)


class _Output:
    """A text stream that drops what is written once its reader has ended, as `head` does in `train.py | head`."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.unread = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BrokenPipeError:
            self.unread = True
            # Text is left in the buffer, and Python would fail again when it writes that at the end.
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.stream.fileno())
            os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def dropping_unread_output() -> Iterator[None]:
    """Inside, a reader that ends early raises no BrokenPipeError: `output_is_unread` tells, and a `Stop` asks."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def output_is_unread() -> bool:
    """Whether the reader of this process's output has ended."""
    return any(isinstance(stream, _Output) and stream.unread for stream in (sys.stdout, sys.stderr))


def ignore_signals(worker: int) -> None:
    """For processes that load data: they end with the one they load for, which needs them for the step it is in."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Ends the processes that load data for this one, if there are any left."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would call their end an error
    for process in multiprocessing.active_children():
        process.kill()


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun has started this process."""
    return "ACCELERATE_USE_CPU" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def end_with_launcher() -> None:
    """Asks for SIGTERM when `accelerate launch` or torchrun ends, which need not pass on what ended them.

    It is for Linux; elsewhere the processes of a launcher that was killed go on.
    """
    if sys.platform == "linux" and is_launched():
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def explained(error: BaseException, config: Any = None) -> str | None:
    """One line on what the machine did to a run, and what helps; None for anything else, which is then a bug.

    Args:
        error: what ended the run.
        config: of the program; None if it did not come so far.
    """
    chain = [error]
    while isinstance(chain[-1], RuntimeError) and (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)  # torch's own names no reason where a file cannot be written
    for link in chain:
        text = str(link)
        first_line = text.partition("\n")[0]
        if isinstance(link, torch.OutOfMemoryError | MemoryError) or re.search(NO_MEMORY, text):
            which = "the GPU's memory" if "CU" in text else "memory"
            return f"{which} is full: {_smaller_passes(config)}"
        number = link.errno if isinstance(link, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", text):  # as safetensors says it
            number = int(found[1])
        if number in DISK_ERRORS:
            where = getattr(link, "filename", None) or getattr(config, "run_dir", None) or "writing"
            remedy = "make room" if number in FULL else "put that right"
            return f"{where}: {os.strerror(number)}; {remedy}, and {GOES_ON}"
        died = re.search(r"DataLoader worker \(pid|Pin memory thread exited", text) is not None
        if died or (isinstance(link, ConnectionError | EOFError) and _is_of_a_pipe(link)):
            remedy = "if memory ran out, lower data.workers= or data.cache_gb="
            reason = first_line.partition(". ")[0] or "its pipe ended"
            return f"a process that loads data was killed ({reason}); {remedy}; {GOES_ON}"
        if isinstance(link, RuntimeError) and re.search("closed by peer|reset by peer|Broken pipe|pair.cc", text):
            return f"another process of this run has ended; its own last line, or the launcher's, says why; {GOES_ON}"
    return None


def _is_of_a_pipe(error: BaseException) -> bool:
    """Whether an error comes from the pipe between two processes of Python's."""
    return any("multiprocessing" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _smaller_passes(config: Any) -> str:
    """What to set so that a pass takes less memory."""
    if not hasattr(config, "train"):
        return "lower batch_size="
    train = config.train
    parts = world_size() * train.accumulation
    images = train.batch_size // parts
    if images < 2:
        return f"train.batch_size={train.batch_size} is one image a pass already; make the model or the images smaller"
    smallest = next(n for n in range(2, images + 1) if images % n == 0)
    return (
        f"train.batch_size={train.batch_size} over {world_size()} process(es) and train.accumulation="
        f"{train.accumulation} is {images} images a pass; set train.accumulation={train.accumulation * smallest}, "
        f"or lower train.batch_size (another run_dir= if this run has checkpoints)"
    )
