"""Evaluation: from images and questions to figures that can be believed.

answering.py      the only place that asks a model         answer_file.py, shared_answers.py   answers on disk
benchmarks/       official files -> items -> scores        metrics/                            the official rules
run.py            benchmarks by name, over ranks           controls.py                         blank, shuffled
results.py        results.json; page.py its HTML           compare.py                          two results
prompts.txt       the prompts, versioned; prompts.py
"""
