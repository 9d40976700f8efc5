"""What saving a state costs a run: a table in Markdown.

    python benchmarks/save.py --shape 0.5b

`the run waits` is the copy to the CPU's memory, after which the next step begins; the rest is
written in a thread: the files by torch.distributed.checkpoint, then their sha256 for the manifest.
Loading checks these first, as a run that goes on does. Weights are random, and Adam has made one
step.
"""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
from benchmarks.shapes import SHAPES, make_model
from support.checkpoint import StateKeeper, describe_files, newest_whole_state
from support.metrics import markdown, versions
from support.ranks import start_ranks


@dataclass(frozen=True)
class Options:
    """Time a state's saving and loading."""

    shape: str = "0.5b"  # of shapes.py
    folder: Path = Path("runs/save")  # of the states; removed at the end


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.shape not in SHAPES:
        sys.exit(f"error: --shape must be one of {', '.join(SHAPES)}")
    start_ranks(training=True)
    config = drgrpo.Config(name="save", model=make_model(options.shape), dataset="")
    policy = drgrpo.make_policy(config)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, fused=True)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    keeper = StateKeeper(options.folder, policy, optimizer)
    seconds = {}

    def timed(what: str, function, *arguments) -> None:
        start = time.perf_counter()
        function(*arguments)
        seconds[what] = time.perf_counter() - start

    timed("the run waits", keeper.save, 1, {})
    timed("written in the thread", keeper.wait)
    timed("of it the sha256", describe_files, options.folder / "1")
    timed("checked before loading", newest_whole_state, options.folder)
    timed("loaded", keeper.load, 1)
    size = sum(file.stat().st_size for file in (options.folder / "1").iterdir()) / 1e9
    table = [[what, f"{s:.2f}", f"{size / s:.2f}"] for what, s in seconds.items()]
    print(markdown(["", "seconds", "GB/s"], table))
    weights = sum(parameter.numel() for parameter in policy.parameters())
    print(
        f"\n{size:.2f} GB for {weights:,} weights. "
        + ", ".join(f"{package} {number}" for package, number in versions().items())
    )
    keeper.close()
    shutil.rmtree(options.folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
