"""Facts about prompts, stops and extraction."""

import time

import pytest

from support.data import load_tokenizer
from templates import TEMPLATES, find_template, last_boxed

QWEN = (
    "<|im_start|>system\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n"
    "What is {1} + $2$?\\n<|im_end|>\n"
    "<|im_start|>assistant\n"
)
R1 = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves"
    " it. The Assistant first thinks about the reasoning process in the mind and then provides the"
    " User with the answer. The reasoning process is enclosed within <think> </think> and answer is"
    " enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here"
    " </think> <answer> answer here </answer>.\n"
    "User: What is {1} + $2$?\\n\n"
    "Assistant: <think>"
)


@pytest.mark.parametrize(
    "name, prompt, stop",
    [
        ("qwen_math", QWEN, ()),
        ("r1", R1, ("</answer>",)),
        ("none", "What is {1} + $2$?\\n", ()),
    ],
)
def test_templates_are_byte_exact(name, prompt, stop):
    template = TEMPLATES[name]
    assert template.render("What is {1} + $2$?\\n") == prompt
    assert (template.name, template.stop) == (name, stop)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("\\boxed{70}", "70"),
        ("\\boxed{70} then \\boxed{\\frac{1}{2}} end}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{2}}", "2"),
        ("\\boxed{}", ""),
        ("\\boxed{70} then \\boxed{7", None),
        ("\\boxed{70} then \\boxed 7", None),
        ("\\boxed {70}", None),
        ("\\boxed 7", None),
        ("\\fbox{70}", None),
        ("boxed{70}", None),
        ("the answer is 70", None),
        ("", None),
    ],
)
def test_only_the_last_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer
    assert TEMPLATES["qwen_math"].extract(text) == TEMPLATES["none"].extract(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (" so </think> <answer> 70 </answer>", "70"),
        (" so </think> <answer> \\boxed{70} </answer>", "70"),
        (" \\boxed{1} </think> <answer> 70 </answer>", "70"),
        (" so </think> <answer> 71 </answer> <answer> 70 </answer>", "70"),
        (" so </think> <answer> \\boxed{70 </answer>", None),
        (" so </think> <answer> 70", None),
        (" so </think>\n<answer> 70 </answer>", None),
        (" so </think><answer> 70 </answer>", None),
        (" \\boxed{70}", None),
    ],
)
def test_an_r1_answer_stands_in_its_tags(text, answer):
    assert TEMPLATES["r1"].extract(text) == answer


def test_extraction_takes_linear_time():
    start = time.monotonic()
    assert last_boxed("\\boxed{" + "{" * 1_000_000) is None
    assert last_boxed("\\boxed{1} " * 30_000) == "1"
    assert TEMPLATES["r1"].extract("</think> <answer>" * 20_000 + "</answer>") == ""
    assert time.monotonic() - start < 10


TAGS = (
    "The reasoning process is enclosed within <think> </think> and answer is enclosed within "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>."
)


def test_templates_of_published_models_ask_as_these_were_trained():
    orz, prime = TEMPLATES["orz"], TEMPLATES["prime"]
    assert orz.render("1+1?").endswith(
        TAGS + " User: You must put your answer inside <answer> </answer> tags, i.e., <answer> "
        "answer here </answer>. And your final answer will be extracted automatically by the "
        "\\boxed{} tag.\nThis is the problem:\n1+1?\nAssistant: <think>"
    )
    assert orz.extract("so</think><answer>it is \\boxed{2}</answer>") == "2"
    assert orz.extract("so</think>\n<answer> 2 </answer>") == "2"
    assert orz.extract("\\boxed{2}") is orz.extract("<answer> \\boxed{2}") is None
    assert prime.render("1+1?").endswith(
        "</answer>. User: 1+1?\n\nPresent the answer in LaTex format: \\boxed{Your answer}. "
        "Assistant:"
    )
    assert prime.extract("\\boxed{2}") == "2"


def test_the_chat_template_is_the_tokenizers_own(toy):
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = find_template("chat", tokenizer)
    assert chat.render("1+1?") == (
        "[user]1+1?\nPlease reason step by step, and put your final "
        "answer within \\boxed{}.[assistant]"
    )
    assert (chat.name, chat.extract("\\boxed{2}")) == ("chat", "2")
