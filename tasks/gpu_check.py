"""Warn of idle GPUs and of trainings that do not fit them, before the first job. Works without torch, for the driver."""

import math
from contextlib import suppress
from pathlib import Path

from cluster.backends.local import gpus_of_this_machine
from montessori_core.config import Cluster, Experiment
from montessori_core.errors import UserError
from montessori_core.models.fingerprints import weight_shapes
from montessori_core.models.shape import GB, USABLE, Shape
from montessori_core.training.memory import plan_update

_GPU_MEMORY = 80 * GB
"""What is assumed of the nodes' GPUs, as by `montessori plan`; the configuration does not say it."""


def idle_gpus(cluster: Cluster) -> list[str]:
    """Return a warning if jobs run on a machine whose GPUs none of them uses, or influence does and evaluation does not."""
    influence, evaluation = cluster.resources.influence, cluster.resources.evaluation
    if influence.gpus_per_node and not evaluation.gpus_per_node:
        return [
            f"jobs of evaluation have no GPU and {evaluation.cpus_per_process} CPU cores, while those of influence have "
            "GPUs; set cluster.resources.evaluation.gpus_per_node: 1, unless the student is small"
        ]
    if cluster.profile != "local" or any(resources.gpus_per_node for _, resources in cluster.resources):
        return []
    with suppress(UserError):  # CUDA_VISIBLE_DEVICES names GPUs in a way that only jobs with GPUs must understand
        if count := len(gpus_of_this_machine()):
            return [
                f"this machine has {count} GPU{'s'[: count > 1]}, but jobs use none; add --cluster workstation, which gives "
                "each job one, or set gpus_per_node in cluster.resources"
            ]
    return []


def memory_warnings(experiment: Experiment, teacher: Path, student: Path) -> list[str]:
    """Return a warning for each training of all weights whose tensors, activations apart, fill more than a GPU.

    Args:
        experiment: the configuration.
        teacher, student: folders of the models.
    """
    zero, resources = experiment.zero, experiment.cluster.resources
    trainings = {
        "teacher_update": (teacher, resources.teacher_update, "teacher_update.lora", experiment.teacher_update.lora),
        "training": (student, resources.training, "student.lora", experiment.student.lora),
    }
    warnings = []
    for section, (model, jobs, setting, adapter) in trainings.items():
        if not jobs.gpus_per_node or adapter is not None or zero.offload == "all":
            continue
        sizes = [math.prod(shape) for shape in weight_shapes(model).values()]
        processes, stage = jobs.nodes * jobs.processes_per_node, max(zero.stage, 1)
        plan = plan_update(_without_layers(sum(sizes), max(sizes)), stage, processes, 0, None, zero.offload != "none")
        if plan.total > USABLE * _GPU_MEMORY:
            warnings.append(
                f"{section} needs more than {plan.total / GB:.0f} GB on each GPU (all weights, zero.stage: {zero.stage}, "
                f"zero.offload: {zero.offload}, processes: {processes}); if the GPUs have less, set zero.stage: 3 and "
                f"zero.offload: optimizer, or train an adapter ({setting})"
            )
    return warnings


def _without_layers(parameters: int, largest: int) -> Shape:
    """Return the shape of a model whose weights alone are known, for a plan without activations. All are trained."""
    return Shape(
        parameters=parameters,
        trained=parameters,
        largest=largest,
        **dict.fromkeys(("layers", "hidden", "intermediate", "vocabulary", "looked_up", "linear", "token_rows"), 0),
    )
