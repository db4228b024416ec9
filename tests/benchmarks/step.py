"""Stage 1's training step without a run, for measurements: `TokenizerStep` with random weights for the perceptual loss.

Where a package that only the command line needs is not installed, an empty stand-in lets stage1/train.py be imported
all the same.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

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
from vqgen.planning.step import TokenizerStep, Untrained, with_values  # noqa: E402
from vqgen.settings import Stage1Config  # noqa: E402
from vqgen.yaml_file import read_yaml  # noqa: E402

stage1: Any = importlib.util.module_from_spec(
    spec := importlib.util.spec_from_file_location("stage1_train", ROOT / "stage1/train.py")
)
spec.loader.exec_module(stage1)
sys.meta_path.remove(stand_ins)


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
    config: Stage1Config = with_values(Stage1Config(), settings)
    config.data.channels = 3
    return config


class Step(TokenizerStep):
    """`TokenizerStep` of stage1/train.py."""

    def __init__(
        self,
        config: Stage1Config,
        batch: int,
        device: torch.device,
        prepare: Callable[[Any], Any] = lambda nets: nets,
    ):
        super().__init__(stage1, config, batch, device, prepare)
