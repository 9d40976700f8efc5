"""Prompt templates: how a problem is asked, where a response stops, where its answer stands.

A template is one record, which training, evaluation and the grader share. To add one of your own,
write its record into TEMPLATES. Nothing here computes with answers: it is plain string search.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Template:
    """How a problem is asked and where the answer stands; shared by training and evaluation."""

    name: str
    render: Callable[[str, Any], str]  # (problem, tokenizer) -> prompt
    stop: tuple[str, ...]  # strings that end a response; they stay in its text
    extract: Callable[[str], str | None]  # response -> final answer, None if it gives none


# ------------------------------------------------------------------------------------ answers


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds; None without a box. If the last one is unclosed, an
    earlier one does not count. In `\boxed{\boxed{2}}` the last is the inner one."""
    start = text.rfind("\\boxed")  # -1 if there is none: then the next test is false as well
    if not text.startswith("\\boxed{", start):
        return None
    begin = start + len("\\boxed{")
    depth = 1  # of open braces
    for end in range(begin, len(text)):
        if text[end] == "{":
            depth += 1
        elif text[end] == "}":
            depth -= 1
        if depth == 0:
            return text[begin:end]
    return None


def answer_in_tags(text: str) -> str | None:
    """The text after the last `<answer>`, or what its box holds. The format is strict: without
    `</answer>`, or with anything but one space in `</think> <answer>`, the result is None."""
    if "</think> <answer>" not in text or "</answer>" not in text:
        return None
    answer = text.rpartition("<answer>")[2].replace("</answer>", "")
    return last_boxed(answer) if "\\boxed" in answer else answer.strip()


# ------------------------------------------------------------------------------------ prompts


def qwen_math_prompt(problem: str, tokenizer: Any = None) -> str:
    """The chat format of Qwen2.5-Math."""
    return (
        f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def r1_prompt(problem: str, tokenizer: Any = None) -> str:
    """The dialogue of DeepSeek-R1-Zero; the response begins inside `<think>`."""
    return (
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>."
        f"\nUser: {problem}\nAssistant: <think>"
    )


def plain_prompt(problem: str, tokenizer: Any = None) -> str:
    """The problem itself."""
    return problem


def chat_prompt(problem: str, tokenizer: Any) -> str:
    """The tokenizer's own chat format. Raises ValueError if it has none."""
    if not tokenizer.chat_template:
        raise ValueError(
            "template 'chat' needs a chat template, and the tokenizer of "
            f"{tokenizer.name_or_path} has none: choose another --template"
        )
    message = {"role": "user", "content": f"{problem}\n{BOXED}"}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


TEMPLATES: dict[str, Template] = {
    "qwen_math": Template("qwen_math", qwen_math_prompt, (), last_boxed),
    "r1": Template("r1", r1_prompt, ("</answer>",), answer_in_tags),
    "none": Template("none", plain_prompt, (), last_boxed),
    "chat": Template("chat", chat_prompt, (), last_boxed),
}
