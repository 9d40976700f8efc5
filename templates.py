"""Prompt templates: how a problem is asked, where a response stops, where its answer stands.

A template is one record, which training, evaluation and the grader share. To add one of your own,
write its record into TEMPLATES. Nothing here computes with answers: it is plain string search.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace


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


def answer_in_loose_tags(text: str) -> str | None:
    """As `answer_in_tags`, but `</think>` and what stands between the tags do not matter."""
    if "<answer>" not in text or "</answer>" not in text:
        return None
    return answer_in_tags("</think> <answer>" + text.rpartition("<answer>")[2])


def qwen_math_prompt(problem: str) -> str:
    """The chat format of Qwen2.5-Math."""
    return (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n" + problem + "<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


DIALOGUE = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant "
    "solves it. The Assistant first thinks about the reasoning process in the mind and then "
    "provides the User with the answer. The reasoning process is enclosed within <think> "
    "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>."
)


def r1_prompt(problem: str) -> str:
    """The dialogue of DeepSeek-R1-Zero; the response begins inside `<think>`."""
    return f"{DIALOGUE}\nUser: {problem}\nAssistant: <think>"


def orz_prompt(problem: str) -> str:
    """Open-Reasoner-Zero's prompt, to score its published models."""
    return (
        f"{DIALOGUE} User: You must put your answer inside <answer> </answer> tags, i.e., <answer> "
        "answer here </answer>. And your final answer will be extracted automatically by the "
        f"\\boxed{{}} tag.\nThis is the problem:\n{problem}\nAssistant: <think>"
    )


def prime_prompt(problem: str) -> str:
    """The prompt of Eurus-2-7B-PRIME-Zero, to score it."""
    return (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. The reasoning process and answer are enclosed within "
        "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
        f"process here </think> <answer> answer here </answer>. User: {problem}\n\nPresent the "
        "answer in LaTex format: \\boxed{Your answer}. Assistant:"
    )


@dataclass(frozen=True)
class Template:
    """How a problem is asked and where the answer stands; shared by training and evaluation."""

    name: str
    render: Callable[[str], str]  # problem -> prompt
    stop: tuple[str, ...]  # strings that end a response; they stay in its text
    extract: Callable[[str], str | None]  # response -> final answer, None if it gives none


def needs_tokenizer(problem: str) -> str:
    """Stands in for the chat format, which each tokenizer has of its own: see find_template."""
    raise ValueError("template 'chat' is the tokenizer's own: take it from find_template")


TEMPLATES: dict[str, Template] = {
    "qwen_math": Template("qwen_math", qwen_math_prompt, (), last_boxed),
    "r1": Template("r1", r1_prompt, ("</answer>",), answer_in_tags),
    "none": Template("none", str, (), last_boxed),  # the prompt is the problem itself
    "orz": Template("orz", orz_prompt, (), answer_in_loose_tags),
    "prime": Template("prime", prime_prompt, (), last_boxed),
    "chat": Template("chat", needs_tokenizer, (), last_boxed),
}


def find_template(name: str, tokenizer) -> Template:
    """The template of this name; "chat" is the tokenizer's own, asked for a boxed answer.

    Raises ValueError if there is no such template or the tokenizer has none.
    """
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}: give {', '.join(TEMPLATES)}")
    if name != "chat":
        return TEMPLATES[name]
    if not tokenizer.chat_template:
        others = ", ".join(other for other in TEMPLATES if other != "chat")
        raise ValueError(
            f"template 'chat' needs a chat template, and the tokenizer of "
            f"{tokenizer.name_or_path} has none: give {others}"
        )

    def render(problem: str) -> str:
        request = "Please reason step by step, and put your final answer within \\boxed{}."
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{problem}\n{request}"}],
            tokenize=False,
            add_generation_prompt=True,
        )

    return replace(TEMPLATES["chat"], render=render)
