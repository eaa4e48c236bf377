"""The influence engine on a device that is not the CPU: no operation mixes devices, and results are those of the CPU."""

import json
import os
import subprocess
import sys

import pytest

from support import ROOT

# A process of its own: a device cannot be removed from torch. Homes of the state are as in plans of memory.
PROBE = """
import json, random, sys, tempfile
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent, adamw, projections
from montessori_core.influence import reference_state
from montessori_core.influence.linear import LinearMeter
from montessori_core.influence.losses import make_batch
from montessori_core.influence.reference_state import ReferenceState
from montessori_core.influence.student import ON_DEVICE
from montessori_core.influence.target_jobs import TargetsMeter
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.training.moments import Moments
from support.other_device import NAME, other_device

lora, state = sys.argv[1] == "LoRA", torch.bfloat16 if sys.argv[2] == "bfloat16" else None
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STEP = AdamW(1e-3, 0.9, 0.999, 1e-8, 0.0, 6, 1 / 32)
draw = random.Random(0)

def example(tokens):
    ids = [draw.randrange(3, 90) for _ in range(tokens)]
    return Encoded(ids, [IGNORED] * (tokens // 2) + ids[tokens // 2 :], False)

REFERENCE, PROBING = [example(20 + i) for i in range(9)], [example(12 + i) for i in range(5)]

def measure(device, placement):
    '''Return the numbers of all that is measured with a student.'''
    def model():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=True, **SIZES))
        if lora:
            llama = get_peft_model(llama, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
        return llama.to(device).eval()

    def student(model, state=state):
        generator = torch.Generator().manual_seed(1)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        first = {n: torch.randn(p.shape, generator=generator) * 1e-3 for n, p in trained.items()}
        moments = Moments(first, {n: 2 * m.square() + 1e-9 for n, m in first.items()}, 5)
        return ResidentStudent(model, moments, STEP, device, placement=placement, state_dtype=state)

    def reference(part=slice(None)):
        return ReferenceSet(REFERENCE[part], 64, device)

    def numbers(measured):
        return [(m.influence_student, m.influence_null_step, m.standard_error) for m in measured]

    with tempfile.TemporaryDirectory() as scratch:
        shared = Path(scratch)
        found = {}
        for worker in ("first worker", "second worker"):
            exact = InfluenceMeter(student(model()), reference(), "exact", shared=shared / "exact")
            found[f"exact, {worker}"] = numbers(map(exact.measure, PROBING))
            first = InfluenceMeter(student(model()), reference(), "first_order", shared=shared / "first")
            found[f"first order, {worker}"] = numbers(first.measure_batch(PROBING))
            linear_student = model()
            opened = [student(linear_student, None)]
            linear = LinearMeter(linear_student, opened.pop, reference(), shared=shared / "linear", state_dtype=state)
            found[f"linear, {worker}"] = numbers(linear.measure_batch(PROBING))
            targets = TargetsMeter(student(model()), [reference(slice(4)), reference(slice(4, 9))], shared=shared / "both")
            found[f"targets, {worker}"] = [numbers(measured) for measured in targets.measure_batch(PROBING)]
    kept = student(model())
    kept.end_steps()
    directions = kept.random_directions(500)
    steps = kept.project_steps([make_batch([(0, probed)], device) for probed in PROBING], directions)
    null_step = kept.project_null_step(directions)
    found["kept steps"] = [(step - null_step).tolist() for _, step in steps]
    resident = student(model())
    gradient = ReferenceState.measure(resident, reference(), "first_order", "example").gradient
    directions = resident.random_directions(500)
    found["kept gradient"] = [resident.project_gradient(directions, g).tolist() for g in (gradient.full, gradient.half)]
    return found

def flat(found):
    return torch.tensor([found]).flatten() if isinstance(found, float) else torch.cat([flat(part) for part in found])

save, pinned, tensor = reference_state.save_file, [], torch.tensor

def allocate(*size, pin_memory=False, **options):
    pinned.append(pin_memory)
    return empty(*size, **options)

def tensor_there(data, dtype=None, device="cpu"):
    return tensor(data, dtype=dtype).to(device)

empty, different = torch.empty, []
with sdpa_kernel(SDPBackend.MATH):
    expected = measure(torch.device("cpu"), ON_DEVICE)
    for sizes in (adamw._CHUNK, adamw.BLOCK, projections._ROWS_OF_PRODUCT):
        sizes[NAME] = sizes["cpu"]
    with (
        other_device() as device,
        mock.patch.object(reference_state, "save_file", lambda t, path: save({n: x.cpu() for n, x in t.items()}, path)),
        mock.patch.object(torch, "empty", allocate),
        mock.patch.object(torch, "tensor", tensor_there),
    ):
        for home in ("device", "host", "host, then device"):
            found = measure(device, dict.fromkeys(ON_DEVICE, home))
            for name in expected:
                here, there = flat(expected[name]), flat(found[name])
                if (here - there).abs().max() > 1e-2 * here.std():
                    different.append(f"{name}, {home}: {here.tolist()[:3]} {there.tolist()[:3]}")
try:
    with other_device() as device:
        torch.ones(2, device=device) + torch.ones(2)
except RuntimeError as error:
    print(json.dumps({"different": different, "pinned": any(pinned), "mixing": str(error), "cases": len(expected)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "state"), [("full", "float32"), ("full", "bfloat16"), ("LoRA", "float32")])
def test_other_device_gives_influence_of_cpu(kind: str, state: str) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", PROBE, kind, state]
    outcome = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    found = json.loads(outcome.stdout.splitlines()[-1])
    assert found["different"] == []
    assert found["pinned"]
    assert found["cases"] == 10
    assert "two devices" in found["mixing"]
