"""The made-up images and annotations of the set's f_datasets, written as files for the datasets that read them."""

import json
import pickle
from pathlib import Path

from PIL import Image


def filled_in(node, root):
    """Return containers with `root` in the place of <root>."""
    if isinstance(node, dict):
        return {key: filled_in(value, root) for key, value in node.items()}
    if isinstance(node, list):
        return [filled_in(value, root) for value in node]
    return node.replace("<root>", str(root)) if isinstance(node, str) else node


def write_data(fixture, root):
    """Write all images, and each dataset's annotation files where its `build_info` says."""
    for image in fixture["images"]:
        path = root / image["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"]), "teal").save(path)
    annotations = fixture["annotations"]
    for name, known in fixture["datasets"].items():
        info = filled_in(known["build_info"], root)
        if "data_dir" in info:
            for file, content in fixture["visual_genome"].items():
                write_json(Path(info["data_dir"]) / f"{file}.json", content)
        elif "annotations" in info:
            paths = info["annotations"]["train"]["storage"]
            for number, path in enumerate(paths, 1):
                write_json(Path(path), annotations.get(name) or annotations[f"{name}_{number}"])
        elif name in annotations and "ref" not in name:
            write_json(Path(info["ann_path"]), annotations[name])


def write_refs(fixture, folder, dataset, split_by):
    """Write the two files of a REFER dataset below `folder`."""
    content = fixture["annotations"][dataset]
    write_json(folder / dataset / "instances.json", content["instances"])
    (folder / dataset / f"refs({split_by}).p").write_bytes(
        pickle.dumps(content["refs"], protocol=2)
    )


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
