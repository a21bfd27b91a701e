"""What a stage gives the engine: a model, its losses, its samples, and how it is evaluated."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from pipeline.configs.training import EmaConfig
from pipeline.steps import StepPlan
from pipeline.training.ahead import Movable
from pipeline.training.grad_norms import GradNorms

B = TypeVar("B", bound=Movable)
B_co = TypeVar("B_co", bound=Movable, covariant=True)


class Samples(Protocol[B_co]):
    """Micro-batches as a function of the step."""

    def batches(self, plan: StepPlan, start_step: int) -> Iterable[B_co]:
        """This process's micro-batches from `start_step` on, `plan.accum_iter` of them for each step."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What is measured now and then while a model is trained.

    Attributes:
        measure: (unwrapped model in eval mode, step) → metrics.
        every: steps from one measurement to the next; the last step is always measured.
        best: the metric whose highest value is kept as checkpoints/best.
        images: that it is measured on, for the report's standard errors; None where that says nothing.
    """

    measure: Callable[[nn.Module, int], dict[str, float]]
    every: int
    best: str
    images: int | None = None


@dataclass(frozen=True)
class Task(Generic[B]):
    """A model and all that its training needs to know of it.

    Attributes:
        name: of the stage, for the progress bar.
        model: trained in place; left on the run's device.
        spec: JSON-able description that rebuilds the model, kept in each checkpoint.
        losses: (model, micro-batch) → scalars; "loss" is the one that is minimised.
        layer_ids: parameter → layer, for layer-wise learning rates.
        ema: average the weights. The average is then what is evaluated, and what checkpoints show their readers.
        grad_norms: measures, now and then, how hard each loss pulls.
        next_commands: command lines that a user may want after the training.
    """

    name: str
    model: nn.Module
    spec: Mapping[str, Any]
    losses: Callable[[nn.Module, B], dict[str, Tensor]]
    samples: Samples[B]
    evaluation: Evaluation | None = None
    layer_ids: Mapping[str, int] | None = None
    ema: EmaConfig = field(default_factory=EmaConfig)
    grad_norms: GradNorms | None = None
    next_commands: Sequence[str] = ()
