"""What an exercise is made of: properties, wrong answers that are known, hints.

An exercise of the course is an :class:`Exercise` (a function to write or to mend) or a
:class:`Prediction` (questions to answer before the cell is run). Both hold *mutants*: wrong
answers, each with the misconception behind it. An attempt that behaves like a mutant on all that it
was asked is told so; to any other is said what does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Thread:
    """A discussion of the same mistake in a library.

    Attributes
    ----------
    address : str
    about : str
        What it is about, in a few words.
    """

    address: str
    about: str


_HUB = "https://github.com/"
#: upstream threads of bugs that the exercises rebuild, by their short names
#:
#: :meta hide-value:
THREADS: dict[str, Thread] = {
    "DeepSpeedExamples #423": Thread(
        _HUB + "deepspeedai/DeepSpeedExamples/issues/423", "a reward model's training loss of inf"
    ),
    "ms-swift #9927": Thread(
        _HUB + "modelscope/ms-swift/pull/9927", "margins broadcast over all pairs of the batch"
    ),
    "trl #7010": Thread(
        _HUB + "huggingface/trl/issues/7010", "metrics averaged without regard to batch sizes"
    ),
    "trl #469": Thread(
        _HUB + "huggingface/trl/issues/469", "left padding without position ids on GPT-2"
    ),
    "transformers #35352": Thread(
        _HUB + "huggingface/transformers/issues/35352",
        "which token is read when the pad token is the EOS",
    ),
    "transformers #46782": Thread(
        _HUB + "huggingface/transformers/pull/46782",
        "BioGPT read the wrong token of left-padded rows",
    ),
    "reward-bench #137": Thread(
        _HUB + "allenai/reward-bench/issues/137", "scores that changed with the batch size"
    ),
    "reward-bench #164": Thread(
        _HUB + "allenai/reward-bench/issues/164",
        "one BOS from the template, one from the tokenizer",
    ),
    "reward-bench #94": Thread(
        _HUB + "allenai/reward-bench/issues/94", "the EOS left out at evaluation"
    ),
    "RLHF-Reward-Modeling #16": Thread(
        _HUB + "RLHFlow/RLHF-Reward-Modeling/issues/16", "the template's BOS replaced by nothing"
    ),
    "trl #2127": Thread(
        _HUB + "huggingface/trl/pull/2127", "labels cast to booleans, so that −100 became True"
    ),
    "OpenRLHF #683": Thread(
        _HUB + "OpenRLHF/OpenRLHF/issues/683",
        "a step's placeholder joined with its neighbour by the tokenizer: no step was labelled",
    ),
    "NeMo Gym #2103": Thread(
        _HUB + "NVIDIA-NeMo/Gym/pull/2103",
        "a judge's reply that cannot be parsed, counted as a tie",
    ),
    "verl #7240": Thread(
        _HUB + "verl-project/verl/pull/7240", "best@k by drawing with replacement"
    ),
    "trl #3240": Thread(
        _HUB + "huggingface/trl/pull/3240", "an estimate of the KL divergence that can be negative"
    ),
    "rocket-learn #12": Thread(
        _HUB + "Rolv-Arild/rocket-learn/pull/12", "the KL estimate with its ratio upside down"
    ),
    "transformers #40221": Thread(
        _HUB + "huggingface/transformers/pull/40221",
        "the last checkpoint loaded where the best was asked for",
    ),
    "trl #2685": Thread(
        _HUB + "huggingface/trl/issues/2685", "is a reward model in eval mode within GRPO?"
    ),
    "slime #2120": Thread(
        _HUB + "THUDM/slime/pull/2120", "a prompt that is a list of messages, joined with `+`"
    ),
    "UniRL #335": Thread(
        _HUB + "Tencent-Hunyuan/UniRL/pull/335", "one infinite reward spoils a batch's advantages"
    ),
    "trl #5224": Thread(
        _HUB + "huggingface/trl/issues/5224", "token ids that change when text is tokenised anew"
    ),
    "OpenRLHF #938": Thread(
        _HUB + "OpenRLHF/OpenRLHF/issues/938", "a reward server with tensors on two devices"
    ),
    "vllm #12910": Thread(
        _HUB + "vllm-project/vllm/issues/12910", "a softmax over the one logit of a model"
    ),
    "verl-omni #366": Thread(
        _HUB + "verl-project/verl-omni/pull/366", "a score that failed, counted as 0"
    ),
    "slime #1582": Thread(
        _HUB + "THUDM/slime/pull/1582", "thousands of requests at once to a reward server"
    ),
    "accelerate #2316": Thread(
        _HUB + "huggingface/accelerate/issues/2316", "rows that are repeated to fill the last batch"
    ),
    "trl #4104": Thread(
        _HUB + "huggingface/trl/issues/4104", "does a reward model's loss need the step's count?"
    ),
    "fairseq #494": Thread(
        _HUB + "facebookresearch/fairseq/issues/494", "DDP averages over ranks: why it is undone"
    ),
    "transformers #34242": Thread(
        _HUB + "huggingface/transformers/issues/34242",
        "items counted over the accumulation, and not over the ranks",
    ),
    "trl #7012": Thread(
        _HUB + "huggingface/trl/issues/7012",
        "statistics of a short micro-batch, averaged as if full",
    ),
    "pytorch #42577": Thread(
        _HUB + "pytorch/pytorch/pull/42577", "ranks with fewer batches than the others hang"
    ),
    "DeepSpeed #5099": Thread(
        _HUB + "deepspeedai/DeepSpeed/pull/5099", "4 bytes counted where bf16 has 2"
    ),
    "Megatron-LM #654": Thread(
        _HUB + "NVIDIA/Megatron-LM/issues/654", "18 bytes a parameter where 16 were expected"
    ),
    "transformers #41723": Thread(
        _HUB + "huggingface/transformers/pull/41723", "a checkpoint at SIGTERM, each rank by itself"
    ),
    "pytorch-lightning #20825": Thread(
        _HUB + "Lightning-AI/pytorch-lightning/pull/20825",
        "ranks that hang when one of them stops at a SIGTERM",
    ),
}


class Unmet(AssertionError):
    """A property does not hold; the text is the evidence: what went in, what came out."""


class Unusable(Unmet):
    """What came back is not of the kind that was asked for, so nothing about it can be tested."""


class WrongShape(Unusable):
    """A tensor, of another shape than was asked for."""


class NotReached(Exception):
    """A property says nothing while others do not hold."""


@dataclass(frozen=True)
class Property:
    """Something that every right answer does.

    Attributes
    ----------
    name : str
        A few words: "one loss for each pair".
    requirement : str
        What is said if it fails and no mutant explains the attempt: what is asked for, not what
        somebody may have believed.
    test : callable
        Takes the attempt; raises :class:`Unmet` with the evidence, or :class:`NotReached`.
    """

    name: str
    requirement: str
    test: Callable[[Callable[..., Any]], None]


@dataclass(frozen=True)
class Mutant:
    """A wrong answer that people give, and what they believe who give it.

    Attributes
    ----------
    misconception : str
    answer : Any
        A function, or the dict of a prediction.
    thread : str, optional
        Key of :data:`THREADS`: the upstream bug that it rebuilds.
    also : tuple
        Variants of the same mistake, such as another small constant.
    """

    misconception: str
    answer: Any
    thread: str | None = None
    also: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Name of the function, or the prediction itself."""
        return getattr(self.answer, "__name__", None) or str(self.answer)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


@dataclass(frozen=True)
class Exercise:
    """A function to write, or to mend.

    Attributes
    ----------
    id : str
    parameters : tuple of str
        Names of the function's parameters, in order.
    properties : tuple of Property
        The first that fails is reported.
    mutants : tuple of Mutant
    probes : callable
        Makes argument tuples on which the mutants behave differently from one another.
    hints : tuple of three str
        From a nudge to nearly the answer.
    right : str
        A word to who solved it: what else is worth knowing.
    look : callable
        ``look(function, arguments)`` gives what is compared with the mutants; default: the result.
    replay : bool
        Whether mutants are also compared on all inputs that the properties tried, not on the probes
        alone. Not where a right answer may be one of many and `look` is slow.
    broken : callable, optional
        The script with the bugs; the generator of the notebooks puts its body into the stub.
    """

    id: str
    parameters: tuple[str, ...]
    properties: tuple[Property, ...]
    mutants: tuple[Mutant, ...]
    probes: Callable[[], list[tuple[Any, ...]]]
    hints: tuple[str, str, str]
    right: str
    look: Callable[[Callable[..., Any], tuple[Any, ...]], Any] = _call
    replay: bool = True
    broken: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Question:
    """One question of a prediction.

    Attributes
    ----------
    key : str
    options : tuple
        All answers that may be given.
    misconceptions : mapping
        For each wrong option, what it comes from.
    thread : str, optional
        Key of :data:`THREADS`.
    """

    key: str
    options: tuple[Any, ...]
    misconceptions: Mapping[Any, str]
    thread: str | None = None


@dataclass(frozen=True)
class Prediction:
    """Questions to answer before running; the answers are computed by running, not stored.

    Attributes
    ----------
    id : str
    questions : tuple of Question
    run : callable
        Makes the experiment; returns ``{key: right answer}``.
    hints : tuple of three str
    right : str
    """

    id: str
    questions: tuple[Question, ...]
    run: Callable[[], dict[str, Any]]
    hints: tuple[str, str, str]
    right: str

    @property
    def mutants(self) -> tuple[Mutant, ...]:
        """The right answers with one of them wrong, for each wrong option of each question."""
        truth = self.run()
        return tuple(
            Mutant(question.misconceptions[option], {**truth, question.key: option})
            for question in self.questions
            for option in question.options
            if option != truth[question.key]
        )
