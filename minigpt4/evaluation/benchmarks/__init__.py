"""Benchmarks by registered name; docs/evaluation.md lists the official files that each reads.

The interface is `benchmark.Benchmark`: items() and score(items, answers). To add your own, register a subclass with
`@registry.register_benchmark("name")` in a module that the configuration names under `imports`.
"""

from minigpt4.evaluation.benchmarks.captions import CocoCaption
from minigpt4.evaluation.benchmarks.chair import Chair
from minigpt4.evaluation.benchmarks.gqa import GQA
from minigpt4.evaluation.benchmarks.hateful_memes import HatefulMemes
from minigpt4.evaluation.benchmarks.iconqa import IconQA
from minigpt4.evaluation.benchmarks.mme import MME
from minigpt4.evaluation.benchmarks.own_jsonl import OwnJsonl
from minigpt4.evaluation.benchmarks.pope import Pope
from minigpt4.evaluation.benchmarks.refcoco import RefCOCO
from minigpt4.evaluation.benchmarks.vizwiz import VizWiz
from minigpt4.evaluation.benchmarks.vqa import OKVQA, VQAv2
from minigpt4.evaluation.benchmarks.vsr import VSR

__all__ = [
    "GQA",
    "MME",
    "OKVQA",
    "VSR",
    "Chair",
    "CocoCaption",
    "HatefulMemes",
    "IconQA",
    "OwnJsonl",
    "Pope",
    "RefCOCO",
    "VQAv2",
    "VizWiz",
]
