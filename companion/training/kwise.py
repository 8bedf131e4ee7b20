"""K-wise reward models: whole rankings of K completions of a prompt, K free from row to row.

Two losses. *Plackett–Luce* (Zhu et al. 2023, arXiv 2301.11270; Starling) is the likelihood of the
ranking, ties and gaps included. *Pairs* (InstructGPT, Ouyang et al. 2022, arXiv 2203.02155, eq. 1)
is the mean Bradley–Terry loss over the pairs of a prompt, so that a prompt counts once however many
completions it has; shuffled apart, its pairs would be seen in K - 1 steps each and overfit. Either
way all completions of a prompt stand in one micro-batch, and the gradient is that of the mean over
the prompts of the whole step. What is saved is the same plain checkpoint as a pairwise one.
Chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from torch import Tensor, nn

from companion.errors import CompanionError, DataError
from companion.formatting import RewardFormatter
from companion.losses import grouped_pair_loss
from companion.models.guards import check_head
from companion.models.head import find_head, install_head
from companion.models.loading import load_base
from companion.models.reward_model import RewardModel
from companion.rankings import best_is_best, ordered_pairs, ranking_loss
from companion.reduction import SumCount
from companion.training.config import PairwiseRewardConfig
from companion.training.exact import forward_inputs, make_batch, text_lengths
from companion.training.exact_trainer import ExactTrainer, is_real
from companion.training.forward import install_forward
from companion.training.kind_rows import OVERLONG, check_columns, format_all, ids_feature
from companion.training.rows import FormatReport
from companion.training.setup import refuse_not_finite

LOSSES = ("plackett_luce", "pairs")


@dataclass
class KwiseRewardConfig(PairwiseRewardConfig):
    """Settings of a K-wise run: those of a pairwise run, and which loss.

    A batch of ``per_device_train_batch_size`` prompts holds K times as many texts.
    ``center_rewards_coefficient`` weighs (2 × mean score of the prompt's completions)², which is
    the pairwise penalty at K = 2. Chapter 3.
    """

    loss_type: str = field(
        default="plackett_luce",
        metadata={
            "help": "Likelihood of the whole ranking, or the mean over its pairs (InstructGPT).",
            "choices": list(LOSSES),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing_factor:
            raise CompanionError(
                "label_smoothing_factor is set: it is not defined for whole rankings",
                "leave it at 0, or train on pairs (companion train pairwise)",
            )
        refuse_offloading(self)


def refuse_offloading(config: PairwiseRewardConfig) -> None:
    """Only the pairwise trainer, which is TRL's, moves activations to the CPU."""
    if config.activation_offloading:
        raise CompanionError(
            "activation_offloading is not supported by this kind of training",
            "take activation_checkpointing, which saves memory too",
        )


# ---------------------------------------------------------------------- rows


def format_rankings(
    dataset: Dataset,
    formatter: RewardFormatter,
    *,
    source: str = "rankings",
    num_proc: int | None = None,
) -> tuple[Dataset, FormatReport]:
    """Tokenise rankings by the one formatter.

    A completion that is too long, or has no rank (null), is left out of its ranking; a ranking in
    which then no completion beats another is dropped. Both are counted.

    Parameters
    ----------
    dataset : Dataset
        Rows of the kind ``rankings`` (:mod:`companion.data.formats`).

    Returns
    -------
    rows : Dataset
        ``completion_ids`` (lists of token ids), ``ranks``, ``place`` (of each among the row's
        completions), ``row``, ``length`` (of the longest text).
    report : FormatReport

    Raises
    ------
    DataError
        For a bad row, which it names, or if no row is left.
    """
    check_columns(dataset, ("prompt", "completions", "ranks"), source, "rankings")
    columns = {
        "completion_ids": List(ids_feature()),
        "ranks": List(Value("float32")),
        "place": List(Value("int32")),
    }
    return format_all(
        dataset,
        formatter,
        _rankings_to_ids,
        columns,
        source=source,
        noun="rankings",
        num_proc=num_proc,
    )


def _rankings_to_ids(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], formatter: RewardFormatter
) -> list[dict[str, Any]]:
    texts, labels = [], []
    for row, name in zip(rows, names, strict=True):
        if len(row["completions"]) != len(row["ranks"]):
            raise DataError(
                f"{name}: {len(row['completions'])} completions and {len(row['ranks'])} ranks"
            )
        shared = {k: v for k, v in row.items() if k not in ("completions", "ranks")}
        texts += [{**shared, "completion": completion} for completion in row["completions"]]
        labels += [f"{name}, completion {i}" for i in range(len(row["completions"]))]
    encoded = iter(formatter.encode_many(texts, names=labels))
    found: list[dict[str, Any]] = []
    for row in rows:
        given = [(next(encoded), rank, i) for i, rank in enumerate(row["ranks"])]
        kept = [(e, r, i) for e, r, i in given if e is not None and r is not None and r == r]
        overlong = any(e is None and r is not None for e, r, _ in given)
        if len({rank for _, rank, _ in kept}) < 2:
            found.append({"fate": OVERLONG if overlong else "in which none beats another"})
            continue
        found.append(
            {
                "completion_ids": [e.input_ids for e, _, _ in kept],
                "ranks": [float(rank) for _, rank, _ in kept],
                "place": [i for _, _, i in kept],
                "length": max(len(e) for e, _, _ in kept),
                "cut": sum(e.cut_tokens for e, _, _ in kept),
                "fate": "+with a completion left out for its length" if overlong else "",
            }
        )
    return found


@dataclass
class RankingCollator:
    """Rankings to a batch: all texts of all prompts, right-padded one below the other,
    or packed (:func:`companion.training.exact.make_batch`), a prompt once for all its completions.

    Gives, besides the texts, N the number of all completions:
    ``index`` ``[B, K]``, where each prompt's completions stand among the N, and -1 beyond its own;
    ``ranks`` ``[B, K]``; ``weight``, ``real`` and ``row`` ``[B]``.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    config: Any = None
    packing: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the batch."""
        texts = [list(ids) for e in examples for ids in e["completion_ids"]]
        batch = make_batch(
            texts,
            self.pad_token_id,
            packing=self.packing,
            pad_to_multiple_of=self.pad_to_multiple_of,
            config=self.config,
        )
        sizes = [len(e["completion_ids"]) for e in examples]
        index = torch.full((len(examples), max(sizes)), -1)
        ranks = torch.zeros(index.shape)
        begin = 0
        for row, (example, size) in enumerate(zip(examples, sizes, strict=True)):
            index[row, :size] = torch.arange(begin, begin + size)
            ranks[row, :size] = torch.tensor([float(rank) for rank in example["ranks"]])
            begin += size
        ordered = ordered_pairs(torch.zeros(index.shape), ranks, index >= 0)[1] > 0
        real = is_real(examples)
        return {
            **batch,
            "index": index,
            "ranks": ranks,
            "real": real,
            "weight": real * ordered,
            "row": torch.tensor([int(e.get("row", -1)) for e in examples]),
        }


# ---------------------------------------------------------------------- trainer


class KwiseRewardTrainer(ExactTrainer):
    """Train a reward model on whole rankings, exactly. Chapter 3.

    Parameters
    ----------
    model, args, train_dataset, eval_dataset, formatter, processing_class, **kwargs
        As for :class:`companion.training.exact_trainer.ExactTrainer`, with
        :class:`KwiseRewardConfig` and rows of the kind ``rankings``, or with ``completion_ids`` and
        ``ranks``. ``predict`` gives ``[n, K]`` scores, NaN beyond a row's own completions.
    """

    args: KwiseRewardConfig
    ids = ("completion_ids", "ranks")
    items = "prompts"
    _columns = ("completion_ids", "ranks", "row", "weight")
    _OWN = ("nll", "right", "pairs", "top")

    def __init__(self, model: Any, args: KwiseRewardConfig | None = None, **kwargs: Any) -> None:
        self._most = 0  # completions of a row, so that all tables are equally wide
        super().__init__(model, args or KwiseRewardConfig(), **kwargs)

    def load_base(self, name: str) -> RewardModel:
        """A base with a fresh scalar head."""
        return load_base(
            name,
            head_seed=self.args.seed,
            max_length=self.args.max_length,
            overlong=self.args.overlong,  # type: ignore[arg-type]
            trust_remote_code=self.args.trust_remote_code,
        )

    def prepare_model(self, model: Any) -> None:
        """As for pairs: one scalar, head in fp32, read out by the mask."""
        if type(find_head(model)) is nn.Linear and not hasattr(model, "peft_config"):
            install_head(model)
        check_head(model)
        install_forward(model)

    def format_rows(self, dataset: Dataset, source: str) -> tuple[Dataset, FormatReport]:
        """See :func:`format_rankings`."""
        return format_rankings(
            dataset, self.formatter, source=source, num_proc=self.args.dataset_num_proc
        )

    def prepare_rows(self, dataset: Dataset, name: str) -> Dataset:
        """Tokenise, and note the largest K."""
        rows = super().prepare_rows(dataset, name)
        sizes = [len(ranks) for ranks in rows["ranks"]]
        self._most = max(self._most, max(sizes, default=0))
        return rows

    def make_collator(self, pad_token_id: int, config: Any) -> Callable[[Sequence[Any]], Any]:
        """See :class:`RankingCollator`."""
        multiple: Any = self.args.pad_to_multiple_of
        return RankingCollator(pad_token_id, multiple, config)

    def padding_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One completion of one real token."""
        return {"completion_ids": [[int(row["completion_ids"][0][-1])]], "ranks": [1.0]}

    def _row_lengths(self, dataset: Any) -> list[int]:
        return [max(map(len, ids)) for ids in dataset["completion_ids"]]

    def item_table(self, model: Any, inputs: Any) -> Tensor:
        """Columns: those of ``Table``, ``nll``, pairs right, pairs, best is best, K scores."""
        flat = model(**forward_inputs(inputs))
        index, ranks = inputs["index"], inputs["ranks"]
        mask = index >= 0
        scores = flat.logits.squeeze(-1).float()[index.clamp(min=0)].masked_fill(~mask, 0.0)
        bad = ~torch.isfinite(scores.detach()).all(dim=1) & (inputs["real"] > 0)
        refuse_not_finite(bad, inputs["row"], self.state.global_step)
        loss = ranking_loss if self.args.loss_type == "plackett_luce" else grouped_pair_loss
        nll = loss(scores, ranks, mask)
        total = nll
        if self.args.center_rewards_coefficient:
            mean = scores.sum(dim=1) / mask.sum(dim=1)
            total = nll + self.args.center_rewards_coefficient * (2 * mean).square()
        right, pairs = ordered_pairs(scores.detach(), ranks, mask)
        top = best_is_best(scores.detach(), ranks, mask)
        lengths = text_lengths(inputs)[index.clamp(min=0)].masked_fill(~mask, 0)
        head = torch.stack(
            [inputs["real"], inputs["weight"], total, lengths.sum(dim=1), nll, right, pairs, top],
            dim=1,
        )
        wide = scores.new_full((scores.shape[0], self._most), float("nan"))
        wide[:, : scores.shape[1]] = scores.detach().masked_fill(~mask, float("nan"))
        return torch.cat([head, wide], dim=1)

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        """``nll`` and ``top1`` a prompt, ``accuracy`` over all ordered pairs."""
        nll, right, pairs, top = table[:, 4:8].T
        counts = table[:, 1] > 0
        return {
            "nll": SumCount().add(nll, counts),
            "accuracy": SumCount(float(right.sum()), round(float(pairs.sum()))),
            "top1": SumCount().add(top, counts),
        }

    def evaluated(self, table: Tensor) -> tuple[dict[str, Any], Any]:
        """Figures, and the scores ``[n, K]``."""
        figures, columns = super().evaluated(table)
        return figures, columns[:, len(self._OWN) :]


def ranked_scores(predictions: np.ndarray, rows: Dataset) -> list[np.ndarray]:
    """The scores of each formatted row's completions, from ``predict``'s padded table."""
    return [
        values[: len(ranks)].astype(np.float64)
        for values, ranks in zip(predictions, rows["ranks"], strict=True)
    ]
