"""Tiny files in the official format of each benchmark, with content of our own."""

import json

from PIL import Image

from minigpt4.evaluation.run import OpenBenchmark, make_benchmark

TEN = ["cat"] * 4 + ["a cat"] * 3 + ["kitten"] * 3
COLOURS = ["red", "green", "blue", "yellow", "white", "black"]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(path, number=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[number % len(COLOURS)]).save(path)


def coco_caption(root):
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg"} for n in (7, 8, 9)]
    texts = {
        7: ["A red bus.", "A bus in the street."],
        8: ["Two dogs run."],
        9: ["A bowl of fruit on a table."],
    }
    captions = [
        {"id": n, "image_id": image, "caption": text}
        for image, all in texts.items()
        for n, text in enumerate(all)
    ]
    write_json(
        root / "annotations/captions_val2014.json", {"images": images, "annotations": captions}
    )
    for image in images:
        draw(root / "images" / image["file_name"], image["id"])
    return {"eval_file_path": root / "annotations"}


def karpathy(root):
    """Write two images of the split test and one of train."""
    images = []
    for number, split in enumerate(["train", "test", "test"]):
        sentences = [
            {"raw": f"A {COLOURS[number]} square.", "tokens": []},
            {"raw": "Something plain."},
        ]
        images.append(
            {
                "filename": f"{number}.jpg",
                "filepath": "val2014",
                "split": split,
                "sentences": sentences,
            }
        )
        draw(root / "images/val2014" / f"{number}.jpg", number)
    write_json(root / "dataset_coco.json", {"dataset": "coco", "images": images})
    return {"eval_file_path": root / "dataset_coco.json"}


def vqa_rows(root):
    questions = [
        {"image_id": 42, "question_id": 420 + n, "question": f"What is number {n}?"}
        for n in range(3)
    ]
    annotations = []
    for row, kind in zip(questions, ["other", "number", "other"], strict=True):
        answers = [
            {"answer": text, "answer_id": n, "answer_confidence": "yes"}
            for n, text in enumerate(TEN, start=1)
        ]
        annotations.append(
            {**row, "answer_type": kind, "multiple_choice_answer": "cat", "answers": answers}
        )
    draw(root / "images/COCO_val2014_000000000042.jpg")
    return questions, annotations


def vqav2(root):
    questions, annotations = vqa_rows(root)
    folder = root / "annotations"
    subtype = {"data_subtype": "val2014"}
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**subtype, "questions": questions}
    )
    write_json(folder / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": []})
    write_json(
        folder / "v2_mscoco_val2014_annotations.json", {**subtype, "annotations": annotations}
    )
    return {"eval_file_path": folder}


def okvqa(root):
    questions, annotations = vqa_rows(root)
    folder = root / "annotations"
    write_json(folder / "OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(folder / "mscoco_val2014_annotations.json", {"annotations": annotations})
    return {"eval_file_path": folder}


def vizwiz(root):
    rows = []
    for number in range(2):
        answers = [{"answer": text, "answer_confidence": "yes"} for text in TEN]
        name = f"VizWiz_val_{number:08}.jpg"
        rows.append(
            {"image": name, "question": "What is this?", "answers": answers, "answer_type": "other"}
        )
        draw(root / "images" / name, number)
    write_json(root / "Annotations/val.json", rows)
    return {"eval_file_path": root / "Annotations"}


def gqa(root):
    rows = {}
    for number, (question, answer, kind) in enumerate(
        [("Is it red?", "yes", "verify"), ("Who?", "man", "query")]
    ):
        types = {"structural": kind, "semantic": "obj"}
        rows[f"2000{number}"] = {
            "imageId": f"n{number}",
            "question": question,
            "answer": answer,
            "types": types,
        }
        draw(root / f"images/n{number}.jpg", number)
    write_json(root / "testdev_balanced_questions.json", rows)
    return {"eval_file_path": root}


def pope(root):
    for split in ("random", "popular", "adversarial"):
        rows = []
        for number in range(4):
            label = "yes" if number % 2 == 0 else "no"
            text = f"Is there a {'dog' if label == 'yes' else 'cat'} in the image?"
            image = f"COCO_val2014_{number // 2:012}.jpg"
            rows.append({"question_id": number + 1, "image": image, "text": text, "label": label})
            draw(root / "images" / image, number)
        write_lines(root / f"coco/coco_pope_{split}.json", rows)
    return {"eval_file_path": root / "coco"}


def chair(root):
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg"} for n in range(4)]
    categories = [
        {"id": n, "name": name} for n, name in enumerate(["dog", "frisbee", "cat", "car"], start=1)
    ]
    pairs = [(0, 1), (0, 2), (1, 3), (2, 4), (2, 4)]
    segments = [
        {"id": n, "image_id": image, "category_id": kind} for n, (image, kind) in enumerate(pairs)
    ]
    captions = [{"id": n, "image_id": n, "caption": "There is something."} for n in range(4)]
    folder = root / "annotations"
    content = {"images": images, "annotations": segments, "categories": categories}
    write_json(folder / "instances_val2014.json", content)
    write_json(folder / "captions_val2014.json", {"images": images, "annotations": captions})
    for image in images:
        draw(root / "images" / image["file_name"], image["id"])
    return {"eval_file_path": folder}


def mme(root):
    lines = "Is there a boat in this image? Please answer yes or no.\tYes\n"
    lines += "Is there a lamp in this image? Please answer yes or no.\tNo\n"
    folder = root / "MME_Benchmark_release_version"
    for number in range(2):
        draw(folder / f"existence/{number}.jpg", number)
        (folder / f"existence/{number}.txt").write_text(lines)
    draw(folder / "artwork/images/a.jpg")
    (folder / "artwork/questions_answers_YN").mkdir(exist_ok=True)
    (folder / "artwork/questions_answers_YN/a.txt").write_text(lines)
    draw(folder / "code_reasoning/1.png")
    (folder / "code_reasoning/1.txt").write_text(lines)
    return {"eval_file_path": folder}


def refcoco(root, name="refcoco"):
    rows = []
    for number, phrase in enumerate(["the red cup", "cup on left", "tree"]):
        picture = f"COCO_train2014_00000058095{number // 2}"
        box = [64.0, 48.0, 128.0, 96.0]
        rows.append(
            {
                "img_id": f"{picture}_{number}",
                "sents": phrase,
                "bbox": box,
                "height": 480,
                "width": 640,
            }
        )
        draw(root / f"images/{picture}.jpg", number, (64, 48))
    for split in ("val", "testA"):
        write_json(root / f"{name}_{split}.json", rows)
    return {"eval_file_path": root}


def vsr(root):
    rows = []
    for number, (caption, label) in enumerate(
        [("The cat is on the mat.", 1), ("The cat is under the car.", 0)]
    ):
        draw(root / f"images/{number:012}.jpg", number)
        relation = ("on", "under")[number]
        rows.append(
            {"image": f"{number:012}.jpg", "caption": caption, "label": label, "relation": relation}
        )
    write_lines(root / "vsr/test.jsonl", rows)
    return {"eval_file_path": root / "vsr"}


def iconqa(root):
    rows = [
        {"image_id": "7", "question": "Which shape?", "choices": ["circle", "square"], "answer": 1}
    ]
    rows.append(
        {"image_id": "8", "question": "How many?", "choices": ["a_b", "2", "3"], "answer": 0}
    )
    for number, row in enumerate(rows):
        draw(root / f"images/{row['image_id']}/image.png", number)
    write_json(root / "iconqa/choose_text_val.json", rows)
    return {"eval_file_path": root / "iconqa"}


def hm(root):
    rows = [{"id": 1, "img": "img/1.png", "text": "love you", "label": 0}]
    rows.append({"id": 2, "img": "img/2.png", "text": "go away", "label": 1})
    for number, row in enumerate(rows):
        draw(root / "images" / row["img"], number)
    write_lines(root / "hm/dev_seen.jsonl", rows)
    return {"eval_file_path": root / "hm"}


def own_jsonl(root):
    rows = [
        {"id": "first", "image": "a.jpg", "question": "What colour?", "answer": "red"},
        {"image": "b.jpg", "answers": ["Green.", "lime"], "group": "hard"},
        {"images": ["a.jpg", "b.jpg"], "question": "Which is red?", "answers": ["the first"]},
    ]
    for number, name in enumerate(["a.jpg", "b.jpg"]):
        draw(root / "images" / name, number)
    write_lines(root / "questions.jsonl", rows)
    return {"eval_file_path": root / "questions.jsonl"}


def signs(root):
    """Write two questions whose options differ in punctuation only."""
    rows = [{"image": "a.jpg", "question": "Sign?", "answer": "+", "options": ["+", "-"]}]
    rows.append({"image": "a.jpg", "question": "Where?", "answer": "C++", "options": ["C++", "C"]})
    draw(root / "images/a.jpg")
    write_lines(root / "signs.jsonl", rows)
    return {"eval_file_path": root / "signs.jsonl"}


WRITERS = [
    coco_caption,
    vqav2,
    okvqa,
    vizwiz,
    gqa,
    pope,
    chair,
    mme,
    refcoco,
    vsr,
    iconqa,
    hm,
    own_jsonl,
]


def opened(name, root, writer=None, **settings):
    """Return the OpenBenchmark for files written below `root`."""
    section = (writer or globals()[name])(root)
    section = {
        "img_path": str(root / "images"),
        **{key: str(path) for key, path in section.items()},
        **settings,
    }
    benchmark = make_benchmark(name, section)
    return OpenBenchmark(benchmark, benchmark.checked_items())
