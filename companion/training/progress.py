"""A progress bar that holds the latest figures, and one line for each look at held-out pairs.

Chapter 4.
"""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ProgressCallback


class TrainingProgress(ProgressCallback):
    """In place of transformers' callback, which prints a dictionary for every log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show training figures in the bar and held-out figures in a line."""
        bar = self.training_bar
        if bar is None or not logs:
            return
        if "loss" in logs:
            bar.set_postfix(
                {name: f"{logs[name]:.3f}" for name in ("loss", "accuracy") if name in logs}
            )
        for key in [key for key in logs if key.endswith("_accuracy")]:
            name = key.removesuffix("accuracy")
            loss = logs.get(name + "nll", logs.get(name + "loss", float("nan")))
            counts = [k for k in logs if k.startswith(name + "num_")]
            counted = "".join(f", {logs[k]:,.0f} {k.removeprefix(name + 'num_')}" for k in counts)
            bar.write(
                f"step {state.global_step:>6,}  held out{_which(name)}: "
                f"accuracy {logs[key]:.3f}, loss {loss:.3f} nats{counted}"
            )


def _which(prefix: str) -> str:
    """The name of one of several evaluation sets: 'eval_hard_' is the set 'hard'."""
    inner = prefix.removeprefix("eval_").strip("_")
    return f" ({inner})" if inner else ""
