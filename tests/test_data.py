"""Facts about problems, their order, and what is refused before a model loads."""

import importlib.util
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import AutoTokenizer

import support.run
from drgrpo import PRESETS, Config
from support.data import (
    check_tracker,
    derive_seed,
    load_data,
    load_problems,
    load_tokenizer,
    prompt_ids,
    step_problems,
)
from support.run import prepare
from templates import TEMPLATES
from tests.helpers import TOY, tiny_model, write_jsonl

# ------------------------------------------------------------------------------ what is refused


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model is built, even a small copy."""

    def build(*arguments):
        raise AssertionError("a model was built")

    monkeypatch.setattr(support.run, "check_model", build)


@pytest.mark.parametrize("settings, message", [
    ({"model": "runs/no/such/model"}, "no model at"),
    ({"max_response_tokens": 10_000}, "lower --max-prompt-tokens"),
    ({"dataset": "nowhere.jsonl"}, "no file nowhere.jsonl"),
    ({"dataset": "nowhere.arrow"}, "no file nowhere.arrow"),
    ({"problem_column": "question"}, "has problem, answer"),
    ({"levels": (3,)}, "no column level"),
    ({"max_prompt_tokens": 1}, "no usable problem"),
    ({"template": "chat"}, "has none: give qwen_math, r1, none"),
    ({"reward": "nowhere.py:f"}, "--reward 'nowhere.py:f'"),
])  # fmt: skip
def test_wrong_inputs_are_found_before_a_model_loads(toy, no_model, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(replace(TOY, name="none", **settings))


@pytest.mark.parametrize("does", ["raise", "nothing"])
def test_a_reward_that_fails_on_the_first_row_is_found_before_a_model_loads(
    toy, no_model, rewards, tmp_path, does
):
    data = write_jsonl(tmp_path / "data.jsonl", [{"problem": does}])
    reward = f"{rewards}:on_the_first_row"
    config = replace(TOY, name="none", dataset=data, eval_dataset=None, reward=reward)
    with pytest.raises(ValueError, match="failed on an empty response to the first row"):
        prepare(config)


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch):
    there = {"tensorboard"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    check_tracker("no")
    check_tracker("tensorboard")
    with pytest.raises(ValueError, match="--track wandb needs `pip install wandb`"):
        check_tracker("wandb")
    there.clear()
    with pytest.raises(ValueError, match="--track tensorboard needs `pip install tensorboard`"):
        check_tracker("tensorboard")


def test_a_run_is_never_overwritten(toy, no_model, tmp_path, monkeypatch):
    monkeypatch.setattr(Config, "folder", property(lambda self: tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds a run without config.json"):
        prepare(TOY)


def test_a_model_with_dropout_is_refused(toy, tmp_path):
    tiny_model(attention_dropout=0.1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="set attention_dropout to 0"):
        load_tokenizer(str(tmp_path), 100, training=True)
    load_tokenizer(str(tmp_path), 100)  # it can be evaluated


# ------------------------------------------------------------------------------ problems


def test_rows_dropped_from_the_held_out_problems_are_counted_too(toy, tmp_path):
    rows = [{"problem": "1+1", "answer": "2"}, {"problem": "2+2", "answer": " "}]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    _, _, problems, dropped = load_data(replace(TOY, name="none", eval_dataset=held_out))
    assert len(problems) == 1 and (dropped["eval_no_answer"], dropped["no_answer"]) == (1, 0)


def saved(data, kind, folder):
    """The path of a dataset that is stored in this way."""
    file = str(folder / f"data.{kind}")
    if kind == "jsonl":
        data.to_json(file)
    elif kind == "json":
        data.to_json(file, lines=False)
    elif kind == "parquet":
        data.to_parquet(file)
    elif kind == "arrow":
        data.save_to_disk(folder / "arrow")
        next((folder / "arrow").glob("*.arrow")).rename(file)
    elif kind == "folder":
        data.save_to_disk(file)
    else:
        DatasetDict({"other": data.select([0]), "train": data}).save_to_disk(file)
    return file


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "parquet", "arrow", "folder", "folder of splits"]
)
def test_problems_are_read_filtered_and_counted(toy, tmp_path, kind):
    rows = {
        "question": ["What is 1+1?\n", "2+2 " * 90, "3+3", "4+4", "5+5"],
        "answer": ["2", "4", " ", "8", "long story #### 1,010"],
        "level": [3, 3, 3, 1, 5],
    }
    file = saved(Dataset.from_dict(rows), kind, tmp_path)
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    problems, dropped = load_problems(
        file,
        tokenizer,
        TEMPLATES["none"],
        64,
        levels=(3, 5),
        problem_column="question",
        answer_marker="####",
    )
    assert [(p.prompt, p.answers) for p in problems] == [
        ("What is 1+1?\n", ["2"]),
        ("5+5", ["1,010"]),
    ]
    assert dropped == {"level": 1, "no_answer": 1, "too_long": 1}
    assert problems[0].prompt_ids == tokenizer("What is 1+1?\n")["input_ids"]
    assert problems[1].row == {"question": "5+5", "answer": rows["answer"][4], "level": 5}


def test_a_split_that_a_folder_does_not_have_is_named_with_those_it_has(toy, tmp_path):
    data = Dataset.from_dict({"problem": ["1+1"], "answer": ["2"]})
    folder = saved(data, "folder of splits", tmp_path)
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    with pytest.raises(ValueError, match="no split 'test'; it has 'other', 'train'"):
        load_problems(folder, tokenizer, TEMPLATES["none"], 64, split="test")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*broken.json"):
        load_problems(str(tmp_path / "broken.json"), tokenizer, TEMPLATES["none"], 64)


@pytest.mark.parametrize(
    "marker, answers",
    [
        (None, [["a #### b #### 3"], ["4"], ["#### 5", "6"]]),
        ("####", [["3"], ["4"], ["#### 5", "6"]]),
        ("a ", [["#### b #### 3"], ["4"], ["#### 5", "6"]]),
    ],
)
def test_an_answer_is_cut_at_a_marker_only_where_one_is_set(toy, tmp_path, marker, answers):
    golds = ["a #### b #### 3", 4, ["#### 5", "6"]]
    files = [
        write_jsonl(tmp_path / f"{i}.jsonl", [{"problem": "?", "answer": gold}])
        for i, gold in enumerate(golds)
    ]
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    found = [
        load_problems(file, tokenizer, TEMPLATES["none"], 64, answer_marker=marker)[0][0].answers
        for file in files
    ]
    assert found == answers


def test_only_the_gsm8k_preset_has_a_marker():
    markers = {name: config.answer_marker for name, (_, config) in PRESETS.items()}
    assert markers.pop("gsm8k-0.5b") == "####" and set(markers.values()) == {None}


def test_a_reward_of_ones_own_needs_no_answer_and_gets_every_column(toy, tmp_path):
    rows = [{"problem": f"1+{i}", "tests": ["a", "b"], "limit": i} for i in range(3)]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    config = replace(TOY, name="none", dataset=file, eval_dataset=None)
    with pytest.raises(ValueError, match="no column answer; it has problem, tests, limit"):
        load_data(config)
    _, problems, _, dropped = load_data(replace(config, reward="FILE.py:f"))
    assert [problem.row for problem in problems] == rows
    assert [problem.answers for problem in problems] == [[]] * 3 and dropped["no_answer"] == 0
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"problem": "1", "answer": {"any": "thing"}}])
    _, (problem,), _, _ = load_data(replace(config, dataset=odd, reward="FILE.py:f"))
    assert problem.answers == [] and problem.row["answer"] == {"any": "thing"}


def test_the_chat_template_of_a_tokenizer_can_be_trained_with(toy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    tiny_model(len(tokenizer)).save_pretrained(tmp_path)
    data = write_jsonl(tmp_path / "data.jsonl", [{"problem": "1+1", "answer": "2"}])
    config = replace(
        TOY,
        name="none",
        model=str(tmp_path),
        template="chat",
        dataset=data,
        eval_dataset=data,
        max_prompt_tokens=200,
    )
    _, (problem,), (held_out,), _ = prepare(config)
    assert problem.prompt.startswith("<1+1\nPlease reason") and problem.prompt == held_out.prompt


@pytest.mark.parametrize("row, message", [
    ({"problem": None, "answer": "1"}, "column problem must hold text"),
    ({"problem": "1+1", "answer": {"a": 1}}, "column answer: a gold must be"),
])  # fmt: skip
def test_rows_of_the_wrong_kind_are_named(toy, tmp_path, row, message):
    file = write_jsonl(tmp_path / "data.jsonl", [row | {"problem": "1"}, row])
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    with pytest.raises(ValueError, match=message):
        load_problems(file, tokenizer, TEMPLATES["none"], 64)


def test_a_template_that_writes_bos_gets_one_bos(toy, tmp_path):
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    bos = tokenizer.eos_token
    tokenizer.bos_token = bos
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.eos_token_id)]
    )
    file = write_jsonl(tmp_path / "data.jsonl", [{"problem": "1+1", "answer": "2"}])
    for template in (TEMPLATES["none"], replace(TEMPLATES["none"], render=lambda p: bos + p)):
        (problem,), _ = load_problems(file, tokenizer, template, 64)
        assert problem.prompt_ids.count(tokenizer.eos_token_id) == 1


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
    purposes = ("order", "updates", "sample", "engine", "evaluate")
    numbers = [(), *((i,) for i in range(12)), *itertools.product(range(12), repeat=2)]
    numbers += itertools.product(range(12), repeat=3)
    keys = [(purpose, *some) for purpose in purposes for some in numbers] + numbers[1:]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(0, 7) != derive_seed(0, 7, 0), "numpy takes these two for the same"
    assert derive_seed("sample", 0, 1, 2) == derive_seed("sample", 0, 1, 2)
    assert all(0 <= derive_seed(*key) < 2**62 for key in keys), "vLLM takes no larger ones"


def test_a_tokenizer_that_ends_any_text_in_eos_does_not_end_the_prompt(toy):
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    plain = prompt_ids(tokenizer, "1+1")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}",
        special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
    )
    assert tokenizer("1+1")["input_ids"] == [*plain, tokenizer.eos_token_id]
    assert prompt_ids(tokenizer, "1+1") == plain
    written = prompt_ids(tokenizer, "1+1" + tokenizer.eos_token)
    assert written[: len(plain) + 1] == [*plain, tokenizer.eos_token_id], "the template's own stays"
