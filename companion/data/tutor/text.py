"""What the tutor base reads: graded transcripts and judgements, drawn without end.

Three things in this text make a model of a million parameters a good base for reward models.
A quarter of the steps err, so that it can write wrong solutions as well as right ones. Feedback
stands behind each solution's EOS, as in chat logs, in varying order, so that the hidden state *at*
EOS, where a reward model is read out, already holds the verdict, the count of valid steps, the tone
and the length. And some documents judge two solutions by a letter, so that the base can serve as a
weak generative judge.
"""

from __future__ import annotations

import random
from typing import Final

from companion.data.tutor.gold import Grade, grade
from companion.data.tutor.solutions import draw_solution
from companion.data.tutor.world import draw_problem

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
SPECIAL_TOKENS: Final = (PAD, BOS, EOS, USER, ASSISTANT, SYSTEM, END)

#: User and system turns end in ``<|end|>``, the assistant's in EOS: generation stops there, and a
#: finished completion's last token is the one that a reward model reads.
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] in ('user', 'system') %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% else %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

#: How a judge is asked; ``{prompt}``, ``{a}`` and ``{b}`` are filled in.
JUDGE_PROMPT: Final = "{prompt}\nSolution A:\n{a}\nSolution B:\n{b}\nWhich is better, A or B?"

#: Share of documents that judge two solutions.
P_JUDGEMENT: Final = 0.2


def feedback(rng: random.Random, result: Grade) -> str:
    """Four short sentences on a solution; the verdict comes first half of the time."""
    verdict = "Right." if result.correct else "Wrong."
    marks = " ".join("?+-"[label] for label in result.labels)
    n_valid = sum(label > 0 for label in result.labels)
    n_wrong = sum(label < 0 for label in result.labels)
    steps = f"{n_valid} good and {n_wrong} bad: {marks}"
    warmth = int(result.greeting) + result.tone
    tone = {-1: "Cold.", 0: "Plain.", 1: "Kind.", 2: "Warm."}[warmth]
    length = ("Short.", "Fine.", "Long.", "Endless.")[min(int(result.extra_words // 8), 3)]
    rest = [steps, tone, length]
    rng.shuffle(rest)
    place = 0 if rng.random() < 0.5 else rng.randrange(4)
    return "\n".join([*rest[:place], verdict, *rest[place:]])


def transcript(rng: random.Random) -> tuple[str, str, str]:
    """A problem solved and graded: (prompt part, completion part with EOS, feedback)."""
    problem = draw_problem(rng)
    solution = draw_solution(rng, problem, shift=0.1)
    comment = feedback(rng, grade(problem, solution.text))
    head = f"{BOS}{USER}{problem.prompt}{END}{ASSISTANT}"
    return head, solution.text + EOS, comment + EOS


def judgement(rng: random.Random) -> tuple[str, str, str]:
    """Two solutions judged by r*: (prompt part, letter with EOS, nothing)."""
    problem = draw_problem(rng)
    texts = [draw_solution(rng, problem, shift=0.1).text for _ in range(2)]
    rewards = [grade(problem, text).reward for text in texts]
    better = rng.randrange(2) if rewards[0] == rewards[1] else int(rewards[1] > rewards[0])
    question = JUDGE_PROMPT.format(prompt=problem.prompt, a=texts[0], b=texts[1])
    return f"{BOS}{USER}{question}{END}{ASSISTANT}", "AB"[better] + EOS, ""


def draw_document(rng: random.Random) -> tuple[str, str, str]:
    """One document of the base's text, in the three parts that its training weighs differently."""
    return judgement(rng) if rng.random() < P_JUDGEMENT else transcript(rng)
