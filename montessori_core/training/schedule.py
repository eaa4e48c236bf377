"""When a training changes its learning rate (WSD; Appendix A and Table 4), and when it saves a checkpoint."""

from montessori_core.config import Schedule


def rate_factor(step: int, steps: int, schedule: Schedule) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`, as a share of the peak.

    The ramp's first step is not zero and its last is the peak, so that no step is wasted, however few there are; the
    decay's last step is the final rate.
    """
    ramp = round(schedule.warmup * steps)
    decay = round(schedule.decay * steps)
    if step < ramp:
        return (step + 1) / ramp
    remaining = steps - step  # 1 at the last step
    if remaining > decay:
        return 1.0
    return schedule.final + (1.0 - schedule.final) * (remaining - 1) / decay


CHECKPOINTS = 10  # evenly spread over a training
CHECKPOINT_SECONDS = 60.0  # after which one more is saved, unless saving takes long
