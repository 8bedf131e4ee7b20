"""What a training run takes on each rank, from the model's configuration alone. Chapter 8.

A step of the companion's own forward runs forth and back on fake tensors, which have shapes and no
data, and a dispatch mode counts what is alive at its peak. So a plan knows the packed attention,
the pruned last layer, checkpointing and whatever a new architecture keeps, without a table of
constants. Two and three layers are traced, since the others take as much; what DDP, ZeRO and FSDP
make of the parts is arithmetic.

What was tried, and lacks: ``MemTracker`` of PyTorch 2.13 counts the same on the same fake model,
but hooks every parameter, frozen ones too, which raises with LoRA, and takes ten times as
long; ``FSDPMemTracker`` wants a process group and a model that is sharded already;
``RuntimeEstimator`` benchmarks on a GPU that is there; DeepSpeed's
``estimate_zero3_model_states_mem_needs`` leaves the activations out, which are most of it at the
companion's batches, and knows no frozen base; ``accelerate estimate-memory`` asks the hub, and
takes four times the weights for all of it.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from companion.engine import pack, pad_batch, plan_trees
from companion.engine.attention import packing_obstacle
from companion.engine.devices import cudas_path
from companion.errors import CompanionError, ModelError
from companion.models.checkpoint import disable_dropout, load_config
from companion.models.head import install_head
from companion.models.lora import apply_lora
from companion.models.reward_model import RewardModel
from companion.training.forward import forward_scores, forward_tokens, install_forward

Strategy = Literal["auto", "ddp", "zero2", "zero3", "fsdp2"]
GIB = 2**30

_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
_LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256}
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
#: shapes of well-known bases, from their public ``config.json``: a plan needs no network
SHAPES: Mapping[str, Mapping[str, Any]] = {
    name: {**family, **dict(zip(_SHAPE, shape, strict=True))}
    for name, family, shape in (
        ("Qwen/Qwen3-0.6B", _QWEN3, (1024, 3072, 28, 16)),
        ("Qwen/Qwen3-1.7B", _QWEN3, (2048, 6144, 28, 16)),
        ("Qwen/Qwen3-4B", _QWEN3, (2560, 9728, 36, 32)),
        ("Qwen/Qwen3-8B", _QWEN3, (4096, 12288, 36, 32)),
        ("Qwen/Qwen3-14B", _QWEN3, (5120, 17408, 40, 40)),
        ("Qwen/Qwen3-32B", _QWEN3, (5120, 25600, 64, 64)),
        ("meta-llama/Llama-3.1-8B", _LLAMA, (4096, 14336, 32, 32)),
        ("meta-llama/Llama-3.1-70B", _LLAMA, (8192, 28672, 80, 64)),
        (
            "Qwen/Qwen2.5-72B",
            {"model_type": "qwen2", "num_key_value_heads": 8, "vocab_size": 152064},
            (8192, 29568, 80, 64),
        ),
    )
}


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of each rank at the peak of a step, and how long the run takes. Chapter 8.

    Attributes
    ----------
    model : str
    strategy : {"single", "ddp", "zero2", "zero3", "fsdp2"}
    gpus, tokens, length : int
        Ranks; tokens of one forward, which are computed, padding included; tokens of a text.
    packing, checkpointing : bool
    batch, accumulation : int
        Rows of a rank in a micro-batch, and micro-batches of a step.
    n_parameters, n_trained : int
        Of the whole model, and those of them that are trained.
    parameters, gradients, optimizer, activations, other : int
        Bytes. What the optimizer holds includes float32 copies of half-precision weights.
        Activations: what the forward keeps for the backward, casts of weights by autocast, and what
        the backward holds for a moment. Other: weights gathered from the ranks, and buckets.
    overlap : int
        Bytes that gradients and activations never take at the same time, since a step of a single
        micro-batch makes the former while it gives the latter back. 0 with accumulation.
    gpu_memory : int
        Bytes of a GPU that a plan may use.
    steps, run_tokens : int or None
        Of the run; None without a number of rows.
    seconds, cost : float or None
        None without a peak, or a price.
    notes : tuple of str
    """

    model: str
    strategy: str
    gpus: int
    tokens: int
    length: int
    packing: bool
    checkpointing: bool
    batch: int
    accumulation: int
    n_parameters: int
    n_trained: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    other: int
    overlap: int
    gpu_memory: int
    steps: int | None = None
    run_tokens: int | None = None
    seconds: float | None = None
    cost: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of a rank at the peak."""
        held = self.parameters + self.gradients + self.optimizer
        return held + self.activations + self.other - self.overlap

    @property
    def fits(self) -> bool:
        """Whether that is within ``gpu_memory``."""
        return self.total <= self.gpu_memory

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total": self.total, "fits": self.fits}

    def __str__(self) -> str:
        how = "packed" if self.packing else "padded"
        again = ", each layer computed twice" if self.checkpointing else ""
        lines = [
            f"{self.model}: {self.n_parameters / 1e9:.2f}B parameters, "
            f"{self.n_trained / 1e9:.2f}B trained; {self.gpus} × {self.strategy}",
            f"{self.tokens:,} tokens in a forward, {how}{again}; {self.batch} rows × "
            f"{self.accumulation} micro-batches × {self.gpus} ranks a step",
        ]
        for name in ("parameters", "gradients", "optimizer", "activations", "other"):
            lines.append(f"  {name:<12}{getattr(self, name) / GIB:8.1f} GiB a rank")
        if self.overlap:
            lines.append(f"  {'not at once':<12}{-self.overlap / GIB:8.1f}")
        verdict = "fits" if self.fits else "does not fit"
        lines.append(
            f"  {'total':<12}{self.total / GIB:8.1f} GiB a rank, of {self.gpu_memory / GIB:.0f}: "
            f"{verdict}"
        )
        if self.steps is not None:
            lines.append(f"{self.steps:,} steps")
        if self.run_tokens is not None:
            lines[-1] += f", {self.run_tokens:,} tokens"
        if self.seconds is not None:
            hours = self.seconds / 3600
            lines.append(f"{hours:,.1f} hours, {hours * self.gpus:,.1f} GPU hours")
        if self.cost is not None:
            lines[-1] += f", cost {self.cost:,.2f}"
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan_training(
    model: Any,
    *,
    gpus: int = 1,
    strategy: Strategy = "auto",
    tokens: int | None = None,
    length: int = 2048,
    texts: int = 2,
    packing: bool = True,
    checkpointing: bool = False,
    bf16: bool = True,
    dtype: str = "float32",
    lora: Mapping[str, Any] | None = None,
    labels: int | None = None,
    batch: int = 8,
    accumulation: int = 8,
    gpu_memory: float = 80.0,
    rows: int | None = None,
    mean_tokens: float | None = None,
    epochs: float = 1.0,
    peak: float | None = None,
    mfu: float = 0.4,
    price: float | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> TrainingPlan:
    """What a run takes: bytes a rank, steps, tokens, seconds and cost. Chapter 8.

    Parameters
    ----------
    model : str or transformers.PretrainedConfig
        A folder, a hub id (of :data:`SHAPES` without a network), or a configuration.
    gpus : int
    strategy : {"auto", "ddp", "zero2", "zero3", "fsdp2"}
        ``auto``: the first of ddp, zero2 and zero3 that fits.
    tokens : int, optional
        Most tokens of one forward, padding included if there is any. Default: those of a
        micro-batch of rows of the greatest length; ``micro_batch_tokens`` sets fewer.
    length : int
        Most tokens of a text (``max_length``).
    texts : int
        Of a row: 2 of a pair.
    packing, checkpointing, bf16 : bool
    dtype : {"float32", "bfloat16", "float16"}
        Of the weights as they are loaded.
    lora : mapping, optional
        Arguments of :func:`companion.models.apply_lora`.
    labels : int, optional
        Outputs of the head for every token; None for one score a text.
    batch, accumulation : int
        Rows of a rank in a micro-batch, micro-batches of a step.
    gpu_memory : float
        GiB of a GPU.
    rows : int, optional
        Of training, for steps and time.
    mean_tokens : float, optional
        Of a row, as many as are computed, for the time.
    epochs : float
    peak : float, optional
        TFLOP/s of a GPU, in the precision of the run.
    mfu : float
        The share of it that matrix products reach; the second forward of checkpointing is work.
    price : float, optional
        Of a GPU's hour, in any currency.
    device : {"cuda", "cpu"}
        Whose kernels to plan for.

    Raises
    ------
    ModelError
        If the model has no configuration here, or no scoring head in transformers.
    CompanionError
        For numbers that make no sense.
    """
    _check_positive(
        gpus=gpus, tokens=tokens, length=length, texts=texts, batch=batch,
        accumulation=accumulation, gpu_memory=gpu_memory, rows=rows, mean_tokens=mean_tokens,
        epochs=epochs, peak=peak, mfu=mfu, price=price,
    )  # fmt: skip
    if strategy not in get_args(Strategy):
        raise CompanionError(
            f"strategy is {strategy!r}", f"take one of: {', '.join(get_args(Strategy))}"
        )
    config = read_config(model) if isinstance(model, str) else model
    if strategy == "auto":
        wanted: Sequence[str] = ("single",) if gpus == 1 else ("ddp", "zero2", "zero3")
    else:
        wanted = ("single",) if gpus == 1 and strategy == "ddp" else (strategy,)
    text = config.get_text_config()
    traces: dict[bool, tuple[_Trace, str | None]] = {}
    whole = batch * texts * length
    tokens = whole if tokens is None else min(tokens, whole)
    parts = accumulation > 1 or tokens < whole
    for each in wanted:
        cast = each in ("zero2", "zero3", "fsdp2") and bf16
        if cast not in traces:
            traces[cast] = _trace(
                config,
                tokens,
                length,
                packing=packing,
                checkpointing=checkpointing,
                dtype="bfloat16" if cast else dtype,
                autocast=bf16 and not cast,
                lora=lora,
                labels=labels,
                device=device,
            )
        trace, obstacle = traces[cast]
        plan = TrainingPlan(
            model=_name(model),
            strategy=each,
            gpus=gpus,
            tokens=tokens,
            length=length,
            packing=packing and obstacle is None,
            checkpointing=checkpointing,
            batch=batch,
            accumulation=accumulation,
            n_parameters=trace.n_parameters,
            n_trained=trace.n_trained,
            gpu_memory=int(gpu_memory * GIB),
            **_shares(
                each, trace, gpus, parts=parts, bf16=bf16, hidden=text.hidden_size, device=device
            ),
            notes=() if obstacle is None else (f"padded, not packed: {obstacle}",),
        )
        if plan.fits:
            break
    if rows is None:
        return plan
    plan = replace(plan, steps=math.ceil(math.ceil(rows / (batch * accumulation * gpus)) * epochs))
    if mean_tokens is None:
        return plan
    run_tokens = round(rows * mean_tokens * epochs)
    # a forward, and a backward for the inputs and for the weights that are trained
    passes = 2 + checkpointing + trace.n_trained / trace.n_parameters
    seconds, cost = _time(
        passes * run_tokens * _forward_flops(config, trace, min(length, mean_tokens)),
        gpus, peak, mfu, price,
    )  # fmt: skip
    return replace(plan, run_tokens=run_tokens, seconds=seconds, cost=cost)


@dataclass(frozen=True)
class ScoringPlan:
    """How long a corpus takes to be scored, and what that costs. Chapter 8.

    Attributes
    ----------
    model : str
    gpus, rows, tokens : int
        Of the corpus.
    parameters : int
        Bytes of the weights on each GPU, in half precision.
    seconds, gpu_hours : float
    cost : float or None
        None without a price.
    """

    model: str
    gpus: int
    rows: int
    tokens: int
    parameters: int
    seconds: float
    gpu_hours: float
    cost: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        price = "" if self.cost is None else f", cost {self.cost:,.2f}"
        return (
            f"{self.model}: {self.parameters / GIB:.1f} GiB of weights on each of {self.gpus} "
            "GPUs\n"
            f"{self.rows:,} rows, {self.tokens:,} tokens: {self.seconds / 3600:,.2f} hours, "
            f"{self.gpu_hours:,.2f} GPU hours{price}"
        )


def plan_scoring(
    model: Any,
    *,
    rows: int,
    mean_tokens: float,
    peak: float,
    mfu: float = 0.4,
    gpus: int = 1,
    price: float | None = None,
) -> ScoringPlan:
    """How long a corpus takes to be scored by so many GPUs, each with the whole model. Chapter 8.

    Parameters
    ----------
    model : str or transformers.PretrainedConfig
    rows : int
    mean_tokens : float
        Of a row, as many as are computed: a prompt that rows share counts once.
    peak : float
        TFLOP/s of a GPU.
    mfu : float
        The share of it that is reached.
    gpus : int
    price : float, optional
        Of a GPU's hour.

    Raises
    ------
    ModelError, CompanionError
        As :func:`plan_training`.
    """
    _check_positive(rows=rows, mean_tokens=mean_tokens, peak=peak, mfu=mfu, gpus=gpus, price=price)
    config = read_config(model) if isinstance(model, str) else model
    trace, _ = _trace(config)
    tokens = round(rows * mean_tokens)
    seconds, cost = _time(
        tokens * _forward_flops(config, trace, mean_tokens), gpus, peak, mfu, price
    )
    assert seconds is not None
    return ScoringPlan(
        model=_name(model),
        gpus=gpus,
        rows=rows,
        tokens=tokens,
        parameters=2 * trace.n_parameters,
        seconds=seconds,
        gpu_hours=seconds * gpus / 3600,
        cost=cost,
    )


def _forward_flops(config: Any, trace: _Trace, length: float) -> float:
    """Of a token in a text of that length: two for each weight that it meets, and attention."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    # products with keys and with values, of half the text on average
    attention = 2 * text.num_hidden_layers * width * length
    return float(2 * (trace.n_parameters - trace.n_embeddings) + attention)


def _time(
    flops: float, gpus: int, peak: float | None, mfu: float, price: float | None
) -> tuple[float | None, float | None]:
    """Seconds, and cost."""
    if peak is None:
        return None, None
    seconds = flops / (gpus * peak * 1e12 * mfu)
    return seconds, None if price is None else seconds / 3600 * gpus * price


def _name(model: Any) -> str:
    return str(model if isinstance(model, str) else model.name_or_path or model.model_type)


def _check_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise CompanionError(f"{name} is {value}", "give a positive number")


def read_config(name: str) -> Any:
    """The configuration of a folder, of one of :data:`SHAPES`, or of a hub id.

    Raises
    ------
    ModelError
        If there is none.
    """
    from transformers import AutoConfig

    if name in SHAPES and not Path(name).is_dir():
        shape = dict(SHAPES[name])
        return AutoConfig.for_model(shape.pop("model_type"), name_or_path=name, **shape)
    try:
        return load_config(name)
    except ModelError as error:
        raise ModelError(
            error.what,
            "give a folder with config.json, a hub id while online, or one whose shape is known: "
            f"{', '.join(SHAPES)}",
        ) from error


# ---------------------------------------------------------------------- what a rank holds

#: DeepSpeed's defaults where recipes/deepspeed leaves them: elements of a bucket of gradients, and
#: of weights that stay gathered
_BUCKET, _LIVE = 500_000_000, 1_000_000_000


def _shares(
    strategy: str, trace: _Trace, n: int, *, parts: bool, bf16: bool, hidden: int, device: str
) -> dict[str, int]:
    """Bytes of a rank, by the strategy, of what the whole model takes."""
    parameters, gradients = trace.parameters, trace.gradients
    optimizer, other = 2 * gradients, 0  # AdamW's moments, in the dtype of the weights
    size = 2 if bf16 else 4
    if strategy == "ddp":
        other = gradients  # the buckets in which they are exchanged are copies
    elif strategy in ("zero2", "zero3"):
        # float32 copies of the trained weights, and their moments, whatever the weights are in
        optimizer = 12 * trace.n_trained // n
        bucket = _BUCKET
        if strategy == "zero3":
            bucket = hidden * hidden
            other = size * min(_LIVE, trace.n_parameters)
            parameters //= n
        gradients //= n
        # one fills up while the other is exchanged, which gloo cannot do
        other += (2 if device == "cuda" else 1) * size * bucket
    elif strategy == "fsdp2":
        # shards of what is trained are in float32; layers are gathered as they are computed with
        optimizer = 8 * trace.n_trained // n
        parameters = (parameters + (4 - size) * trace.n_trained) // n
        # without an exchange, gradients of a step's earlier parts stay whole
        gradients = gradients if parts else 4 * trace.n_trained // n
        # and two layers' gradients are copied in float32: one is sent while the next is filled
        other = size * (trace.n_embeddings + 3 * trace.n_layer) + 8 * trace.n_layer
    if strategy == "zero3":
        parts = True  # the shard of the gradients is one tensor, which is never given back
    # A backward gives back what grows with the layers while their gradients come. What does not
    # grow, the layer at hand, is there all the time; gradients of the embeddings come at its end.
    layers = gradients * trace.in_layers // max(1, trace.gradients)
    fixed = trace.activations - trace.growing
    at_once = max(fixed + max(trace.growing, layers), gradients)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": trace.activations,
        "other": other,
        "overlap": 0 if parts else trace.activations + gradients - at_once,
    }


@dataclass(frozen=True)
class _Trace:
    """A process that holds the whole model: bytes, and numbers of parameters."""

    n_parameters: int
    n_trained: int
    #: those of a layer, and those that no matrix product of all tokens meets
    n_layer: int
    n_embeddings: int
    parameters: int
    gradients: int
    activations: int
    #: bytes of the activations, and of the gradients, that there are more of with more layers
    growing: int = 0
    in_layers: int = 0

    @classmethod
    def of(cls, model: Any, activations: int) -> _Trace:
        """Of a model, and what its step was measured to take."""
        named = dict(model.named_parameters())
        trained = [p for p in named.values() if p.requires_grad]
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        return cls(
            n_parameters=sum(p.numel() for p in named.values()),
            n_trained=sum(p.numel() for p in trained),
            n_layer=sum(p.numel() for name, p in named.items() if ".layers.0." in name),
            n_embeddings=sum(p.numel() for p in named.values() if id(p) in embeddings),
            parameters=sum(p.nbytes for p in named.values()),
            gradients=sum(p.nbytes for p in trained),
            activations=activations,
        )

    def extrapolated(self, other: _Trace, layers: int) -> _Trace:
        """Of `layers` layers: `self` has two, `other` three, and all grow by as much a layer."""
        two, three = asdict(self), asdict(other)
        grown = {k: two[k] + (layers - 2) * (three[k] - two[k]) for k in two}
        grown["growing"] = layers * (three["activations"] - two["activations"])
        grown["in_layers"] = layers * (three["gradients"] - two["gradients"])
        return _Trace(**grown)


#: a trace takes a second, and plans of one model differ in little else than strategy and GPUs
_TRACED: dict[tuple[Any, ...], tuple[_Trace, str | None]] = {}


def _trace(
    config: Any,
    tokens: int | None = None,
    length: int = 1,
    *,
    packing: bool = True,
    checkpointing: bool = False,
    dtype: str = "float32",
    autocast: bool = False,
    lora: Mapping[str, Any] | None = None,
    labels: int | None = None,
    device: str = "cuda",
) -> tuple[_Trace, str | None]:
    """What a step takes, and why its texts cannot be packed if they were to be.

    Without `tokens` the model alone.
    """
    key = (
        *(config.to_json_string(), tokens, length, packing, checkpointing, dtype, autocast),
        *(repr(lora), labels, device),
    )
    if key in _TRACED:
        return _TRACED[key]
    layers = config.get_text_config().num_hidden_layers
    found, obstacle = [], None
    for count in (2, 3) if layers > 3 else (layers,):
        model = _fake_model(config, count, dtype, labels, lora)
        obstacle = packing_obstacle(model, training=True) if packing else None
        peak = 0
        if tokens is not None:
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
            batch = _batch(tokens, length, packing=packing and obstacle is None)
            with cudas_path() if device == "cuda" else nullcontext():
                peak = _peak_of_step(model, batch, autocast=autocast)
        found.append(_Trace.of(model, peak))
    whole = found[0].extrapolated(found[1], layers) if len(found) > 1 else found[0]
    _TRACED[key] = whole, obstacle
    return whole, obstacle


def _fake_model(
    config: Any, layers: int, dtype: str, labels: int | None, lora: Mapping[str, Any] | None
) -> Any:
    """The model with so many layers, its weights without data, ready to train."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    config.num_labels = labels or 1
    disable_dropout(config)
    auto: Any = (
        AutoModelForSequenceClassification if labels is None else AutoModelForTokenClassification
    )
    with torch.device("meta"):
        try:
            model = auto.from_config(config, dtype=getattr(torch, dtype))
        except ValueError as error:
            raise ModelError(
                f"{config.model_type}: transformers has no model of this type with a head",
                "give a decoder that can be a reward model",
            ) from error
        install_head(model).to(torch.float32)
        if lora is not None:
            nothing: Any = None
            model = apply_lora(RewardModel(model, nothing, nothing), **lora).model
    # What meets a weight becomes fake. Token ids and places are real, so that the host reads them.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
                    module._parameters[name] = fake
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
    install_forward(model, forward_scores if labels is None else forward_tokens)
    return model.train()


def _batch(tokens: int, length: int, *, packing: bool) -> dict[str, Any]:
    """So many tokens in texts of a length, none of which begins like another."""
    lengths = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
    ids = [[2 + i, *[1] * (size - 1)] for i, size in enumerate(lengths)]
    if packing:
        packed = pack(ids, plan_trees(ids))
        return {"input_ids": packed.input_ids, "packed": packed}
    return dict(pad_batch(ids, 0))


class Alive(TorchDispatchMode):
    """Counts bytes that are alive, of what is made inside its block.

    Parameters
    ----------
    known : iterable of Tensor
        Tensors that were there before, which do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen[storage] = True
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def _peak_of_step(model: Any, batch: Mapping[str, Any], *, autocast: bool) -> int:
    """Bytes alive at the peak of a forward and backward, beside weights and gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    held = [*model.parameters(), *model.buffers()]
    held += [p.grad for p in held if p.grad is not None]
    with Alive(held) as alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**batch).logits
        logits.square().mean().backward()
    return alive.peak
