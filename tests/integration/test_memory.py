"""The memory plan: never below the memory of a worker, and not far above."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from montessori_core.config import Lora, read_experiment
from montessori_core.errors import UserError
from montessori_core.influence import AdamW, ResidentStudent
from montessori_core.influence.losses import make_batch
from montessori_core.influence.memory import plan_memory
from montessori_core.influence.projections import AlongDirections
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.models.load import load_model, with_lora
from montessori_core.models.shape import GB, USABLE, Shape
from montessori_core.training.memory import BUCKET, plan_update
from montessori_core.training.moments import cold_moments
from support import CONFIGS, ROOT
from support.runs import invoke

LLAMA_3_8B = Shape(
    parameters=8_030_261_248,
    trained=8_030_261_248,
    largest=128_256 * 4096,
    layers=32,
    hidden=4096,
    intermediate=14_336,
    vocabulary=128_256,
    looked_up=128_256 * 4096,
    linear=8_030_261_248 - 128_256 * 4096 - 65 * 4096,
    token_rows=2 * 128_256 * 4096,
)

# A separate process: the kernel counts its peak of resident pages. The memory of the libraries is measured first.
PROBE = """
import json, random, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.linear import LinearMeter
from montessori_core.influence.target_jobs import TargetsMeter
from montessori_core.influence.memory import plan_memory
from montessori_core.models.shape import Shape
from montessori_core.training.moments import Moments

hidden, intermediate, layers, vocabulary = map(int, sys.argv[1:5])
estimator, dtype, state, length, batch = *sys.argv[5:8], *map(int, sys.argv[8:10])
CPU = torch.device("cpu")
state_dtype = torch.bfloat16 if state == "bfloat16" else None

def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024

def example(tokens):
    ids = [random.randrange(3, 90) for _ in range(tokens)]
    return Encoded(ids, [IGNORED] * (tokens // 8) + ids[tokens // 8 :], False)

def measure(model, length, batch):
    first, second = ({n: torch.full_like(p, 1e-6) for n, p in model.named_parameters()} for _ in range(2))
    adamw, kept = AdamW(1e-5, 0.9, 0.999, 1e-8, 0.0, 4), None if estimator == "linear" else state_dtype
    student = ResidentStudent(model, Moments(first, second, 3), adamw, CPU, dtype == "mixed", state_dtype=kept)
    del first, second
    reference = ReferenceSet([example(length // 4) for _ in range(8)], batch, CPU)
    if estimator == "linear":
        open_student = [student].pop
        del student
        meter = LinearMeter(model, open_student, reference, mixed=dtype == "mixed", state_dtype=state_dtype)
        assert meter.measure_batch([example(length)] * (batch // length))[0].status == "ok"
        return meter
    if estimator == "targets":
        meter = TargetsMeter(student, [reference] * 3)
        assert meter.measure_batch([example(length)])[0][0].status == "ok"
        return meter
    meter = InfluenceMeter(student, reference, estimator)
    assert meter.measure(example(length)).status == "ok"
    return meter

def llama(hidden, intermediate, layers, vocabulary):
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32, vocab_size=vocabulary, tie_word_embeddings=True))

measure(llama(32, 64, 1, 100), 32, 64)
before = status("VmRSS")
model = llama(hidden, intermediate, layers, vocabulary)
open("/proc/self/clear_refs", "w").write("5")
kept = measure(model, length, batch)
planned, targets = ("first_order", 3) if estimator == "targets" else (estimator, 1)
plan = plan_memory(Shape.of(model), planned, (dtype, state), length, batch, 10**12, targets)
print(json.dumps({"measured": status("VmHWM") - before, "planned": plan.device}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["exact", "first_order", "linear", "targets"])
@pytest.mark.parametrize(("dtype", "state"), [("float32", "float32"), ("mixed", "bfloat16")])
@pytest.mark.parametrize("sizes", [(512, 1024, 8, 32000), (576, 1536, 16, 49152)], ids=["37M", "92M"])
def test_plan_is_slightly_above_peak_memory(sizes: tuple[int, ...], estimator: str, dtype: str, state: str) -> None:
    command = [sys.executable, "-c", PROBE, *map(str, sizes), estimator, dtype, state, "512", "1024"]
    returning = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory returns to the system, as on a GPU
    outcome = subprocess.run(command, cwd=ROOT, env=returning, capture_output=True, text=True, check=True)
    found = json.loads(outcome.stdout.splitlines()[-1])
    assert 0.9 <= found["planned"] / found["measured"] <= 1.5


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_8b_student_fits_80_gb_gpu(estimator: str) -> None:
    plan = plan_memory(LLAMA_3_8B, estimator, ("float32", "float32"), 1024, 2048, int(80 * GB))
    assert plan.fits
    assert plan.placement["second moment"] == "host"
    assert plan.host >= 3 * 8.03 * 4 * GB
    larger = plan_memory(LLAMA_3_8B, estimator, ("float32", "float32"), 1024, 2048, int(192 * GB))
    assert larger.fits
    assert larger.host < plan.host


def test_linear_plan_of_8b_keeps_directions_on_gpu() -> None:
    """In bf16 with moments on the host; weights and directions in fp32 are 96 GB."""
    plan = plan_memory(LLAMA_3_8B, "linear", ("bfloat16", "float32"), 1024, 2048, int(80 * GB))
    assert plan.fits
    assert plan.placement["reference gradient"] == "device"
    assert plan.device >= 3 * 8.03 * 2 * GB
    assert not plan_memory(LLAMA_3_8B, "linear", ("float32", "float32"), 1024, 2048, int(80 * GB)).fits


def test_8b_student_exceeds_32_gb_gpu() -> None:
    plan = plan_memory(LLAMA_3_8B, "exact", ("float32", "float32"), 1024, 2048, int(32 * GB))
    assert not plan.fits
    with pytest.raises(UserError, match=r"46\.\d GB of device memory and may use 29\.4 GB .*weights 32\.1.*max_length"):
        plan.check(host_limit=10**12)


def test_plan_that_only_the_longest_examples_exceed_warns(caplog: pytest.LogCaptureFixture) -> None:
    """Examples may be far shorter than max_length."""
    plan = plan_memory(LLAMA_3_8B, "exact", ("float32", "float32"), 4096, 2048, int(80 * GB))
    assert not plan.fits
    plan.check(host_limit=10**12)
    assert "with the longest examples, influence needs" in caplog.text


def test_plan_of_kept_steps_has_no_reference_gradient() -> None:
    steps, first_order = (
        plan_memory(LLAMA_3_8B, kind, ("float32", "float32"), 1024, 1024, int(80 * GB))
        for kind in ("steps", "first_order")
    )
    kinds = {need.name for need in steps.needs}
    assert {"reference gradient", "half gradient"} <= {need.name for need in first_order.needs} - kinds
    assert steps.host == pytest.approx(2 * 32.1 * GB, rel=0.01)  # the snapshot is gone before the first pass
    assert first_order.host > 2 * steps.host


def test_8b_student_with_state_in_16_bits_stays_on_80_gb() -> None:
    """Only half of the reference gradient, for the standard error, is copied for each batch of examples."""
    plan = plan_memory(LLAMA_3_8B, "first_order", ("mixed", "bfloat16"), 256, 2048, int(80 * GB))
    assert plan.fits
    assert {need.name for need in plan.needs if need.home_while("measuring") == "host"} == {"half gradient"}
    in_fp32 = plan_memory(LLAMA_3_8B, "first_order", ("mixed", "float32"), 256, 2048, int(80 * GB))
    assert in_fp32.placement["second moment"] == in_fp32.placement["reference gradient"] == "host"


def test_plan_counts_gradients_of_each_reference_set() -> None:
    plans = [
        plan_memory(LLAMA_3_8B, "first_order", ("mixed", "bfloat16"), 256, 2048, int(80 * GB), targets)
        for targets in (1, 3)
    ]
    sums = [
        sum(need.size for need in plan.needs if need.name in ("reference gradient", "half gradient")) for plan in plans
    ]
    assert sums[1] == 3 * sums[0] == pytest.approx(3 * 32.1 * GB, rel=0.01)
    # What is kept of the first two sets is in host memory while that of the third is added up.
    opening = [need.size for need in plans[1].needs if need.home_while("opening") == "host"]
    assert sum(opening) == plans[1].host == pytest.approx((3 * 32.1 + 2 * 16.06 + 2 * 32.1) * GB, rel=0.01)


def test_plan_of_mixed_8b_student_counts_bf16_copies() -> None:
    """Without them a moment would be on the device, and the backward pass would run out of memory."""
    plan = plan_memory(LLAMA_3_8B, "exact", ("mixed", "float32"), 1024, 2048, int(80 * GB))
    sizes = {need.name: need.size / GB for need in plan.needs}
    assert sizes["bf16 copies, beyond these"] == pytest.approx(15.0, abs=0.05)
    assert plan.fits
    assert set(plan.placement.values()) == {"host", "device"}
    assert plan.placement["first moment"] == plan.placement["second moment"] == "host"


@pytest.mark.parametrize("tied", [True, False])
def test_example_pass_in_mixed_precision_keeps_planned_copies(tied: bool) -> None:
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, tie_word_embeddings=tied, **config))
    matrices = {shape for p in model.parameters() if p.dim() == 2 for shape in (tuple(p.shape), tuple(p.t().shape))}
    adamw = AdamW(1e-5, 0.9, 0.999, 1e-8, 0.0, 1)
    student = ResidentStudent(model, cold_moments(model), adamw, torch.device("cpu"), mixed=True)
    ids = list(range(3, 23))
    batch = make_batch([(0, Encoded(ids, [IGNORED] * 5 + ids[5:], False))], student.device)
    shape = Shape.of(model)
    norms = 2 * sum(p.numel() for p in model.parameters() if p.dim() == 1)  # not cast
    directions = AlongDirections([{name: torch.ones_like(p) for name, p in student.parameters.items()}])
    for estimator in ("exact", "first_order"):
        plan = plan_memory(shape, estimator, ("mixed", "float32"), 32, 32, 10**9)
        if estimator == "first_order":
            student.end_steps()
        planned = sum(need.size for need in plan.needs if need.name == "bf16 copies, beyond these")
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        copies: dict[int, int] = {}

        def keep(tensor: torch.Tensor, copies: dict[int, int] = copies, weights: set[int] = weights) -> torch.Tensor:
            own = tensor.untyped_storage().data_ptr() in weights
            if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in matrices and not own:
                copies[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if estimator == "exact":
                student.take_step(batch)
            else:
                student.project_steps([batch], directions)
        assert sum(copies.values()) == planned - norms


def test_linear_plan_counts_rows_of_tokens_in_host_memory() -> None:
    """Both tables, four tensors in fp32 each: 16.8 GB; and the gradients, which the first worker writes from the host."""
    plan = plan_memory(LLAMA_3_8B, "linear", ("bfloat16", "float32"), 1024, 2048, int(80 * GB))
    assert plan.host >= 16.8 * GB + 4 * 8.03 * GB
    plan.check(host_limit=plan.host)
    with pytest.raises(UserError, match=r"host memory .*rows of tokens, in fp32 16\.8.*memory_gb"):
        plan.check(host_limit=int(16 * GB))


def test_plan_command_prints_placement_and_remedy(smollm2: Path) -> None:
    command = ("plan", "--student", str(smollm2))
    code, output = invoke(*command, "--gpu-memory", "24", cwd=ROOT)
    assert code == 0, output
    assert "snapshot" in output
    assert "host, pinned" not in output
    code, output = invoke(*command, "--gpu-memory", "4.2", "--estimator", "exact", "--lora-rank", "8", cwd=ROOT)
    assert code == 0, output
    code, output = invoke(*command, "--gpu-memory", "1", cwd=ROOT)
    assert code == 1
    assert "--lora-rank" in output


def test_plan_command_reads_an_adapter(smollm2: Path, tmp_path: Path) -> None:
    """It counts the adapter's own matrices as trained, as influence and updates do."""
    adapted = with_lora(load_model(str(smollm2), torch.bfloat16), Lora(rank=64, targets=("q_proj",)))
    adapted.save_pretrained(tmp_path / "adapter")
    shape = Shape.of(load_model(str(tmp_path / "adapter"), torch.bfloat16))
    assert shape.trained == 30 * 64 * 2 * 576
    code, output = invoke("plan", "--student", "adapter", cwd=tmp_path)
    assert code == 0, output
    assert f"{shape.parameters / 1e9:.3f}e9 parameters, {shape.trained / 1e9:.3f}e9 of them trained" in output
    for role in ("--student", "--teacher"):
        code, output = invoke("plan", role, "adapter", "--lora-rank", "64", cwd=tmp_path)
        assert code == 0, output
        code, output = invoke("plan", role, "adapter", "--lora-rank", "4", cwd=tmp_path)
        assert code == 1
        assert "--lora-rank 4: adapter is an adapter of rank 64, which is trained further" in " ".join(output.split())


def test_8b_teacher_needs_offload_or_adapter_on_80_gb() -> None:
    """All weights need 20 bytes each, over two GPUs 10; with an adapter one GPU is enough."""
    adapter = replace(LLAMA_3_8B, trained=42_000_000, largest=16 * 14_336)
    assert plan_update(LLAMA_3_8B, 3, 2, 4096).total > 80 * GB > 1.5 * plan_update(adapter, 2, 1, 4096).total
    for name in ("paper-8b", "paper-1b"):
        preset = read_experiment(CONFIGS / f"{name}.yaml")
        jobs, tokens = preset.cluster.resources.teacher_update, 2 * preset.teacher_update.max_length
        offload = preset.zero.offload == "optimizer"
        plan = plan_update(LLAMA_3_8B, preset.zero.stage, jobs.processes_per_node, tokens, offload=offload)
        assert plan.total < USABLE * 80 * GB
        assert jobs.memory_gb is not None
        assert jobs.memory_gb > 20 * LLAMA_3_8B.trained / GB  # optimizer and gradients, 16 bytes, and weights to save


def test_plan_counts_buckets_and_temporaries() -> None:
    """The embedding, 525e6 elements, is reduced alone: its gradient in bf16, and copied to fp32."""
    whole, small = (plan_update(replace(LLAMA_3_8B, largest=size), 2, 2, 4096) for size in (LLAMA_3_8B.largest, 10**6))
    assert whole.buckets - 4 * BUCKET == 6 * 128_256 * 4096
    assert small.buckets == 10 * BUCKET
    assert whole.temporary == pytest.approx(4 * 8.03e9 / 2, rel=0.001)
    offloaded = plan_update(LLAMA_3_8B, 2, 2, 4096, offload=True)
    assert (offloaded.optimizer, offloaded.buckets) == (0, whole.buckets)
    assert offloaded.temporary < 4 * GB


def test_weights_in_four_bits_take_a_quarter() -> None:
    """Embeddings and output layer of Llama 3 8B, 1.05e9 weights, keep 2 bytes; the other 6.98e9 take 0.52."""
    adapter = replace(LLAMA_3_8B, trained=42_000_000)
    plans = [plan_update(adapter, 2, 1, 4096, quantization) for quantization in (None, "nf4")]
    assert [plan.weights / GB for plan in plans] == pytest.approx([16.06, 5.70], abs=0.02)
    assert plans[0].total - plans[0].weights == plans[1].total - plans[1].weights


def test_plan_command_prints_teacher_update(smollm2: Path) -> None:
    command = ("plan", "--teacher", str(smollm2), "--max-length", "512")
    code, output = invoke(*command, "--gpu-memory", "24", cwd=ROOT)
    assert code == 0, output
    assert "fits 24 GB: 1 GPU, zero.stage 2; 2 GPUs, zero.stage 2" in output
    assert "generation with vLLM, for each GPU" in " ".join(output.split())  # the title wraps after a long path
    assert "cache of a token in all layers: 0.023 MB" in output
    code, output = invoke(*command, "--gpu-memory", "1.2", cwd=ROOT)
    assert code == 1
    assert "--lora-rank" in output
    code, output = invoke(*command, "--gpu-memory", "1.2", "--lora-rank", "16", cwd=ROOT)
    assert code == 0, output
    code, output = invoke(*command, "--student", str(smollm2), cwd=ROOT)
    assert code == 1
    assert "give a --student or a --teacher" in output
    for option, value in (
        ("--estimator", "screened"),
        ("--screen", "linear"),
        ("--dtype", "mixed"),
        ("--state-dtype", "bfloat16"),
        ("--reference-batch-tokens", "1024"),
    ):
        code, output = invoke(*command, option, value, cwd=ROOT)
        assert code == 1
        assert f"{option} applies only to --student" in output
    code, output = invoke("plan", "--student", str(smollm2), "--quantization", "nf4", cwd=ROOT)
    assert code == 1
    assert "--quantization applies only to --teacher" in output
