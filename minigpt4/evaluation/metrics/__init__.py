"""Metrics by the official rules, as plain functions of texts: no model, no torch.

    captions.py   CIDEr-D, BLEU, ROUGE-L       tokenizer.py   the words of a caption, as COCO's caption evaluation splits it
    vqa.py        VQAv2, OK-VQA, VizWiz; GQA   yes_no.py      POPE, MME
    chair.py      CHAIRs, CHAIRi               boxes.py       intersection over union, RefCOCO
    intervals.py  bootstrap                    matching.py    matching the ids of answers and ground truth

Each function says which rule it follows. Fractions are 0 to 1. Answers and ground truth are mappings with the same ids,
or two lists; ids that do not match, nulls and missing references raise ValueError. If a metric is not a mean over
items, `X_counts` returns the counts of each item and `X_of` computes the metric from their sum: together they give its
interval.
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
