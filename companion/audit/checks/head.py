"""Head and numbers: are these the weights that were trained, and what does the dtype do?

What stock loading says of a checkpoint and hardly anyone reads (missing and surplus weights, code
of its own that is not run), and what becomes of the numbers on their way out of the head.
Chapter 9.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from companion.audit.checks.readout import BY_TOKEN, texts_of
from companion.audit.local import LocalSubject
from companion.audit.outcome import Check, Outcome, found, measured, not_asked, sound
from companion.audit.scripts import local_script
from companion.audit.shrinking import shrink
from companion.audit.subject import Ability, Batch, Subject
from companion.errors import ModelError
from companion.functional.resampling import bootstrap_interval
from companion.models.checkpoint import BUFFERS, LANGUAGE_HEAD, check_code, listed
from companion.models.head import initialise_head, without_adapter

#: What is taken for the head among the weights of a checkpoint.
_HEADS = re.compile(r"(score|classifier|v_head|value_head|reward_head|regression_head|rm_head)\.")
_HALF = ("bfloat16", "float16")
#: Seeds of a fresh head that are tried.
_SEEDS = 100


def _local(subject: Subject) -> LocalSubject:
    assert isinstance(subject, LocalSubject)  # all checks here need the weights
    return subject


# ---------------------------------------------------------------------- weights


def _head_missing(subject: Subject) -> Outcome | None:
    local = _local(subject)
    lacks = [key for key in local.missing if _HEADS.match(key)]
    if lacks:
        others = [key for key in local.surplus if _HEADS.match(key)]
        beside = f"; it holds {listed(others)}, which the class does not read" if others else ""
        what = "The checkpoint has no head: transformers draws one at random."
        body = """
heads = [key for key in loaded["missing_keys"] if "score" in key or "classifier" in key]
print("drawn at random:", heads)
sys.exit(1 if heads else 0)
"""
        return found(
            f"the checkpoint lacks {listed(lacks)}: transformers draws a head at random, another "
            f"in each process{beside}",
            script=local_script(local, what, body),
        )
    weight = None if local.head is None else local.head.weight
    if weight is not None and not bool(weight.any()):
        body = """
head = getattr(model, "score", None) or model.classifier
print("largest weight of the head:", float(head.weight.detach().abs().max()))
sys.exit(0 if head.weight.any() else 1)
"""
        return found(
            "the head's weights are all zero: every text has one score",
            script=local_script(local, "The head is all zero.", body),
        )
    return sound(
        "the head's weights came from the checkpoint"
        if local.what == "folder"
        else "there is a head"
    )


def _weights_missing(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if local.what != "folder":
        return None
    lacks = [key for key in local.missing if not _HEADS.match(key)]
    if not lacks:
        return sound("the checkpoint has all weights of the backbone")
    body = """
lacks = [key for key in loaded["missing_keys"] if "score" not in key and "classifier" not in key]
print("drawn at random:", lacks)
sys.exit(1 if lacks else 0)
"""
    what = "The checkpoint lacks weights: transformers draws them at random."
    return found(
        f"the checkpoint lacks {listed(lacks)}: transformers fills them with random numbers",
        script=local_script(local, what, body),
        missing=len(lacks),
    )


def _surplus(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if local.what != "folder":
        return None
    # a causal LM's output layer, and constants that are computed today, have no part in a score
    over = [
        key
        for key in local.surplus
        if not re.match(LANGUAGE_HEAD, key)
        and not BUFFERS.search(key)
        and not (local.headless and _HEADS.match(key))
    ]
    if not over:
        return sound("the class has a place for all weights of the checkpoint")
    body = f"""
over = sorted(set(loaded["unexpected_keys"]) & set({over!r}))
print("in the checkpoint and in no layer:", over)
sys.exit(1 if over else 0)
"""
    what = "Weights of the checkpoint are left out: the model is another one."
    return found(
        f"{type(without_adapter(local.model)).__name__} has no place for {listed(over)} of the "
        "checkpoint, and transformers leaves them out: the scores are another model's",
        script=local_script(local, what, body),
        surplus=len(over),
    )


def _own_forward(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if local.what != "folder" or not local.own_code:
        return None
    auto = f"AutoModelFor{'Sequence' if local.kind == 'scalar' else 'Token'}Classification"
    try:
        check_code(local.name, local.config, auto, local.trusted)
    except ModelError as error:
        own = type(without_adapter(local.model))
        body = """
own = model.config.auto_map
print("runs:", type(model).__module__, "; the folder names:", own)
sys.exit(1 if type(model).__module__.startswith("transformers.") else 0)
"""
        return found(
            f"the folder has code of its own ({', '.join(sorted(local.own_code.values()))}), and "
            f"{own.__name__} of {own.__module__.split('.')[0]} runs in its place",
            script=local_script(local, str(error.what), body),
        )
    return sound("the code that runs is the one that the folder names")


def _untrained(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if local.head is None or local.headless:
        return None
    weight = local.head.weight.detach().float().cpu()
    seed = _fresh_seed(local.head, weight)
    if seed is not None:
        return found(
            f"the head is the fresh one that load_base draws with head_seed={seed}: it was never "
            "trained"
        )
    spread = float(getattr(local.config.get_text_config(), "initializer_range", 0.0) or 0.0)
    values = weight.double().numpy().ravel()
    if not spread or values.size < 32:
        return sound("nothing says that the head is fresh")
    from scipy import stats

    # a trained head is no longer drawn from N(0, initializer_range²); a little training hides in it
    p = float(stats.kstest(values / spread, "norm").pvalue)
    moved = float(values.std() / spread)
    if p < 0.05:
        return sound(
            f"the head's weights are not those of a fresh draw (p = {p:.2g}, standard deviation "
            f"{moved:.2f} times initializer_range)",
            p=p,
        )
    return found(
        f"a suspicion: the head's {values.size} weights cannot be told from a fresh draw of "
        f"N(0, {spread:g}²) (p = {p:.2f}); few steps at a low learning rate leave it so, too",
        p=p,
    )


def _fresh_seed(head: nn.Linear, weight: Tensor) -> int | None:
    """The seed that draws this very head, if it is a small one."""
    blank = nn.Linear(head.in_features, head.out_features, bias=False)
    for seed in range(_SEEDS):
        initialise_head(blank, seed)
        if torch.equal(blank.weight.to(head.weight.dtype).float(), weight):
            return seed
    return None


def _golden(subject: Subject) -> Outcome | None:
    local = _local(subject)
    golden = None if local.manifest is None else local.manifest.golden_texts
    if golden is None or golden.places is not None:
        return None
    asked = local if golden.dtype in _HALF else local.exact
    pairs = zip(golden.input_ids, golden.values, strict=True)
    shortest = sorted(pairs, key=lambda pair: len(pair[0]))[:5]
    ids = [list(text) for text, _ in shortest]
    want = np.array([float(value) for _, value in shortest])
    scores = asked.alone(ids)
    # another machine sums in another order, which the manifest's own tolerance covers
    moved = ~(np.abs(scores - want) <= np.maximum(golden.tolerance, asked.tolerance(ids)))
    if not moved.any():
        return sound(f"{len(ids)} golden texts have the scores of the manifest")
    worst = int(np.argmax(np.abs(np.nan_to_num(scores - want, nan=np.inf))))
    body = f"""
score = scores([TEXT])[0]
print(f"now {{score:.6f}}; {want[worst]:.6f} when it was saved")
sys.exit(0 if abs(score - {float(want[worst])!r}) <= {golden.tolerance!r} else 1)
"""
    what = "A golden text has another score than when the model was saved."
    return found(
        f"{int(moved.sum())} of {len(ids)} golden texts have another score than when the model was "
        f"saved: {scores[worst]:.4f}, and it was {want[worst]:.4f}",
        size=float(np.max(np.abs(scores - want))),
        script=local_script(asked, what, body, TEXT=ids[worst]),
    )


# ---------------------------------------------------------------------- numbers


def _finite(subject: Subject) -> Outcome | None:
    local = _local(subject)
    texts = texts_of(local)
    bad = ~np.isfinite(local.alone(texts))
    weights = [
        name
        for name, each in local.model.named_parameters()
        if each.is_floating_point() and not bool(torch.isfinite(each).all())
    ]
    if not bad.any() and not weights:
        return sound(f"{len(texts)} scores and all weights are finite")
    seen = f"{int(bad.sum())} of {len(texts)} scores are not finite"
    if weights:
        seen += f"; so are {listed(weights)}"
    elif local.exact is not local and np.isfinite(local.exact.alone(texts)).all():
        seen += f" in {local.dtype}, and all are in float32: the numbers are too large for it"
    if bad.any():
        text = shrink(
            texts[int(np.argmax(bad))],
            lambda fewer: not bool(np.isfinite(local.alone([fewer])).all()),
        )
        body = """
score = scores([TEXT])[0]
print("score:", score)
sys.exit(0 if abs(score) < float("inf") else 1)
"""
        return found(seen, script=local_script(local, "A score is not finite.", body, TEXT=text))
    body = """
bad = [name for name, each in model.named_parameters() if not torch.isfinite(each).all()]
print("not finite:", bad)
sys.exit(1 if bad else 0)
"""
    return found(seen, script=local_script(local, "Weights are not finite.", body))


def _half_head(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if local.head is None:
        return not_asked("the model has no linear head under a usual name")
    head = local.head
    dtype = str(head.weight.dtype).removeprefix("torch.")
    if dtype not in _HALF:
        return sound(f"the head's weights are in {dtype}")
    kept, exact = _head_outputs(local, texts_of(local))
    distinct, of = len(np.unique(kept)), len(np.unique(exact))
    spread = float(exact.std())
    step = float(torch.finfo(head.weight.dtype).eps * np.abs(kept).mean())
    seen = (
        f"of {of} distinct values of the head in float32 {distinct} are left in {dtype}: two "
        f"scores nearer than about {step:.2g} are made one (standard deviation {spread:.3g})"
    )
    if distinct >= of:
        return sound(f"the head is in {dtype}, and gives {distinct} distinct values of {of}")
    return found(seen, size=step, distinct=distinct, of=of)


def _head_outputs(local: LocalSubject, texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Of each token the first output of the head, as it gives it and as float32 would."""
    kept: list[Tensor] = []
    exact: list[Tensor] = []

    def look(module: nn.Linear, given: tuple[Tensor, ...], out: Tensor) -> None:
        hidden = given[0].detach().float().reshape(-1, module.in_features)
        kept.append(out.detach().float().reshape(-1, module.out_features)[:, 0])
        bias = None if module.bias is None else module.bias.float()
        exact.append(nn.functional.linear(hidden, module.weight.float(), bias)[:, 0])

    assert local.head is not None
    handle = local.head.register_forward_hook(look)
    try:
        for text in texts:
            local.call(Batch([text]))
    finally:
        handle.remove()
    return torch.cat(kept).cpu().numpy(), torch.cat(exact).cpu().numpy()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))


_ACTIVATIONS: Final[dict[str, Callable[[np.ndarray], np.ndarray]]] = {
    "a sigmoid": _sigmoid,
    "a tanh": np.tanh,
    "a softmax over one label": np.ones_like,
    "a log-sigmoid": lambda x: np.log(np.maximum(_sigmoid(x), 1e-300)),
    "a ReLU": lambda x: np.maximum(x, 0.0),
}


def _activation(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if local.kind != "scalar":
        return not_asked(BY_TOKEN)
    if local.head is None:
        return not_asked("the model has no linear head under a usual name")
    asked = local.exact
    texts = texts_of(asked)[:5]
    scores = asked.alone(texts)
    tolerance = asked.tolerance(texts)
    raw = [_head_outputs(asked, [text])[0].astype(np.float64) for text in texts]

    def fits(function: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Whether each score is that of some token's raw value."""
        return all(
            bool((np.abs(function(values) - score) <= most).any())
            for values, score, most in zip(raw, scores, tolerance, strict=True)
        )

    if fits(lambda x: x):
        return sound("the scores are the head's own values")
    for name, function in _ACTIVATIONS.items():
        if fits(function):
            body = f"""
raw = []
head = getattr(model, "score", None) or model.classifier
head.register_forward_hook(lambda module, given, out: raw.extend(out.flatten().tolist()))
score = scores([TEXT])[0]
print("score:", score, "values of the head:", raw)
sys.exit(0 if min(abs(score - value) for value in raw) <= {float(tolerance[1])!r} else 1)
"""
            what = f"The model applies {name} to its score."
            return found(
                f"the score is {name} of the head's value ({scores.min():.4f} to "
                f"{scores.max():.4f})",
                size=float(np.max(np.abs(scores - np.array([values[-1] for values in raw])))),
                script=local_script(asked, what, body, TEXT=texts[1]),
            )
    return sound("the scores are no known function of one value of the head")


def _problem_type(subject: Subject) -> Outcome | None:
    if subject.kind != "scalar":
        return not_asked(BY_TOKEN)
    kind = getattr(subject.config, "problem_type", None)
    if kind == "regression":
        return sound("config.problem_type is 'regression': engines give the raw score")
    return found(
        f"config.problem_type is {kind!r}: vLLM, SGLang and TEI take one label for a "
        "classification and give a sigmoid of the score, unless the request says otherwise"
    )


def _dropout(subject: Subject) -> Outcome | None:
    local = _local(subject)
    rates = {
        key: value
        for part in {id(c): c for c in (local.config, local.config.get_text_config())}.values()
        for key, value in vars(part).items()
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float) and value > 0
    }
    if local.kind == "scalar":  # a rate that only other heads have
        rates.pop("classifier_dropout", None)
    if not rates:
        return sound("no rate of dropout is above 0")
    said = ", ".join(f"{key} = {value:g}" for key, value in sorted(rates.items()))
    text = texts_of(local)[0]
    local.model.train()
    try:
        scores = np.array([local.call(Batch([text]))[0] for _ in range(6)])
    finally:
        local.model.eval()
    if not scores.std():
        return sound(f"{said}, of which nothing is used in a score")
    given = " and the model was given in training mode" if local.was_training else ""
    return found(
        f"{said}{given}: in training mode one text has scores from {scores.min():.4f} to "
        f"{scores.max():.4f}",
        size=float(np.ptp(scores)),
    )


def _dtype(subject: Subject) -> Outcome | None:
    """How far half precision moves scores: the model's own, or bfloat16 for one in float32."""
    local = _local(subject)
    exact, half = local.exact, local
    if exact is local:
        if local.dtype != "float32":
            return None
        half = local.cast("bfloat16")
    texts = texts_of(local)
    try:
        want, scores = exact.alone(texts), half.alone(texts)
    except (RuntimeError, ValueError, TypeError) as error:
        return not_asked(f"it does not run in {half.dtype}: {str(error).splitlines()[0]}")
    spread = float(want.std())
    if not spread or not np.isfinite(scores).all() or not np.isfinite(want).all():
        return not_asked("scores do not vary, or are not finite")
    moved = np.abs(scores - want) / spread
    interval = bootstrap_interval(moved)
    batch = 0.0
    if "padding" in local.abilities:
        with contextlib.suppress(RuntimeError, ValueError, TypeError):  # it takes no batch
            # what a batch does in float32 already is another check's
            beside = half.call(Batch(texts)) - exact.call(Batch(texts))
            batch = float(np.abs(beside - (scores - want)).max() / spread)
    own = "its own dtype" if half is local else "as many an engine runs it"
    return measured(
        f"{half.dtype} ({own}) moves a score by {moved.mean():.3f} standard deviations, "
        f"{moved.max():.3f} at most; in a batch it moves by up to {batch:.3f} more",
        float(moved.mean()),
        interval,
        dtype=half.dtype,
        largest=float(moved.max()),
        batch=batch,
    )


_HF: Final = "https://github.com/huggingface"
_WEIGHTS: Final[frozenset[Ability]] = frozenset({"weights"})
CHECKS: Final[tuple[Check, ...]] = (
    Check(
        "head-missing",
        "head",
        "fault",
        "Does the checkpoint hold the head?",
        "Stock loading draws a missing head at random with no more than a warning, which TRL "
        "silences: such a model scores, and its scores mean nothing.",
        "Save the head with the model; with LoRA name it in modules_to_save. A head that another "
        "tool calls by its own name has to be stored as 'score.weight'.",
        (
            "https://github.com/modelscope/ms-swift/issues/9239",
            "https://github.com/OpenRLHF/OpenRLHF/issues/428",
        ),
        _WEIGHTS,
        _head_missing,
    ),
    Check(
        "head-untrained",
        "head",
        "hazard",
        "Was the head trained?",
        "A fresh head gives each text a number that looks like a score.",
        "Look at the model's accuracy on pairs (--data); train it, or fetch the trained "
        "checkpoint.",
        ("https://github.com/modelscope/ms-swift/issues/9239",),
        _WEIGHTS,
        _untrained,
    ),
    Check(
        "weights-missing",
        "head",
        "fault",
        "Does the checkpoint hold all weights of the backbone?",
        "A checkpoint that was torn while it was saved, or fetched in part, loads all the same: "
        "what lacks is drawn at random.",
        "Fetch or save it again; go on from the checkpoint before it.",
        (
            "https://github.com/vllm-project/speculators/pull/739",
            f"{_HF}/transformers/pull/40790",
        ),
        _WEIGHTS,
        _weights_missing,
    ),
    Check(
        "surplus-weights",
        "head",
        "fault",
        "Has the class a place for all weights of the checkpoint?",
        "Weights that no layer takes are left out without a word: a bias of the head, a second "
        "layer of it, layers beyond config.num_hidden_layers.",
        "Load it as the class that it was saved from (--trust_remote_code if that is the folder's "
        "own), or correct the configuration.",
        (f"{_HF}/transformers/issues/5421", "https://github.com/OpenRLHF/OpenRLHF/issues/542"),
        _WEIGHTS,
        _surplus,
    ),
    Check(
        "own-forward-unused",
        "head",
        "fault",
        "Does the folder's own code run?",
        "transformers takes its own class for a model_type that it knows, unless the code is "
        "trusted: another read-out, head or attention is then dropped without a word.",
        "Read the folder's .py files; if you trust them, load with trust_remote_code "
        "(--trust_remote_code). If the stock class is the right one, take auto_map out of "
        "config.json.",
        (f"{_HF}/transformers/pull/38474",),
        _WEIGHTS,
        _own_forward,
    ),
    Check(
        "golden-texts-moved",
        "head",
        "fault",
        "Have the manifest's golden texts the scores that they had?",
        "The weights are not those that were saved: a checkpoint that was torn, overwritten in "
        "part, or converted wrongly.",
        "Restore the checkpoint; if it was changed on purpose, save it anew with "
        "save_reward_model.",
        ("https://github.com/vllm-project/speculators/pull/739",),
        _WEIGHTS,
        _golden,
    ),
    Check(
        "not-finite",
        "head",
        "fault",
        "Are all scores finite?",
        "A NaN makes each comparison false, and one in a batch of rewards spoils all advantages.",
        "Take bfloat16 or float32 in place of float16; weights that are not finite come of a "
        "training that diverged.",
        (f"{_HF}/trl/issues/3236",),
        _WEIGHTS,
        _finite,
    ),
    Check(
        "activation-applied",
        "head",
        "fault",
        "Is the score the head's own value?",
        "A sigmoid or a tanh squeezes scores: differences of good answers vanish, and a softmax "
        "over one label is always 1.",
        "Give the raw value: take the activation out of the model's forward.",
        (
            "https://github.com/vllm-project/vllm/pull/18313",
            f"{_HF}/transformers/pull/10417",
        ),
        _WEIGHTS,
        _activation,
    ),
    Check(
        "problem-type",
        "head",
        "hazard",
        "Does the configuration tell engines to give the raw score?",
        "By the configuration alone, engines squeeze the score of one label.",
        "Set config.problem_type = 'regression' and save it.",
        ("https://github.com/vllm-project/vllm/pull/18313",),
        _WEIGHTS,
        _problem_type,
    ),
    Check(
        "head-in-half-precision",
        "head",
        "hazard",
        "Are scores that differ kept apart by the head?",
        "In half precision a score has two or three decimal digits: close scores become ties.",
        "Keep the head in float32, as companion.load_reward_model does.",
        (
            "https://github.com/vllm-project/vllm/pull/24567",
            "https://github.com/NVIDIA/NeMo-Aligner/pull/361",
        ),
        _WEIGHTS,
        _half_head,
    ),
    Check(
        "dropout",
        "head",
        "hazard",
        "Would a score be random in training mode?",
        "Whoever scores with the model inside a trainer, or forgets eval(), gets random scores.",
        "Set the rates of dropout to 0 in the configuration, and call eval().",
        ("https://github.com/hiyouga/LlamaFactory/issues/761", f"{_HF}/trl/pull/3234"),
        _WEIGHTS,
        _dropout,
    ),
    Check(
        "dtype-deviation",
        "head",
        "bias",
        "How far does half precision move a score?",
        "Scores of one text from two dtypes, or two batches, differ by as much: that is the noise "
        "of a comparison.",
        "Compare scores of one dtype; take float32 where close scores matter.",
        (
            f"{_HF}/transformers/issues/26869",
            "https://github.com/allenai/reward-bench/issues/137",
        ),
        _WEIGHTS,
        _dtype,
    ),
)
