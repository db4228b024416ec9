"""Muon: steps in the direction of orthogonalised momentum, for the weights between hidden layers."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # Muon's coefficients: steep at 0, so that small singular values grow fast
LEAST = 16  # a matrix with fewer rows or columns has too few directions to even out


class Muon(torch.optim.AdamW):
    """AdamW that takes orthogonalised steps in the groups with `muon=True` (Muon, Jordan et al. 2024).

    Such a step moves all directions of a weight equally far, and not mostly the few that dominate the gradient. It is
    scaled to the size of AdamW's steps, so both kinds of groups share one learning rate (Moonlight, Liu et al. 2025,
    section 2.2). A convolution (O, I, h, w) counts as the matrix (O, I h w). All processes compute all steps.

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
        assert closure is None, "a closure would compute the gradients anew after half of the update"
        for group in self.param_groups:
            if group["muon"]:
                self._orthogonal_step(group)
        return super().step()  # skips the weights above, as they have no gradient any more

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        alike = defaultdict(list)  # matrices of one shape, tall ones turned: one batch of products for all of them
        for p in group["params"]:
            if p.grad is not None:
                alike[_wide(p.grad).shape].append(p)
        bad = getattr(self, "found_inf", None)
        lr: Any = group["lr"]
        momentum: Any = self.momentum
        if bad is not None:  # where it is not 0, the momentum stays, and the step is 0
            lr, momentum = lr * (1 - bad), torch.where(bad > 0, 1.0, momentum)
        for shape, weights in alike.items():
            gradient = torch.stack([_wide(p.grad) for p in weights])  # (N, R, C) with R <= C
            if bad is not None:
                gradient = torch.where(bad > 0, 0.0, gradient)
            sums = [self._momentum(p) for p in weights]
            total = torch.stack(sums).mul_(momentum).add_(gradient)
            step = orthogonalised(gradient.add_(total, alpha=self.momentum)).mul_(-0.2 * max(shape) ** 0.5 * lr)
            torch._foreach_copy_(sums, list(total))
            changes = [x.mT if len(p) > p[0].numel() else x for p, x in zip(weights, step, strict=True)]
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_add_(weights, [x.reshape(p.shape) for p, x in zip(weights, changes, strict=True)])
            for p in weights:
                p.grad = None

    def _momentum(self, p: Tensor) -> Tensor:
        """The sum of a weight's gradients, as a wide matrix."""
        state = self.state[p]
        if "momentum" not in state:
            state["step"] = torch.zeros(())  # AdamW looks for it when it loads a state
            state["momentum"] = torch.zeros_like(_wide(p), memory_format=torch.contiguous_format)
        return state["momentum"]


def _wide(x: Tensor) -> Tensor:
    """A weight or its gradient as a matrix, turned if it has more rows than columns."""
    matrix = x.flatten(1)
    return matrix.mT if len(matrix) > matrix.shape[1] else matrix


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices (N, R, C), R <= C, with about the same singular vectors, but singular values near 1 (0.7 to 1.2).

    The Newton-Schulz iteration of Muon: an odd polynomial of the matrix changes its singular values alone. As x only
    gets factors P from the left, which commute with x x^T, the iteration needs the small matrices (R, R) alone.
    """
    a, b, c = QUINTIC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, scaled_identity = x @ x.mT, a * torch.eye(x.shape[1], device=x.device)
    product = factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + scaled_identity
    for _ in range(ITERATIONS - 1):
        gram = factor @ (factor @ gram)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + scaled_identity
        product = factor @ product
    return product @ x


def muon_groups(groups: list[dict[str, Any]], kept: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Divides groups of parameters into matrices between hidden features, which have `muon=True`, and all others.

    AdamW keeps biases, norms, depthwise convolutions, matrices with few rows or columns, such as those next to the
    codes, and `kept`: a model's first and last layer, and tables such as codebooks, which are no map between features.
    """
    left = {id(p) for p in kept}
    divided = []
    for group in groups:
        hidden = [p for p in group["params"] if p.ndim >= 2 and min(p.shape[:2]) >= LEAST and id(p) not in left]
        chosen = {id(p) for p in hidden}
        others = [p for p in group["params"] if id(p) not in chosen]
        divided += [{**group, "params": hidden, "muon": True}, {**group, "params": others, "muon": False}]
    return [group for group in divided if group["params"]]
