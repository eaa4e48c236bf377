"""The configuration of an experiment: frozen, validated, and described field by field.

The descriptions are the documentation and the form a user fills in; units are part of them. Defaults follow the
paper (Montessori-Instruct, ICLR 2025, Section 4 and Appendix A) unless the description says otherwise.
"""

import re
import reprlib
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from montessori_core.atomic import commit
from montessori_core.errors import ConfigError
from montessori_core.presets import find_configuration

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxstring, _shown.maxother = 2, 100, 100
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"


def _no_way_up(name: str) -> str:
    if ".." in name:
        raise ValueError("a run name must not contain '..'")
    return name


FolderName = Annotated[str, AfterValidator(_no_way_up)]


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Teacher(Section):
    """The model that writes instructions and their responses."""

    model: str = Field(
        description="Hugging Face id or local folder of the teacher. 'smollm2-135m' is the embedded model."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id; none for a folder.")
    prompt_style: Literal["chat", "completion"] = Field(
        "chat",
        description="How instructions are asked for: 'chat' puts the request in the chat template (instruct "
        "models); 'completion' lets the model continue a plain list of tagged instructions (small or base models).",
    )


class Lora(Section):
    """Low-rank adaptation: the student's weights stay, small matrices beside them are trained."""

    rank: Count = Field(16, description="Rank of the matrices.")
    alpha: Count = Field(32, description="Their product is scaled by alpha / rank.")
    targets: tuple[str, ...] = Field(
        (), description="Names of the layers that get them; none takes every linear layer but the vocabulary's."
    )


class Student(Section):
    """The model that the synthetic data trains."""

    model: str = Field(
        description="Hugging Face id or local folder of the student. 'smollm2-135m' is the embedded model."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id; none for a folder.")
    max_length: int = Field(
        1024, ge=32, description="Tokens of an example (prompt and response); longer ones are cut and recorded."
    )
    lora: Lora | None = Field(None, description="Train LoRA matrices; none trains all weights.")


class DataSource(Section):
    """Where a data set comes from and which of its fields are read."""

    path: str = Field(
        description="'builtin' for the project's own set, a .jsonl or .parquet file, or a Hugging Face data set id."
    )
    split: str = Field("train", description="Split of a Hugging Face data set; ignored for files.")
    limit: Count | None = Field(None, description="Use only the first so many rows; none for all.")
    instruction_field: str = Field("instruction", description="Column that holds the instruction.")
    input_field: str = Field("input", description="Column that holds the input; may be missing from the data.")
    output_field: str = Field("output", description="Column that holds the response; not read for a seed pool.")


class Sampling(Section):
    """Decoding parameters of one kind of generation (paper, Table 5)."""

    temperature: float = Field(
        1.0, ge=0.0, description="Softmax temperature; 0 takes the most probable token every time."
    )
    top_p: float = Field(0.9, gt=0.0, le=1.0, description="Nucleus: smallest set of tokens with this probability.")
    presence_penalty: float = Field(
        1.0, ge=-2.0, le=2.0, description="Subtracted from the logit of every token generated before."
    )
    repetition_penalty: float = Field(
        1.0, gt=0.0, description="Divides the logits of tokens in the prompt or generated before; 1 is off."
    )
    max_tokens: Count = Field(1024, description="Most tokens generated.")


class Filters(Section):
    """Which instructions are kept (Section 4.1 of the design; every rejection is counted by its reason)."""

    min_characters: int = Field(6, ge=1, description="Shortest instruction kept, characters.")
    max_characters: int = Field(400, ge=1, description="Longest instruction kept, characters.")
    max_rouge_l: Probability = Field(
        0.7,
        description="Highest ROUGE-L F against any accepted instruction and the prompt's own demonstrations.",
    )
    keep_newlines: bool = Field(
        True,
        description="Keep the line breaks of code and lists; false collapses every blank to one space as the "
        "authors' code does.",
    )


class Synthesis(Section):
    """How the teacher is prompted and what is kept of its output."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="Generation engine; 'auto' takes vLLM where it is installed, else transformers."
    )
    request: Literal["own", "paper"] = Field(
        "own",
        description="Words of the request in prompt_style: chat. 'own' asks for the task alone, one to three sentences long; "
        "'paper' is Figure 13: an explanation first, then an instruction of any length, with its input.",
    )
    samples_per_prompt: Count = Field(4, description="Instructions generated for each prompt.")
    seed_demonstrations: int = Field(6, ge=0, description="Demonstrations a prompt takes from the seed pool.")
    synthetic_demonstrations: int = Field(
        2, ge=0, description="Demonstrations a prompt takes from the last iteration; from the seeds while none."
    )
    instruction: Sampling = Field(
        Sampling(temperature=1.0),
        description="Decoding of instructions. Table 5 prints a repetition penalty of 1.5, which the authors' code does "
        "not set: it counts the prompt, whose demonstrations end with the closing tag that an instruction must end with.",
    )
    response: Sampling = Field(Sampling(temperature=0.6), description="Decoding of responses.")
    filters: Filters = Field(Filters(), description="Which instructions are kept.")
    oversampling: float = Field(
        1.3,
        ge=1.0,
        description="First round: candidates generated for each example wanted. Later rounds fill what the "
        "filters removed, at the last round's acceptance, and a fifth more: acceptance falls as the accepted set grows.",
    )
    max_rounds: Count = Field(6, description="Rounds of generation before too low an acceptance is an error.")
    prompts_per_shard: Count = Field(256, description="Most prompts in one shard of instruction generation.")
    instructions_per_shard: Count = Field(512, description="Most instructions in one shard of response generation.")

    @model_validator(mode="after")
    def _some_demonstrations(self) -> "Synthesis":
        if self.seed_demonstrations + self.synthetic_demonstrations == 0:
            raise ValueError(
                "seed_demonstrations and synthetic_demonstrations are both 0: a prompt needs at least one demonstration"
            )
        return self


class Schedule(Section):
    """Learning rate over one training: ramp up, hold, decay (WSD), as shares of all steps."""

    warmup: Probability = Field(0.1, description="Share of the steps that ramp linearly up to the peak rate.")
    stable: Probability = Field(0.5, description="Share of the steps at the peak rate.")
    decay: Probability = Field(0.4, description="Share of the steps that decay linearly to the final rate.")
    final: Probability = Field(0.001, description="Final rate, as a share of the peak.")

    @model_validator(mode="after")
    def _shares_add_up(self) -> "Schedule":
        total = self.warmup + self.stable + self.decay
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"warmup + stable + decay must be 1, not {total:g}: they are shares of all steps")
        return self


class Optimization(Section):
    """What warm-up, student training and the teacher update have in common."""

    learning_rate: float = Field(5e-6, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(32, description="Examples (or pairs) per optimizer step, over all processes.")
    micro_batch_size: Count = Field(2, description="Examples (or pairs) per process and forward pass.")
    epochs: Count = Field(1, description="Passes over the data.")
    schedule: Schedule = Field(Schedule(), description="Course of the learning rate.")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW: decay of the first moment.")
    beta2: float = Field(0.999, ge=0.0, lt=1.0, description="AdamW: decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0.0, description="AdamW: term added to the denominator.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW: decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0.0, description="Gradients are scaled down to this norm; 0 is off.")

    def shared(self) -> "Optimization":
        """What decides a training on given rows: the fields that all recipes have."""
        return Optimization.model_validate(self.model_dump(include=set(Optimization.model_fields)))

    @model_validator(mode="after")
    def _whole_accumulation(self) -> "Optimization":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self


class Warmup(Optimization):
    """Training that warms the student and its AdamW moments before influence is measured."""

    examples: Count = Field(1000, description="Examples in the warm-up set.")
    schedule: Schedule = Field(
        Schedule(warmup=1.0, stable=0.0, decay=0.0),
        description="Course of the learning rate; by default a linear ramp to the peak over the whole warm-up.",
    )


class Training(Optimization):
    """Training of the student, from its first weights, on the updated teacher's data."""

    examples: Count = Field(10_000, description="Examples in the training set.")


class TeacherUpdate(Optimization):
    """Direct preference optimization of the teacher (Eq. 4)."""

    learning_rate: float = Field(1e-6, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(2, description="Preference pairs per optimizer step, over all processes.")
    micro_batch_size: Count = Field(2, description="Preference pairs per process and forward pass.")
    beta: float = Field(0.1, gt=0.0, description="DPO: strength of the pull towards the teacher before.")
    max_length: int = Field(
        2048, ge=64, description="Tokens of prompt and instruction; pairs that are longer are left out and counted."
    )


class Nomad(Optimization):
    """Training of the teacher on whole conversations of the reference set, and the mixture, for the method nomad."""

    learning_rate: float = Field(2e-5, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(128, description="Conversations per optimizer step, over all processes.")
    epochs: Count = Field(2, description="Passes over the data.")
    teacher_examples: Count = Field(
        15_000,
        description="Most reference examples that the teacher is trained on, drawn at random: a small part often gives data "
        "that adds more to the real ones.",
    )
    mask_prompts: bool = Field(
        False,
        description="Train the teacher on responses alone, as is usual; the paper's finding is that this is worse.",
    )
    real_share: float = Field(
        0.5,
        ge=0.0,
        lt=1.0,
        description="Share of reference examples in the student's training set, as far as there are enough of them.",
    )
    sampling: Sampling = Field(
        Sampling(temperature=1.0, presence_penalty=0.0, max_tokens=2048), description="Decoding of conversations."
    )
    training: Optimization | None = Field(
        None,
        description="Recipe of the student for this method alone (the paper: learning rate 2e-5, batches of 128, 4 epochs); "
        "none takes the experiment's, as all methods do, and as the students of `transfer` do in any case.",
    )


class Screening(Section):
    """How the screened estimator checks itself: first order for all, exact where it matters."""

    audit_examples: int = Field(
        100,
        ge=40,
        description="Examples measured both ways, drawn at random: one half says how far first order is off, the other "
        "how often the signs agree once that is corrected.",
    )
    error_rate: float = Field(
        0.05,
        gt=0.0,
        lt=0.5,
        description="Share of examples on which first order may be off by more than the width within which signs are "
        "confirmed exactly.",
    )
    minimum_agreement: Probability = Field(
        0.9, description="If fewer signs of the audit agree after correction, every example is measured exactly."
    )


class Sequential(Section):
    """Reading the reference set only until the sign of an influence is decided."""

    error_rate: float = Field(
        0.05, gt=0.0, lt=0.5, description="Share of examples whose sign may differ from that over the whole set."
    )
    block: int = Field(32, ge=8, description="Reference examples read between two decisions.")


class Influence(Section):
    """How local data influence is measured (Eq. 1 and 2)."""

    probing_examples: Count = Field(10_000, description="Examples in the probing set of the first iteration.")
    later_probing_examples: Count = Field(2000, description="Examples in the probing set of later iterations.")
    estimator: Literal["exact", "first_order", "screened"] = Field(
        "screened",
        description="'exact' takes the step and evaluates the reference set; 'first_order' projects the step on "
        "the reference gradient at the null step, hundreds of times cheaper with many reference examples; 'screened' "
        "takes first order for all, audits it, and confirms exactly where the sign is in doubt.",
    )
    dtype: Literal["float32", "mixed", "bfloat16"] = Field(
        "float32",
        description="Numbers a step is computed in: 'float32'; 'mixed' (the example's gradient with bf16 activations, "
        "all else fp32); 'bfloat16' (all of it, as the authors' code: smaller, and mostly rounding for small students).",
    )
    screening: Screening = Field(Screening(), description="The audit of estimator: screened.")
    sequential: Sequential | None = Field(
        None,
        description="Exact measurements read the reference set only until the sign is decided; none reads all of it.",
    )
    reference_reduction: Literal["example", "token"] = Field(
        "example", description="Reference loss: mean over examples (Eq. 2) or over all response tokens."
    )
    learning_rate: float | None = Field(
        None, gt=0.0, description="Rate of the one step; none takes the warm-up's peak rate."
    )
    example_weight: float = Field(
        1 / 32,
        gt=0.0,
        le=1.0,
        description="What the example's gradient is multiplied by before AdamW's arithmetic: 1 is Eq. 1 to the letter, 1/8 "
        "the authors' code on 8 GPUs, 1/32 (the default: no other predicts training measurably better) an "
        "example of a training batch of 32. At 1 the example's own square can decide most of AdamW's denominator "
        "(`dominated_share` of the table).",
    )
    reference_batch_tokens: Count = Field(
        2048, description="Tokens of a batch of reference examples, padding included."
    )
    examples_per_shard: Count = Field(64, description="Most probing examples in one shard.")

    @model_validator(mode="after")
    def _sequential_is_exact(self) -> "Influence":
        if self.sequential is not None and self.estimator != "exact":
            raise ValueError(
                f"sequential evaluation belongs to estimator: exact, not {self.estimator}; set estimator: exact, or "
                "sequential: null"
            )
        return self


Baseline = Literal["student", "null_step", "median", "prompt"]


class Preferences(Section):
    """How influence becomes preference pairs (Eq. 3)."""

    baseline: Baseline = Field(
        "prompt",
        description="What an example is compared with: the student as it is (the paper's sign), the null step (what "
        "momentum alone would do), the median of the probing set, or the mean of the examples of its prompt. Of the first "
        "two, most examples lie on one side when momentum outweighs a single example, which leaves few pairs; the mean of "
        "a prompt leaves pairs in every prompt.",
    )
    margin: float = Field(
        0.0,
        ge=0.0,
        description="Keep pairs that differ in influence by more than so many standard errors of the difference over the "
        "reference examples, the errors of both being taken as independent; 0 keeps all that rounding does not blur.",
    )
    max_pairs: Count | None = Field(
        None, description="Keep only so many pairs, those with the widest influence gap; none keeps all."
    )


class Comparison(Section):
    """What is computed beside the method, to see what it changed."""

    unmodified_teacher: bool = Field(
        True, description="Also train a student on as many examples of the unmodified teacher."
    )
    influence_examples: int = Field(
        256,
        ge=0,
        description="Training examples of the updated and of the unmodified teacher whose influence is measured (Figure "
        "3d); 0 is off.",
    )
    teacher_checkpoints: int = Field(
        0,
        ge=0,
        description="Teachers kept on the way through each update, evenly spread; a student is trained on the data of each "
        "(Figures 3a and 3b). 0 is off.",
    )


class Endpoint(Section):
    """A model behind an OpenAI-compatible API. Its key is taken from the environment and written nowhere."""

    model: str = Field(description="The model's name at the API, e.g. gpt-4o.")
    base_url: str = Field(
        "https://api.openai.com/v1",
        pattern=r"^https?://",
        description="Address of the API, /v1 included; a local vLLM server's is http://HOST:8000/v1.",
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key, where the jobs run; a server without keys needs none.",
    )
    concurrency: Count = Field(8, description="Most requests at a time.")
    requests_per_minute: Count | None = Field(
        None, description="Most questions put in a minute; those repeated after a fault come on top. None for no limit."
    )
    timeout_seconds: float = Field(120.0, gt=0.0, description="Seconds until a request without an answer is repeated.")
    retries: int = Field(
        6,
        ge=0,
        description="Times a request is repeated, with growing pauses, after 408, 409, 429, 5xx, a time-out, a lost "
        "connection or an answer that is not of the protocol.",
    )
    max_tokens: Count = Field(1024, description="Most tokens of an answer.")
    dollars_per_million_input_tokens: float = Field(0.0, ge=0.0, description="Price, for the account kept.")
    dollars_per_million_output_tokens: float = Field(0.0, ge=0.0, description="Price, for the account kept.")
    spending_cap_dollars: float | None = Field(
        None, gt=0.0, description="A stage that could pass this sum with its next request stops with what it has."
    )

    @model_validator(mode="after")
    def _cap_needs_prices(self) -> "Endpoint":
        if self.spending_cap_dollars is not None and not (
            self.dollars_per_million_input_tokens or self.dollars_per_million_output_tokens
        ):
            raise ValueError("spending_cap_dollars needs dollars_per_million_input_tokens and ..._output_tokens")
        return self

    def identity(self) -> dict[str, Any]:
        """What decides an answer: all but limits, prices and the name of the key."""
        return self.model_dump(mode="json", include={"model", "base_url", "max_tokens"})


class HarnessTask(Section):
    """A task of lm-evaluation-harness."""

    name: str = Field(description="Name of a task, tag or group: 'lm_eval ls tasks' lists them.")
    shots: int | None = Field(
        None, ge=0, description="Demonstrations before each item; none takes the task's own number."
    )
    limit: Count | None = Field(None, description="Only so many first items of each task, for a trial; none takes all.")


class Benchmarks(Section):
    """What students are measured by beside the held-out loss (Section 4.2)."""

    tasks: tuple[HarnessTask, ...] = Field((), description="Tasks of lm-evaluation-harness.")
    task_folder: str | None = Field(
        None,
        description="Folder with task files (YAML) of your own, and their data: they name data files from this folder.",
    )
    chat_template: bool = Field(False, description="Put the prompts of these tasks in the student's chat template.")
    batch_size: Count = Field(16, description="Requests of these tasks in one forward pass.")
    items_per_shard: Count = Field(500, description="Most items of these tasks in one shard.")
    alpaca_eval: str | None = Field(
        None,
        description="AlpacaEval: a file (.json or .jsonl) with instruction and output, the answers that the student's are "
        "compared with, e.g. AlpacaEval 2.0's gpt4_turbo outputs. Students are compared with each other on them, too.",
    )
    alpaca_eval_difficulty: str | None = Field(
        None,
        description="AlpacaEval's instruction_difficulty.csv, for the length-controlled win rate; without, it is left out of "
        "the model.",
    )
    mt_bench: str | None = Field(None, description="MT-Bench: its questions (.jsonl).")
    mt_bench_references: str | None = Field(
        None, description="MT-Bench: reference answers (.jsonl) to its questions of maths, coding and reasoning."
    )
    mt_bench_temperature: float | None = Field(
        None,
        ge=0.0,
        description="MT-Bench: one temperature for all questions; none decodes each category as FastChat does: writing and "
        "roleplay at 0.7, stem and humanities at 0.1, extraction, math, coding and reasoning at 0, others at 0.7.",
    )
    judge_prompts: Literal["own", "published"] = Field(
        "own",
        description="How the judge is asked: 'own' prompts, whose verdict is the last line of the answer; 'published' are "
        "AlpacaEval's (the probability of one token) and FastChat's ([[rating]]). Scores are labelled by it.",
    )
    answers: Sampling = Field(
        Sampling(temperature=0.7, top_p=1.0, presence_penalty=0.0),
        description="Decoding of the students' answers that are judged; MT-Bench has temperatures of its own.",
    )
    contamination_words: int = Field(
        8, ge=0, description="An item counts as seen if so many of its words stand in a row in training data; 0 is off."
    )

    @property
    def judged(self) -> bool:
        """Whether a judge is asked."""
        return self.alpaca_eval is not None or self.mt_bench is not None


class Zero(Section):
    """DeepSpeed's memory partitioning for warm-up, student training and teacher update."""

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="ZeRO stage: 0 none, 1 optimizer, 2 and gradients, 3 and weights partitioned."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="Keep the optimizer, or optimizer and weights (stage 3), in host memory."
    )

    @model_validator(mode="after")
    def _offload_needs_partitions(self) -> "Zero":
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload: optimizer needs stage 1, 2 or 3; set stage, or offload: none")
        if self.offload == "all" and self.stage != 3:
            raise ValueError("offload: all needs stage 3; set stage: 3, or offload: optimizer")
        return self


class Resources(Section):
    """What one job of a stage asks for. Never part of a shard's key: changing it recomputes nothing."""

    nodes: Count = Field(1, description="Nodes of one job.")
    processes_per_node: Count = Field(1, description="Processes on each node (one per GPU for training).")
    gpus_per_node: int = Field(0, ge=0, description="GPUs on each node of the job.")
    cpus_per_process: Count = Field(2, description="CPU cores, and threads, of each process.")
    memory_gb: Count | None = Field(None, description="Memory of each node, GB; none takes the scheduler's default.")
    time_limit_minutes: Count = Field(240, description="Wall time after which the scheduler ends the job, minutes.")
    parallel_jobs: Count = Field(
        1, description="Most jobs of the stage at a time. A new stage is cut into shards so that all of them have work."
    )
    shards_per_job: Count = Field(
        16, description="Slurm: most shards that one array task works through. Shards are dealt evenly to the jobs."
    )
    infrastructure_retries: int = Field(
        3,
        ge=0,
        description="Times a shard is submitted again after its job was lost or timed out; twice as often after a node "
        "failed, at most once after memory ran out, and ten times as often after it was preempted.",
    )
    exclude_node_after: int = Field(
        3,
        ge=0,
        description="Slurm: a node on which the jobs of so many different shards were lost gets no more; 0 is off.",
    )
    duplicate_stragglers_after: float | None = Field(
        None,
        gt=1.0,
        description="When no job waits any more and one may still start, a shard at work for so many times as long as the "
        "median shard is started once more, on another node; the first result counts. None never does.",
    )


class StageResources(Section):
    """Resources by stage."""

    generation: Resources = Field(Resources(), description="Instruction and response generation.")
    training: Resources = Field(Resources(), description="Warm-up and student training.")
    teacher_update: Resources = Field(
        default_factory=lambda stages: stages["training"],
        description="Teacher update; none takes those of training. The paper's batch of 2 pairs has work for two processes "
        "at most, fewer than a node has GPUs.",
    )
    influence: Resources = Field(Resources(), description="Local data influence.")
    evaluation: Resources = Field(Resources(), description="Held-out loss, and tasks of lm-evaluation-harness.")
    judging: Resources = Field(
        Resources(cpus_per_process=1), description="Questions to an API; its jobs need the network, and no GPU."
    )


class Container(Section):
    """The image of the worker environment, for clusters that run jobs in containers."""

    image: str = Field(description="Image: a path visible on the nodes, or a registry's name as the runtime writes it.")
    runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis",
        description="'pyxis' is Slurm's plugin for enroot (srun --container-image); 'apptainer' runs on the node.",
    )
    mounts: tuple[str, ...] = Field(
        (),
        description="Folders seen inside, as source:target or a path that stays the same; the run folder, models and data "
        "must be among them.",
    )


class Slurm(Section):
    """How jobs are submitted to Slurm."""

    partition: str | None = Field(None, description="Partition; none takes the cluster's default.")
    account: str | None = Field(None, description="Account that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Node features asked for.")
    exclude: str | None = Field(None, description="Nodes never used, as Slurm writes node lists.")
    python: str | None = Field(
        None,
        description="Python of the worker environment on the nodes; none takes the driver's own, or python3 of the "
        "container.",
    )
    setup: tuple[str, ...] = Field((), description="Shell lines run before Python starts, e.g. module load.")
    container: Container | None = Field(None, description="Image that jobs run in; none runs them on the node itself.")
    max_array_size: Count | None = Field(
        None, description="Most tasks in one job array; none asks Slurm (its MaxArraySize minus one)."
    )
    extra: dict[str, str | int | bool] = Field(
        {}, description="More sbatch options by name, e.g. {reservation: night}."
    )
    srun: tuple[str, ...] = Field((), description="More options of srun, as it is given them, e.g. --cpu-bind=cores.")


class Cluster(Section):
    """Where jobs run and what they get."""

    profile: Literal["local", "slurm"] = Field(
        "local", description="'local' runs jobs as processes of this machine, 'slurm' submits them with sbatch."
    )
    resources: StageResources = Field(StageResources(), description="Resources by stage.")
    slurm: Slurm = Field(Slurm(), description="Slurm options; ignored by the local profile.")
    generation_python: str | None = Field(
        None,
        description="Python of another environment for generation jobs (vLLM pins its own torch); none takes the "
        "same as every job.",
    )
    poll_seconds: float = Field(0.5, gt=0.0, description="Pause between looks at the jobs, seconds.")

    @model_validator(mode="after")
    def _local_is_one_node(self) -> "Cluster":
        if self.profile == "local":
            for stage, resources in self.resources:
                if resources.nodes > 1:
                    raise ValueError(
                        f"resources.{stage}.nodes is {resources.nodes}, but profile: local has one node; set nodes: 1 "
                        "or profile: slurm"
                    )
        return self


class Experiment(Section):
    """An experiment: one or more iterations of Montessori-Instruct."""

    name: FolderName = Field("experiment", pattern=RUN_NAME, description="Default name of the run and of its folder.")
    seed: int = Field(0, ge=0, lt=2**31, description="Everything drawn at random follows from this number.")
    iterations: Count = Field(1, description="Teacher updates, one after the other.")
    teacher: Teacher = Field(description="The model that writes the data.")
    student: Student = Field(description="The model that the data trains.")
    seed_pool: DataSource = Field(DataSource(path="builtin"), description="Human-written tasks, as demonstrations.")
    reference: DataSource = Field(DataSource(path="builtin"), description="Examples that influence is measured on.")
    evaluation: DataSource = Field(
        DataSource(path="builtin"), description="Held-out examples; must not overlap the reference set."
    )
    synthesis: Synthesis = Field(Synthesis(), description="Prompting, decoding and filters.")
    warmup: Warmup = Field(Warmup(), description="Warm-up of the student.")
    influence: Influence = Field(Influence(), description="Local data influence.")
    preferences: Preferences = Field(Preferences(), description="Preference pairs.")
    teacher_update: TeacherUpdate = Field(TeacherUpdate(), description="DPO of the teacher.")
    training: Training = Field(Training(), description="Training of the student.")
    nomad: Nomad = Field(Nomad(), description="What is particular to the method nomad.")
    comparison: Comparison = Field(Comparison(), description="What is computed to see the effect.")
    judge: Endpoint | None = Field(
        None, description="The model that judges examples, for methods that ask one, and the answers of benchmarks."
    )
    strong_teacher: Endpoint | None = Field(
        None, description="A stronger teacher behind an API, for the method self_instruct_strong."
    )
    benchmarks: Benchmarks = Field(Benchmarks(), description="What students are measured by beside the held-out loss.")
    zero: Zero = Field(Zero(), description="DeepSpeed ZeRO.")
    cluster: Cluster = Field(Cluster(), description="Where jobs run; changing it recomputes nothing.")

    @model_validator(mode="after")
    def _batches_fit_processes(self) -> "Experiment":
        for section in ("warmup", "teacher_update", "training"):
            self.check_batch(section)
        return self

    def check_batch(self, section: str) -> None:
        """See that the batches of a recipe, named by its path, can be dealt to the processes of its jobs.

        Raises:
            ValueError: they cannot.
        """
        stage = "teacher_update" if section == "teacher_update" else "training"
        resources: Resources = getattr(self.cluster.resources, stage)
        processes = resources.nodes * resources.processes_per_node
        recipe: Optimization = attrgetter(section)(self)
        if recipe.batch_size % (recipe.micro_batch_size * processes):
            raise ValueError(
                f"{section}.batch_size ({recipe.batch_size}) must be a multiple of {section}.micro_batch_size "
                f"({recipe.micro_batch_size}) x {processes} processes; change them, or cluster.resources.{stage}"
            )

    @model_validator(mode="after")
    def _sequential_needs_a_threshold(self) -> "Experiment":
        baseline = self.preferences.baseline
        if self.influence.sequential is not None and baseline in ("median", "prompt"):
            raise ValueError(
                f"influence.sequential decides signs one by one, but preferences.baseline: {baseline} has no threshold until "
                "all are measured; set baseline: student or null_step, or sequential: null"
            )
        return self

    @model_validator(mode="after")
    def _benchmarks_have_a_judge(self) -> "Experiment":
        if self.benchmarks.judged and self.judge is None:
            raise ValueError(
                "benchmarks.alpaca_eval and benchmarks.mt_bench are judged: set judge.model, and judge.base_url if it is not "
                "OpenAI's"
            )
        return self

    def method(self) -> dict[str, Any]:
        """What decides the data of an iteration and its models, as plain data: not the name, where jobs run, how many
        iterations there are, or what students are measured by."""
        content = self.model_dump(mode="json", exclude={"cluster", "name", "iterations", "benchmarks"})
        for name in ("judge", "strong_teacher"):
            endpoint: Endpoint | None = getattr(self, name)
            content[name] = endpoint.identity() if endpoint else None
        return content


Configuration = TypeVar("Configuration", bound=Section)


def read_experiment(path: Path, overrides: tuple[str, ...] = ()) -> Experiment:
    """Read an experiment from YAML and apply `section.key=value` overrides (values are YAML too).

    `path` may be the name of a preset.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit; every field at fault is named.
    """
    path = find_configuration(path)
    return parse_experiment(read_overridden(path, overrides), str(path))


def read_overridden(path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Content of a YAML file with `section.key=value` overrides applied.

    Raises:
        ConfigError: the file is missing or is not YAML, or an override cannot be applied.
    """
    content = _read_yaml(path)
    apply_overrides(content, overrides)
    return content


def apply_overrides(content: dict[str, Any], overrides: tuple[str, ...]) -> None:
    """Set `section.key=value` in plain data.

    Raises:
        ConfigError: an override cannot be applied.
    """
    for override in overrides:
        _apply_override(content, override)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have
        raise ConfigError(
            f"{path}: cannot be read ({getattr(error, 'strerror', error)}); give the path of a configuration file, in UTF-8"
        ) from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, see docs/configuration.md")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Read plain data from YAML; `source` names it in errors.

    Raises:
        ConfigError: it is not YAML, or a key stands twice in one mapping; the message says where.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply for a configuration") from error


class _Loader(yaml.SafeLoader):
    """Plain data; of a key that stands twice, the first would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
                keys.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int | str):
                str(value).encode()  # no message or file could hold thousands of digits, or half of a surrogate pair
            return value
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # e.g. the date 2026-02-30
            raise yaml.MarkedYAMLError(
                problem=f"not a value of its kind ({error}); put text in quotes", problem_mark=node.start_mark
            ) from error


def read_cluster(path: Path) -> Cluster:
    """Read a cluster file: the `cluster` section of an experiment, by itself or under that name.

    `path` may be the name of a preset.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit.
    """
    path = find_configuration(path, "clusters")
    content = _read_yaml(path)
    return parse(Cluster, content.get("cluster", content), f"{path}: the cluster file")


def parse_experiment(content: dict[str, Any], source: str) -> Experiment:
    """Validate plain data; `source` names it in errors."""
    return parse(Experiment, content, f"{source}: the configuration")


def parse(kind: type[Configuration], content: dict[str, Any], source: str) -> Configuration:
    """Validate plain data; `source` names it in errors.

    Raises:
        ConfigError: it does not fit; every field at fault is named.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [f"{source} does not fit:"]
        lines += [f"  {_field_path(problem['loc'])}: {_sentence(problem, kind)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def write_yaml(section: Section, path: Path) -> None:
    """Write any part of a configuration, every default spelled out."""
    with commit(path) as temporary:
        temporary.write_text(to_yaml(section), encoding="utf-8")


def to_yaml(section: Section) -> str:
    """Any part of a configuration as YAML, every default spelled out."""
    content = section.model_dump(mode="json")
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


class _Dumper(yaml.SafeDumper):
    """Texts are read back as they were, those with Unicode's other line breaks included."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Fields in which two plain configurations differ, one `path: before -> after` line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in sorted(before.keys() | after.keys()):
            lines += differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if before == after else [f"{path}: {before!r} -> {after!r}"]


def _apply_override(content: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.key=value, e.g. --set warmup.learning_rate=1e-5")
    value = parse_yaml(text, f"--set {override}")
    if isinstance(value, str) and _EXPONENT.fullmatch(text.strip()):
        value = float(text)  # YAML 1.1 reads 1e-5 (no dot) as text
    node = content
    for key in keys[:-1]:
        child = node.get(key)
        if not (child is None or isinstance(child, dict)):
            raise ConfigError(f"--set {override}: {key} is a value, not a section")
        # A copy: where YAML names a section by an anchor, others are the same one.
        node[key] = dict(child or {})
        node = node[key]
    node[keys[-1]] = value


def _field_path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(whole configuration)"


def _sentence(problem: Any, root: type[Section]) -> str:
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key; remove it or correct its spelling{_suggestion(problem['loc'], root)}"
    if kind == "missing":
        return "missing; this field has no default"
    if kind == "string_pattern_mismatch" and problem["ctx"]["pattern"] == RUN_NAME:
        message = "a name has letters, digits, '.', '_' and '-', at most 80, and begins with a letter or digit"
    return (
        f"{message}; got {_shown.repr(problem['input'])}"
        if not isinstance(problem["input"], dict | BaseModel)
        else message
    )


def _suggestion(location: tuple[int | str, ...], root: type[Section]) -> str:
    import difflib

    model: Any = root
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, Section) else None
        if field is None:
            return ""
        model = field.annotation
    if not (isinstance(model, type) and issubclass(model, Section)):
        return ""
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(model.model_fields)})"
