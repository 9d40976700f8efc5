"""The golden step: one step of the toy as data, to check a Dr. GRPO trainer of your own with.

    python findings/golden_step.py            # replay it with drgrpo.py, and compare each number
    python findings/golden_step.py --write    # sample it anew (our own use)

findings/golden_step.json.gz has the first step of `python drgrpo.py toy`, with two of its updates.
The model is toy_base/ (a Qwen2 in fp32). To check another trainer, feed it what is under `given`,
and compare what comes out with `expected`. The first stage that differs has the mistake.

given
  settings           of the step: temperature, clip_eps, tis_cap, L_max, lr, betas, ...
  responses          256 of them, groups of 8 end to end; each with
    prompt_ids, response_ids     token ids; a response that ended has its EOS, which is trained
    sampler_logprobs             of each response token, as vLLM computed it
    reward                       1 right, 0 wrong or truncated
  updates            two lists of 64 indices: the responses of the first and the second update
expected, for dr_grpo and for grpo
  advantages         of each response: reward - mean of its group (grpo: / the std over G-1)
  old_logprobs       sum over each response's tokens, before the first update
  loss, grad_norm    of each update; the norm before it is clipped to 1
  moved              after each update, of three weights: the norm and the sum of the change since
                     the start

An update's loss is the sum over its 64 responses and their tokens of
w * max(-A*ratio, -A*clip(ratio)), divided by 64 * L_max (grpo: by 64 and the response's length).
The ratio is to the log-probs before the first update; w = min(p_old / p_sampler, tis_cap). AdamW
has no weight decay.
"""

import argparse
import gzip
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
from drgrpo import PRESETS, Config, Rollout, collate, group_advantages
from support.data import load_data
from support.run import end_ranks, start_ranks
from toy import make_toy

FILE = Path(__file__).with_name("golden_step.json.gz")
METHODS = {"dr_grpo": False, "grpo": True}  # whether to divide by std and length
WEIGHTS = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"]
WEIGHTS += ["model.norm.weight"]
# Relative to the largest number of a stage. Between CPUs with AVX-512, with AVX2 and with neither,
# log-probs and losses differ by at most 5e-7, norms by 3e-6, and `moved` by 7e-4: Adam's first step
# is lr times the sign of a gradient, also where it is so small that its sign is rounding.
TOLERANCES = dict(advantages=1e-5, old_logprobs=1e-5, loss=1e-5, grad_norm=1e-5, moved=2e-3)


def toy_config(method: str) -> Config:
    """The toy's settings with this method's divisions. What differs is reported, not stopped."""
    make_toy(drgrpo.TOY)
    divide, toy = METHODS[method], PRESETS["toy"][1]
    return replace(toy, max_gap=math.inf, divide_by_std=divide, divide_by_length=divide)


def replay(given: dict, config: Config) -> dict[str, list[float]]:
    """What drgrpo.py makes of the stored step: a list of numbers for each stage."""
    rewards = torch.tensor([row["reward"] for row in given["responses"]])
    groups = rewards.view(-1, config.samples_per_prompt)
    advantages = group_advantages(groups, config.divide_by_std).flatten().tolist()
    rollouts = []
    for row, advantage in zip(given["responses"], advantages, strict=True):
        ids = row["prompt_ids"], row["response_ids"], row["sampler_logprobs"]
        rollouts.append(Rollout(0, *ids, advantage=advantage))
    policy = drgrpo.make_policy(config)
    optimizer = torch.optim.AdamW(
        policy.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    start = {name: weight.clone() for name, weight in weights_of(policy).items()}
    everyone = collate(rollouts)
    with torch.no_grad():
        old_logprobs = policy(everyone.ids, everyone.response_mask, config.temperature).sum(dim=1)
    updates = []
    for indices in given["updates"]:
        rows = [rollouts[index] for index in indices]
        longest = 1 if config.divide_by_length else config.max_response_tokens
        updates.append([collate(rows, len(rows) * longest)])
    drgrpo.add_old_logprobs(policy, updates[1:], config)
    found = {"advantages": advantages, "old_logprobs": old_logprobs.tolist()}
    found |= {"loss": [], "grad_norm": [], "moved": []}
    for batches in updates:
        sums = drgrpo.update(policy, optimizer, batches, config)
        found["loss"].append(sums["loss"])
        found["grad_norm"].append(sums["grad_norm"])
        for name, weight in weights_of(policy).items():
            change = weight - start[name]
            found["moved"] += [change.norm().item(), change.sum().item()]
    return found


def weights_of(policy: drgrpo.Policy) -> dict[str, torch.Tensor]:
    weights = dict(drgrpo.full_weights(policy.model, torch.float32))
    return {name: weights[name] for name in WEIGHTS}


def differences(expected: dict, found: dict) -> dict[str, float]:
    """The largest difference of each stage, relative to the largest expected number."""
    result = {}
    for stage in TOLERANCES:
        a, b = torch.tensor(expected[stage]), torch.tensor(found[stage])
        result[stage] = ((a - b).abs().max() / a.abs().max()).item()
    return result


def sample_step() -> dict:
    """The first step of the toy, as `given`: responses of the sampler, rewards, updates."""
    config = toy_config("dr_grpo")
    _, problems, _, _ = load_data(config)
    with drgrpo.start(config) as parts:
        _, rollouts = drgrpo.train_step(config, 0, problems, *parts)
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(0)).tolist()
    size = config.responses_per_update
    responses = []
    for rollout in rollouts:
        row = {key: getattr(rollout, key) for key in ("prompt_ids", "response_ids", "reward")}
        responses.append(row | {"sampler_logprobs": rounded(rollout.sampler_logprobs)})
    same = ("temperature", "clip_eps", "tis_cap", "lr", "max_grad_norm")
    settings = {key: getattr(config, key) for key in same}
    settings |= {"G": config.samples_per_prompt, "L_max": config.max_response_tokens, "N": size}
    settings |= {"betas": [0.9, 0.95], "adam_eps": 1e-8}
    updates = [order[:size], order[size : 2 * size]]
    return {"settings": settings, "responses": responses, "updates": updates}


def rounded(numbers: list[float]) -> list[float]:
    return [float(f"{number:.7g}") for number in numbers]


def write() -> None:
    """Sample the step anew and write the file."""
    given = sample_step()
    start_ranks()
    expected = {}
    for method in METHODS:
        found = replay(given, toy_config(method))
        expected[method] = {stage: rounded(numbers) for stage, numbers in found.items()}
    end_ranks()
    content = json.dumps({"given": given, "expected": expected}).encode()
    FILE.write_bytes(gzip.compress(content, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="sample the step anew")
    if parser.parse_args().write:
        write()
    golden = json.loads(gzip.decompress(FILE.read_bytes()))
    start_ranks()
    wrong = False
    for method in METHODS:
        found = replay(golden["given"], toy_config(method))
        for stage, difference in differences(golden["expected"][method], found).items():
            fits = difference <= TOLERANCES[stage]
            wrong = wrong or not fits
            verdict = "ok" if fits else f"WRONG, above {TOLERANCES[stage]:g}"
            print(f"{method:8} {stage:13} differs by {difference:.1e}  {verdict}")
    end_ranks()
    sys.exit(wrong)


if __name__ == "__main__":
    main()
