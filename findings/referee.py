"""The referee: has a trainer's loss the gradient that Dr. GRPO promises?

    python findings/referee.py                      # every trainer that is installed here
    python findings/referee.py mine.py:loss         # your own; exits 1 if something is wrong
    python findings/referee.py mine.py:loss --advantages mine.py:advantages

findings/referee.md has the results, and how to add your own. A loss is one function of one
micro-batch,

    loss(logprobs, old_logprobs, sampler_logprobs, advantages, mask, settings) -> scalar

with log-probs (B, T) of response tokens, advantages (B,) or (B, T), and a mask (B, T) of ones and
zeros; Settings says the rest. The gradients of a rank's micro-batches are added up, and the mean
over the ranks is taken, as DDP and FSDP do.

Two independent ways lead to a verdict:
1. A policy that is small enough to list every group of responses with its chance. It has two
   tokens, EOS and 1, and writes at most L_max = 3: EOS; 1 EOS; 1 1 EOS; and 1 1 1, truncated. The
   expected gradient is exact, and stands beside the gradient of the expected reward.
2. Finite differences of the loss on two rows, without autograd. They tell the cause.
"""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import itertools
import json
import math
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).parents[1]))
RESULTS = Path(__file__).with_name("results") / "referee.json"

G, L_MAX, CLIP_EPS = 4, 3, 0.2
RESPONSES = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])  # 0 is EOS, then padding
# The rewards of the four responses. The two problems are in one update.
EASY, HARD, THREE = [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.1, 0.1, 1.0, 0.0]
CASES = {"one problem": [EASY], "two problems": [EASY, HARD], "three rewards": [THREE]}
DEGREES, RELATIVE = 0.01, 1e-3  # smaller angles and differences are rounding


@dataclass(frozen=True)
class Settings:
    """What a trainer knows beside the micro-batch."""

    responses: int  # N: of the whole update, on all ranks
    tokens: int  # response tokens of the whole update, on all ranks
    max_response_tokens: int = L_MAX
    micro_batches: int = 1  # of each rank
    ranks: int = 1
    clip_eps: float = CLIP_EPS


def centered(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO's advantages: rewards (P, G) and the mask (P * G, T) -> (P * G,)."""
    return (rewards - rewards.mean(dim=1, keepdim=True)).flatten()


@dataclass(frozen=True)
class Trainer:
    name: str
    loss: Callable[..., torch.Tensor]
    advantages: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = centered
    equal: bool = False  # its micro-batches always have equally many responses
    claims: bool = False  # its documentation calls this Dr. GRPO


def mask_of(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).double()


MASK = mask_of([1, 2, 3, 3])


def push(
    trainer: Trainer,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    parts: list[list[int]] | None = None,
    ranks: int = 1,
    padding: int = 0,
) -> torch.Tensor:
    """The gradient of -loss by the log-probs (N, T) of one update's responses.

    `parts` are the rows of each micro-batch, dealt to the ranks. Each micro-batch is as wide as
    its longest response, and `padding` tokens wider.
    """
    parts = parts or [list(range(len(mask)))]
    settings = Settings(len(mask), int(mask.sum()), L_MAX, len(parts) // ranks, ranks)
    result = torch.zeros_like(logprobs)
    for rows in parts:
        width = int(mask[rows].sum(dim=1).max())
        new = pad(logprobs[rows, :width], (0, padding), value=-5.0).requires_grad_()
        old = pad(logprobs[rows, :width], (0, padding), value=-3.0)
        given = advantages[rows]
        if given.dim() == 2:
            given = pad(given[:, :width], (0, padding))
        here = pad(mask[rows, :width], (0, padding))
        loss = trainer.loss(new, old, old, given, here, settings)
        result[rows, :width] -= torch.autograd.grad(loss, new)[0][:, :width] / ranks
    return result


# ----------------------------------------------------------------- 1. every group is listed


# Every group, and in how many orders it can be drawn
GROUPS = Counter(tuple(sorted(group)) for group in itertools.product(range(4), repeat=G))


def compare(trainer: Trainer, case: list[list[float]]) -> dict[str, float]:
    """Angle to the true gradient in degrees, and size: 1 if it is (G-1) / (G * L_max) of it."""
    # A weight for each token at each place: one shared by the problems, and one of each
    weights = torch.randn(3, L_MAX, 2, generator=torch.Generator().manual_seed(0)).double()
    weights.requires_grad_()
    logprobs = (weights[0] + weights[1:]).log_softmax(dim=-1)
    logprobs = logprobs[:, torch.arange(L_MAX), RESPONSES] * MASK  # (2 problems, 4, L_MAX)
    chances, rewards = logprobs.sum(dim=2).exp(), torch.tensor(case).double()
    problems = [problem for problem in range(len(case)) for _ in range(G)]
    table = torch.zeros_like(logprobs)  # the expected push on each token of each response
    for groups in itertools.product(GROUPS, repeat=len(case)):
        rows = [row for group in groups for row in group]
        orders = math.prod(GROUPS[group] for group in groups)
        chance = orders * chances[problems, rows].prod().item()
        advantages = trainer.advantages(rewards[problems, rows].view(-1, G), MASK[rows])
        pushed = push(trainer, logprobs[problems, rows].detach(), advantages, MASK[rows])
        table.index_put_((torch.tensor(problems), torch.tensor(rows)), chance * pushed, True)
    promised = (chances[: len(case)] * rewards).sum() / len(case) * (G - 1) / (G * L_MAX)
    true = torch.autograd.grad(promised, weights, retain_graph=True)[0].flatten()
    found = torch.autograd.grad((logprobs * table.detach()).sum(), weights)[0].flatten()
    along = (found @ true / true.norm()).item()
    across = (found - along * true / true.norm()).norm().item()
    angle = math.degrees(math.atan2(across, along))
    return {"angle": angle, "size": (found.norm() / true.norm()).item()}


def changes(trainer: Trainer) -> dict[str, float]:
    """How much an update's gradient changes with what must not matter, relative to its largest."""
    rows = [0, 1, 1, 2, 3, 2, 0, 2]  # two groups, and below a third one
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).double()
    noise = -torch.rand(12, L_MAX, generator=torch.Generator().manual_seed(0)).double()
    mask, logprobs = MASK[rows], noise[:8] * MASK[rows]
    advantages = trainer.advantages(rewards[:2], mask)
    whole = push(trainer, logprobs, advantages, mask)
    order = mask.sum(dim=1).argsort(stable=True).tolist()
    halves = [order[:4], order[4:]]  # short ones and long ones
    back = list(range(8))[::-1]
    found = {
        "equal micro-batches": push(trainer, logprobs, advantages, mask, halves),
        "unequal micro-batches": push(trainer, logprobs, advantages, mask, [order[:2], order[2:]]),
        "padding": push(trainer, logprobs, advantages, mask, padding=3),
        "order": push(trainer, logprobs[back], advantages[back], mask[back])[back],
        "ranks": push(trainer, logprobs, advantages, mask, halves, ranks=2),
    }
    result = {key: differs(other, whole) for key, other in found.items()}
    silent = []  # with a group that has no signal, of short responses or of long ones
    for third in ([0] * G, [2] * G):
        mask = MASK[rows + third]
        silent.append(push(trainer, noise * mask, trainer.advantages(rewards, mask), mask)[:8])
    return result | {"length of groups without signal": differs(*silent)}


def differs(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ------------------------------------------------------- 2. finite differences on two rows


def slope(trainer, lengths: list[int], row: int, token: int, advantage=1.0, ratio=1.0) -> float:
    """The push on one token of responses of these lengths: (loss(x - h) - loss(x + h)) / 2h."""
    mask = mask_of(lengths)
    settings = Settings(len(lengths), sum(lengths))
    advantages = torch.full((len(lengths),), advantage).double()
    ends = []
    for step in (-0.01, 0.01):
        new = -mask / 2
        new[row, token] += math.log(ratio) + step
        new.requires_grad_()
        loss = trainer.loss(new, -mask / 2, -mask / 2, advantages, mask, settings)
        ends.append(loss.item())
    return (ends[0] - ends[1]) / 0.02


def two_rows(trainer: Trainer) -> dict:
    """Ratios, all of which are 1 for Dr. GRPO, and what the clip does."""

    def advantage(rewards: list[float], lengths: list[int]) -> float:
        given = torch.tensor([rewards]).double(), mask_of(lengths)
        return trainer.advantages(*given).reshape(G, -1)[0, 0].item()

    short, long = partial(slope, trainer, [2, 3], 0), partial(slope, trainer, [2, 3], 1)
    alone, both = [1.0, 0, 0, 0], [1.0, 1, 0, 0]  # right responses
    equal, shorter, longer = [3] * 4, [3, 1, 1, 1], [1, 3, 3, 3]  # lengths
    others_short, others_long = advantage(alone, shorter), advantage(alone, longer)
    pairs = {
        "token of a long response / of a short one": (long(0), short(0)),
        "beside a long response / beside a short one": (short(0), slope(trainer, [2, 2], 0, 0)),
        "advantage, one right / two right": (advantage(alone, equal), 1.5 * advantage(both, equal)),
        "advantage, others short / others long": (others_short, others_long),
        "EOS / token before": (short(1), short(0)),
        "last token of a truncated response / first": (long(2), long(0)),
    }
    ratios = {key: a / b if b else math.inf for key, (a, b) in pairs.items()}
    return ratios | {"clip": clip(trainer)}


def clip(trainer: Trainer) -> str:
    """Which side is not pushed any more, for both signs of the advantage."""

    def stops(advantage: float, ratio: float) -> bool:
        return abs(slope(trainer, [3, 3], 0, 1, advantage, ratio)) < 1e-6

    names = {(False, True): "high", (True, False): "low", (True, True): "both"}
    names[False, False] = "none"
    up, down = (names[stops(sign, 0.5), stops(sign, 1.5)] for sign in (1.0, -1.0))
    dual = down == "low" and stops(-1.0, 5.0)
    return f"A > 0: {up}, A < 0: {down}" + (" (and a ratio of 5)" if dual else "")


# ------------------------------------------------------------------------------ the verdict

CAUSES = {
    "token of a long response / of a short one": "divides by the response's length",
    "beside a long response / beside a short one": "divides by lengths of other responses",
    "advantage, one right / two right": "divides by the std",
    "advantage, others short / others long": "takes its baseline over tokens",
    "EOS / token before": "does not train EOS like other tokens",
    "last token of a truncated response / first": "does not train truncated responses to their end",
}


def judge(trainer: Trainer) -> dict:
    """All measurements of a trainer. `wrong` says what is wrong, and is empty if nothing is."""
    cases = {name: compare(trainer, case) for name, case in CASES.items()}
    changed, ratios = changes(trainer), two_rows(trainer)
    # All comparisons are written so that nan is wrong, too
    wrong = [text for key, text in CAUSES.items() if not abs(ratios[key] - 1) <= RELATIVE]
    if not ratios["clip"].startswith("A > 0: high, A < 0: low"):
        wrong.append(f"clips {ratios['clip']}")
    allowed = "unequal micro-batches" if trainer.equal else ""
    keys = [key for key, value in changed.items() if not value <= RELATIVE and key != allowed]
    if keys:
        wrong.append("changes with " + ", ".join(keys))
    sizes = [case["size"] for case in cases.values()]
    if not wrong and not all(case["angle"] <= DEGREES for case in cases.values()):
        wrong.append("points elsewhere, for a reason that the referee does not know")
    if not wrong and not max(sizes) <= min(sizes) * (1 + RELATIVE):
        wrong.append("has a size that depends on the problem")
    right = "exact" if abs(sizes[0] - 1) < RELATIVE else f"right up to the factor {sizes[0]:.3g}"
    return {
        "verdict": "; ".join(wrong) or right,
        "claims": trainer.claims,
        "cases": cases,
        "changes": changed,
        "two rows": ratios,
        "wrong": wrong,
    }


# ----------------------------------------------------------------------------- the trainers
# Each function calls the code of one released package. What its trainer would put around the loss
# is given here: micro-batches that it divides by, ranks that it multiplies by.


def per_token(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return advantages if advantages.dim() == 2 else advantages[:, None].expand_as(mask)


def ours() -> Iterator[Trainer]:
    from drgrpo import drgrpo_loss, group_advantages

    def loss(by_length, new, old, sampler, advantages, mask, settings):
        denominator = settings.responses * (1 if by_length else settings.max_response_tokens)
        eps = settings.clip_eps
        value, _ = drgrpo_loss(new, old, advantages, mask, denominator, eps, by_length)
        return value * settings.ranks  # as forward_backward does

    def advantages(by_std, rewards, mask):
        return group_advantages(rewards, by_std).flatten()

    for by_std, by_length in itertools.product([False, True], repeat=2):
        name = "drgrpo.py" + (" --divide-by-std" if by_std else "")
        name += " --divide-by-length" if by_length else ""
        functions = partial(loss, by_length), partial(advantages, by_std)
        yield Trainer(name, *functions, claims=name == "drgrpo.py")


def trl() -> Iterator[Trainer]:
    """GRPOTrainer._compute_loss. Its advantages are computed within a method that samples."""
    trainer_class = import_theirs("trl.trainer.grpo_trainer").GRPOTrainer
    off = ["use_vllm", "aux_loss_enabled", "_entropy_bonus_enabled"]

    def loss(loss_type, new, old, sampler, advantages, mask, settings):
        trainer = mock.MagicMock(loss_type=loss_type, beta=0.0, **dict.fromkeys(off, False))
        trainer.max_completion_length = settings.max_response_tokens
        trainer.current_gradient_accumulation_steps = settings.micro_batches
        trainer.epsilon_low = trainer.epsilon_high = settings.clip_eps
        trainer.off_policy_mask_threshold, trainer.top_entropy_quantile = None, 1.0
        trainer.importance_sampling_level = "token"
        trainer.args.delta, trainer.args.steps_per_generation = None, settings.micro_batches
        trainer.accelerator.num_processes = settings.ranks
        trainer.accelerator.gather = trainer.accelerator.reduce = lambda value, **_: value
        outputs = new, torch.zeros_like(new), None
        trainer._get_per_token_logps_and_entropies.return_value = outputs
        prompt = torch.ones(len(mask), 1)
        inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask}
        inputs |= {"completion_mask": mask, "advantages": advantages, "old_per_token_logps": old}
        inputs["num_items_in_batch"] = torch.tensor(settings.tokens)
        return trainer_class._compute_loss(trainer, trainer.model, inputs)

    for name in ("dr_grpo", "grpo", "dapo", "bnpo"):
        claims = name == "dr_grpo"
        label = f"trl {version('trl')} {name}"
        yield Trainer(label, partial(loss, name), equal=True, claims=claims)


def verl() -> Iterator[Trainer]:
    """ppo_loss, with data as verl's default trainer passes them; compute_grpo_outcome_advantage."""
    losses = import_theirs("verl.workers.utils.losses")
    from tensordict import TensorDict
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    from verl.utils.tensordict_utils import assign_non_tensor
    from verl.workers.config import ActorConfig

    def loss(mode, factor, new, old, sampler, advantages, mask, settings):
        usual = dict(strategy="fsdp", rollout_n=G, ppo_micro_batch_size_per_gpu=1)
        usual |= dict(clip_ratio=settings.clip_eps, loss_agg_mode=mode, loss_scale_factor=factor)
        lengths = mask.sum(dim=1).int().tolist()

        def nested(rows, more=0):
            parts = [pad(row[:n], (0, more)) for row, n in zip(rows, lengths, strict=True)]
            return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

        fields = {"responses": mask, "response_mask": mask, "old_log_probs": old}
        fields["advantages"] = per_token(advantages, mask)
        data = TensorDict({key: nested(rows) for key, rows in fields.items()}, len(mask))
        prompts = [torch.ones(1)] * len(mask)
        data["prompts"] = torch.nested.as_nested_tensor(prompts, layout=torch.jagged)
        totals = dict(batch_num_tokens=settings.tokens, global_batch_size=settings.responses)
        assign_non_tensor(data, dp_size=settings.ranks, **totals)
        return losses.ppo_loss(ActorConfig(**usual), {"log_probs": nested(new, 1)}, data)[0]

    def advantages(by_std, rewards, mask):
        scores = pad(rewards.reshape(-1, 1), (0, mask.shape[1] - 1))
        groups = torch.arange(len(rewards)).repeat_interleave(G).numpy()
        given = scores, mask, groups
        return compute_grpo_outcome_advantage(*given, norm_adv_by_std_in_grpo=by_std)[0]

    for mode, factor, by_std in (
        ("seq-mean-token-sum-norm", L_MAX, False),
        ("seq-mean-token-sum-norm", None, False),
        ("seq-mean-token-sum", None, False),
        ("token-mean", None, False),
        ("seq-mean-token-mean", None, True),
    ):
        name = f"verl {version('verl')} {mode}{', loss_scale_factor' if factor else ''}"
        name += ", norm_adv_by_std_in_grpo" if by_std else ""
        functions = partial(loss, mode, factor), partial(advantages, by_std)
        yield Trainer(name, *functions, claims=mode.endswith("norm"))


def openrlhf() -> Iterator[Trainer]:
    """PolicyLoss and RemoteExperienceMaker.compute_advantages_and_returns."""
    losses = import_theirs("openrlhf.models.loss")
    maker = import_theirs("openrlhf.trainer.ppo_utils.experience_maker")

    def loss(by_token, new, old, sampler, advantages, mask, settings):
        policy_loss = losses.PolicyLoss(*[settings.clip_eps] * 2, token_level_loss=by_token)
        whole = dict(batch_num_tokens=settings.tokens, global_batch_size=settings.responses)
        given = new, old, per_token(advantages, mask), mask
        return policy_loss(*given, dp_size=settings.ranks, **whole)[0]

    def advantages(estimator, rewards, mask):
        me = mock.MagicMock(spec=maker.RemoteExperienceMaker, advantage_estimator=estimator)
        me.get_cumulative_returns = partial(maker.RemoteExperienceMaker.get_cumulative_returns, me)
        me.kl_ctl, me.strategy = SimpleNamespace(value=0.0), mock.MagicMock()
        me.strategy.args.rollout.n_samples_per_prompt = G
        me.strategy.args.algo.advantage = SimpleNamespace(estimator=estimator, gamma=1.0)
        none = ("clip_range", "overlong_buffer_len", "stop_properly_penalty_coef")
        me.strategy.args.reward = SimpleNamespace(**dict.fromkeys(none))
        experience = maker.Experience(index=list(range(len(mask))), rewards=rewards.flatten())
        experience.action_mask, experience.kl, experience.info = mask, torch.zeros_like(mask), {}
        compute = maker.RemoteExperienceMaker.compute_advantages_and_returns
        return compute(me, [experience])[0].advantages

    for estimator, mode in (("dr_grpo", "token-mean"), ("group_norm", "seq-mean-token-mean")):
        name = f"openrlhf {version('openrlhf')} {estimator}, {mode}"
        functions = partial(loss, mode == "token-mean"), partial(advantages, estimator)
        yield Trainer(name, *functions, claims=estimator == "dr_grpo")


def areal() -> Iterator[Trainer]:
    """ppo_actor_loss_fn and Normalization. Its engine weighs micro-batches by their tokens."""
    functional = import_theirs("areal.utils.functional")
    from areal.api.cli_args import NormConfig
    from areal.utils.data import Normalization

    def loss(new, old, sampler, advantages, mask, settings):
        given = new, old, old, per_token(advantages, mask), settings.clip_eps, mask.bool()
        value, _ = functional.ppo_actor_loss_fn(*given)
        return value * mask.sum() / settings.tokens * settings.ranks

    norm = Normalization(NormConfig(mean_level="group", std_level=None, group_size=G))
    of_tokens = lambda rewards, mask: norm(rewards.reshape(-1, 1) * mask, mask)
    of_rewards = lambda rewards, mask: norm(rewards.flatten())
    name = f"areal {version('areal')}"
    yield Trainer(f"{name} adv_norm: group, no std", loss, of_tokens, claims=True)
    yield Trainer(f"{name} reward_norm: group, no std", loss, of_rewards)


def oat() -> Iterator[Trainer]:
    """PPOLearner.learning_step, which is given log-probs in place of a model's."""
    HOLLOW.names.add("pyarrow.plasma")
    ppo = import_theirs("oat.algorithms.ppo")

    def learner(critic_type, rows, samples):
        me = object.__new__(ppo.PPOLearner)
        args = mock.MagicMock(critic_type=critic_type, generate_max_length=L_MAX, num_ppo_epochs=1)
        args.reward_scale, args.beta, args.reinforce_update, args.tis_c = 1.0, 0, False, None
        args.cliprange, args.train_batch_size_per_device, args.num_samples = CLIP_EPS, rows, samples
        with mock.patch.object(ppo.RLLearner, "_init"):
            me._init(args, [])
        me.model = me.ref_model = me.optimizer = me.scheduler = None
        me.strategy = mock.MagicMock(grad_acc_step=1)
        me.strategy.get_gradient_norm.return_value = 0.0
        return me

    def loss(critic_type, new, old, sampler, advantages, mask, settings):
        me = learner(critic_type, len(mask), 1)

        def batch_logps(input_ids, compute_entropy, **_):  # it shuffles the rows
            logps = (new if compute_entropy else old)[input_ids[:, 0], : input_ids.shape[1] - 1]
            return logps.float(), torch.zeros_like(logps)

        me.get_batch_logps = batch_logps
        me.compute_monte_carlo_advantages = lambda *_: advantages.float()
        lengths = mask.sum(dim=1).int().tolist()
        batch = {
            "input_ids": torch.arange(len(mask))[:, None].expand(-1, mask.shape[1] + 1),
            "attention_mask": pad(mask, (1, 0), value=1).long(),
            "rewards": [[0.0]] * len(mask),
            "prompt_ids_lens": [1] * len(mask),
            "action_logprobs": [row[:n].tolist() for row, n in zip(old, lengths, strict=True)],
            "loss_masks": [1.0] * len(mask),
        }
        with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
            me.learning_step(batch)
        return me.strategy.backward.call_args.args[0] / settings.micro_batches  # as DeepSpeed does

    def advantages(critic_type, rewards, mask):
        me = learner(critic_type, len(mask), G)
        return me.compute_monte_carlo_advantages(rewards.reshape(-1, 1), mask)

    for critic in ("drgrpo", "grpo"):
        functions = partial(loss, critic), partial(advantages, critic)
        name, claims = f"oat-llm {version('oat-llm')} {critic}", critic == "drgrpo"
        yield Trainer(name, *functions, equal=True, claims=claims)


TRAINERS = dict(ours=ours, trl=trl, verl=verl, openrlhf=openrlhf, areal=areal, oat=oat)


class Hollow(type):
    """A class without content, whose attributes are such classes, too."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Hollow(name, (), {"__init__": lambda *_, **__: None, "__call__": lambda _, f: f})


class HollowModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for what a trainer imports and its loss does not use: vllm, deepspeed, flask."""

    def __init__(self):
        self.names: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if not self.names & {name, name.partition(".")[0]}:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module):
        module.__version__ = "0"
        module.__getattr__ = partial(getattr, Hollow("Hollow", (), {}))


HOLLOW = HollowModules()


def import_theirs(name: str):
    """A module of a trainer; what it imports and is not installed is left hollow.

    Raises ImportError if the trainer itself is not installed.
    """
    package = name.partition(".")[0]
    if HOLLOW not in sys.meta_path:
        sys.meta_path.append(HOLLOW)
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = str(error.name).partition(".")[0]
            if missing == package or missing in HOLLOW.names:
                raise
            HOLLOW.names.add(missing)
            for module in [m for m in sys.modules if m.partition(".")[0] == package]:
                del sys.modules[module]  # half imported


# ------------------------------------------------------------------------------ the command


def from_file(text: str) -> Callable:
    """FILE.py:FUNCTION -> the function. Exits with an error if there is none."""
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        sys.exit(f"error: {text}: there is no file {path!r}. Say FILE.py:FUNCTION")
    found = runpy.run_path(path)
    if name not in found:
        sys.exit(f"error: {text}: {path} has no function {name!r}")
    return found[name]


def table(record: dict) -> str:
    """The results as Markdown. A star marks what its documentation calls Dr. GRPO."""
    lines = ["| loss | " + " | ".join(CASES) + " | verdict |", "| --- " * (len(CASES) + 2) + "|"]
    for name, found in record["trainers"].items():
        angles = " | ".join(f"{case['angle']:.2f}°" for case in found["cases"].values())
        lines.append(f"| {name}{' *' if found['claims'] else ''} | {angles} | {found['verdict']} |")
    return "\n".join(lines)


def deviations(record: dict) -> str:
    """What finite differences on two rows found, as a list in Markdown: ratios that are not 1."""
    lines = []
    for name, found in record["trainers"].items():
        ratios = [(key, found["two rows"][key]) for key in CAUSES]
        texts = [f"{key}: {value:.3f}" for key, value in ratios if not abs(value - 1) <= RELATIVE]
        if texts:
            lines.append(f"* {name}. {'; '.join(texts)}")
    return "\n".join(lines)


def judge_all() -> dict:
    """Judge what can be imported here, and add it to the results that are there."""
    record = json.loads(RESULTS.read_text())
    for name, adapter in TRAINERS.items():
        HOLLOW.names.clear()
        try:
            trainers = list(adapter())
        except Exception as error:  # whatever their code raises while it is imported
            print(f"{name} is not called: {error}")
            continue
        for trainer in trainers:
            found = judge(trainer) | {"hollow": sorted(HOLLOW.names), "torch": torch.__version__}
            record["trainers"][trainer.name] = found
            print(f"{trainer.name}: {found['verdict']}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loss", nargs="?", help="FILE.py:FUNCTION")
    parser.add_argument("--advantages", help="FILE.py:FUNCTION; else reward - mean of the group")
    parser.add_argument("--equal", action="store_true", help="all micro-batches have equally many")
    arguments = parser.parse_args()
    if arguments.loss is None:
        text = json.dumps(judge_all(), indent=1)
        short = json.loads(text, parse_float=lambda number: round(float(number), 6))
        RESULTS.write_text(json.dumps(short, indent=1) + "\n")
        print(table(short), deviations(short), sep="\n\n")
        return
    advantages = from_file(arguments.advantages) if arguments.advantages else centered
    trainer = Trainer(arguments.loss, from_file(arguments.loss), advantages, arguments.equal)
    found = judge(trainer)
    print(json.dumps(found, indent=1))
    print(f"{trainer.name}: {found['verdict']}")
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
