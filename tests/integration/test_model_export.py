"""`montessori model export`: copies of a run's models, with cards."""

import shutil
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model

from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.load import load_merged, load_model, load_tokenizer
from support.reports import write_run
from support.runs import invoke


def export(folder: Path, *arguments: str) -> tuple[int, str]:
    code, output = invoke("model", "export", "trial", *arguments, cwd=folder)
    return code, " ".join(output.split())


def test_student_is_copied_with_its_card(tiny_llama: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)"
    run = write_run(tmp_path / "trial", student={"model": hostile}, teacher={"model": str(tmp_path / "t")})
    code, output = export(tmp_path, "student", "--output", "out")
    assert code == 1
    assert "no trained student; resume the run first" in output
    part = run / "iteration-1" / "student" / "part-00000"
    shutil.copytree(tiny_llama, part)
    (part / MOMENTS_FILE).write_bytes(b"large")
    code, output = export(tmp_path, "student", "--output", "out")
    assert code == 0, output
    assert not (tmp_path / "out" / MOMENTS_FILE).exists()
    copied, trained = (load_model(str(folder), torch.float32).state_dict() for folder in (tmp_path / "out", part))
    assert all(torch.equal(copied[name], trained[name]) for name in trained)
    _, header, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["tags"] == ["montessori", "sft"]
    assert "<script" not in body
    assert str(tmp_path) not in header + body
    for text in ("trial: student of iteration 1", "&lt;script&gt;", "| arc\\_challenge, acc\\_norm | 0.32 | 0.01 |"):
        assert text in body
    for arguments, message in (
        (["student", "--output", "out"], "nothing is overwritten"),
        (["judge", "--output", "new"], "give one of student, teacher"),
        (
            ["student", "--output", "new", "--iteration", "2"],
            "of iteration 2; give --iteration 1, or resume the run first",
        ),
        (["student", "--output", "new", "--merge"], "has all weights, and no adapter to merge; leave out --merge"),
    ):
        code, output = export(tmp_path, *arguments)
        assert code == 1
        assert message in output
    assert not (tmp_path / "new").exists()


def test_adapter_is_merged(tiny_llama: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "trial")
    part = run / "iteration-1" / "teacher" / "part-00000"
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_model(str(tiny_llama), torch.float32), settings).save_pretrained(part)
    load_tokenizer(str(tiny_llama)).save_pretrained(part)
    for name, options in (("adapter", []), ("merged", ["--merge"])):
        code, output = export(tmp_path, "teacher", "--output", name, *options)
        assert code == 0, output
        header = yaml.safe_load((tmp_path / name / "README.md").read_text().split("---\n")[1])
        assert header["library_name"] == {"adapter": "peft", "merged": "transformers"}[name]
        assert header["license"] == "apache-2.0"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = load_model(str(tmp_path / "merged"), torch.float32).state_dict()
    expected = load_merged(str(part), torch.float32).state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    base = load_model(str(tiny_llama), torch.float32).state_dict()
    assert not torch.equal(base["model.layers.0.mlp.up_proj.weight"], merged["model.layers.0.mlp.up_proj.weight"])
