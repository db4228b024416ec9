"""The scale of guidance that suits a model's samples best."""

from collections.abc import Callable

from vqgen.distributed import object_from_main

SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)


def figures_of_scales(figure: Callable[[float], float]) -> dict[float, float]:
    """The figure of each scale of guidance, until two in a row are above the least one; the main process's for all."""
    found: dict[float, float] = {}
    for scale in SCALES:
        found[scale] = object_from_main(figure(scale))
        if len(found) - list(found.values()).index(min(found.values())) > 2:
            break
    return found
