"""Mutated rows, files, flags and settings for every command, and what must come of them."""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import importlib
import io
import json
import math
import random
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from companion.cli.main import COMMANDS, main

#: what nobody would write in a field
HORRORS: tuple[Any, ...] = (
    *(None, "", " ", "\n", "\0", "\u2028", "x" * 4000, "<|end|>", "</s>", "{{ 1 // 0 }}", "$x_"),
    *(0, -1, 1, 2**70, 1e300, -0.0, math.nan, math.inf, True, False),
    *([], {}, [[]], [None], [{}], {"a": 1}, ["yes", "no"], [1, 2, 3], [True, None, "x"]),
    [{"role": "user", "content": "Ana"}],
    [{"role": "assistant", "content": "yes"}],
    [{"role": "assistant", "content": None}],
    [{"role": "nobody", "content": "yes"}],
    [{"role": "user", "content": "Ana"}, {"role": "assistant", "content": [{"type": "image"}]}],
    [{"content": "yes"}],
    {"role": "assistant", "content": "yes"},
)
#: the same as the text of a line's JSON, for what json.dumps does not write
RAW: tuple[str, ...] = (
    '"\\ud800"',
    "9" * 5000,
    "-" + "9" * 400,
    "1e999",
    "[" * 40_000 + "]" * 40_000,
    '{"a":' * 40_000 + "1" + "}" * 40_000,
    '"\\udc00\\ud800"',
)
#: lines that are none
LINES: tuple[bytes, ...] = (
    *(b"", b"   ", b"{", b"[]", b"5", b"null", b'"', b"\xff\xfe", b"{}", b'{"a": 1} {"b": 2}'),
    *(b"\xef\xbb\xbf{}", b"NaN", b'"Ana"', b"[1, 2", b"'a'", b"{" * 50_000, b"\0\0"),
)
#: whole files
FILES: tuple[bytes, ...] = (
    *(b"", b"\n\n", b"\xff\xfe\x00\x01", b"PAR1", b"\x1f\x8b\x08", b"a,b\n1\n", b"[", b"[]", b"\0"),
    gzip.compress(b'{"prompt": "Ana"}\n')[:-6],
)
#: values of flags and settings
VALUES: tuple[str, ...] = (
    *("0", "-1", "1", "1.5", "nan", "inf", "-inf", "1e400", "9" * 30, "", " ", "nope", "true"),
    *("None", "[]", "{}", "a=b", "=", "a=", "/dev/null", "/nowhere/x", "\ud7ff", "-", "{", "0x1"),
)


def _rows(kind: str) -> list[dict[str, Any]]:
    def talk(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    made: list[dict[str, Any]] = []
    for i in range(12):
        ask, good, bad = f"Ana has {i} boxes", f"the answer is {i}", "no idea thanks"
        chat = i % 2 if kind.endswith("chat") else 0
        prompt: Any = talk("user", ask) if chat else ask
        if kind.startswith("pairs"):
            sides = (talk("assistant", good), talk("assistant", bad)) if chat else (good, bad)
            made.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
        elif kind == "margins":
            made.append({"prompt": ask, "chosen": good, "rejected": bad, "margin": 1.5, "id": i})
        elif kind == "verdicts":
            made.append({"prompt": ask, "a": good, "b": bad, "preference": "ab"[i % 2]})
        elif kind == "rankings":
            made.append({"prompt": ask, "completions": [good, bad, "yes"], "ranks": [1, 3, 2]})
        elif kind == "outcomes":
            made.append({"prompt": ask, "completion": good, "label": bool(i % 2)})
        elif kind == "steps":
            made.append({"prompt": ask, "completions": [good, bad], "labels": [1, -1]})
        elif kind == "prompts":
            made.append({"prompt": prompt})
        elif kind == "completions":
            made.append({"prompt": ask, "completions": [good, bad, "yes good"]})
        elif kind == "texts":
            made.append({"prompt": ask, "completion": good, "id": i})
        else:
            made.append({"messages": [*talk("user", ask), *talk("assistant", good)], "id": i})
    return made


@dataclass
class Try:
    """One call of the command line, and what is wrong with it."""

    argv: list[str]
    what: str = ""
    source: Path | None = None
    output: Path | None = None
    #: lines (from 1) that were changed; empty if something else was
    changed: list[int] = field(default_factory=list)
    read: list[Any] = field(default_factory=list)


class Fuzzer:
    """Makes calls; `base` and `reward` are folders of toy models."""

    def __init__(self, seed: int, folder: Path, base: Path, reward: Path) -> None:
        self.dice = random.Random(seed)
        self.folder, self.base, self.reward = folder, str(base), str(reward)
        self.flags = {name: _flags(name) for name in COMMANDS if name != "train"}
        self.oracle = Oracle(reward)

    # ------------------------------------------------------------------ what is wrong

    def _mutate(self, value: Any) -> Any:
        """A value with one place in it changed."""
        dice = self.dice
        if isinstance(value, (list, dict)) and value and dice.random() < 0.6:
            value = copy.copy(value)
            key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
            act = dice.random()
            if act < 0.15:
                del value[key]
            elif act < 0.25 and isinstance(value, dict):
                value[dice.choice(["x", "prompt", "text", "score", "tools", ""])] = value.pop(key)
            elif act < 0.3 and isinstance(value, list):
                value.append(value[key])
            else:
                value[key] = self._mutate(value[key])
            return value
        return copy.deepcopy(dice.choice(HORRORS))

    def file(self, kind: str, call: Try) -> Path:
        """Rows of a kind, of which some, or the file itself, were changed."""
        dice, rows = self.dice, _rows(kind)
        lines = [json.dumps(row).encode() for row in rows]
        act = dice.random()
        path = self.folder / f"in.{dice.choice(['jsonl'] * 8 + ['json', 'csv', 'jsonl.gz'])}"
        if act < 0.7:
            for place in dice.sample(range(len(rows)), dice.choice([1, 1, 2])):
                call.changed.append(place + 1)
                how = dice.random()
                if how < 0.75:
                    lines[place] = json.dumps(self._mutate(rows[place])).encode()
                elif how < 0.9:
                    own = dict(rows[place])
                    own[dice.choice(list(own))] = "@@"
                    lines[place] = json.dumps(own).replace('"@@"', dice.choice(RAW)).encode()
                else:
                    lines[place] = dice.choice(LINES)
        content = b"\n".join(lines) + b"\n"
        if act >= 0.9:
            content = dice.choice(FILES)
        elif act >= 0.85:
            flipped = bytearray(content)
            for _ in range(3):
                flipped[dice.randrange(len(flipped))] = dice.randrange(256)
            content = bytes(flipped)
        if path.suffix == ".gz" and act < 0.85:
            content = gzip.compress(content)
        if path.suffix == ".json" and act < 0.7:
            content = b"[" + b",".join(lines) + b"]"
        path.write_bytes(content)
        call.source = path
        call.what += f" {kind} {path.name} lines {call.changed}"
        return path

    def _some_flags(self, command: str, keep: set[str]) -> list[str]:
        """One or two flags of a command, with values that make little sense."""
        words: list[str] = []
        if self.dice.random() < 0.5:
            return words
        known = [flag for flag in self.flags[command] if flag[0] not in keep]
        for name, takes, choices in self.dice.sample(
            known, min(len(known), self.dice.choice([1, 2]))
        ):
            words.append(name)
            if takes:
                words.append(
                    self.dice.choice(VALUES if self.dice.random() < 0.7 or not choices else choices)
                )
        return words

    # ------------------------------------------------------------------ commands

    def draw(self) -> Try:
        """A call."""
        make = self.dice.choices(
            (self._score, self._rank, self._judge, self._evaluate, self._data, self._sample,
             self._compare, self._train, self._others),
            (5, 2, 2, 2, 6, 1, 1, 5, 2),
        )[0]  # fmt: skip
        call: Try = make()
        call.argv = [str(word) for word in call.argv]
        return call

    def _common(self, command: str, kind: str, call: Try, *more: Any) -> list[Any]:
        flag = "--dataset_name" if command == "evaluate" else "--input"
        call.argv = [command, "--model", self.reward, flag, self.file(kind, call), *more]
        keep = {"--model", flag, "--output", "--url", "--engine", "--policy", "--trust_remote_code"}
        call.argv += self._some_flags(command, keep | {"--cache", "--base_url", "--compile"})
        return call.argv

    def _on_error(self) -> list[str]:
        return self.dice.choice([[], ["--on_error", "skip"]])

    def _score(self) -> Try:
        call = Try([], output=self.folder / "out.jsonl")
        kind = self.dice.choice(["texts", "messages", "texts", "pairs"])
        self._common("score", kind, call, "--output", call.output, "--overwrite", *self._on_error())
        return call

    def _rank(self) -> Try:
        call = Try([])
        out = self.folder / "rank.jsonl"
        self._common("rank", "completions", call, "--output", out, "--overwrite", *self._on_error())
        return call

    def _judge(self) -> Try:
        call = Try([])
        kind = self.dice.choice(["pairs", "verdicts", "pairs chat"])
        more = ["--output", self.folder / "judged.jsonl", "--overwrite", "--max_tokens", 2]
        self._common(
            "judge", kind, call, *more, "--template", "{prompt} {a} {b}", *self._on_error()
        )
        call.argv[2] = self.base
        return call

    def _evaluate(self) -> Try:
        call = Try([])
        kind = self.dice.choice(["pairs", "rankings", "pairs chat", "margins"])
        self._common("evaluate", kind, call, "--json", self.folder / "e.json")
        return call

    def _compare(self) -> Try:
        call = Try([])
        data = self.file(self.dice.choice(["texts", "pairs"]), call)
        call.argv = ["compare", self.reward, self.reward, "--data", data]
        keep = {"--data", "--old_url", "--new_url", "--write_reference", "--audits"}
        call.argv += self._some_flags("compare", keep)
        return call

    def _sample(self) -> Try:
        call = Try([])
        rows = self.file("completions", call)
        call.argv = ["sample", rows, "--output", self.folder / "s.jsonl", "--n", 3, "--overwrite"]
        call.argv += [
            *self._some_flags("sample", {"--output", "--url", "--model"}),
            *self._on_error(),
        ]
        return call

    def _data(self) -> Try:
        call = Try([])
        kind = self.dice.choice(
            ["pairs", "pairs chat", "margins", "verdicts", "rankings", "outcomes", "steps",
             "prompts", "prompts chat"]
        )  # fmt: skip
        rows = self.file(kind, call)
        action = self.dice.choice(["check", "describe", "split", "convert"])
        call.argv = ["data", action, rows]
        if action == "split":
            call.argv += ["--output_dir", self.folder / "parts", "--overwrite"]
        if action == "convert":
            name = self.dice.choice(["c.jsonl", "c.csv", "c.parquet", "c.json.gz", "c.txt"])
            call.argv += ["--output", self.folder / name]
        if action != "check":
            call.argv += self._on_error()
        if self.dice.random() < 0.3:
            flag = self.dice.choice(["--limit", "--columns", "--kind", "--split", "--margins"])
            call.argv += [flag, self.dice.choice(VALUES)]
        return call

    def _train(self) -> Try:
        """Rows of every kind, with settings as flags or YAML; a good one trains for a step."""
        call = Try([])
        kinds = {"pairwise": "pairs", "kwise": "rankings", "outcome": "outcomes",
                 "process": "steps", "grpo": "prompts"}  # fmt: skip
        name = self.dice.choice(list(kinds))
        rows = self.file(kinds[name], call)
        call.argv = ["train", name, "--model_name_or_path", self.base, "--dataset_name", rows]
        call.argv += ["--output_dir", self.folder / "trained", "--max_steps", 1, *self._on_error()]
        call.argv += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
        if name == "grpo":
            call.argv += ["--reward_model", self.reward, "--monitor_prompts", 2]
            call.argv += ["--test_prompts", 2, "--max_completion_length", 2]
        else:
            call.argv += ["--eval_fraction", 0.4, "--eval_strategy", "no"]
        if self.dice.random() < 0.7:
            dests = _settings(name)
            picked = self.dice.sample(dests, self.dice.choice([1, 2]))
            if self.dice.random() < 0.5:
                for dest in picked:
                    call.argv += [f"--{dest}", self.dice.choice(VALUES)]
            else:
                lines = [f"{dest}: {self._yaml()}\n" for dest in picked]
                path = self.folder / "c.yaml"
                path.write_text("".join(lines))
                call.argv += ["--config", path]
                call.what += f" {lines}"
            call.changed = []
        return call

    def _yaml(self) -> str:
        return self.dice.choice(
            [
                *("null", "1.5", "true", "[1]", "{a: 1}", "2026-01-01", ".nan", "-1", "0", "nope"),
                *("'1'", "''", "[" * 2000, "!!python/name:os.system", "*a", "&a [*a]", "1e5"),
            ]
        )

    def _others(self) -> Try:
        call = Try([])
        kind = self.dice.choice(["verdicts", "pairs", "texts"])
        rows, state = self.file(kind, call), self.folder / "state.db"
        report = self.folder / "r.html"
        call.argv = list(
            self.dice.choice(
                [
                    ["judge-report", "--input", rows],
                    ["monitor", "init", state, "--model", self.reward, "--reference", rows],
                    ["monitor", "run", rows],
                    ["monitor", "report", rows, "--output", report],
                    ["export", "--model", self.reward, "--engine", "vllm"],
                    ["plan", "--model", self.base, "--max_length", 64],
                    ["compare", "--audits", rows, rows],
                    [
                        "retrain",
                        self.reward,
                        "--data",
                        rows,
                        "--new",
                        rows,
                        "--output",
                        self.folder / "again",
                        "--dry_run",
                    ],
                    ["data", "tutor", "--n", 2, "--output", self.folder / "t.jsonl"],
                ]
            )
        )
        if call.argv[0] in ("plan", "export", "judge-report"):
            call.argv += self._some_flags(str(call.argv[0]), set())
        return call


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The parser of each command and of each of its actions; without those of `train`."""
    for name in COMMANDS:
        if name != "train":
            parser = argparse.ArgumentParser()
            importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
            yield parser
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    yield from action.choices.values()


def _flags(command: str) -> list[tuple[str, bool, list[str]]]:
    """Flags of a command: name, whether it takes a value, what may be chosen."""
    module = importlib.import_module(COMMANDS[command][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return [
        (action.option_strings[-1], action.nargs != 0, [str(one) for one in action.choices or ()])
        for action in parser._actions
        if action.option_strings and "help" not in action.dest
    ]


#: settings whose nonsense needs another machine, the network, or minutes
_LEFT_OUT = re.compile(
    r"deepspeed|fsdp|hub|push|vllm|torch_compile|ray|debug|parallel|jit|xla|trackio|wandb|tpu|local_"
    r"rank|ddp|config$|generat|max_completion|num_train|max_steps|model_name|dataset|output_dir|"
    r"report|full_determinism|tqdm|log_level|dataloader|resume|environment|chat_template_path|"
    r"num_proc|^logging|n_gpu|use_cpu|bf16|fp16|liger|steps_per|num_iter|monitor|test_prompts|"
    r"accelerator|include_|skip_|_scorer|reward_model|tools|rollout|bucket|trust|split"
)


def _settings(kind: str) -> list[str]:
    if kind not in _SETTINGS:
        from dataclasses import fields

        from companion.cli.train import _load

        training = _load(kind)
        _SETTINGS[kind] = [
            own.name
            for cls in (training.data, training.model, training.config)
            for own in fields(cls)
            if own.init and not _LEFT_OUT.search(own.name)
        ]
    return _SETTINGS[kind]


_SETTINGS: dict[str, list[str]] = {}


# ---------------------------------------------------------------------- what must come of it


def run(call: Try) -> tuple[int | None, str, str]:
    """Exit code, what was said, and a traceback, if there is one."""
    out, err, trace = io.StringIO(), io.StringIO(), ""
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(call.argv)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            trace = traceback.format_exc()
    return code, err.getvalue(), trace


def faults(call: Try, oracle: Oracle) -> Iterator[str]:
    """What is not as it must be."""
    code, said, trace = run(call)
    if trace or "Traceback" in said:
        yield trace or said
        return
    if code not in (0, 1, 2):
        yield f"the exit code is {code}"
    if code == 2:
        place = said.find("error: ")
        if place < 0 and "Cure:" not in said and "; " not in said:
            yield f"refused without an error: {said[-300:]!r}"
        line = said[place:].strip().split("\n")[0]
        if len(line) > 2_000:
            yield f"an error of {len(line):,} letters: {line[:300]}"
        of_rows = call.changed and re.search(r"\b(line|row) \d", line)
        if of_rows and "Cure:" not in said:
            yield f"refused without a cure: {line[:300]}"
    if code == 0 and call.output is not None and call.output.exists():
        yield from oracle.differences(call)


class Oracle:
    """Scores by stock transformers, of texts that were rendered here."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def score(self, row: Any) -> float | None:
        """None for a row whose reading is not plain."""
        if not isinstance(row, dict):
            return None
        parts = [row.get("prompt"), row.get("completion")]
        if set(row) <= {"prompt", "completion", "id"} and all(
            isinstance(part, str) and part.strip() for part in parts
        ):
            text = "".join(map(str, parts))
            if re.search("[\ud800-\udfff]", text):
                return None
            ids = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
        elif set(row) <= {"messages", "id"} and _simple(row.get("messages")):
            ids = self.tokenizer.apply_chat_template(row["messages"], return_dict=False)
        else:
            return None
        if len(ids) > 128:
            return None
        with torch.no_grad():
            return float(self.model(torch.tensor([ids])).logits[0, 0])

    def differences(self, call: Try) -> Iterator[str]:
        assert call.source is not None
        assert call.output is not None
        if _OTHER_TEXT & set(call.argv) or ".jsonl" not in call.source.name:
            return
        given = call.source.read_bytes()
        if given.startswith(b"\x1f\x8b"):  # whatever the name says
            given = gzip.decompress(given)
        lines = [line.removeprefix(b"\xef\xbb\xbf") for line in given.split(b"\n") if line.strip()]
        # (not by `splitlines`: a text may hold other ends of lines than files have)
        records = call.output.read_text(encoding="utf-8").split("\n")[:-1]
        if len(records) != len(lines):
            yield f"{len(records)} records of {len(lines)} lines"
            return
        for number, (line, text) in enumerate(zip(lines, records, strict=True)):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            found = json.loads(text).get("score")
            want = self.score(row)
            if want is not None and found is not None and abs(want - found) > 1e-4:
                yield f"row {number}: {found} in place of {want}: {line[:200]!r}"


#: flags by which other texts are scored, or others scored otherwise
_OTHER_TEXT = {"--columns", "--text", "--max_length", "--overlong", "--dtype", "--unterminated"}
_OTHER_TEXT |= {"--completion_field"}


def _simple(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and [m.get("role") for m in messages if isinstance(m, dict)] == ["user", "assistant"]
        and all(set(m) == {"role", "content"} for m in messages)
        and all(isinstance(m["content"], str) and m["content"].strip() for m in messages)
    )
