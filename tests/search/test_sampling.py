"""The sampler: its distribution, its dice, its log-probabilities, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from companion import Policy, RewardFormatter
from companion.errors import DataError, ModelError
from companion.formatting import encode_prompts
from companion.tutor import grade, make_rows

TUTOR = "companion/assets/tutor-base"
PROMPTS = [
    [{"role": "user", "content": "how many pens"}],
    "Ana has 3 boxes and",
    [{"role": "user", "content": "Ben gives 4 pens to Ana , how many is it now"}],
]


@pytest.fixture(scope="module")
def policy(tiny_base):
    return Policy.from_pretrained(tiny_base, device="cpu")


@pytest.fixture(scope="module")
def tutor():
    return Policy.from_pretrained(TUTOR, device="cpu")


def _ids(samples):
    return [[sample.token_ids for sample in row] for row in samples]


def test_a_sample_depends_on_its_prompt_its_number_and_the_seed_alone(tiny_base, policy):
    drawn = policy.sample(PROMPTS, n=6, max_new_tokens=12, seed=3)
    assert _ids(policy.sample(PROMPTS, n=4, max_new_tokens=12, seed=3)) == [
        row[:4] for row in _ids(drawn)
    ]
    assert _ids(policy.sample(PROMPTS[::-1], n=6, max_new_tokens=12, seed=3))[::-1] == _ids(drawn)
    small = Policy.from_pretrained(tiny_base, device="cpu", max_tokens_per_batch=40)
    assert _ids(small.sample(PROMPTS, n=6, max_new_tokens=12, seed=3)) == _ids(drawn)
    shorter = policy.sample(PROMPTS, n=6, max_new_tokens=5, seed=3)
    assert _ids(shorter) == [[ids[:5] for ids in row] for row in _ids(drawn)]
    assert _ids(policy.sample(PROMPTS, n=6, max_new_tokens=12, seed=4)) != _ids(drawn)
    assert len({tuple(ids) for ids in _ids(drawn)[0]}) > 1


def test_a_prompt_given_twice_gets_other_samples_the_second_time(policy):
    twice = policy.sample([PROMPTS[0], PROMPTS[1], PROMPTS[0]], n=3, max_new_tokens=8)
    once = policy.sample([PROMPTS[0]], n=6, max_new_tokens=8)
    assert _ids([twice[0] + twice[2]]) == _ids(once)


def test_the_global_generator_is_neither_read_nor_moved(policy):
    torch.manual_seed(7)
    first = _ids(policy.sample(PROMPTS, n=2, max_new_tokens=6))
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    assert _ids(policy.sample(PROMPTS, n=2, max_new_tokens=6)) == first


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6)])
def test_tokens_come_with_the_probabilities_of_the_model(policy, temperature, top_p):
    """Against the softmax computed here, by a chi-square test with a fixed seed."""
    from scipy.stats import chisquare

    n = 3000
    samples = policy.sample(
        PROMPTS[:1], n=n, temperature=temperature, top_p=top_p, max_new_tokens=1
    )[0]
    ids = torch.tensor([encode_prompts(policy.formatter, PROMPTS[:1])[0]])
    with torch.no_grad():
        p = torch.softmax(policy.model(ids).logits[0, -1].double() / temperature, dim=-1)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= top_p]] = 0.0
    p = (p / p.sum()).numpy()
    counts = np.bincount([sample.token_ids[0] for sample in samples], minlength=len(p))
    assert counts[p == 0].sum() == 0
    often = p * n >= 5
    observed, expected = [*counts[often]], [*(p[often] * n)]
    if (rest := (p[~often].sum() * n)) > 0:
        observed, expected = [*observed, n - sum(observed)], [*expected, rest]
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma", "mistral"])
def test_greedy_and_logprobs_equal_a_plain_loop(tiny_bases, kind):
    """Left padding, the shared prompt and the cache change nothing: one prompt, no cache, here."""
    policy = Policy.from_pretrained(tiny_bases(kind), device="cpu")
    drawn = policy.sample(PROMPTS, n=1, temperature=0.0, max_new_tokens=8)
    several = policy.sample(PROMPTS, n=3, max_new_tokens=8)
    for ids, (greedy,), row in zip(
        encode_prompts(policy.formatter, PROMPTS), drawn, several, strict=True
    ):
        expected: list[int] = []
        while len(expected) < 8 and expected[-1:] != [policy.tokenizer.eos_token_id]:
            with torch.no_grad():
                logits = policy.model(torch.tensor([ids + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
        assert greedy.token_ids == expected
        for sample in row:
            with torch.no_grad():
                logits = policy.model(torch.tensor([ids + sample.token_ids])).logits[0].double()
            steps = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]
            total = steps.gather(-1, torch.tensor(sample.token_ids)[:, None]).sum()
            assert sample.logprob == pytest.approx(float(total), abs=1e-4)


def test_a_prompt_is_computed_once_for_all_of_its_samples(policy):
    shapes = []
    hook = policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape))
    )
    try:
        policy.sample(PROMPTS[:1], n=5, max_new_tokens=3)
    finally:
        hook.remove()
    length = len(encode_prompts(policy.formatter, PROMPTS[:1])[0])
    assert shapes == [(1, length - 1), (5, 1), (5, 1), (5, 1)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_of_samples_of_ids_and_of_texts(tutor, temperature):
    prompts = [row["prompt"] for row in make_rows("prompts", 3, seed=1)]
    drawn = tutor.sample(prompts, n=4, temperature=temperature, max_new_tokens=96)
    flat = [(p, s) for p, row in zip(prompts, drawn, strict=True) for s in row if s.terminated]
    repeated, samples = [p for p, _ in flat], [s for _, s in flat]
    assert len(samples) >= 10
    wanted = [sample.logprob for sample in samples]
    for given in (samples, [s.token_ids for s in samples], [s.text for s in samples]):
        got = tutor.logprobs(repeated, given, temperature=temperature)
        np.testing.assert_allclose(got.sums, wanted, atol=1e-4)
        assert [len(item) for item in got.tokens] == [s.n_tokens for s in samples]
        np.testing.assert_allclose([item.sum() for item in got.tokens], got.sums)


def test_probabilities_of_all_first_tokens_add_to_one(policy):
    size = policy.model.config.vocab_size
    got = policy.logprobs([PROMPTS[0]] * size, [[i] for i in range(size)])
    assert np.exp(got.sums).sum() == pytest.approx(1.0, abs=1e-5)


def test_the_tutor_is_right_greedily_and_half_the_time_when_sampled(tutor):
    prompts = [row["prompt"] for row in make_rows("prompts", 48, seed=2)]
    right = {}
    for name, settings in (("greedy", {"temperature": 0.0}), ("sampled", {"n": 4})):
        drawn = tutor.sample(prompts, max_new_tokens=96, **settings)
        right[name] = np.mean(
            [
                grade(p[0]["content"], s.text).correct
                for p, row in zip(prompts, drawn, strict=True)
                for s in row
            ]
        )
    assert right["greedy"] == 1.0
    assert abs(right["sampled"] - 0.5335) < 4 * math.sqrt(0.25 / (48 * 4))


def test_what_was_cut_off_says_so(tutor):
    (prompt,) = (row["prompt"] for row in make_rows("prompts", 1, seed=3))
    short, long = (tutor.sample([prompt], n=8, max_new_tokens=m)[0] for m in (6, 96))
    eos = tutor.tokenizer.eos_token_id
    for a, b in zip(short, long, strict=True):
        assert b.token_ids[: a.n_tokens] == a.token_ids
        assert a.terminated is (a.token_ids[-1] == eos)
        assert a.n_tokens == len(a.token_ids) <= 6
    assert not all(sample.terminated for sample in short)
    assert any(sample.terminated for sample in long)
    assert all(eos not in sample.token_ids[:-1] for sample in long)


def test_step_by_step_gives_the_steps_of_the_text(tutor):
    (prompt,) = (row["prompt"] for row in make_rows("prompts", 1, seed=4))
    first = tutor.sample([prompt], n=8, max_new_tokens=40, stop="\n")[0]
    assert any(sample.stopped for sample in first)
    for sample in first:
        assert sample.stopped is (sample.text.endswith("\n") and "\n" not in sample.text[:-1])
        assert not (sample.stopped and sample.terminated)
    begun = next(sample for sample in first if sample.stopped)
    second = tutor.sample(
        [prompt], n=4, max_new_tokens=40, stop="\n", prefixes=[begun.token_ids], seed=1
    )[0]
    for sample in second:
        assert sample.token_ids[: begun.n_tokens] == begun.token_ids
        assert sample.text.startswith(begun.text)
        assert len(sample.token_ids) == begun.n_tokens + sample.n_tokens


def test_a_checkpoint_s_generation_settings_are_not_applied_behind_the_back(policy, tiny_base):
    from transformers import GenerationConfig

    plain = policy.sample(PROMPTS, n=3, max_new_tokens=10)
    other = Policy.from_pretrained(tiny_base, device="cpu")
    config = GenerationConfig(
        repetition_penalty=50.0, top_k=1, do_sample=True, eos_token_id=[2, 3], max_length=5
    )
    other.model.generation_config = config
    other.model.train()
    assert other.eos_token_ids == [2, 3]
    other.model.generation_config.eos_token_id = 2
    assert _ids(other.sample(PROMPTS, n=3, max_new_tokens=10)) == _ids(plain)
    assert other.model.generation_config is config
    assert other.model.training


def test_each_end_token_of_the_checkpoint_ends_a_completion(policy, tiny_base):
    """A chat model's generation config names several; the tokenizer knows one of them."""
    plain = _ids(policy.sample(PROMPTS, n=4, max_new_tokens=10))
    end = plain[0][0][3]
    other = Policy.from_pretrained(tiny_base, device="cpu")
    other.model.generation_config.eos_token_id = [other.tokenizer.eos_token_id, end]
    for row, samples in zip(plain, other.sample(PROMPTS, n=4, max_new_tokens=10), strict=True):
        for ids, sample in zip(row, samples, strict=True):
            expected = ids[: ids.index(end) + 1] if end in ids else ids
            assert sample.token_ids == expected
            assert sample.terminated == (expected[-1] in (end, other.tokenizer.eos_token_id))


def test_prompts_are_written_as_the_tokenizer_s_template_writes_them(tiny_tokenizer):
    formatter = RewardFormatter(tiny_tokenizer)
    chat, text, _ = PROMPTS
    ids = encode_prompts(formatter, [chat, text, "<s>" + text])
    assert ids[0] == tiny_tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids[1] == ids[2] == tiny_tokenizer(text)["input_ids"]
    for prompt, head in ((chat, ids[0]), (text + " ", ids[1])):
        whole = formatter.encode(prompt, "Ana has 3 pens")
        assert whole.input_ids[: whole.prompt_length] == head


def test_a_tokenizer_that_adds_eos_and_an_answer_that_is_begun(make_tokenizer):
    formatter = RewardFormatter(make_tokenizer(adds_eos=True))
    eos = formatter.tokenizer.eos_token_id
    begun = [*PROMPTS[0], {"role": "assistant", "content": "Ana has"}]
    ids = encode_prompts(formatter, [PROMPTS[1], begun])
    assert all(eos not in row for row in ids)
    assert formatter.tokenizer.decode(ids[1]).replace(" ", "").endswith("<|assistant|>Anahas")


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([PROMPTS[0]], {"n": 0}, "at least 1"),
        ([PROMPTS[0]], {"temperature": -1.0}, "temperature is -1"),
        ([PROMPTS[0]], {"temperature": 0.0, "n": 2}, "all be the same"),
        ([PROMPTS[0]], {"top_p": 0.0}, "top_p is 0"),
        ([PROMPTS[0]], {"stop": ""}, "empty text"),
        ([PROMPTS[0]], {"prefixes": [[], []]}, "1 prompts, 2 prefixes"),
        ([PROMPTS[0]], {"max_new_tokens": 200}, "prompt 0: .* positions"),
        ([PROMPTS[0], " "], {}, "prompt 1: the prompt is empty"),
        ([PROMPTS[0], {"prompt": "a"}], {}, "prompt 1: a row"),
        ("how many", {}, "a list of prompts"),
        ([[{"role": "pirate", "content": "a"}]], {}, "prompt 0: message 0 has the role"),
    ],
)
def test_bad_input_is_named(policy, prompts, settings, words):
    with pytest.raises(DataError, match=words):
        policy.sample(prompts, **{"max_new_tokens": 4, **settings})


def test_bad_completions_are_named(policy):
    with pytest.raises(DataError, match="2 prompts, 1 completions"):
        policy.logprobs(PROMPTS[:2], ["no"])
    with pytest.raises(DataError, match="completion 0: no tokens"):
        policy.logprobs(PROMPTS[:1], [[]])
    with pytest.raises(DataError, match="temperature"):
        policy.logprobs(PROMPTS[:1], ["no"], temperature=0)


def test_what_is_no_policy_is_refused(tiny_reward, tmp_path, make_tokenizer, make_causal):
    with pytest.raises(ModelError, match="is a reward model or classifier"):
        Policy.from_pretrained(tiny_reward)
    with pytest.raises(ModelError, match="no such folder"):
        Policy.from_pretrained("./nowhere")
    folder = make_causal("qwen3", make_tokenizer(), tmp_path / "no_eos")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="no EOS token"):
        Policy.from_pretrained(folder)
