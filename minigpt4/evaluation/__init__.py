"""Evaluation: `answering.py` is the only place that asks a model; a benchmark is one file beside it,
scored by `metrics`.

The form of a benchmark; evaluate.py has no task by that form yet, the quickstart's own evaluation is the example:
    examples() -> iterable of (id, images, question, references)    references: the right answers
    score(answers) -> {metric: value}                               answers: {id: text}
"""
