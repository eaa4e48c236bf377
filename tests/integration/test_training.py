"""Training with TRL and DeepSpeed equals plain torch at any ZeRO stage and number of processes."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    MixtralConfig,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from cluster.fanout import ShardsFailed
from cluster.stage import RowClock
from montessori_core import programs
from montessori_core.config import Lora, Schedule, TeacherUpdate, Warmup, Zero
from montessori_core.errors import DataError, UserError
from montessori_core.files import read_json
from montessori_core.influence.adamw import AdamW
from montessori_core.influence.student import ResidentStudent
from montessori_core.layout import COUNTS_FILE, LOG_FILE
from montessori_core.models.chat import encode_example
from montessori_core.models.control_tokens import hash_vocabulary
from montessori_core.models.fetch import fingerprint
from montessori_core.models.fingerprints import moments_rate, moments_recipe
from montessori_core.models.load import load_model, load_tokenizer, with_lora
from montessori_core.program import Program, Row, SettingsT
from montessori_core.training.dpo import encode_pair
from montessori_core.training.engine import FiniteCallback, ProgressCallback
from montessori_core.training.moments import Moments, load_moments, weights_checksums
from montessori_core.training.schedule import rate_factor
from support import ROOT, killed_jobs
from support.killed_jobs import kill_jobs_once
from support.preference_pairs import PAIRS
from support.row_programs import logged, run_in_job
from tasks.run import Model
from tasks.teachers import kept_teachers

ROWS: list[Row] = [
    {
        "instruction": f"Describe object number {i} in a few words.",
        "response": f"Object {i} is " + "round and heavy " * (i % 3 + 1),
        "response_finished": i != 3,
    }
    for i in range(8)
]
BF16_SFT = replace(programs.SFT, entry="support.bf16:open_sft")
"""The same with bf16 copies of the weights in forward and backward passes."""
RECIPE = Warmup(learning_rate=1e-3, batch_size=4, micro_batch_size=2, weight_decay=0.01, max_grad_norm=0.5)


@pytest.fixture(scope="module", autouse=True)
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of torch's compiled extensions, with the lock of a killed compilation.

    All jobs of this file have the same environment, so one warm process starts them.
    """
    folder = tmp_path_factory.mktemp("extensions")
    (folder / "deepspeed_shm_comm").mkdir()
    (folder / "deepspeed_shm_comm" / "lock").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield folder


def test_single_step_training_reports_pace(tmp_path: Path) -> None:
    """Otherwise its forecast would count loading and saving as work on rows."""
    clock = RowClock(tmp_path / "progress.json")
    progress, arguments, state = ProgressCallback(clock, RECIPE), TrainingArguments(str(tmp_path)), TrainerState()
    began = time.monotonic()
    progress.on_train_begin(arguments, state, TrainerControl())
    time.sleep(0.1)
    state.global_step = 1
    progress.on_step_end(arguments, state, TrainerControl())
    assert clock.row_seconds is not None
    assert 0.099 <= clock.row_seconds * RECIPE.batch_size <= time.monotonic() - began


@pytest.mark.parametrize("logs", [{"loss": math.nan}, {"loss": 1.0, "grad_norm": math.inf}])
def test_diverged_training_ends(logs: dict[str, float], tmp_path: Path) -> None:
    arguments, state = TrainingArguments(output_dir=str(tmp_path)), TrainerState(global_step=3, max_steps=9)
    FiniteCallback().on_log(arguments, state, TrainerControl(), {"loss": 1.0, "grad_norm": 2.0, "epoch": 1.0})
    with pytest.raises(UserError, match=r"the training diverged: .* at step 3 of 9; lower its learning_rate"):
        FiniteCallback().on_log(arguments, state, TrainerControl(), logs)


@pytest.mark.slow
def test_training_of_damaged_model_fails(tiny_llama: Path, tmp_path: Path) -> None:
    """transformers would log the mean of earlier losses in place of NaN, and save a model of NaN."""
    damaged = Path(shutil.copytree(tiny_llama, tmp_path / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    (damaged / "fingerprint.json").unlink(missing_ok=True)
    with pytest.raises(ShardsFailed, match="the training diverged: loss is nan at step 1 of"):
        sft(tmp_path / "stage", damaged, 0, 1)


def test_progress_counts_pass_before_training(tmp_path: Path) -> None:
    """Reading 4 examples is 1/7 of the work: two epochs of training follow, at three times the cost."""
    reported: list[float] = []
    recipe = RECIPE.model_copy(update={"epochs": 2})
    progress, arguments, state = (
        ProgressCallback(reported.append, recipe, read_before=4),
        TrainingArguments(str(tmp_path)),
        TrainerState(),
    )
    for _ in range(3):
        progress.on_read(2)  # processes read some examples twice to fill the last batch
    progress.on_train_begin(arguments, state, TrainerControl())
    for state.global_step in (1, 2):
        progress.on_step_end(arguments, state, TrainerControl())
    assert reported == pytest.approx([2 / 7, 4 / 7, 4 / 7, 4 / 7, 16 / 7, 4])


def execute(
    folder: Path, program: Program[SettingsT], settings: SettingsT, model: Path, rows: list[Row], processes: int
) -> Path:
    inputs = {"student": model, "teacher": model}
    return run_in_job(folder, program, settings, inputs, rows, processes, cpus=max(1, 2 // processes))


def sft(
    folder: Path,
    model: Path,
    stage: int,
    processes: int,
    rows: list[Row] = ROWS,
    offload: str = "none",
    recipe: Warmup = RECIPE,
    program: Program[programs.Sft] = programs.SFT,
) -> Path:
    zero = Zero(stage=stage, offload=offload)
    settings = programs.Sft(max_length=128, lora=None, recipe=recipe.shared(), zero=zero, seed=0, save_moments=True)
    return execute(folder, program, settings, model, rows, processes)


@pytest.mark.slow
def test_training_stops_at_its_response_tokens(tmp_path: Path, tiny_llama: Path) -> None:
    def trained(name: str, rows: list[Row], response_tokens: int | None) -> Path:
        recipe = RECIPE.model_copy(update={"batch_size": 2}).shared()
        settings = programs.Sft(
            max_length=128,
            lora=None,
            recipe=recipe,
            zero=Zero(stage=0),
            seed=0,
            save_moments=False,
            response_tokens=response_tokens,
        )
        return execute(tmp_path / name, programs.SFT, settings, tiny_llama, rows, 1)

    first = trained("first", ROWS[:3], None)
    tokens = read_json(first / COUNTS_FILE)["response_tokens"]
    within = trained("within", ROWS, tokens)
    counts = read_json(within / COUNTS_FILE)
    assert (counts["examples"], counts["response_tokens"], counts["left_out"]) == (3, tokens, 0)
    assert counts["beyond_response_tokens"] == len(ROWS) - 3
    below = read_json(trained("below", ROWS, tokens - 1) / COUNTS_FILE)
    assert below["examples"] == 2
    assert counts["response_tokens_of_first_batch"] == below["response_tokens"] < tokens
    assert (within / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    for count in (2, 1):  # examples in the first batch, which may be all there are
        with pytest.raises(ShardsFailed, match=f"response_tokens is 2, but the first batch of {count} examples has"):
            trained(f"few-{count}", ROWS[:count], 2)


def dpo(recipe: TeacherUpdate, stage: int, **settings: int) -> programs.Dpo:
    return programs.Dpo(prompt_style="completion", recipe=recipe, zero=Zero(stage=stage), seed=0, **settings)


def plain_torch(
    model: Path, rate: float = 1e-3, copies: torch.dtype = torch.float32, rows: list[Row] = ROWS
) -> tuple[dict[str, torch.Tensor], Moments, list[float]]:
    """Train with a plain loop: token mean over the batch, clipping, AdamW, linear ramp.

    Passes use `copies` of the weights; gradients are accumulated, and weights updated, in fp32.
    """
    tokenizer = load_tokenizer(str(model))
    encoded = [encode_example(tokenizer, r["instruction"], r["response"], 128, r["response_finished"]) for r in rows]
    order = sampled_order(len(encoded))
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    copy = AutoModelForCausalLM.from_pretrained(model, dtype=copies).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01, foreach=False)
    losses = []
    for step in range(2):
        batch = [encoded[i] for i in order[4 * step : 4 * step + 4]]
        tokens = sum(example.response_tokens for example in batch)
        copy.load_state_dict(net.state_dict())
        losses.append(0.0)
        for example in batch:
            out = copy(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels]))
            loss = out.loss * example.response_tokens / tokens
            loss.backward()
            losses[-1] += float(loss.detach())
            for master, copied in zip(net.parameters(), copy.parameters(), strict=True):
                gradient = copied.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                copied.grad = None
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate * (step + 1) / 2
        optimizer.step()
        optimizer.zero_grad()
    first = {name: optimizer.state[p]["exp_avg"] for name, p in net.named_parameters()}
    second = {name: optimizer.state[p]["exp_avg_sq"] for name, p in net.named_parameters()}
    return {name: p.detach() for name, p in net.named_parameters()}, Moments(first, second, 2), losses


def sampled_order(count: int) -> list[int]:
    """Return the order of the data in the first epoch of the trainer's seeded sampler."""
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(count), data_seed=0)
    return list(sampler)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> tuple[dict[str, torch.Tensor], Moments, list[float]]:
    return plain_torch(tiny_llama)


@pytest.mark.parametrize(
    ("stage", "processes", "offload"),
    [
        (0, 1, "none"),
        (3, 2, "all"),
        pytest.param(2, 2, "none", marks=pytest.mark.slow),
        pytest.param(1, 1, "none", marks=pytest.mark.slow),
        pytest.param(3, 1, "none", marks=pytest.mark.slow),
        pytest.param(3, 2, "none", marks=pytest.mark.slow),
        pytest.param(3, 2, "optimizer", marks=pytest.mark.slow),
        pytest.param(2, 1, "optimizer", marks=pytest.mark.slow),
    ],
)
def test_training_equals_torch_at_every_zero_stage(
    tiny_llama: Path, expected: Any, tmp_path: Path, stage: int, processes: int, offload: str
) -> None:
    weights, moments, losses = expected
    part = sft(tmp_path / "stage", tiny_llama, stage, processes, offload=offload)
    trained, kept = load_file(part / "model.safetensors"), load_moments(part)
    start = load_file(tiny_llama / "model.safetensors")
    log = json.loads((part / LOG_FILE).read_text())
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-4)
    assert [entry["learning_rate"] for entry in log] == pytest.approx([5e-4, 1e-3])
    assert kept.step == 2
    assert moments_recipe(part) == {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01}
    assert moments_rate(part) == 1e-3
    assert kept.weights == weights_checksums(load_model(str(part), torch.float32).named_parameters())
    for name, weight in weights.items():
        moved = (weight - start[name]).abs().max()
        assert (trained[name] - weight).abs().max() <= 1e-3 * moved, name
        torch.testing.assert_close(kept.first[name], moments.first[name], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(kept.second[name], moments.second[name], rtol=1e-3, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_larger_than_bucket_are_reduced(tiny_llama: Path, expected: Any, tmp_path: Path, stage: int) -> None:
    program = replace(programs.SFT, entry="support.zero:open_sft_in_small_buckets")
    part = sft(tmp_path / "stage", tiny_llama, stage, 2, program=program)
    first = load_moments(part).first
    for name, moment in expected[1].first.items():
        torch.testing.assert_close(first[name], moment, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("processes", "count"),
    [(2, 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 5), (1, 7), (2, 7)))],
)
def test_last_step_counts_each_example_once(tiny_llama: Path, tmp_path: Path, count: int, processes: int) -> None:
    """It has one or three examples: one of two processes has no example, or less than its micro-batch."""
    weights, moments, losses = plain_torch(tiny_llama, rows=ROWS[:count])
    part = sft(tmp_path / "stage", tiny_llama, 2, processes, ROWS[:count])
    kept = load_moments(part)
    assert logged(part, "loss") == pytest.approx(losses, rel=1e-4)
    for name in weights:
        torch.testing.assert_close(kept.first[name], moments.first[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("stage", "processes"), [(0, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1), (3, 2)))]
)
def test_bf16_training_saves_fp32_masters(tiny_llama: Path, tmp_path: Path, stage: int, processes: int) -> None:
    """At the paper's learning rate the masters change by less than half a bf16 step, so bf16 weights would not change.

    The model starts from weights that bf16 cannot represent. Weights and moments must agree to a hundredth of their change:
    bf16 passes round differently.
    """
    recipe = RECIPE.model_copy(update={"learning_rate": 5e-6})
    part = sft(tmp_path / "stage", tiny_llama, stage, processes, recipe=recipe, program=BF16_SFT)
    trained, kept = load_file(part / "model.safetensors"), load_moments(part)
    start = load_file(tiny_llama / "model.safetensors")
    weights, moments, _ = plain_torch(tiny_llama, 5e-6, torch.bfloat16)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert json.loads((part / "config.json").read_text())["dtype"] == "float32"
    off = sum(float((trained[name] - weight).square().sum()) for name, weight in weights.items())
    moved = sum(float((weight - start[name]).square().sum()) for name, weight in weights.items())
    assert off**0.5 <= 0.01 * moved**0.5
    for name, first in moments.first.items():
        assert (kept.first[name] - first).norm() <= 0.01 * first.norm(), name
    assert kept.weights == weights_checksums(load_model(str(part), torch.float32).named_parameters())


@pytest.mark.slow
def test_bf16_training_accumulates_gradients_in_fp32(tiny_llama: Path, tmp_path: Path) -> None:
    """A bf16 sum of equal terms stops growing at 256 terms."""

    def gradient(copies: int) -> torch.Tensor:
        recipe = Warmup(batch_size=copies, micro_batch_size=1, max_grad_norm=0.0)
        part = sft(tmp_path / str(copies), tiny_llama, 0, 1, ROWS[:1] * copies, recipe=recipe, program=BF16_SFT)
        return load_moments(part).first["model.layers.0.mlp.up_proj.weight"]

    one = gradient(1)
    assert (gradient(512) - one).norm() <= 0.01 * one.norm()


@pytest.mark.slow
def test_influence_accepts_moments_of_bf16_training(tiny_llama: Path, tmp_path: Path) -> None:
    """It accepts the fp32 masters and their bf16 copies, but not fp32 weights rounded to bf16."""
    recipe = RECIPE.model_copy(update={"learning_rate": 5e-6})
    part = sft(tmp_path / "stage", tiny_llama, 0, 1, recipe=recipe, program=BF16_SFT)
    adamw = AdamW(5e-6, 0.9, 0.999, 1e-8, 0.01, 3)
    for dtype in (torch.float32, torch.bfloat16):
        ResidentStudent(load_model(str(part), dtype), load_moments(part), adamw, torch.device("cpu"))
    rounded = load_model(str(part), torch.bfloat16).float()
    with pytest.raises(DataError, match="saved with other weights"):
        ResidentStudent(rounded, load_moments(part), adamw, torch.device("cpu"))


@pytest.mark.slow
def test_bf16_dpo_updates_fp32_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """Each changes by at most 3.2 learning rates per step (AdamW's bound), much less than by rounding to bf16."""
    settings = dpo(TeacherUpdate(batch_size=2, micro_batch_size=1), stage=2)
    program = replace(programs.DPO, entry="support.bf16:open_dpo")
    part = execute(tmp_path / "stage", program, settings, tiny_llama, PAIRS, 1)
    trained, start = load_file(part / "model.safetensors"), load_file(tiny_llama / "model.safetensors")
    moved = max(float((trained[name] - weight).abs().max()) for name, weight in start.items())
    rounded = max(float((weight - weight.bfloat16()).abs().max()) for weight in start.values())
    steps = len(logged(part, "loss"))
    assert 0 < moved <= 3.2e-6 * steps < rounded / 2


def _write_renamed(folder: Path, tiny_llama: Path) -> Path:
    """Write a mixture of experts: files have the weights of each expert, the model has one tensor."""
    tokenizer = load_tokenizer(str(tiny_llama))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=2, **sizes, **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder / "model.safetensors"


def _write_float16(folder: Path, tiny_llama: Path) -> Path:
    load_model(str(tiny_llama), torch.float16).save_pretrained(folder)
    load_tokenizer(str(tiny_llama)).save_pretrained(folder)
    return folder / "model.safetensors"


def _write_adapter(folder: Path, tiny_llama: Path) -> Path:
    model = with_lora(load_model(str(tiny_llama), torch.float32), Lora(rank=4, alpha=8))
    model.save_pretrained(folder)
    load_tokenizer(str(tiny_llama)).save_pretrained(folder)
    return folder / "adapter_model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "stage", "processes"),
    [
        (_write_renamed, 0, 1),
        (_write_float16, 0, 1),
        (_write_adapter, 0, 1),
        (_write_renamed, 3, 2),
    ],
)
def test_bf16_training_starts_from_unrounded_weights(
    tiny_llama: Path,
    tmp_path: Path,
    write: Callable[[Path, Path], Path],
    stage: int,
    processes: int,
) -> None:
    """For any names and dtype, each changes by at most 3.2 learning rates per step (AdamW's bound)."""
    torch.manual_seed(0)
    file = write(tmp_path / "start", tiny_llama)
    recipe = RECIPE.model_copy(update={"learning_rate": 5e-6, "weight_decay": 0.0})
    part = sft(tmp_path / "stage", file.parent, stage, processes, recipe=recipe, program=BF16_SFT)
    trained = load_file(part / file.name)
    start = {name: weight.float() for name, weight in load_file(file).items()}
    assert trained.keys() == start.keys()
    moved = max(float((trained[name] - weight).abs().max()) for name, weight in start.items())
    rounded = max(float((weight - weight.bfloat16()).abs().max()) for weight in start.values())
    assert 0 < moved <= 3.2 * 5e-6 * 2 < rounded / 2


@pytest.mark.guarantee("training job killed between two steps")
@pytest.mark.parametrize(("stage", "processes"), [(0, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_killed_training_resumes_to_same_weights(tiny_llama: Path, tmp_path: Path, stage: int, processes: int) -> None:
    kill_and_compare(tmp_path, tiny_llama, stage, processes, killed_jobs.SFT, programs.SFT)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (2, 1), (3, 2)])
def test_killed_bf16_training_resumes_from_masters(
    tiny_llama: Path, tmp_path: Path, stage: int, processes: int
) -> None:
    kill_and_compare(tmp_path, tiny_llama, stage, processes, killed_jobs.BF16_SFT, BF16_SFT)


def kill_and_compare(
    tmp_path: Path,
    tiny_llama: Path,
    stage: int,
    processes: int,
    program: Program[programs.Sft],
    undisturbed_program: Program[programs.Sft],
) -> None:
    """Train with and without a kill -9 after ten steps; compare weights, moments and log."""
    rows = [row | {"instruction": f"{row['instruction']} ({n})"} for n in range(20) for row in ROWS]
    undisturbed = sft(tmp_path / "undisturbed", tiny_llama, stage, processes, rows, program=undisturbed_program)
    watcher = kill_jobs_once(tmp_path / "killed", beyond=10)
    part = sft(tmp_path / "killed", tiny_llama, stage, processes, rows, program=program)
    watcher.join()
    logs = "".join(path.read_text() for path in (tmp_path / "killed" / "jobs").rglob("*_log.err"))
    assert "resuming from checkpoint-" in logs
    assert (part / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert (part / "adamw.safetensors").read_bytes() == (undisturbed / "adamw.safetensors").read_bytes()
    told, expected = (json.loads((folder / LOG_FILE).read_text()) for folder in (part, undisturbed))
    assert [(entry["step"], entry["loss"]) for entry in told] == [(entry["step"], entry["loss"]) for entry in expected]
    assert len(told) == 40
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.slow
def test_training_killed_before_commit_repeats_last_step(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [row | {"instruction": f"{row['instruction']} ({n})"} for n in range(10) for row in ROWS]
    undisturbed = sft(tmp_path / "undisturbed", tiny_llama, 2, 1, rows)
    part = sft(tmp_path / "killed", tiny_llama, 2, 1, rows, program=killed_jobs.DYING_SFT)
    logs = "".join(path.read_text() for path in (tmp_path / "killed" / "jobs").rglob("*_log.err"))
    assert "resuming from checkpoint-19" in logs
    for name in ("model.safetensors", "adamw.safetensors"):
        assert (part / name).read_bytes() == (undisturbed / name).read_bytes()
    assert logged(part, "step") == list(range(1, 21))
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a training that several tests look at."""
    return sft(tmp_path_factory.mktemp("trained"), tiny_llama, 0, 1)


def test_repeated_training_has_same_bytes(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    parts = [trained, sft(tmp_path / "again", tiny_llama, 0, 1)]
    for name in ("model.safetensors", "adamw.safetensors"):
        assert (parts[0] / name).read_bytes() == (parts[1] / name).read_bytes()


def test_trained_model_names_the_end_of_its_turns(tiny_llama: Path, tmp_path: Path) -> None:
    """Training taught it to end turns with the template's token, here not the tokenizer's (ChatML over end of text)."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    content = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(str(model))
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")}
    assert tokenizer.eos_token == "<|endoftext|>"
    part = sft(tmp_path / "stage", model, 0, 1)
    assert set(json.loads((part / "generation_config.json").read_text())["eos_token_id"]) == ends


def test_training_keeps_sampling_of_generation_config(tiny_llama: Path, tmp_path: Path) -> None:
    """Vicuna and the first Llama 2 have a temperature without do_sample."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    sampling = {"temperature": 0.9, "top_p": 0.6}
    (model / "generation_config.json").write_text(json.dumps(sampling | {"pad_token_id": 0, "eos_token_id": 2}))
    (model / "fingerprint.json").unlink(missing_ok=True)
    part = sft(tmp_path / "stage", model, 0, 1, program=killed_jobs.SFT)  # with checkpoints
    saved = json.loads((part / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in ("temperature", "top_p", "do_sample")} == sampling | {"do_sample": None}


@pytest.mark.parametrize(
    ("stage", "processes", "program"),
    [
        (0, 1, programs.SFT),
        pytest.param(2, 1, BF16_SFT, marks=pytest.mark.slow),
        pytest.param(3, 2, programs.SFT, marks=pytest.mark.slow),
        pytest.param(3, 2, BF16_SFT, marks=pytest.mark.slow),
    ],
)
def test_trained_model_keeps_frozen_parameters(
    tiny_llama: Path, tmp_path: Path, stage: int, processes: int, program: Program[programs.Sft]
) -> None:
    """Ernie 4.5 keeps the routing bias of its experts as a parameter that is not trained."""
    tokenizer, ends = load_tokenizer(str(tiny_llama)), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1}
    config = Ernie4_5_MoeConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **experts, **ends)
    model = AutoModelForCausalLM.from_config(config)
    biases = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for bias in biases.values():
        bias.copy_(torch.arange(1, bias.numel() + 1).reshape(bias.shape) / 10)  # bf16 would round them
    model.save_pretrained(tmp_path / "ernie")
    tokenizer.save_pretrained(tmp_path / "ernie")
    part = sft(tmp_path / "stage", tmp_path / "ernie", stage, processes, program=program)
    parameters = dict(load_model(str(part), torch.float32).named_parameters())
    assert {name for name, p in parameters.items() if not p.requires_grad} == biases.keys() != set()
    assert load_moments(part).first.keys() == parameters.keys() - biases.keys()
    assert all(torch.equal(parameters[name], bias) for name, bias in biases.items())


def test_stale_compilation_lock_blocks_no_training(trained: Path, extensions: Path) -> None:
    assert trained.is_dir()
    lock = extensions / "deepspeed_shm_comm" / "lock"
    assert [path for path in extensions.rglob("*") if path.is_file()] == [lock]  # nothing was compiled


@pytest.mark.guarantee("pickles planted by other accounts")
def test_result_of_training_has_no_pickle(trained: Path) -> None:
    assert {path.suffix for path in trained.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_training_without_usable_examples_fails(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "word " * 200, "response": "late", "response_finished": True}]
    with pytest.raises(ShardsFailed, match="no training example has a response within student.max_length"):
        sft(tmp_path / "stage", tiny_llama, 0, 1, rows)


@pytest.mark.parametrize(("stage", "processes"), [(0, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_teacher_update_raises_chosen_likelihood(tiny_llama: Path, tmp_path: Path, stage: int, processes: int) -> None:
    schedule = Schedule(warmup=0.0, stable=1.0, decay=0.0)
    recipe = TeacherUpdate(learning_rate=1e-3, batch_size=2, micro_batch_size=1, schedule=schedule)
    part = execute(tmp_path / "stage", programs.DPO, dpo(recipe, stage), tiny_llama, PAIRS, processes)
    log = json.loads((part / LOG_FILE).read_text())
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are initially equal (Eq. 4)
    assert log[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-3)
    assert log[-1]["rewards/margins"] > 0.05
    assert log[-1]["loss"] < 0.67


@pytest.mark.slow
def test_multi_process_dpo_equals_single_process(tiny_llama: Path, tmp_path: Path) -> None:
    """ZeRO-2 and ZeRO-3 in two processes agree to a thousandth of the weights' change."""

    def update(stage: int, processes: int) -> dict[str, torch.Tensor]:
        settings = dpo(TeacherUpdate(learning_rate=1e-3, batch_size=4, micro_batch_size=1), stage)
        part = execute(tmp_path / f"zero-{stage}", programs.DPO, settings, tiny_llama, PAIRS, processes)
        weights: dict[str, torch.Tensor] = load_file(part / "model.safetensors")
        return weights

    start, alone = load_file(tiny_llama / "model.safetensors"), update(0, 1)
    for stage in (2, 3):
        together = update(stage, 2)
        for name in start:
            weight = alone[name]
            moved = (weight - start[name]).abs().max()
            assert moved > 0
            assert (together[name] - weight).abs().max() <= 1e-3 * moved, (stage, name)


@pytest.mark.parametrize(
    "loss",
    [{}, pytest.param({"loss": "ipo", "sft_weight": 0.5}, marks=pytest.mark.slow)],
    ids=["sigmoid", "ipo and sft"],
)
def test_last_step_counts_each_pair_once(tiny_llama: Path, tmp_path: Path, loss: dict[str, Any]) -> None:
    """It has one pair: in micro-batches of one, or as one row of four in two processes."""

    def update(processes: int, micro_batch: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        recipe = TeacherUpdate(learning_rate=1e-3, batch_size=4, micro_batch_size=micro_batch, **loss)
        part = execute(tmp_path / str(processes), programs.DPO, dpo(recipe, 2), tiny_llama, PAIRS[:5], processes)
        return load_file(part / "model.safetensors"), json.loads((part / LOG_FILE).read_text())

    start, (alone, expected), (together, log) = load_file(tiny_llama / "model.safetensors"), update(1, 1), update(2, 2)
    assert len(log) == 2
    for name in ("loss", *(name for name in log[0] if name.startswith(("rewards/", "logps/")))):
        assert [one[name] for one in log] == pytest.approx([one[name] for one in expected], rel=1e-3, abs=1e-5)
    for name, weight in alone.items():
        assert (together[name] - weight).abs().max() <= 1e-3 * (weight - start[name]).abs().max(), name


def test_zero_3_partitions_teacher_while_loading(tiny_llama: Path, tmp_path: Path) -> None:
    """Otherwise each process holds all weights in fp32 before the training starts."""
    program = replace(programs.DPO, entry="support.zero:open_dpo")
    settings = dpo(TeacherUpdate(batch_size=2, micro_batch_size=1), 3)
    execute(tmp_path / "stage", program, settings, tiny_llama, PAIRS[:2], 1)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_zero_3_fails_if_one_rank_cannot_pack_pairs(tiny_llama: Path, tmp_path: Path) -> None:
    """The other rank waits for it in ZeRO-3's all-gather, and would wait for ever if it went on."""
    program = replace(programs.DPO, entry="support.zero:open_dpo_with_failing_rank")
    settings = dpo(TeacherUpdate(batch_size=2, micro_batch_size=1), 3)
    with pytest.raises(ShardsFailed, match="rank 1 alone"):
        execute(tmp_path / "stage", program, settings, tiny_llama, PAIRS[:2], 2)


@pytest.mark.slow
def test_zero_3_partitions_student_while_loading(tiny_llama: Path, tmp_path: Path) -> None:
    program = replace(programs.SFT, entry="support.zero:open_sft")
    sft(tmp_path / "stage", tiny_llama, 3, 1, program=program)


def _write_full(folder: Path, tiny_llama: Path) -> Path:
    shutil.copytree(tiny_llama, folder)
    return folder / "model.safetensors"


@pytest.mark.guarantee("training job killed between two steps")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "lora"),
    [
        (_write_full, None),
        (_write_full, Lora(rank=4, alpha=8)),
        (_write_adapter, Lora(rank=4, alpha=8)),
    ],
    ids=["all weights", "new adapter", "last teacher's adapter"],
)
def test_killed_teacher_update_resumes_to_same_weights(
    tiny_llama: Path, tmp_path: Path, write: Callable[[Path, Path], Path], lora: Lora | None
) -> None:
    """With and without intermediate teachers; those from before the kill are kept."""
    start = write(tmp_path / "start", tiny_llama).parent
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    recipe = TeacherUpdate(learning_rate=1e-3, batch_size=1, micro_batch_size=1, lora=lora)
    pairs = [pair | {"chosen": f"{n} {pair['chosen']}"} for n in range(5) for pair in PAIRS]

    def update(folder: Path, program: Program[programs.Dpo], **keep: int) -> Path:
        return execute(folder, program, dpo(recipe, 2, **keep), start, pairs, 1)

    undisturbed = update(tmp_path / "undisturbed", programs.DPO)
    watcher = kill_jobs_once(tmp_path / "killed", beyond=10)
    part = update(tmp_path / "killed", killed_jobs.DPO, keep=3)
    watcher.join()
    logs = "".join(path.read_text() for path in (tmp_path / "killed" / "jobs").rglob("*_log.err"))
    assert "resuming from checkpoint-" in logs
    assert (part / weights).read_bytes() == (undisturbed / weights).read_bytes()
    kept = kept_teachers(Model.of(part))
    assert list(kept) == [10, 20, 30]
    assert len({teacher.sha256 for teacher in kept.values()} | {fingerprint(part), fingerprint(start)}) == 5
    assert [path.name for path in (tmp_path / "undisturbed").rglob("kept")] == []


def test_pair_has_token_ids_of_generation(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    pair = encode_pair(tokenizer, PAIRS[0], "completion")
    assert tokenizer.decode(pair["prompt_ids"]) == PAIRS[0]["prompt"]
    assert tokenizer.decode(pair["chosen_ids"]) == PAIRS[0]["chosen"]
    chat = encode_pair(tokenizer, PAIRS[0], "chat")
    assert chat["chosen_ids"] == [*pair["chosen_ids"], tokenizer.eos_token_id]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "Name"]  # not the tokenizer's segmentation
    drawn = PAIRS[0] | {"chosen_output_ids": letters, "chosen_vocabulary": hash_vocabulary(tokenizer)}
    assert encode_pair(tokenizer, drawn, "chat") == chat | {"chosen_ids": letters}
    assert encode_pair(tokenizer, drawn | {"chosen_vocabulary": "another"}, "chat") == chat


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 100, 313])
def test_schedule_ramps_holds_and_decays(steps: int) -> None:
    rates = [rate_factor(step, steps, Schedule()) for step in range(steps)]
    assert max(rates) == 1.0 or steps == 1
    assert min(rates) > 0
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if steps >= 10:
        assert rates[0] == pytest.approx(1 / round(0.1 * steps))
        assert rates[-1] == pytest.approx(0.001)
        assert sum(rate == 1.0 for rate in rates) == steps - round(0.1 * steps) - round(0.4 * steps) + 1


def test_warmup_ramps_over_all_steps() -> None:
    assert [rate_factor(step, 4, Warmup().schedule) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
