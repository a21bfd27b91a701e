"""What a run tells its user at its start and at its end."""

from pipeline.provenance import describe_device
from pipeline.steps import StepPlan
from pipeline.training.run import Run
from pipeline.training.task import B, Task

_FEW_IMAGES = 256  # a micro-batch on a GPU, below which launches bound a small student's step


def tell_start(run: Run, task: Task[B], plan: StepPlan, rates: str) -> None:
    """Device, precision, steps, learning rates and output, and a line in starts.jsonl.

    The time that the run will take is told after ten seconds of steps.
    """
    run.say(*describe_step(run, plan), rates, f"output: {run.folder} (metrics.jsonl, train.log, checkpoints/)")
    if run.start_step == plan.total_steps:
        run.say(
            f"this run is finished: all {plan.total_steps} steps were trained before. More epochs or max_steps train "
            "on, another output starts anew"
        )
    elif run.resumed:
        run.say(f"goes on from step {run.start_step}: {run.resumed.path}")
    if run.journal:
        run.journal.record_start(
            {
                "first_step": run.start_step,
                "total_steps": plan.total_steps,
                "batch_size": plan.batch_size,
                "precision": run.identity["precision"],
                "evaluated_images": task.evaluation.images if task.evaluation else None,
            }
        )


def tell_end(run: Run, task: Task[B], plan: StepPlan) -> None:
    """Where things lie, and what the user may do next."""
    newest = run.checkpoints / f"step-{plan.total_steps:08d}"
    best = f", the best by {task.evaluation.best} in {run.checkpoints / 'best'}" if task.evaluation else ""
    run.say(f"done: {plan.total_steps} steps. Weights in {newest}{best}; curves in {run.folder / 'metrics.jsonl'}")
    if task.next_commands:
        run.say("next, for instance:", *(f"    {line}" for line in task.next_commands))


def describe_step(run: Run, plan: StepPlan) -> list[str]:
    """What a step is, where it runs, and what would make it faster."""
    lines = [
        f"device: {describe_device(run.device)}; precision: {run.identity['precision']}"
        + (f"; weights and AdamW's state in {run.processes} shares (fsdp)" if run.sharded else ""),
        f"a step: {plan.processes} processes x {plan.accum_iter} micro-batches of {plan.micro_batch}, batch_size="
        f"{plan.batch_size}",
        f"an epoch: {plan.steps_per_epoch} steps of {plan.images_per_step} images; in all {plan.total_steps} steps",
    ]
    if run.device.type == "cuda" and not run.config.compile and plan.micro_batch < _FEW_IMAGES:
        lines.append(
            f"micro-batches of {plan.micro_batch} images may end sooner than their thousands of operations can be "
            "launched: compile=true fuses them (minutes at the start)"
        )
    return lines
