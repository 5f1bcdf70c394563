"""Images a second from tar shards to batches in the trainer: ours beside the 2023 way, on the same files.

2023: webdataset decodes with PIL, torchvision makes float32, batches of float32 cross from the worker to the trainer.
Ours: the pixels cross as they are, uint8, and are normalised where the batch is moved to the device. No speed is shown
unless both give the same float32 tensors for the same random crops.

Seconds are those of the processor, worker and trainer together, once the worker is running: another program on the
same machine disturbs them little. One core's share of a loader is thus measured, whatever the number of workers.
"""

import io
import json
import pickle
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from benchmarks import machine

HELP = "load and augment images from shards: images a second and core, beside the 2023 way"
GATES = {"speed": 1.4, "bytes": 4}  # at least this many times better
# As img2dataset leaves LAION and CC + SBU with the 2023 scripts (a square, white borders), and as images of COCO are.
# The first are what the 2023 chain reads; Pillow's work, which both ways share, weighs more in the larger ones.
SIZES = {"256x256": "LAION, CC and SBU in 2023's shards", "500x375": "larger images"}
JUDGED = "256x256"
IMAGE_SIZE, QUALITY, SHARDS = 224, 95, 4  # pixels; JPEG's; files


def add_arguments(parser):
    parser.add_argument("--rounds", type=int, default=6, help="passes of each kind, alternating")
    parser.add_argument("--pictures", type=int, default=640, help="in a pass")
    parser.add_argument("--size", choices=SIZES, help="of the images (default: each; 256x256 is judged)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="two rounds of 96 images: shows that it works, no gate")


def run(args):
    """Measure, print the tables, return the figures."""
    import torch

    torch.set_num_threads(1)
    if args.quick:
        args.rounds, args.pictures = 2, 96
    if args.rounds < 2 or args.pictures < 4 * args.batch_size:
        sys.exit("python -m benchmarks data: an error needs 2 rounds at least, a rate 4 batches of images")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in [args.size] if args.size else SIZES:
            shards = write_shards(Path(folder) / size, size, args.pictures)
            results[size] = result = _measure_size(shards, args)
            _print_table(size, SIZES[size], result, args)
    is_judged = JUDGED in results and not args.quick
    passed = not is_judged or all(results[JUDGED]["ratio"][key] >= gate for key, gate in GATES.items())
    verdict = "PASS" if passed else "FAIL"
    if not is_judged:
        verdict = f"not judged ({'--quick' if args.quick else '--size'})"
    print(f"{JUDGED}: at least {GATES['speed']}x the speed and {GATES['bytes']}x fewer bytes of tensors: {verdict}")
    settings = {"rounds": args.rounds, "pictures": args.pictures, "batch_size": args.batch_size}
    description = machine.description("torchvision", "pillow", "webdataset")
    return {**settings, "sizes": results, "passed": passed, **description}


def _measure_size(shards, args):
    batch_size = args.batch_size
    _require_equal(shards, batch_size, args.pictures)
    kinds = {"2023": lambda: loader_2023(shards, batch_size), "ours": lambda: loader_ours(shards, batch_size)}
    races, pillow = [], []
    for _ in range(args.rounds):
        races.append(_race({kind: make() for kind, make in kinds.items()}, args.pictures // batch_size))
        pillow.append(_pillow_alone(shards[0]))
    sent = {kind: _bytes_per_picture(next(iter(make()))) for kind, make in kinds.items()}
    speeds = [old["loading"] / ours["loading"] for race in races for old, ours in [race.values()]]
    on_cpu = [sum(old.values()) / sum(ours.values()) for race in races for old, ours in [race.values()]]
    return {
        "pictures_per_second": {kind: [1 / race[kind]["loading"] for race in races] for kind in kinds},
        "bytes_per_picture": sent,
        "ratio": {"speed": mean(speeds), "bytes": sent["2023"]["tensors"] / sent["ours"]["tensors"]},
        "ratio_error": stdev(speeds) / len(speeds) ** 0.5,
        "ratio_on_cpu": mean(on_cpu),
        "ratio_of_pillow_alone": mean(
            race["2023"]["loading"] / alone for race, alone in zip(races, pillow, strict=True)
        ),
    }


# the files


def write_shards(folder, size, pictures):
    """Return the paths of new shards of `images` JPEGs with captions."""
    folder.mkdir()
    paths = [folder / f"{number:05d}.tar" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for picture in range(number, pictures, SHARDS):
                caption = json.dumps({"caption": f"Image {picture}: hills of some colours under a sky."})
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
    from minigpt4.datasets.datasets.dataloader_utils import TrainLoader
    from minigpt4.datasets.datasets.web_dataset import WebCaptionDataset
    from minigpt4.processors import Blip2ImageTrainProcessor, BlipCaptionProcessor

    dataset = WebCaptionDataset(shards, Blip2ImageTrainProcessor(IMAGE_SIZE), BlipCaptionProcessor(), "laion", epochs=1)
    return TrainLoader([dataset], batch_size=batch_size, num_workers=1)


def _require_equal(shards, batch_size, pictures):
    """Exit unless both ways give the same float32 tensor for each image of a pass."""
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


def _race(loaders, batches):
    """Return {kind: {"loading", "moving": seconds of processor time an image}}, all kinds at once, batch by batch.

    Moving is what `to_device` does where the device is the CPU. A worker is a fixed number of batches ahead before the
    first batch that counts as well as after the last one.
    """
    import psutil
    import torch

    from minigpt4.common.device import to_device

    cpu, trainer, workers, streams = torch.device("cpu"), psutil.Process(), {}, {}
    for kind, loader in loaders.items():
        before = set(trainer.children())
        streams[kind] = iter(loader)
        next(streams[kind])
        (workers[kind],) = set(trainer.children()) - before
    seconds = {kind: {"loading": -_seconds_when_idle(worker), "moving": 0.0} for kind, worker in workers.items()}
    count = dict.fromkeys(loaders, 0)
    for _ in range(batches - 3):
        for kind, stream in streams.items():
            start = time.process_time()
            batch = next(stream)
            fetched = time.process_time()
            count[kind] += len(to_device(batch, cpu)["image"])
            seconds[kind]["loading"] += fetched - start
            seconds[kind]["moving"] += time.process_time() - fetched
    for kind, worker in workers.items():
        seconds[kind]["loading"] += _seconds_when_idle(worker)
    return {kind: {part: value / count[kind] for part, value in of_kind.items()} for kind, of_kind in seconds.items()}


def _pillow_alone(shard):
    """Return seconds an image of what no exact way can spare: to decode it, to crop it and to resize it."""
    from minigpt4.processors import Blip2ImageTrainProcessor, load_rgb

    crop, *_ = Blip2ImageTrainProcessor(IMAGE_SIZE).transform.transforms
    with tarfile.open(shard) as tar:
        jpegs = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    start = time.process_time()
    for data in jpegs:
        crop(load_rgb(data))
    return (time.process_time() - start) / len(jpegs)


def _seconds_when_idle(worker):
    """Return the processor time of a worker once it waits for the trainer to take a batch."""
    before, times = None, worker.cpu_times()
    while before != times or worker.status() == "running":
        time.sleep(0.2)
        before, times = times, worker.cpu_times()
    return times.user + times.system


def _bytes_per_picture(batch):
    """Return {"tensors", "all"}: bytes of shared memory of a batch, and with what is pickled beside it, an image."""
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
    speed, error, fewer = result["ratio"]["speed"], result["ratio_error"], result["ratio"]["bytes"]
    print(f"equal tensors: yes; {speed:.2f} +- {error:.2f} times the speed, {fewer:.2f} times fewer bytes")
    print(
        f"Pillow's decoding, cropping and resizing alone would be {result['ratio_of_pillow_alone']:.2f} times the speed"
    )
    print(f"where training is on the CPU, which then normalises: {result['ratio_on_cpu']:.2f} times the speed")
    print()
