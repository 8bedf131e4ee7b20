"""Load, guard and save reward models. Chapter 2.

A reward model is a plain Hugging Face checkpoint, plus ``reward_manifest.json``. Stock transformers
loads it and gives the same values, TRL and vLLM too if it has one score a text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.models.exporting import (
        EngineExport as EngineExport,
        export_for_engine as export_for_engine,
    )
    from companion.models.golden import GoldenTexts as GoldenTexts
    from companion.models.guards import (
        check_batch as check_batch,
        check_head as check_head,
        check_positions as check_positions,
        check_tokenizer_and_config as check_tokenizer_and_config,
        precision_notes as precision_notes,
    )
    from companion.models.head import (
        ScoreHead as ScoreHead,
        find_head as find_head,
        initialise_head as initialise_head,
        install_head as install_head,
    )
    from companion.models.identity import (
        Identity as Identity,
        identity_of as identity_of,
        short_hash as short_hash,
        text_hashes as text_hashes,
    )
    from companion.models.loading import (
        load_base as load_base,
        load_formatter as load_formatter,
        load_reward_model as load_reward_model,
    )
    from companion.models.lora import apply_lora as apply_lora, merged as merged
    from companion.models.manifest import (
        ReferenceStats as ReferenceStats,
        RewardManifest as RewardManifest,
    )
    from companion.models.readout import (
        ReadAs as ReadAs,
        ScalarReadout as ScalarReadout,
        TokenReadout as TokenReadout,
    )
    from companion.models.reward_model import RewardModel as RewardModel
    from companion.models.saving import save_reward_model as save_reward_model
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
