"""Metrics by the official rules, as plain functions of texts: no model, no torch.

    captions.py   CIDEr-D, BLEU, ROUGE-L       tokenizer.py   words as COCO's caption evaluation counts them
    vqa.py        VQAv2, OK-VQA, VizWiz; GQA   yes_no.py      POPE, MME
    chair.py      CHAIRs, CHAIRi               boxes.py       intersection over union, RefCOCO
    intervals.py  bootstrap                    matching.py    ids of answers and truth

Each function says which rule it follows. Shares are 0 to 1. Answers and truth are mappings by id with the same ids, or
two lists; ids that do not match, nulls and missing references are a ValueError. Where a figure is no mean over items,
`X_counts` has the counts of each item and `X_of` makes the figure of their sum: together they give its interval.
"""

from minigpt4.evaluation.metrics.boxes import box_accuracy, box_iou, parse_box, starts_with_box
from minigpt4.evaluation.metrics.captions import bleu, bleu_counts, bleu_of, cider_d, rouge_l
from minigpt4.evaluation.metrics.chair import (
    chair,
    chair_counts,
    chair_of,
    mentioned_objects,
    read_synonyms,
)
from minigpt4.evaluation.metrics.intervals import bootstrap, paired_bootstrap
from minigpt4.evaluation.metrics.tokenizer import CAPTION_TOKENIZER, caption_words
from minigpt4.evaluation.metrics.vqa import (
    exact_match,
    lowered_match,
    vizwiz_accuracy_minigpt4,
    vqa_accuracy,
    vqa_accuracy_minigpt4,
)
from minigpt4.evaluation.metrics.yes_no import (
    MMEQuestion,
    mme,
    mme_counts,
    mme_of,
    pope,
    pope_counts,
    pope_of,
)

__all__ = [
    "CAPTION_TOKENIZER",
    "MMEQuestion",
    "bleu",
    "bleu_counts",
    "bleu_of",
    "bootstrap",
    "box_accuracy",
    "box_iou",
    "caption_words",
    "chair",
    "chair_counts",
    "chair_of",
    "cider_d",
    "exact_match",
    "lowered_match",
    "mentioned_objects",
    "mme",
    "mme_counts",
    "mme_of",
    "paired_bootstrap",
    "parse_box",
    "pope",
    "pope_counts",
    "pope_of",
    "read_synonyms",
    "rouge_l",
    "starts_with_box",
    "vizwiz_accuracy_minigpt4",
    "vqa_accuracy",
    "vqa_accuracy_minigpt4",
]
