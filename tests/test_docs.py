"""Facts about README and docs: links lead somewhere, names exist, examples and commands work.

Every command of these pages is in one of two lists below: run by a test, or not run here, with the
reason. The settings of each are parsed either way, by the script that they are for.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path

import datasets
import pytest
import tyro
from torch.distributed.run import parse_args as parse_torchrun

import drgrpo
import eval as evaluation
from findings.base_models import AnalysisConfig
from plan import PlanConfig
from support.data import load_problems
from support.grader import checked_reward
from templates import TEMPLATES
from tests.helpers import ROOT, boxed, launch, read_jsonl, write_jsonl

NAMED = ("README.md", "BENCHMARKS.md", "findings/README.md", "forks/README.md", "launch/README.md")
PAGES = {name: ROOT / name for name in NAMED}
PAGES |= {f"docs/{path.name}": path for path in sorted((ROOT / "docs").glob("*.md"))}
TEXT = {name: path.read_text() if path.exists() else "" for name, path in PAGES.items()}
TOUR = TEXT["docs/tour.md"]
each_page = pytest.mark.parametrize("page", PAGES)

# ---------------------------------------------------------------------------- reading Markdown


def split(page: str) -> tuple[str, list[tuple[str, str]], list[str]]:
    """A page as its prose, its fenced blocks (language, text), and its indented blocks."""
    prose: list[str] = []
    fenced: list[tuple[str, str]] = []
    indented: list[str] = []
    language, before = None, ""
    for line in TEXT[page].splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
            if language is not None:
                fenced.append((language, ""))
        elif language is not None:
            fenced[-1] = (language, fenced[-1][1] + line + "\n")
        elif line.startswith("    ") and (not before.strip() or before.startswith("    ")):
            if not before.strip():
                indented.append("")
            indented[-1] += line[4:] + "\n"
        else:
            prose.append(line)
        before = line
    return "\n".join(prose), fenced, indented


def python_blocks(page: str) -> list[str]:
    return [text for language, text in split(page)[1] if language == "python"]


def spans(page: str) -> list[str]:
    """What stands in backticks in the prose and in tables."""
    found = []
    for paragraph in re.split(r"\n\s*\n", split(page)[0]):
        found += re.findall(r"(?<!`)`([^`]+)`(?!`)", " ".join(paragraph.split()))
    return found


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        found.add(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    return found


# --------------------------------------------------------------------------------------- links


@each_page
def test_links_lead_to_files_and_headings_that_are_there(page):
    assert PAGES[page].exists()
    wrong = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", split(page)[0]):
        name, _, anchor = link.partition("#")
        target = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    assert wrong == []


def test_an_anchor_is_the_heading_in_small_letters_with_hyphens():
    text = "# Dr. GRPO, the code\n```\n# no heading\n```\n## `top_p` and [links](x.md)?\n"
    assert anchors(text) == {"dr-grpo-the-code", "top_p-and-links"}


def test_the_readme_is_short_and_has_no_gaps():
    assert len(TEXT["README.md"].splitlines()) <= 260
    for page, text in TEXT.items():
        gaps = re.findall(r"^[A-Z]+(?:_[A-Z]+)+$", text, re.M)
        assert gaps == [], f"{page} waits for {gaps}"


# --------------------------------------------------------------------------------------- names


def names_in(*files: Path) -> set[str]:
    """Functions, classes, Class.attribute, arguments, fields, and constants that files define."""
    found: set[str] = set()
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.FunctionDef):
                found |= {argument.arg for argument in node.args.args + node.args.kwonlyargs}
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{name}" for name in names_of_class(node)}
        for node in tree.body:
            if isinstance(node, ast.Assign):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def names_of_class(node: ast.ClassDef) -> set[str]:
    methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
    return methods | {target.id for target in targets if isinstance(target, ast.Name)}


CODE = names_in(*ROOT.glob("*.py"), *ROOT.glob("support/*.py"))
TESTS = names_in(ROOT / "test_drgrpo.py", *ROOT.glob("tests/*.py"))


@each_page
def test_tests_that_a_page_names_are_there(page):
    named = [span for span in spans(page) if re.fullmatch(r"test_\w+", span)]
    assert [name for name in named if name not in TESTS] == []


def test_the_faq_has_a_test_or_a_figure_behind_each_answer():
    answers = re.split(r"^## ", TEXT["docs/faq.md"], flags=re.M)[1:]
    behind = re.compile(r"`test_\w+`|findings/|paper\.md|BENCHMARKS\.md|not tried")
    assert [answer.splitlines()[0] for answer in answers if not behind.search(answer)] == []


def test_names_in_the_tour_are_those_of_the_code():
    wrong = []
    for span in spans("docs/tour.md"):
        name = re.fullmatch(r"((?:\w+\.)?\w+)(?:\(\))?", span)
        if name is None or span.endswith(".py") or name[1] in TESTS | CODE | set(drgrpo.PRESETS):
            continue
        if name[1].replace("config.", "Config.") not in CODE:
            wrong.append(span)
    assert wrong == []


def test_the_tour_has_the_order_of_the_file():
    titles = re.findall(r"^## \d+\. (.*)$", TOUR, re.M)
    named = [name for title in titles for name in re.findall(r"`(\w+)`", title)]
    script = (ROOT / "drgrpo.py").read_text()
    places = [re.search(rf"^(?:def|class) {name}\b", script, re.M) for name in named]
    assert None not in places, dict(zip(named, places, strict=True))
    starts = [place.start() for place in places if place]
    assert len(titles) >= 7 and starts == sorted(starts)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


FLAGS = {
    flag(field.name)
    for config in (drgrpo.Config, PlanConfig, evaluation.EvalConfig, AnalysisConfig)
    for field in fields(config)
} | {"--help"}
OTHERS_FLAGS = {"--shutdown-timeout": "torchrun", "--shape": "benchmarks"}


@each_page
def test_settings_that_a_page_names_are_there(page):
    known = FLAGS | set(OTHERS_FLAGS)
    if page == "forks/README.md":  # a fork brings its own
        for diff in (ROOT / "forks").glob("*.diff"):
            known |= {flag(name) for name in re.findall(r"^\+    (\w+): ", diff.read_text(), re.M)}
    named = [span.split()[0] for span in spans(page) if re.match(r"--\w", span)]
    wrong = [name for name in named if name.replace("--no-", "--") not in known]
    assert wrong == []


# ------------------------------------------------------------------------------------ examples


def test_the_examples_of_the_tour_run_and_show_what_it_says():
    printed = launch(1, "-c", "\n".join(python_blocks("docs/tour.md")))
    assert "1024 responses a round" in printed and "divided by 384000" in printed
    assert "[ 0.7500, -0.2500, -0.2500, -0.2500]" in printed
    assert printed.count("[ 0.0000,  0.0000,  0.0000,  0.0000]") == 2, "it teaches nothing"
    assert "True False" in printed, "0.33 is not a third"
    assert "[[5, 6, 7, 8, 1]]" in printed and "[[0., 1., 1., 1.]]" in printed


def test_the_two_marked_lines_of_the_readme_are_in_the_script():
    script = [line.strip() for line in (ROOT / "drgrpo.py").read_text().splitlines()]
    (block,) = [block for block in python_blocks("README.md") if "Dr. GRPO (1/2)" in block]
    assert block.count("\n") == 2 and "Dr. GRPO (2/2)" in block
    assert [line for line in block.splitlines() if line not in script] == []


def readme_reward() -> str:
    """The reward function of the README, as a file."""
    (block,) = [block for block in python_blocks("README.md") if "def brief" in block]
    return block


def test_the_reward_of_the_readme_is_a_finite_number():
    space: dict = {}
    exec(readme_reward(), space)
    reward = space["brief"]
    assert checked_reward(reward("", {"answer": "5"})) == 0
    assert reward("It is 5", {"answer": "5"}) == pytest.approx(1 - 0.007)


class Letters:
    """A tokenizer: a token a letter."""

    bos_token = None
    eos_token = None
    eos_token_id = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def loaded(file: str) -> list[tuple[str, list[str]]]:
    problems, dropped = load_problems(file, Letters(), TEMPLATES["none"], 1000)
    assert set(dropped.values()) == {0}
    return [(problem.text, problem.answers) for problem in problems]


def test_asdiv_of_the_hub_becomes_a_file_of_problems(tmp_path, monkeypatch):
    (example,) = [block for block in python_blocks("docs/data.md") if "asdiv" in block]
    rows = {
        "body": [
            "Seven red apples and two green apples are in the basket.",
            "Ellen has six balls.",
        ],
        "question": ["How many apples are in the basket?", "How many liters are left?"],
        "solution_type": ["Addition", "Subtraction"],
        "answer": ["9 (apples)", "2.5 (liters)"],
        "formula": ["7+2=9", "6-3.5=2.5"],
    }
    asked = []

    def fake(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert asked == [("EleutherAI/asdiv", "validation")]
    assert read_jsonl(tmp_path / "asdiv.jsonl")[0].keys() == {"problem", "answer"}
    assert loaded("asdiv.jsonl") == [
        (f"{rows['body'][0]} How many apples are in the basket?", ["9"]),
        (f"{rows['body'][1]} How many liters are left?", ["2.5"]),
    ]


def test_the_dialogues_of_orz_become_a_file_of_problems(tmp_path, monkeypatch):
    (example,) = [block for block in python_blocks("docs/data.md") if "orz" in block]
    dialogues = []
    for problem, answer in (("What is $\\frac{1}{2}+\\frac{1}{2}$?", "1"), ("Für $x$?", "\\pi")):
        gold = {"from": "assistant", "ground_truth": {"value": answer}}
        dialogues.append([{"from": "human", "value": problem}, gold])
    (tmp_path / "orz_math_57k_collected.json").write_text(json.dumps(dialogues))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    expected = [("What is $\\frac{1}{2}+\\frac{1}{2}$?", ["1"]), ("Für $x$?", ["\\pi"])]
    assert loaded("orz.jsonl") == expected


# ------------------------------------------------------------------------------------ commands

PROGRAMS = (
    "python .venv/bin/python torchrun make git uv pip vllm sbatch source head bash cat until export"
).split()
# Indented blocks that hold no commands, by their beginning
NO_COMMANDS = ("sample    vLLM writes G responses", "What is ")


def commands_of_block(block: str) -> list[str]:
    """One a line; a line that ends in a backslash, or that is part of a loop, goes on."""
    if block.startswith(NO_COMMANDS):
        return []
    found: list[str] = []
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"\s+# .*$", "", line)
        if found and (line.startswith(" ") or line == "done"):
            found[-1] += " " + line
        elif line:
            found.append(line)
    return [" ".join(command.split()) for command in found]


def commands(page: str) -> list[str]:
    """All commands of a page: in indented blocks, in blocks of a shell, and in backticks."""
    _, fenced, indented = split(page)
    blocks = indented + [text for language, text in fenced if language in ("sh", "bash", "console")]
    found = [command for block in blocks for command in commands_of_block(block)]
    for span in spans(page):
        if " " in span and span.split()[0] in PROGRAMS:
            found.append(span)
    return found


COMMANDS = sorted({(page, command) for page in PAGES for command in commands(page)})
THIS = "tests/test_docs.py"
TOUR_RUN = f"{THIS}::test_the_run_of_the_tour_is_as_it_says"
MAKE = f"{THIS}::test_make_knows_every_target_that_is_named"
ON_A_GPU = "needs GPUs, and models and data from the hub"

# command, or a pattern of commands -> the test that runs it
RUN = {
    "make *": MAKE,  # what it would run: `make -n`
    ".venv/bin/python toy.py": "tests/fixtures.py::toy",
    "python drgrpo.py toy": (
        "test_drgrpo.py::test_a_run_leaves_metrics_samples_curves_and_a_checkpoint"
    ),
    "python drgrpo.py math-7b --help": f"{THIS}::test_help_explains_every_setting",
    "python drgrpo.py toy --name brief *": f"{THIS}::test_the_reward_of_the_readme_trains",
    ".venv/bin/python drgrpo.py toy --name tour *": TOUR_RUN,
    "head -n 1 runs/tour/metrics.jsonl": TOUR_RUN,
    "python drgrpo.py toy --dtype bfloat16 *": (
        "tests/test_precision.py::test_the_toy_learns_in_bf16_with_a_small_and_flat_gap"
    ),
    "python drgrpo.py toy --steps 12 *": (
        "tests/test_run.py::test_a_real_disk_that_is_full_or_read_only_costs_no_state"
    ),
    "python eval.py --regrade FILE.jsonl": f"{THIS}::test_saved_responses_are_graded_again",
    "git apply *forks/*.diff": (
        "tests/test_forks.py::test_a_diff_applies_to_the_tree_as_it_is_and_back"
    ),
    "python -m findings.readme": (
        "tests/test_findings.py::test_the_page_is_what_the_committed_numbers_say"
    ),
} | {
    f"python drgrpo.py toy --name {fork}*": (
        "tests/test_forks.py::test_the_command_of_a_fork_trains"
    )
    for fork in (
        "clip-higher leave-one-out mask-truncated format-bonus kl-to-base second-template "
        "lr-schedule"
    ).split()
}
# command, or a pattern of commands -> why no test runs it
NOT_RUN = {
    "git clone <this repository> && cd drgrpo": "it has no address; .ci/run is for a fresh clone",
    "source .venv/bin/activate": "changes a shell and nothing else",
    "python drgrpo.py gsm8k-0.5b": ON_A_GPU,
    "python drgrpo.py gsm8k-0.5b --*": f"{ON_A_GPU}; its files are examples",
    "torchrun * drgrpo.py *": f"{ON_A_GPU}; test_two_ranks_make_the_run_of_one runs torchrun",
    "torchrun * eval.py *": f"{ON_A_GPU}; tests/test_eval.py scores with two ranks",
    "until torchrun * drgrpo.py *": ON_A_GPU,
    "sbatch *": "no Slurm here; tests/test_run.py has two torchrun agents in its place",
    "python plan.py *--gpus 8*": (
        "reads the hub; test_the_command_prints_a_plan_and_trains_nothing plans the toy"
    ),
    "python eval.py --model *": "models and data of the hub; tests/test_eval.py scores the toy",
    "vllm serve runs/NAME/model": "a server; test_eval_scores_a_saved_model_as_training_did has it",
    "uv pip install *": "installs from an index of vLLM's; the FAQ says that it was not tried",
    "pip install trl==*": "TRL is no requirement",
    "torchrun * benchmarks/step.py *": "needs 8 GPUs; the same script runs on a CPU with one rank",
    "python -m pytest -q tests/test_precision.py *": "`make test-all` runs it, with all others",
    "python findings/*.py": "minutes of training; tests/test_findings.py has its committed numbers",
    "python findings/base_models.py --*": "models of the hub; see tests/test_base_models.py",
    "python benchmarks/chaos.py": "forty minutes of kills; its table is beside it",
    "MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py *": "its figures are beside it",
    "python benchmarks/traps.py": "runs 51 tests with the code broken; its table is beside it",
    "python benchmarks/*.py *": "a measurement; its figures are beside it",
}


def match(command: str, table: dict[str, str]) -> list[str]:
    """The entries for this command."""
    return [key for key in table if fnmatchcase(command, key)]


@pytest.mark.parametrize("page, command", COMMANDS)
def test_every_command_is_run_by_a_test_or_has_a_reason(page, command):
    found = match(command, RUN) + match(command, NOT_RUN)
    assert found, f"put it into RUN, with its test, or into NOT_RUN, with the reason: {command}"
    for key in match(command, RUN):
        file, _, test = RUN[key].partition("::")
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), RUN[key]


def test_the_two_lists_have_no_command_that_is_in_no_page():
    every = [command for _, command in COMMANDS]
    left = [key for key in RUN | NOT_RUN if not any(match(c, {key: ""}) for c in every)]
    assert left == []
    assert [c for c in every if match(c, RUN) and match(c, NOT_RUN)] == []


class Parsed(BaseException):
    """Thrown where a script has read its settings, so that it does nothing else."""


@pytest.fixture
def settings(monkeypatch):
    """settings(script, words) are those that the script reads from these words."""

    def stop_after(parse):
        def parsed(*arguments, **keywords):
            raise Parsed(parse(*arguments, **keywords))

        return parsed

    whole = tyro.extras.overridable_config_cli, tyro.cli
    monkeypatch.setattr(tyro.extras, "overridable_config_cli", stop_after(whole[0]))
    monkeypatch.setattr(tyro, "cli", stop_after(whole[1]))

    def read(script, words):
        monkeypatch.setattr(sys, "argv", [script, *words])
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        try:
            module.main()
        except Parsed as parsed:
            return parsed.args[0]
        raise AssertionError(f"{script} reads no settings")

    return read


def script_of(command: str) -> tuple[str, list[str]] | None:
    """The script of this project that a command runs, and its words; None if it runs none."""
    words = shlex.split(re.sub(r"^until (.*?); do .*$", r"\1", command))
    if words[0] == "sbatch":
        return "drgrpo.py", words[words.index("launch/slurm.sbatch") + 1 :]
    if words[0] == "torchrun":
        parsed = parse_torchrun(words[1:])
        after = [word for word in parsed.training_script_args if word != "--"]
        return parsed.training_script, after
    if words[0].endswith("python") and words[1] != "-m":
        return words[1], words[2:]
    return None


WITHOUT_SETTINGS = (
    "toy.py",
    "benchmarks/grader.py",
    "benchmarks/traps.py",
)  # nor has any finding but base_models


def check_settings(command, settings):
    """Raises if the script of a command is missing or does not know its settings."""
    found = script_of(command)
    if found is None:
        return
    script, words = found
    assert (ROOT / script).is_file(), script
    is_finding = script.startswith("findings/") and script != "findings/base_models.py"
    if script in WITHOUT_SETTINGS or is_finding or "--help" in words:
        return
    assert settings(script, words) is not None


@pytest.mark.parametrize(
    "page, command",
    [(page, command) for page, command in COMMANDS if page != "forks/README.md"],
)
def test_every_command_has_settings_that_its_script_knows(page, command, settings):
    check_settings(command, settings)


def test_settings_that_a_script_does_not_know_are_found(settings):
    with pytest.raises(SystemExit):
        check_settings("python drgrpo.py toy --no-such-setting 3", settings)
    with pytest.raises(SystemExit):
        check_settings("torchrun --nproc-per-node 8 eval.py --model x --no-such-setting", settings)
    with pytest.raises(SystemExit):  # torchrun reads --n as one of its own: hence the -- in docs
        check_settings("torchrun --nproc-per-node 8 eval.py --model x --n 32", settings)
    with pytest.raises(AssertionError):
        check_settings("python no_such_script.py", settings)


def test_make_knows_every_target_that_is_named(settings):
    targets = {"chaos", "fuzz"}
    for _, command in COMMANDS:
        words = command.split()
        targets |= set(words[1:]) if words[0] == "make" else set()
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for line in done.stdout.replace("\\\n", " ").splitlines():
            if re.match(r"\.venv/bin/python \S+\.py", line):
                check_settings(line, settings)


def test_the_shell_scripts_are_ones():
    for file in ("launch/slurm.sbatch", ".ci/run"):
        subprocess.run(["bash", "-n", ROOT / file], check=True)


def test_help_explains_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "drgrpo.py math-7b --help".split())
    with pytest.raises(SystemExit) as ended:
        drgrpo.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert [name for name in map(flag, vars(drgrpo.PRESETS["toy"][1])) if name not in printed] == []


def test_saved_responses_are_graded_again(tmp_path, monkeypatch, capsys):
    rows = [{"template": "none", "response": boxed(2), "answers": ["2"], "reward": 0.0}]
    file = write_jsonl(tmp_path / "FILE.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--regrade", file])
    evaluation.main()
    assert "none" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "FILE.regraded.jsonl")[0]["reward"] == 1


@pytest.fixture
def here(toy, tmp_path):
    """A folder with the toy, in which to give commands."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-base").symlink_to(toy)
    return tmp_path


def give(page: str, beginning: str, folder: Path, *more) -> None:
    """Give the command of a page that begins so, with more words."""
    (command,) = [command for command in commands(page) if command.startswith(beginning)]
    found = script_of(command)
    assert found is not None
    launch(1, ROOT / found[0], *found[1], *more, folder=folder, timeout=600)


@pytest.mark.slow
def test_the_reward_of_the_readme_trains(here):
    (here / "mine.py").write_text(readme_reward())
    small = "--steps 2 --prompts-per-step 4 --responses-per-update 16 --eval-dataset None".split()
    give("README.md", "python drgrpo.py toy --name brief", here, *small)
    samples = read_jsonl(here / "runs" / "brief" / "samples.jsonl")
    assert all(s["reward"] == -1 for s in samples if s["finish_reason"] == "length")
    for sample in samples:
        if sample["finish_reason"] == "stop":
            right = sample["answers"][0] in sample["response"]
            assert sample["reward"] == pytest.approx(right - 0.001 * len(sample["response"]))


@pytest.mark.slow
def test_the_run_of_the_tour_is_as_it_says(here):
    give("docs/tour.md", ".venv/bin/python drgrpo.py toy --name tour", here)
    rows = read_jsonl(here / "runs" / "tour" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"eval_accuracy", "reward", "gap"} <= rows[0].keys() and "eval_accuracy" in rows[3]
