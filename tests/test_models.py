"""Facts about support/models.py: which models are refused, and that the others are trained right.

All models here are tiny and random. The fast tests need their config.json only.
"""

import string
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
import transformers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from drgrpo import Policy, Rollout, Sampler, collate, make_policy, update
from support import models
from support.data import Problem, prompt_ids
from support.logprobs import packed_attention
from support.models import TOLERANCE, check_model, cut, largest_error, two_copies
from support.ranks import start_ranks
from templates import find_template
from tests.helpers import TOY

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "layer_types": ["full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def tiny(family, **settings):
    """The configuration of a tiny model; `family` as in the class name, e.g. Qwen2."""
    return getattr(transformers, f"{family}Config")(**TINY | settings)


def save(folder, family, **settings):
    tiny(family, **settings).save_pretrained(folder)
    return str(folder)


def reason(folder, family, longest=40, **settings):
    """The message by which the model is refused."""
    with pytest.raises(ValueError, match=str(folder)) as refused:
        check_model(save(folder, family, **settings), longest)
    return str(refused.value)


# ------------------------------------------------------------------------ accepted and refused


@pytest.mark.parametrize(
    "family",
    [
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen3",
        "Gemma",
        "Gemma3Text",
        "Phi3",
        "SmolLM3",
        "Starcoder2",
        "Olmo2",
        "Olmo3",
        "Glm4",
        "Granite",
        "Ernie4_5",
        "Exaone4",
    ],
)
def test_a_model_whose_log_probs_come_out_right_is_accepted(tmp_path, family):
    check_model(save(tmp_path, family), 40)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("Qwen3_5Text", LINEAR),  # the state runs on from one packed row into the next
        ("Lfm2", {"layer_types": ["full_attention", "conv"]}),
        ("Mamba", {}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {}),  # logit_scale
        ("Gemma3Text", {"final_logit_softcapping": 30.0}),
        ("NanoChat", {}),  # a soft cap under another name
        ("Phi", {}),  # the head has a bias
    ],
)
def test_a_model_whose_log_probs_come_out_wrong_is_refused(tmp_path, family, settings):
    assert "its layers or its head" in reason(tmp_path, family, **settings)


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("Gemma2", {}, "`softcap`"),
        ("GraniteSWA", {}, "`s_aux`"),  # attention sinks
        ("Doge", {}, "`attention_mask`"),
        ("StableLm", {}, "does not pass `lengths` and `ends`"),
        ("Llama", {"attention_dropout": 0.1}, "`dropout`"),
        ("Llama", {"head_dim": 264}, "at most 256"),
        ("GPT2", {}, "GPT2Model has no `layers`"),
        ("T5", {}, "T5Config"),
    ],
)
def test_a_model_with_another_attention_or_build_is_refused_with_the_reason(
    tmp_path, family, settings, message
):
    assert message in reason(tmp_path, family, **settings)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss", "JetMoe", "DeepseekV3"])
def test_a_mixture_of_experts_is_refused_because_vllm_could_not_load_it(tmp_path, family):
    few_dense = {"first_k_dense_replace": 1} if family == "DeepseekV3" else {}
    assert "mixture of experts" in reason(tmp_path, family, **MOE | few_dense)


def test_the_error_of_a_failed_trial_becomes_the_cause_of_the_refusal(tmp_path, monkeypatch):
    def fails(*args):
        raise TypeError("missing 2 required keyword-only arguments")

    monkeypatch.setattr(models, "token_logprobs", fails)
    with pytest.raises(ValueError, match=f"{tmp_path}.*TypeError: missing 2") as refused:
        check_model(save(tmp_path, "Qwen2"), 40)
    assert isinstance(refused.value.__cause__, TypeError)


def test_log_probs_that_are_not_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "definition", lambda model, ids: ids[1:] * float("nan"))
    assert "differs by nan" in reason(tmp_path, "Qwen2")


# ------------------------------------------------------------------------------- in long rows


def longrope(original):
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": original,
            "short_factor": [1.0] * 16,
            "long_factor": [4.0] * 16,
        },
    }


def dynamic(most):
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return {"max_position_embeddings": most, "rope_parameters": scaling}


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("Mistral", {"sliding_window": 40}, "sliding_window=40"),
        ("Gemma3Text", {"sliding_window": 40, "num_hidden_layers": 6}, "sliding_window=40"),
        ("Phi3", longrope(40), "beside a row of 48 tokens"),
        ("Llama", dynamic(40), "beside a row of 48 tokens"),
    ],
)
def test_what_binds_only_in_long_rows_is_judged_by_the_longest(tmp_path, family, settings, message):
    check_model(save(tmp_path, family, **settings), 40)
    assert message in reason(tmp_path, family, longest=48, **settings)


@pytest.mark.parametrize("windowed, accepted", [(2, True), (1, False)])
def test_a_window_matters_only_where_a_layer_uses_it(tmp_path, windowed, accepted):
    settings = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": windowed}
    if accepted:
        check_model(save(tmp_path, "Qwen2", **settings), 40)
    else:
        assert "sliding_window=16" in reason(tmp_path, "Qwen2", **settings)


# --------------------------------------------------------------------------- the small copies


@pytest.mark.parametrize(
    "family, settings, layers",
    [
        ("Qwen2", {}, 1),
        ("Llama", {"eos_token_id": [2, 3]}, 1),  # a list, but not of layers
        (
            "DiffLlama",
            {"num_key_value_heads": 2},
            12,
        ),  # a constant of attention depends on the depth
        ("SmolLM3", {}, 4),  # each fourth layer has no rotary embedding
        ("Gemma3Text", {}, 6),  # five windows, then one full
        ("Lfm2", {"layer_types": ["conv"] * 2 + ["full_attention"] * 10}, 3),
        ("DeepseekV3", MOE | {"first_k_dense_replace": 5}, 6),
    ],
)
def test_a_copy_has_the_first_layers_until_there_is_one_of_each_kind(family, settings, layers):
    config = tiny(family, **settings | {"num_hidden_layers": 12})
    small = cut(config, models.build(config, "meta"))
    assert small.num_hidden_layers == layers
    assert config.num_hidden_layers == 12


def test_layers_that_differ_by_a_setting_of_the_configuration_only_are_of_two_kinds():
    config = tiny("Llama", num_hidden_layers=4, flavours=["sweet", "sweet", "sour", "sweet"])
    assert cut(config, models.build(config, "meta")).num_hidden_layers == 3


def test_a_padding_token_beyond_the_copys_vocabulary_does_no_harm(tmp_path):
    check_model(save(tmp_path, "Qwen2", vocab_size=4096, pad_token_id=4095), 40)


def test_rounding_is_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "largest_error", lambda *args: 3e-5)
    check_model(save(tmp_path, "Qwen2"), 40)


def test_a_copy_of_a_large_model_is_small():
    wide = {"hidden_size": 1024, "num_attention_heads": 32, "num_hidden_layers": 80}
    config = tiny("Llama", **wide, intermediate_size=28672, vocab_size=128256)
    small = cut(config, models.build(config, "meta"))
    size = sum(p.numel() for p in models.build(small, "meta").parameters())
    assert size < 5e6
    assert (small.hidden_size, small.num_attention_heads, small.head_dim) == (1024, 32, 32)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma", "Olmo2"])
def test_no_weight_could_be_left_out_of_the_log_probs_unseen(family):
    fast, own = two_copies(tiny(family, num_hidden_layers=1))
    assert largest_error(fast, own, (7, 12)) < 0.1 * TOLERANCE
    torch.manual_seed(0)
    for name, weight in own.named_parameters():
        if "k_proj.bias" in name:  # adds the same to all scores of a query: softmax drops it
            continue
        before = weight.data
        weight.data = before + 0.3 * before.std() * torch.randn_like(before)
        assert largest_error(fast, own, (7, 12)) > 10 * TOLERANCE, name
        weight.data = before


def test_the_check_leaves_the_random_numbers_of_the_run_alone(tmp_path):
    before = torch.get_rng_state()
    check_model(save(tmp_path, "Qwen2"), 40)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_prints_nothing(tmp_path, capfd):
    check_model(save(tmp_path, "Qwen2"), 40)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------- keywords of attention


def attention(**keywords):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 10, 8), torch.randn(1, 1, 10, 8), torch.randn(1, 1, 10, 8)
    rows = {"lengths": torch.tensor([4, 6]), "ends": torch.tensor([0, 4, 10])}
    return packed_attention(None, q, k, v, scaling=0.3, **rows | keywords)[0]


@pytest.mark.parametrize(
    "keywords",
    [
        {"s_aux": torch.zeros(2)},
        {"softcap": 50.0},
        {"position_bias": torch.zeros(1, 2, 10, 10)},
        {"attention_mask": torch.ones(1, 1, 10, 10)},
        {"dropout": 0.1},
        {"is_causal": False},
        {"sliding_window": 5},
        {"a_keyword_of_next_year": True},
    ],
)
def test_attention_refuses_a_keyword_that_it_does_not_compute_by_name(keywords):
    with pytest.raises(ValueError, match=next(iter(keywords))):
        attention(**keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"s_aux": None, "softcap": None, "position_bias": None, "attention_mask": None},
        {"dropout": 0.0, "is_causal": True, "sliding_window": 6},
        {"position_ids": torch.arange(10)[None], "use_cache": False, "output_attentions": False},
    ],
)
def test_attention_takes_keywords_that_ask_for_nothing_else(keywords):
    assert torch.equal(attention(**keywords), attention())


@pytest.mark.parametrize("of_queries, of_values", [(264, 264), (48, 32), (20, 20)])
def test_attention_refuses_on_any_device_heads_that_a_gpu_could_not_take(of_queries, of_values):
    q, v = torch.randn(1, 2, 10, of_queries), torch.randn(1, 2, 10, of_values)
    with pytest.raises(ValueError, match=f"size {of_queries} and values of size {of_values}"):
        packed_attention(None, q, q, v, lengths=torch.tensor([10]), ends=torch.tensor([0, 10]))


# ------------------------------------------------------------------------------ special tokens


def vocabulary(*special):
    return {token: i for i, token in enumerate([*special, "▁", "\n", *string.printable[:94]])}


def llama_tokenizer(folder, chat_template=None):
    """Writes BOS before every text, as those of Llama do."""
    vocab = vocabulary("<unk>", "<s>", "</s>")
    tokenizer = LlamaTokenizer(vocab=vocab, add_bos_token=True, chat_template=chat_template)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def gemma_tokenizer(folder, chat_template=None):
    vocab = vocabulary("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    tokenizer = GemmaTokenizer(vocab=vocab, add_bos_token=True, chat_template=chat_template)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


CHAT = "{{ bos_token }}user:\n{{ messages[0]['content'] }}\nmodel:\n"


@pytest.mark.parametrize("chat_template", [CHAT, CHAT.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("make", [llama_tokenizer, gemma_tokenizer])
@pytest.mark.parametrize("name", ["none", "chat", "r1"])
def test_a_prompt_has_one_bos_whoever_writes_it(tmp_path, make, name, chat_template):
    tokenizer = make(tmp_path, chat_template)
    ids = prompt_ids(tokenizer, find_template(name, tokenizer).render("1 + 2 ="))
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # it would write a second one
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_prompt_has_the_ids_that_the_tokenizers_own_chat_gives(tmp_path):
    tokenizer = gemma_tokenizer(tmp_path, CHAT)
    request = "1 + 2 =\nPlease reason step by step, and put your final answer within \\boxed{}."
    own = tokenizer.apply_chat_template([{"role": "user", "content": request}], return_dict=True)
    rendered = find_template("chat", tokenizer).render("1 + 2 =")
    assert prompt_ids(tokenizer, rendered) == own["input_ids"]


# -------------------------------------------------------------------- policy, engine and update


def sample_update_wake(folder: str) -> dict[str, float]:
    """The gaps between engine and policy before an update, after it, and after `wake`.

    Runs in a process of its own. Raises AssertionError if the engine saw other ids than are
    trained.
    """
    start_ranks()
    responses = 4
    config = replace(TOY, model=folder, responses_per_update=responses, lr=1e-2, temperature=0.9)
    policy = make_policy(config)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=0.0)
    sampler = Sampler(folder, context=128)
    rollouts = sample_two_problems(sampler, folder, config.temperature)
    sampler.sleep()
    metrics = update(policy, optimizer, [[collate(rollouts)]], config)
    gaps = {"before": metrics["gap"]}
    gaps["after the update"] = gap(policy, rollouts, config.temperature)
    sampler.wake(policy)
    rollouts = sample_two_problems(sampler, folder, config.temperature)
    gaps["after wake"] = gap(policy, rollouts, config.temperature)
    sampler.close()
    return gaps


def sample_two_problems(sampler: Sampler, folder: str, temperature: float) -> list[Rollout]:
    """Two responses to each of two problems, with an advantage of 1 and -1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = []
    for text in ("1 + 2 =", "12 - 5 + 30 ="):
        problems.append(Problem(text, prompt_ids(tokenizer, text), []))
    seen = {}
    step = sampler.llm.llm_engine.step

    def noting_step():
        outputs = step()
        for output in outputs:
            seen[int(output.request_id)] = list(output.prompt_token_ids)
        return outputs

    sampler.llm.llm_engine.step = noting_step
    groups = sampler.generate(problems, [1, 2], 2, 24, temperature, stop=())
    sampler.llm.llm_engine.step = step
    rollouts = []
    for place, group in enumerate(groups):
        for rollout, advantage in zip(group, (1.0, -1.0), strict=True):
            assert rollout.prompt_ids == problems[place].prompt_ids == seen[place]
            rollouts.append(replace(rollout, advantage=advantage))
    return rollouts


@torch.no_grad()
def gap(policy: Policy, rollouts: list[Rollout], temperature: float) -> float:
    """The mean difference of a token's log-prob between engine and policy, in nats."""
    batch = collate(rollouts)
    logprobs = policy(batch.ids, batch.response_mask, temperature)
    difference = (logprobs - batch.sampler_logprobs).abs().sum() / batch.response_mask.sum()
    return difference.item()


TOKENIZERS = {"Llama": llama_tokenizer, "Gemma": gemma_tokenizer}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "Llama",  # its own tokenizer, as Gemma has: both write BOS
        "Gemma",
        "Gemma3Text",
        "Mistral",
        "Ministral3",
        "Qwen2",
        "Qwen3",
        "Phi3",
        "Glm4",
        "Ernie4_5",
        "Exaone4",
        "Olmo2",  # vLLM runs this one and the next by the code of transformers
        "SmolLM3",
    ],
)
def test_an_accepted_model_is_sampled_trained_and_synced_without_a_gap(toy, tmp_path, family):
    if family in TOKENIZERS:
        tokenizer = TOKENIZERS[family](tmp_path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    special = {"pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id or 0}
    special["eos_token_id"] = tokenizer.eos_token_id
    config = tiny(family, **special, vocab_size=len(tokenizer))
    _, model = two_copies(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    check_model(str(tmp_path), 128)
    # A process for each engine: none must find what another one left behind
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        gaps = process.submit(sample_update_wake, str(tmp_path)).result(timeout=600)
    assert gaps["before"] < 1e-4
    assert gaps["after the update"] > 1e-2  # the engine's old weights would be noticed
    assert gaps["after wake"] < 1e-4
