"""Watch a policy in training for over-optimisation, and stop before it has lost what it gained.

The reward that a policy is trained on is a proxy; past some point it rises while the truth falls
(Gao, Schulman and Hilton 2022, arXiv 2210.10760). The monitor looks every few steps: it draws
completions of held-out prompts and scores them with the proxy and with a scorer that the policy is
not trained on. Chapter 5.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from accelerate import PartialState
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from companion.data.writing import write_text
from companion.errors import CompanionError, DataError
from companion.functional.sequential import Fall, FallTest
from companion.generation.policy import Policy
from companion.rl.policy_evaluation import KLEstimator, Look, Viewer
from companion.rl.rewards import RewardCallable

logger = logging.getLogger(__name__)

OnBudget = Literal["stop", "raise_beta"]

#: The KL within which a raised beta stays as it is: budget / 1.5 to budget.
SLACK: Final = 1.5


class OveroptimizationMonitor(TrainerCallback):
    """Looks at the policy every few steps; stops the run when the KL is spent or the gold falls.

    For any online trainer of TRL: ``GRPOTrainer(..., callbacks=[monitor])``. With
    :meth:`attach` after that, it also logs through the trainer (to its trackers), works under
    ZeRO-3, and can raise beta. All ranks must have it.

    Parameters
    ----------
    prompts : sequence
        Held-out prompts: texts, lists of messages, or rows with ``prompt`` and further columns,
        which the scorers get. A hundred or more, if a fall is to be told from noise.
    proxy : callable
        The reward in training, as TRL calls it; several: :func:`companion.rl.weighted_sum`.
    gold : callable, optional
        A scorer that the policy is not trained on, called the same way. Without it there is no
        test for a fall.
    every : float
        Steps between looks, or below 1 a share of the run; there is one before the first step and
        one after the last.
    completions : int
        Of each prompt at each look.
    max_completion_length, temperature : int, float
        As in training.
    kl_budget : float, optional
        Nats a completion that the policy may move from the reference, by the estimate of the look.
    on_budget : {"stop", "raise_beta"}
        When the budget is spent: stop; or double the trainer's beta, the weight of the KL in its
        loss, and halve it again (not below where it began) once the KL is under budget / 1.5
        (the adaptive penalty of Schulman et al. 2017, arXiv 1707.06347, section 4).
    alpha : float
        Chance of stopping, by mistake, a run whose gold score never falls; see
        :class:`companion.functional.FallTest`.
    further : mapping of str to callable, optional
        More scorers to log.
    reference : PreTrainedModel, optional
        What the KL is measured from. Default: the base under an adapter, else the trainer's
        ``ref_model``, else a copy of the policy made when training begins.
    kl_estimator : {"k1", "k3"}
        See :func:`companion.rl.completion_kl`.
    record : path, optional
        File that gets a line of JSON for each look. A run that is resumed goes on from it.
    on_best : callable, optional
        Called on every rank after a look whose gold score is the best so far.
    seed : int
        Of the looks' completions; the same at all looks.

    Attributes
    ----------
    looks : list of Look
    falls : list of Fall
        Of each look, if there is a gold scorer.
    reason : str or None
        Why the run was stopped.

    Raises
    ------
    DataError
        For settings that make no sense.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        proxy: RewardCallable,
        gold: RewardCallable | None = None,
        *,
        every: float = 10,
        completions: int = 4,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        kl_budget: float | None = None,
        on_budget: OnBudget = "stop",
        alpha: float = 0.05,
        further: Mapping[str, RewardCallable] | None = None,
        reference: Any = None,
        kl_estimator: KLEstimator = "k1",
        record: str | Path | None = None,
        on_best: Callable[[], None] | None = None,
        seed: int = 0,
    ) -> None:
        if every <= 0:
            raise DataError(f"every is {every}", "give a number of steps, or a share of the run")
        if kl_budget is not None and not kl_budget > 0:
            raise DataError(f"kl_budget is {kl_budget}", "use a positive number of nats, or None")
        if on_budget not in ("stop", "raise_beta"):
            raise DataError(f"on_budget is {on_budget!r}", "use 'stop' or 'raise_beta'")
        if on_budget == "raise_beta" and kl_budget is None:
            raise DataError("on_budget is 'raise_beta' without a kl_budget", "give a kl_budget")
        taken = {"kl", "proxy", "gold"} & set(further or {})
        if taken:
            raise DataError(f"further scorers may not be called {', '.join(sorted(taken))}")
        scorers = {"proxy": proxy, **({"gold": gold} if gold is not None else {})}
        self.viewer = Viewer(
            [row if isinstance(row, Mapping) else {"prompt": row} for row in prompts],
            {**scorers, **(further or {})},
            completions=completions,
            max_completion_length=max_completion_length,
            temperature=temperature,
            kl_estimator=kl_estimator,
            seed=seed,
        )
        self.every = every
        self.kl_budget = kl_budget
        self.on_budget: OnBudget = on_budget
        self.alpha = alpha
        self.reference = reference
        self.record = None if record is None else Path(record)
        self.on_best = on_best
        self.has_gold = gold is not None
        self.looks: list[Look] = []
        self.falls: list[Fall] = []
        self.reason: str | None = None
        self._trainer: Any = None
        self._test: FallTest | None = None
        self._every = 1
        self._first_beta = 0.0
        self._template_kwargs: Mapping[str, Any] | None = None

    def attach(self, trainer: Any) -> OveroptimizationMonitor:
        """Make the trainer known, add this callback to it if it is not there, return itself."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    @property
    def best(self) -> Look | None:
        """The look with the highest gold score; without a gold scorer the last."""
        if not self.looks:
            return None
        return self.looks[self.falls[-1].best] if self.falls else self.looks[-1]

    # ------------------------------------------------------------------ transformers' events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the set-up, take the reference, and look for the first time."""
        self._check(args)
        # the trainer's settings for prompts: held-out ones are written as those in training
        self._template_kwargs = getattr(args, "chat_template_kwargs", None)
        share = self.every * (state.max_steps if self.every < 1 else 1)
        self._every = max(1, round(share))
        planned = 1 + math.ceil(state.max_steps / self._every)
        self._test = FallTest(max(planned, 2), self.alpha) if self.has_gold else None
        self.looks, self.falls, self.reason = [], [], None
        resumed = self._restore(state.global_step)
        self._take_reference(kwargs["model"], state)
        if not resumed:
            self._look(state, control, kwargs)
        elif self.reason is not None:  # the run was over
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, if it is time."""
        due = state.global_step % self._every == 0 or state.global_step >= state.max_steps
        if due and (not self.looks or self.looks[-1].step < state.global_step):
            self._look(state, control, kwargs)

    # ------------------------------------------------------------------ inside

    def _check(self, args: Any) -> None:
        if getattr(self._trainer, "is_fsdp_enabled", False) or getattr(args, "fsdp", None):
            raise CompanionError(
                "the monitor cannot draw completions from a policy that FSDP has sharded",
                "use DDP or DeepSpeed ZeRO",
            )
        if is_deepspeed_zero3_enabled() and (self._trainer is None or self.reference is None):
            raise CompanionError(
                "under ZeRO-3 the monitor needs the trainer and a reference of its own",
                "give reference=, and call monitor.attach(trainer)",
            )
        if self.on_budget == "raise_beta":
            self._first_beta = float(getattr(self._trainer, "beta", 0.0))
            if not self._first_beta > 0:
                raise CompanionError(
                    "on_budget is 'raise_beta', and the trainer has no beta above 0 to raise",
                    "set beta (0.01, say), and call monitor.attach(trainer)",
                )
            args = self._trainer.args
            level = getattr(args, "importance_sampling_level", "token")
            if not getattr(args, "use_bias_correction_kl", True) or level != "token":
                logger.warning(
                    "raise_beta: without use_bias_correction_kl and importance_sampling_level "
                    "'token' the penalty has the gradient of another KL than the one that is "
                    "measured (arXiv 2506.09477)"
                )

    def _take_reference(self, model: Any, state: Any) -> None:
        own = getattr(self._trainer, "ref_model", None)
        if self.reference is not None or hasattr(model, "disable_adapter"):
            return
        if own is not None and not getattr(self._trainer.args, "sync_ref_model", False):
            self.reference = self._trainer.accelerator.unwrap_model(own)
        elif state.global_step > 0:
            raise CompanionError(
                "a run that goes on from a checkpoint has no copy of the policy that it began with",
                "give the monitor reference=, the model that the first step was taken from",
            )
        else:
            self.reference = frozen_copy(model)

    def _look(self, state: Any, control: Any, kwargs: Mapping[str, Any]) -> None:
        policy = partial(
            Policy,
            tokenizer=kwargs["processing_class"],
            chat_template_kwargs=self._template_kwargs,
        )
        with self.policy(kwargs["model"]) as model:
            adapter = self.reference is None
            look = self.viewer.look(
                policy(model),
                policy(model if adapter else self.reference),
                state.global_step,
                as_reference=model.disable_adapter if adapter else nullcontext,
            )
        self._judge(look)
        if self.record is not None and PartialState().is_main_process:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with self.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(look.to_dict()) + "\n")
        self._log(look, state)
        if self.on_best is not None and self.best is look:
            self.on_best()
        if self.reason is not None:
            control.should_training_stop = True

    def _judge(self, look: Look) -> None:
        if self.looks:
            self.looks[-1].texts = []  # those of the last look are kept, to be read
        self.looks.append(look)
        if self._test is not None:
            fall = self._test.add(look.figures["gold"])
            self.falls.append(fall)
            if fall.fallen:
                self.reason = (
                    f"the held-out score has fallen by {-fall.change:.3f} from its best at step "
                    f"{self.looks[fall.best].step} (p = {fall.p_value:.1e}, level "
                    f"{fall.level:.1e})"
                )
        kl = look.mean("kl")
        if self.kl_budget is None:
            return
        if self.on_budget == "stop" and kl >= self.kl_budget and self.reason is None:
            self.reason = f"the KL budget is spent: {kl:.2f} of {self.kl_budget:g} nats"
        elif self.on_budget == "raise_beta" and kl >= self.kl_budget:
            self._trainer.beta *= 2
        elif self.on_budget == "raise_beta" and kl < self.kl_budget / SLACK:
            self._trainer.beta = max(self._first_beta, self._trainer.beta / 2)

    def _log(self, look: Look, state: Any) -> None:
        logs = {f"monitor/{name}": look.mean(name) for name in look.figures}
        logs |= {"monitor/length": look.length, "monitor/truncated": look.truncated}
        logs |= {f"monitor/without_{name}": float(n) for name, n in look.without.items() if n}
        if self.on_budget == "raise_beta":
            logs["monitor/beta"] = float(self._trainer.beta)
        for name, missing in look.without.items():
            if missing:
                logger.warning(f"step {look.step}: {missing} completions have no {name} score")
        if self._trainer is not None:
            Trainer.log(self._trainer, logs)  # TRL's own log would empty its half-full averages
        else:
            state.log_history.append({**logs, "step": state.global_step})

    def _restore(self, step: int) -> bool:
        """Take up the looks of a run that is resumed; whether there are any.

        Then there is no further one at this step: it would be one more than the test for a fall has
        planned.
        """
        if step == 0 or self.record is None or not self.record.is_file():
            if self.record is not None and PartialState().is_main_process:
                self.record.unlink(missing_ok=True)
            return False
        lines = self.record.read_text(encoding="utf-8").splitlines()
        kept = [look for look in map(Look.from_dict, map(json.loads, lines)) if look.step <= step]
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            text = "".join(json.dumps(look.to_dict()) + "\n" for look in kept)
            write_text(self.record, text)
        for look in kept:
            self._judge(look)
        if kept and kept[-1].step < step:
            self.reason = None  # the run went on after it
        return bool(kept)

    def policy(self, model: Any) -> AbstractContextManager[Any]:
        if self._trainer is None:
            return _without_checkpointing(model)
        from trl.models import unwrap_model_for_generation

        return unwrap_model_for_generation(self._trainer.model_wrapped, self._trainer.accelerator)


def frozen_copy(model: Any) -> Any:
    """A copy of a model as it is now, for eval.

    TRL and accelerate put a ``forward`` of their own on the instance, which is bound to the
    original: a plain deep copy would compute with the policy in training, and its KL would be 0.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module.__dict__.pop("forward", None)
    return copied.requires_grad_(False).eval()


@contextmanager
def _without_checkpointing(model: Any) -> Iterator[Any]:
    """A model that recomputes activations keeps no cache, and would sample token by token anew."""
    was = model.is_activation_checkpointing
    if was:
        model.activation_checkpointing_disable()
    try:
        yield model
    finally:
        if was:
            model.activation_checkpointing_enable()
