"""Making the tutor base: the tokenizer and the small Qwen3 that ship in ``companion/assets``.

Run by ``companion make-base``. The text is drawn without end from
:mod:`companion.tutor.text`, so nothing is seen twice and nothing can be overfitted. Feedback
weighs more than the solution, and the prompt nothing: capacity goes to knowing whether a solution
is right (see that module for why). Chapter 4.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from companion.tutor.gold import grade
from companion.tutor.solutions import draw_solution
from companion.tutor.text import (
    ASSISTANT,
    BOS,
    CHAT_TEMPLATE,
    END,
    EOS,
    JUDGE_PROMPT,
    PAD,
    SPECIAL_TOKENS,
    SYSTEM,
    USER,
    asked,
    draw_document,
)
from companion.tutor.world import MAX_NUMBER, draw_problem

#: The folder of the base that ships with the package.
TUTOR_BASE = Path(__file__).parents[1] / "assets" / "tutor-base"
#: Words with their leading space, whole numbers with theirs, runs of signs, white space.
_PRE_TOKENS = r" ?\p{N}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"


@dataclass(frozen=True)
class BaseConfig:
    """How the tutor base is made. The defaults made the one that ships."""

    vocab_size: int = 700  #: at most; the tutor's words need fewer
    hidden_size: int = 128
    intermediate_size: int = 224
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    steps: int = 5_000
    tokens_per_step: int = 4_096  #: padded tokens
    micro_batches: int = 4  #: of a step
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    #: of a token of feedback or of a judge's letter; a solution's has 1
    feedback_weight: float = 2.0
    verdict_weight: float = 10.0  #: of a judge's letter, and of the token that is predicted at EOS
    seed: int = 0
    #: 2.7 times faster on one core once compiled (a minute); needs a C compiler
    compile: bool = True


def make_tokenizer(config: BaseConfig) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer; BOS, EOS and pad differ, and a number is one token."""
    rng = random.Random(f"tokenizer/{config.seed}")
    texts = ["".join(t for t, _ in draw_document(rng)) for _ in range(4_000)]
    texts += [f" {number}" for number in range(MAX_NUMBER + 1) for _ in range(400)]
    for special in SPECIAL_TOKENS:
        texts = [text.replace(special, "\n") for text in texts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # plain text gets a BOS; the template writes its own
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def make_model(config: BaseConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A freshly initialised model of the shape of ``config``."""
    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
    )


def _encode(
    tokenizer: Any, config: BaseConfig, rng: random.Random, n: int, progress: float = 1.0
) -> list[tuple[list[int], list[float]]]:
    """Token ids and weights of ``n`` documents. Pieces end in a special token or before a space or
    a line break, so tokenising them one by one gives the ids of the whole."""
    documents = [draw_document(rng, progress) for _ in range(n)]
    texts = [text for document in documents for text, _ in document]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    result = []
    for document in documents:
        ids: list[int] = []
        weights: list[float] = []
        for text, part in document:
            piece = next(encoded)
            ids += piece
            weight = {"prompt": 0.0, "solution": 1.0, "feedback": config.feedback_weight}[part]
            weights += [weight] * len(piece)
            if part == "feedback" and text.endswith((EOS, "A", "B")):
                weights[len(ids) - len(piece)] = config.verdict_weight
        result.append((ids, weights))
    return result


def _batches(
    tokenizer: Any, config: BaseConfig, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of similar lengths, without end: sorted within a window, then shuffled.

    Token ids (int64) and the weights of predicting them (float32; 0 for prompts and padding),
    ``[B, T]`` each.
    """
    per_batch = config.tokens_per_step // config.micro_batches
    given = 0
    while True:
        progress = min(1.0, given / config.micro_batches / config.steps)
        window = _encode(tokenizer, config, rng, 1024, progress)
        window = sorted(window, key=lambda item: len(item[0]))[::-1]
        batches = []
        while window:
            n_rows = max(1, per_batch // len(window[0][0]))
            ids, weights = zip(*window[:n_rows], strict=True)
            del window[:n_rows]
            padded_ids = pad_sequence(
                [torch.tensor(row) for row in ids], True, tokenizer.pad_token_id
            )
            batches.append((padded_ids, pad_sequence([torch.tensor(row) for row in weights], True)))
        rng.shuffle(batches)
        given += len(batches)
        yield from batches


def _learning_rate(config: BaseConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_base(
    config: BaseConfig,
    output_dir: str | Path,
    *,
    log_every: int = 500,
    n_measured: int = 2_000,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the base and save it with its tokenizer and ``base.json`` (config and figures).

    Parameters
    ----------
    config : BaseConfig
    output_dir : path
    log_every : int
        Steps between two lines of the log, each with a measurement on 200 problems.
    n_measured : int
        Fresh problems that the figures are measured on at the end.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    dict
        What :func:`measure_base` measured at the end, with the loss curve under ``"log"``.
    """
    output = Path(output_dir)
    tokenizer = make_tokenizer(config)
    tokenizer.save_pretrained(output)
    model = make_model(config, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        fused=True,
    )
    model.set_attn_implementation("eager")  # with bf16 on a CPU faster than sdpa at this size
    forward = torch.compile(model, dynamic=True) if config.compile else model
    batches = _batches(tokenizer, config, random.Random(f"text/{config.seed}"))
    log: list[dict[str, float]] = []
    start, seen = time.time(), 0
    model.train()
    for step in (bar := tqdm(range(config.steps), desc="make-base", disable=not progress)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        # Micro-batches are of one length each, hence mostly of one kind of document; several make a
        # step, else the kinds pull the model to and fro.
        parts = [next(batches) for _ in range(config.micro_batches)]
        total = sum(weights[:, 1:].sum().item() for _, weights in parts)
        mean = 0.0
        for ids, weights in parts:
            # Right padding needs no mask in a causal model: no real token sees a pad.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = forward(input_ids=ids, use_cache=False).logits
            weights = weights[:, 1:].reshape(-1)
            kept = weights.nonzero().squeeze(1)
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1])[kept].float(),
                ids[:, 1:].reshape(-1)[kept],
                reduction="none",
            )
            loss = (losses * weights[kept]).sum() / total
            loss.backward()
            mean += loss.item()
            seen += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % log_every == 0 or step + 1 == config.steps:
            figures = measure_base(model, tokenizer, n=200, seed=1)
            model.save_pretrained(output)
            log.append({"step": step + 1, "tokens": seen, "loss": mean, **figures})
            shown = {name: round(value, 4) for name, value in log[-1].items()}
            bar.write(json.dumps(shown | {"s": round(time.time() - start)}))
    model.save_pretrained(output)
    figures = measure_base(model, tokenizer, n=n_measured, seed=2)
    record = {"config": asdict(config), "figures": figures, "log": log}
    (output / "base.json").write_text(json.dumps(record, indent=1) + "\n")
    return figures | {"log": log}


@torch.inference_mode()
def measure_base(model: Any, tokenizer: Any, *, n: int, seed: int) -> dict[str, float]:
    """What the base knows, on ``n`` fresh problems.

    Returns
    -------
    dict of float
        ``greedy`` and ``sampled``: share of right answers when it solves the problems;
        ``verdict``: share of solutions whose verdict it knows at EOS (the larger of ``Right`` and
        ``Wrong``); ``judge``: share of pairs with different r* in which its letter is the better's.
    """
    was_training = model.training
    model.eval()
    rng = random.Random(f"measure/{seed}")
    problems = [draw_problem(rng) for _ in range(n)]
    figures = {}
    for name, sample in (("greedy", False), ("sampled", True)):
        torch.manual_seed(seed)
        texts = generate(model, tokenizer, [p.prompt for p in problems], sample=sample)
        right = [grade(p, t).correct for p, t in zip(problems, texts, strict=True)]
        figures[name] = sum(right) / n
    solutions = [draw_solution(rng, problem) for problem in problems]
    texts = [BOS + asked(s.problem.prompt) + s.text + EOS for s in solutions]
    said = _prefers(model, tokenizer, texts, "Right", "Wrong")
    truth = torch.tensor([grade(s.problem, s.text).correct for s in solutions])
    figures["verdict"] = (said == truth).double().mean().item()
    questions, better = [], []
    for problem, solution in zip(problems, solutions, strict=True):
        other = draw_solution(rng, problem)
        gap = grade(problem, solution.text).reward - grade(problem, other.text).reward
        if gap != 0:
            content = JUDGE_PROMPT.format(prompt=problem.prompt, a=solution.text, b=other.text)
            questions.append(BOS + asked(content))
            better.append(gap > 0)
    said = _prefers(model, tokenizer, questions, "A", "B")
    figures["judge"] = (said == torch.tensor(better)).double().mean().item()
    model.train(was_training)
    return figures


def _prefers(model: Any, tokenizer: Any, texts: list[str], one: str, other: str) -> torch.Tensor:
    """[B] bool: whether after each text the token ``one`` is likelier than the ``other``."""
    rows = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            texts[start : start + 64], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
        last = batch["attention_mask"].sum(1) - 1
        rows.append(model.lm_head(hidden[torch.arange(len(last)), last]).float())
    logits = torch.cat(rows)[:, tokenizer.convert_tokens_to_ids([one, other])]
    return logits[:, 0] > logits[:, 1]


def generate(model: Any, tokenizer: Any, prompts: list[str], *, sample: bool) -> list[str]:
    """Complete user prompts with the base, greedily or at temperature 1."""
    texts: list[str] = []
    for start in range(0, len(prompts), 128):
        messages = [[{"role": "user", "content": p}] for p in prompts[start : start + 128]]
        batch = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"padding_side": "left"},
        )
        output = model.generate(
            **batch, do_sample=sample, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=96, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new = output[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts
