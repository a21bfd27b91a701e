"""Stage 2: train a student that mimics a cache.

Trains a masked autoencoder that mimics the cached teacher on visible patches (MR-MAE):

    mrmae pretrain data.path=/data/imagenet/train cache.path=/data/clip student.name=mrmae_convvit_base_patch16 \\
        output=runs/convvit

Reads images (data.path) and a cache (cache.path). mimic.objective=mae is plain MAE and needs no cache. With
teacher.spec in place of cache.path the teacher runs in every step, on the same views and with the same masks. Writes to
output: config.yaml, metrics.jsonl, train.log, starts.jsonl, tensorboard/, checkpoints/. Costs what plain MAE costs,
because no step runs a teacher.

Ctrl-C, SIGTERM and SIGHUP stop it after a checkpoint. The same command goes on from the newest sound checkpoint.
"""

import logging
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.assembly.caches import mirrors_of, place_of, require_local_room
from pipeline.assembly.fetching import OrderedFetching
from pipeline.assembly.initial_weights import named_by_init, read_init
from pipeline.assembly.knn_callback import knn_callback
from pipeline.assembly.knowledge import CachedKnowledge, Knowledge, Targets, open_cached, open_live
from pipeline.assembly.masks import draw_masks
from pipeline.assembly.samples import PretrainBatch
from pipeline.assembly.teachers import load_teacher, teacher_dtype
from pipeline.configs.objectives import OBJECTIVES
from pipeline.data.loader import Samples
from pipeline.data.masks import MaskSampler
from pipeline.data.order import EpochOrder
from pipeline.errors import CacheError, ConfigError, TeacherError
from pipeline.models import Student, build_student, load_weights, model_record
from pipeline.models.sizes import patch_for_grid
from pipeline.ownership import stage
from pipeline.pixels import normalise
from pipeline.processes import processes
from pipeline.steps import StepPlan
from pipeline.teachers import Teacher
from pipeline.training.checkpoint import (
    newest_checkpoint,
    recorded_config,
    recorded_identity,
    recorded_start,
)
from pipeline.training.engine import fit
from pipeline.training.grad_norms import GradNorms
from pipeline.training.journal import command
from pipeline.training.run import Run, plan_steps, settle_batch_size
from pipeline.training.task import Evaluation, Task
from pipeline.weights import state_digest
from stages.configs.pretrain import PretrainConfig

log = logging.getLogger(__name__)

_BATCH = 1024  # with batch_size=auto smaller batches learn at the rate of this one

LOSSES = ("mimic_loss", "pixel_loss", "summary_loss")  # whose pull at the encoder is measured


@stage
def run(config: PretrainConfig) -> dict[str, Any]:
    """Train to the end, or to the next interruption; returns the last metrics."""
    knowledge = _open_knowledge(config)
    config = _fit_to(knowledge, config)
    _check_summaries(config, knowledge)
    student = _build(config, knowledge)
    masks = draw_masks(config.mask, config.seed, knowledge, student, recorded_identity(config.output))
    mirrors = mirrors_of(knowledge.caches) if isinstance(knowledge, CachedKnowledge) else []
    fetches_shards = not all(mirror.by_range for mirror in mirrors)
    kind = config.order.kind or ("block" if fetches_shards else "full")
    require_local_room(mirrors, knowledge.block, None if kind == "full" else config.order.window)
    config = config.model_copy(update={"order": config.order.model_copy(update={"kind": kind})})
    identity = _identity(config, knowledge, student, masks) | {"init": _start_from(config, student)}
    training = Run(config, identity, may_change=("samples",))
    plan = plan_steps(config, len(knowledge.samples), per_image=config.mask.masks_per_sample)
    order = EpochOrder(knowledge.samples, config.seed, kind, knowledge.block, config.order.window)
    if isinstance(knowledge, CachedKnowledge) and config.check_records and training.is_main:
        near = _shown_first(order, plan, training.start_step) if fetches_shards else knowledge.samples
        log.info("checked %s", knowledge.check(near, config.seed, config.check_records))
    _give_statistics(config, knowledge, student, goes_on=training.resumed is not None)
    dataset = knowledge.dataset(masks, student.target_rows, student.grid, summaries=bool(student.summary))
    announce = OrderedFetching(mirrors, order) if mirrors else iter
    task = Task(
        name="pretrain",
        model=student,
        spec=model_record(student),
        losses=_Losses(knowledge.targets(dataset)),
        samples=Samples(dataset, order, config.data.workers, announce),
        evaluation=_evaluation(config, plan),
        grad_norms=GradNorms(LOSSES, list(student.encoder.parameters()), config.grad_norms_every),
        next_commands=_next_commands(config, knowledge),
    )
    return fit(task, training, plan, config.optim)


def _next_commands(config: PretrainConfig, knowledge: Knowledge) -> list[str]:
    """Measure and fine-tune the student where the images have classes; look at its curves."""
    init, source = f"init={config.output}", knowledge.source
    commands = [command("report", str(config.output))]
    if source is not None and len(set(source.labels.tolist()) - {-1}) > 1:
        labelled = (f"data.path={config.data.path}", "val.share=0.1")
        commands += [
            command("knn", init, *labelled, f"output={config.output}"),
            command("finetune", init, *labelled, f"output={config.output}_finetuned"),
        ]
    return commands


class _Losses:
    """A micro-batch → the student's losses: targets found and pixels normalised on the device."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    def __call__(self, student: nn.Module, batch: PretrainBatch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = student(normalise(batch.images), *self._targets(batch))
        return losses


def _open_knowledge(config: PretrainConfig) -> Knowledge:
    data = config.data
    if config.cache or config.caches:
        caches = {"": config.cache} if config.cache else config.caches
        places = {name: place_of(cache) for name, cache in caches.items()}
        return open_cached(places, data.path, data.limit, config.mimic.target)
    if config.mimic.target == "codes":
        raise ConfigError(
            "mimic.target=codes needs a cache of codes: give cache.path=..., extracted with cache.quantiser=codes"
        )
    teachers = _load_teachers(config)
    if not teachers and OBJECTIVES[config.mimic.objective].mimics:
        raise ConfigError(
            f"mimic.objective={config.mimic.objective} needs a cache: give cache.path=..., or objective=mae, or "
            "teacher.spec=... to run a teacher in every step"
        )
    knowledge = open_live(teachers, data.path, data.limit, config.views)
    newest = newest_checkpoint(config.output / "checkpoints")
    if newest:
        knowledge.recall(newest.identity)
    return knowledge


def _load_teachers(config: PretrainConfig) -> dict[str, Teacher]:
    configs = [config.teacher] if config.teacher else list(config.teachers.values())
    device = processes().device
    dtype = teacher_dtype(config.precision, device) if configs else torch.float32
    teachers = [load_teacher(teacher, device, dtype) for teacher in configs]
    return dict(zip(config.teachers or [teacher.name for teacher in teachers], teachers, strict=True))


def _fit_to(knowledge: Knowledge, config: PretrainConfig) -> PretrainConfig:
    """The config with the sizes that it leaves open: the batch by the images, the student by views and grid.

    Raises:
        ConfigError: the student is given another size than the views have.
    """
    was_auto = config.batch_size == "auto"
    config = settle_batch_size(config, len(knowledge.samples), config.mask.masks_per_sample)
    config = _settle_rate(config, was_auto)
    student, size = named_by_init(config.init, config.student), knowledge.views.image_size
    assert student is not None  # it has defaults
    if student.image_size not in (None, size):
        raise ConfigError(
            f"student.image_size={student.image_size}, but the views have {size} pixels: set student.image_size={size}"
        )
    student = student.model_copy(update={"image_size": size})
    grids = set(knowledge.grids.values())
    if student.patch_size is None and config.mimic.resize_targets is None and len(grids) == 1:
        patch = patch_for_grid(student.name, size, grids.pop())
        student = student.model_copy(update={"patch_size": patch})
        if patch and processes().is_main_process:
            log.info("student.patch_size=%d: with it the student has the teacher's grid", patch)
    return config.model_copy(update={"student": student})


def _settle_rate(config: PretrainConfig, was_auto: bool) -> PretrainConfig:
    """The config with the rate that small batches chosen by `auto` learn at.

    A run that goes on keeps its own: one from before has none, and one whose `auto` is given as a number by now has it.
    """
    assert config.batch_size != "auto"
    if config.optim.lr is not None or config.batch_size >= _BATCH:
        return config
    rate, recorded = config.optim.peak_lr(_BATCH), recorded_config(config.output)
    applies = (recorded.batch_size, recorded.optim.lr) == (config.batch_size, rate) if recorded else was_auto
    optim = config.optim.model_copy(update={"lr": rate if applies else None})
    return config.model_copy(update={"optim": optim})


def _check_summaries(config: PretrainConfig, knowledge: Knowledge) -> None:
    """The loss on class tokens needs those of every teacher."""
    weight, missing = config.mimic.summary_weight, knowledge.without_summary
    if not weight or not missing:
        return
    if isinstance(knowledge, CachedKnowledge):
        raise CacheError(
            f"cache {missing[0]} holds no class token, which mimic.summary_weight={weight} needs: extract into a new "
            "folder with cache.summary=true, or set mimic.summary_weight=0"
        )
    raise TeacherError(
        f"teacher {missing[0]} has no class token, which mimic.summary_weight={weight} needs: choose another teacher, "
        "or set mimic.summary_weight=0"
    )


def _build(config: PretrainConfig, knowledge: Knowledge) -> Student:
    torch.manual_seed(config.seed)
    goal = OBJECTIVES[config.mimic.objective]
    student = build_student(
        **config.student.model_dump(exclude_none=True),
        **config.mimic.model_dump(exclude_none=True, exclude={"resize_targets"}),
        teachers=knowledge.dims if goal.mimics else None,
        grid=next(iter(knowledge.grids.values())) if goal.mimics == "map" else None,
    )
    for name, (h, w) in knowledge.grids.items():
        if (h, w) != student.grid and config.mimic.resize_targets is None:
            raise CacheError(
                f"{'cache' if isinstance(knowledge, CachedKnowledge) else 'teacher'} {name} has a {h}x{w} grid, the "
                f"student's is {student.grid[0]}x{student.grid[1]}: choose student.image_size and patch_size, or the "
                "teacher's image_size, so that they agree, or set mimic.resize_targets=bilinear"
            )
    return student


def _give_statistics(config: PretrainConfig, knowledge: Knowledge, student: Student, goes_on: bool) -> None:
    """What the target norm asks for, and the dispersions that balance several teachers' summaries.

    The checkpoint of a run that goes on has the statistics of PHI-S and the dispersions.
    """
    target_norm, workers = config.mimic.target_norm, config.data.workers
    if len(student.summary) > 1 and not goes_on:
        for name, dispersion in knowledge.dispersions(workers).items():
            student.set_dispersion(name, dispersion)
    if not student.objective.mimics or student.objective.loss is not None or config.mimic.target == "codes":
        return
    if target_norm != "phi_s":
        for name, (mean, std) in knowledge.statistics(target_norm, workers).items():
            student.set_channel_stats(name, torch.from_numpy(mean), torch.from_numpy(std))
    elif not goes_on:
        for name, moments in knowledge.covariances(workers).items():
            student.set_covariance(name, *moments)


def _start_from(config: PretrainConfig, student: Student) -> str | None:
    """Load `init`, if there is one, and say what it is by its bytes; a run that goes on has recorded that."""
    if config.init is None:
        return None
    recorded = recorded_start(config.output, config.init)
    if recorded:
        return recorded.identity
    state, _ = read_init(config.init, student.spec["name"])
    load_weights(student, state, strict=False)
    return state_digest(state)


def _shown_first(order: EpochOrder, plan: StepPlan, start_step: int) -> NDArray[np.int64]:
    """The samples int64 [n] of the run's next step: their shards are fetched anyway."""
    epoch, step = divmod(start_step, plan.steps_per_epoch)
    return order.take(epoch, np.arange(plan.images_per_step) + step * plan.images_per_step)


def _evaluation(config: PretrainConfig, plan: StepPlan) -> Evaluation | None:
    if config.knn is None:
        return None
    assert config.student.image_size is not None  # `_fit_to` has set it
    measure, images = knn_callback(config.knn, config.student.image_size)
    every = max(1, round(config.knn.every * plan.steps_per_epoch))
    return Evaluation(measure, every, best="knn_top1", images=images)


def _identity(config: PretrainConfig, knowledge: Knowledge, student: Student, masks: MaskSampler) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on from."""
    samples = knowledge.samples
    return knowledge.identity() | {
        "stage": "pretrain",
        "order": config.order.model_dump(),
        "mask": config.mask.model_dump() | ({"disjoint": True} if masks.shares_a_draw else {}),
        "views": knowledge.views.model_dump(mode="json"),
        "student": student.spec,
        "teachers_in_order": list(knowledge.dims),  # the focus is the attention of the first one that has it
        # Repairing a cache may bring samples back, and then every epoch has another order.
        "samples": f"{len(samples)} ({xxhash.xxh3_64_hexdigest(samples.tobytes())})",
    }
