"""The host waits for the device once a token at most, and not at all for what is only kept.

On a CPU nothing waits, so reads are counted; on `meta` tensors, which have no data, each is an
error.
"""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from companion import Policy
from companion.generation.dice import AllDone, Dice
from companion.judge import Judge
from companion.judge.local import _Likeliest
from companion.tutor import TUTOR_BASE, make_rows

PROMPTS = ["Ana has 3 boxes and", "Ben gives 4 pens to Ana , how many is it now"]


#: Of Python: on a CPU they give the tensor's own memory, and no operation is dispatched.
_METHODS = {
    "cpu",
    "tolist",
    "numpy",
    "__array__",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
}
#: Of the dispatcher.
_OPERATIONS = {"nonzero", "masked_select", "_unique2", "equal"}


class _Functions(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in [x for x in args[1:] if isinstance(x, str)]
        if name in _METHODS or to_host:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in args[1]
            if x is not None
        )
        if name in _OPERATIONS or masked:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class HostReads:
    """A context that counts the reads within it, by the name of what reads.

    Attributes
    ----------
    found : Counter
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._modes = _Functions(self.found), _Dispatched(self.found)

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    @property
    def count(self) -> int:
        """All of them."""
        return self.found.total()


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.from_pretrained(TUTOR_BASE, device="cpu")


@pytest.mark.parametrize(
    "read",
    [
        lambda t: bool(t[0]),
        lambda t: int(t[0]),
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: t.numpy(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: "yes" if t.any() else "no",
    ],
)
def test_the_counter_sees_a_read(read: Any) -> None:
    tensor = torch.ones(3)
    with torch.inference_mode(), HostReads() as reads:
        torch.where(tensor > 0, tensor, 2).cumsum(0).gather(0, torch.zeros(1, dtype=torch.int64))
    assert not reads.count
    with torch.inference_mode(), HostReads() as reads:
        read(tensor)
    assert reads.count == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_dice_and_the_judge_s_likeliest_read_nothing(temperature: float, top_p: float) -> None:
    meta = torch.device("meta")
    dice = Dice(
        torch.empty(4, 6, dtype=torch.float64, device=meta),
        temperature=temperature,
        top_p=top_p,
        eos_token_ids=torch.empty(2, dtype=torch.int64, device=meta),
        stop=None,
        tokenizer=None,
    )
    ids, scores = torch.empty(4, 9, dtype=torch.int64, device=meta), torch.empty(4, 50, device=meta)
    likeliest, done = _Likeliest(), AllDone(dice)
    for _ in range(7):  # one more than there are dice, as generate may look ahead
        assert dice(ids, scores).device == meta
        assert done(ids, scores).device == meta
        assert likeliest(ids, scores).device == meta
    assert len(dice.tokens) == 6
    assert len(likeliest.steps) == 7


def reads_a_token(run: Any) -> float:
    """Reads that come with each further token, those of a batch taken off."""
    found = []
    for tokens in (6, 14):
        with HostReads() as reads:
            run(tokens)
        found.append(reads.count)
    return (found[1] - found[0]) / 8


@pytest.mark.parametrize(
    ("prompts", "settings", "most"),
    [
        (PROMPTS[:1], {}, 1),  # whether all have ended
        (PROMPTS[:1], {"n": 5, "top_p": 0.9}, 1),
        (PROMPTS, {}, 2),  # and transformers looks into a mask that has padding
        (PROMPTS[:1], {"stop": "never written"}, 2),  # the tokenizer is not on the device
    ],
)
def test_sampling_waits_once_a_token(
    policy: Policy, prompts: Any, settings: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no end token, so that each token of the limit is drawn
    monkeypatch.setattr(Policy, "eos_token_ids", property(lambda self: [10**6]))
    per_token = reads_a_token(
        lambda tokens: policy.sample(prompts, max_new_tokens=tokens, seed=1, **settings)
    )
    assert 0 < per_token <= most


def test_the_judge_waits_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge.from_pretrained(TUTOR_BASE, "tutor", device="cpu")
    backend: Any = judge.backend
    monkeypatch.setattr(Policy, "eos_token_ids", property(lambda self: [10**6]))
    with HostReads() as whole:
        judge.compare(list(make_rows("pairs", 1, seed=1)))
    assert whole.count  # (the counter was on)
    ids = backend.policy.tokenizer(PROMPTS[0])["input_ids"]

    def run(tokens: int) -> None:
        likeliest = _Likeliest()
        with backend.policy.ready():
            batch = backend.policy.padded([ids, ids])
            backend.policy.generate(batch, tokens, likeliest, eos_token_ids=[10**6])
        assert len(likeliest.table()[0][0]) == tokens

    assert reads_a_token(run) == 1


def test_log_probabilities_wait_once_a_batch(policy: Policy) -> None:
    found = []
    for rows in (2, 9):
        with HostReads() as reads:
            policy.logprobs(PROMPTS[:1] * rows, ["Ben gives 4 pens"] * rows)
        found.append(reads.count)
    assert found[0] == found[1] > 0
