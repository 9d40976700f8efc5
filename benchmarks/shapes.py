"""Models of known shapes with random weights, and problems and responses of a fixed mix of lengths.

Nothing is downloaded: every shape has the toy model's tokenizer and the vocabulary of its own size.
"""

import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.data import Problem
from toy import make_toy

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied; the last three: Qwen2.5.
# "10m-eos" has few tokens, so that a random model draws EOS about once in 300 and lengths differ.
SHAPES = {
    "10m": (256, 1024, 8, 4, 2, 8192, True),
    "10m-eos": (256, 1024, 8, 4, 2, 300, True),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
}


def make_model(shape: str) -> str:
    """The folder of a checkpoint of this shape; "toy" is the toy base model, which is trained."""
    make_toy()
    if shape == "toy":
        return "runs/toy-base/model"
    folder = Path("runs/shapes")
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f".{shape}.lock"):  # of several ranks one makes it, the others wait
        if not (folder / shape).exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                random_model(shape).save_pretrained(f"{temporary}/{shape}")
                tokenizer = AutoTokenizer.from_pretrained("runs/toy-base/model")
                tokenizer.save_pretrained(f"{temporary}/{shape}")
                Path(temporary, shape).rename(folder / shape)
    return str(folder / shape)


def random_model(shape: str) -> Qwen2ForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        eos_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=0)
    return model


def length_mix(count: int, longest: int) -> list[int]:
    """Log-normal lengths as of a reasoning model's responses: of mean 700 before they are cut off
    at a limit of 3000, and in proportion elsewhere."""
    drawn = np.random.default_rng(0).lognormal(-0.5, 1.0, count)  # mean 1
    return [int(n) for n in np.clip(drawn * longest * 700 / 3000, 2, longest)]


def make_problems(count: int, tokens: int) -> list[Problem]:
    """Random prompts of so many tokens, each with a fraction as its answer."""
    draw, problems = random.Random(0), []
    for _ in range(count):
        prompt = [draw.randrange(2, 250) for _ in range(tokens)]
        problems.append(Problem("", prompt, [fraction(draw)]))
    return problems


def fraction(draw: random.Random) -> str:
    return f"\\frac{{{draw.randrange(1, 1000)}}}{{997}}"


def response_text(gold: str, right: bool, draw: random.Random) -> str:
    """A response whose answer is spelled so that it must be computed."""
    value = gold if right else f"{draw.randrange(99)}+{fraction(draw)}"
    return f"\\boxed{{0+{value}}}"
