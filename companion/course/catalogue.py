"""The list of all exercises: what ``companion progress`` shows, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["write it", "find the bug", "predict, then run", "derive it"]


@dataclass(frozen=True)
class Entry:
    """One exercise of the list.

    Attributes
    ----------
    id : str
        As :func:`companion.course.check` takes it, such as ``"ch01.pair_loss"``.
    title : str
    kind : str
        What is to be done: write, find the bug, predict, derive.
    minutes : int
        What it takes a reader who has read the chapter.
    difficulty : int
        1 to 3.
    warm_up : bool
        It asks for no more than the chapter shows; all others ask for a variant of it.
    """

    id: str
    title: str
    kind: Kind
    minutes: int
    difficulty: int
    warm_up: bool = False

    @property
    def chapter(self) -> int:
        """Number of the chapter."""
        return int(self.id[2:4])

    @property
    def line(self) -> str:
        """Kind, minutes and difficulty, as they stand under an exercise's heading."""
        stars = "●" * self.difficulty + "○" * (3 - self.difficulty)
        warm_up = "warm-up · " if self.warm_up else ""
        return f"{warm_up}{self.kind} · {self.minutes} minutes · {stars}"


#: chapter -> its title, and the stem of its notebooks in ``exercises/`` and ``solutions/``
#:
#: :meta hide-value:
CHAPTERS: dict[int, tuple[str, str]] = {
    1: ("Bradley–Terry", "ch01_bradley_terry"),
    2: ("The scalar head and the read-out", "ch02_readout"),
    3: ("Kinds of reward model", "ch03_kinds"),
    4: ("Training with TRL", "ch04_training"),
    5: ("From scores to behaviour", "ch05_use"),
    6: ("Serving scores", "ch06_serving"),
    7: ("Watching it age", "ch07_monitoring"),
    8: ("Scaling out", "ch08_scaling"),
    9: ("How reward models fail", "ch09_failures"),
}

#: every exercise, in the order of the course
#:
#: :meta hide-value:
CATALOGUE: tuple[Entry, ...] = (
    Entry("ch01.predict_shift", "What the loss sees", "predict, then run", 5, 1),
    Entry("ch01.pair_loss", "A loss that never overflows", "write it", 10, 1, warm_up=True),
    Entry("ch01.choice_gradient", "A choice among many", "derive it", 10, 1),
    Entry("ch01.margin_loss", "Margins that train the wrong pairs", "find the bug", 10, 2),
    Entry("ch01.fit_strengths", "Strengths from comparisons", "find the bug", 20, 2),
    Entry("ch01.plackett_luce", "Rankings of any length", "write it", 30, 3),
    Entry("ch02.last_content_index", "The last token of content", "write it", 10, 1),
    Entry("ch02.pad_is_eos", "When the pad token is EOS", "predict, then run", 10, 1),
    Entry("ch02.encode_chat", "One BOS, one EOS", "find the bug", 15, 2),
    Entry("ch02.position_ids", "Positions under left padding", "write it", 10, 2),
    Entry("ch02.read_scores", "From hidden states to a score", "write it", 15, 2),
    Entry("ch02.is_padding_invariant", "A test that catches it", "write it", 30, 3),
    Entry("ch03.label_outcomes", "An outcome on every token", "write it", 10, 1),
    Entry("ch03.pairs_or_outcomes", "Pairs are no outcomes", "predict, then run", 10, 1),
    Entry("ch03.aggregates", "From tokens to one score", "write it", 15, 1),
    Entry("ch03.first_error_f1", "Where does it go wrong?", "write it", 15, 2),
    Entry("ch03.count_verdicts", "A judge asked in both orders", "find the bug", 20, 2),
    Entry("ch03.label_steps", "The label of a step", "find the bug", 30, 3),
    Entry("ch04.epoch_accuracy", "Accuracy, ties and a short batch", "write it", 10, 1),
    Entry("ch04.weighted_shift", "Where a target puts the scores", "derive it", 10, 1),
    Entry("ch04.one_epoch_or_many", "One epoch or many", "predict, then run", 10, 1),
    Entry("ch04.training_settings", "A configuration with six traps", "find the bug", 20, 2),
    Entry("ch04.split_rows", "A held-out set that is held out", "write it", 20, 2),
    Entry("ch04.train_epoch", "A training loop with three bugs", "find the bug", 30, 3),
    Entry("ch05.best_of_few_kl", "Best-of-n among few texts", "derive it", 15, 2),
    Entry("ch05.group_scaling", "What GRPO makes of a reward", "predict, then run", 10, 1),
    Entry("ch05.kl_estimate", "An estimate that is never negative", "write it", 15, 2),
    Entry("ch05.expected_best", "All of best-of-n from one pool", "write it", 20, 2),
    Entry("ch05.when_to_stop", "When to stop", "find the bug", 20, 2),
    Entry("ch05.reward_function", "A reward function with eight bugs", "find the bug", 30, 3),
    Entry("ch06.percentile_of", "A percentile from 101 numbers", "write it", 10, 1),
    Entry("ch06.forms_that_stay", "What a new version leaves alone", "predict, then run", 10, 1),
    Entry("ch06.faulty_batches", "Which batch was it?", "find the bug", 15, 2),
    Entry("ch06.new_threshold", "The same share from a new version", "write it", 20, 2),
    Entry("ch06.score_by_budget", "Batches within a budget", "write it", 20, 2),
    Entry("ch06.who_is_served", "A queue, and clients that leave", "find the bug", 25, 3),
    Entry("ch07.what_it_shows", "What a perfect model shows", "predict, then run", 10, 1),
    Entry("ch07.overconfidence", "Surer than it is right", "write it", 20, 2),
    Entry("ch07.weekly_evidence", "A bettor with five bugs", "find the bug", 20, 2),
    Entry("ch07.rows_to_bet_on", "Which labels may raise an alarm", "write it", 15, 2),
    Entry("ch07.labels_to_alarm", "How many labels at the least", "derive it", 20, 3),
    Entry("ch08.what_ranks_see", "What ranks see", "predict, then run", 10, 1),
    Entry("ch08.pool_shards", "A spread from what ranks know", "write it", 15, 1),
    Entry("ch08.loss_scales", "What a micro-batch counts", "derive it", 15, 2),
    Entry("ch08.deal_rows", "Rows for ranks that stay in step", "write it", 20, 2),
    Entry("ch08.bytes_a_rank", "Bytes of a rank", "write it", 15, 2),
    Entry("ch08.agreed_step", "One step to save at", "find the bug", 20, 3),
    Entry("ch09.visible_gap", "What no pair can show", "write it", 15, 2),
    Entry("ch09.sick_rows", "A set of pairs that is sick", "predict, then run", 15, 1),
    Entry("ch09.sick_server", "A server that is sick", "find the bug", 20, 2),
    Entry("ch09.sick_models", "Six models that are sick", "find the bug", 30, 3),
)

BY_ID: dict[str, Entry] = {entry.id: entry for entry in CATALOGUE}


def entries_of(chapter: int) -> list[Entry]:
    """The exercises of one chapter, in order."""
    return [entry for entry in CATALOGUE if entry.chapter == chapter]
