"""Evaluation: from images and questions to figures that can be believed.

items.py          what is asked                            answer_file.py, shared_answers.py   answers on disk
answering.py      the only place that asks a model         ranking.py                          the best of options
benchmarks/       official files -> items -> scores        metrics/                            the official rules
run.py            benchmarks by name, over ranks           controls.py                         blank, shuffled
results.py        results.json; page.py its HTML           compare.py                          two results
prompts.txt       the prompts, versioned; prompts.py       lmms/                               plugin for lmms-eval
"""
