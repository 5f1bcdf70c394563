"""Evaluation: answering.py is the only place that asks a model; one file a benchmark.

A benchmark is a class with two methods:
    examples() -> iterable of (id, images, question, references)    references: the right answers
    score(answers) -> {metric: value}                               answers: {id: text}
"""
