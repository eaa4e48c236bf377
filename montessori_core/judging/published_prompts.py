"""The judges' prompts of MT-Bench and AlpacaEval 2.0, verbatim.

Both are licensed under the Apache License, Version 2.0; its text is in LICENSE at the root of this project.

* MT-Bench: `single-v1`, `single-math-v1` and their `-multi-turn` of fastchat/llm_judge/data/judge_prompts.jsonl,
  https://github.com/lm-sys/FastChat at 0e6d3e4.
* AlpacaEval: src/alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt, the prompt of
  `weighted_alpaca_eval_gpt4_turbo`, https://github.com/tatsu-lab/alpaca_eval at cd543a1. Copyright 2023 Yann Dubois and
  Xuechen Li and Rohan Taori and Tianyi Zhang and Ishaan Gulrajani. Changed: split into messages, as AlpacaEval's code does.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A system message and the template of a user message."""

    system: str
    template: str

    def fill(self, **texts: str) -> str:
        """Return the user message. Texts may hold braces and names of the template's fields."""
        return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda match: texts[match[1]], self.template)


MT_BENCH = {
    (1, False): Prompt(
        "You are a helpful assistant.",
        """\
[Instruction]
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user \
question displayed below. Your evaluation should consider factors such as the helpfulness, relevance, accuracy, \
depth, creativity, and level of detail of the response. Begin your evaluation by providing a short explanation. Be \
as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by \
strictly following this format: "[[rating]]", for example: "Rating: [[5]]".

[Question]
{question}

[The Start of Assistant's Answer]
{answer}
[The End of Assistant's Answer]""",
    ),
    (1, True): Prompt(
        "You are a helpful assistant.",
        """\
[Instruction]
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user \
question displayed below. Your evaluation should consider correctness and helpfulness. You will be given a \
reference answer and the assistant's answer. Begin your evaluation by comparing the assistant's answer with the \
reference answer. Identify and correct any mistakes. Be as objective as possible. After providing your explanation, \
you must rate the response on a scale of 1 to 10 by strictly following this format: "[[rating]]", for example: \
"Rating: [[5]]".

[Question]
{question}

[The Start of Reference Answer]
{ref_answer_1}
[The End of Reference Answer]

[The Start of Assistant's Answer]
{answer}
[The End of Assistant's Answer]""",
    ),
    (2, False): Prompt(
        """\
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user \
question displayed below. Your evaluation should consider factors such as the helpfulness, relevance, accuracy, \
depth, creativity, and level of detail of the response. You evaluation should focus on the assistant's answer to \
the second user question. Begin your evaluation by providing a short explanation. Be as objective as possible. \
After providing your explanation, you must rate the response on a scale of 1 to 10 by strictly following this \
format: "[[rating]]", for example: "Rating: [[5]]".

""",
        """\
<|The Start of Assistant A's Conversation with User|>

### User:
{question_1}

### Assistant A:
{answer_1}

### User:
{question_2}

### Assistant A:
{answer_2}

<|The End of Assistant A's Conversation with User|>""",
    ),
    (2, True): Prompt(
        """\
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user \
question. Your evaluation should consider correctness and helpfulness. You will be given a reference answer and the \
assistant's answer. You evaluation should focus on the assistant's answer to the second question. Begin your \
evaluation by comparing the assistant's answer with the reference answer. Identify and correct any mistakes. Be as \
objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by \
strictly following this format: "[[rating]]", for example: "Rating: [[5]]".

""",
        """\
<|The Start of Reference Answer|>

### User:
{question_1}

### Reference answer:
{ref_answer_1}

### User:
{question_2}

### Reference answer:
{ref_answer_2}

<|The End of Reference Answer|>


<|The Start of Assistant A's Conversation with User|>

### User:
{question_1}

### Assistant A:
{answer_1}

### User:
{question_2}

### Assistant A:
{answer_2}

<|The End of Assistant A's Conversation with User|>""",
    ),
}
"""Prompts by (turn, whether there is a reference answer)."""

ALPACA_EVAL = Prompt(
    """\
You are a highly efficient assistant, who evaluates and selects the best large language model (LLMs) based on the \
quality of their responses to a given instruction. This process will be used to create a leaderboard reflecting the \
most accurate and human-preferred answers.""",
    '''\
I require a leaderboard for various large language models. I'll provide you with prompts given to these models and \
their corresponding outputs. Your task is to assess these responses, and select the model that produces the best \
output from a human perspective.

## Instruction

{
    "instruction": """{instruction}""",
}

## Model Outputs

Here are the unordered outputs from the models. Each output is associated with a specific model, identified by a \
unique model identifier.

{
    {
        "model_identifier": "m",
        "output": """{output_1}"""
    },
    {
        "model_identifier": "M",
        "output": """{output_2}"""
    }
}

## Task

Evaluate the models based on the quality and relevance of their outputs, and select the model that generated the \
best output. Answer by providing the model identifier of the best model. We will use your output as the name of the \
best model, so make sure your output only contains one of the following model identifiers and nothing else (no \
quotes, no spaces, no new lines, ...): m or M.

## Best Model Identifier''',
)
