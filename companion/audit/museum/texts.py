"""Sick texts: one bug each on the way from a conversation to token ids. Chapter 9.

Templates of TRL stand for those that models ship with, from which they were copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from companion.audit.museum.models import sick, sick_file
from companion.audit.museum.specimen import Specimen
from companion.models.checkpoint import set_pad
from companion.models.reward_model import RewardModel

#: Templates that write the day, and one that cuts reasoning out of an answer.
DATED: Final = ("llama3_2", "gptoss")
WITHOUT_REASONING: Final = "deepseek_r1_distill"
#: An answer whose reasoning that one cuts out.
REASONED: Final = "<think>\nwell\n</think>\nIt is 4."


def trl_template(name: str) -> str:
    """A chat template by its name in TRL."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def _with_template(template: Callable[[str], str] | None) -> Callable[[Path], Any]:
    """The tutor's reward model with a template made of its own, or none."""

    def change(loaded: RewardModel) -> None:
        own = loaded.tokenizer.chat_template
        loaded.tokenizer.chat_template = None if template is None else template(own)

    return sick(change)


def _with_trl(name: str) -> Callable[[Path], Any]:
    """The same with a template of TRL's, which is read when it is planted."""
    return _with_template(lambda _: trl_template(name))


def _as_it_is(loaded: RewardModel) -> None:
    """The bug is in how it is used."""


def _with_core(change: Callable[[Any, Any], None]) -> Callable[[Path], Any]:
    """The same with a change of the tokenizer's own file; `change` gets tokenizers' object."""

    def changed(loaded: RewardModel) -> None:
        change(loaded.tokenizer.backend_tokenizer, loaded.tokenizer)

    return sick(changed)


def _two_bos(core: Any, tokenizer: Any) -> None:
    from tokenizers import processors

    bos = tokenizer.bos_token
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} {bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def _ascii(core: Any, tokenizer: Any) -> None:
    from tokenizers import Regex, normalizers

    core.normalizer = normalizers.Replace(Regex(r"[^\x00-\x7F]"), "")


def _ends_otherwise(template: str) -> str:
    """``<|end|>`` ends an answer."""
    return template.replace("eos_token", "'<|end|>'")


def _end_is_pad(loaded: RewardModel) -> None:
    """``<|end|>`` ends an answer, and fills batches."""
    tokenizer = loaded.tokenizer
    tokenizer.chat_template = _ends_otherwise(tokenizer.chat_template)
    tokenizer.pad_token = "<|end|>"
    set_pad(loaded.model, tokenizer.pad_token_id)


def _other_template(folder: Path) -> None:
    """Written over after the training, as with a new version of the base's files."""
    path = folder / "chat_template.jinja"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("'<|' + message['role'] + '|>'", "'\\n'"), encoding="utf-8")


def _second_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = trl_template("qwen2_5")
    path.write_text(json.dumps(config), encoding="utf-8")


_CONTENT: Final = "message['content']"


def _specimen(
    name: str,
    caught_by: str,
    story: str,
    threads: tuple[str, ...],
    plant: Callable[[Path], Any],
    *also: str,
) -> Specimen:
    at = tuple(f"https://github.com/{thread}" for thread in threads)
    return Specimen(name, story, at, caught_by, plant, also)


SPECIMENS: Final[tuple[Specimen, ...]] = (
    _specimen(
        "two-bos",
        "bos-doubled",
        "The tokenizer's post-processor writes BOS twice, after a tool had switched on what was "
        "on already.",
        ("unslothai/unsloth/pull/10312", "allenai/reward-bench/issues/164"),
        _with_core(_two_bos),
    ),
    _specimen(
        "bos-of-two-hands",
        "bos-doubled-in-text",
        "Template and tokenizer each write BOS; a pipeline that renders first and tokenises then "
        "has two.",
        ("allenai/reward-bench/issues/164", "deepseek-ai/DeepSeek-R1/issues/151"),
        sick(_as_it_is),
    ),
    _specimen(
        "no-end-of-turn",
        "eos-missing",
        "The template of GLM-4.5 ends a turn with the next one's header, so nothing stands behind "
        "the last answer.",
        ("allenai/reward-bench/issues/94",),
        _with_trl("glm4moe"),
    ),
    _specimen(
        "no-template-no-eos",
        "eos-not-added",
        "A model that was trained with EOS behind each text, and a tokenizer that writes none.",
        ("allenai/reward-bench/issues/94", "OpenRLHF/OpenRLHF/issues/300"),
        _with_template(None),
    ),
    _specimen(
        "end-of-turn-as-pad",
        "eos-ignored",
        "The token that ends a turn is the pad token, though EOS is not: stock read-out steps over "
        "it, and reads a finished answer where a cut one ends.",
        ("huggingface/transformers/issues/35352",),
        sick(_end_is_pad),
        "pad-is-eos",
    ),
    _specimen(
        "another-end-token",
        "other-end-token",
        "A turn ends with another token than EOS, as with Phi-3.5 and Gemma: rewards that look for "
        "EOS took every finished answer for one that was cut off.",
        ("huggingface/trl/issues/7039",),
        _with_template(_ends_otherwise),
    ),
    _specimen(
        "template-written-over",
        "template-mismatch",
        "chat_template.jinja was replaced after the training; the manifest knows the old one.",
        ("huggingface/transformers/pull/33957",),
        sick_file(_other_template, manifest=True),
    ),
    _specimen(
        "two-templates",
        "template-mismatch",
        "tokenizer_config.json holds another template than chat_template.jinja, and old readers "
        "take that one.",
        (
            "huggingface/transformers/pull/33957",
            "huggingface/text-generation-inference/issues/3247",
        ),
        sick_file(_second_template),
    ),
    _specimen(
        "reasoning-cut-out",
        "template-drops-content",
        "The template of DeepSeek-R1-Distill keeps of an answer what stands behind </think>: two "
        "answers with other reasoning have one score.",
        (
            "OpenRLHF/OpenRLHF/issues/804",
            "deepseek-ai/DeepSeek-R1/issues/633",
            "huggingface/trl/pull/6766",
        ),
        _with_trl(WITHOUT_REASONING),
    ),
    _specimen(
        "tools-left-out",
        "template-drops-fields",
        "Rows bring tools and tool calls; the template knows nothing of them.",
        ("huggingface/trl/issues/4350", "modelscope/ms-swift/issues/8475"),
        sick(_as_it_is),
    ),
    _specimen(
        "arrow-nulls",
        "null-fields",
        "Arrow gives each tool the fields of all tools, as null where it has none, and the "
        "template of Qwen2.5 writes them all.",
        ("modelscope/ms-swift/issues/6467", "modelscope/ms-swift/pull/10125"),
        _with_trl("qwen2_5"),
    ),
    _specimen(
        "prompt-and-answer-joined",
        "boundary-tokenisation",
        "The header ends with a blank, which the tokenizer joins with the first word: the ids of "
        "prompt and answer joined are not those of the text.",
        ("huggingface/trl/issues/1702", "huggingface/trl/issues/2054"),
        _with_template(lambda own: own.replace("'<|assistant|>'", "'<|assistant|>\\nAnswer: '")),
    ),
    _specimen(
        "template-that-cuts",
        "silent-cut",
        "The template takes the first thousand characters of a message.",
        ("OpenRLHF/OpenRLHF/blob/main/openrlhf/cli/serve_rm.py",),
        _with_template(lambda own: own.replace(_CONTENT, f"{_CONTENT}[:1000]")),
    ),
    _specimen(
        "saved-with-truncation",
        "cut-by-setting",
        "The tokenizer was saved after a call that truncates, and its file cuts ever since.",
        ("huggingface/transformers/issues/5444",),
        _with_core(lambda core, tokenizer: core.enable_truncation(max_length=256)),
    ),
    _specimen(
        "turn-in-the-text",
        "special-tokens-in-text",
        "An answer brings the end token, and praise of itself behind it.",
        ("huggingface/transformers/issues/29279",),
        sick(_as_it_is),
    ),
    *(
        _specimen(
            f"date-of-{name}",
            "date-in-template",
            "The template writes today's date into each text.",
            ("sgl-project/sglang/issues/3296", "mosaicml/llm-foundry/pull/1474"),
            _with_trl(name),
        )
        for name in DATED
    ),
    _specimen(
        "letters-that-vanish",
        "unicode-and-control-characters",
        "The tokenizer's normaliser takes out what is not ASCII: yes and no are one in Russian.",
        ("huggingface/tokenizers/issues/122",),
        _with_core(_ascii),
    ),
)
