"""Which forward gives a model's scores: ours, its own, or its own for one text at a time.

Chapter 2. Ours is backbone, read-out by the mask, head. A class of a folder's own code may read out
another token, cap the head, or look at the rest of the batch (measured: off by 4.28), so it is
asked itself; and transformers' own classes differ in how they pad. A few texts are scored alone and
in a batch before a way is believed; for the classes of ``PROVED``
(:mod:`companion.engine.attention`) the tests have done that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from companion.engine.attention import class_name, is_proved, is_stock, packing_obstacle
from companion.engine.forward import own_logits, packed_hidden, reward_scores, token_logits
from companion.engine.packing import pack
from companion.engine.padded import pad_batch
from companion.engine.plan import plan_trees
from companion.engine.positions import length_borders, length_classes
from companion.errors import CompanionError, ModelError
from companion.models.head import has_own_readout, head_name, without_adapter
from companion.models.locking import inference_of

logger = logging.getLogger(__name__)

#: "ours"; the model's "own" forward, padded; or its own, "alone": one text at a time
Forward = Literal["ours", "own", "alone"]
#: How far two ways may be apart, in units of the largest value (at least 1): what rounding explains
#: (on a random qwen3_next, one unit in the last place of the embeddings moves a value by 1e-4).
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
#: Of texts that are given, so many are tried, none of them longer than this.
_TRIED, _LONGEST = 4, 512
_CALLED: WeakKeyDictionary[Any, list[str | None]] = WeakKeyDictionary()
_FOUND: WeakKeyDictionary[Any, dict[str, Forward]] = WeakKeyDictionary()


def forward_of(
    model: Any, pad_token_id: int, texts: Sequence[Sequence[int]] = (), side: str = "right"
) -> Forward:
    """The fastest forward that gives texts in a batch the scores that they have alone.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    pad_token_id : int
    texts : sequence of sequences of int
        Token ids; a few of them are tried beside made-up ones.
    side : {"right", "left"}
        Of the padding.

    Returns
    -------
    {"ours", "own", "alone"}
        Found once for a model and a side.

    Raises
    ------
    ModelError
        If its forward gives no score a text, or keeps something from one text to the next.
    """
    inner = without_adapter(model)
    if is_proved(inner):
        return "ours"
    known = _FOUND.setdefault(inner, {})
    if side not in known:
        own_code = not is_stock(inner)
        if any(each for _, each in length_borders(inner.config)):
            _refuse_kept_lengths(inner)
        # what a folder's own code computes is known to that code alone: it is taken at its word
        own_only = own_code or has_own_readout(inner)
        ways: list[Forward] = ["own"] if own_only else ["ours", "own"]
        found = _agreeing(model, pad_token_id, texts, side, ways)
        known[side] = found or "alone"
        if found is None or (found == "own" and not own_only):
            how = "padded" if found else "a text at a time: in a batch it gives other scores"
            logger.warning(f"{class_name(inner)}: the model's own forward is used, {how}")
    return known[side]


def _refuse_kept_lengths(inner: nn.Module) -> None:
    """Only transformers' classes of dynamic NTK can be made to begin anew."""
    for module in inner.modules():
        if hasattr(module, "max_seq_len_cached") and not class_name(module).startswith(
            "transformers."
        ):
            raise ModelError(
                f"{class_name(module)} (rope_type dynamic) keeps the frequencies of the longest "
                "text so far: a text's score would depend on those before it",
                "take the rope scaling out of config.json, and set max_length to "
                "max_position_embeddings",
            )


def _agreeing(
    model: Any,
    pad_token_id: int,
    texts: Sequence[Sequence[int]],
    side: str,
    ways: Sequence[Forward],
) -> Forward | None:
    """The first of the ways in which a padded batch has the values of the model's own forward."""
    inner = without_adapter(model)
    by_token = type(inner).__name__.endswith("ForTokenClassification")
    ours = token_logits if by_token else _score_column
    device = next(inner.parameters()).device
    with torch.no_grad(), inference_of(model):
        tried = _trial_texts(inner.config, pad_token_id, texts)
        rows = [torch.tensor([text], device=device) for text in tried]
        alone = [own_logits(model, row, torch.ones_like(row))[0].cpu() for row in rows]
        for way in ways:
            values: list[Tensor] = [torch.empty(0)] * len(tried)
            try:
                for group in _groups(inner.config, tried):
                    batch = pad_batch([tried[i] for i in group], pad_token_id, side)  # type: ignore[arg-type]
                    forward = own_logits if way == "own" else ours
                    given = batch["input_ids"].to(device), batch["attention_mask"].to(device)
                    for i, value, mask in zip(
                        group, forward(model, *given).cpu(), batch["attention_mask"], strict=True
                    ):
                        values[i] = value[mask.bool()] if by_token else value
            except (TypeError, RuntimeError, ValueError, AttributeError, CompanionError) as error:
                logger.debug(f"{class_name(inner)}, {way}: {error!r}")  # it takes no such batch
                continue
            if _agree(inner, alone, values):
                return way
    return None


def _score_column(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return reward_scores(model, input_ids, attention_mask)[:, None]


def _groups(config: Any, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Those that may share a batch; see :func:`companion.engine.positions.length_classes`."""
    groups: dict[Any, list[int]] = {}
    for i, each in enumerate(length_classes(config, [len(text) for text in texts])):
        groups.setdefault(each, []).append(i)
    return list(groups.values())


def packing_fault(model: Any, pad_token_id: int, *, training: bool | None = None) -> str | None:
    """:func:`companion.engine.packing_obstacle`, and whether every layer calls the function.

    A layer with an attention of its own would mix the texts. It is tried once for a model.
    """
    why = packing_obstacle(model, training=training)
    inner = without_adapter(model)
    if why is not None or _is_spread(inner):
        return why
    known = _CALLED.setdefault(inner, [])
    if not known:
        ids = _trial_texts(inner.config, pad_token_id, ())
        batch = pack(ids, plan_trees(ids)).to(next(inner.parameters()).device)
        with torch.no_grad(), inference_of(model):
            try:
                packed_hidden(inner, batch)
                known.append(None)
            except ModelError as error:
                known.append(error.what)
    return known[0]


def _is_spread(inner: nn.Module) -> bool:
    """Whether the weights are not here (ZeRO-3, not materialised), so that nothing can be tried."""
    return any(p.is_meta or hasattr(p, "ds_id") for p in inner.parameters())


def check_trainable(model: Any, pad_token_id: int) -> None:
    """Refuse to train a model whose own forward is another than backbone, read-out and head.

    Raises
    ------
    ModelError
        Training would move the scores of one function, and whoever loads the model would get those
        of another. Also if it cannot be tried, since its weights are spread over ranks.
    """
    inner = without_adapter(model)
    if is_proved(inner):
        return
    if _is_spread(inner):
        if is_stock(inner):
            return  # the tests have tried those
        raise ModelError(
            f"{class_name(inner)}: a class of its own whose weights are spread over ranks: its "
            "forward cannot be compared with the one that trains",
            "train with DDP or ZeRO-2",
        )
    if _agreeing(model, pad_token_id, (), "right", ["ours"]) is None:
        raise ModelError(
            f"{class_name(inner)}: its own forward gives other scores than its backbone, the last "
            f"token and {head_name(inner)!r}, which is what training computes",
            "train a class that scores the last token by one linear layer, such as transformers' "
            "own for this model_type; the companion scores with this one, by its own forward",
        )


def _agree(inner: Any, alone: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    dtypes = {p.dtype for p in inner.parameters() if p.is_floating_point() and p.dim() > 1}
    tolerance = max(_TOLERANCE.get(dtype, 0.1) for dtype in dtypes)
    scale = max(1.0, *(float(value.abs().max()) for value in alone))
    return all(
        bool(torch.isfinite(one).all())
        and one.shape == two.shape
        and float((one - two).abs().max()) <= tolerance * scale
        for one, two in zip(alone, values, strict=True)
    )


def _trial_texts(config: Any, pad_token_id: int, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Made-up texts that end with EOS, do not, or hold it twice; and a few of those given."""
    text = config.get_text_config()
    eos = text.eos_token_id
    eos = [eos] if isinstance(eos, int) else list(eos or [])
    bos = [text.bos_token_id] if isinstance(text.bos_token_id, int) else []
    special = {pad_token_id, *eos, *bos}
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        ids = torch.randint(int(text.vocab_size), (4 * count + 16,), generator=generator)
        return [i for i in ids.tolist() if i not in special][:count]

    end = [i for i in eos[:1] if i != pad_token_id]
    made = [
        [*bos, *draw(11), *end],
        [*bos, *draw(4), *end],
        [*bos, *draw(7)],
        [*bos, *draw(3), *end, *draw(12), *end],
        draw(2),
    ]
    fitting = sorted((list(t) for t in texts if len(t) <= _LONGEST), key=len)
    step = max(1, len(fitting) // _TRIED)
    return made + fitting[::step][:_TRIED]
