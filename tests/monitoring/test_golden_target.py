"""Golden texts against a folder, a companion and an engine without hashes: planted faults."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from companion.errors import DataError, ModelError
from companion.models import RewardManifest, TokenReadout, load_base, save_reward_model
from companion.monitoring import GoldenCheck, check_target, read_golden
from companion.scoring import RemoteScorer, RewardScorer, add_golden_texts, load_scorer
from companion.serving import running

pytestmark = pytest.mark.serving

Folders = Callable[[str], Path]


def built(base: Path, kind: str = "scalar", seed: int = 0, **settings: Any) -> Any:
    """A tiny random reward model of this kind that reads prompts as conversations."""
    if kind == "scalar":
        model = load_base(base, text="chat", **settings)
    else:
        model = load_base(base, text="chat", labels=1 if kind == "outcome" else 3, **settings)
        separator = "\n" if kind == "process" else None
        model.readout = TokenReadout(kind, 1 if kind == "outcome" else 3, separator=separator)
    generator = torch.Generator().manual_seed(seed)
    head = next(p for n, p in model.model.named_parameters() if "score" in n)
    torch.nn.init.normal_(head, generator=generator)
    return model


def saved(model: Any, folder: Path) -> Path:
    manifest = RewardManifest() if model.readout is None else None
    if model.readout is not None:
        manifest = RewardManifest(readout=model.readout.to_dict())
    save_reward_model(model, folder, manifest, describe=add_golden_texts)
    return folder


def _template(base: Path) -> Any:
    template = load_base(base, text="chat").formatter.chat_template
    return built(base, chat_template=template.replace("'<|end|>'", "'<|end|>' + bos_token"))


def _tokenizer(base: Path) -> Any:
    from tokenizers import normalizers

    from companion.formatting import RewardFormatter

    model = built(base)
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    model.formatter = RewardFormatter(model.tokenizer, text="chat")
    return model


def _head(base: Path) -> Any:
    model = built(base)
    model.model.score.weight.data *= 1.01
    return model


def _dtype(base: Path) -> Any:
    return built(base, dtype="bfloat16")


def _checkpoint(base: Path) -> Any:
    model = built(base, seed=1)
    for weight in model.model.parameters():
        weight.data *= 1.3
    return model


def _small(base: Path) -> Any:
    """Scores that half precision moves by less than its tolerance."""
    model = built(base)
    model.model.score.weight.data *= 0.2
    return model


FAULTS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "template": (_template, {"template"}),
    "tokenizer": (_tokenizer, {"tokenizer"}),
    "head": (_head, {"weights", "head"}),
    "dtype": (_dtype, {"dtype"}),
    "checkpoint": (_checkpoint, {"weights"}),
}


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``folders("good")``, or one with a fault, which is whole: its golden texts are its own."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name in FAULTS:
                model = FAULTS[name][0](tiny_base)
            elif name == "small":
                model = _small(tiny_base)
            else:
                model = built(tiny_base, "scalar" if name == "good" else name)
            made[name] = saved(model, folder)
        return made[name]

    return get


@pytest.fixture(scope="module")
def served(folders: Folders) -> Iterator[Callable[[str], str]]:
    """``served("head")``: the URL of a companion that serves this folder."""
    urls: dict[str, str] = {}
    with ExitStack() as stack:

        def get(name: str) -> str:
            if name not in urls:
                scorer = load_scorer(
                    folders(name),
                    overlong="error",
                    dtype="bfloat16" if name == "dtype" else "float32",
                )
                urls[name] = stack.enter_context(running(scorer, name="model")).url
            return urls[name]

        yield get


def plain(check: GoldenCheck) -> dict[str, Any]:
    """As the verdict keeps it: JSON and back."""
    return dict(json.loads(json.dumps(check.to_dict(), allow_nan=False)))


# ---------------------------------------------------------------------- nothing happened


@pytest.mark.parametrize("kind", ["good", "outcome", "process"])
def test_a_folder_and_a_companion_are_as_they_were_saved(
    kind: str, folders: Folders, served: Callable[[str], str]
) -> None:
    for url in (None, served(kind)):
        check = check_target(folders(kind), url=url)
        assert check.ok, check.lines()
        assert (check.changed, check.moved, check.other_ids) == ([], [], [])
        assert check.most is not None
        assert check.most < 1e-5
        assert len(check.hashes) == 6
        assert plain(check)["state"] == "ok"
        assert re.fullmatch("[0-9a-f]{16}", str(check.version))


def test_an_engine_without_hashes_is_as_it_was(
    folders: Folders, served: Callable[[str], str]
) -> None:
    check = check_target(folders("good"), url=served("good"), protocol="classify")
    assert check.ok, check.lines()
    assert check.hashes == {}
    assert check.reasons == []  # conversations were sent as messages too


# ---------------------------------------------------------------------- planted faults


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_companion_is_named(
    fault: str, folders: Folders, served: Callable[[str], str]
) -> None:
    check = check_target(folders("good"), url=served(fault))
    assert check.state == "moved", check.lines()
    assert set(check.changed) - {"weights"} == FAULTS[fault][1] - {"weights"}, check.lines()
    assert ("weights" in check.changed) == (fault in ("head", "dtype", "checkpoint"))
    assert all(name in check.lines()[0] for name in FAULTS[fault][1])
    ways = {one["way"] for one in check.moved}
    assert ways == (
        {"words"} if fault in ("template", "tokenizer") else {"alone", "batch", "words"}
    )
    plain(check)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_folder_is_named(fault: str, folders: Folders, tmp_path: Path) -> None:
    """The folder was saved over; what its golden texts were is known from before."""
    before = read_golden(folders("good"))
    shutil.copytree(folders(fault), tmp_path / "model")
    check = check_target(tmp_path / "model", golden=before)
    assert check.state == "moved", check.lines()
    assert FAULTS[fault][1] <= set(check.changed), check.lines()
    wanted = {"weights", "checkpoint"} if "weights" in check.changed else set()
    assert set(check.changed) <= FAULTS[fault][1] | wanted
    # by its own golden texts the folder is whole: this is what recording them is for
    assert check_target(tmp_path / "model").ok


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_an_engine_without_hashes_has_moved(
    fault: str, folders: Folders, served: Callable[[str], str]
) -> None:
    check = check_target(folders("good"), url=served(fault), protocol="classify")
    assert check.state == "moved", check.lines()
    assert check.hashes == {}
    assert set(check.changed) <= {"head"}  # by how the values moved
    if fault in ("template", "tokenizer"):
        assert {one["way"] for one in check.moved} == {"words"}
        assert "formats them otherwise" in " ".join(check.lines())


def test_a_sigmoid_that_nobody_asked_for_is_told(folders: Folders) -> None:
    class Sigmoid(RewardScorer):
        def _values(self, *arguments: Any) -> Any:
            return torch.as_tensor(super()._values(*arguments)).sigmoid().tolist()

    scorer = Sigmoid.from_pretrained(folders("good"), overlong="error", dtype="float32")
    assert scorer.manifest is not None
    scorer.manifest.golden_texts = None
    with running(scorer, allow_unchecked=True) as server:
        for protocol in ("companion", "classify"):
            check = check_target(folders("good"), url=server.url, protocol=protocol)
            assert check.state == "moved"
            assert check.changed == ["head"]
            assert "sigmoid" in " ".join(check.lines())


def test_a_dtype_that_is_meant_is_no_fault(folders: Folders) -> None:
    folder = folders("small")
    with running(load_scorer(folder, overlong="error", dtype="bfloat16")) as server:
        strict = check_target(folder, url=server.url)
        meant = check_target(folder, url=server.url, dtype="bfloat16")
    assert (strict.state, strict.changed) == ("moved", ["dtype"])
    assert "float32 at saving, bfloat16 and float32 now" in " ".join(strict.lines())
    assert meant.ok, meant.lines()
    assert meant.tolerance == 0.1


# ---------------------------------------------------------------------- damage in place


def _no_damage(folder: Path) -> None:
    pass


def _weights_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _weights_scaled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _weights_rounded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})


def _config_edited(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["rope_parameters"]["rope_theta"] = 20.0
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _template_edited(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text("utf-8").replace("<|end|>", "<|end|><s>"), encoding="utf-8")


def _tokenizer_edited(folder: Path) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text("utf-8"))
    data["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(data), encoding="utf-8")


def _manifest_cut(folder: Path) -> None:
    file = folder / "reward_manifest.json"
    file.write_text(file.read_text("utf-8")[:-100], encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "state", "changed"),
    [
        (_no_damage, "ok", []),
        (_weights_cut, "moved", ["weights"]),
        (_weights_scaled, "moved", ["weights", "head"]),
        (_weights_rounded, "moved", ["weights", "dtype"]),
        (_config_edited, "moved", ["config"]),
        (_template_edited, "changed", ["template"]),  # the companion formats by the manifest
        (_tokenizer_edited, "moved", ["tokenizer"]),
        (_manifest_cut, "moved", ["manifest"]),
        (shutil.rmtree, "unreachable", []),
    ],
)
def test_damage_to_a_folder_is_named(
    damage: Callable[[Path], None], state: str, changed: list[str], folders: Folders, tmp_path: Path
) -> None:
    before = read_golden(folders("good"))
    shutil.copytree(folders("good"), tmp_path / "model")
    damage(tmp_path / "model")
    check = check_target(tmp_path / "model", golden=before)
    assert (check.state, check.changed) == (state, changed), check.lines()
    assert plain(check)["ok"] == (state == "ok")


def test_a_folder_that_was_replaced_here_too_is_named(
    folders: Folders, served: Callable[[str], str]
) -> None:
    """The server and the folder agree; what was recorded before does not."""
    golden = read_golden(folders("good"))
    for fault, named in (("tokenizer", "tokenizer"), ("checkpoint", "weights")):
        check = check_target(folders(fault), url=served(fault), golden=golden)
        assert check.state == "moved"
        assert named in check.changed
        assert check_target(folders(fault), url=served(fault)).ok


# ---------------------------------------------------------------------- what cannot be asked


def test_a_server_that_is_away_is_not_called_a_fault(folders: Folders) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for protocol in ("companion", "classify"):
        check = check_target(folders("good"), url=url, protocol=protocol, retries=0)
        assert check.state == "unreachable"
        assert url in check.reasons[0]
        assert not check.ok


def test_a_server_that_wants_a_key(folders: Folders) -> None:
    scorer = load_scorer(folders("good"), overlong="error", dtype="float32")
    with running(scorer, token="secret") as server:
        assert check_target(folders("good"), url=server.url).state == "unreachable"
        assert check_target(folders("good"), url=server.url, api_key="secret").ok


def test_texts_that_the_target_refuses_are_a_fault(
    folders: Folders, served: Callable[[str], str]
) -> None:
    golden = read_golden(folders("good"))
    assert golden is not None
    golden["input_ids"][0][0] = 10**6
    for url in (None, served("good")):
        check = check_target(folders("good"), url=url, golden=golden)
        assert check.state == "moved"
        assert any("1000000" in line for line in check.lines()), check.lines()


def test_a_model_of_another_kind(folders: Folders, served: Callable[[str], str]) -> None:
    check = check_target(folders("good"), url=served("process"))
    assert check.state == "moved"
    assert "readout" in check.changed
    golden = read_golden(folders("good"))
    check = check_target(folders("process"), golden=golden)
    assert check.state == "moved"
    assert {"readout", "weights", "config"} <= set(check.changed)


def test_a_gateway_knows_the_words_and_not_the_model(
    folders: Folders, served: Callable[[str], str]
) -> None:
    behind = RemoteScorer.from_pretrained(served("good"), folders("good"), overlong="error")
    with running(behind) as gateway:
        check = check_target(folders("good"), url=gateway.url)
    assert check.ok, check.lines()
    assert set(check.hashes) == {"template", "tokenizer", "readout"}
    assert "gateway" in check.reasons[0]


def test_what_cannot_be_checked_is_refused(
    tiny_base: Path, folders: Folders, served: Callable[[str], str], tmp_path: Path
) -> None:
    save_reward_model(built(tiny_base), tmp_path / "bare")
    with pytest.raises(ModelError, match="no golden texts"):
        check_target(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"reward_manifest.json: no such file"):
        check_target(tiny_base)
    with pytest.raises(DataError, match="protocol"):
        check_target(folders("good"), url="http://127.0.0.1", protocol="openai")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="dtype"):
        check_target(folders("good"), dtype="int8")
    with pytest.raises(DataError, match="one value a text"):
        check_target(folders("process"), url=served("process"), protocol="classify")
