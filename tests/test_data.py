"""Prompts and problems: templates, what is read of a dataset, and in which order it is used.

What cannot be used is refused before a model loads, with what to do.
"""

import itertools
import string
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, GemmaTokenizer, LlamaTokenizer

import support.run
from drgrpo import PRESETS
from support.data import (
    Problem,
    derive_seed,
    golds_of,
    level_of,
    load_data,
    load_problems,
    load_tokenizer,
    prompt_ids,
    step_problems,
    unreadable_golds,
)
from support.run import prepare
from templates import TEMPLATES, last_boxed
from tests.helpers import TOY, tiny_model, write_jsonl

# ------------------------------------------------------------------------------ templates

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


@pytest.mark.parametrize("name, prompt, stop", [
    ("qwen_math", QWEN, ()),
    ("r1", R1, ("</answer>",)),
    ("none", "What is {1} + $2$?\\n", ()),
])  # fmt: skip
def test_prompts_are_those_of_the_paper_to_the_byte(name, prompt, stop):
    template = TEMPLATES[name]
    assert template.render("What is {1} + $2$?\\n", None) == prompt
    assert (template.name, template.stop) == (name, stop)


@pytest.mark.parametrize("text, answer", [
    ("\\boxed{70}", "70"),
    ("\\boxed{70} then \\boxed{\\frac{1}{2}} end}", "\\frac{1}{2}"),
    ("\\boxed{\\boxed{2}}", "2"),
    ("\\boxed{}", ""),
    ("\\boxed{70} then \\boxed{7", None),
    ("\\boxed {70}", None),
    ("the answer is 70", None),
    ("", None),
    ("\\boxed{" + "{" * 1_000_000, None),  # in a time that grows with the length
])  # fmt: skip
def test_only_the_last_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer
    assert {TEMPLATES[name].extract(text) for name in ("qwen_math", "none", "chat")} == {answer}


@pytest.mark.parametrize("text, answer", [
    (" so </think> <answer> 70 </answer>", "70"),
    (" so </think> <answer> \\boxed{70} </answer>", "70"),
    (" \\boxed{1} </think> <answer> 70 </answer>", "70"),
    (" so </think> <answer> 71 </answer> <answer> 70 </answer>", "70"),
    (" so </think> <answer> \\boxed{70 </answer>", None),
    (" so </think> <answer> 70", None),
    (" so </think>\n<answer> 70 </answer>", None),
    (" so </think><answer> 70 </answer>", None),
    (" \\boxed{70}", None),
])  # fmt: skip
def test_an_r1_answer_stands_in_its_tags(text, answer):
    assert TEMPLATES["r1"].extract(text) == answer


# ------------------------------------------------------------------------------ special tokens


def new_tokenizer(kind, folder, chat_template):
    """One that writes BOS before every text."""
    tokens = [*SPECIAL[kind], "▁", "\n", *string.printable[:94]]
    vocab = {token: index for index, token in enumerate(tokens)}
    kind(vocab=vocab, add_bos_token=True, chat_template=chat_template).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


SPECIAL = {
    LlamaTokenizer: ["<unk>", "<s>", "</s>"],
    GemmaTokenizer: ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
}
CHAT = "{{ bos_token }}user:\n{{ messages[0]['content'] }}\n"
CHAT += "{% if add_generation_prompt %}model:\n{% endif %}"


@pytest.mark.parametrize("chat", [CHAT, CHAT.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["none", "chat", "r1"])
def test_a_prompt_has_one_bos_whoever_writes_it(tmp_path, kind, name, chat):
    tokenizer = new_tokenizer(kind, tmp_path, chat)
    ids = prompt_ids(tokenizer, TEMPLATES[name].render("1 + 2 =", tokenizer))
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # it would write a second one
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_prompt_has_the_ids_that_the_tokenizers_own_chat_gives(tmp_path):
    tokenizer = new_tokenizer(GemmaTokenizer, tmp_path, CHAT)
    request = "1 + 2 =\nPlease reason step by step, and put your final answer within \\boxed{}."
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=True
    )
    rendered = TEMPLATES["chat"].render("1 + 2 =", tokenizer)
    assert prompt_ids(tokenizer, rendered) == own["input_ids"]


def test_a_tokenizer_that_ends_any_text_in_eos_does_not_end_the_prompt(tokenizer):
    plain = prompt_ids(tokenizer, "1+1")
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    assert prompt_ids(tokenizer, "1+1" + eos) == [*plain, eos_id], "the template's own stays"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, eos_id)]
    )
    assert tokenizer("1+1")["input_ids"] == [*plain, eos_id]
    assert prompt_ids(tokenizer, "1+1") == plain


# ------------------------------------------------------------------------------ problems


@pytest.fixture
def tokenizer(toy):
    """The toy's, made anew: a test may change it."""
    return load_tokenizer(str(toy / "model"), 100)


def test_prompt_and_response_must_fit_into_the_models_context(toy):
    model = str(toy / "model")
    longest = AutoConfig.from_pretrained(model).max_position_embeddings
    load_tokenizer(model, longest)
    with pytest.raises(ValueError, match=f"is {longest}: lower --max-prompt-tokens"):
        load_tokenizer(model, longest + 1)


def saved(data, kind, folder):
    """The path of a dataset that is stored in this way."""
    file = str(folder / f"data.{kind}")
    if kind == "jsonl":
        data.to_json(file)
    elif kind == "parquet":
        data.to_parquet(file)
    elif kind == "folder":
        data.save_to_disk(file)
    else:
        DatasetDict({"other": data.select([0]), "train": data}).save_to_disk(file)
    return file


KINDS = ["jsonl", "parquet", "folder", "folder of splits"]


@pytest.mark.parametrize("kind", KINDS)
def test_problems_are_read_filtered_and_counted(tokenizer, tmp_path, kind):
    rows = {
        "question": ["What is 1+1?\n", "2+2 " * 90, "3+3", "4+4", "5+5", "6+6"],
        "answer": ["2", "4", " ", "8", "long story #### 1,010", "12"],
        "level": ["Level 3", "3", "3", "Level 1", "5", "Level ?"],
    }
    file = saved(Dataset.from_dict(rows), kind, tmp_path)
    settings = dict(levels=(3, 5), problem_column="question", answer_marker="####")
    first = rows["question"][0]
    longest = len(tokenizer(first)["input_ids"])
    problems, dropped = load_problems(file, tokenizer, TEMPLATES["none"], longest, **settings)
    found = [(p.prompt, p.text, p.answers) for p in problems]
    assert found == [(first, first, ["2"]), ("5+5", "5+5", ["1,010"])]
    assert dropped == {"level": 2, "no_answer": 1, "too_long": 1}
    assert problems[0].prompt_ids == tokenizer(first)["input_ids"]
    assert problems[1].row == {"question": "5+5", "answer": rows["answer"][4], "level": "5"}


def test_levels_may_be_numbers():
    rows = [{"level": level} for level in (5, "5", "Level 5", "Level ?", None)]
    assert [level_of(row) for row in rows] == [5, 5, 5, None, None]


def test_a_split_that_a_folder_does_not_have_is_named_with_those_it_has(tokenizer, tmp_path):
    data = Dataset.from_dict({"problem": ["1+1"], "answer": ["2"]})
    folder = saved(data, "folder of splits", tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; it has 'other', 'train'"):
        load_problems(folder, tokenizer, TEMPLATES["none"], 64, split="test")


LARGE = '{"problem": "1", "answer": 123456789012345678901234567890}\n'
MIXED = '{"problem": "1", "answer": "007"}\n{"problem": "2", "answer": ["1", "2"]}\n'


@pytest.mark.parametrize("name, content, message", [
    ("d.jsonl", "", "d.jsonl is empty"),
    ("d.jsonl", '{"problem": "1", "answer": "2"}\n\n{"problem": oops}\n', "line 3 is not JSON"),
    ("d.json", "{", "cannot read .*d.json"),
    ("d.jsonl", '{"question": "1"}', "no column problem, answer; it has question.* --problem-col"),
    ("d.jsonl", '{"problem": 1, "answer": "1"}', "column problem must hold text, not 1"),
    ("d.jsonl", '{"problem": "1", "answer": {"a": 1}}', "answer: a gold must be"),
    ("d.jsonl", LARGE, r"answer: 1\.2\d*e\+29 may be rounded. Store such large numbers as text"),
    ("d.jsonl", MIXED, "column answer has text in some rows and numbers or lists in others"),
    ("d.jsonl", '{"problem": "1", "answer": NaN}', "no usable problem; .*'no_answer': 1"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_with_the_cause(
    tokenizer, tmp_path, name, content, message
):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_problems(str(tmp_path / name), tokenizer, TEMPLATES["none"], 64)


def test_an_answer_is_cut_at_the_last_marker_only_where_one_is_set():
    story = "a #### b #### 3"
    assert golds_of(story, None, "here") == [story]
    assert golds_of(story, "####", "here") == ["3"]
    assert golds_of(["#### 5", "6"], "####", "here") == ["#### 5", "6"]
    assert golds_of(4, "####", "here") == ["4"]
    markers = {name: config.answer_marker for name, (_, config) in PRESETS.items()}
    assert markers.pop("gsm8k-0.5b") == "####" and set(markers.values()) == {None}


def test_rows_dropped_from_the_held_out_problems_are_counted_too(toy, tmp_path):
    rows = [{"problem": "1+1", "answer": "2"}, {"problem": "2+2", "answer": " "}]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    _, _, problems, dropped = load_data(replace(TOY, eval_dataset=held_out))
    assert len(problems) == 1 and (dropped["eval_no_answer"], dropped["no_answer"]) == (1, 0)


def test_a_reward_of_ones_own_gets_every_column_as_it_is(toy, tmp_path):
    rows = [{"problem": f"1+{i}", "answer": {"any": "thing"}, "limit": i} for i in range(3)]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    config = replace(TOY, dataset=file, eval_dataset=None, reward="FILE.py:f")
    _, problems, _, dropped = load_data(config)
    assert [problem.row for problem in problems] == rows
    assert [problem.answers for problem in problems] == [[]] * 3 and dropped["no_answer"] == 0


def test_golds_that_mean_nothing_to_the_grader_are_counted_before_the_run(toy, monkeypatch, capsys):
    monkeypatch.chdir(toy.parents[1])
    golds = ["7", "$t(0,4]$", "\\frac{1}{2}"]
    problems = [Problem("", [], [gold], "") for gold in golds]
    assert unreadable_golds(problems).startswith("1 of 3 golds that were tried have no meaning")
    assert unreadable_golds([problems[0], problems[2]]) is None
    monkeypatch.setattr(support.run, "unreadable_golds", lambda problems: "a message")
    monkeypatch.setattr(support.run, "check_folder", lambda *given: None)
    prepare(TOY)
    assert "train.jsonl: a message" in capsys.readouterr().out


# ------------------------------------------------------------- refused before a model loads


@pytest.fixture
def no_model(toy_here, monkeypatch, tmp_path):
    """Fail where a model is built, even a tiny one. What the run makes is in tmp_path."""
    fail = mock.Mock(side_effect=AssertionError("a model was built"))
    monkeypatch.setattr(support.run, "check_model", fail)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("settings, message", [
    ({"model": "runs/no/such/model"}, "no model at.*`python toy.py` makes the toy's"),
    ({"model": "pickled"}, r"pickled has no \*.safetensors file: .* save_pretrained"),
    ({"dataset": "nowhere.jsonl"}, "no file nowhere.jsonl: .*`python toy.py` makes the toy's"),
    ({"dataset": "nowhere.arrow"}, "no file nowhere.arrow"),
    ({"problem_column": "question"}, "has problem, answer"),
    ({"levels": (3,)}, "no column level"),
    ({"max_prompt_tokens": 1}, "no usable problem"),
    ({"template": "chat"}, "has none: choose another --template"),
    ({"reward": "nowhere.py:f"}, "--reward 'nowhere.py:f'"),
    # data of one's own, while the preset's held-out problems are left
    ({"dataset": "own.jsonl", "problem_column": "q"}, "--eval-dataset: .*column q.*-dataset None"),
])  # fmt: skip
def test_wrong_inputs_are_found_before_a_model_loads(
    no_model, tokenizer, tmp_path, settings, message
):
    write_jsonl(tmp_path / "own.jsonl", [{"q": "1+1", "answer": "2"}])
    tiny_model(len(tokenizer)).config.save_pretrained("pickled")
    tokenizer.save_pretrained("pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=message):
        prepare(replace(TOY, **settings))


@pytest.mark.parametrize("part", ["dataset", "eval_dataset"])
def test_a_reward_that_fails_on_a_first_row_is_found_before_a_model_loads(
    no_model, rewards, tmp_path, part
):
    files = {}
    for key in ("dataset", "eval_dataset"):
        problem = "raise" if key == part else "fine"
        files[key] = write_jsonl(tmp_path / f"{key}.jsonl", [{"problem": problem}])
    config = replace(TOY, reward=f"{rewards}:on_the_first_row", **files)
    with pytest.raises(ValueError, match="failed on an empty response to the row .*raise"):
        prepare(config)


# ------------------------------------------------------------------------------ order and seeds


def test_every_problem_comes_once_an_epoch_in_an_order_of_the_seed():
    taken = [i for step in range(10) for i in step_problems(23, step, 7, seed=1)]
    for epoch in range(3):
        assert sorted(taken[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
    assert taken[:23] != taken[23:46] and taken[:23] != sorted(taken[:23])
    assert step_problems(23, 0, 7, seed=1) != step_problems(23, 0, 7, seed=2)
    assert sorted(step_problems(3, 0, 9, seed=0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.random.seed(5)
    torch.manual_seed(5)
    assert taken[:7] == step_problems(23, 0, 7, seed=1), "no global random state is read"


def test_no_two_purposes_steps_or_places_share_a_seed():
    purposes = ("order", "updates", "sample", "evaluate")
    numbers = [(), *((i,) for i in range(12)), *itertools.product(range(12), repeat=2)]
    numbers += itertools.product(range(12), repeat=3)
    keys = [(purpose, *some) for purpose in purposes for some in numbers] + numbers[1:]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert derive_seed(0, 7) != derive_seed(0, 7, 0), "numpy takes these two for the same"
    assert derive_seed("sample", 0, 1, 2) == derive_seed("sample", 0, 1, 2)
    assert all(0 <= seed < 2**62 for seed in seeds), "vLLM takes no larger ones"
