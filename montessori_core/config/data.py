"""The source of a data set: where its rows are and how they are read."""

from typing import Literal

from pydantic import Field

from montessori_core.config.section import Count, Probability, Section

DataFormat = Literal["alpaca", "messages", "sharegpt", "prompt_completion"]


class DataSource(Section):
    """Source of a data set, and how its rows are read."""

    path: str = Field(
        description="'builtin' for the built-in set; 'builtin/maths', 'builtin/coding' or 'builtin/facts' for built-in "
        "reference or evaluation examples of one kind; 'builtin/short' for a seed pool of short tasks, for a small teacher, "
        "'builtin/half-coding' or 'builtin/half-maths' for short tasks, half of them of that kind; "
        "a file (.jsonl, .ndjson, .json, .csv, .parquet or .arrow, each also .gz, .zst or .xz); a glob or a folder of such "
        "files, all of one kind, read in the order of their names; a folder that `datasets` saved (save_to_disk); a Hugging "
        "Face data set id, or a folder with such a data set; or an fsspec path, such as s3://bucket/rows.jsonl."
    )
    format: Literal["auto", DataFormat] = Field(
        "auto",
        description="Format of the rows. alpaca: the columns instruction_field, input_field and output_field. messages: a "
        "list of role and content. sharegpt: a list of from and value. prompt_completion: TRL's columns prompt and "
        "completion, as text or as lists of messages. auto: recognised from the first row.",
    )
    subset: str | None = Field(
        None,
        min_length=1,
        description="Subset (configuration) of a Hugging Face data set, such as main of openai/gsm8k; ignored for files. If "
        "not set, its only or default one.",
    )
    split: str = Field(
        "train",
        description="Split of a Hugging Face data set, or of a folder: its files and subfolders are named after splits, or "
        "`datasets` saved it. Ignored for files, globs and folders without such names.",
    )
    revision: str | None = Field(
        None, min_length=1, description="Branch, tag or commit of a Hugging Face data set id. If not set, main."
    )
    limit: Count | None = Field(None, description="Use only the first rows, at most this many. If not set, all rows.")
    instruction_field: str = Field(
        "instruction", description="Column that holds the instruction, or a dotted path to it (task.question)."
    )
    input_field: str = Field("input", description="Column that holds the input; optional in the data.")
    output_field: str = Field(
        "output",
        description="Column that holds the response, or a dotted path to it (answers.0.text); not used for a seed pool.",
    )
    conversation_field: str | None = Field(
        None,
        min_length=1,
        description="Column that holds the list of turns in the formats messages and sharegpt, or a dotted path to it. If "
        "not set, the column messages, conversations or conversation.",
    )
    turns: Literal["all", "first", "last", "refuse"] = Field(
        "all",
        description="What is read of a conversation with several user turns. all: the whole conversation; a seed pool, whose "
        "tasks are single instructions, refuses it. first: its first user turn and the answer. last: its last user turn and "
        "the answer, without the turns before. refuse: an error.",
    )
    system_turn: Literal["keep", "prepend", "drop", "refuse"] = Field(
        "keep",
        description="What happens to a system turn. keep: it stays a turn; where a chat template takes none, its text comes "
        "before the first user turn, followed by a blank line; a seed pool refuses it. prepend: its text always comes "
        "before the first user turn that is read. drop: it is left out. refuse: an error.",
    )
    train_on: Literal["all", "last"] = Field(
        "all",
        description="Which answers of a conversation carry loss, wherever the data is used: as reference or evaluation set, "
        "to measure influence, or to train. all: every answer of the assistant, except those with weight 0 and those in the "
        "column prompt of prompt_completion. last: the last answer alone.",
    )
    drop_bad_rows: bool = Field(
        False,
        description="Leave out rows that cannot be used, count them by reason and list them in bad_rows.jsonl. If false, "
        "the first such row is an error.",
    )
    max_bad_rows: Probability = Field(
        0.01, description="Largest share of the rows that drop_bad_rows may leave out; more are an error."
    )

    def refuses(self, bad_rows: int, rows: int) -> bool:
        """Return whether `bad_rows` of `rows` rows are too many to leave out."""
        return bad_rows > (round(self.max_bad_rows * rows, 6) if self.drop_bad_rows else 0)
