"""The memory that a step of pre-training takes on a GPU, from the tensors that the step makes.

Under torch's FakeTensorMode tensors have shapes but no data: a step of any size is recorded in a second or two.
"""

import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.data.masks import predicted_count, visible_count
from pipeline.models import Student
from pipeline.models.mr_mae import module_name


class StepMemory(NamedTuple):
    """Bytes of one process.

    Attributes:
        weights: those that are held between steps.
        gradients: with DDP's buckets, which hold them a second time.
        optimizer: AdamW's two moments.
        gathered: what FSDP has of other processes' shares at a time, on its way to them or from them.
        activations: the most that a step holds beside these: what the backward needs, inputs, temporary tensors.
        peak: the most that is held at a time. It is less than the sum: gradients come while activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    peak: int


def step_memory(student: Student, images: int, mask_ratio: float, bf16: bool, processes: int, fsdp: bool) -> StepMemory:
    """The memory of a step, without `compile`.

    Args:
        student: fresh; it runs a forward and a backward. Under FakeTensorMode, if it was built there.
        images: in each process.
        processes: above 1, DDP, or with `fsdp` shares as `pipeline.training.sharding` makes them.
    """
    sharded = fsdp and processes > 1
    blocks = [_bytes(block.parameters()) for block in student.encoder.blocks]
    weights = _bytes(student.parameters())
    trained = _bytes(parameter for parameter in student.parameters() if parameter.requires_grad)
    buckets = trained if processes > 1 and not sharded else 0
    gathered, divisor = 0, 1
    if sharded:
        # Of blocks, weights: the one at work, the next one and the buffer that it comes in; gradients: as they are made
        # and, in fp32, as they are sent. Of all else, the weights.
        half = 2 if bf16 else 1
        largest = max(blocks, default=0)
        gathered, divisor = weights - sum(blocks) + 4 * largest // half + largest, processes
        if bf16:
            _to_bf16(student.encoder.blocks)
    changes, gradients = _record(student, images, mask_ratio, bf16)
    held = held_as_gradients = activations = peak = 0
    for number, change in changes:
        if number in gradients:
            held_as_gradients += gradients[number] // divisor if change > 0 else 0
        else:
            held += change
        activations, peak = max(activations, held), max(peak, held + held_as_gradients)
    between = weights // divisor + 2 * trained // divisor + buckets
    return StepMemory(
        weights=weights // divisor,
        gradients=trained // divisor + buckets,
        optimizer=2 * trained // divisor,
        gathered=gathered,
        activations=activations,
        peak=between + gathered + peak,
    )


def _record(
    student: Student, images: int, mask_ratio: float, bf16: bool
) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """Run a step.

    Returns:
        (number of a piece of memory, bytes more or less) in order of time, and the number of each gradient's memory →
        its bytes in fp32.
    """
    length = student.grid[0] * student.grid[1]
    keep = visible_count(length, mask_ratio)
    count = predicted_count(length, keep, student.predict_share) or length - keep
    recorder = Recorder(chain(student.parameters(), student.buffers()))
    with recorder, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        views = torch.zeros(images, 3, *student.encoder.image_size)
        cells = torch.arange(length).expand(images, length)
        rows = {"visible": keep, "masked": count, "none": 0}[student.target_rows]
        targets = {
            teacher: torch.zeros(
                images, rows, student.get_buffer(f"mimic.{module_name(teacher)}.channel_mean").shape[0]
            )
            for teacher in student.teachers
        }
        losses = student(views, cells[:, :keep], targets, cells[:, keep : keep + count])
        del views, targets
        losses["loss"].backward()
    gradients = {
        recorder.numbers[parameter.grad.untyped_storage()]: 4 * parameter.numel()
        for parameter in student.parameters()
        if parameter.grad is not None
    }
    return recorder.changes, gradients


class Recorder(TorchDispatchMode):
    """Inside, every piece of memory that an operation asks for is recorded, and when it is given back.

    Args:
        present: tensors that are there already; their memory doesn't count.

    Attributes:
        changes: (number of the piece, bytes more or less), in order of time.
        numbers: storage → number, of those that live.
    """

    def __init__(self, present: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.changes: list[tuple[int, int]] = []
        self.numbers = weakref.WeakKeyDictionary[Any, int]()
        for tensor in present:
            self.numbers[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.numbers:
                self._record(tensor.untyped_storage())
        return output

    def _record(self, storage: torch.UntypedStorage) -> None:
        number = len(self.changes)
        self.numbers[storage] = number
        self.changes.append((number, storage.nbytes()))
        weakref.finalize(storage, self.changes.append, (number, -storage.nbytes()))


def _to_bf16(part: nn.Module) -> None:
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad))


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
