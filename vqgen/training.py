"""What the training loops need around the step itself: schedule, data order, weight average, steps gone wrong."""

import copy
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from vqgen.checkpoints import newest_checkpoint
from vqgen.config import OptimConfig
from vqgen.data.codes import TokenStore
from vqgen.data.images import ImageSet
from vqgen.distributed import all_gather, all_reduce_sum, from_main, rank, world_size
from vqgen.errors import InputError
from vqgen.faults import Stop, ignore_signals
from vqgen.fsdp import gathered, shard_like

MAX_ROLLBACKS = 5  # a 32nd of what was set: what that does not cure has another cause
CLOCK_EVERY = 10  # steps between looks at the clock where several processes must agree on it, as that makes them wait


class Budget:
    """How much of a run is spent, in steps or in seconds of training, whichever is nearer its end.

    Args:
        max_steps: the run ends after so many steps; None is no such bound.
        max_seconds: the run ends after so many seconds of training, `paused` apart; None is no such bound.

    Raises:
        InputError: neither bound is given, or one is not positive.
    """

    def __init__(self, max_steps: int | None, max_seconds: float | None):
        for name, bound in (("max_steps", max_steps), ("max_seconds", max_seconds)):
            if bound is not None and not 0 < bound < math.inf:
                raise InputError(f"train.{name}={bound}: must be positive")
        if max_steps is None and max_seconds is None:
            raise InputError(
                "train.max_steps and train.max_seconds are both null: give one of them, or the run never ends"
            )
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self.spent = 0.0
        self.started: float | None = None
        self.by_clock: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.spent + (0.0 if self.started is None else time.monotonic() - self.started)

    def share(self, step: int, device: torch.device) -> float:
        """The share of the budget that is spent after `step` steps: 0 at the start, 1 or more at the end."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        if self.max_seconds and (self.by_clock is None or world_size() == 1 or step % CLOCK_EVERY == 0):
            self.by_clock = from_main(self.seconds, device) / self.max_seconds
        return max(by_steps, self.by_clock or 0.0)

    def start(self) -> None:
        """Starts the clock."""
        self.started = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for what is not training."""
        self.spent, self.started = self.seconds, None
        yield
        self.start()


def lr_at(share: float, optim: OptimConfig) -> float:
    """Learning rate after a share of the budget: linear warm-up, then a cosine to zero."""
    share = min(max(share, 0.0), 1.0)
    warmup = min(1.0, (share + 1e-3) / optim.warmup) if optim.warmup > 0 else 1.0
    return optim.lr * warmup * 0.5 * (1 + math.cos(math.pi * share))


def ramp_at(share: float, start: float, ramp: float) -> float:
    """Rises from 0 after a share of the budget, `start`, linearly to 1 over another, `ramp`."""
    if share < start or start >= 1:
        return 0.0
    return min(1.0, (share - start) / ramp) if ramp > 0 else 1.0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and convolutions; none for biases and norms, which have no scale to spare, nor for
    what a quantizer trains, as it would draw all codes to the origin."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and not name.startswith("quantizer.")]
    kept = [p for name, p in named if p.ndim < 2 or name.startswith("quantizer.")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def micro_batch_size(batch_size: int, accumulation: int) -> int:
    """Images per forward pass of one process.

    Raises:
        InputError: the batch does not divide evenly over the processes and accumulation steps.
    """
    parts = world_size() * accumulation
    if batch_size % parts:
        near = max(1, round(batch_size / parts)) * parts
        raise InputError(
            f"train.batch_size={batch_size} does not divide over {world_size()} processes x "
            f"{accumulation} accumulation steps; use {near}"
        )
    return batch_size // parts


class BatchOrder:
    """Which examples this process sees, forever: a batch sampler for `torch.utils.data.DataLoader`.

    All processes walk one endless stream of shuffled epochs side by side, each taking its own stretch of every global
    batch. The stream depends on the seed alone, so a run can start anywhere in it, with any number of processes.

    Args:
        num_examples: size of the data set.
        micro_batch: examples per forward pass of one process.
        first: number of global micro-batches that were taken before.
        seed: of the shuffling.
    """

    def __init__(self, num_examples: int, micro_batch: int, first: int, seed: int):
        self.num_examples, self.micro_batch, self.first, self.seed = num_examples, micro_batch, first, seed

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.arange(0)
        for i in itertools.count(self.first):
            start = (i * world_size() + rank()) * self.micro_batch
            batch = []
            for position in range(start, start + self.micro_batch):
                if position // self.num_examples != epoch:
                    epoch = position // self.num_examples
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
                batch.append(int(order[position % self.num_examples]))
            yield batch


def endless_batches(
    dataset: ImageSet | TokenStore, micro_batch: int, *, first: int, seed: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's micro-batches from global micro-batch number `first` on, in `BatchOrder`."""
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # it has what DataLoader uses, and is no subclass
        batch_sampler=BatchOrder(len(dataset), micro_batch, first, seed),
        collate_fn=_as_is,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
    )
    return iter(loader)


def _as_is(batch: Any) -> Any:
    return batch  # both data sets return whole batches


def mixed_seed(*numbers: int) -> int:
    """One well-mixed seed from several numbers, none of them negative, such as a run's seed and a step."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


def coin_flips(probability: float, micro_batch: int, seed: int, step: int, i: int = 0, accumulation: int = 1) -> Tensor:
    """(micro_batch,) bool: this process's part of a step's flips, for pass i.

    Drawn for the whole step, on the CPU, from the seed and the step alone: the same for any number of processes and
    passes, and no random state to save.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, step))
    flips = torch.rand(accumulation * world_size() * micro_batch, generator=generator) < probability
    return own_part(flips, micro_batch, i)


def own_part(x: Tensor, micro_batch: int, i: int) -> Tensor:
    """The part of a whole step's examples, (accumulation * world_size * micro_batch, ...), that pass i of this process
    has, as `BatchOrder` shares them out."""
    start = (i * world_size() + rank()) * micro_batch
    return x[start : start + micro_batch]


def seed_step(seed: int, step: int) -> None:
    """Reseeds torch for a step, so that dropout and the like need no random state in the checkpoint (EDM2's way)."""
    torch.manual_seed(mixed_seed(seed, step, rank()))


class WeightEMA:
    """A running average of a model's weights, whose memory grows with the run (EDM2, Karras et al. 2024, section 3.1).

    After t steps the weights of step s count as s^gamma, so one setting fits a run of any length. Codebooks and buffers
    are copied: they are averages already, or have codes that jump when they are revived.

    Args:
        model: what to average.
        width: standard deviation of that profile as a share of the run so far (EDM2's sigma_rel), below 0.28, where
            gamma would be zero; 0 copies the model.
    """

    def __init__(self, model: nn.Module, width: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.shards: list[Tensor] = []  # the averages where FSDP cuts the weights: the model's own are then empty
        self.gamma = np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max() if width else None  # EDM2, algorithm 2

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the model's weights after step number `step`, counted from 1 (EDM2, eq. 127)."""
        weight = 1 - (1 - 1 / step) ** (self.gamma + 1) if self.gamma is not None else 1.0
        averages, weights = ([p.detach() for p in m.parameters()] for m in (self.model, model))
        torch._foreach_lerp_(self.shards or averages, weights, weight)
        for (name, copied), parameter in zip(self.model.named_parameters(), model.parameters(), strict=True):
            if name.endswith("codebook"):
                copied.copy_(parameter)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    def shard_like(self, model: nn.Module) -> None:
        """Cuts the averages as FSDP has cut the model's weights, if it has; from then on `whole` has them whole."""
        if any(isinstance(p, DTensor) for p in model.parameters()):
            averages = (p.detach() for p in self.model.parameters())
            self.shards = [shard_like(*pair) for pair in zip(averages, model.parameters(), strict=True)]
            self._put_back()

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The averaged model, whole on each process, so that one alone can use it. All must call it."""
        for parameter, shard in zip(self.model.parameters(), self.shards, strict=False):
            parameter.data = gathered(shard)
        yield self.model
        self._put_back()

    def _put_back(self) -> None:
        for parameter, _ in zip(self.model.parameters(), self.shards, strict=False):
            parameter.data = parameter.new_empty(0)


class Means:
    """Means of named numbers over a stretch of steps, kept on the device: reading them at every step would stall it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Takes in scalars; a name may come in some steps only, though on all processes."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def compute(self) -> dict[str, float]:
        """The means since the last call, over all processes."""
        sums = all_reduce_sum(torch.stack(list(self.sums.values()))) / world_size()
        means = {name: s / self.counts[name] for name, s in zip(self.sums, sums.tolist(), strict=True)}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last `compute`, by each process, who all must ask."""
        sums = all_gather(torch.stack(list(self.sums.values()))) if self.sums else torch.zeros(world_size(), 0)
        return {"counts": dict(self.counts), "sums": sums}  # (world_size, n)

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Goes on from there: to the bit on as many processes, else with the mean of theirs."""
        sums = state["sums"].to(device)
        sums = sums[rank()] if len(sums) == world_size() else sums.mean(dim=0)
        self.counts, self.sums = dict(state["counts"]), dict(zip(state["counts"], sums, strict=True))


def accumulate(terms: dict[str, Tensor], values: dict[str, Tensor], passes: int) -> None:
    """Takes the values of one of so many passes into the terms of a step, which become their means."""
    for name, value in values.items():
        terms[name] = terms.get(name, 0) + value.detach() / passes


class Stopwatch:
    """Time that parts of steps take on the device, which is not waited for before `seconds` is asked."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what is done inside."""
        start = self._now()
        yield
        self.spans.append((start, self._now()))

    def seconds(self) -> float:
        """What was counted since the last call."""
        if self.on_cuda:
            torch.cuda.synchronize()
            total = sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        else:
            total = sum(end - start for start, end in self.spans)
        self.spans = []
        return total

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Diverged(Exception):
    """So many steps in a row were not finite that only an earlier checkpoint helps."""

    def __init__(self, message: str, rollbacks: int):
        super().__init__(message)
        self.rollbacks = rollbacks


class FiniteGuard:
    """Finds steps whose losses are not finite: each is skipped and named, and too many in a row end the attempt.

    Whether to skip is decided on the device; the names are read a few steps later, when they are there anyway.

    Args:
        max_bad_steps: so many in a row are too many.
        rollbacks: how often the run went back before, for `Diverged`.
        say: prints a line.
        device: of the losses.
        stop: is told at each step whether any process was asked to stop, as that takes no exchange of its own.
    """

    def __init__(
        self, max_bad_steps: int, rollbacks: int, say: Callable[[str], None], device: torch.device, stop: Stop
    ):
        self.max_bad_steps, self.rollbacks, self.say, self.device = max_bad_steps, rollbacks, say, device
        self.stop = stop
        self.lag = 2 if device.type == "cuda" else 0
        self.pending: list[tuple[int, list[str], Tensor, Any]] = []
        self.in_a_row = 0

    def check(self, step: int, **terms: Tensor) -> Tensor:
        """1.0 if a term (a scalar each) is not finite on any process, else 0.0: what a fused optimizer skips a step by.

        Raises:
            Diverged: this is the last of too many bad steps in a row.
        """
        asked = torch.full((), float(self.stop.asked), device=self.device)
        flags = torch.stack([*((~term.detach().isfinite()).float() for term in terms.values()), asked])
        flags = all_reduce_sum(flags)
        event = None
        if self.device.type == "cuda":
            seen = torch.empty(len(flags), pin_memory=True)
            seen.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            seen = flags.cpu()
        self.pending.append((step, list(terms), seen, event))
        if len(self.pending) > self.lag:
            self._read(*self.pending.pop(0))
        return flags[:-1].amax().clamp(max=1)

    def finish(self) -> None:
        """Names the bad ones among the last steps, which no later step will."""
        while self.pending:
            self._read(*self.pending.pop(0))

    def _read(self, step: int, names: list[str], seen: Tensor, event: Any) -> None:
        if event is not None:
            event.synchronize()
        *flags, asked = seen.tolist()
        self.stop.agreed |= asked > 0
        bad = [name for name, flag in zip(names, flags, strict=True) if flag]
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad:
            what = f"step {step}: {' and '.join(bad)} not finite"
            if self.in_a_row >= self.max_bad_steps:
                raise Diverged(f"{what}, for {self.in_a_row} steps in a row", self.rollbacks)
            self.say(f"{what}; the update is skipped")


def going_back(train: Callable[[Any, int, Stop], None], config: Any, lowered: str, to_lower: str) -> None:
    """Calls train(config, rollbacks, stop), and again from the newest checkpoint each time it ends in `Diverged`.

    Going back is resuming. With the same settings it would end the same way, so train halves some for each rollback,
    its own or its checkpoint's.

    Args:
        train: the training program.
        config: its configuration.
        lowered: what it halves, in words.
        to_lower: the settings that the user should lower if that is not enough.

    Raises:
        InputError: going back does not help, or there is no checkpoint to go back to.
        SystemExit: a signal stopped the run, and its exit code is not 0.
    """
    rollbacks, stop = 0, Stop(config.train.max_hours)
    with stop.listening():
        while True:
            try:
                train(config, rollbacks, stop)
                break
            except Diverged as error:
                remedy = f"lower {to_lower}, and name another run_dir="
                checkpoint = newest_checkpoint(Path(config.run_dir))
                if checkpoint is None or error.rollbacks == MAX_ROLLBACKS:
                    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
                    raise InputError(f"{error}; {kept}; {remedy}") from error
                rollbacks = error.rollbacks + 1
                if rank() == 0:
                    print(f"{error}: going back to {checkpoint} with {lowered} at 1/{2**rollbacks} of what is set")
            gc.collect()  # or the failed attempt's models would lie beside those of the next
    if stop.exit_code:
        sys.exit(stop.exit_code)
