"""A model's samples as a set of images, and the scale of guidance that suits them best."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from vqgen.distributed import object_from_main
from vqgen.generator import Generator
from vqgen.priors.sampling import classes_in_turn
from vqgen.settings import SampleConfig

SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)


class Samples:
    """A model's samples as a set of images, drawn on request.

    Args:
        generator: the model.
        config: the settings of the samples.
        more: further options of `Generator.draw`.
    """

    def __init__(self, generator: Generator, config: SampleConfig, **more: Any):
        self.generator, self.config, self.options = generator, config, {**generator.options(config), **more}
        self.class_ids = classes_in_turn(config.num_images, generator.choices(config.class_ids)).to(generator.device)

    def __len__(self) -> int:
        return self.config.num_images

    def __getitems__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The samples of consecutive rows, uint8 (B, C, H, W), and their class ids."""
        first, class_ids = int(rows[0]), self.class_ids[rows[0] : rows[-1] + 1]
        return self.generator.draw(class_ids, seed=self.config.seed, first=first, **self.options), class_ids


def figures_of_scales(figure: Callable[[float], float]) -> dict[float, float]:
    """The figure of each scale of guidance, until two in a row are above the least one; the main process's for all."""
    found: dict[float, float] = {}
    for scale in SCALES:
        found[scale] = object_from_main(figure(scale))
        if len(found) - list(found.values()).index(min(found.values())) > 2:
            break
    return found
