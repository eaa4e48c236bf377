"""Schedules of a training: learning rate (WSD; Appendix A and Table 4), and checkpoints."""

from montessori_core.config import Schedule


def rate_factor(step: int, steps: int, schedule: Schedule) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of `steps`, as a share of the peak.

    The ramp starts above zero and its last step has the peak rate, so no step is wasted even in short trainings. The last
    step of the decay has the final rate.
    """
    ramp = round(schedule.warmup * steps)
    decay = round(schedule.decay * steps)
    if step < ramp:
        return (step + 1) / ramp
    remaining = steps - step  # 1 at the last step
    if remaining > decay:
        return 1.0
    return schedule.final + (1.0 - schedule.final) * (remaining - 1) / decay


CHECKPOINT_SECONDS = 60.0  # between two checkpoints; more if saving takes long
