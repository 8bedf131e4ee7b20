"""Norms and MLPs are compiled, nothing else; scores stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from companion import apply_lora, load_base
from companion.cli.main import main
from companion.engine import compile_parts
from companion.errors import ModelError


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the classes whose instances are compiled, which is not done."""
    found: list[str] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: found.append(type(self).__name__)
    )
    return found


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", {"LlamaMLP", "LlamaRMSNorm"}),
        ("gemma", {"GemmaMLP", "GemmaRMSNorm"}),
        ("gpt2", {"GPT2MLP", "LayerNorm"}),
    ],
)
def test_norms_and_mlps_of_each_architecture(
    kind: str,
    names: set[str],
    compiled: list[str],
    make_causal: Callable[..., Path],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
) -> None:
    loaded = load_base(make_causal(kind, make_tokenizer(), tmp_path))
    assert compile_parts(loaded.model) == len(compiled)
    assert set(compiled) == names
    whole = len(compiled)
    compiled.clear()
    if kind == "llama":  # below a LoRA wrapper too
        assert compile_parts(apply_lora(loaded, r=2).model) == whole


def test_a_model_without_such_parts(compiled: list[str]) -> None:
    with pytest.raises(ModelError, match="no norms and MLPs"):
        compile_parts(torch.nn.Linear(2, 1))
    assert not compiled


@pytest.mark.slow
def test_compiled_scores_are_the_scores(tiny_reward: Path, tmp_path: Path) -> None:
    """For real: a C++ compiler, and packed batches of many layouts."""
    rows = [{"prompt": f"how many pens {'and ' * i}", "completion": "17"} for i in range(30)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    scores = []
    for flags in ([], ["--compile"]):
        output = tmp_path / f"out{len(flags)}.jsonl"
        command = ["score", "--model", str(tiny_reward), "--device", "cpu", *flags]
        command += ["--input", str(source), "--output", str(output)]
        assert main([*command, "--max_tokens_per_batch", "200"]) == 0
        scores.append([json.loads(line)["score"] for line in output.open(encoding="utf-8")])
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)
    assert len(set(scores[0])) > 20
