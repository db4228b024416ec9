"""Reasons for a run to end early: a signal, the clock, unread output, or a fault of the machine."""

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

from vqgen.data.order import SIGNALS
from vqgen.data.skipped import PASSING
from vqgen.distributed import rank, world_size

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
DISK_ERRORS = FULL | UNWRITABLE | PASSING | {errno.EIO}
NO_MEMORY = "can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory"
GOES_ON = "the same command then goes on from the newest checkpoint"


class Stop:
    """A request to save a run and end it early: SIGTERM, SIGINT, SIGUSR1, the clock, or output that no one reads.

    Before training begins there is nothing to save, so a signal ends the process at once. A second SIGINT always does.

    Args:
        max_hours: stop after this many hours by the clock; None means never.
    """

    def __init__(self, max_hours: float | None = None):
        self.deadline = time.monotonic() + 3600 * (max_hours or float("inf"))
        self.signal: signal.Signals | None = None
        self.training = False
        self.agreed = False  # FiniteGuard sets it once any process was asked to stop

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the context."""
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
        """Whether to stop now; all processes stop at the same step."""
        return self.asked if world_size() == 1 else self.agreed

    @property
    def reason(self) -> str:
        """The reason to stop, in a word or two."""
        if self.signal is not None:
            return self.signal.name
        if output_is_unread():
            return "SIGPIPE"
        return "train.max_hours" if self.asked else "another process's wish"

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, as in shells; otherwise 0, because the sender of any other signal planned the stop."""
        return 130 if self.signal == signal.SIGINT else 0

    def _take(self, number: int, frame: Any) -> None:
        twice = self.signal == number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number)  # SIGTERM may follow when the launcher ends
        if twice:
            end_workers()
            os._exit(130)
        if not self.training:
            if rank() == 0:  # print is not safe here: the signal may have interrupted another print
                os.write(1, f"{self.reason} before the first step: the same command starts again\n".encode())
            sys.exit(self.exit_code)


class _Output:
    """A text stream that drops its text once its reader has ended, as `head` does in `train.py | head`."""

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
            # The buffer still holds text, and Python would fail again when it writes that text at exit.
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.stream.fileno())
            os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def dropping_unread_output() -> Iterator[None]:
    """Replaces the BrokenPipeError of a reader that ends early by `output_is_unread`, which `Stop` checks."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def output_is_unread() -> bool:
    """Whether the reader of this process's output has ended."""
    return any(isinstance(stream, _Output) and stream.unread for stream in (sys.stdout, sys.stderr))


def end_workers() -> None:
    """Ends all processes that still load data for this one."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise an error when they end
    for process in multiprocessing.active_children():
        process.kill()


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun has started this process."""
    return "ACCELERATE_USE_CPU" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def end_with_launcher() -> None:
    """Asks the system for SIGTERM when `accelerate launch` or torchrun ends, because a killed launcher sends no signal.

    This works on Linux only; elsewhere the processes of a killed launcher keep running.
    """
    if sys.platform == "linux" and is_launched():
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, or a GPU's, does not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(NO_MEMORY, str(error)) is not None


def explained(error: BaseException, config: Any = None) -> str | None:
    """One line that names a fault of the machine and its remedy; None for any other error, which is a bug.

    Args:
        error: the error that ended the run.
        config: the program's configuration; None if the error came before it was read.
    """
    chain = [error]
    while isinstance(chain[-1], RuntimeError) and (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)  # torch's own error does not say why a file cannot be written
    for link in chain:
        text = str(link)
        first_line = text.partition("\n")[0]
        if is_out_of_memory(link):
            which = "the GPU's memory" if "CU" in text else "memory"
            return f"{which} is full: {_smaller_passes(config)}"
        number = link.errno if isinstance(link, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", text):  # the wording of safetensors
            number = int(found[1])
        if number in DISK_ERRORS:
            where = getattr(link, "filename", None) or getattr(config, "run_dir", None) or "writing"
            remedy = "make room" if number in FULL else "correct that"
            return f"{where}: {os.strerror(number)}; {remedy}, and {GOES_ON}"
        if re.search("No working C\\+\\+ compiler|Cannot find a working triton", text):
            return "torch finds no compiler (CPU: g++, GPU: triton); install it, or leave out what compiles the model"
        died = re.search(r"DataLoader worker \(pid|Pin memory thread exited", text) is not None
        if died or (isinstance(link, ConnectionError | EOFError) and _is_of_a_pipe(link)):
            remedy = "if memory ran out, lower data.workers= or data.cache_gb="
            reason = first_line.partition(". ")[0] or "its pipe ended"
            return f"a process that loads data was killed ({reason}); {remedy}; {GOES_ON}"
        if isinstance(link, RuntimeError) and re.search("closed by peer|reset by peer|Broken pipe|pair.cc", text):
            return f"another process of this run has ended; its own last line, or the launcher's, says why; {GOES_ON}"
    return None


def _is_of_a_pipe(error: BaseException) -> bool:
    """Whether an error comes from a pipe of Python's multiprocessing."""
    return any("multiprocessing" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _smaller_passes(config: Any) -> str:
    """The settings that make a pass take less memory."""
    if not hasattr(config, "train"):
        return "lower batch_size="
    train = config.train
    parts = world_size() * train.accumulation
    images = train.batch_size // parts
    if images < 2:
        return (
            f"train.batch_size={train.batch_size} is one image per pass already; make the model or the images smaller"
        )
    smallest = next(n for n in range(2, images + 1) if images % n == 0)
    return (
        f"train.batch_size={train.batch_size} over {world_size()} process(es) and train.accumulation="
        f"{train.accumulation} is {images} images per pass; set train.accumulation={train.accumulation * smallest}, "
        f"or lower train.batch_size (another run_dir= if this run has checkpoints)"
    )
