"""Several teachers on one batch: those of one network share its weights and its forward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.teachers.teacher import Teacher, TeacherOutput, Trace


def run_teachers(teachers: Sequence[Teacher], views: Tensor, heads: bool = False) -> list[TeacherOutput]:
    """Run several teachers on one batch. Those that hold one backbone (see `share_backbones`) share its forward.

    Each output equals, bit for bit, that of the teacher alone.
    """
    traces: dict[tuple[int, torch.dtype], Trace] = {}
    outputs = []
    for teacher in teachers:
        key = (id(teacher.backbone), teacher.dtype)
        if key not in traces:
            depth = max(other.depth for other in teachers if (id(other.backbone), other.dtype) == key)
            traces[key] = teacher.trace(views, depth)
        outputs.append(teacher.read(traces[key], heads))
    return outputs


def share_backbones(teachers: Sequence[Teacher]) -> int:
    """Let teachers of one network, weights and input hold one backbone; return the number of forwards for a batch.

    Two token choices of one ViT then cost one forward and one set of weights. Equal weights are not enough: another
    activation, as CLIP's QuickGELU, has no parameters, so the specs must be equal too.
    """
    first: dict[tuple[object, ...], Teacher] = {}
    for teacher in teachers:
        backbone = teacher.backbone
        network = (teacher.spec, teacher.weights_sha256, teacher.compiled, teacher.device)
        key = (*network, backbone.image_size, backbone.mean, backbone.std)
        original = first.setdefault(key, teacher)
        teacher.backbone, teacher._trace = original.backbone, original._trace
    return len({(id(teacher.backbone), teacher.dtype) for teacher in teachers})
