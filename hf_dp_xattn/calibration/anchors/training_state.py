"""All that a training of decoders is in the middle of, kept from time to time, so that one that was broken off goes on as if it had not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..checkpoints import Checkpoints

SECONDS = 20.0  # between two times: what a broken-off training loses


@dataclass
class Course:
    """Where a training is: steps: taken; spent: seconds; rate: of the learning rate; level: the loss of each plan; lowest: of all looks,
    with the parameters that gave it; over: it has ended."""

    level: dict[int, float]
    best: list[torch.Tensor]
    lowest: float
    steps: int = 0
    spent: float = 0.0
    rate: float = 1.0
    over: bool = False


@dataclass(eq=False)
class TrainingState:
    """Reads and writes the state of one training.

    Args:
        kept: where.
        name: of the training.
        trainer: its module, with all parameters.
        optimiser: Adam, one group for each parameter.
        generator: of every random choice.
    """

    kept: Checkpoints
    name: str
    trainer: nn.Module
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    _last: float = field(default_factory=time.monotonic)

    def restore(self, course: Course) -> None:
        """Everything as it was when it was last kept; nothing where it was not.

        Args:
            course: of the new training, which becomes that of the old one.
        """
        state = self.kept.read(self.name)
        if state is None:
            return
        self.trainer.load_state_dict({k[2:]: t for k, t in state.items() if k.startswith("p.")})
        for i, parameter in enumerate(self._parameters):
            moments = {k.split(".", 2)[2]: t for k, t in state.items() if k.startswith(f"o.{i}.")}
            if moments:
                self.optimiser.state[parameter] = moments
        self.generator.set_state(state["generator"])
        steps, course.spent, course.rate, course.lowest, over = state["numbers"].tolist()
        course.steps, course.over = int(steps), bool(over)
        course.level = dict(zip(course.level, state["level"].tolist(), strict=True))
        course.best = [state[f"best.{i}"] for i in range(len(course.best))]

    def keep(self, course: Course) -> None:
        """Writes it, where it was not written for a while or the training is over.

        Args:
            course: as it is between two steps.
        """
        now = time.monotonic()
        if self.kept.folder is None or not (course.over or now - self._last >= SECONDS):
            return
        numbers = [float(course.steps), course.spent, course.rate, course.lowest, float(course.over)]
        moments = {
            f"o.{i}.{k}": t
            for i, parameter in enumerate(self._parameters)
            for k, t in self.optimiser.state[parameter].items()
        }
        self.kept.keep(
            self.name,
            {
                **{f"p.{k}": t for k, t in self.trainer.state_dict().items()},
                **moments,
                **{f"best.{i}": t for i, t in enumerate(course.best)},
                "generator": self.generator.get_state(),
                "numbers": torch.tensor(numbers, dtype=torch.float64),
                "level": torch.tensor(list(course.level.values()), dtype=torch.float64),
            },
        )
        self._last = now

    @property
    def _parameters(self) -> Sequence[nn.Parameter]:
        return [p for group in self.optimiser.param_groups for p in group["params"]]
