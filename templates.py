"""Prompt templates and the reward: how a problem is asked and how a response is graded.

The reward is 1.0 if the answer extracted from a response equals a gold answer, else 0.0. Equality
is decided by math-verify, that is by sympy running on text a language model wrote: it may compute
for ever or fill the memory, and no code inside the same process can reliably stop it. So `Grader`
finds the answers itself, by plain string search, and compares them in workers that it can kill. A
comparison lost that way scores 0 and is counted.
"""

import importlib.util
import multiprocessing
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from pebble import ProcessExpired, ProcessPool
from pebble.common import CONSTS


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds; None without a box. If the last one is unclosed, an
    earlier one does not count. In `\boxed{\boxed{2}}` the last is the inner one."""
    start = text.rfind("\\boxed")  # -1 if there is none: then the next test is false as well
    if not text.startswith("\\boxed{", start):
        return None
    begin, depth = start + len("\\boxed{"), 1
    for end in range(begin, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
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


TEMPLATES: dict[str, Template] = {
    "qwen_math": Template("qwen_math", qwen_math_prompt, (), last_boxed),
    "r1": Template("r1", r1_prompt, ("</answer>",), answer_in_tags),
    "none": Template("none", str, (), last_boxed),  # the prompt is the problem itself
    "orz": Template("orz", orz_prompt, (), answer_in_loose_tags),
    "prime": Template("prime", prime_prompt, (), last_boxed),
}


def find_template(name: str, tokenizer) -> Template:
    """The template of this name; "chat" is the tokenizer's own, asked for a boxed answer.

    Raises ValueError if there is no such template or the tokenizer has none.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name != "chat":
        raise ValueError(f"unknown template {name!r}: give chat, {', '.join(TEMPLATES)}")
    if not tokenizer.chat_template:
        raise ValueError(f"template 'chat' needs a chat template, and the tokenizer of "
                         f"{tokenizer.name_or_path} has none: give {', '.join(TEMPLATES)}")

    def render(problem: str) -> str:
        request = "Please reason step by step, and put your final answer within \\boxed{}."
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{problem}\n{request}"}], tokenize=False,
            add_generation_prompt=True)

    return Template("chat", render, (), last_boxed)


MATH_SECONDS = 2  # for each parse and comparison; math-verify sets an alarm, in whole seconds
MAX_MATH_CHARS = 300  # longer texts are compared only as strings
# LaTeX only: math-verify's plain-number extractor picks a stray number out of LaTeX it cannot read.
LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
# what may stand to the left of an equals sign: x, \theta, a_1, f(x), |AB|, \mathrm{Area}
# Possessive (++): there are exponentially many ways to split it, and a mismatch would try them all.
NAME = re.compile(
    r"(?:[a-zA-Z|\s{}(),']|\\(?!frac|sqrt|cdot|times)[a-zA-Z]++|_\{?\w++\}?|\^\{-1\})++")


def gold_answers(cell: str | int | float | list) -> list[str]:
    """The golds in one cell of a dataset, any of which is right, as stripped non-empty strings.
    An empty list means that there is no gold. Raises TypeError for any other kind of cell."""
    entries = cell if isinstance(cell, list | tuple) else [cell]
    if not all(isinstance(entry, str | int | float) for entry in entries):
        raise TypeError(f"a gold must be str, int, float or a list of these, not {cell!r}")
    return [text for entry in entries if (text := str(entry).strip())]


def answers_match(answer: str, gold: str | int | float | list) -> bool:
    """Whether `answer` equals `gold` or one of its entries; an empty answer or gold never does.

    Raises TimeoutError after MATH_SECONDS in one step: the answer is then unknown, not wrong.
    Raises ValueError outside the main thread, where math-verify's alarm does not work.
    """
    answer, golds = _clean(answer), [_clean(text) for text in gold_answers(gold)]
    if not answer:
        return False
    if any(_spelling(answer) == _spelling(text) for text in golds):
        return True
    try:
        return any(_same_value(text, answer) for text in golds)
    except TimeoutException:  # derived from BaseException: no caller would expect it
        raise TimeoutError(f"math-verify took more than {MATH_SECONDS} s") from None


def _clean(text: str) -> str:
    """Without the dollar signs of maths mode, a final full stop, a leading "The answer is" and
    spaces that group digits; 4.5e33 as 4.5 times 10^33, because math-verify takes its e for
    Euler's number."""
    text = re.sub(r"(?<!\\)\$", "", text).strip().removesuffix(".")
    if sentence := re.match(r"(?i)(?:\\text *\{ *)?the (?:final )?answer is:?\s*", text):
        text = text[sentence.end() :]
        if text.count("}") > text.count("{"):  # the one that closed \text{
            text = text.replace("}", "", 1)
    if re.fullmatch(r"-?\d{1,3}((?:\\,|\\? |~)\d{3})+(\.\d+)?", text):
        text = re.sub(r"\\,|\\? |~", "", text)
    return re.sub(r"(?<=\d)[eE]([+-]?\d+)(?!\w)", r"\\times 10^{\1}", text)


def _spelling(text: str) -> str:
    """Without the LaTeX that changes only the looks."""
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:!]|\s", "", text)


def _same_value(gold: str, answer: str) -> bool:
    """Whether math-verify takes the two for the same object, and rightly."""
    if not gold or max(len(gold), len(answer)) > MAX_MATH_CHARS:
        return False
    # It drops the base of 52_8
    gold_base, answer_base = (re.findall(r"\d_\{?(\d+)", text) for text in (gold, answer))
    if gold_base and gold_base != answer_base:
        return False
    # It takes the right side of any equation for its value, where only "x = 5" names a value,
    # and it folds case, so that N = N is N = n
    left, equals, right = answer.partition("=")
    if equals and left.strip() == right.strip():
        return False
    if equals and "=" not in gold and not NAME.fullmatch(left) and not answers_match(left, gold):
        return False
    parsed = [
        parse(f"\\boxed{{{text}}}", LATEX, parsing_timeout=MATH_SECONDS, raise_on_error=True)
        for text in (gold, answer)
    ]
    same = verify(*parsed, allow_set_relation_comp=True, timeout_seconds=MATH_SECONDS,
                  raise_on_error=True)
    return same and not _far_apart(parsed[0][0], parsed[1][0])


def _far_apart(gold, answer) -> bool:
    """Whether both are small numbers that differ: math-verify rounds them all to 0."""
    if not (getattr(gold, "is_comparable", False) and getattr(answer, "is_comparable", False)):
        return False
    gold, answer = float(gold), float(answer)
    return max(abs(gold), abs(answer)) < 1e-3 and abs(gold - answer) > 1e-3 * abs(gold)


TIMEOUT = "timeout"  # the verdict on a comparison that ran too long
MIN_TASKS = 8  # fewer comparisons than this do not tell whether the grader is broken
PATIENCE = 120.0  # seconds without any finished comparison, after which all workers are replaced
WORKER_BYTES = 4 * 2**30  # memory a worker may take on top of what it has when it is ready
Pair = tuple[str, tuple[str, ...]]  # an extracted answer and the golds of its problem


class Grader:
    """Scores responses: 1.0 for a right answer, else 0.0. A context manager.

    template: a Template or a name in TEMPLATES; raises ValueError for an unknown name.
    workers: processes that compare answers. They start with the first batch, and each imports the
        main script again (as `__mp_main__`): keep the `if __name__ == "__main__"` there.
    timeout: seconds one comparison may run; waiting for a free worker does not count.
    graded, timeouts, errors: how many responses so far were scored; scored 0 because the
        comparison ran too long; scored 0 because it failed or its worker died.
    """

    def __init__(self, template: Template | str, workers: int = 2, timeout: float = 5.0):
        if isinstance(template, str) and template not in TEMPLATES:
            raise ValueError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")
        self.template = TEMPLATES[template] if isinstance(template, str) else template
        self.workers, self.timeout = workers, timeout
        self.graded = self.timeouts = self.errors = 0
        self._compare = answers_match
        self._start()

    def start(self, responses: list[str], answers: list[str | list[str]]) -> None:
        """Begin to compare what `grade` or `verdicts` will soon be asked for, and do not wait."""
        with suppress(RuntimeError):  # a broken pool: `compare` will start another one
            for pair in set(self._pairs(responses, answers)) - self._begun.keys():
                if all(pair):
                    self._begun[pair] = self._schedule(pair)

    def grade(self, responses: list[str], answers: list[str | list[str]]) -> list[float]:
        """The reward of each response, given the golds of its problem; raises as `verdicts`."""
        return [float(v is True) for v in self.verdicts(responses, answers)]

    def verdicts(self, responses: list[str], answers: list[str | list[str]]) -> list[bool | str]:
        """For each response True or False, TIMEOUT, or the text of an error. Raises ValueError if
        the lists differ in length, RuntimeError if the workers or most comparisons fail: a broken
        grader would look like a policy that is always wrong."""
        pairs = self._pairs(responses, answers)
        verdicts = self.compare(pair for pair in pairs if all(pair))  # with answer and gold
        failures = {pair: v for pair, v in verdicts.items() if v not in (True, False, TIMEOUT)}
        self.graded += len(pairs)
        self.timeouts += sum(verdicts.get(pair) == TIMEOUT for pair in pairs)
        self.errors += sum(pair in failures for pair in pairs)
        if len(verdicts) >= MIN_TASKS and len(failures) > len(verdicts) / 2:
            first = next(iter(failures.values()))
            raise RuntimeError(f"{len(failures)} of {len(verdicts)} comparisons failed: {first}")
        return [verdicts.get(pair, False) for pair in pairs]

    def compare(self, pairs: Iterable[Pair]) -> dict[Pair, bool | str]:
        """For each distinct pair of an answer and its golds True or False, TIMEOUT, or the text
        of the error. Not counted in `graded`, `timeouts` and `errors`."""
        distinct = dict.fromkeys(pairs)
        try:
            return self._verdicts(distinct)
        except RuntimeError:  # pebble's pool does not survive the death of an idle worker
            self.close()
            self._start()
            return self._verdicts(distinct)

    def close(self) -> None:
        """End the workers."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        self._begun: dict[Pair, Future] = {}  # comparisons that nobody has asked for yet
        CONSTS.term_timeout = 0.1  # seconds from pebble's SIGTERM to its SIGKILL
        context = multiprocessing.get_context("forkserver")  # fork copies the trainer's GPU state
        self._pool = ProcessPool(self.workers, initializer=_prepare_worker, context=context)

    def _pairs(self, responses: list[str], answers: list[str | list[str]]) -> list[Pair]:
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
        return [(self.template.extract(response), tuple(gold_answers(answer)))
                for response, answer in zip(responses, answers)]

    def _schedule(self, pair: Pair) -> Future:
        args = self._compare, 3 * self.timeout, *pair
        return self._pool.schedule(_judge, args=args, timeout=self.timeout)

    def _verdicts(self, pairs: Iterable[Pair]) -> dict[Pair, bool | str]:
        begun, self._begun = self._begun, {}
        futures = {pair: begun.get(pair) or self._schedule(pair) for pair in pairs}
        left = set(futures.values())
        while left:
            done, left = wait(left, timeout=PATIENCE)
            if not done:
                raise BrokenProcessPool(f"no comparison finished within {PATIENCE} s")
        return {pair: _verdict(future) for pair, future in futures.items()}


def _verdict(future: Future) -> bool | str:
    try:
        return future.result()
    except TimeoutError:
        return TIMEOUT
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGXCPU:  # the limit on CPU time was quicker than pebble
            return TIMEOUT
        return f"the worker died with exit code {error.exitcode}"


def _prepare_worker() -> None:
    """Runs once in each worker, before the clock of any comparison."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)  # in case it was inherited as ignored
    with suppress(TimeoutError):  # loading takes long on a busy machine
        answers_match("\\frac{1}{2}", "0.5")  # loads what math-verify loads at its first use
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + WORKER_BYTES)


def _judge(compare: Callable, cpu_seconds: float, answer: str, golds: tuple) -> bool | str:
    """Runs in a worker: one verdict. The limit on CPU time ends a worker whose trainer is gone;
    a living trainer kills it earlier."""
    _limit(resource.RLIMIT_CPU, int(time.process_time() + cpu_seconds) + 1)
    try:
        return compare(answer, golds)
    except TimeoutError:
        return TIMEOUT
    except BaseException as error:  # pebble would raise even SystemExit again, in the trainer
        return repr(error)[:300]


def _limit(kind: int, value: int) -> None:
    """Set a soft resource limit, but none above the hard limit."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


# --- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A problem as the model sees it: prompt text, its token ids, and the gold answers."""

    prompt: str
    prompt_ids: list[int]
    answers: list[str]
    text: str = ""  # without the template


def load_tokenizer(model: str, context: int, training: bool = False):
    """The tokenizer of `model` (a folder or hub name), once it is sure that the model can be used.

    Raises ValueError if there is no such model, if its context is below `context` tokens or, for
    training, if it has dropout or needs other attention than plain causal one.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model at {model!r}: give the folder of a Hugging Face checkpoint or "
                         f"a hub name ({error})") from error
    if context > config.max_position_embeddings:
        raise ValueError(
            f"prompt and response may together have {context} tokens, but the context of {model} "
            f"is {config.max_position_embeddings}: lower --max-prompt-tokens or "
            "--max-response-tokens")
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # unless they say more
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    if training and (0 < (window or 0) < context or getattr(config, "attn_logit_softcapping", 0)):
        raise ValueError(f"{model} has sliding-window or soft-capped attention, which "
                         "packed_attention in drgrpo.py does not compute: add it there")
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if training and any(getattr(config, key, None) not in (None, 1) for key in scales):
        raise ValueError(f"{model} changes its logits ({', '.join(scales)}), which HeadLogprobs in "
                         "drgrpo.py does not compute: add it there")
    if drops := [key for key, value in config.to_dict().items() if training and value
                 and ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float)]:
        raise ValueError(f"{model} has dropout, with which no log-prob is ever the same twice: set "
                         f"{', '.join(drops)} to 0 in its config.json")
    return tokenizer


def load_rows(source: str, subset: str | None, split: str):
    """The rows of a .jsonl or .parquet file, or of a hub dataset; ValueError if there are none."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    if kind and not Path(source).is_file():
        raise ValueError(f"no file {source}: give a .jsonl or .parquet file, or a hub dataset")
    try:
        if kind:
            return load_dataset(kind, data_files=source, split="train")
        return load_dataset(source, subset, split=split)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"cannot read {source!r} (split {split!r}): {error}") from error


def load_problems(source: str, tokenizer, template: Template, max_prompt_tokens: int,
                  subset: str | None = None, split: str = "train",
                  problem_column: str = "problem", answer_column: str = "answer",
                  levels: tuple[int, ...] = ()) -> tuple[list[Problem], dict[str, int]]:
    """Problems of a file or hub dataset, and counts of the rows that were dropped, by reason.

    Raises ValueError if the source or a column is missing or no row can be used.
    """
    rows = load_rows(source, subset, split)
    needed = [problem_column, answer_column] + ["level"] * bool(levels)
    if missing := [column for column in needed if column not in rows.column_names]:
        raise ValueError(f"{source} has no column {', '.join(missing)}; it has "
                         f"{', '.join(rows.column_names)}: set --problem-column, --answer-column")
    problems, dropped = [], {"level": 0, "no_answer": 0, "too_long": 0}
    for row in rows:
        answer = "" if row[answer_column] is None else row[answer_column]
        if isinstance(answer, str):  # GSM8K writes the reasoning there, and then #### and the gold
            answer = answer.rpartition("####")[2]
        if not isinstance(row[problem_column], str):
            raise ValueError(f"{source}: column {problem_column} must hold text, not "
                             f"{row[problem_column]!r}")
        try:
            golds = gold_answers(answer)
        except TypeError as error:
            raise ValueError(f"{source}, column {answer_column}: {error}") from error
        prompt = template.render(row[problem_column])
        # one BOS, also where the template writes it itself
        has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
        if levels and row["level"] not in levels:
            dropped["level"] += 1
        elif not golds:
            dropped["no_answer"] += 1
        elif len(ids) > max_prompt_tokens:
            dropped["too_long"] += 1
        else:
            problems.append(Problem(prompt, ids, golds, row[problem_column]))
    if not problems:
        raise ValueError(f"{source} has no usable problem; rows dropped: {dropped}")
    return problems, dropped


def prepare(config):
    """All that can go wrong in a training run before a model loads. Returns tokenizer, problems,
    held-out problems and counts of dropped rows. Raises ValueError that says what to change."""
    if (config.folder / "metrics.jsonl").exists() and not config.plan:
        raise ValueError(f"{config.folder} holds a run already: remove it, or choose a --name")
    for package in {"no": (), "wandb": ("tensorboard", "wandb")}.get(config.track, (config.track,)):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--track {config.track} needs `pip install {package}`")
    tokenizer = load_tokenizer(config.model, config.max_prompt_tokens + config.max_response_tokens,
                               training=True)
    load = partial(load_problems, tokenizer=tokenizer, template=TEMPLATES[config.template],
                   max_prompt_tokens=config.max_prompt_tokens, subset=config.subset,
                   problem_column=config.problem_column, answer_column=config.answer_column)
    problems, dropped = load(config.dataset, split=config.split, levels=config.levels)
    held_out, lost = [], {}
    if config.eval_dataset:
        held_out, lost = load(config.eval_dataset, split=config.eval_split)
    dropped |= {f"eval_{reason}": count for reason, count in lost.items()}
    return tokenizer, problems, held_out, dropped


# The benchmarks of the paper: hub dataset, subset, split, columns of the problem and of the answer.
TASKS = {
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "amc23": ("AI-MO/aimo-validation-amc", None, "train", "problem", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question",
                      "final_answer"),
}


def load_task(task: str, tokenizer, template: Template, context: int,
              data_dir: Path | None = None, problem_column: str = "problem",
              answer_column: str = "answer") -> list[Problem]:
    """All problems of a benchmark in TASKS, from data_dir/TASK.jsonl or else from the hub, or of
    the .jsonl or .parquet file that `task` names. The columns are those of files.

    Raises ValueError if the task is unknown, if it cannot be read, or if a prompt fills the whole
    context or an answer is missing: a score over fewer problems would not be the benchmark's.
    """
    source, subset, split = str(data_dir / f"{task}.jsonl") if data_dir else task, None, "train"
    if Path(task).suffix in (".jsonl", ".parquet"):
        source = task
    elif task not in TASKS:
        raise ValueError(f"unknown task {task!r}: give {', '.join(TASKS)}, or the path of a .jsonl "
                         "or .parquet file")
    elif not data_dir:
        source, subset, split, problem_column, answer_column = TASKS[task]
    problems, dropped = load_problems(source, tokenizer, template, sys.maxsize, subset, split,
                                      problem_column, answer_column)
    if too_long := sum(len(p.prompt_ids) >= context for p in problems):
        raise ValueError(f"{too_long} prompts of {task} leave no room for a response in {context} "
                         "tokens: raise --max-prompt-tokens")
    if dropped["no_answer"]:
        raise ValueError(f"{dropped['no_answer']} rows of {task} have no answer: remove them, or "
                         "give another --answer-column")
    return problems


def step_problems(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Indices of a step's problems: epochs laid end to end, each a permutation of all `count`."""
    places = range(step * per_step, (step + 1) * per_step)
    epochs = range(places[0] // count, places[-1] // count + 1)
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in epochs}
    return [int(orders[place // count][place % count]) for place in places]


def derive_seed(*parts: int) -> int:
    """A seed for a draw, made of the run's seed, the step and the prompt: no draw depends on the
    number of ranks or on what was drawn before. (0, 5) and (0, 5, 0) give the same seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 2)
