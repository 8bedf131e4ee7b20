"""A run says what 'companion data check' says of its rows."""

from __future__ import annotations

import json
from pathlib import Path

from companion.data import duplicate_report
from companion.training import ModelArguments, PairwiseRewardConfig, train_pairwise
from companion.training.config import DataArguments


def test_repeats_and_contradictions_are_notes_of_the_run(tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"What is {i} plus 1?", "chosen": f"It is {i + 1}.", "rejected": "It is 0."}
        for i in range(8)
    ]
    turned = {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    rows += [rows[1], rows[0] | turned]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    result = train_pairwise(
        PairwiseRewardConfig(
            output_dir=str(tmp_path / "out"), max_steps=1, eval_strategy="no", report_to=[]
        ),
        ModelArguments(model_name_or_path=str(tiny_base)),
        DataArguments(dataset_name=str(file), columns=["question=prompt"]),
        say=said.append,
    )
    want = duplicate_report([{**row, "prompt": row["question"]} for row in rows]).notes("pairs")
    assert want == [
        "1 of 10 pairs repeat an earlier one",
        "1 of 10 pairs contradict an earlier pair (the same two, the other way round): no model "
        "can be right on both",
    ]
    for note in want:
        assert note in result.manifest.notes
        assert said.count(f"note: {note}") == 1
    assert duplicate_report(rows[:8]).notes("pairs") == []
    # calls of tools are a part of what is said
    calls = [[{"role": "assistant", "content": "", "tool_calls": [{"name": n}]}] for n in "ab"]
    pairs = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in (calls, calls[::-1])]
    assert duplicate_report([pairs[0], {**pairs[0], "rejected": calls[0]}]).repeated_rows == 0
    assert duplicate_report(pairs).contradictions == 1
