"""Data: problems from files or the hub, the order in which a run takes them, and seeds."""

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from support.answers import gold_answers, readable
from templates import TEMPLATES, Template

if TYPE_CHECKING:
    from drgrpo import Config

GOLDS_TRIED = 100  # of a dataset
FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Problem:
    """A problem as the model sees it, and what its responses are graded by."""

    prompt: str
    prompt_ids: list[int]
    answers: list[str]  # the golds, any of which is right
    text: str = ""  # the problem without the template
    row: dict = field(default_factory=dict)  # all columns of the dataset, for a reward function


def load_tokenizer(model: str, context: int):
    """The tokenizer of `model` (a folder or hub name), once it is sure that there is such a model.

    Raises ValueError if there is none, if it has no safetensors, or if its context is below
    `context` tokens. Whether its log-probs come out right is for `check_model` to say.
    """
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model at {model!r}: give the folder of a Hugging Face checkpoint or a hub name; "
            f"`python toy.py` makes the toy's ({error})"
        ) from error
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{model} has no *.safetensors file: load the model with transformers and save it with "
            "save_pretrained, which writes one"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise ValueError(
            f"prompt and response may together have {context} tokens, but the context of {model} "
            f"is {longest}: lower --max-prompt-tokens or --max-response-tokens"
        )
    return tokenizer


@functools.cache
def endings(model: str, stop: tuple[str, ...]) -> dict[int, str]:
    """The token ids that end a response, each with the text that it must add.

    These are EOS, which adds nothing, and stop strings that are special tokens: these do not show
    in decoded text, so nobody who looks for the string would find it.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the model has no such file
        eos = AutoConfig.from_pretrained(model).get_text_config().eos_token_id
    ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    ends = {index: "" for index in ids if index is not None}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special and token.content in stop:
            ends[index] = token.content
    return ends


def check_endings(rollouts: list, model: str, stop: tuple[str, ...]) -> None:
    """A response that stopped by itself ends in EOS or in a stop string, and is trained with it.

    The gap cannot show it: every token but the last may be right. Raises RuntimeError.
    """
    ends = endings(model, stop)
    for rollout in rollouts:
        ended_by_id = rollout.response_ids and rollout.response_ids[-1] in ends
        ended_by_text = rollout.text.endswith(stop)
        if rollout.finish_reason == "stop" and not (ended_by_id or ended_by_text):
            raise RuntimeError(
                f"a response stopped, but its last token is {rollout.response_ids[-1:]}, which is "
                f"neither EOS ({sorted(ends)}) nor the end of a stop string {stop}: the model "
                "would not learn to stop"
            )


def load_rows(source: str, subset: str | None, split: str):
    """The rows of a file, of a folder that `save_to_disk` wrote, or of a hub dataset.

    Raises ValueError if there are none.
    """
    path = Path(source)
    kind = FILES.get(path.suffix)
    if kind and not path.is_file():
        raise ValueError(
            f"no file {source}: give a {', '.join(FILES)} file, a folder that save_to_disk wrote, "
            "or a hub dataset; `python toy.py` makes the toy's"
        )
    if kind and path.stat().st_size == 0:
        raise ValueError(f"{source} is empty")
    try:
        if kind:
            return load_dataset(kind, data_files=source, split="train")
        saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
        if not saved:
            return load_dataset(source, subset, split=split)
        data = load_from_disk(source)
    except (OSError, ValueError, DatasetGenerationError) as error:
        if path.suffix == ".jsonl":
            refuse_broken_line(path)
        raise ValueError(f"cannot read {source!r} (split {split!r}): {error}") from error
    if not isinstance(data, DatasetDict):
        return data
    if split not in data:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(map(repr, data))}")
    return data[split]


def refuse_broken_line(file: Path) -> None:
    """Raises ValueError that names the first line of a .jsonl file that is not JSON."""
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            json.loads(line or b"0")  # an empty line does no harm
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error


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
            f"{source} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}. "
            "Set --problem-column and --answer-column, or write a file with a column of what the "
            "model is asked"
        )
    if needs_answer and type(rows.features[answer_column]).__name__ == "Json":
        raise ValueError(
            f"{source}: column {answer_column} has text in some rows and numbers or lists in "
            'others, and datasets would read the text "007" as the number 7. Make all of one kind'
        )
    problems: list[Problem] = []
    dropped = {"level": 0, "no_answer": 0, "too_long": 0}
    for row in rows:
        text = row[problem_column]
        if not isinstance(text, str):
            raise ValueError(f"{source}: column {problem_column} must hold text, not {text!r}")
        golds: list[str] = []  # a reward of one's own finds what it needs in the row
        if needs_answer:
            golds = golds_of(row[answer_column], answer_marker, f"{source}, {answer_column}")
        prompt = template.render(text, tokenizer)
        ids = prompt_ids(tokenizer, prompt)
        if levels and level_of(row) not in levels:
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


def golds_of(cell: Any, marker: str | None, place: str) -> list[str]:
    """The golds of a row. Raises ValueError that names the column if it holds something else."""
    if cell is None or cell != cell:  # NaN is no answer, either
        return []
    if isinstance(cell, float) and abs(cell) >= 2**53:
        raise ValueError(f"{place}: {cell} may be rounded. Store such large numbers as text")
    if marker and isinstance(cell, str):
        cell = cell.rpartition(marker)[2]
    try:
        return gold_answers(cell)
    except TypeError as error:
        raise ValueError(f"{place}: {error}") from error


def unreadable_golds(problems: list[Problem]) -> str | None:
    """Says of how many golds the grader cannot read the meaning; None if it can read all it tried.

    A sample is tried. Such a gold is equal to the same text only.
    """
    golds = [gold for problem in problems for gold in problem.answers]
    tried = golds[:: max(1, len(golds) // GOLDS_TRIED)]
    unread = [gold for gold in tried if not readable(gold)]
    if not unread:
        return None
    return (
        f"{len(unread)} of {len(tried)} golds that were tried have no meaning to the grader, so "
        f"only the same text is right. The first: {unread[0]!r}"
    )


def level_of(row: dict) -> int | None:
    """5 of the level 5, "5" or "Level 5"; None of anything else."""
    digits = re.search(r"\d+", str(row["level"]))
    return int(digits[0]) if digits else None


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, with one BOS, also where the template writes it itself, and without
    the EOS that some tokenizers put after any text: the response is yet to come."""
    has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    ends = bool(tokenizer.eos_token) and prompt.endswith(tokenizer.eos_token)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not ends else ids


def load_data(config: "Config") -> tuple[Any, list[Problem], list[Problem], dict[str, int]]:
    """Tokenizer, problems, held-out problems, and counts of dropped rows; raises ValueError."""
    context = config.max_prompt_tokens + config.max_response_tokens
    tokenizer = load_tokenizer(config.model, context)
    load = functools.partial(
        load_problems,
        tokenizer=tokenizer,
        template=TEMPLATES[config.template],
        max_prompt_tokens=config.max_prompt_tokens,
        subset=config.subset,
        problem_column=config.problem_column,
        answer_column=config.answer_column,
        answer_marker=config.answer_marker,
        needs_answer=config.reward == "math",
    )
    problems, dropped = load(config.dataset, split=config.split, levels=config.levels)
    held_out: list[Problem] = []
    if config.eval_dataset:
        try:
            held_out, lost = load(config.eval_dataset, split=config.eval_split)
        except ValueError as error:
            hint = "It is read as --dataset is; --eval-dataset None leaves it out"
            raise ValueError(f"--eval-dataset: {error}. {hint}") from error
        dropped |= {f"eval_{reason}": count for reason, count in lost.items()}
    return tokenizer, problems, held_out, dropped


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
