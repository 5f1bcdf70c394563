"""Evaluation: from images and questions to scores with confidence intervals.

run.py         runs benchmarks by name, on all ranks      benchmarks/   official files -> items -> scores
items.py       questions, and encoding their images       metrics/      the official scoring rules
answering.py   generates or ranks answers, in batches     ranking.py    the loss of each candidate answer
controls.py    blank or shuffled images                   prompts.txt   the versioned prompts; prompts.py reads them
results.py     results.json; page.py its HTML page        compare.py    what differs between two results
samples.py     samples.html of a training run             lmms/         plugin for lmms-eval
answer_file.py, shared_answers.py                         answers on disk, from one process or from several ranks
"""
