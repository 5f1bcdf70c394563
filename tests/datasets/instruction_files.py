"""Small files in the official formats of MiniGPT-v2's datasets: images and annotations; their configuration sections."""

import json
import pickle

from PIL import Image

from minigpt4.common.registry import registry

SIZE = (64, 48)
IDS = range(1, 9)
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A boat."}]
MORE_TURNS = [
    *TURNS,
    {"from": "human", "value": "And its colour?"},
    {"from": "gpt", "value": "Red."},
]
REFS = [
    {
        "ref_id": n,
        "ann_id": 10 * n,
        "image_id": n,
        "split": "train",
        "sentences": [{"raw": f"boat {n}"}],
    }
    for n in IDS
]
INSTANCES = {
    "images": [{"id": number, "width": SIZE[0], "height": SIZE[1]} for number in IDS],
    "annotations": [
        {"id": 10 * number, "image_id": number, "bbox": [6.4, 4.8, 12.8, 9.6]} for number in IDS
    ],
}
REGION = {"region_id": 1, "phrase": "a lamp", "x": 1, "y": 2, "width": 30, "height": 20}


def name_of(number):
    return f"COCO_train2014_{number:012d}.jpg"


NAMES = tuple(map(name_of, IDS))


def write_images(folder, names=NAMES, size=SIZE):
    """Write images of these names below `folder`."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (25 * number, 80, 160)).save(folder / name)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_refs(folder, refs=REFS, instances=INSTANCES, name="refcoco", split_by="unc"):
    """Write the two REFER files of a dataset below `folder`."""
    write_json(folder / name / "instances.json", instances)
    (folder / name / f"refs({split_by}).p").write_bytes(
        refs if isinstance(refs, bytes) else pickle.dumps(refs, 2)
    )


CAPTIONS = [
    {"image": f"train2014/{name_of(n)}", "caption": f"A boat, number {n}!", "image_id": f"coco_{n}"}
    for n in IDS
]
QUESTIONS = [
    {
        "image": name_of(n),
        "question": f"Which boat is {n}?",
        "question_id": n,
        "answer": ["red", "blue"],
    }
    for n in IDS
]
TEXTS = [
    {
        "instances": [
            {"instruction_with_input": f"Say {n}!", "constraints": None, "output": f"It is {n}."}
        ]
    }
    for n in IDS
]
# contents of the annotation files, by dataset
ROWS = {
    "textcaps_caption": {
        "data": [{"image_id": name_of(n)[:-4], "caption_str": f"STOP {n}"} for n in IDS]
    },
    "ocrvqa": {
        name_of(n)[:-4]: {
            "split": 1,
            "imageURL": "http://x.test/a.jpg",
            "questions": ["Who?"],
            "answers": ["Ann."],
        }
        for n in IDS
    },
    "flickr_grounded_caption": [
        {"image_id": name_of(n)[:-4], "grounded_caption": "<p>A boat</p> {<1><2><30><40>}"}
        for n in IDS
    ],
    "flickr_CaptionToPhrase": [
        {
            "image_id": name_of(n)[:-4],
            "caption": "A boat.",
            "output": "<p>A boat</p> {<1><2><30><40>}",
        }
        for n in IDS
    ],
    "flickr_ObjectToPhrase": [
        {
            "image_id": name_of(n)[:-4],
            "phrase": "boat",
            "bbox": "{<1><2><30><40>}<delim>{<2><2><3><3>}",
        }
        for n in IDS
    ],
    "llava_detail": [{"id": f"{n:012d}", "conversations": TURNS} for n in IDS],
    "llava_reason": [{"id": f"{n:012d}", "conversations": TURNS} for n in IDS],
    "llava_conversation": [{"id": f"{n:012d}", "conversations": MORE_TURNS} for n in IDS],
    "multitask_conversation": [{"id": f"{n:012d}", "conversations": MORE_TURNS} for n in IDS],
}
SPLIT_ROWS = {
    "coco_caption": CAPTIONS,
    "coco_vqa": QUESTIONS,
    "ok_vqa": QUESTIONS,
    "aok_vqa": [{**row, "direct_answers": row["answer"]} for row in QUESTIONS],
    "gqa": [{**row, "answer": "yes"} for row in QUESTIONS],
}


def write_all(root):
    """Write files for all 22 datasets below `root`; return {name: `build_info`}."""
    write_images(root / "coco")
    infos = {}
    for name, rows in ROWS.items():
        path = write_json(root / f"{name}.json", rows)
        infos[name] = {"ann_path": str(path), "image_path": f"{root}/coco"}
    for name, rows in SPLIT_ROWS.items():
        path = write_json(root / f"{name}.json", rows)
        infos[name] = {
            "annotations": {"train": {"storage": str(path)}},
            "images": {"storage": f"{root}/coco"},
        }
    infos["unnatural_instruction"] = {"ann_path": str(write_json(root / "texts.json", TEXTS))}
    for name, dataset, split_by in (("refcoco", "refcoco", "unc"), ("refcocop", "refcoco+", "unc")):
        infos |= _refs(root, name, dataset, split_by)
    infos |= _refs(root, "refcocog", "refcocog", "umd")
    write_json(
        root / "vg/image_data.json",
        [{"image_id": n, "url": f"http://x.test/VG/{n}.jpg"} for n in IDS],
    )
    write_json(
        root / "vg/region_descriptions.json",
        [{"id": number, "regions": [REGION]} for number in IDS],
    )
    write_images(root / "vg/VG", [f"{number}.jpg" for number in IDS])
    return infos | {"refvg": {"data_dir": f"{root}/vg"}}


def _refs(root, name, dataset, split_by):
    write_refs(root / "refs", name=dataset, split_by=split_by)
    info = {"ann_path": f"{root}/refs", "image_path": f"{root}/coco", "splitBy": split_by}
    return {name: {**info, "dataset": dataset}, f"inv{name}": {**info, "dataset": f"inv{dataset}"}}


def section(info, **more):
    """Return the section of a dataset with images of 8 pixels, as in a YAML file."""
    processors = {"vis_processor": {"train": {"name": "blip2_image_train", "image_size": 8}}}
    return {
        "build_info": info,
        **processors,
        "text_processor": {"train": {"name": "blip_caption"}},
        **more,
    }


def preflight(name, info, **more):
    """Return the problems of a section, as a user reads them."""
    cls = registry.get_builder_class(name)
    cfg = cls(section(info, **more)).config
    return list(map(str, cls.preflight(cfg, f"datasets.{name}")))


def build(name, info, **more):
    """Return the splits of a dataset."""
    return registry.get_builder_class(name)(section(info, **more)).build_datasets()
