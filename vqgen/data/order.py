"""The order of a run's data and its random draws, which depend only on the seed and the step."""

import itertools
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vqgen.data.codes import TokenStore
from vqgen.data.crops import random_crops
from vqgen.data.images import ImageSet
from vqgen.data.stream import ImageStream
from vqgen.distributed import rank, world_size
from vqgen.settings import DataConfig
from vqgen.tokenizers.vqmodel import from_uint8

# These signals ask a program to save and stop; they must not end a process that loads data.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class BatchOrder:
    """An endless batch sampler for `torch.utils.data.DataLoader`: the indices of this process's examples.

    All processes walk through one endless stream of shuffled epochs, and each takes its own part of every global batch.
    The stream depends only on the seed, so a run can start anywhere in it, with any number of processes.

    Args:
        num_examples: size of the data set.
        micro_batch: examples per forward pass of one process.
        first: number of global micro-batches that were taken before.
        seed: seed of the shuffling.
        versions: number of versions of each example. Each epoch has one of them, drawn at random; the index of version
            v of example i is i + v * num_examples.
    """

    def __init__(self, num_examples: int, micro_batch: int, first: int, seed: int, versions: int = 1):
        self.num_examples, self.micro_batch, self.first, self.seed = num_examples, micro_batch, first, seed
        self.versions = versions

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.arange(0)
        for i in itertools.count(self.first):
            start = (i * world_size() + rank()) * self.micro_batch
            batch = []
            for position in range(start, start + self.micro_batch):
                if position // self.num_examples != epoch:
                    epoch = position // self.num_examples
                    random = np.random.default_rng([self.seed, epoch])
                    order = random.permutation(self.num_examples)
                    if self.versions > 1:
                        order += self.num_examples * random.integers(self.versions, size=self.num_examples)
                batch.append(int(order[position % self.num_examples]))
            yield batch


class Place(NamedTuple):
    """The place of a run in the endless stream of batches, and the sizes in which it takes them.

    Attributes:
        seed: the run's seed.
        micro_batch: examples per forward pass of one process.
        accumulation: passes per update.
        first: number of global micro-batches that were taken before.
    """

    seed: int
    micro_batch: int
    accumulation: int
    first: int

    def flips(self, probability: float) -> Iterator[Tensor]:
        """(micro_batch,) bool for each pass from here on: this process's part of each update's coin flips."""
        for number in itertools.count(self.first):
            step, i = divmod(number, self.accumulation)
            yield coin_flips(probability, self.micro_batch, self.seed, step, i, self.accumulation)

    def uniforms(self, width: int) -> Iterator[Tensor]:
        """(micro_batch, width) for each pass from here on: this process's part of each update's numbers in [0, 1)."""
        for number in itertools.count(self.first):
            step, i = divmod(number, self.accumulation)
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, step, 0, 0, 0))  # five: no other draws'
            numbers = torch.rand(self.accumulation * world_size() * self.micro_batch, width, generator=generator)
            yield own_part(numbers, self.micro_batch, i)

    def crops(self) -> Iterator[Tensor]:
        """(micro_batch, 3) for each pass from here on: this process's part of each update's uniform numbers."""
        for number in itertools.count(self.first):
            step, i = divmod(number, self.accumulation)
            # Four numbers give a seed that no other draw of a step has.
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, step, 0, 0))
            draws = torch.rand(self.accumulation * world_size() * self.micro_batch, 3, generator=generator)
            yield own_part(draws, self.micro_batch, i)


def endless_batches(
    dataset: ImageSet | TokenStore, place: Place, *, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's micro-batches from a place on, in `BatchOrder`, on the CPU.

    Call it before the loop: a `DataLoader` that starts draws a number from torch's random generator.
    """
    versions = dataset.crops if isinstance(dataset, TokenStore) else 1
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # it has what DataLoader uses, and is no subclass
        batch_sampler=BatchOrder(len(dataset) // versions, place.micro_batch, place.first, place.seed, versions),
        collate_fn=_as_is,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=device.type == "cuda",
    )
    return iter(loader)


def read_batches(images: Any, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
    """The images uint8 (B, C, H, W) and the class ids (B,) of these rows, batch by batch.

    `data.workers` processes decode those of an `ImageSet` ahead, unless they are in memory.
    """
    if not isinstance(images, ImageSet) or images.in_memory:
        return map(images.__getitems__, batches)
    loader: DataLoader[Any] = DataLoader(
        images,  # type: ignore[arg-type]  # as above
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=_as_is,
        num_workers=min(images.data.workers, len(batches)),
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # otherwise a loader that starts draws a number from torch's own
    )
    return iter(loader)


class StreamBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """A stream's micro-batches of this process from a place on; a dataset for a `DataLoader` without batching.

    The workers of all processes are the stream's readers. A process takes its batches from its workers in turn.

    Args:
        images: the stream.
        place: the place in the stream of batches.
    """

    def __init__(self, images: ImageStream, place: Place):
        self.images, self.place, self.rank, self.world_size = images, place, rank(), world_size()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info, first = get_worker_info(), self.place.first
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        turn = (first + worker) % workers  # a loader begins with its first worker, whichever batch that is
        return self.images.batches(
            self.rank * workers + turn,
            self.world_size * workers,
            seed=self.place.seed,
            batch_size=self.place.micro_batch,
            taken=len(range(turn, first, workers)),
            buffer=max(1, self.images.data.shuffle_buffer // workers),
        )


def streamed_batches(
    images: ImageStream, place: Place, *, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's micro-batches of a stream from a place on, on the CPU; call it before the loop."""
    loader = DataLoader(
        StreamBatches(images, place),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=device.type == "cuda",
    )
    return iter(loader)


def image_batches(
    images: ImageSet | ImageStream, place: Place, *, data: DataConfig, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) in [-1, 1] and class ids (B,) on the device, from a place on, without end.

    Args:
        images: the images.
        place: the place in the stream of batches.
        data: says whether to mirror images and to crop them at random, and how many processes decode them if they are
            not in memory.
        device: the models' device.
    """
    if isinstance(images, ImageStream):
        batches = streamed_batches(images, place, workers=data.workers, device=device)
    else:
        batches = endless_batches(images, place, workers=0 if images.in_memory else data.workers, device=device)
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    shares = data.augment or [1.0, 1.0]

    def as_input(batch: tuple[Tensor, Tensor], mirrored: Tensor | None, crops: Tensor | None) -> tuple[Tensor, Tensor]:
        x = from_uint8(batch[0].to(device, non_blocking=True, memory_format=memory_format))  # (B, C, H, W)
        if mirrored is not None:
            x = torch.where(mirrored.to(device, non_blocking=True)[:, None, None, None], x.flip(-1), x)
        if crops is not None:
            x = random_crops(x, crops.to(device, non_blocking=True), shares).contiguous(memory_format=memory_format)
        return x, batch[1].to(device, non_blocking=True)

    flips = place.flips(0.5) if data.flip else itertools.repeat(None)
    crops = place.crops() if data.augment else itertools.repeat(None)
    return map(as_input, batches, flips, crops)


def token_batches(
    codes: TokenStore, place: Place, *, class_dropout: float, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (B, N) and class ids (B,) on the device, from a place on, without end.

    Args:
        codes: the tokens.
        place: the place in the stream of batches.
        class_dropout: share of the examples whose class id becomes -1, no class.
        device: the prior's device.
    """
    batches = endless_batches(codes, place, workers=0, device=device)

    def as_input(batch: tuple[Tensor, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens, class_ids = (part.to(device, non_blocking=True) for part in batch)
        return tokens, class_ids.masked_fill(hidden.to(device, non_blocking=True), -1)

    return map(as_input, batches, place.flips(class_dropout))


def _ignore_signals(worker: int) -> None:
    """Lets a process that loads data ignore signals: its training process still needs it to finish the step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch  # both data sets return whole batches


def mixed_seed(*numbers: int) -> int:
    """One well-mixed seed from several numbers, none of them negative, such as a run's seed and a step."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


def coin_flips(probability: float, micro_batch: int, seed: int, step: int, i: int = 0, accumulation: int = 1) -> Tensor:
    """(micro_batch,) bool: this process's part of a step's flips, for pass i.

    The flips are drawn for the whole step on the CPU, from the seed and the step alone. So they do not depend on the
    number of processes and passes, and no random state needs to be saved.
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
    """Reseeds torch for a step, so that a checkpoint needs no random state for dropout and other draws (as in EDM2)."""
    torch.manual_seed(mixed_seed(seed, step, rank()))
