"""NOMAD (Chen et al., 2024): a teacher trained on whole conversations writes them from the bare beginning of one.

Conversations are plain text, as in the paper's Section 4.1: "User: [prompt] Assistant: [response]".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from montessori_core import programs
from montessori_core.data.rows import TaskRow
from montessori_core.data.sources import load_tasks
from montessori_core.data.tables import SIMILARITY
from montessori_core.models.chat import IGNORED, Encoded, encode_plain, encode_rendered, text_beginning
from montessori_core.program import Recorder, RowProgram
from montessori_core.synthesis.filters import CODE, INCOMPLETE, REPETITION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


USER = "User:"
"""What a conversation begins with; no blank at its end, which tokenizers join to the word that follows."""
_ASSISTANT = "\nAssistant:"
_NEXT = re.compile(r"\n(?:User|Assistant):")
_REPEATED = re.compile(r"(?<!\w)(\w+(?:\W+\w+){0,4}?)(?:\W+\1){3}(?!\w)", re.IGNORECASE)
_CODE = re.compile(
    r"```|#include\b|\bdef \w+\(|\bconsole\.log\b|\bpublic static\b|</\w+>|^\s*import \w+|\bselect\b.+\bfrom\b.+;|"
    r"\b(?:python|javascript|typescript|java|html|css|sql|bash|c\+\+|pseudocode|source code|programming|code snippet)(?!\w)",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Conversation:
    """The first turn and the first answer of what a teacher wrote."""

    instruction: str
    response: str


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    instruction: str,
    response: str,
    max_length: int,
    finished: bool = True,
    mask_prompt: bool = False,
) -> Encoded:
    """Tokenize a conversation for the training of the teacher.

    Args:
        tokenizer: any with an end token.
        instruction: what the user says.
        response: what the assistant says.
        max_length: tokens kept; the end is cut.
        finished: the response is whole, so its end token is trained, too.
        mask_prompt: only the response carries loss, as is usual; the paper's point is that the instruction should.
    """
    # Piece by piece, so that the beginning has the very tokens that generation begins with.
    beginning, _ = encode_rendered(tokenizer, f"{text_beginning(tokenizer)}{USER}")
    request, answer = (encode_plain(tokenizer, f" {text}") for text in (instruction, response))
    prompt = [*beginning, *request, *encode_plain(tokenizer, _ASSISTANT)]
    labels = [*([IGNORED] * len(prompt) if mask_prompt else prompt), *answer]
    end = tokenizer.eos_token_id
    whole = [*prompt, *answer, end]
    labels.append(end if finished else IGNORED)
    return Encoded(whole[:max_length], labels[:max_length], truncated=len(whole) > max_length)


def read_conversation(text: str, finish_reason: str) -> Conversation | None:
    """The first round of what was written after `USER`; None if it is not complete.

    A second round shows that the first had ended; without one, the text has to end by itself.
    """
    instruction, separator, rest = text.partition(_ASSISTANT)
    following = _NEXT.search(rest)
    response = rest[: following.start()] if following else rest
    complete = bool(separator) and (following is not None or finish_reason == "stop")
    if not complete or not instruction.strip() or not response.strip() or _NEXT.search(instruction):
        return None
    return Conversation(instruction.strip(), response.strip())


def judge_conversation(conversation: Conversation | None) -> str | None:
    """Why a conversation is dropped, whatever the others are (Appendix A.5); None if it is not."""
    if conversation is None:
        return INCOMPLETE
    texts = (conversation.instruction, conversation.response)
    if any(_REPEATED.search(text) for text in texts):
        return REPETITION
    return CODE if any(_CODE.search(text) for text in texts) else None


def norm_sim(synthetic: np.ndarray, real: np.ndarray) -> np.ndarray:
    """How near each synthetic example is to its nearest real one (Section 4.3).

    Near 1 it repeats what is there, near 0 it has nothing to do with it; the paper wants most of a set in the middle.

    Args:
        synthetic: [examples, features].
        real: [real examples, features]. What they have in common is taken off all features first: hidden states of
            language models point in much the same direction whatever the text.

    Returns:
        [examples] largest inner products of features of norm 1.
    """
    common = real.mean(axis=0) if len(real) > 1 else 0.0

    def directions(features: np.ndarray) -> np.ndarray:
        centred = features - common
        return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12))

    return np.asarray((directions(synthetic) @ directions(real).T).max(axis=1))


def open_norm_sim(settings: programs.Similarity, inputs: Mapping[str, Path]) -> RowProgram[TaskRow]:
    """Load the student, whose mean last hidden state stands for a text, and the real examples once.

    Inputs: `student`; `real` (tasks). The result is a table of schema `SIMILARITY`.
    """
    import torch

    from montessori_core.models.device import compute_device
    from montessori_core.models.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(inputs["student"]))
    device = compute_device()
    model = load_model(str(inputs["student"]), torch.float32).to(device).eval()

    @torch.inference_mode()
    def features(text: str) -> np.ndarray:
        ids = encode_plain(tokenizer, text)[: settings.max_length]
        states = model(input_ids=torch.tensor([ids], device=device), output_hidden_states=True).hidden_states[-1]
        found: np.ndarray = states[0].mean(dim=0).cpu().numpy()
        return found

    real = np.stack([features(f"{task.instruction}\n{task.response}") for task in load_tasks(inputs["real"])])

    def compute(rows: list[TaskRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for position, row in enumerate(rows):
            example = features(f"{row['instruction']}\n{row['response']}")
            [nearest] = norm_sim(example[None], real)
            recorder.finish(position, [{"example_id": row["example_id"], "norm_sim": float(nearest)}])
            recorder.progress(position + 1)

    return RowProgram(SIMILARITY, compute)
