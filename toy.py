"""A toy world for the RL script: a small base model and arithmetic problems.

R1-Zero starts reinforcement learning from a *base* model: one that has only read text. What such
a model writes when asked a question is a sample of what it has read, good and bad alike. So this
file makes up a small internet of arithmetic, in which people answer "What is 7-4+5-2?" in three
ways, and pre-trains a tiny Qwen2 on it from scratch:

  terse    "It is \\boxed{4}"                                 most common, and mostly a wrong guess
  worked   "Step by step:\\n7-4=3\\n3+5=8\\n8-2=6\\n\\boxed{6}"     less common, but right
  aimless  "Hmm,\\n7-4=3\\nwait,\\n7-4=3\\n3+5=8\\n..."       starts over, stops anywhere or never

The mix is what makes the model worth training. It cannot add four numbers in its head, so terse
answers fail; but it has learned to add two, so worked ones succeed. Asked plainly, it works a
problem out only now and then. Reinforcement learning has to find this out from the reward alone.

Nothing that makes the toy knows about RL: the outcome is an ordinary Hugging Face checkpoint and
two JSONL files with the columns `problem` and `answer`.

    python toy.py              # runs/toy-base: the model of toy_base/, and the problems. A second
    python toy.py --rebuild    # the same, but the model is pre-trained anew. About two minutes
    python toy.py --show       # what the run runs/toy did to the model: `make toy` ends with it

The model was made by `--rebuild` once and is kept in toy_base/, so that everybody trains the same
one: pre-trained on another CPU it differs, because sums are rounded in another order.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

# torch and transformers take seconds to import, and only --rebuild needs them. The functions that
# use them import them.

BASE = Path(__file__).with_name("toy_base")  # the model that comes with this file
SEED = 0
EOS, PAD, VOCAB = "<|endoftext|>", "<|pad|>", 320
TERMS, TRAIN, TEST, DOCS = 4, 5000, 500, 45_000
BATCH, PEAK_LR, WARMUP = 16, 3e-3, 30
LONGEST = 112  # tokens of a document; longer ones are cut there and never reach their EOS


def make_problem(rng):
    """Draw signed terms whose running total is always one digit, for that is all we teach."""
    terms = [rng.randint(0, 9)]
    while len(terms) < TERMS:
        total = sum(terms)
        terms.append(rng.choice([d for d in range(-9, 10) if d != 0 and 0 <= total + d <= 9]))
    return tuple(terms)


def draw_problems(rng):
    """Different problems, the held-out ones first."""
    problems = {}  # a dict is a set that remembers its order
    while len(problems) < TEST + TRAIN:
        problems[make_problem(rng)] = None
    return list(problems)


def question(terms):
    """Spell a problem; it ends in a newline, so that the answer starts on a line of its own."""
    return "What is " + "".join(f"{term:+d}" for term in terms).lstrip("+") + "?\n"


def terse(terms, rng):
    """Answer at once. Most of the people who do this are guessing."""
    guess = rng.randint(0, 9) if rng.random() < 0.85 else sum(terms)
    return f"It is \\boxed{{{guess}}}"


def step(terms, done):
    """Add one term to the total of those that are done, such as "3+5=8"."""
    total = sum(terms[:done])
    return f"{total}{terms[done]:+d}={total + terms[done]}"


def worked(terms, rng):
    """Keep a running total, one term to a line. Nothing in it is left to chance."""
    lines = ["Step by step:"] + [step(terms, done) for done in range(1, len(terms))]
    return "\n".join(lines) + f"\n\\boxed{{{sum(terms)}}}"


def aimless(terms, rng):
    """Start over again and again, stop anywhere, and box whatever is there or give up."""
    done, lines = 1, ["Hmm,"]
    while rng.random() < 0.89:
        if done == len(terms) or rng.random() < 0.2:
            done = 1
            lines.append("wait,")
        lines.append(step(terms, done))
        done += 1
    lines.append(f"\\boxed{{{sum(terms[:done])}}}" if rng.random() < 0.7 else "I do not know")
    return "\n".join(lines)


def make_corpus(rng, held_out):
    """Write the documents: a question nobody will be tested on, and some stranger's answer."""
    documents = []
    while len(documents) < DOCS:
        terms = make_problem(rng)
        if terms not in held_out:
            (style,) = rng.choices([terse, worked, aimless], [0.5, 0.24, 0.26])
            documents.append(question(terms) + style(terms, rng) + EOS)
    return documents


def train_tokenizer(documents):
    """Byte-level BPE as in Qwen2 (each digit a token of its own), its few merges learned here."""
    from transformers import Qwen2Tokenizer

    special = {"eos_token": EOS, "pad_token": PAD, "clean_up_tokenization_spaces": False}
    texts = (text.removesuffix(EOS) for text in documents)
    return Qwen2Tokenizer(**special).train_new_from_iterator(texts, VOCAB, show_progress=False)


def init_model(tokenizer):
    """A Qwen2 of 0.2M parameters; heads of 32 are the smallest that vLLM runs on a CPU."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        # The usual 0.02 and 10,000 suit wide models and long texts, and learn slowly here.
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def pretrain(model, tokenizer, documents, rng):
    """One pass of next-token prediction over the corpus, one document to a row."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much when busy
    rows = [torch.tensor(ids[:LONGEST]) for ids in tokenizer(documents).input_ids]
    rows.sort(key=len)  # batches of like length hold little padding
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    rng.shuffle(batches)
    tokens_per_batch = sum(map(len, rows)) / len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95))

    def scale(i):
        return min((i + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * i / len(batches)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    for batch in (bar := tqdm(batches, desc="pre-training the toy base model")):
        ids = torch.nn.utils.rnn.pad_sequence(batch, True, tokenizer.pad_token_id)
        # Padding is on the right, where causal attention cannot see it: only labels need a mask.
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        # A mean over each batch would overrate the tokens of short texts: divide all by the same.
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=tokens_per_batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")


def build_toy(folder, rebuild):
    """Write the problems into `folder`, and the model beside them."""
    rng = random.Random(SEED)
    problems = draw_problems(rng)
    if rebuild:
        documents = make_corpus(rng, set(problems[:TEST]))
        tokenizer = train_tokenizer(documents)
        model = init_model(tokenizer)
        pretrain(model, tokenizer, documents, rng)
        tokenizer.save_pretrained(folder / "model")
        model.save_pretrained(folder / "model")
    else:
        shutil.copytree(BASE, folder / "model")
    for name, part in [("test", problems[:TEST]), ("train", problems[TEST:])]:
        rows = [{"problem": question(terms), "answer": str(sum(terms))} for terms in part]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def make_toy(folder: Path | str = "runs/toy-base", rebuild: bool = False) -> None:
    """Make folder/model, folder/train.jsonl and folder/test.jsonl, unless they are there.

    `rebuild` pre-trains the model anew, also if a folder is there. All is built beside the folder
    and renamed into place at the end, so an interrupted run leaves no half of one. Of several
    processes that want the toy, one builds it and the others wait.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists() and not rebuild:
            return
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            new = Path(temporary) / folder.name
            build_toy(new, rebuild)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)


def show_run(run: Path | str = "runs/toy", toy: Path | str = "runs/toy-base") -> None:
    """Print how many held-out problems the model solves before and after a run, and a response of
    its first and of its last step. Raises SystemExit if there is no such run."""
    run, toy = Path(run), Path(toy)
    if not (run / "metrics.jsonl").exists():
        raise SystemExit(f"error: no run in {run}: python drgrpo.py toy")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    scored = [row for row in rows if row.get("eval_accuracy") is not None]
    problems = len((toy / "test.jsonl").read_text().splitlines())
    print(f"\n{run}: one greedy response to each held-out problem\n")
    print("| | right | tokens per response |\n| --- | --- | --- |")
    for row in (scored[0], scored[-1]):
        solved = round(row["eval_accuracy"] * problems)
        name = f"after {row['step']} steps" if row["step"] else "before"
        print(f"| {name} | {solved} of {problems} | {row['eval_length']:.1f} |")
    last = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    for sample in (samples[0], last[0]):
        asked, response = sample["prompt"], sample["response"]
        print(f"\nThe first response of step {sample['step']}:\n\n{asked}{response}")
    print(f"\nThe curves of the run are in {run}/curves.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rebuild", action="store_true", help="pre-train the model anew")
    parser.add_argument("--show", action="store_true", help="print what the run runs/toy did")
    arguments = parser.parse_args()
    if arguments.show:
        show_run()
    else:
        make_toy(rebuild=arguments.rebuild)
