"""LoRA students: warm-up, influence and evaluation with the adapter only."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from montessori_core.config import Lora, Warmup, Zero
from montessori_core.errors import UserError
from montessori_core.files import hash_path
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.losses import make_batch
from montessori_core.influence.projections import AlongDirections
from montessori_core.models.chat import encode_example
from montessori_core.models.fetch import fingerprint
from montessori_core.models.load import load_model, load_tokenizer, with_lora
from montessori_core.programs import SFT, Sft
from montessori_core.training.moments import load_moments
from support.row_programs import run_in_job
from support.runs import configuration, finish_lean

CPU = torch.device("cpu")
ROWS = [
    {"instruction": f"Count to {n}.", "response": " ".join(map(str, range(n + 2))), "response_finished": True}
    for n in range(8)
]


@pytest.fixture(
    scope="module", params=[pytest.param((0, 1), id="plain"), pytest.param((3, 2), id="zero-3", marks=pytest.mark.slow)]
)
def warm(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A student after a LoRA warm-up."""
    stage, processes = request.param
    folder = tmp_path_factory.mktemp("lora")
    settings = Sft(
        max_length=64,
        lora=Lora(rank=4, alpha=8),
        recipe=Warmup(learning_rate=1e-2, batch_size=4, micro_batch_size=2).shared(),
        zero=Zero(stage=stage),
        seed=0,
        save_moments=True,
    )
    return run_in_job(folder, SFT, settings, {"student": tiny_llama}, ROWS, processes)


def test_lora_trains_and_saves_only_the_adapter(warm: Path, tiny_llama: Path) -> None:
    assert not (warm / "model.safetensors").exists()
    adapter = load_file(warm / "adapter_model.safetensors")
    assert adapter
    assert any(float(tensor.abs().max()) > 0 for name, tensor in adapter.items() if "lora_B" in name)
    moments = load_moments(warm)
    model = load_model(str(warm), torch.float32)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(moments.first)


def test_lora_influence_equals_explicit_procedure(warm: Path) -> None:
    tokenizer, moments = load_tokenizer(str(warm)), load_moments(warm)
    encoded = [encode_example(tokenizer, row["instruction"], row["response"], 64) for row in ROWS]
    reference, probing = encoded[:4], encoded[4:]
    step = AdamW(1e-2, 0.9, 0.999, 1e-8, 0.0, moments.step + 1)
    student = ResidentStudent(load_model(str(warm), torch.float32), moments, step, CPU)
    meter = InfluenceMeter(student, ReferenceSet(reference, 128, CPU))

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            each = [
                model(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss for e in reference
            ]
        return float(torch.stack(each).mean())

    for example in probing:
        model = load_model(str(warm), torch.float32).eval()
        before = loss(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0, foreach=False)
        for name, parameter in trained.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.first[name].clone(),
                "exp_avg_sq": moments.second[name].clone(),
            }
        model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss.backward()
        optimizer.step()
        assert meter.measure(example).influence_student == pytest.approx(before - loss(model), abs=2e-6)


def test_lora_projection_equals_step(warm: Path) -> None:
    """First order projects the step of the adapter's matrices, which are linear layers, several examples at a time."""
    tokenizer, moments = load_tokenizer(str(warm)), load_moments(warm)
    encoded = [encode_example(tokenizer, row["instruction"], row["response"], 64) for row in ROWS[:3]]
    step = AdamW(1e-2, 0.9, 0.999, 1e-8, 0.0, moments.step + 1, 1 / 32)
    student = ResidentStudent(load_model(str(warm), torch.float32), moments, step, CPU)
    start = {name: parameter.detach().clone() for name, parameter in student.parameters.items()}
    direction = {name: torch.ones_like(parameter) for name, parameter in start.items()}
    batches = [make_batch([(0, example)], CPU) for example in encoded]
    for batch, (gradient, projections) in zip(
        batches, student.project_steps(batches, AlongDirections([direction])), strict=True
    ):
        taken = student.take_step(batch)
        moved = sum(float((p.detach() - start[name]).double().sum()) for name, p in student.parameters.items())
        student.restore()
        assert projections.tolist() == pytest.approx([moved], rel=1e-3)
        assert gradient.norm == pytest.approx(taken.norm, rel=1e-5)
        assert gradient.dominated_share == pytest.approx(taken.dominated_share, abs=1e-4)


def test_adapter_fingerprint_includes_its_base(warm: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """An adapter that we trained knows its base model, and is refused with another one."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_llama, base)
    shutil.copytree(warm, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    before = fingerprint(adapter)
    changed = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (base / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="the adapter in .* was trained on another model"):
        fingerprint(adapter)
    recorded = json.loads((adapter / "fingerprint.json").read_text())
    (adapter / "fingerprint.json").write_text(json.dumps({"sha256": recorded["sha256"]}))
    assert fingerprint(adapter) != before


def test_adapter_of_tied_embeddings_is_refused(tiny_llama: Path) -> None:
    """Merged, it would change the output layer, which it was not trained for."""
    with pytest.raises(
        UserError, match=r"student.lora.targets: 'embed_tokens' shares its weights with the output layer"
    ):
        with_lora(load_model(str(tiny_llama), torch.float32), Lora(targets=("embed_tokens", "q_proj")))


@pytest.mark.guarantee("run copied or moved to another path")
@pytest.mark.slow
def test_moved_run_of_a_lora_student_resumes(
    talking_llama: Path, shared_server: dict[str, str], tmp_path: Path
) -> None:
    """The base of its adapters is in the run: the student with another chat template."""
    config, run, moved = configuration(tmp_path, talking_llama), tmp_path / "runs" / "tiny", tmp_path / "moved"
    changes = ("student.lora={rank: 4, alpha: 8}", "student.chat_template=chatml")
    options = [word for change in changes for word in ("--set", change)]
    finish_lean("run", str(config), *options, cwd=tmp_path, **shared_server)
    run.rename(moved)
    iteration = moved / "iteration-1"
    before = hash_path(iteration / "influence.parquet")
    for name in ("influence", "influence.parquet", "metrics.json"):
        shutil.rmtree(iteration / name) if (iteration / name).is_dir() else (iteration / name).unlink()
    finish_lean("resume", str(moved), cwd=tmp_path, **shared_server)
    assert hash_path(iteration / "influence.parquet") == before
    assert not run.exists()
