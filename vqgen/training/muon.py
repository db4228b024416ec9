"""Muon: steps in the direction of orthogonalised momentum, for the weights between hidden layers."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # Muon's coefficients: steep at 0, so that small singular values grow fast
LEAST = 16  # a matrix with fewer rows or columns has too few directions to even out


class Muon(torch.optim.AdamW):
    """AdamW that takes orthogonalised steps in the groups with `muon=True` (Muon, Jordan et al. 2024).

    Such a step moves all directions of a weight equally far, and not mostly the few that dominate the gradient. It is
    scaled to the size of AdamW's steps, so both kinds of groups share one learning rate (Moonlight, Liu et al. 2025,
    section 2.2). A convolution (O, I, h, w) counts as the matrix (O, I h w).

    Args:
        groups: parameter groups, each with `muon` True or False.
        momentum: decay of the sum of gradients, with Nesterov's look ahead.
        options: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95, **options: Any):
        self.momentum = momentum
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; where `found_inf` is set on the optimizer and not 0, nothing changes, as in fused AdamW."""
        for group in self.param_groups:
            if group["muon"]:
                self._orthogonal_step(group)
        return super().step(closure)  # skips the weights above, as they have no gradient any more

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        alike = defaultdict(list)  # weights whose matrices have one shape: one batch of products for all of them
        for p in group["params"]:
            if p.grad is not None:
                alike[len(p), p[0].numel()].append(p)
        bad = getattr(self, "found_inf", None)
        for (rows, columns), weights in alike.items():
            gradient = torch.stack([p.grad.flatten(1) for p in weights])  # (N, rows, columns)
            old = torch.stack([self._momentum(p) for p in weights])
            new = self.momentum * old + gradient
            step = orthogonalised(self.momentum * new + gradient)
            step *= -0.2 * group["lr"] * max(rows, columns) ** 0.5
            if bad is not None:
                new, step = torch.where(bad > 0, old, new), torch.where(bad > 0, 0.0, step)
            kept = 1 - group["lr"] * group["weight_decay"] * (1.0 if bad is None else 1 - bad)
            for p, mean, change in zip(weights, new, step, strict=True):
                self._momentum(p).copy_(mean)
                p.mul_(kept).add_(change.view_as(p))
                p.grad = None

    def _momentum(self, p: Tensor) -> Tensor:
        """The sum of a weight's gradients, as a matrix."""
        state = self.state[p]
        if "momentum" not in state:
            state["step"] = torch.zeros(())  # AdamW looks for it when it loads a state
            state["momentum"] = torch.zeros_like(p.flatten(1))
        return state["momentum"]


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices (N, R, C) with about the same singular vectors, but singular values near 1 (0.7 to 1.2).

    The Newton-Schulz iteration of Muon: an odd polynomial of the matrix changes its singular values alone.
    """
    a, b, c = QUINTIC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_groups(groups: list[dict[str, Any]], last_layer: nn.Parameter) -> list[dict[str, Any]]:
    """Divides parameter groups into matrices between hidden features, which have `muon=True`, and all others.

    AdamW keeps biases, norms, depthwise convolutions, the first and the last layer, and matrices with few rows or
    columns, such as those next to the codes.
    """
    divided = []
    for group in groups:
        hidden = [p for p in group["params"] if p.ndim >= 2 and min(p.shape[:2]) >= LEAST and p is not last_layer]
        chosen = {id(p) for p in hidden}
        others = [p for p in group["params"] if id(p) not in chosen]
        divided += [{**group, "params": hidden, "muon": True}, {**group, "params": others, "muon": False}]
    return [group for group in divided if group["params"]]
