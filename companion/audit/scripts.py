"""Scripts that show a fault by themselves: transformers and torch, and nothing of ours.

Each prints what is wrong and exits with 1 while it is, 0 once it is mended. Chapter 9.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from companion.scoring.remote import KEY_VARIABLE

if TYPE_CHECKING:
    from companion.audit.local import LocalSubject

_HEAD = '''\
"""{what}

{target}: exits with 1 while it is so.
"""

import sys

import torch
from transformers import {auto}, AutoTokenizer

FOLDER = {folder}
tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
model, loaded = {auto}.from_pretrained(
    FOLDER, output_loading_info=True{dtype}{labels}{trust}
)
model.eval()


def scores(texts, side=tokenizer.padding_side, hidden=0, pad=tokenizer.pad_token_id):
    """Of one batch: padded on a side, the last tokens of the first text hidden by the mask."""
    width = max(map(len, texts))
    rows, masks = [], []
    for text in texts:
        fill = [pad] * (width - len(text))
        mask = [1] * len(text)
        if hidden and text is texts[0]:
            mask[-hidden:] = [0] * hidden
        rows.append(text + fill if side == "right" else fill + text)
        masks.append(mask + [0] * len(fill) if side == "right" else [0] * len(fill) + mask)
    ids, mask = torch.tensor(rows), torch.tensor(masks)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.double()
{read}

'''
_READ_SCALAR = "    return logits.reshape(len(rows), -1)[:, 0].tolist()"
_READ_TOKENS = """\
    last = (torch.arange(width) * mask).argmax(dim=1)  # by the mask: one value a token
    values = logits[torch.arange(len(rows)), last]
    return (values[:, -1] - (values[:, 0] if values.shape[1] > 1 else 0)).tolist()"""


def local_script(subject: LocalSubject, what: str, body: str, **names: Any) -> str:
    """A script for a folder, or for a model that is to be saved first.

    Parameters
    ----------
    what : str
        What is wrong, in a sentence.
    body : str
        What comes after ``scores(texts, side, hidden, pad)``, ``tokenizer``, ``model`` and
        ``loaded`` are there; it ends in ``sys.exit(1 if … else 0)``.
    **names
        Constants that are written before it.
    """
    folder, target = repr(subject.name), "Needs torch and transformers"
    if subject.what == "model":
        folder, target = "sys.argv[1]", "Give the folder where model and tokenizer were saved"
    scalar = subject.kind == "scalar"
    constants = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    head = _HEAD.format(
        what=what,
        target=target,
        folder=folder,
        auto=f"AutoModelFor{'Sequence' if scalar else 'Token'}Classification",
        trust=", trust_remote_code=True" if subject.trusted else "",
        dtype=f", dtype=torch.{subject.dtype}",
        labels=", num_labels=1" if subject.headless else "",
        read=_READ_SCALAR if scalar else _READ_TOKENS,
    )
    return f"{head}{constants}{body.strip()}\n"


COMPARE = """
one, other = {one}, {other}
print(f"{first}: {{one:.6f}}; {second}: {{other:.6f}}")
# rounding explains {tolerance:.2g}
sys.exit(0 if abs(one - other) <= {tolerance!r} else 1)
"""


def compare(one: str, first: str, other: str, second: str, tolerance: float) -> str:
    """The end of a script: two expressions that should be one number, and what each is."""
    return COMPARE.format(one=one, other=other, first=first, second=second, tolerance=tolerance)


_ENDPOINT = '''\
"""{what}

Needs nothing but Python: exits with 1 while it is so.
"""

import json
import os
import sys
import urllib.error
import urllib.request

HEADERS = {{"Content-Type": "application/json"}}
if key := os.environ.get({variable!r}):
    HEADERS["Authorization"] = "Bearer " + key


def post(body):
    """The status, and the scores in the order of the texts, or None."""
    request = urllib.request.Request({url!r}, json.dumps(body).encode(), HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, None
    try:
{read}
    except (KeyError, TypeError):
        return 200, None


def scores(body):
    return post(body)[1]


'''
#: protocol -> how its answer is read
_ANSWERS = {
    "companion": '        items = sorted(answer["rewards"], key=lambda item: item["index"])\n'
    '        return 200, [item["raw"] for item in items]',
    "vllm": '        items = sorted(answer["data"], key=lambda item: item["index"])\n'
    '        return 200, [item["probs"][0] for item in items]',
    "openrlhf": '        return 200, answer["rewards"]',
}


def endpoint_script(
    url: str, protocol: str, what: str, body: str, **bodies: Mapping[str, Any] | Sequence[Any]
) -> str:
    """A script for an endpoint.

    Parameters
    ----------
    url : str
        With the route.
    protocol : {"companion", "vllm", "openrlhf"}
    what, body
        As for :func:`local_script`; ``scores(body)`` gives a list, ``post(body)`` also the status.
    **bodies
        Constants: what is posted, and plain data.
    """
    constants = "".join(
        f"{name} = json.loads({json.dumps(value, ensure_ascii=False)!r})\n"
        for name, value in bodies.items()
    )
    head = _ENDPOINT.format(what=what, url=url, read=_ANSWERS[protocol], variable=KEY_VARIABLE)
    return f"{head}{constants}{body.strip()}\n"
