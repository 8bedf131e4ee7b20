"""What the tutor base reads: graded transcripts, marked ones and judgements, drawn without end.

Five things in this text make a model of a million parameters a good base for reward models.
A quarter of the steps err, so that it can write wrong solutions as well as right ones. Feedback
stands behind each solution's EOS, as in chat logs, in varying order, so that the hidden state *at*
EOS, where a reward model is read out, already holds the verdict, the count of valid steps, the tone
and the length. Some documents mark each line as it stands, so that the base learns to check a line
where it ends. Some judge two solutions by a letter, so that the base can serve as a weak generative
judge. And it begins with drills in arithmetic, which teach the world's few hundred facts faster
than stories do. Chapter 4.
"""

from __future__ import annotations

import random
from typing import Final

from companion.tutor.gold import Grade, grade
from companion.tutor.solutions import draw_solution, slip
from companion.tutor.world import LARGEST, MAX_RESULT, SMALLEST, Step, apply, draw_problem

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

#: The system message above solutions whose lines carry their marks.
MARKING: Final = "Mark every line."

#: Shares of documents that mark each line, and that judge two solutions; the rest are transcripts.
P_MARKED: Final = 0.3
P_JUDGEMENT: Final = 0.12
#: The training begins with this share of drills alone; then their share falls in a line from the
#: second number to the third, at the fourth of the training. Alone, drills teach the arithmetic in
#: some hundred steps; mixed with stories from the start, it is not there after ten times as many,
#: and a model that cannot add cannot check a sum.
CURRICULUM: Final = (0.07, 0.6, 0.05, 0.35)

_MARKS: Final = {1: "+", 0: "?", -1: "-"}

#: A document in pieces: text, and what part it is (``prompt``, ``solution``, ``feedback``).
Document = list[tuple[str, str]]


def asked(content: str) -> str:
    """A user's turn, and the token at which the assistant goes on."""
    return f"{USER}{content}{END}{ASSISTANT}"


def feedback(rng: random.Random, result: Grade) -> str:
    """Five short sentences on a solution; the verdict mostly comes first."""
    verdict = "Right." if result.correct else "Wrong."
    marks = " ".join(["Lines", *(_MARKS[label] for label in result.labels)])
    count = f"{sum(label > 0 for label in result.labels)} good."
    warmth = int(result.greeting) + result.tone
    tone = {-1: "Cold.", 0: "Plain.", 1: "Kind.", 2: "Warm."}[warmth]
    length = ("Short.", "Fine.", "Long.", "Endless.")[min(int(result.extra_words // 8), 3)]
    rest = [marks, count, tone, length]
    rng.shuffle(rest)
    place = 0 if rng.random() < 0.7 else rng.randrange(5)
    return "\n".join([*rest[:place], verdict, *rest[place:]])


def transcript(rng: random.Random, *, marked: bool = False) -> Document:
    """A problem, a solution, and feedback behind its EOS; ``marked``: a mark behind each line."""
    problem = draw_problem(rng)
    solution = draw_solution(rng, problem, shift=0.1)
    result = grade(problem, solution.text)
    comment = (feedback(rng, result) + EOS, "feedback")
    question = asked(problem.prompt)
    if not marked:
        return [(BOS + question, "prompt"), (solution.text + EOS, "solution"), comment]
    document = [(f"{BOS}{SYSTEM}{MARKING}{END}{question}", "prompt")]
    for number, (line, label) in enumerate(zip(solution.lines, result.labels, strict=True)):
        document.append(("\n" * (number > 0) + line, "prompt"))
        document.append((f" {_MARKS[label]}", "feedback"))
    return [*document, (EOS, "prompt"), comment]


def judgement(rng: random.Random) -> Document:
    """Two solutions, judged by r* with a letter."""
    problem = draw_problem(rng)
    texts = [draw_solution(rng, problem, shift=0.1).text for _ in range(2)]
    rewards = [grade(problem, text).reward for text in texts]
    better = rng.randrange(2) if rewards[0] == rewards[1] else int(rewards[1] > rewards[0])
    question = JUDGE_PROMPT.format(prompt=problem.prompt, a=texts[0], b=texts[1])
    return [
        (BOS + asked(question), "prompt"),
        ("AB"[better], "feedback"),
        (EOS, "solution"),
    ]


def drill(rng: random.Random, *, marked: bool) -> Document:
    """Ten equations: right ones to complete, or right and wrong ones to mark."""
    document = [(BOS, "prompt")]
    for number in range(10):
        op = rng.choice("x++--")
        while True:
            left = rng.randint(SMALLEST, LARGEST if op == "x" else MAX_RESULT)
            right = rng.randint(SMALLEST, LARGEST)
            if 1 <= (result := apply(left, op, right)) <= MAX_RESULT:
                break
        start = "\n" * (number > 0)
        if marked:
            wrong = rng.random() < 0.4
            step = Step(left, op, right, slip(rng, result) if wrong else result)
            document += [(f"{start}Step {step}", "prompt"), (" -" if wrong else " +", "feedback")]
        else:
            document += [(f"{start}Step {left} {op} {right} =", "prompt")]
            document += [(f" {result}", "feedback")]
    return document


def draw_document(rng: random.Random, progress: float = 1.0) -> Document:
    """One document of the base's text, in pieces that its training weighs differently.

    ``progress`` in [0, 1] is how far the training has come; see :data:`CURRICULUM`.
    """
    alone, first, last, until = CURRICULUM
    fallen = min(1.0, max(0.0, (progress - alone) / (until - alone)))
    p_drill = 1.0 if progress <= alone else first + (last - first) * fallen
    if rng.random() < p_drill:
        return drill(rng, marked=progress > alone and rng.random() < 0.5)
    kind = rng.random()
    if kind < P_JUDGEMENT:
        return judgement(rng)
    return transcript(rng, marked=kind < P_JUDGEMENT + P_MARKED)
