"""All findings, one after the other: `python -m findings`, or `make findings`.

`python -m findings --page` only draws the figures and writes README.md again, from the numbers
that are there.
"""

import argparse
import sys
from pathlib import Path

from findings import (
    base_models,
    difficulty_bias,
    length_bias,
    one_group,
    random_reward,
    real_model,
    template_and_data,
    unbiased,
)

README = Path(__file__).with_name("README.md")
ALL = (
    one_group.FINDING,
    unbiased.FINDING,
    length_bias.FINDING,
    difficulty_bias.FINDING,
    template_and_data.FINDING,
    random_reward.FINDING,
    base_models.FINDING,
)
REAL = real_model.FINDING  # needs a model and data, and hours: only its own command measures it
INTRO = """# Findings: see it with your own eyes

What [arXiv 2503.20783](https://arxiv.org/abs/2503.20783) says of GRPO and Dr. GRPO, tried on the
toy of this repository: a base model of 0.2M parameters ([toy_base](../toy_base)) that is asked to
add four numbers. Each finding is one command; `make findings` runs all of them. They share their
training runs (`runs/findings-*`), and a finished run is not trained again.

A toy can show that an effect exists and where it comes from. It cannot show how large the effect is
in a large model. "Not shown" says what each finding leaves open. The last section is a short run of
a real model.

"""


def table() -> str:
    """A line for each finding."""
    head = "| finding, on the toy | measured [95% interval] | command |\n|---|---|---|\n"
    return head + "\n".join(finding.row() for finding in ALL)


def page() -> str:
    """README.md, written by `python -m findings --page`; a test compares the two."""
    return INTRO + table() + "\n\n" + "\n".join(finding.section() for finding in (*ALL, REAL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="train and measure nothing")
    redraw = parser.parse_args().page
    for number, finding in enumerate(ALL, start=1):
        print(f"=== finding {number} of {len(ALL)}: {finding.claim}", file=sys.stderr, flush=True)
        if redraw:
            finding.write_figure()
        else:
            finding.run()
    REAL.write_figure()
    README.write_text(page())


if __name__ == "__main__":
    main()
