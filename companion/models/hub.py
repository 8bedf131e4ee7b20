"""The finished model on the Hugging Face hub.

transformers' ``Trainer`` uploads what lies in the output folder whenever a checkpoint is saved,
with a card of its own, and the pickled settings with the token that stands in them; the manifest,
which is written when the run is over, it never uploads. Here the hub is asked before the run, and
gets the whole of the model after it. Chapter 4.
"""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from companion.errors import CompanionError, ServiceError

Arguments = TypeVar("Arguments", bound=TrainingArguments)

#: What a run leaves beside the model.
LEFT_OUT: Final = [
    *("checkpoint-*", "runs/*", "last/*", "global_step*", "_*", "*.tmp", "training_args.bin"),
    *("trainer_state.json", "optimizer*", "scheduler*", "scaler*", "rng_state*"),
]
#: Weights of an earlier upload that are not in this one: a loader might take them.
_STALE: Final = ["model*.safetensors", "model.safetensors.index.json"]
_LATER = "or leave out --push_to_hub, and later: hf upload NAME FOLDER"


@dataclass(frozen=True)
class Destination:
    """A repository that has been found to be open for writing."""

    api: HfApi
    repo_id: str
    revision: str | None = None

    def upload(self, folder: str | os.PathLike[str]) -> str:
        """Upload a saved model; its address.

        Raises
        ------
        ServiceError
            If that fails: the model is saved, and the error says how to upload it.
        """
        try:
            self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=Path(folder),
                revision=self.revision,
                commit_message="The finished model",
                ignore_patterns=list(LEFT_OUT),
                delete_patterns=_STALE,
            )
        except Exception as error:  # an upload has many ways to fail, and none may lose the model
            raise ServiceError(
                f"the model is saved in {folder}, but not on the hub: {_said(error)}",
                f"hf upload {self.repo_id} {folder} --exclude 'checkpoint-*' 'training_args.bin'",
            ) from error
        return f"{self.api.endpoint}/{self.repo_id}"


def open_destination(
    config: Arguments, *, endpoint: str | None = None
) -> tuple[Destination | None, Arguments]:
    """What ``push_to_hub`` asks for, before anything is trained.

    Parameters
    ----------
    config : TrainingArguments
        ``hub_model_id`` (default: the name of ``output_dir``), ``hub_token``, ``hub_private_repo``
        and ``hub_revision`` are honoured.
    endpoint : str, optional
        Of another hub; default: the environment's ``HF_ENDPOINT``.

    Returns
    -------
    destination : Destination or None
        None without ``push_to_hub``, and on ranks other than 0.
    config : TrainingArguments
        For the trainer, which is to upload nothing by itself.

    Raises
    ------
    CompanionError
        If checkpoints are to be uploaded too, or the hub cannot be reached, knows no such user, or
        does not let them write there.
    """
    if not config.push_to_hub:
        return None, config
    own = copy.copy(config)
    own.push_to_hub, own.hub_token = False, None  # (the trainer would pickle the token)
    if config.process_index != 0:  # whose machine need not be logged in
        return None, own
    if HubStrategy(config.hub_strategy) is not HubStrategy.END:
        raise CompanionError(
            f"--push_to_hub with --hub_strategy {HubStrategy(config.hub_strategy).value}: a "
            "checkpoint has no manifest",
            "leave out --hub_strategy: the finished model is uploaded",
        )
    if is_offline_mode():
        raise CompanionError(
            "--push_to_hub, and HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE, {_LATER}"
        )
    token = config.hub_token or get_token()
    if token is None:
        raise CompanionError(
            "--push_to_hub, and nobody is logged in to the hub",
            f"run 'hf auth login', set HF_TOKEN, {_LATER}",
        )
    api = HfApi(endpoint=endpoint, token=token)
    name = config.hub_model_id or Path(str(config.output_dir)).resolve().name
    try:
        made = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        if config.hub_revision is not None:
            api.create_branch(made.repo_id, branch=config.hub_revision, exist_ok=True)
        # (a hub without that route has just shown the repository)
        with contextlib.suppress(RepositoryNotFoundError):
            api.auth_check(made.repo_id, write=True)
    except HFValidationError as error:
        raise CompanionError(f"--hub_model_id {name}: {error}", "give ORGANISATION/NAME") from error
    except HfHubHTTPError as error:
        raise CompanionError(
            f"--push_to_hub: the hub refuses {name}: {_said(error)}",
            f"check --hub_model_id and the rights of the token ('hf auth whoami'), {_LATER}",
        ) from error
    except Exception as error:  # no connection, a proxy, no JSON: whatever it is, before the run
        raise CompanionError(
            f"--push_to_hub: {api.endpoint} cannot be asked: {_said(error)}",
            f"check the network and HF_ENDPOINT, {_LATER}",
        ) from error
    return Destination(api, made.repo_id, config.hub_revision), own


def _said(error: BaseException) -> str:
    """The first lines of an error, its kind if it says nothing."""
    lines: list[Any] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
