"""Facts about the pages: links lead somewhere, names exist, examples run, commands are understood.

A command of a page is read by the parser of the script that it names.
"""

import argparse
import asyncio
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import tyro
from torch.distributed.run import parse_args as parse_torchrun

from drgrpo import PRESETS, Rollout
from support.grader import checked_reward
from support.records import summarize
from tests.helpers import ROOT, launch, read_jsonl
from tests.runs import train

pytestmark = pytest.mark.project

NAMED = ("README.md", "BENCHMARKS.md", "findings/README.md", "forks/README.md")
PAGES = (*NAMED, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
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


def test_the_readme_is_short():
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
    assert gaps + wrong == []


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
    command = r"^\| `(?:python|torchrun .*?) ?drgrpo\.py ([\w.-]+)` \| (.*?) \|"
    rows = dict(re.findall(command, README, re.M))
    assert list(rows) == list(PRESETS)
    paper = PRESETS["math-7b"][1]
    updates = paper.prompts_per_step * paper.samples_per_prompt // paper.responses_per_update
    recipe = f"{paper.prompts_per_step} prompts x {paper.samples_per_prompt} responses a step, "
    recipe += f"{updates} updates of {paper.responses_per_update}, "
    assert recipe + f"{paper.max_response_tokens} tokens" in rows["math-7b"]


def test_the_table_of_metrics_has_what_a_run_writes(here):
    of_no_verdict = [Rollout(0, [5], [6], [-1.0], reward=reward) for reward in (0.5, 1.0)]
    table = re.findall(r"^\| (`.*?) \| (.*?) \|", TEXT["docs/metrics.md"], re.M)
    named = metric_names(" ".join(name for name, _ in table))
    explained = named | metric_names(" ".join(meaning for _, meaning in table))
    train(eval_every=1)
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
def test_the_loop_of_ones_own_in_the_tour_trains_and_saves(toy_here, tmp_path):
    (block,) = [block for block in python_blocks("docs/tour.md") if "__main__" in block]
    (tmp_path / "mine.py").write_text(block)
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

# What runs no script of ours
OTHERS = ("cp", "git", "head", "pip", "tensorboard", "vllm")
OURS = ("python", ".venv/bin/python", "torchrun", "make")


def commands(page: str) -> list[str]:
    """Of indented blocks, of blocks of a shell, and of backticks."""
    blocks = re.findall(r"(?<=\n\n)(?:    .*\n)+", prose(page))
    blocks += [text for language, text in fenced(page) if language in ("sh", "bash", "console")]
    found = [span for span in spans(page) if " " in span and span.split()[0] in OURS]
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


def stop_after(parse):
    def parsed(*arguments, **keywords):
        parse(*arguments, **keywords)
        raise Parsed

    return parsed


def understand(command: str) -> None:
    """Let the script of a command read its words, and do nothing else."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        parsed = parse_torchrun(words)
        words = [parsed.training_script, *parsed.training_script_args]
    script, *words = [{"PRESET": "math-7b", "N": "8"}.get(word, word) for word in words]
    assert (ROOT / script).is_file()
    if not words or "--help" in words:
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        for owner, name in READERS:
            patch.setattr(owner, name, stop_after(getattr(owner, name)))
        patch.setattr(subprocess, "run", mock.Mock(side_effect=Parsed))  # of another script
        patch.setattr(sys, "argv", [script, *(word for word in words if word != "--")])
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("page, command", COMMANDS)
def test_every_command_is_understood(page, command):
    program, *words = command.split()
    if page == "forks/README.md" and "drgrpo.py" in words:
        return  # tests/test_forks.py: a fork has settings of its own
    if program == "make":
        make = ["make", "-n", *words]
        printed = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert "Nothing to be done" not in printed
        for line in re.findall(r"^\.venv/bin/python \S+\.py.*", printed, re.M):
            understand(line)
    elif program not in OTHERS and words[:2] != ["-m", "pytest"]:
        understand(command)


def test_the_shell_scripts_are_ones():
    for file in ("launch/slurm.sbatch", ".ci/run"):
        subprocess.run(["bash", "-n", ROOT / file], check=True)
