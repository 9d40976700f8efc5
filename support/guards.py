"""Guards while training: exact checks that stop a run, and warnings that say what to try."""

import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

PROBE_EVERY = 1009  # of so many weights of a shard, one is looked at
PATIENCE = 10  # steps in a row that say nothing, until there is a warning
MAX_GAP = {"bfloat16": 0.1, "float32": 1e-3}  # what rounding to this dtype cannot reach


def refuse_gap(gap: float, max_gap: float | None, dtype: str) -> None:
    """Raises RuntimeError if trainer and sampler differ too much, in nats a token on average."""
    if max_gap is None:
        max_gap = MAX_GAP[dtype]
    if not gap <= max_gap:
        raise RuntimeError(
            f"the log-probs of trainer and sampler differ by {gap:.3g} nats a token, above "
            f"max_gap {max_gap:g}. Likely causes: the sampler has old weights (no wake after an "
            "update) or a prefix cache of old weights; a weight was not sent to it; another "
            "temperature, precision or prompt on one side. This update was not made."
        )


def eos_ids(llm) -> set[int]:
    """The ids after which this engine of vLLM ends a response."""
    ids = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    found = set(ids) if isinstance(ids, list) else {ids}
    return (found | {llm.get_tokenizer().eos_token_id}) - {None}


def check_endings(rollouts: list, eos_ids: set[int], stop: tuple[str, ...]) -> None:
    """A response that stopped by itself ends in EOS or in a stop string, and is trained with it.

    The gap cannot show it: every token but the last may be right. Raises RuntimeError.
    """
    for rollout in rollouts:
        ends_in_eos = rollout.response_ids[-1:] and rollout.response_ids[-1] in eos_ids
        ends_in_stop = any(rollout.text.endswith(end) for end in stop)
        if rollout.finish_reason == "stop" and not (ends_in_eos or ends_in_stop):
            raise RuntimeError(
                f"a response stopped, but its last token is {rollout.response_ids[-1:]}, which is "
                f"neither EOS ({sorted(eos_ids)}) nor the end of a stop string {stop}: the model "
                "would not learn to stop"
            )


def all_sent(
    weights: Iterator[tuple[str, torch.Tensor]], expected: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, one by one. Raises RuntimeError at the end if one is missing: the sampler would
    keep an old one, which the gap may be too coarse to show."""
    sent = set()
    for name, weight in weights:
        sent.add(name)
        yield name, weight
    if sent != expected:
        difference = ", ".join(sorted(sent ^ expected))
        raise RuntimeError(f"the weights sent to vLLM are not those of the model: {difference}")


def refuse_rest(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Raises RuntimeError if the sampler did not take all the weights."""
    rest = [name for name, _ in weights]
    if rest:
        raise RuntimeError(f"vLLM did not take all weights. Left over: {', '.join(rest)}")


def probe(policy: torch.nn.Module) -> torch.Tensor:
    """Some weights of this rank's shards, a copy."""
    policy.reshard()  # after a forward pass without a backward one, some weights are whole
    shards = [parameter.to_local().flatten()[::PROBE_EVERY] for parameter in policy.parameters()]
    return torch.cat(shards).clone()


def warn_if_truncation_pays(lowest_reward: float, truncated_reward: float) -> None:
    """A response that is cut off must not be worth more than one that ends."""
    if dist.get_rank() == 0 and lowest_reward < truncated_reward:
        warn(
            f"some rewards are below that of a truncated response, {truncated_reward}, so being "
            "cut off pays: lower --truncated-reward"
        )


class Warner:
    """Warns once of each thing in the metrics that looks wrong."""

    def __init__(self, responses: int):
        self.responses = responses  # of a step
        self.without_signal = 0  # steps in a row

    def look(self, metrics: dict) -> None:
        """At a step's metrics; those of an evaluation alone say nothing."""
        if "groups_without_signal" not in metrics:
            return
        silent = metrics["groups_without_signal"] == 1
        self.without_signal = self.without_signal + 1 if silent else 0
        if self.without_signal == PATIENCE:
            warn(
                f"all rewards of each group were equal for {PATIENCE} steps: nothing is learned. "
                "The problems are too easy or too hard, the template does not suit the model, or "
                "the reward is wrong: read samples.jsonl"
            )
        if not silent and metrics["weights_moved"] < 0.01:
            warn("an update moved under 1% of the weights: raise --lr, or look at grad_norm")
        if metrics["truncated"] > 0.5:
            warn(
                "most responses are truncated: raise --max-response-tokens, or choose a --template "
                "after which the model stops"
            )
        if metrics["entropy"] < 0.001:
            warn("the entropy is near 0: all responses to a problem are the same. Lower --lr")
        if metrics["timeouts"] > self.responses / 10:
            warn(
                "a tenth of the gradings time out: raise --grader-timeout or --grader-workers, or "
                "read in samples.jsonl what is graded"
            )


def warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
