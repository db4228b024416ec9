"""Training steps without a run: the networks of a configuration, and the passes of the program itself.

No folder, no data and no weights are needed. The programs come as modules, since no room may import them.
"""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from vqgen.evaluation.metrics import CodeUsage
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.settings import Stage1Config, Stage2Config
from vqgen.tokenizers.vqmodel import VQModel
from vqgen.training.means import Means, Stopwatch
from vqgen.training.run import Run


class Untrained(PerceptualDistance):
    """A perceptual network with random weights, which cost as much as its own."""

    def __init__(self, name: str, weights: object = ()):
        nn.Module.__init__(self)
        self.name = name
        self._build()
        for head in self.heads:
            head.fill_(1 / head.numel())


def with_values(settings: Any, values: Mapping[str, Any]) -> Any:
    """A copy of settings, with the values of nested dictionaries in the place of their own."""
    own = {key: getattr(settings, key) for key in values}
    parts = {key: with_values(own[key], x) if is_dataclass(own[key]) else x for key, x in values.items()}
    return replace(settings, **parts)


def bare_run(config: Any, device: torch.device) -> Any:
    """What the passes and the methods of `Run` that an update calls use of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision or "no", cpu=device.type != "cuda")
    stop = SimpleNamespace(asked=False, agreed=False)
    return SimpleNamespace(
        config=config, accelerator=accelerator, accumulation=1, device=device, lowered=1.0, origin=None, step=0,
        say=print, means=Means(device), stop=stop, _guards={}, _terms={},
    )  # fmt: skip


class TokenizerStep:
    """A training step of stage 1 in its last phase, in which all of its losses count.

    Args:
        program: stage1/train.py.
        config: the configuration; `train.mixed_precision` says in which precision the networks compute.
        batch: images of a step.
        device: where the networks are.
        prepare: changes the networks before Accelerate wraps them.

    Attributes:
        nets: the program's networks and optimizers.
        x: random images (B, C, H, W) in [-1, 1].
        class_ids: their classes (B,), -1 for none.
    """

    def __init__(
        self,
        program: ModuleType,
        config: Stage1Config,
        batch: int,
        device: torch.device,
        prepare: Callable[[Any], Any] = lambda nets: nets,
    ):
        self.program, self.config, self.run = program, config, bare_run(config, device)
        nets = prepare(program.build(config, self.run, class_names=[]))
        there = [name for name in ("model", "optimizer", "disc", "disc_optimizer") if getattr(nets, name) is not None]
        prepared = self.run.accelerator.prepare(*(getattr(nets, name) for name in there))
        self.nets = nets._replace(**dict(zip(there, prepared, strict=True)))
        self.nets.model.train()
        self.now = SimpleNamespace(share=0.99, step=1)
        self.stopwatch = Stopwatch(device)
        self.usage = CodeUsage(self.nets.tokenizer.code_layout(config.data.image_size), device)
        memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        assert config.data.channels is not None, "load_data of the program, or a plan, says how many"
        shape = (batch, config.data.channels, *config.data.size)
        self.x = (torch.rand(shape, device=device) * 2 - 1).contiguous(memory_format=memory_format)
        self.class_ids = torch.full((batch,), -1, device=device)

    def backward(self) -> None:
        """Both passes: the tokenizer's, and the discriminator's if there is one and it learns yet."""
        arguments = (self.config, self.run, self.now)
        terms, codes, asked, x_rec = self.program.tokenizer_pass(
            self.nets, self.x, self.class_ids, *arguments, self.stopwatch
        )
        if self.disc_learns:
            terms |= self.program.discriminator_pass(self.nets, asked, x_rec, *arguments)
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
        """Whether D learns at this share of the run."""
        adversarial = self.config.loss.adversarial
        return self.nets.disc is not None and self.now.share >= adversarial.start - adversarial.lead

    def __call__(self) -> None:
        self.backward()
        self.update()


class PriorStep:
    """A training step of stage 2 on random tokens.

    Args:
        program: stage2/train.py.
        config: the configuration.
        tokenizer: the tokenizer, whose layout the prior has; its weights do not matter.
        class_names: the classes.
        batch: sequences of a step.
        device: where the prior is.

    Attributes:
        nets: the program's networks and optimizers.
        tokens: (B, N).
        share: of the run that is done.
    """

    def __init__(
        self,
        program: ModuleType,
        config: Stage2Config,
        tokenizer: VQModel,
        class_names: list[str],
        batch: int,
        device: torch.device,
    ):
        self.program, self.config, self.run = program, config, bare_run(config, device)
        nets = program.build(config, self.run, tokenizer, "", class_names)
        model, optimizer = self.run.accelerator.prepare(nets.model, nets.optimizer)
        self.nets = nets._replace(model=model.train(), optimizer=optimizer)
        first, length = nets.ranges[:, 0], nets.prior.layout.num_tokens
        self.tokens: Tensor = first.repeat(batch, 1)
        self.class_ids = torch.full((batch,), -1, device=device)
        self.noise = torch.rand(batch, 2 + 3 * length, device=device)
        self.share = 0.5

    def backward(self) -> None:
        """The prior's pass."""
        terms = self.program.prior_pass(
            self.nets, self.tokens, self.class_ids, self.noise, self.config, self.share, self.run
        )
        Run.add(self.run, terms)

    def update(self) -> None:
        """What the program does after the pass."""
        Run.update(self.run, grad_norm=(self.nets.model, self.nets.optimizer))
        self.nets.average.update(self.nets.prior, 1)

    def __call__(self) -> None:
        self.backward()
        self.update()
