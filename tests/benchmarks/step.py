"""Stage 1's training step without a run, for measurements: the networks of a configuration, and the program's passes.

The passes are those of stage1/train.py itself. No data, no folder and no weights are needed: the perceptual network has
random ones, which cost as much. Where a package that only the command line needs is not installed, an empty stand-in
lets stage1/train.py be imported all the same.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

ROOT = Path(__file__).parents[2]
NOT_NEEDED = ("omegaconf", "PIL", "tqdm", "psutil", "fsspec", "filelock")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports those packages as objects without content."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in NOT_NEEDED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __path__=[])

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.path.insert(0, str(ROOT))
sys.meta_path.append(stand_ins := StandIns())  # the last, so that what is installed is found first
from vqgen.evaluation.metrics import CodeUsage  # noqa: E402
from vqgen.evaluation.perceptual import PerceptualDistance  # noqa: E402
from vqgen.settings import Stage1Config  # noqa: E402
from vqgen.training.means import Means, Stopwatch  # noqa: E402
from vqgen.training.run import Run  # noqa: E402
from vqgen.yaml_file import read_yaml  # noqa: E402

stage1: Any = importlib.util.module_from_spec(
    spec := importlib.util.spec_from_file_location("stage1_train", ROOT / "stage1/train.py")
)
spec.loader.exec_module(stage1)
sys.meta_path.remove(stand_ins)


class Untrained(PerceptualDistance):
    """A perceptual network with random weights."""

    def __init__(self, name: str, weights: object = ()):
        nn.Module.__init__(self)
        self.name = name
        self._build()
        for head in self.heads:
            head.fill_(1 / head.numel())


stage1.PerceptualDistance = Untrained


def configuration(path: Path, **changes: Any) -> Stage1Config:
    """The settings in a file of stage 1, for RGB images, with changes by key; `__` stands for the dot."""
    settings = read_yaml(path)
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    config: Stage1Config = as_dataclass(Stage1Config, settings)
    config.data.channels = 3
    return config


def as_dataclass(cls: Any, values: Mapping[str, Any]) -> Any:
    """An object of a dataclass, whose fields are dataclasses themselves, from nested dictionaries."""
    defaults = cls()
    nested = {key: getattr(defaults, key) for key in values}
    made = {
        key: as_dataclass(type(nested[key]), value) if dataclasses.is_dataclass(nested[key]) else value
        for key, value in values.items()
    }
    return cls(**made)


class Step:
    """A training step of a configuration in its last phase, in which all of its losses count.

    Args:
        config: the configuration; `train.mixed_precision` says in which precision the networks compute.
        batch: images of a step.
        device: where the networks are.
        prepare: changes the networks before Accelerate wraps them.

    Attributes:
        nets: the program's networks and optimizers.
        x: random images (B, 3, H, W) in [-1, 1].
        class_ids: their classes (B,), -1 for none.
    """

    def __init__(
        self,
        config: Stage1Config,
        batch: int,
        device: torch.device,
        prepare: Callable[[Any], Any] = lambda nets: nets,
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.config = config
        accelerator = Accelerator(mixed_precision=config.train.mixed_precision, cpu=device.type != "cuda")
        self.run: Any = SimpleNamespace(  # what the passes and the methods of `Run` that are called below use
            config=config, accelerator=accelerator, accumulation=1, device=device, lowered=1.0, origin=None, step=0,
            say=print, means=Means(device), stop=SimpleNamespace(asked=False, agreed=False), _guards={}, _terms={},
        )  # fmt: skip
        nets = prepare(stage1.build(config, self.run, class_names=[]))
        there = [name for name in ("model", "optimizer", "disc", "disc_optimizer") if getattr(nets, name) is not None]
        prepared = accelerator.prepare(*(getattr(nets, name) for name in there))
        self.nets = nets._replace(**dict(zip(there, prepared, strict=True)))
        self.nets.model.train()
        self.now = SimpleNamespace(share=0.99, step=1)
        self.stopwatch = Stopwatch(device)
        self.usage = CodeUsage(self.nets.tokenizer.code_layout(config.data.image_size), device)
        memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        height, width = config.data.size
        self.x = (torch.rand(batch, 3, height, width, device=device) * 2 - 1).contiguous(memory_format=memory_format)
        self.class_ids = torch.full((batch,), -1, device=device)

    def backward(self) -> None:
        """Both passes: the tokenizer's, and the discriminator's if there is one and it learns yet."""
        arguments = (self.config, self.run, self.now)
        terms, codes, asked, x_rec = stage1.tokenizer_pass(
            self.nets, self.x, self.class_ids, *arguments, self.stopwatch
        )
        if self.disc_learns:
            terms |= stage1.discriminator_pass(self.nets, asked, x_rec, *arguments)
        Run.add(self.run, terms)
        self.usage.update(codes)

    def update(self) -> None:
        """What the program does after the passes: an update of the weights, and of their average."""
        groups = {"grad_norm": (self.nets.model, self.nets.optimizer)}
        if self.disc_learns:
            groups["disc_grad_norm"] = (self.nets.disc, self.nets.disc_optimizer)
        Run.update(self.run, **groups)
        self.nets.average.update(self.nets.tokenizer, self.now.step)

    @property
    def disc_learns(self) -> bool:
        adversarial = self.config.loss.adversarial
        return self.nets.disc is not None and self.now.share >= adversarial.start - adversarial.lead

    def __call__(self) -> None:
        self.backward()
        self.update()
