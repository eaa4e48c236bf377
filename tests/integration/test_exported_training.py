"""TRL trains on exported data as it is."""

from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from montessori_core.data.tables import EXAMPLES, read_table
from montessori_core.models.chat import encode_example
from montessori_core.models.load import load_tokenizer
from support.reports import write_run
from support.runs import invoke


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "trial")


def exported(run: Path, folder: Path, *options: str) -> Any:
    code, output = invoke("export", str(run), "--output", str(folder / "out"), *options, cwd=folder)
    assert code == 0, output
    return load_dataset(str(folder / "out"), split="train", cache_dir=str(folder / "cache"))


def settings(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder / "trl"), "max_steps": 1, "report_to": "none", "use_cpu": True, "max_length": 512}


@pytest.mark.parametrize("form", ["messages", "trl"])
def test_trl_trains_on_exported_examples(run: Path, tiny_llama: Path, form: str, tmp_path: Path) -> None:
    """Prompt and completion get the loss mask of Montessori; TRL also trains the text after the end of the turn."""
    from trl import SFTConfig, SFTTrainer

    data = exported(run, tmp_path, "--to", form, "--finished-only")
    trainer = SFTTrainer(str(tiny_llama), SFTConfig(**settings(tmp_path)), train_dataset=data)
    trainer.train()
    examples = read_table(run / "iteration-1" / "training" / "examples.parquet", EXAMPLES).to_pylist()
    finished = [example for example in examples if example["response_finished"]]
    tokenizer = load_tokenizer(str(tiny_llama))
    assert len(trainer.train_dataset) == len(finished)
    for row, example in zip(trainer.train_dataset, finished, strict=True):
        own = encode_example(tokenizer, example["instruction"], example["response"], 512)
        assert row["input_ids"][: len(own.input_ids)] == own.input_ids
        if form == "trl":
            assert row["labels"][: len(own.labels)] == own.labels


def test_trl_trains_on_exported_pairs(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    data = exported(run, tmp_path, "--to", "trl", "--what", "preferences")
    trainer = DPOTrainer(str(tiny_llama), args=DPOConfig(**settings(tmp_path)), train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
