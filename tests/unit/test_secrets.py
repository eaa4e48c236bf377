"""Secrets in a configuration are refused before anything is stored or published."""

from pathlib import Path
from typing import Any

import pytest

from montessori_core.config import Study, parse, parse_experiment
from montessori_core.errors import ConfigError
from support.reports import write_run
from support.runs import invoke

MODELS = {"teacher": {"model": "smollm2-135m"}, "student": {"model": "smollm2-135m"}}
CANARY = "canary-0123456789abcdef"


def judge(**settings: Any) -> dict[str, Any]:
    return {"judge": {"model": "m", **settings}}


def filtered(**settings: Any) -> dict[str, Any]:
    return {"synthesis": {"filters": ["length", {"name": "mine:Filter", "settings": settings}]}}


def options(**settings: Any) -> dict[str, Any]:
    return {"synthesis": {"engine_options": settings}}


def slurm(**settings: Any) -> dict[str, Any]:
    return {"cluster": {"slurm": settings}}


@pytest.mark.guarantee("secrets in configurations")
@pytest.mark.parametrize(
    ("change", "field"),
    [
        (options(hf_token=CANARY), "synthesis: engine_options.hf_token"),
        (
            options(loader={"Nested": [{"clientSecret": CANARY}]}),
            "synthesis: engine_options.loader.Nested.clientSecret",
        ),
        (options(download=f"https://me:{CANARY}@host/x"), "synthesis: engine_options.download"),
        (options(credentials={"user": "me", "value": CANARY}), "synthesis: engine_options.credentials"),
        (judge(parameters={"api_key": CANARY}), "judge: parameters.api_key"),
        (
            judge(parameters={"extra_headers": {"AUTHORIZATION": f"Bearer {CANARY}"}}),
            "judge: parameters.extra_headers.AUTHORIZATION",
        ),
        (judge(parameters={"extra_headers": {"X-Api-Key": CANARY}}), "judge: parameters.extra_headers.X-Api-Key"),
        (judge(parameters={"note": f"Bearer {CANARY}"}), "judge: parameters.note"),
        (judge(parameters={"passwords": [CANARY]}), "judge: parameters.passwords"),
        (judge(chat_template_kwargs={"auth_token": CANARY}), "judge: chat_template_kwargs.auth_token"),
        (judge(base_url=f"https://me:{CANARY}@host/v1"), "judge: base_url"),
        (judge(base_url=f"https://{CANARY}@host/v1"), "judge: base_url"),
        (judge(base_url=f"https://host/v1?api-key={CANARY}"), "judge: base_url"),
        (judge(key_variable="hf_" + "x" * 34), "judge: key_variable"),
        (filtered(password=CANARY), "settings.password"),
        ({"reference": {"path": f"ftp://me:{CANARY}@host/rows.jsonl"}}, "reference: path"),
        ({"reference": {"path": f"https://host/rows.jsonl?a=1&token={CANARY}"}}, "reference: path"),
        (slurm(environment={"WANDB_API_KEY": CANARY}), "cluster.slurm: environment.WANDB_API_KEY"),
        (slurm(environment={"PREFECT_API_AUTH_STRING": f"me:{CANARY}"}), "environment.PREFECT_API_AUTH_STRING"),
        (slurm(setup=["module load x", f"export HF_TOKEN='{CANARY}'"]), "cluster.slurm: setup"),
        (
            slurm(stages={"judging": {"environment": {"https_proxy": f"http://me:{CANARY}@p:1"}}}),
            "environment.https_proxy",
        ),
    ],
)
def test_secret_is_refused_by_its_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match="looks like a secret.* environment variable") as refusal:
        parse_experiment(MODELS | change, "mine.yaml")
    assert f"{field}: looks like a secret" in str(refusal.value)
    assert CANARY not in str(refusal.value)
    with pytest.raises(ConfigError, match="looks like a secret"):
        parse(Study, {"experiment": MODELS | change}, "study.yaml")


@pytest.mark.guarantee("secrets in configurations")
@pytest.mark.parametrize(
    "change",
    [
        judge(base_url=f"ftp://me:{CANARY}@host/v1"),
        judge(key_variable=f"sk-{CANARY}"),
        judge(key_variable=[f"sk-{CANARY}"]),
        judge(chat_template_kwargs={"api_key": [CANARY]}),
        judge(parameters=f"https://host?api_key={CANARY}"),
    ],
)
def test_other_error_shows_no_secret(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_experiment(MODELS | change, "mine.yaml")
    assert CANARY not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        options(max_tokens=5, top_k=3, tokenizer_mode="slow", stop_token_ids=[1], skip_special_tokens=True),
        options(key_value_heads=2, hf_token=True, quantization={"per_token": "dynamic"}, tokenizer_revision="main"),
        judge(parameters={"stop": ["<s>"], "bos_token": "<s>", "prompt_cache_key": "run", "api_key": None}),
        judge(base_url="http://host:8000/v1", key_variable="MY_KEY", parameters={"user": "me:you@host"}),
        {"reference": {"path": "abfs://container@account.dfs.core.windows.net/rows.jsonl"}},
        {"student": {"model": "hf_checkpoint_of_last_week_in_bf16"}, "synthesis": {"language": "Basic English"}},
        filtered(key_field="question", stop_token="</s>", keys=["a"], tokens=["b"], api_key_variable="MY_KEY"),
        {"reference": {"path": "https://host/rows.jsonl?version=3"}},
        slurm(
            environment={
                "HF_TOKEN_PATH": "/x",
                "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
                "https_proxy": "http://proxy:3128",
            }
        ),
        slurm(
            setup=[
                "export HF_TOKEN=$(cat ~/token)",
                "pip install git+https://$HF_TOKEN@host",
                'export https_proxy="http://me:$PASSWORD@proxy:1"',
                "a --key=x",
            ]
        ),
    ],
)
def test_harmless_names_are_accepted(change: dict[str, Any]) -> None:
    parse_experiment(MODELS | change, "mine.yaml")


@pytest.mark.guarantee("secrets in configurations")
@pytest.mark.parametrize("command", [["push", "--to"], ["export", "--to", "trl", "--output"]])
def test_secret_of_earlier_run_stays_private(command: list[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "trial")
    config = run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("engine_options: {}", f"engine_options: {{hf_token: {CANARY}}}"))
    assert config.read_text() != before
    target = (tmp_path / "out").as_uri() if command[0] == "push" else str(tmp_path / "out")
    code, output = invoke(command[0], str(run), *command[1:], target, cwd=tmp_path)
    assert (code, "engine_options.hf_token: looks like a secret" in output) == (1, True), output
    assert CANARY not in output
    assert not (tmp_path / "out").exists()
