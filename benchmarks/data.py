"""Pictures a second from tar shards to batches in the trainer: ours beside the 2023 way, on the same files.

2023: webdataset decodes with PIL, torchvision makes float32, batches of float32 cross from the worker to the trainer.
Ours: the pixels cross as they are, uint8, and are normalised where the batch is moved to the device. No speed is shown
unless both give the same float32 tensors for the same random crops.

Seconds are those of the processor, worker and trainer together, from the second batch on: another program on the same
machine disturbs them little. One core's share of a loader is thus measured, whatever the number of workers.
"""

import io
import json
import pickle
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

from benchmarks import machine

HELP = "load and augment pictures from shards: pictures a second and core, beside the 2023 way"
GATES = {"speed": 1.4, "bytes": 4}  # at least this many times better
# As img2dataset leaves LAION and CC + SBU with the 2023 scripts (a square, white borders), and as pictures of COCO are.
SIZES = {"256x256": "LAION, CC and SBU in 2023's shards", "500x375": "larger pictures"}
IMAGE_SIZE, QUALITY, SHARDS = 224, 95, 4  # pixels; JPEG's; files


def add_arguments(parser):
    parser.add_argument("--rounds", type=int, default=8, help="passes of each kind, alternating")
    parser.add_argument("--pictures", type=int, default=640, help="in a pass")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="two rounds of 96 pictures: shows that it works, no gate")


def run(args):
    """Measure, print the tables, return the figures."""
    import torch

    torch.set_num_threads(1)
    if args.quick:
        args.rounds, args.pictures = 2, 96
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, meaning in SIZES.items():
            shards = write_shards(Path(folder) / size, size, args.pictures)
            results[size] = result = _measure_size(shards, args)
            _print_table(size, meaning, result, args)
    passed = args.quick or all(
        result["ratio"][key] >= gate for result in results.values() for key, gate in GATES.items()
    )
    verdict = "not judged (--quick)" if args.quick else "PASS" if passed else "FAIL"
    print(f"at least {GATES['speed']}x the speed and {GATES['bytes']}x fewer bytes of tensors: {verdict}")
    settings = {"rounds": args.rounds, "pictures": args.pictures, "batch_size": args.batch_size}
    description = machine.description("torchvision", "pillow", "webdataset")
    return {**settings, "sizes": results, "passed": passed, **description}


def _measure_size(shards, args):
    batch_size = args.batch_size
    _require_equal(shards, batch_size, args.pictures)
    kinds = {"2023": lambda: loader_2023(shards, batch_size), "ours": lambda: loader_ours(shards, batch_size)}
    rounds = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in list(kinds)[:: 1 if number % 2 == 0 else -1]:
            rounds[kind].append(_pictures_per_second(kinds[kind](), args.pictures // batch_size))
    sent = {kind: _bytes_per_picture(next(iter(make()))) for kind, make in kinds.items()}
    speeds = [ours / old for ours, old in zip(rounds["ours"], rounds["2023"], strict=True)]
    ratio = {"speed": mean(speeds), "bytes": sent["2023"]["tensors"] / sent["ours"]["tensors"]}
    error = stdev(speeds) / len(speeds) ** 0.5
    return {"pictures_per_second": rounds, "bytes_per_picture": sent, "ratio": ratio, "ratio_error": error}


# the files


def write_shards(folder, size, pictures):
    """Return the paths of new shards of `pictures` JPEGs with captions."""
    folder.mkdir()
    paths = [folder / f"{number:05d}.tar" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for picture in range(number, pictures, SHARDS):
                caption = json.dumps({"caption": f"Picture {picture}: hills of some colours under a sky."})
                for extension, data in (("jpg", jpeg(picture, size)), ("json", caption.encode())):
                    member = tarfile.TarInfo(f"{picture:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return [str(path) for path in paths]


def jpeg(seed, size):
    """Return a JPEG of blobs of three sizes, each about half as strong as the next larger one, and a little noise.

    As in photographs, most of the content is coarse: 1.1 to 2.7 bits of JPEG a pixel.
    """
    import numpy as np
    from PIL import Image

    width, height = map(int, size.split("x"))
    rng = np.random.default_rng(seed)
    pixels = 128 + rng.normal(0, 3, (height, width, 3))
    for cells, strength in ((6, 55), (24, 28), (96, 14)):
        coarse = rng.normal(128, strength, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        pixels += (
            np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float64) - 128
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


# the two ways


def loader_2023(shards, batch_size, seeded=False):
    """Return a DataLoader of one worker and one pass, as the 2023 training read its shards.

    Its random crops come from the global generator; with `seeded`, for comparison, they are those of our chain.
    """
    import webdataset as wds
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from minigpt4.datasets.datasets.base_dataset import seeded_by
    from minigpt4.processors.blip_processors import CLIP_MEAN, CLIP_STD, BlipCaptionProcessor, RandomCropResize

    crop = RandomCropResize(IMAGE_SIZE, scale=(0.5, 1.0))  # torchvision's, with 2023's pixels on any Pillow
    picture = transforms.Compose([crop, transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])
    caption = BlipCaptionProcessor()

    def sample(parts):
        image, record, key, url = parts
        shard = Path(url).name
        if not seeded:
            return {"image": picture(image), "text_input": caption(record["caption"])}
        with seeded_by(0, 0, shard, key):
            return {"image": picture(image), "sample_id": f"{shard}/{key}"}

    dataset = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.tarfile_to_samples(),
        wds.shuffle(1000),
        wds.decode("pilrgb"),
        wds.to_tuple("jpg", "json", "__key__", "__url__"),
        wds.map(sample),
    )
    return DataLoader(dataset, batch_size=batch_size, num_workers=1)


def loader_ours(shards, batch_size):
    """Return the loader of a training run with one worker."""
    from minigpt4.datasets.datasets.dataloader_utils import build_train_loader
    from minigpt4.datasets.datasets.web_dataset import WebCaptionDataset
    from minigpt4.processors import Blip2ImageTrainProcessor, BlipCaptionProcessor

    dataset = WebCaptionDataset(shards, Blip2ImageTrainProcessor(IMAGE_SIZE), BlipCaptionProcessor(), "laion", epochs=1)
    return build_train_loader([dataset], batch_size=batch_size, num_workers=1)


def _require_equal(shards, batch_size, pictures):
    """Exit unless both ways give the same float32 tensor for each picture of a pass."""
    import torch

    from minigpt4.common.device import to_device

    def tensors(batches):
        batches = (to_device(batch, torch.device("cpu")) for batch in batches)
        return {
            name: image for batch in batches for name, image in zip(batch["sample_id"], batch["image"], strict=True)
        }

    ours = {name.removeprefix("laion/"): image for name, image in tensors(loader_ours(shards, batch_size)).items()}
    theirs = tensors(loader_2023(shards, batch_size, seeded=True))
    same = [theirs[name].dtype == ours[name].dtype and torch.equal(theirs[name], ours[name]) for name in theirs]
    if len(same) != pictures or ours.keys() != theirs.keys() or not all(same):
        sys.exit(f"python -m benchmarks data: {sum(same)} of {pictures} tensors are equal; no speed is shown")


def _pictures_per_second(loader, batches):
    """Return pictures a second of processor time, the first batch left out."""
    import psutil

    trainer = psutil.Process()
    before = set(trainer.children())
    stream = iter(loader)
    next(stream)
    (worker,) = set(trainer.children()) - before
    start = _seconds(worker)
    count = sum(len(batch["image"]) for batch in islice(stream, batches - 2))  # all but the last: the worker is alive
    return count / (_seconds(worker) - start)


def _seconds(worker):
    times = worker.cpu_times()
    return times.user + times.system + time.process_time()


def _bytes_per_picture(batch):
    """Return {"tensors", "all"}: bytes of shared memory of a batch, and with what is pickled beside it, a picture."""
    import torch

    tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
    memory = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    others = len(pickle.dumps({key: value for key, value in batch.items() if key not in tensors}))
    return {key: total / len(batch["image"]) for key, total in (("tensors", memory), ("all", memory + others))}


def _print_table(size, meaning, result, args):
    print(f"{args.pictures} JPEGs of {size} ({meaning}) to {IMAGE_SIZE}; mean of {args.rounds} passes [min .. max]")
    print(f"{'':<8}{'pictures a second and core':>30}{'bytes a picture: tensors':>28}{'all':>10}")
    for kind, speeds in result["pictures_per_second"].items():
        cell = f"{mean(speeds):.0f} [{min(speeds):.0f} .. {max(speeds):.0f}]"
        sent = result["bytes_per_picture"][kind]
        print(f"{kind:<8}{cell:>30}{sent['tensors']:>28,.0f}{sent['all']:>10,.0f}")
    ratio, error = result["ratio"], result["ratio_error"]
    print(
        f"equal tensors: yes; {ratio['speed']:.2f} +- {error:.2f} times the speed, "
        f"{ratio['bytes']:.2f} times fewer bytes\n"
    )
