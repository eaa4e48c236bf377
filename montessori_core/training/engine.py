"""What SFT and DPO share: DeepSpeed's configuration, TRL's arguments, progress, and how a model is saved."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from montessori_core.config import Optimization, Zero
from montessori_core.layout import COUNTS_FILE, KEPT, LOG_FILE
from montessori_core.models.fingerprints import write_fingerprint
from montessori_core.program import Report
from montessori_core.training.checkpoints import evenly_spread, last_whole
from montessori_core.training.masters import MastersCallback, gather_masters
from montessori_core.training.schedule import rate_factor

log = logging.getLogger(__name__)


def start_processes() -> None:
    """Join the job's processes, before any model is made: ZeRO-3 partitions weights as they are loaded."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # On CPUs DeepSpeed compiles a kernel here, under a lock file that a killed process leaves behind: every later
    # training on the machine would wait for it for ever. Gloo does without the kernel.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)


def computes_in_bf16() -> bool:
    """Whether passes take bf16 copies of the weights; AdamW moves fp32 masters in any case."""
    return torch.cuda.is_available()


def deepspeed_config(zero: Zero) -> dict[str, Any]:
    """DeepSpeed's configuration from ours; sizes that depend on the recipe are filled in by transformers."""
    # DeepSpeed (0.19) accumulates the gradients of bf16 weights in fp32 only where it partitions the optimizer.
    stage = max(zero.stage, 1) if computes_in_bf16() else zero.stage
    optimization: dict[str, Any] = {"stage": stage, "overlap_comm": torch.cuda.is_available()}
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
        # AdamW comes from torch, not from DeepSpeed's kernels, so that influence can repeat its step exactly.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": computes_in_bf16()},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def training_arguments(recipe: Optimization, zero: Zero, seed: int, checkpoints: Path, examples: int) -> dict[str, Any]:
    """Arguments that SFTConfig and DPOConfig have in common."""
    processes = int(os.environ["WORLD_SIZE"])
    steps = recipe.epochs * -(-examples // recipe.batch_size)
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
        **evenly_spread(steps),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        **({"ddp_backend": "gloo"} if processes > 1 and not torch.cuda.is_available() else {}),
    }


class PlainAdamW:
    """Mixed into a trainer: torch's AdamW over all weights alike, its rate following the recipe's schedule."""

    recipe: Optimization
    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Called by the trainer.

        One parameter group: influence repeats the step for every weight alike, and DeepSpeed (0.19) links the AdamW
        state of the first group only, so that moments of further groups could not be read back.
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
        """Called by the trainer once it knows how many steps it will take."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer if optimizer is not None else self.create_optimizer(),
            lambda step: rate_factor(min(step, num_training_steps - 1), num_training_steps, self.recipe.schedule),
        )
        self.lr_scheduler = scheduler
        return scheduler


class ProgressCallback(TrainerCallback):
    """Report how many of the examples are done, in fractions: epochs and a pass before training count by their work.

    Args:
        report: of the job.
        recipe: of the training.
        read_before: examples that a forward pass before the training reads; it takes a third of an epoch's work.
    """

    def __init__(self, report: Report, recipe: Optimization, read_before: int = 0) -> None:
        self._report, self._recipe, self._read_before = report, recipe, read_before
        self._read = 0
        self._read_share = 1 / (1 + 3 * recipe.epochs) if read_before else 0.0
        self._micro_batches = 0  # since the last step

    def on_read(self, examples: int) -> None:
        """Count examples, of all processes, that the pass before the training has read."""
        self._read = min(self._read + examples, self._read_before)
        self._report(self._read * self._read_share)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)  # the clock starts here: a training may have a single step

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batches += 1
        self._tell(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._micro_batches = 0
        self._tell(args, state)

    def _tell(self, args: TrainingArguments, state: TrainerState) -> None:
        steps = state.global_step + self._micro_batches / args.gradient_accumulation_steps
        trained = steps * self._recipe.batch_size / self._recipe.epochs
        self._report(self._read_before * self._read_share + trained * (1 - self._read_share))


class KeepCallback(TrainerCallback):
    """Keeps models on the way, evenly spread over the training's steps.

    They lie among the checkpoints until the training ends: a job that goes on from a checkpoint finds those before it there.
    """

    def __init__(self, trainer: Any, tokenizer: PreTrainedTokenizerBase, count: int, checkpoints: Path) -> None:
        self._trainer, self._tokenizer, self._count = trainer, tokenizer, count
        self._folder = checkpoints / KEPT

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer, in all processes."""
        if state.global_step in {state.max_steps * part // (self._count + 1) for part in range(1, self._count + 1)}:
            _save_model(self._trainer, self._tokenizer, self._folder / f"step-{state.global_step:07d}")


def train(trainer: Any, model: Path, checkpoints: Path) -> None:
    """Train, from the last whole checkpoint if there is one: with the same data order, to the same end.

    Args:
        trainer: with the model in place.
        model: the folder the model was loaded from.
        checkpoints: of this training.
    """
    last = last_whole(checkpoints)
    if last is None:
        trainer.add_callback(MastersCallback(trainer, model))
    else:
        log.info("going on from %s", last.name)
    trainer.train(resume_from_checkpoint=str(last) if last else None)


def save_trained(
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    counts: dict[str, int],
    checkpoints: Path,
    folder: Path,
) -> None:
    """Write fp32 masters, tokenizer, log and counts. All processes must call it; rank 0 writes.

    Checkpoints are of no use any more, and removed.
    """
    _save_model(trainer, tokenizer, folder)
    if not trainer.is_world_process_zero():
        return
    (folder / LOG_FILE).write_text(json.dumps(_log_of(trainer.state), indent=1) + "\n")
    (folder / COUNTS_FILE).write_text(json.dumps(counts) + "\n")
    if (checkpoints / KEPT).exists():
        shutil.copytree(checkpoints / KEPT, folder / KEPT)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _save_model(trainer: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    masters = gather_masters(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    trainer.model.save_pretrained(folder, state_dict=masters)
    config = folder / "config.json"
    if computes_in_bf16() and config.exists():  # it names the number type of the copies
        content = json.loads(config.read_text()) | {"dtype": "float32"}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    write_fingerprint(folder)


def _log_of(state: TrainerState) -> list[dict[str, float]]:
    """What the trainer logged at each step, those before a restart included."""
    numbers = [{k: float(v) for k, v in entry.items() if isinstance(v, int | float)} for entry in state.log_history]
    return [{"step": entry["step"], **entry} for entry in numbers if "loss" in entry]
