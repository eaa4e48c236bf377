"""NOMAD (Chen et al., 2024): a teacher is trained on conversations and generates new ones without a prompt.

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
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.models.control_tokens import encode_plain, encode_rendered
from montessori_core.models.rendering import text_beginning
from montessori_core.models.thinking import split_answer
from montessori_core.program import Recorder, RowProgram
from montessori_core.synthesis.filtering import CODE, INCOMPLETE, REPETITION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER = "User:"
"""The beginning of a conversation. No trailing space: tokenizers merge it with the next word."""
ASSISTANT = "\nAssistant:"
NEXT_TURN = re.compile(r"\n(?:User|Assistant):")
_REPEATED = re.compile(r"(?<!\w)(\w+(?:\W+\w+){0,4}?)(?:\W+\1){3}(?!\w)", re.IGNORECASE)
_CODE = re.compile(
    r"```|#include\b|\bdef \w+\(|\bconsole\.log\b|\bpublic static\b|</\w+>|^\s*import \w+|\bselect\b.+\bfrom\b.+;|"
    r"\b(?:python|javascript|typescript|java|html|css|sql|bash|c\+\+|pseudocode|source code|programming|code snippet)(?!\w)",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Conversation:
    """The first turn and the first answer of a generated conversation."""

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
        tokenizer: a tokenizer with an end token.
        instruction: the user's turn.
        response: the assistant's turn.
        max_length: maximum number of tokens; the end is truncated.
        finished: whether the response is complete, so that its end token is trained as well.
        mask_prompt: whether only the response carries loss, as usual; in the paper the instruction does as well.
    """
    # Tokenized in parts, so that the beginning has the same tokens as in generation.
    beginning, _ = encode_rendered(tokenizer, f"{text_beginning(tokenizer)}{USER}")
    request, answer = (encode_plain(tokenizer, f" {text}") for text in (instruction, response))
    prompt = [*beginning, *request, *encode_plain(tokenizer, ASSISTANT)]
    labels = [*([IGNORED] * len(prompt) if mask_prompt else prompt), *answer]
    end = tokenizer.eos_token_id
    ids = [*prompt, *answer, end]
    labels.append(end if finished else IGNORED)
    return Encoded(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)


def read_conversation(text: str, finish_reason: str) -> Conversation | None:
    """Return the first round of the text generated after `USER`; None if it is incomplete.

    The first round is complete if a second one follows or the text ends with the end token. Thinking before the answer is
    no part of the response.
    """
    instruction, separator, remainder = text.partition(ASSISTANT)
    next_turn = NEXT_TURN.search(remainder)
    response = split_answer(remainder[: next_turn.start()] if next_turn else remainder)[1]
    complete = bool(separator) and (next_turn is not None or finish_reason == "stop")
    if not complete or not instruction.strip() or not response.strip() or NEXT_TURN.search(instruction):
        return None
    return Conversation(instruction.strip(), response.strip())


def judge_conversation(conversation: Conversation | None) -> str | None:
    """Return why a conversation is rejected, regardless of other conversations (Appendix A.5); None if it passes."""
    if conversation is None:
        return INCOMPLETE
    texts = (conversation.instruction, conversation.response)
    if any(_REPEATED.search(text) for text in texts):
        return REPETITION
    return CODE if any(_CODE.search(text) for text in texts) else None


class RealExamples:
    """Features of real examples, normalized once for all synthetic examples."""

    def __init__(self, features: np.ndarray) -> None:
        """Centre and normalize the features.

        Args:
            features: [real examples, features]. Their mean is subtracted from all features: hidden states of language
                models have similar directions for all texts.
        """
        self._mean = features.mean(axis=0) if len(features) > 1 else 0.0
        self._normalized = self._normalize(features)

    def norm_sim(self, synthetic: np.ndarray) -> np.ndarray:
        """Return the similarity of each synthetic example to its nearest real one (Section 4.3).

        Near 1 an example repeats a real one, near 0 it is unrelated to all; the paper wants most of a set in between.

        Args:
            synthetic: [examples, features].

        Returns:
            [examples] largest inner products of features of norm 1.
        """
        return np.asarray((self._normalize(synthetic) @ self._normalized.T).max(axis=1))

    def _normalize(self, features: np.ndarray) -> np.ndarray:
        centred = features - self._mean
        return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12))


def open_norm_sim(settings: programs.Similarity, inputs: Mapping[str, Path]) -> RowProgram[TaskRow]:
    """Load the student and the real examples; the features of a text are the student's mean last hidden state.

    Inputs: `student`; `real` (tasks). The result is a table of schema `SIMILARITY`.
    """
    import torch

    from montessori_core.models.device import compute_device
    from montessori_core.models.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(inputs["student"]))
    device = compute_device()
    model = load_model(str(inputs["student"]), torch.float32).to(device).eval()
    beginning, _ = encode_rendered(tokenizer, text_beginning(tokenizer))

    @torch.inference_mode()
    def features(text: str) -> np.ndarray:
        ids = [*beginning, *encode_plain(tokenizer, text)][: settings.max_length]
        states = model(input_ids=torch.tensor([ids], device=device), output_hidden_states=True).hidden_states[-1]
        return np.asarray(states[0].mean(dim=0).cpu().numpy())

    real = RealExamples(
        np.stack([features(f"{task.instruction}\n{task.response}") for task in load_tasks(inputs["real"])])
    )

    def compute(rows: list[TaskRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for position, row in enumerate(rows):
            example = features(f"{row['instruction']}\n{row['response']}")
            [similarity] = real.norm_sim(example[None])
            recorder.finish(position, [{"example_id": row["example_id"], "norm_sim": float(similarity)}])
            recorder.progress(position + 1)

    return RowProgram(SIMILARITY, compute)
