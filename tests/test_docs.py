"""Facts about the pages: links lead somewhere, names exist, examples run, commands are understood.

A command of a page is read by the parser of the script that it names. What no test can read stands
in NOT_RUN_HERE, with the reason.
"""

import argparse
import asyncio
import math
import re
import runpy
import shlex
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import tyro
from torch.distributed.run import parse_args as parse_torchrun

from drgrpo import PRESETS, Rollout, group_advantages
from support.data import Problem
from support.grader import checked_reward
from support.records import summarize
from tests.helpers import ROOT, launch, read_jsonl

pytestmark = pytest.mark.project

NAMED = ("README.md", "BENCHMARKS.md", "findings/README.md", "forks/README.md")
DOCS = ("tour", "faq", "metrics", "evaluate", "traps", "rewards")
PAGES = (*NAMED, *(f"docs/{name}.md" for name in DOCS))
TEXT = {page: (ROOT / page).read_text() if (ROOT / page).exists() else "" for page in PAGES}
README, TOUR = TEXT["README.md"], TEXT["docs/tour.md"]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in (".", "support", "findings", "benchmarks", "forks", "tests")
    for path in sorted(ROOT.glob(f"{folder}/*.py"))
}
each_page = pytest.mark.parametrize("page", PAGES)

# ---------------------------------------------------------------------------- reading Markdown


def fenced(page: str) -> list[tuple[str, str]]:
    """The (language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", TEXT[page], re.M | re.S)


def python_blocks(page: str) -> list[str]:
    return [text for language, text in fenced(page) if language == "python"]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", TEXT[page], flags=re.M | re.S)


def spans(page: str) -> list[str]:
    """What stands in backticks, also over the end of a line."""
    found = []
    for paragraph in re.split(r"\n\s*\n", prose(page)):
        found += re.findall(r"`([^`]+)`", " ".join(paragraph.split()))
    return found


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# --------------------------------------------------------------------------------------- pages


def test_there_are_five_pages_and_one_on_rewards_and_a_short_readme():
    assert sorted(path.stem for path in (ROOT / "docs").glob("*.md")) == sorted(DOCS)
    assert len(README.splitlines()) <= 200


@each_page
def test_a_page_has_no_gaps_and_its_links_lead_to_files_and_headings(page):
    gaps = re.findall(r"\b[A-Z]+_(?:TABLE|LINE)\b|TODO|TBD", prose(page))
    wrong = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    assert TEXT[page] and gaps + wrong == []


# --------------------------------------------------------------------------------------- names

OTHERS_FLAGS = {"--shutdown-timeout"}  # of torchrun


def known_flags() -> set[str]:
    """Of all settings of this repository, the forks' included."""
    names: set[str] = {"help"}
    for text in SOURCES.values():
        names |= set(re.findall(r"^    (\w+): ", text, re.M))
        names |= set(re.findall(r'"--([\w-]+)"', text))
    for diff in (ROOT / "forks").glob("*.diff"):
        names |= set(re.findall(r"^\+    (\w+): ", diff.read_text(), re.M))
    return {"--" + name.replace("_", "-") for name in names} | OTHERS_FLAGS


@each_page
def test_settings_files_and_tests_that_a_page_names_are_there(page):
    flags, tests = known_flags(), "".join(text for name, text in SOURCES.items() if "test" in name)
    wrong = []
    for span in spans(page):
        if re.match(r"--\w", span) and span.split()[0].replace("--no-", "--") not in flags:
            wrong.append(span)
        if re.fullmatch(r"(support|tests|findings|forks|docs|benchmarks|launch)/[\w./-]+", span):
            wrong += [] if (ROOT / span).exists() else [span]
        if re.fullmatch(r"test_\w+", span) and f"def {span}(" not in tests:
            wrong.append(span)
    assert wrong == []


def test_the_tour_has_the_names_and_the_order_of_the_script():
    words = set(re.findall(r"\w+", "".join(SOURCES.values())))
    names = [span.removesuffix("()") for span in spans("docs/tour.md")]
    identifiers = [name for name in names if re.fullmatch(r"[a-zA-Z_][\w.]*", name)]
    assert [name for name in identifiers if not set(re.findall(r"\w+", name)) <= words] == []
    titles = " ".join(re.findall(r"^## \d+\. (.*)$", TOUR, re.M))
    places = [
        re.search(rf"^(?:def|class) {name}\b", SOURCES["drgrpo.py"], re.M)
        for name in re.findall(r"`(\w+)`", titles)
    ]
    assert len(places) > 10 and None not in places
    starts = [place.start() for place in places if place]
    assert starts == sorted(starts)


def test_the_presets_table_is_that_of_the_script():
    rows = re.findall(
        r"^\| `(?:python|torchrun .*?) ?drgrpo\.py ([\w.-]+)` \| (.*?) \|", README, re.M
    )
    assert [name for name, _ in rows] == list(PRESETS)
    for name, text in rows:
        model = PRESETS[name][1].model.split("/")[1]
        assert name == "toy" or model in text or "the paper's recipe" in text
    config, recipe = PRESETS["math-7b"][1], dict(rows)["math-7b"]
    responses = config.prompts_per_step * config.samples_per_prompt
    assert re.findall(r"\d+", recipe) == [
        str(config.prompts_per_step),
        str(config.samples_per_prompt),
        str(responses // config.responses_per_update),
        str(config.responses_per_update),
        str(config.max_response_tokens),
    ]


ONE_PROBLEM = [Problem("1+1", [1], ["2"], row={"answer": "2"})]


def test_the_table_of_metrics_has_what_a_run_writes(fake_run):
    of_no_verdict = [Rollout(0, [5], [6], [-1.0], reward=reward) for reward in (0.5, 1.0)]
    table = re.findall(r"^\| (`.*?) \| (.*?) \|", TEXT["docs/metrics.md"], re.M)
    named = metric_names(" ".join(name for name, _ in table))
    explained = named | metric_names(" ".join(meaning for _, meaning in table))
    fake_run(held_out=ONE_PROBLEM, eval_every=1)
    written = set(summarize(of_no_verdict, 2))
    for row in read_jsonl(Path("runs/run/metrics.jsonl")):
        written |= set(row)
    of_evaluation = {key for key in written if key.startswith("eval_")}
    assert {key.removeprefix("eval_") for key in of_evaluation} <= written
    assert named - {"eval_"} <= written
    assert written - of_evaluation - {"step"} <= explained


def metric_names(text: str) -> set[str]:
    """In backticks; after `seconds_sample` the others of its kind are `_sleep` and so on."""
    names = re.findall(r"`(\w+)(?:\.\.\.)?`", text)
    return {f"seconds{name}" if name.startswith("_") else name for name in names}


# ------------------------------------------------------------------------------------- numbers


def test_the_advantages_of_the_readme_are_those_of_the_code():
    rewards = torch.tensor([[1.0] + [0.0] * 7, [1.0] * 4 + [0.0] * 4])
    plain, divided = (group_advantages(rewards, by_std)[:, 0] for by_std in (False, True))
    one_of_8, four_of_8 = plain.tolist()
    text = f"its advantage is {one_of_8:g}; if 4 are, it is {four_of_8:g}: "
    text += f"{one_of_8 / four_of_8:g} times as much. Divided by the std it is {divided[0]:.2f} "
    text += (
        f"and {math.floor(divided[1] * 100 + 0.5) / 100:.2f}: {divided[0] / divided[1]:.1f} times"
    )
    assert text in " ".join(README.split())


# ------------------------------------------------------------------------------------ examples


def test_the_examples_of_the_tour_run_and_show_what_it_says(toy, capsys):
    space: dict = {}
    for block in python_blocks("docs/tour.md"):
        if "__main__" not in block:
            exec(block, space)
    printed = capsys.readouterr().out
    assert "1024 responses per step" in printed and "at most 3000 tokens" in printed
    assert "[ 0.7500, -0.2500, -0.2500, -0.2500]" in printed
    assert printed.count("[ 0.0000,  0.0000,  0.0000,  0.0000]") == 2, "it teaches nothing"
    assert "True False" in printed, "0.33 is not a third"
    assert "[[5, 6, 7, 8, 1]]" in printed and "[[0., 1., 1., 1.]]" in printed


@pytest.mark.slow
def test_the_loop_of_ones_own_in_the_tour_trains_and_saves(toy, tmp_path):
    (block,) = [block for block in python_blocks("docs/tour.md") if "__main__" in block]
    (tmp_path / "mine.py").write_text(block)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-base").symlink_to(toy)
    printed = launch(1, "mine.py", folder=tmp_path)
    assert re.findall(r"^(\d) [\d.]+ ", printed, re.M) == ["0", "1"]
    assert (tmp_path / "runs" / "my-model" / "model.safetensors").exists()


def test_the_rewards_of_the_pages_are_finite_numbers():
    space: dict = {}
    (brief,) = [block for block in python_blocks("README.md") if "def brief" in block]
    (judge,) = python_blocks("docs/rewards.md")
    exec(brief + judge, space)
    assert checked_reward(space["brief"]("", {"answer": "5"})) == 0
    assert space["brief"]("It is 5", {"answer": "5"}) == pytest.approx(1 - 0.007)
    space["ask"] = lambda text: len(text) / 10  # in place of a server
    assert asyncio.run(space["judge"]("5", {"problem": "2+3"})) == 0.5


# ------------------------------------------------------------------------------------ commands

NOT_RUN_HERE = {
    "head -n 1 runs/tour/metrics.jsonl": "after a run that is not made here",
    "tensorboard --logdir runs": "a server",
    "vllm serve runs/NAME/model": "a server; test_drgrpo.py loads such a model",
    "python -m pytest *": "it would run these tests again",
    "pip install*": "installs packages",
    "cp -r drgrpo.py *": "tests/test_copy.py does it",
    "git show *": "needs the history of this repository",
}
PROGRAMS = ("python", ".venv/bin/python", "torchrun", "make", "git", "sbatch", "cp", "pip", "uv")


def commands(page: str) -> list[str]:
    """Of indented blocks, of blocks of a shell, and of backticks."""
    blocks = re.findall(r"(?<=\n\n)(?:    .*\n)+", prose(page))
    blocks += [text for language, text in fenced(page) if language in ("sh", "bash", "console")]
    found = [span for span in spans(page) if " " in span and span.split()[0] in (*PROGRAMS, "vllm")]
    for block in blocks:
        lines = re.sub(r" +# .*$", "", block.replace("\\\n", " "), flags=re.M).splitlines()
        found += [line for line in lines if line.strip()]
    return [" ".join(command.split()) for command in found]


COMMANDS = sorted({(page, command) for page in PAGES for command in commands(page)})


class Parsed(BaseException):
    """Thrown where a script has read its settings, so that it does nothing else."""


READERS = (
    (tyro, "cli"),
    (tyro.extras, "overridable_config_cli"),
    (argparse.ArgumentParser, "parse_args"),
)


@pytest.fixture
def understood(monkeypatch):
    """understood(script, words) has the script read these words, and nothing else."""

    def stop_after(parse):
        def parsed(*arguments, **keywords):
            parse(*arguments, **keywords)
            raise Parsed

        return parsed

    def run(command, **settings):
        """In place of subprocess.run: a script that would start another one."""
        read(str(Path(command[1]).relative_to(ROOT)), command[2:])
        raise Parsed

    def read(script, words):
        if not re.search("tyro|argparse", SOURCES[script]):
            assert all((ROOT / word).exists() for word in words)
            return
        if not words:
            return  # nothing to understand: that there is such a script is enough
        words = [{"PRESET": "math-7b", "N": "8"}.get(word, word) for word in words]
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            for owner, name in READERS:
                patch.setattr(owner, name, stop_after(getattr(owner, name)))
            patch.setattr(subprocess, "run", run)
            patch.setattr(sys, "argv", [script, *words])
            runpy.run_path(str(ROOT / script), run_name="__main__")

    return read


def script_of(command: str) -> tuple[str, list[str]] | None:
    """The script that a command runs, and its words; None if it runs none."""
    words = shlex.split(re.sub(r"^(\w+=\S+ )+", "", command))
    if words[0] == "sbatch":
        return "drgrpo.py", words[words.index("launch/slurm.sbatch") + 1 :]
    if words[0] == "torchrun":
        parsed = parse_torchrun(words[1:])
        return parsed.training_script, [w for w in parsed.training_script_args if w != "--"]
    if words[0].endswith("python") and words[1] == "-m":
        return words[2].replace(".", "/") + (
            "/__main__.py" if words[2] == "findings" else ".py"
        ), words[3:]
    return (words[1], words[2:]) if words[0].endswith("python") else None


@pytest.mark.parametrize("page, command", COMMANDS)
def test_every_command_is_understood_or_has_a_reason(page, command, understood):
    if any(fnmatchcase(command, key) for key in NOT_RUN_HERE):
        return
    words, found = shlex.split(command), script_of(command)
    if page == "forks/README.md" and "drgrpo.py" in words:
        return  # tests/test_forks.py: a fork has settings of its own
    if words[0] == "make":
        make = ["make", "-n", *words[1:]]
        printed = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert "Nothing to be done" not in printed
        for line in printed.replace("\\\n", " ").splitlines():
            if re.match(r"\.venv/bin/python \S+\.py", line):
                understood(*script_of(line))
    elif words[:2] == ["git", "apply"]:
        assert all((ROOT / word).exists() for word in words[2:])
    else:
        assert found, f"put it into NOT_RUN_HERE, with the reason: {command}"
        assert (ROOT / found[0]).is_file()
        if "--help" not in found[1]:
            understood(*found)


def test_every_reason_is_for_a_command_of_some_page():
    every = [command for _, command in COMMANDS]
    assert [key for key in NOT_RUN_HERE if not any(fnmatchcase(c, key) for c in every)] == []


@pytest.mark.parametrize("command", [
    "python drgrpo.py toy --no-such-setting 3",
    "python drgrpo.py no-such-preset --seed 3",
    "torchrun --nproc-per-node 8 eval.py --model x --n 32",  # torchrun takes --n: hence -- in docs
])  # fmt: skip
def test_a_wrong_command_is_not_understood(command, understood):
    with pytest.raises(SystemExit):
        understood(*script_of(command))


def test_the_shell_scripts_are_ones():
    for file in ("launch/slurm.sbatch", ".ci/run"):
        subprocess.run(["bash", "-n", ROOT / file], check=True)
