"""Models whose positions or chat templates do not fit are refused before any job."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
)
from transformers.models.auto import tokenization_auto
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from flows.evaluation import evaluated_experiment, open_evaluation
from flows.measurement import Measurement, opened_inputs
from montessori_core.config import Cluster, DataSource, Experiment, Influence, Student, parse_experiment
from montessori_core.errors import UserError
from montessori_core.models.chat import encode_example
from montessori_core.models.load import check_tokenizer, load_tokenizer, load_with_tokenizer
from montessori_core.models.positions import check_positions, positions_of
from montessori_core.models.rendering import text_beginning
from montessori_core.models.templates import check_template, with_template
from support.runs import invoke
from tasks.run import open_run

_ENDS = {"vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=32, **_ENDS),
    "gpt-neo": lambda: GPTNeoConfig(
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        attention_types=[[["global"], 1]],
        max_position_embeddings=32,
        **_ENDS,
    ),
    "opt": lambda: OPTConfig(
        hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, **_ENDS
    ),
    "llama": lambda: LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        **_ENDS,
    ),
}


def save_model(config: Any, tokenizer: Path, folder: Path) -> Path:
    """Save a model with random weights, and a tokenizer's files."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder)
    return folder


def experiment(teacher: Path, student: Path, **of_student: Any) -> Experiment:
    """Return a configuration; `of_student` are further settings of the student."""
    content = {"teacher": {"model": str(teacher)}, "student": {"model": str(student), **of_student}}
    return parse_experiment(content, "test")


@pytest.mark.parametrize("name", CONFIGS)
def test_too_few_positions_are_refused_before_jobs(
    name: str, small_tokenizer: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    short = save_model(CONFIGS[name](), small_tokenizer, tmp_path / name)
    assert positions_of(short) == 32
    with pytest.raises(UserError, match=r"student.max_length=1024, but max_position_embeddings=32 in .*=32 or less"):
        open_run(experiment(tiny_llama, short), tmp_path / "run")
    with pytest.raises(UserError, match=r"teacher_update.max_length=2048, but max_position_embeddings=32"):
        open_run(experiment(short, tiny_llama), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    open_run(experiment(tiny_llama, short, max_length=32), tmp_path / "run")


def test_positions_of_other_models(small_tokenizer: Path, tmp_path: Path) -> None:
    mamba = MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, **_ENDS)
    assert positions_of(save_model(mamba, small_tokenizer, tmp_path / "mamba")) is None
    check_positions(tmp_path / "mamba", 10**6, "student.max_length")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = save_model(CONFIGS["gpt2"](), small_tokenizer, tmp_path / "gpt2")
    settings = {"base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert positions_of(adapter) == 32
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 64}}))
    assert positions_of(tmp_path) == 64


BROKEN = {
    "unclosed block": ("{% for m in messages %}{{ m['content'] }}", "line 1: Unexpected end of template"),
    "unclosed expression": ("{# chat #}\n\n{{ messages[0]['content' }}", "line 3: unexpected '}'"),
    "unknown tag": ("{% fro m in messages %}", "line 1: Encountered unknown tag 'fro'"),
    "unknown filter": ("{{ messages | tirm }}", "line 1: No filter named 'tirm'"),
}


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "setting"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_template_is_refused_before_jobs(case: str, place: str, tiny_llama: Path, tmp_path: Path) -> None:
    template, message = BROKEN[case]
    broken, settings = Path(shutil.copytree(tiny_llama, tmp_path / "broken")), dict[str, str]()
    name = str(broken / place)
    if place == "chat_template.jinja":
        (broken / place).write_text(template)
    elif place == "tokenizer_config.json":
        (broken / "chat_template.jinja").unlink()
        content = json.loads((broken / place).read_text())
        (broken / place).write_text(json.dumps(content | {"chat_template": template}))
    else:
        name = str(tmp_path / "mine.jinja")
        Path(name).write_text(template)
        settings = {"chat_template": name}
    sound = {"model": str(tiny_llama)}
    for role in ("teacher", "student"):
        content = {"teacher": sound, "student": sound, role: {"model": str(broken), **settings}}
        with pytest.raises(UserError) as error:
            open_run(parse_experiment(content, "test"), tmp_path / "run")
        assert f"the chat template in {name} has a syntax error in {message}" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_configured_template_replaces_broken_one(tiny_llama: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "chat_template.jinja").write_text("{% for")
    mine = str(tiny_llama / "chat_template.jinja")
    open_run(experiment(tiny_llama, broken, chat_template=mine), tmp_path / "run")


def test_damaged_tokenizer_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"the tokenizer of .*broken' cannot be loaded: "):
        load_tokenizer(str(broken))


def test_tokenizer_is_not_of_mistral_common(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM brings mistral-common, whose tokenizer renders no chat template and has no offsets."""
    monkeypatch.setattr("transformers.integrations.mistral.tokenizer.is_mistral_common_available", lambda: True)
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    MistralConfig().save_pretrained(model)
    (model / "tekken.json").write_text("{}")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.is_fast
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "mistral_format" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_tokenizer_of_wrong_class_is_refused(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.19 takes the class of the file, which splits words as Llama 2, for a vocabulary of Llama 3's kind."""
    monkeypatch.setattr(TokenizersBackend, "_tokenizer_json_has_byte_level", lambda *_, **__: False)
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizerFast"}))
    with pytest.raises(
        UserError, match=r"model' loses the spaces .*set tokenizer_class: PreTrainedTokenizerFast in its"
    ):
        load_tokenizer(str(model))
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    load_tokenizer(str(model))


def test_tokens_of_images_may_exceed_the_vocabulary(tiny_llama: Path, tmp_path: Path) -> None:
    """The tokenizer of the text models Gemma 3 270M and 1B has the larger models' token for images."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(model)
    loaded, student = load_with_tokenizer(str(model), torch.float32)
    assert len(loaded) == student.config.vocab_size + 1
    example = encode_example(loaded, "What is <image_soft_token>?", "A token.", 64)
    assert max(example.input_ids) < student.config.vocab_size
    loaded.chat_template = f"{loaded.chat_template}{{% if images %}}<image_soft_token>{{% endif %}}"
    with pytest.raises(UserError, match="they do not belong together"):
        check_tokenizer(loaded, student)


@pytest.mark.parametrize("special", [False, True])
def test_tokens_beyond_the_vocabulary_are_refused(special: bool, tiny_llama: Path) -> None:
    loaded, student = load_with_tokenizer(str(tiny_llama), torch.float32)
    if special:
        loaded.add_special_tokens({"pad_token": "<pad>"})
    else:
        loaded.add_tokens(["<word>"])
    with pytest.raises(UserError, match=r"has 4097 tokens, but the model has 4096: they do not belong together"):
        check_tokenizer(loaded, student)


def test_tags_of_transformers_are_known(tiny_llama: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    check_template(tmp_path, "student")


def test_measured_student_is_checked(tiny_llama: Path, small_tokenizer: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"instruction": "Say hello.", "output": "Hello."}\n')
    source = DataSource(path=str(tasks))
    short = save_model(CONFIGS["gpt2"](), small_tokenizer, tmp_path / "gpt2")
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "chat_template.jinja").write_text("{% for")
    for model, message in ((short, "max_length=1024, but max_position_embeddings=32"), (broken, "syntax error")):
        measurement = Measurement(Student(model=str(model)), None, source, source, Influence(), "student", Cluster())
        with pytest.raises(UserError, match=message), opened_inputs(measurement, tmp_path / "measured"):
            pass
        assert not (tmp_path / "measured").exists()


def test_evaluated_model_gets_configured_template(tiny_llama: Path, tmp_path: Path) -> None:
    """The model's own template is broken, so only the configured one may be checked."""
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "chat_template.jinja").write_text("{% for")
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ mood }}" + (tiny_llama / "chat_template.jinja").read_text())
    settings = {"chat_template": str(mine), "chat_template_kwargs": {"mood": "calm"}}
    content = experiment(tiny_llama, tiny_llama, **settings).model_dump(mode="json")
    used = evaluated_experiment(content, str(broken), "evaluation", "test")
    evaluation, _ = open_evaluation(used, tmp_path / "evaluation")
    template = Path(evaluation.model.path) / "chat_template.jinja"
    assert template.read_text() == '{% set mood = "calm" %}' + mine.read_text()


def test_links_to_moved_model_are_renewed(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    linked = with_template(model, "{{ messages }}", tmp_path / "linked")
    moved = model.rename(tmp_path / "moved")
    assert with_template(moved, "{{ messages }}", linked) == linked
    assert (linked / "config.json").read_bytes() == (moved / "config.json").read_bytes()


def test_named_template_has_no_system_turn(tiny_llama: Path, tmp_path: Path) -> None:
    evaluations = (
        open_evaluation(experiment(tiny_llama, tiny_llama, **settings), tmp_path / name)[0]
        for name, settings in (("evaluation", {}), ("named", {"chat_template": "chatml"}))
    )
    own, chatml = (load_tokenizer(str(opened.model.path)) for opened in evaluations)
    example = encode_example(chatml, "Say hello.", "Hello.", 64)
    assert chatml.decode(example.input_ids) == (
        "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>"
    )
    assert example.response_tokens == encode_example(own, "Say hello.", "Hello.", 64).response_tokens


_BEGIN = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
_TEXT = {"Sequence": {"id": "A", "type_id": 0}}
_SPECIAL = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
_ADDING = {"type": "TemplateProcessing", "single": [_BEGIN, _TEXT], "pair": [_BEGIN, _TEXT], "special_tokens": _SPECIAL}
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
BEGINNINGS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "Gemma": ({}, _ADDING, True),
    "Llama 3": ({}, {"type": "Sequence", "processors": [_BYTES, _ADDING]}, True),
    "as a token's settings": ({"bos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}}, _ADDING, True),
    "setting that is not read": ({"add_bos_token": True}, _BYTES, False),
    "another token": ({"bos_token": "<|im_start|>"}, _ADDING, False),
    "no token": ({"bos_token": None}, _ADDING | {"single": [_TEXT]}, False),
    "Qwen": ({}, _BYTES, False),
}


@pytest.mark.parametrize("case", BEGINNINGS)
def test_named_template_has_tokenizers_begin_token(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    """A model that was trained with it reads no text without it."""
    settings, processor, adds = BEGINNINGS[case]
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    edited = {
        "tokenizer_config.json": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", **settings},
        "tokenizer.json": {"post_processor": processor},
    }
    for name, fields in edited.items():
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | fields))
    used = experiment(tiny_llama, model, chat_template="chatml")
    (tokenizer,) = (load_tokenizer(str(opened.model.path)) for opened in [open_evaluation(used, tmp_path / "run")[0]])
    assert bool(text_beginning(tokenizer)) is adds
    text = tokenizer.decode(encode_example(tokenizer, "Say hello.", "Hello.", 64).input_ids)
    assert text.startswith("<|endoftext|><|im_start|>user" if adds else "<|im_start|>user")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat-template", "absent.jinja"], "--chat-template: absent.jinja cannot be read"),
        (["--chat-template-kwargs", "{mood: calm}"], "the chat template has no variable 'mood'"),
        (["--chat-template-kwargs", "{mood: [1]}"], "student.chat_template_kwargs.mood"),
        (["--chat-template-kwargs", "calm"], "--chat-template-kwargs calm: write a mapping"),
    ],
)
def test_template_options_of_evaluate_are_checked(
    tiny_llama: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(f"teacher: {{model: {tiny_llama}}}\nstudent: {{model: {tiny_llama}}}\n")
    code, output = invoke("evaluate", str(tiny_llama), "--config", "mine.yaml", *options, cwd=tmp_path)
    assert code == 1
    assert message in " ".join(output.split())
