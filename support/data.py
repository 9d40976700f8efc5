"""Data: problems from files or the hub, the order in which a run takes them, and seeds."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import AutoConfig, AutoTokenizer

from support.grader import gold_answers
from templates import Template, find_template

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Problem:
    """A problem as the model sees it, and what its responses are graded by."""

    prompt: str
    prompt_ids: list[int]
    answers: list[str]  # the golds, any of which is right
    text: str = ""  # the problem without the template
    row: dict = field(default_factory=dict)  # all columns of the dataset, for a reward function


def load_tokenizer(model: str, context: int, training: bool = False):
    """The tokenizer of `model` (a folder or hub name), once it is sure that the model can be used.

    Raises ValueError if there is no such model, if its context is below `context` tokens or, for
    training, if it has dropout. Whether its log-probs come out right is for `check_model` to say.
    """
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model at {model!r}: give the folder of a Hugging Face checkpoint or a hub name "
            f"({error})"
        ) from error
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise ValueError(
            f"prompt and response may together have {context} tokens, but the context of {model} "
            f"is {longest}: lower --max-prompt-tokens or --max-response-tokens"
        )
    drops = []
    for key, value in config.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float) and value > 0:
            drops.append(key)
    if training and drops:
        raise ValueError(
            f"{model} has dropout, with which no log-prob is ever the same twice: set "
            f"{', '.join(drops)} to 0 in its config.json"
        )
    return tokenizer


def load_rows(source: str, subset: str | None, split: str):
    """The rows of a file, of a folder that `save_to_disk` wrote, or of a hub dataset.

    Raises ValueError if there are none.
    """
    path = Path(source)
    kind = FILES.get(path.suffix)
    if kind and not path.is_file():
        raise ValueError(
            f"no file {source}: give a {', '.join(FILES)} file, a folder that save_to_disk wrote, "
            "or a hub dataset"
        )
    try:
        if kind:
            return load_dataset(kind, data_files=source, split="train")
        saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
        if not saved:
            return load_dataset(source, subset, split=split)
        data = load_from_disk(source)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"cannot read {source!r} (split {split!r}): {error}") from error
    if not isinstance(data, DatasetDict):
        return data
    if split not in data:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(map(repr, data))}")
    return data[split]


def load_problems(
    source: str,
    tokenizer,
    template: Template,
    max_prompt_tokens: int,
    subset: str | None = None,
    split: str = "train",
    problem_column: str = "problem",
    answer_column: str = "answer",
    levels: tuple[int, ...] = (),
    answer_marker: str | None = None,
    needs_answer: bool = True,
) -> tuple[list[Problem], dict[str, int]]:
    """Problems of a file or dataset, and counts of the rows that were dropped, by reason.

    `answer_marker`: the answer is what follows the last of these. `needs_answer`: False where a
    reward function of one's own grades; rows then need no answer, nor a column for it. Raises
    ValueError if the source or a column is missing, holds something else, or no row can be used.
    """
    rows = load_rows(source, subset, split)
    needed = [problem_column]
    if needs_answer:
        needed.append(answer_column)
    if levels:
        needed.append("level")
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}: "
            "set --problem-column, --answer-column"
        )
    problems: list[Problem] = []
    dropped = {"level": 0, "no_answer": 0, "too_long": 0}
    for row in rows:
        text = row[problem_column]
        if not isinstance(text, str):
            raise ValueError(f"{source}: column {problem_column} must hold text, not {text!r}")
        golds = golds_of(row, answer_column, answer_marker, needs_answer, source)
        prompt = template.render(text)
        ids = prompt_ids(tokenizer, prompt)
        if levels and row["level"] not in levels:
            dropped["level"] += 1
        elif needs_answer and not golds:
            dropped["no_answer"] += 1
        elif len(ids) > max_prompt_tokens:
            dropped["too_long"] += 1
        else:
            problems.append(Problem(prompt, ids, golds, text, row))
    if not problems:
        raise ValueError(f"{source} has no usable problem; rows dropped: {dropped}")
    return problems, dropped


def golds_of(
    row: dict, column: str, marker: str | None, needs_answer: bool, source: str
) -> list[str]:
    """The golds of a row. Raises ValueError that names the column if it holds something else."""
    answer = row.get(column)
    if answer is None:
        return []
    if marker and isinstance(answer, str):
        answer = answer.rpartition(marker)[2]
    try:
        return gold_answers(answer)
    except TypeError as error:
        if not needs_answer:  # a reward function may find anything there
            return []
        raise ValueError(f"{source}, column {column}: {error}") from error


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, with one BOS, also where the template writes it itself, and without
    the EOS that some tokenizers put after any text: the response is yet to come."""
    has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    ends = bool(tokenizer.eos_token) and prompt.endswith(tokenizer.eos_token)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not ends else ids


def load_data(config) -> tuple[Any, list[Problem], list[Problem], dict[str, int]]:
    """Tokenizer, problems, held-out problems, and counts of dropped rows; raises ValueError."""
    context = config.max_prompt_tokens + config.max_response_tokens
    tokenizer = load_tokenizer(config.model, context, training=True)
    template = find_template(config.template, tokenizer)

    def load(source: str, split: str, levels: tuple[int, ...]):
        return load_problems(
            source,
            tokenizer,
            template,
            config.max_prompt_tokens,
            config.subset,
            split,
            config.problem_column,
            config.answer_column,
            levels,
            config.answer_marker,
            needs_answer=config.reward == "math",
        )

    problems, dropped = load(config.dataset, config.split, config.levels)
    held_out: list[Problem] = []
    if config.eval_dataset:
        held_out, lost = load(config.eval_dataset, config.eval_split, ())
        dropped |= {f"eval_{reason}": count for reason, count in lost.items()}
    return tokenizer, problems, held_out, dropped


def check_tracker(track: str) -> None:
    """Raises ValueError if a package that the tracker needs is missing."""
    packages = {"no": (), "tensorboard": ("tensorboard",), "wandb": ("tensorboard", "wandb")}
    for package in packages[track]:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--track {track} needs `pip install {package}`")


def step_problems(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Indices of a step's problems: epochs laid end to end, each a permutation of all `count`."""
    orders: dict[int, np.ndarray] = {}
    chosen = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch = place // count
        if epoch not in orders:
            draw = np.random.default_rng(derive_seed("order", seed, epoch))
            orders[epoch] = draw.permutation(count)
        chosen.append(int(orders[epoch][place % count]))
    return chosen


def derive_seed(*parts: int | str) -> int:
    """A seed below 2^62 for one purpose, made of its name, the run's seed, the step and so on.

    So no draw depends on the number of ranks or on what was drawn before, and two purposes never
    share a seed.
    """
    numbers = [len(parts)]  # without it, numpy would take (0, 7) and (0, 7, 0) for the same
    for part in parts:
        numbers.append(int.from_bytes(part.encode()) if isinstance(part, str) else part)
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)
