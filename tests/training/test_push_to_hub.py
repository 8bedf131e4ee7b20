"""``--push_to_hub``: asked before the run, and the whole of the finished model after it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from example_kinds import pairs
from hub_stub import READER, UNLUCKY, WRITER, Hub, online, running_hub
from huggingface_hub import ModelCard

from companion import (
    DataArguments,
    ModelArguments,
    PairwiseRewardConfig,
    RewardManifest,
    RewardScorer,
    train_pairwise,
)
from companion.cli.main import main
from companion.cli.train import parse
from companion.errors import CompanionError, ServiceError
from companion.models.hub import open_destination
from companion.rl.config import GRPORunConfig


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub, online(hub, monkeypatch):
        yield hub
    assert hub.problems == [], "routes that the stub does not know"


def config_for(folder: Path, **settings: Any) -> PairwiseRewardConfig:
    """Settings for a short run into `folder`."""
    return PairwiseRewardConfig(
        str(folder), per_device_train_batch_size=8, max_steps=2,
        save_strategy="steps", save_steps=1, disable_tqdm=True, report_to=[], max_length=60,
        eval_strategy="no", **{"hub_token": WRITER, "push_to_hub": True, **settings},
    )  # fmt: skip


def run(tmp_path: Path, base: Path, lines: list[str], lora: bool = False, **settings: Any) -> Any:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(map(json.dumps, pairs(60))))
    return train_pairwise(
        config_for(tmp_path / "my-reward", **settings),
        ModelArguments(model_name_or_path=str(base), use_peft=lora),
        DataArguments(dataset_name=str(rows), eval_fraction=0.3),
        say=lines.append,
    )


def test_the_finished_model_arrives_whole(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    """With weights of an earlier upload that are gone, and nothing of the run itself."""
    hub.repos["me/my-reward"] = {
        "main": {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"x"}
    }
    lines: list[str] = []
    result = run(tmp_path, tiny_base, lines)
    assert (tmp_path / "my-reward" / "checkpoint-2").is_dir()
    files = hub.files("me/my-reward")
    assert {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("reward_manifest.json", "reward_formatter.json", "chat_template.jinja", "README.md"),
        "LICENSE",
    } == set(files)
    assert f"uploaded to {hub.url}/me/my-reward" in lines
    there = hub.write("me/my-reward", tmp_path / "theirs")
    manifest = RewardManifest.load(there)
    assert manifest.to_dict() == result.manifest.to_dict()
    rows = [{"prompt": [{"role": "user", "content": "how many"}], "completion": "7 pens"}]
    want = RewardScorer(result.reward_model).score(rows).raw
    np.testing.assert_allclose(RewardScorer.from_pretrained(there).score(rows).raw, want, atol=1e-6)
    card = ModelCard.load(there / "README.md")
    assert 'RewardScorer.from_pretrained("me/my-reward")' in card.text
    assert "None" not in card.content
    # the run's own uploads of checkpoints are switched off: one commit, and no token is pickled
    assert sum("/commit/" in asked for asked in hub.asked) == 1
    import torch

    kept = torch.load(tmp_path / "my-reward/checkpoint-2/training_args.bin", weights_only=False)
    assert (kept.push_to_hub, kept.hub_token) == (False, None)


def test_where_it_goes(hub: Hub, tmp_path: Path) -> None:
    given = config_for(
        tmp_path / "out", hub_model_id="org/name", hub_private_repo=True, hub_revision="v2"
    )
    destination, own = open_destination(given)
    assert destination is not None
    assert (destination.repo_id, destination.revision) == ("org/name", "v2")
    assert hub.created[0]["visibility"] == "private"
    assert given.push_to_hub, "the settings of the caller stay"
    assert not own.push_to_hub
    (tmp_path / "saved/adapter").mkdir(parents=True)
    for name in ("config.json", "adapter/x.bin", "optimizer.pt", "rng_state.pth", "a.tmp"):
        (tmp_path / "saved" / name).write_text("{}")
    assert destination.upload(tmp_path / "saved") == f"{hub.url}/org/name"
    assert set(hub.files("org/name", "v2")) == {"config.json", "adapter/x.bin"}
    assert hub.files("org/name") == {}


@pytest.mark.parametrize(
    ("settings", "message", "cure"),
    [
        ({"hub_token": "hf_wrong"}, "the hub refuses out", "hf auth whoami"),
        ({"hub_token": READER}, "the hub refuses out", "rights of the token"),
        ({"hub_token": READER, "hub_model_id": "org/known"}, "403", "rights of"),
        ({"hub_token": None}, "nobody is logged in", "hf auth login"),
        ({"hub_model_id": "a b/c"}, "--hub_model_id a b/c", "ORGANISATION/NAME"),
    ],
)
def test_it_is_refused_before_the_run(
    settings: dict[str, Any], message: str, cure: str, hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    hub.repos["org/known"] = {"main": {}}
    monkeypatch.setattr("companion.models.hub.get_token", lambda: None)
    with pytest.raises(CompanionError) as caught:
        run(tmp_path, tmp_path / "no base is looked for", [], **{"hub_model_id": "out", **settings})
    assert message in str(caught.value)
    assert cure in str(caught.value)


def test_no_hub_at_all(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    config = config_for(tmp_path / "out")
    with pytest.raises(CompanionError, match="cannot be asked") as caught:
        open_destination(config, endpoint="http://127.0.0.1:9")
    assert "HF_ENDPOINT" in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CompanionError, match="HF_HUB_OFFLINE is set"):
        open_destination(config)
    flags = ["--model_name_or_path", "x", "--dataset_name", "y", "--output_dir", str(tmp_path)]
    for kind in ("pairwise", "outcome"):
        assert main(["train", kind, *flags, "--push_to_hub"]) == 2
    assert main(["train", "grpo", *flags, "--reward_model", "z", "--push_to_hub"]) == 2
    assert hub.asked == []


def test_an_upload_that_fails_leaves_the_model(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as caught:
        run(tmp_path, tiny_base, [], hub_token=UNLUCKY)
    folder = tmp_path / "my-reward"
    assert f"the model is saved in {folder}, but not on the hub" in str(caught.value)
    assert f"hf upload me/my-reward {folder}" in str(caught.value)
    assert RewardManifest.load(folder).metrics["n"] > 0


def test_checkpoints_are_not_offered(tmp_path: Path) -> None:
    for kind in ("pairwise", "grpo"):
        with pytest.raises(CompanionError, match="checkpoint"):
            parse(["--output_dir", str(tmp_path), "--hub_strategy", "checkpoint"], kind)
    with pytest.raises(CompanionError, match="hub_strategy"):
        PairwiseRewardConfig(str(tmp_path), hub_strategy="every_save")
    (tmp_path / "run.yaml").write_text("push_to_hub: true\nhub_strategy: all_checkpoints\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path)]
    with pytest.raises(CompanionError, match="hub_strategy is 'all_checkpoints'"):
        parse(flags, "grpo")
    config = GRPORunConfig(str(tmp_path), push_to_hub=True, hub_strategy="all_checkpoints")
    with pytest.raises(CompanionError, match="all_checkpoints: a checkpoint has no manifest"):
        open_destination(config)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_on_two_ranks_uploads_once(tiny_base: Path, tmp_path: Path) -> None:
    """By the environment alone, as users set it: HF_ENDPOINT and HF_TOKEN."""
    from launching import launch

    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(map(json.dumps, pairs(60))))
    flags = [
        *("-m", "companion", "train", "pairwise", "--model_name_or_path", str(tiny_base)),
        *("--dataset_name", str(rows), "--output_dir", str(tmp_path / "ours"), "--push_to_hub"),
        *("--per_device_train_batch_size", "4", "--max_steps", "2", "--save_steps", "1"),
        *("--hub_model_id", "org/ours", "--disable_tqdm", "true", "--report_to", "none"),
    ]
    with running_hub() as hub:
        hub_is = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": WRITER}
        text = launch(flags, **hub_is)
        assert text.count(f"uploaded to {hub.url}/org/ours") == 1
        assert sum("/commit/" in asked for asked in hub.asked) == 1
        assert len(hub.created) == 1
        there = hub.write("org/ours", tmp_path / "theirs")
    ours = RewardManifest.load(tmp_path / "ours")
    assert RewardManifest.load(there).to_dict() == ours.to_dict()
    assert RewardScorer.from_pretrained(there).score(["Ana has 3 pens"]).raw.shape == (1,)


# ---------------------------------------------------------------------- cards


@pytest.mark.parametrize("lora", [False, True])
def test_no_card_in_the_folder_or_a_checkpoint_says_none(
    lora: bool, tiny_base: Path, tmp_path: Path
) -> None:
    """TRL would write one at each checkpoint, of 'a fine-tuned version of [None]'."""
    run(tmp_path, tiny_base, [], lora=lora, push_to_hub=False)
    folder = tmp_path / "my-reward"
    assert (folder / "checkpoint-1").is_dir()
    cards = list(folder.rglob("README.md"))
    assert folder / "README.md" in cards
    for path in cards:
        assert "None" not in path.read_text(), path


def test_a_trainer_of_its_own_has_our_card(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    """`trainer.push_to_hub()` of transformers, without the run around it."""
    from companion import PairwiseRewardTrainer

    trainer = PairwiseRewardTrainer(
        str(tiny_base), config_for(tmp_path / "own"),
        train_dataset=Dataset.from_list(pairs(20)),
    )  # fmt: skip
    trainer.push_to_hub()
    card = hub.files("me/own")["README.md"].decode()
    assert 'RewardScorer.from_pretrained("me/own")' in card
    assert "None" not in card
    assert "reward_formatter.json" in hub.files("me/own")
