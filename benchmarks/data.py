"""Images a second from tar shards to batches in the trainer: ours beside the 2023 way, on the same files.

2023: webdataset decodes with PIL, torchvision converts to float32, and the worker sends float32 batches to the trainer.
Ours: the worker sends uint8 pixels, which are normalised where the batch is moved to the device. No speed is shown unless
both give the same float32 tensors for the same random crops.

Seconds are CPU time, of worker and trainer together, once the worker is running: other programs on the machine disturb it
little. So the result is a rate per core, whatever the number of workers.
"""

import io
import json
import pickle
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.harness import QUICK, ROUNDS, NotEqual, row
from minigpt4.common.device import to_device
from minigpt4.datasets.builders.image_text_pair_builder import LaionBuilder
from minigpt4.datasets.datasets.base_dataset import seeded_by
from minigpt4.datasets.datasets.dataloader_utils import TrainLoader
from minigpt4.datasets.datasets.web_dataset import WebCaptionDataset
from minigpt4.processors import Blip2ImageTrainProcessor, BlipCaptionProcessor, load_rgb
from minigpt4.processors.blip_processors import CLIP_MEAN, CLIP_STD, RandomCropResize

HELP = "load and augment images from shards: images a second and core, beside the 2023 way"
GATES = {"speed": 1.4, "bytes": 4}  # at least this many times better
# sizes of LAION and CC + SBU images after img2dataset with the 2023 scripts, and of COCO images
SIZES = {"256x256": "LAION, CC and SBU in 2023's shards", "500x375": "larger images"}
JUDGED = "256x256"
IMAGE_SIZE, SHARDS = 224, 4  # pixels; files
OPTIONS = {
    "--rounds": ROUNDS | {"default": 6},
    "--images --pictures": {"type": int, "default": 640, "help": "images in a pass"},
    "--size": {"choices": SIZES, "help": "of the images (default: each; 256x256 is judged)"},
    "--batch-size": {"type": int, "default": 16},
    "--quick": QUICK | {"help": "two rounds of 96 images: shows that it works, no gate"},
}


def run(args: Namespace) -> dict:
    """Measure; return the rows. Raises NotEqual where the tensors differ."""
    torch.set_num_threads(1)
    if args.quick:
        args.rounds, args.images = 2, 96
    if args.rounds < 2 or args.images < 4 * args.batch_size:
        sys.exit(
            "python -m benchmarks data: an error needs 2 rounds at least, a rate 4 batches of images"
        )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in [args.size] if args.size else SIZES:
            shards = write_shards(Path(folder) / size, size, args.images)
            rows += measure(size, shards, args)
            print(
                f"{args.images} JPEGs of {size} ({SIZES[size]}) to {IMAGE_SIZE}: equal tensors: yes"
            )
    if args.quick or args.size not in (None, JUDGED):
        print(f"not judged ({'--quick' if args.quick else '--size'})")
    return {
        "rows": rows,
        "rounds": args.rounds,
        "images": args.images,
        "batch_size": args.batch_size,
    }


def measure(size: str, shards: list[str], args: Namespace) -> list[dict]:
    """Return the rows of a size of images: loading speed, and bytes sent per image. Raises NotEqual."""
    batch_size = args.batch_size
    require_equal(shards, batch_size, args.images)
    ways = {
        "2023": partial(loader_2023, shards, batch_size),
        "ours": partial(loader_ours, shards, batch_size),
    }
    speeds, pixels = {way: [] for way in ways}, []
    for _ in range(args.rounds):
        seconds = race({way: make() for way, make in ways.items()}, args.images // batch_size)
        for way, value in seconds.items():
            speeds[way].append(1 / value)
        pixels.append(pixels_alone(shards[0]))
    sent = {way: bytes_per_image(next(iter(make()))) for way, make in ways.items()}
    name, is_judged = (f"data: images of {size}, a core", size == JUDGED and not args.quick)
    # at best a loader decodes, crops and resizes, and nothing else
    options = {
        "more_is_better": True,
        "limit": 1 / min(pixels),
        "at_least": GATES["speed"] if is_judged else None,
    }
    rows = [row(name, "1/s", speeds["ours"], speeds["2023"], **options)]
    for kind in ("tensors", "all"):
        gate = GATES["bytes"] if is_judged and kind == "tensors" else None
        ours, old = ([sent[way][kind]] for way in ("ours", "2023"))
        rows.append(row(f"{name}: bytes sent each, {kind}", "B", ours, old, at_least=gate))
    return rows


def write_shards(folder: Path, size: str, images: int) -> list[str]:
    """Write SHARDS tar shards with `images` JPEGs and their captions; return their paths."""
    folder.mkdir()
    paths = [folder / f"{number:05d}.tar" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for image in range(number, images, SHARDS):
                caption = json.dumps(
                    {"caption": f"Image {image}: hills of some colours under a sky."}
                )
                for extension, data in (("jpg", jpeg(image, size)), ("json", caption.encode())):
                    member = tarfile.TarInfo(f"{image:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return [str(path) for path in paths]


def jpeg(seed: int, size: str) -> bytes:
    """Return a random JPEG, mostly coarse structure and a little noise as in photographs: 1.1 to 2.7 bits a pixel."""
    width, height = map(int, size.split("x"))
    rng = np.random.default_rng(seed)
    pixels = 128 + rng.normal(0, 3, (height, width, 3))
    for cells, strength in ((6, 55), (24, 28), (96, 14)):
        coarse = Image.fromarray(
            rng.normal(128, strength, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        )
        pixels += (
            np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64) - 128
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def loader_2023(shards: list[str], batch_size: int, seeded: bool = False) -> DataLoader:
    """Return a DataLoader with one worker for one pass over the shards, which reads them as the 2023 training did.

    Random crops come from the global generator; with `seeded` they are the same as in our loader, for comparison.
    """
    # torchvision's RandomResizedCrop, with the pixels of 2023 whatever the version of Pillow
    crop = RandomCropResize(IMAGE_SIZE, scale=(0.5, 1.0))
    augment = transforms.Compose(
        [crop, transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    )
    caption = BlipCaptionProcessor()

    def sample(parts):
        if not seeded:
            return {"image": augment(parts[0]), "text_input": caption(parts[1]["caption"])}
        key, shard = parts[2], Path(parts[3]).name
        with seeded_by(0, 0, shard, key):
            return {"image": augment(parts[0]), "sample_id": f"{shard}/{key}"}

    dataset = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.tarfile_to_samples(),
        wds.shuffle(1000),
        wds.decode("pilrgb"),
        wds.to_tuple("jpg", "json", "__key__", "__url__"),
        wds.map(sample),
    )
    return DataLoader(dataset, batch_size=batch_size, num_workers=1)


def loader_ours(shards: list[str], batch_size: int) -> DataLoader:
    """Return a training run's loader, with one worker, for one pass over the shards."""
    dataset = WebCaptionDataset(
        shards, Blip2ImageTrainProcessor(IMAGE_SIZE), BlipCaptionProcessor(), "laion", epochs=1
    )
    dataset.load_image = LaionBuilder.load_image
    return TrainLoader([dataset], batch_size=batch_size, num_workers=1)


def require_equal(shards: list[str], batch_size: int, images: int) -> None:
    """Raise NotEqual unless both ways give the same float32 tensor for each image of a pass."""

    def tensors(batches):
        by_name = {}
        for batch in batches:
            moved = to_device(batch, torch.device("cpu"))
            names = [name.removeprefix("laion/") for name in moved["sample_id"]]
            by_name |= zip(names, moved["image"], strict=True)
        return by_name

    ours = tensors(loader_ours(shards, batch_size))
    theirs = tensors(loader_2023(shards, batch_size, seeded=True))
    same = [
        theirs[name].dtype == ours[name].dtype and torch.equal(theirs[name], ours[name])
        for name in theirs
    ]
    if len(same) != images or ours.keys() != theirs.keys() or not all(same):
        raise NotEqual(f"{sum(same)} of {images} tensors are equal")


def race(loaders: dict[str, DataLoader], batches: int) -> dict[str, float]:
    """Return {way: CPU seconds per image}; the loaders run at the same time and take turns batch by batch."""
    workers, streams = {}, {}
    trainer = psutil.Process()
    for way, loader in loaders.items():
        before = set(trainer.children())
        streams[way] = iter(loader)
        next(streams[way])
        (workers[way],) = set(trainer.children()) - before
    # Workers read ahead. Idle, they are as many batches ahead here as at the end, so their CPU time in between is that of
    # as many batches as the trainer takes.
    seconds = {way: -seconds_when_idle(worker) for way, worker in workers.items()}
    count = dict.fromkeys(loaders, 0)
    for _ in range(batches - 3):
        for way, stream in streams.items():
            start = time.process_time()
            batch = next(stream)
            seconds[way] += time.process_time() - start
            count[way] += len(batch["image"])
    return {
        way: (value + seconds_when_idle(workers[way])) / count[way]
        for way, value in seconds.items()
    }


def pixels_alone(shard: str) -> float:
    """Return the CPU seconds per image of what no exact way can do without: decoding, cropping, resizing."""
    crop, *_ = Blip2ImageTrainProcessor(IMAGE_SIZE).transform.transforms
    with tarfile.open(shard) as tar:
        jpegs = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    start = time.process_time()
    for data in jpegs:
        crop(load_rgb(data))
    return (time.process_time() - start) / len(jpegs)


def seconds_when_idle(worker: psutil.Process) -> float:
    """Return the total CPU time of a worker once it is idle, waiting for the trainer to take a batch."""
    before, times = None, worker.cpu_times()
    while before != times or worker.status() == "running":
        time.sleep(0.2)
        before, times = times, worker.cpu_times()
    return times.user + times.system


def bytes_per_image(batch: dict) -> dict[str, float]:
    """Return bytes per image of a batch: {"tensors": in shared memory, "all": these and what is pickled beside them}."""
    tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
    memory = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    others = len(pickle.dumps({key: value for key, value in batch.items() if key not in tensors}))
    return {
        key: total / len(batch["image"])
        for key, total in (("tensors", memory), ("all", memory + others))
    }
