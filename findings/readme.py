"""findings/README.md, written from the committed numbers.

python -m findings.readme     # draws all figures and writes all texts again, and trains nothing
"""

from pathlib import Path

from findings import (
    difficulty_bias,
    length_bias,
    one_group,
    random_reward,
    template_and_data,
    toy_base_model,
    unbiased,
)
from findings.finding import Finding

README = Path(__file__).with_name("README.md")
ALL = (
    one_group.FINDING,
    unbiased.FINDING,
    length_bias.FINDING,
    difficulty_bias.FINDING,
    template_and_data.FINDING,
    random_reward.FINDING,
    toy_base_model.FINDING,
)
INTRO = """# Findings: see it with your own eyes

What [arXiv 2503.20783](https://arxiv.org/abs/2503.20783) says of GRPO and Dr. GRPO, tried on
the toy of this repository: a base model of 0.2M parameters that is asked to add four numbers.
Each finding is one command, and

    make findings

runs all of them. Training runs are shared (`runs/findings-*`), and those that are finished are not
trained again. Each finding leaves a figure, a text and its numbers in [results](results). This page
is written from these numbers by `python -m findings.readme`, and a test compares the two.

A toy can show that an effect exists and where it comes from. It cannot show how large the effect is
in a large model. Each finding ends with what it does not show.
"""


def measured() -> list[Finding]:
    """The findings whose numbers are there."""
    return [finding for finding in ALL if finding.file(".json").exists()]


def render() -> str:
    """The whole page. It names the findings that have not been run."""
    left = [f"`{finding.command}`" for finding in ALL if finding not in measured()]
    parts = [INTRO, *(finding.text("results/") for finding in measured())]
    if left:
        parts.append(f"## Not yet run\n\nTheir numbers are not here: {', '.join(left)}.\n")
    return "\n".join(parts)


def main() -> None:
    for finding in measured():
        finding.redraw()
    README.write_text(render())


if __name__ == "__main__":
    main()
