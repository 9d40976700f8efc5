"""Put each trap of docs/traps.md back into a copy of the code, and see its test fail.

    python benchmarks/traps.py               # all, in half an hour
    python benchmarks/traps.py std bf16      # those whose name holds one of these words

A trap here is an edit of one file or two: text that stands there once, and what is put in its
place. The table at the end says for each whether the tests named in docs/traps.md noticed.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.metrics import markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "traps.md"
TOO_LONG = 300  # seconds; a test that hangs has noticed
SCRIPT, HEAD = "drgrpo.py", "support/logprobs.py"


@dataclass(frozen=True)
class Trap:
    """A row of docs/traps.md, by how its first cell begins, and the edits that put it back."""

    begins: str
    edits: tuple[tuple[str, str, str], ...]  # file, old text, new text


def trap(begins: str, *edit: str) -> Trap:
    """Edits as file, old, new, file, old, new, ..."""
    return Trap(begins, tuple(zip(edit[::3], edit[1::3], edit[2::3], strict=True)))


RELOAD = """self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": weights, "is_checkpoint_format": True}
        )"""
EMPTIED = "self.llm.reset_prefix_cache()  # what was sampled before must not change a bit"
LOSS = "loss = response_loss.sum() / denominator"
TRAPS = [
    trap("After a sleep the engine samples", SCRIPT, RELOAD, "list(weights)"),
    trap(
        "A sync is skipped",
        SCRIPT,
        'guards.refuse_gap(totals["gap"] / totals["tokens"], config.max_gap, config.dtype)',
        "pass",
    ),
    trap(
        "An error of the sync",
        SCRIPT,
        RELOAD,
        f"try:\n            {RELOAD}\n        except Exception:\n            pass",
    ),
    trap(
        "One tensor is not sent",
        SCRIPT,
        "guards.all_sent(full_weights(policy.model, self.dtype), names)",
        "full_weights(policy.model, self.dtype)",
    ),
    trap(
        "The prefix cache holds",
        SCRIPT,
        "if not self.llm.reset_prefix_cache():",
        "if False:",
        SCRIPT,
        EMPTIED,
        "pass",
    ),
    trap("A cached prompt changes", SCRIPT, EMPTIED, "pass"),
    trap(
        "A head tied to the embedding",
        SCRIPT,
        "for name, weight in model.state_dict().items():",
        "for name, weight in model.named_parameters():",
    ),
    trap("The loss is divided by the micro-batch's rows", SCRIPT, LOSS, LOSS + " / len(mask)"),
    trap(
        "FSDP's mean over ranks",
        SCRIPT,
        "(loss * dist.get_world_size()).backward()",
        "loss.backward()",
    ),
    trap(
        "The loss is divided by the tokens", SCRIPT, LOSS, "loss = response_loss.sum() / mask.sum()"
    ),
    trap(
        "Divided twice under accumulation",
        SCRIPT,
        "        config.denominator,\n",
        "        config.denominator * policy.micro_batches,\n",
        SCRIPT,
        "        sums: dict = defaultdict(float)\n",
        "        sums: dict = defaultdict(float)\n        policy.micro_batches = len(batches)\n",
    ),
    trap("Divided by the length as well", SCRIPT, "    if divide_by_length:\n", "    if True:\n"),
    trap("The std stays", SCRIPT, "    if divide_by_std:\n", "    if True:\n"),
    trap(
        "The constant holds the prompt",
        SCRIPT,
        "1 if self.divide_by_length else self.max_response_tokens",
        "1 if self.divide_by_length else self.max_response_tokens + self.max_prompt_tokens",
    ),
    trap("The normaliser counts prompt", SCRIPT, "mask[row, response] = 1", "mask[row] = 1"),
    trap(
        "A batch whose responses are all masked",
        SCRIPT,
        LOSS,
        LOSS + " * mask.sum() / mask.sum()",
    ),
    trap(
        "Log-probs of the raw logits",
        SCRIPT,
        'logprobs_mode="processed_logprobs"',
        'logprobs_mode="raw_logprobs"',
    ),
    trap("top_p leaves out mass", SCRIPT, "if self.top_p != 1:", "if self.top_p > 1:"),
    trap("top_k = 50", SCRIPT, "logprobs=0,", "logprobs=0,\n                top_k=50,"),
    trap(
        "Importance weights of whole sequences",
        SCRIPT,
        "importance_ratio = log_importance.exp()",
        "importance_ratio = log_importance.sum(1, keepdim=True).expand_as(log_importance).exp()",
    ),
    trap(
        "Ranks with different numbers",
        SCRIPT,
        "return [batch or [EMPTY_ROLLOUT] for batch in batches[rank::world]]",
        "return [batch for batch in batches[rank::world] if batch]",
    ),
    trap("A step whose groups", SCRIPT, "        if not active:\n", "        if False:\n"),
    trap("Packed rows see each other", HEAD, "x.split(lengths.tolist(), dim=2)", "[x]"),
    trap(
        "Packed rows count their positions",
        HEAD,
        "position_ids=column.expand_as(ids)[real][None],",
        "position_ids=torch.arange(int(real.sum()))[None],",
    ),
    trap(
        "`mask = ids != pad`",
        SCRIPT,
        "mask[row, response] = 1",
        "mask[row, response] = (ids[row, 1 : len(rollout)] != 0).float()[response]",
    ),
    trap(
        "EOS is cut off",
        "support/guards.py",
        'if rollout.finish_reason == "stop" and not (ends_in_eos or ends_in_stop):',
        "if False:",
    ),
    trap(
        "Special tokens inside the prompt",
        HEAD,
        "real = column < lengths[:, None]",
        "real = (column < lengths[:, None]) & (ids > 1)",
    ),
    trap(
        "The text is tokenized again",
        SCRIPT,
        "                        list(response.token_ids),\n",
        "                        self.llm.get_tokenizer().encode(decode(response.token_ids)),\n",
    ),
    trap(
        "Two BOS",
        "support/data.py",
        "has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)",
        "has_bos = False",
    ),
    trap(
        "math-verify's timeout is no",
        "support/grader.py",
        "except TimeoutException:",
        "except ZeroDivisionError:",
    ),
    trap(
        "Its alarms fail in threads",
        "support/grader.py",
        "        try:\n            return self.wait_for(calls)",
        "        try:\n            return {key: run_call(9, *call) for key, call in calls.items()}",
    ),
    trap(
        "It fills the memory",
        "support/grader.py",
        "limit(resource.RLIMIT_AS, pages * resource.getpagesize() + WORKER_BYTES)",
        "pass",
    ),
    trap(
        "Gold and answer exchanged",
        "support/grader.py",
        "        for text in (gold, answer)\n",
        "        for text in (answer, gold)\n",
    ),
    trap(
        "A pool whose timeout does not kill",
        "support/grader.py",
        "args=(cpu_seconds, *call), timeout=self.timeout)",
        "args=(10**6, *call))",
    ),
    trap(
        "Answers are run by `eval`",
        "support/grader.py",
        "    if not answer:\n        return False\n",
        "    if not answer:\n        return False\n    eval(answer)\n",
    ),
    trap(
        "A row without gold",
        "support/data.py",
        "elif needs_answer and not golds:",
        "elif False:",
    ),
    trap(
        "No memory when the engine wakes",
        SCRIPT,
        "torch.cuda.empty_cache()  # what gathering left behind",
        "pass  # what gathering left behind",
    ),
    trap("All ranks draw the same", SCRIPT, "seeds[share]", "seeds[: len(mine)]"),
    trap(
        "vLLM sets the global random numbers",
        "support/data.py",
        'draw = np.random.default_rng(derive_seed("order", seed, epoch))',
        "draw = np.random.mtrand._rand",
    ),
    trap("bf16 weights do not move", SCRIPT, "    policy.float()", "    pass"),
    trap(
        "Truncated responses are rewarded",
        SCRIPT,
        "config.truncated_reward if truncated else verdict.reward",
        "verdict.reward",
    ),
    trap(
        "No group has a signal",
        "support/guards.py",
        "if self.without_signal == PATIENCE:",
        "if False:",
    ),
    trap(
        "Twelve equal rewards",
        SCRIPT,
        "return torch.where(equal, torch.zeros_like(advantages), advantages)",
        "return advantages",
    ),
    trap("A resumed run's first step", SCRIPT, "if run.first_step > 0:", "if False:"),
    trap(
        "A resumed run takes a batch twice",
        "support/run.py",
        "steps = range(self.first_step, config.steps + 1)",
        "steps = range(max(self.first_step - 1, 0), config.steps + 1)",
    ),
    trap(
        "A new learning rate",
        "support/run.py",
        "if key not in MAY_CHANGE and before != value:",
        "if False:",
    ),
    trap(
        "The last step is not saved",
        SCRIPT,
        "if step % config.eval_every == 0 or step == config.steps:",
        "if step % config.eval_every == 0:",
    ),
    trap(
        "Lengths are taken after masking",
        "support/metrics.py",
        '"length": mean(len(r.response_ids) for r in rollouts),',
        '"length": mean(len(r.response_ids) for r in rollouts if r.advantage != 0),',
    ),
    trap("The logged KL shrinks", SCRIPT, '"kl": kl.sum().detach()', '"kl": kl.mean().detach()'),
    trap("The logged loss is the last", SCRIPT, "sums[key] += value", "sums[key] = value"),
    trap(
        "A command in the README",
        "README.md",
        "python plan.py math-7b --gpus 8 ",
        "python plan.py math-7b --cards 8 ",
    ),
]


def tests_of(begins: str) -> list[str]:
    """The names of the tests in the trap's row of docs/traps.md."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {begins}")]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of {PAGE.name} begin with {begins!r}")
    return re.findall(r"`(test_\w+)`", rows[0])


def copy_of_the_tree(folder: Path) -> None:
    """All files that git knows or would take, and the toy base model where it was made."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "runs").mkdir()
    if (ROOT / "runs" / "toy-base").exists():
        shutil.copytree(ROOT / "runs" / "toy-base", folder / "runs" / "toy-base")


def notices(folder: Path, name: str) -> bool:
    """Whether a test of this name fails."""
    files = [folder / "test_drgrpo.py", *sorted((folder / "tests").glob("test_*.py"))]
    found = [str(file) for file in files if f"def {name}(" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *found]
    try:
        done = subprocess.run(
            [*command, "-k", name], cwd=folder, capture_output=True, timeout=TOO_LONG
        )
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in (0, 1):  # 1: a test failed; others: no test was run
        raise RuntimeError(done.stdout.decode()[-2000:])
    return done.returncode == 1


def put_back(folder: Path, chosen: Trap) -> str:
    """Edit the copy, run the trap's tests until one notices, and take the edits back."""
    before = {name: (folder / name).read_text() for name, _, _ in chosen.edits}
    try:
        for name, old, new in chosen.edits:
            text = (folder / name).read_text()
            if text.count(old) != 1:
                raise ValueError(f"{name} has this text {text.count(old)} times: {old}")
            (folder / name).write_text(text.replace(old, new))
        for test in tests_of(chosen.begins):
            if notices(folder, test):
                return test
    finally:
        for name, text in before.items():
            (folder / name).write_text(text)
    return ""


def main() -> None:
    words = sys.argv[1:]
    chosen = [t for t in TRAPS if not words or any(word in t.begins for word in words)]
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_of_the_tree(folder)
        for one in tqdm(chosen, unit="trap"):
            start = time.monotonic()
            test = put_back(folder, one)
            seconds = f"{time.monotonic() - start:.0f}"
            table.append([one.begins, f"`{test}`" if test else "NOT NOTICED", seconds])
    print(markdown(["trap", "the test that failed", "seconds"], table))
    unnoticed = sum(1 for row in table if row[1] == "NOT NOTICED")
    print(f"\n{len(table) - unnoticed} of {len(table)} traps were noticed.")
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
