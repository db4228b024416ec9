"""The best evaluation so far, whose weights a run can end with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Best:
    """The weights and figures of the evaluation with the lowest figure.

    Args:
        patience: evaluations in a row without a lower figure after which training is no use.

    Attributes:
        figure: the lowest figure.
        step: the step of its evaluation.
        figures: all figures of that evaluation.
        weights: the weights that it evaluated, on the CPU.
    """

    def __init__(self, patience: int):
        self.patience, self.figure, self.step, self._waited = patience, float("inf"), 0, 0
        self.figures: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}

    def offer(self, figure: float, step: int, figures: Mapping[str, float], model: nn.Module) -> None:
        """Takes an evaluation over if its figure is lower than all before."""
        self._waited += 1
        if not self.weights or figure < self.figure:  # the first is kept even if its figure is not finite
            self.figure, self.step, self.figures, self._waited = figure, step, dict(figures), 0
            self.weights = {name: x.detach().to("cpu", copy=True) for name, x in model.state_dict().items()}

    @property
    def is_over(self) -> bool:
        """Whether so many evaluations have not been better that training should end."""
        return self._waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        numbers = {"figure": self.figure, "step": self.step, "figures": self.figures, "waited": self._waited}
        return {**numbers, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state from `state_dict`."""
        self.figure, self.step, self.figures, self._waited, self.weights = (
            state[name] for name in ("figure", "step", "figures", "waited", "weights")
        )
