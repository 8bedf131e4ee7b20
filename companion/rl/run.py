"""``train_grpo``: prompts and a reward in, a policy out that is no worse than its best. Chapter 5.

TRL's ``GRPOTrainer`` does the training, unmodified but for its card. Around it: rewards that score
as the reward model was trained, held-out prompts that the monitor looks at, the policy kept at its
best by the held-out scorer, and figures on further prompts, which nothing was chosen by.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from huggingface_hub import ModelCardData
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from companion.data.splits import dataset_fingerprint, prompt_key, split_by_prompt
from companion.data.writing import write_text
from companion.errors import CompanionError, DataError, first_line
from companion.evaluation.tables import format_table
from companion.functional.resampling import Interval, bootstrap_interval
from companion.generation.causal import load_causal
from companion.generation.policy import Policy
from companion.models.card import is_hub_id, named, put_card, render_card
from companion.models.checkpoint import load_tokenizer, resolve
from companion.models.ends import policy_end_ids, turn_end_ids
from companion.models.hub import open_destination
from companion.models.readout import ReadAs
from companion.models.saving import package_versions
from companion.rl.config import GRPORunConfig, PolicyArguments, PromptArguments
from companion.rl.monitor import OveroptimizationMonitor
from companion.rl.policy_evaluation import Look, number
from companion.rl.rewards import (
    RewardCallable,
    is_loaded,
    joint_rewards,
    open_reward,
    reward_name,
    weighted_sum,
)
from companion.scoring.reward_function import TEMPLATE_COLUMNS
from companion.training.checkpoints import (
    WholeCheckpoints,
    all_written,
    check_run,
    checkpoint_of,
    fingerprint_of,
)
from companion.training.config import check_optimizer, require
from companion.training.launching import require_launcher
from companion.training.run import Say, load_given
from companion.training.trainer import whole_parameters

#: settings that decide what a policy becomes
_DECIDING = (
    *("reward_model", "reward_weights", "num_train_epochs", "max_steps", "learning_rate", "beta"),
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "world_size",
        "num_generations",
    ),
    *("max_completion_length", "temperature", "top_p", "loss_type", "scale_rewards", "epsilon"),
    *("num_iterations", "kl_budget", "on_budget", "seed", "data_seed"),
)


@dataclass
class GRPOResult:
    """What :func:`train_grpo` returns.

    Attributes
    ----------
    output_dir : Path
        Folder of the policy at its best.
    reason : str or None
        Why the monitor stopped the run; None if it took all its steps.
    steps, best_step : int
        Steps taken, and the step at which the held-out score was best on the monitored prompts.
    start, best, end : Look
        Figures on the test prompts, which nothing was chosen by, with one set of dice.
    monitor : OveroptimizationMonitor
        With its looks at the monitored prompts.
    log_history : list of dict
        All that was logged, as transformers keeps it.
    train_metrics : dict
        Run time and the like.
    counts : dict
        What the reward functions counted on rank 0.
    notes : list of str
        What was dropped or assumed.
    """

    output_dir: Path
    reason: str | None
    steps: int
    best_step: int
    start: Look
    best: Look
    end: Look
    monitor: OveroptimizationMonitor
    log_history: list[dict[str, Any]]
    train_metrics: dict[str, float]
    counts: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)

    def gain(self, name: str, of: str = "best") -> tuple[float, Interval]:
        """Mean change of a figure since the start, prompt by prompt, and its 95% interval.

        Parameters
        ----------
        name : str
            ``gold``, ``proxy``, or a further scorer's name.
        of : {"best", "end"}
        """
        change = getattr(self, of).figures[name] - self.start.figures[name]
        change = change[np.isfinite(change)]
        if not change.size:
            return math.nan, Interval(math.nan, math.nan)
        return float(change.mean()), bootstrap_interval(change)

    @property
    def looks(self) -> dict[str, Look]:
        """All three, by name."""
        return {"start": self.start, "best": self.best, "end": self.end}

    @property
    def gains(self) -> dict[str, tuple[float, Interval]]:
        """:meth:`gain` of every score, best against start."""
        return {name: self.gain(name) for name in self.start.figures if name != "kl"}

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON; None in place of NaN."""
        figures = {
            where: {name: _plain(look.mean(name), look.interval(name)) for name in look.figures}
            | {"length": look.length, "truncated": look.truncated, "without": look.without}
            for where, look in self.looks.items()
        }
        return {
            "reason": self.reason,
            "steps": self.steps,
            "best_step": self.best_step,
            "test_prompts": len(self.start.figures["kl"]),
            "figures": figures,
            "gains": {name: _plain(*gain) for name, gain in self.gains.items()},
            "train": {k: v for k, v in self.train_metrics.items() if isinstance(v, (int, float))},
            "counts": self.counts,
            "notes": self.notes,
        }

    def save(self) -> Path:
        """Write ``grpo_result.json``."""
        path = self.output_dir / "grpo_result.json"
        return write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def write_card(self, config: GRPORunConfig, base: str, model_id: str | None = None) -> None:
        """Write ``README.md``, unless one that was written by hand stands there."""
        about = ModelCardData(
            base_model=base if is_hub_id(base) else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["grpo", "trl", "rlhf"],
        )
        name = model_id or self.output_dir.resolve().name
        text = render_card(
            "policy_card.md",
            about,
            name=name.rsplit("/", 1)[-1],
            base=named(base),
            rewards=" and ".join(f"`{named(source)}`" for source in config.reward_model),
            which=f"at step {self.best_step} of {self.steps}",
            summary=self.summary().rsplit("\n", 1)[0],  # without the folder of this machine
            adapter=(self.output_dir / "adapter_config.json").exists(),
            model_id=name,
            versions=", ".join(f"{k} {version}" for k, version in package_versions().items()),
        )
        put_card(self.output_dir, text)

    def summary(self) -> str:
        """The table that ends a run."""
        looks = self.looks.values()
        rows = [
            (name, *(_shown(look.mean(name), look.interval(name)) for look in looks))
            for name in self.start.figures
        ]
        rows.append(("tokens", *(f"{look.length:.1f}" for look in looks)))
        rows.append(("cut off", *(f"{look.truncated:.1%}" for look in looks)))
        head = ("held-out figure", "start", f"best, step {self.best_step}", f"end, {self.steps}")
        lines = [format_table(head, rows), ""]
        lines += [
            f"gain of {name}, best against start: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            for name, (mean, (low, high)) in self.gains.items()
        ]
        n_prompts = len(self.start.figures["kl"])
        lines.append(f"{n_prompts:,} test prompts, 95% intervals; KL in nats a completion")
        for where, look in self.looks.items():
            missing = [f"{n:,} without {name}" for name, n in look.without.items() if n]
            if missing:
                lines.append(f"{where}: completions {', '.join(missing)}")
        lines.append(
            f"stopped at step {self.steps}: {self.reason}"
            if self.reason
            else f"took all {self.steps:,} steps"
        )
        lines.append(f"saved in {self.output_dir}")
        return "\n".join(lines)


def _shown(mean: float, interval: Interval) -> str:
    return f"{mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _plain(mean: float, interval: Interval) -> dict[str, Any]:
    return {"mean": number(mean), "interval": [number(end) for end in interval]}


def train_grpo(
    config: GRPORunConfig,
    model: PolicyArguments,
    data: PromptArguments,
    *,
    say: Say | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> GRPOResult:
    """Train a policy with GRPO against one or more reward models, watched.

    Parameters
    ----------
    config : GRPORunConfig
        ``output_dir`` gets the policy at its best by ``held_out_scorer`` (without one, at the end;
        a run that was never better than its start gets the start), ``last/`` the policy at the end
        if that is another, ``monitor.jsonl`` a line for each look, ``grpo_result.json`` the
        figures, ``README.md`` a card; training checkpoints lie in it as ``checkpoint-N``. With
        ``push_to_hub`` the policy is uploaded when all is done.
    model : PolicyArguments
        The policy, and whether to train a LoRA adapter.
    data : PromptArguments
        The prompts, and which to hold out.
    say : callable, optional
        Gets lines of text on rank 0; default: ``print``.
    callbacks : list of TrainerCallback, optional

    Returns
    -------
    GRPOResult

    Raises
    ------
    CompanionError
        For settings, rows or models that cannot be used, with the cure.
    """
    main = config.process_index == 0
    tell: Say = (say or print) if main else (lambda line: None)
    if not main:
        disable_progress_bars()
    _check_arguments(config, model, data)
    require_launcher(config)
    destination, config = open_destination(config)
    resume = checkpoint_of(config)
    train, monitored, tested, notes = hold_out(data)
    for note in notes:
        tell(f"note: {note}")
    tell(
        f"{len(train):,} prompts to train on; held out: {len(monitored):,} to stop by, "
        f"{len(tested):,} for the figures at the end"
    )
    name = resolve(str(model.model_name_or_path))
    shared: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }
    tokenizer = load_tokenizer(name, **shared)
    with whole_parameters():  # a scorer runs in each rank, whole
        rewards, proxy, gold, further = _scorers(config, policy_end_ids(name, **shared))
    if said := _dtype_note(config):
        notes.append(said)
        tell(f"note: {said}")

    config.model_init_kwargs = {
        **(config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}),
        "dtype": model.dtype,
        "revision": model.model_revision,
    }
    if model.attn_implementation is not None:
        config.model_init_kwargs["attn_implementation"] = model.attn_implementation
    try:
        trainer = _Trainer(
            model=name,
            reward_funcs=rewards,  # type: ignore[arg-type]
            args=config,
            train_dataset=train,
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=_lora(model),
        )
    except (ValueError, ImportError) as error:  # what there is, each model's class says by itself
        if "attn" in str(error) or "attention" in str(error):
            raise CompanionError(
                f"attn_implementation is {model.attn_implementation!r}: {first_line(error)}",
                "take eager or sdpa, or install what it needs",
            ) from error
        raise
    check_optimizer(config, trainer.model)
    if config.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    for note in (differences := _differences(trainer, train)):
        tell(f"note: {note}")
    notes += differences

    def load(folder: str) -> Any:
        with whole_parameters():
            return load_causal(folder, device=config.device, dtype=model.dtype, **shared)[0]

    reference = None
    zero3 = is_deepspeed_zero3_enabled()
    if not model.use_peft and (config.beta == 0 or config.sync_ref_model or zero3):
        reference = load(name)
    output = str(config.output_dir)

    def save(name: str = "") -> None:
        with all_written(Path(output), name):
            trainer.save_model(str(Path(output) / name))

    monitor = OveroptimizationMonitor(
        monitored,
        proxy,
        gold,
        every=config.monitor_steps,
        completions=config.monitor_completions,
        max_completion_length=int(config.max_completion_length or 256),
        temperature=config.temperature,
        kl_budget=config.kl_budget,
        on_budget=config.on_budget,  # type: ignore[arg-type]
        alpha=config.fall_alpha,
        further=further,
        reference=reference,
        kl_estimator=config.kl_estimator,  # type: ignore[arg-type]
        record=Path(output) / "monitor.jsonl",
        on_best=save,
        seed=config.seed,
    ).attach(trainer)
    reward_dtype = _reduced_dtype(config, config.reward_model)
    trainer.run = {
        "policy": fingerprint_of(trainer.model, main),
        "rows": {
            "train": dataset_fingerprint(train, ordered=True),
            "monitored": dataset_fingerprint(monitored, ordered=True),
        },
        "lora": lora.to_dict() if (lora := _lora(model)) else None,
        **{field: getattr(config, field) for field in _DECIDING},
        # absent where it is float32, as in checkpoints of versions that knew nothing else
        **({} if reward_dtype is None else {"reward_dtype": reward_dtype}),
    }
    if other := check_run(resume, trainer.run, config.resume_other_run):
        notes.append(other)
        tell(f"note: {other}")
    trained = trainer.train(resume)
    if monitor.reason is not None:
        tell(f"stopped at step {trainer.state.global_step}: {monitor.reason}")

    looks = _test_figures(trainer, monitor, tested, name, load)
    best_step = looks["best"].step
    if best_step != trainer.state.global_step:
        save("last")
    result = GRPOResult(
        output_dir=Path(output),
        reason=monitor.reason,
        steps=trainer.state.global_step,
        best_step=best_step,
        **looks,
        monitor=monitor,
        log_history=trainer.state.log_history,
        train_metrics=dict(trained.metrics),
        counts={reward_name(f): dict(f.counts) for f in rewards if getattr(f, "counts", None)},
        notes=notes,
    )
    if main:
        result.save()
        result.write_card(config, name, destination.repo_id if destination is not None else None)
    trainer.accelerator.wait_for_everyone()
    if destination is not None:
        tell(f"uploaded to {destination.upload(output)}")
    return result


class _Trainer(WholeCheckpoints, GRPOTrainer):
    """TRL's, but for its card, which calls a base from a folder 'None'."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run writes one when it is over."""


def hold_out(
    data: PromptArguments,
) -> tuple[Dataset, list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Prompts to train on, held-out prompts to stop by and for the figures, and notes.

    Each held-out prompt stands there once, and none of them among those to train on.

    Raises
    ------
    DataError
        For rows that cannot be used, or too few prompts.
    """
    train, held, notes = load_given(data, "prompts")
    wanted = data.monitor_prompts + data.test_prompts
    source = train if held is None else held
    distinct = list({prompt_key(row): dict(row) for row in source}.values())
    if held is None:
        if wanted >= len(distinct):
            raise DataError(
                f"{wanted:,} prompts are to be held out, and there are {len(distinct):,} different "
                "ones",
                "lower --monitor_prompts and --test_prompts, or give --eval_dataset_name",
            )
        share = wanted / len(distinct)
        _, distinct = split_by_prompt(distinct, share, seed=data.split_seed, exact=True)
    theirs = set(map(prompt_key, distinct))
    keep = [i for i, row in enumerate(train) if prompt_key(row) not in theirs]
    if len(train) - len(keep) > len(distinct):
        notes.append(
            f"{len(train) - len(keep):,} rows are not trained on: their prompts are held out"
        )
    cut = data.monitor_prompts
    if len(distinct) < wanted:
        notes.append(f"{len(distinct):,} held-out prompts, fewer than the {wanted:,} asked for")
        cut = round(len(distinct) * cut / wanted)
    if not keep or not 0 < cut < len(distinct):
        raise DataError(
            f"{len(keep):,} prompts to train on and {len(distinct):,} held out: too few",
            "give more prompts",
        )
    return train.select(keep), distinct[:cut], distinct[cut:wanted], notes


def _check_arguments(config: GRPORunConfig, model: PolicyArguments, data: PromptArguments) -> None:
    require(
        model_name_or_path=model.model_name_or_path,
        dataset_name=data.dataset_name,
        reward_model=config.reward_model,
    )
    if data.monitor_prompts < 1 or data.test_prompts < 1:
        raise CompanionError(
            "--monitor_prompts and --test_prompts must be at least 1", "give a hundred or more each"
        )


def _scorers(
    config: GRPORunConfig, eos_token_ids: list[int]
) -> tuple[list[Any], RewardCallable, RewardCallable | None, dict[str, RewardCallable]]:
    """Rewards for TRL, their weighted sum, the held-out scorer, and what is measured besides."""

    protocol: Any = config.reward_protocol
    text: Any = config.reward_text
    plain = partial(
        open_reward,
        eos_token_ids=eos_token_ids,
        protocol=protocol,
        text=text,
        dtype=config.scorer_dtype,
        read_as=ReadAs(readout=how) if (how := config.reward_readout) else None,
    )
    transform: Any = config.reward_transform
    opened = [
        plain(source, transform=transform, clip=config.reward_clip, truncated=config.truncated)
        for source in config.reward_model
    ]
    proxy = weighted_sum(opened, config.reward_weights)
    gold = None if config.held_out_scorer is None else plain(config.held_out_scorer)
    further = {reward_name(scorer): scorer for scorer in map(plain, config.also_measure)}
    rewards: list[Any] = list(opened if len(opened) == 1 else joint_rewards(opened))
    return rewards, proxy, gold, further


def _reduced_dtype(config: GRPORunConfig, sources: list[str]) -> str | None:
    """Below float32, what models among these rewards are loaded in; None otherwise."""
    dtype = config.scorer_dtype
    return dtype if dtype != "float32" and any(map(is_loaded, sources)) else None


def _dtype_note(config: GRPORunConfig) -> str | None:
    held_out = [] if config.held_out_scorer is None else [config.held_out_scorer]
    dtype = _reduced_dtype(config, [*config.reward_model, *held_out, *config.also_measure])
    if dtype is None:
        return None
    return (
        f"reward models and scorers are loaded in {dtype}, in which a score moves a little with "
        "its batch (--reward_dtype float32 takes twice the memory)"
    )


def _test_figures(
    trainer: Any,
    monitor: OveroptimizationMonitor,
    rows: list[dict[str, Any]],
    name: str,
    load: Callable[[str], Any],
) -> dict[str, Look]:
    """Looks at the start, the best and the end, on prompts that nothing was chosen by."""
    tokenizer, output = trainer.processing_class, str(trainer.args.output_dir)
    viewer = replace(monitor.viewer, rows=rows, seed=monitor.viewer.seed + 1)
    best, last = monitor.best, trainer.state.global_step
    assert best is not None
    looks: dict[str, Look] = {}
    written = trainer.args.chat_template_kwargs
    with monitor.policy(trainer.model) as policy:
        adapter = monitor.reference is None
        as_reference = policy.disable_adapter if adapter else nullcontext
        now = Policy(policy, tokenizer, chat_template_kwargs=written)
        before = (
            now if adapter else Policy(monitor.reference, tokenizer, chat_template_kwargs=written)
        )
        with as_reference():
            looks["start"] = viewer.look(before, before, 0)
        looks["end"] = viewer.look(now, before, last, as_reference=as_reference)
        if best.step in (0, last):
            looks["best"] = looks["end" if best.step == last else "start"]
            return looks
        trainer.accelerator.wait_for_everyone()
        kept = load(name if adapter else output)
        if adapter:
            from peft import PeftModel

            kept = PeftModel.from_pretrained(kept, output)
        looks["best"] = viewer.look(
            Policy(kept, tokenizer, chat_template_kwargs=written),
            before,
            best.step,
            as_reference=as_reference,
        )
    return looks


def _differences(trainer: Any, rows: Dataset) -> list[str]:
    """What the reward model knows of a completion and the policy does not (trl 1.16)."""
    notes = []
    unseen = [name for name in TEMPLATE_COLUMNS if name in rows.column_names and any(rows[name])]
    if unseen:
        notes.append(
            f"the reward model reads the columns {' and '.join(unseen)}, but TRL writes the "
            "policy's prompts without them (--chat_template_kwargs sets those of all prompts)"
        )
    tokenizer = trainer.processing_class
    ends = set(turn_end_ids(tokenizer)) - set(trainer.eos_token_ids)
    if ends:
        named = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
        notes.append(
            f"the policy's chat template ends a turn with {named}, at which no completion stops: "
            "neither the tokenizer's EOS nor the generation config names it"
        )
    return notes


def _lora(model: PolicyArguments) -> Any:
    if not model.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise CompanionError("LoRA needs the package peft", "pip install peft") from error
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules or "all-linear",
    )
