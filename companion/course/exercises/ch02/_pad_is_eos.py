"""Predict which token is read when the pad token is the EOS."""

from __future__ import annotations

from typing import Any

import torch

from companion.course.exercise import Prediction, Question

FINISHED = [5, 6, 7, 2]  # 2 is the EOS
CUT_OFF = [5, 6, 7]
DIALOGUE = [5, 2, 8, 9, 2]  # an EOS after each turn


def _padded(ids: list[int], pad: int, width: int = 6) -> torch.Tensor:
    return torch.tensor([ids + [pad] * (width - len(ids))])


def run() -> dict[str, Any]:
    """Make the experiment."""
    from companion.functional.readout import last_token_index, pad_id_readout_index

    def stock(ids: list[int], pad: int) -> int:
        return int(pad_id_readout_index(_padded(ids, pad), pad))

    mask = torch.tensor([[1] * len(FINISHED) + [0] * (6 - len(FINISHED))])
    same = stock(FINISHED, 2) == stock(CUT_OFF, 2)  # a causal model: same prefix, same score
    return {
        "finished, pad = EOS, stock": stock(FINISHED, 2),
        "finished, by the mask": int(last_token_index(mask)),
        "finished, pad of its own, stock": stock(FINISHED, 0),
        "dialogue, pad = EOS, stock": stock(DIALOGUE, 2),
        "score of finished and cut off, pad = EOS, stock": "equal" if same else "different",
    }


EXERCISE = Prediction(
    id="ch02.pad_is_eos",
    run=run,
    questions=(
        Question(
            "finished, pad = EOS, stock",
            (2, 3, 4, 5),
            {
                3: "You expect that the text's own EOS counts. Stock transformers looks for the "
                "rightmost id that is not the pad id, and the EOS *is* the pad id: it is skipped.",
                4: "That is the first padding token. The rule takes the rightmost id that is not "
                "the pad id.",
                5: "That is the last column. The rule takes the rightmost id that is not the pad "
                "id.",
            },
            "transformers #35352",
        ),
        Question(
            "finished, by the mask",
            (2, 3, 4, 5),
            {
                2: "The mask knows that the EOS belongs to the text, whatever its id: it is 1 "
                "there.",
                4: "One too far: four tokens stand at 0 to 3.",
                5: "That is the last column, which the mask marks as padding.",
            },
        ),
        Question(
            "finished, pad of its own, stock",
            (2, 3, 4, 5),
            {
                2: "With a pad id of its own the EOS is an id like any other, and is not skipped.",
                4: "One too far: the EOS stands at 3, the padding begins at 4.",
                5: "That is the last column, which holds the pad id.",
            },
        ),
        Question(
            "dialogue, pad = EOS, stock",
            (0, 1, 3, 4),
            {
                0: "That was the rule of older versions: the token before the *first* pad id, "
                "which read the middle of a dialogue. Today's takes the rightmost id that is "
                "not the pad id.",
                1: "That is the EOS of the first turn. The rule goes from the right.",
                4: "That is the EOS of the last turn, which has the pad id and is skipped.",
            },
            "transformers #35352",
        ),
        Question(
            "score of finished and cut off, pad = EOS, stock",
            ("equal", "different"),
            {
                "different": "Both are read at the same token, after the same prefix, and a causal "
                "model sees nothing to its right: the scores are equal to the last bit. The model "
                "cannot learn that a completion should end.",
            },
            "transformers #35352",
        ),
    ),
    hints=(
        "Write the padded rows down and cross out every 2.",
        "The stock rule: the rightmost position whose id differs from the pad id. The mask is not "
        "looked at.",
        "[5, 6, 7, 2, 2, 2] with every 2 crossed out ends at place 2, and so does [5, 6, 7, …].",
    ),
    right="A finished and a cut-off text get one score, so the reward cannot prefer ending. The "
    "companion gives the tokenizer a pad token of its own and says so.",
)
