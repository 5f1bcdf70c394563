"""Evaluation: questions about images become answers in answering.py, the only place that does it; one file a benchmark.

A benchmark is a class with two methods:

    examples() -> iterable of (id, images, question, references)    id: text, unique; references: the right answers
    score(answers) -> {metric: value}                               answers: {id: text}
"""
