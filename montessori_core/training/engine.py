"""Common parts of SFT and DPO: DeepSpeed's configuration, TRL's arguments, progress, and saving a model."""

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from montessori_core.config import Optimization, Zero
from montessori_core.errors import UserError
from montessori_core.layout import COUNTS_FILE, KEPT, LOG_FILE
from montessori_core.models.adapters import is_adapter
from montessori_core.models.device import take_gpu
from montessori_core.models.fetch import fingerprint, full_model
from montessori_core.models.fingerprints import write_fingerprint
from montessori_core.models.rendering import end_tokens
from montessori_core.program import Report
from montessori_core.training.checkpoints import last_complete_checkpoint, remove_other_checkpoints
from montessori_core.training.masters import MastersCallback, gather_masters
from montessori_core.training.memory import BUCKET
from montessori_core.training.schedule import rate_factor

log = logging.getLogger(__name__)


def import_deepspeed() -> Any:
    """Import DeepSpeed for this machine's accelerator; return the module."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    return deepspeed


def start_processes() -> None:
    """Initialise the process group, before any model is created: ZeRO-3 partitions weights while loading them."""
    deepspeed = import_deepspeed()
    # On CPUs DeepSpeed compiles a kernel here under a lock file. If the process is killed, the file stays and blocks every
    # later training on the machine. Gloo does not need the kernel. DeepSpeed reads this table nowhere else, and makes it with
    # the compiler, if it is not set.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if torch.cuda.is_available():
        take_gpu()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)


def computes_in_bf16() -> bool:
    """Return whether forward and backward passes use bf16 copies of the weights; AdamW always updates fp32 masters."""
    return torch.cuda.is_available()


def deepspeed_config(zero: Zero) -> dict[str, Any]:
    """Return DeepSpeed's configuration; transformers fills in the "auto" values from the trainer's arguments."""
    # DeepSpeed (0.19) accumulates gradients of bf16 weights in fp32 only if it partitions the optimizer.
    stage = max(zero.stage, 1) if computes_in_bf16() else zero.stage
    overlap = torch.cuda.is_available()
    optimization: dict[str, Any] = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": BUCKET}
    if zero.offload != "none":
        optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if zero.offload == "all":
        optimization["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if zero.stage == 3:
        optimization["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": optimization,
        # AdamW is torch's, not DeepSpeed's kernel, so that influence can reproduce its step exactly.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": computes_in_bf16()},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def training_arguments(recipe: Optimization, zero: Zero, seed: int, checkpoints: Path) -> dict[str, Any]:
    """Return the common arguments of SFTConfig and DPOConfig."""
    processes = int(os.environ["WORLD_SIZE"])
    return {
        "output_dir": str(checkpoints),
        "deepspeed": deepspeed_config(zero),
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.batch_size // (recipe.micro_batch_size * processes),
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": computes_in_bf16(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": torch.cuda.is_available(),
        "dataloader_drop_last": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show the mean of earlier losses in place of NaN
        "save_strategy": "no",  # `CheckpointCallback` asks for checkpoints, and removes them
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        **({"ddp_backend": "gloo"} if processes > 1 and not torch.cuda.is_available() else {}),
    }


class PlainAdamW:
    """Mixin for trainers: torch's AdamW with one parameter group and the recipe's learning rate schedule."""

    recipe: Optimization
    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer, with one parameter group.

        Influence uses the same step for all weights, and DeepSpeed (0.19) gives access to the AdamW state of the first
        group only.
        """
        recipe = self.recipe
        if self.optimizer is None:
            model = model or self.model  # type: ignore[attr-defined]
            self.optimizer = torch.optim.AdamW(
                [parameter for parameter in model.parameters() if parameter.requires_grad],
                lr=recipe.learning_rate,
                betas=(recipe.beta1, recipe.beta2),
                eps=recipe.epsilon,
                weight_decay=recipe.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the scheduler for the trainer's number of steps."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer if optimizer is not None else self.create_optimizer(),
            lambda step: rate_factor(min(step, num_training_steps - 1), num_training_steps, self.recipe.schedule),
        )
        self.lr_scheduler = scheduler
        return scheduler


class ProgressCallback(TrainerCallback):
    """Report the number of examples done, as a fraction of the work of all epochs and of a forward pass before training.

    Args:
        report: reports the progress of the job.
        recipe: recipe of the training.
        read_before: examples of the forward pass before training, which costs a third of an epoch.
    """

    def __init__(self, report: Report, recipe: Optimization, read_before: int = 0) -> None:
        self._report, self._recipe, self._read_before = report, recipe, read_before
        self._read = 0
        self._read_share = 1 / (1 + 3 * recipe.epochs) if read_before else 0.0
        self._micro_batches = 0  # since the last step

    def on_read(self, examples: int) -> None:
        """Count examples that all processes have read in the forward pass before training."""
        self._read = min(self._read + examples, self._read_before)
        self._report(self._read * self._read_share)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)  # starts the clock: a training may have a single step

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batches += 1
        self._report_progress(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._micro_batches = 0
        self._report_progress(args, state)

    def _report_progress(self, args: TrainingArguments, state: TrainerState) -> None:
        steps = state.global_step + self._micro_batches / args.gradient_accumulation_steps
        trained = steps * self._recipe.batch_size / self._recipe.epochs
        self._report(self._read_before * self._read_share + trained * (1 - self._read_share))


class SingleProcessCallback(TrainerCallback):
    """Leave out DeepSpeed's reduction of gradients over processes where there is one: it would only copy them twice."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the engine, which the trainer has just made."""
        engine = self._trainer.model_wrapped
        if args.world_size == 1 and engine.zero_optimization_stage() == 0:
            engine.enable_backward_allreduce = False


class FiniteCallback(TrainerCallback):
    """End a training whose loss or gradient is not finite: its weights are lost, and a model of NaN would be saved."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the log of a step.

        Raises:
            UserError: a value is not finite.
        """
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise UserError(
                    f"the training diverged: {name} is {value} at step {state.global_step} of {state.max_steps}; lower its "
                    "learning_rate, set max_grad_norm, or look for extreme values in the model it starts from"
                )


class KeepCallback(TrainerCallback):
    """Save `count` intermediate models, evenly spread over the training's steps.

    They are in the checkpoint folder until the training ends, so a job that resumes from a checkpoint has the earlier ones.
    """

    def __init__(self, trainer: Any, tokenizer: PreTrainedTokenizerBase, count: int, checkpoints: Path) -> None:
        self._trainer, self._tokenizer, self._count = trainer, tokenizer, count
        self._folder = checkpoints / KEPT

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the model after the chosen steps, in all processes."""
        if state.global_step in {state.max_steps * part // (self._count + 1) for part in range(1, self._count + 1)}:
            _save_model(self._trainer, self._tokenizer, self._folder / f"step-{state.global_step:07d}")


class _PublishedGeneration(GenerationConfig):
    """A model's generation config that can be saved as it was published.

    transformers changes its padding token, and then refuses to save fields without effect, such as Vicuna's temperature
    without do_sample: at the first checkpoint, or at the end of the training.
    """

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Warn only."""
        super().validate(False, user_set_attributes)


def train(trainer: Any, model: Path, checkpoints: Path) -> None:
    """Train, or resume from the last complete checkpoint: with the same data order and the same result.

    Args:
        trainer: trainer with the loaded model.
        model: the folder of that model.
        checkpoints: checkpoint folder of this training.
    """
    trainer.model.generation_config.__class__ = _PublishedGeneration
    trainer.add_callback(FiniteCallback())
    trainer.add_callback(SingleProcessCallback(trainer))
    if trainer.is_world_process_zero():
        remove_other_checkpoints(checkpoints)
    checkpoint = last_complete_checkpoint(checkpoints)
    if checkpoint is None:
        trainer.add_callback(MastersCallback(trainer, model))
    else:
        log.info("resuming from %s", checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def save_trained(
    trainer: Any, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int], checkpoints: Path, folder: Path
) -> None:
    """Write fp32 masters, tokenizer, log, counts and intermediate models. All processes must call it; rank 0 writes."""
    _save_model(trainer, tokenizer, folder)
    if not trainer.is_world_process_zero():
        return
    (folder / LOG_FILE).write_text(json.dumps(_step_log(trainer.state), indent=1) + "\n")
    (folder / COUNTS_FILE).write_text(json.dumps(counts) + "\n")
    if (checkpoints / KEPT).exists():
        shutil.copytree(checkpoints / KEPT, folder / KEPT)


def _save_model(trainer: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    masters = gather_masters(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    # TRL keeps the adapter that DPO starts from as another one, named "ref".
    adapters = {"selected_adapters": ["default"]} if hasattr(trainer.model, "peft_config") else {}
    # The model was trained to end its turns as the chat template does.
    generation = trainer.model.generation_config
    ends = sorted(end_tokens(tokenizer, generation))
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    trainer.model.save_pretrained(folder, state_dict=masters, **adapters)
    config = folder / "config.json"
    if computes_in_bf16() and config.exists():  # it has the dtype of the bf16 copies
        content = json.loads(config.read_text()) | {"dtype": "float32"}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    write_fingerprint(folder, fingerprint(full_model(folder)) if is_adapter(folder) else None)


def _step_log(state: TrainerState) -> list[dict[str, float]]:
    """Return the trainer's log of each step, including steps before a restart."""
    numbers = [{k: float(v) for k, v in entry.items() if isinstance(v, int | float)} for entry in state.log_history]
    return [{"step": entry["step"], **entry} for entry in numbers if "loss" in entry]
