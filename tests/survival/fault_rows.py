"""All faults of the table in docs/reliability.md."""

import re
import resource
import signal
from collections.abc import Iterator
from itertools import chain

from tests.survival.damage import (
    STORAGE,
    a_folder,
    align,
    bomb,
    captions,
    cut_at,
    cut_before,
    cut_in_image,
    encoded,
    flip_in_header,
    from_s3,
    from_web,
    link_out,
    locked,
    sample,
    shards,
    sideways,
    sixteen_bits,
    unusable,
    with_members,
    with_pickle,
    written,
)
from tests.survival.damaged_checkpoints import (
    a_nan,
    damage_all,
    damage_newest,
    flip_a_byte,
    narrow,
    other_shards,
    resumed,
    trap_as_weights,
    weights,
)
from tests.survival.fault import Fault, at_step, limited, send, send_to_child

BAD_SHARD = {"bad_shard": 1}
S3 = "Shards by S3"
LONG = {"run.iters_per_epoch": 300}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'


def skipped(why: str) -> str:
    """Return the pattern of the line that names a skipped sample or shard."""
    return rf"laion: skipped .*{why}.*"


def _shards() -> Iterator[Fault]:
    cut = r"laion: skipped 00001\.tar|laion: skipped .*unexpected end of data.*"
    yield Fault("Shards", "cut at half", cut, lost=BAD_SHARD, make=shards(cut_at(0.5)))
    yield Fault("Shards", "cut within an image", cut, lost=BAD_SHARD, make=shards(cut_in_image))
    for name, content, what in (
        ("an empty file", b"", "an empty file"),
        ("random bytes", bytes(range(1, 256)) * 400, "no tar archive"),
        ("a web page", b"<html>Not found</html>" * 200, "a web page"),
        ("a parquet file", b"PAR1" * 200, "a parquet file"),
    ):
        says = rf".*1 of 3 shards cannot be read: '.*00001\.tar': {what}.*"
        yield Fault("Shards", name, says, 2, make=shards(written(content)))
    flipped = skipped("damaged at byte .*read of it: 2,")
    between = skipped("end mark is missing.*read of it: 1,")
    yield Fault(
        "Shards",
        "one bit of a header changed",
        flipped,
        lost=BAD_SHARD,
        make=shards(flip_in_header),
    )
    yield Fault(
        "Shards",
        "cut between two members",
        between,
        lost=BAD_SHARD,
        make=shards(cut_before("000006.jpg")),
    )
    gone = r".*1 of 3 shards are missing \(first missing: .*00001\.tar\).*"
    yield Fault("Shards", "one of three missing", gone, 2, make=shards(lambda path: path.unlink()))
    yield Fault("Shards", "a folder in place of one", gone, 2, make=shards(a_folder))
    nothing = r".*no file matches '.*"
    yield Fault(
        "Shards", "all missing", nothing, 2, make=shards(storage="{folder}/{{00007..00009}}.tar")
    )
    yield Fault("Shards", "no match for *", nothing, 2, make=shards(storage="{folder}/none*.tar"))
    short = r".*2 of 5 shards are missing.*"
    yield Fault(
        "Shards",
        "a range that is too long",
        short,
        2,
        make=shards(storage="{folder}/{{00000..00004}}.tar"),
    )
    wrong = r".*write ranges as \{00000\.\.00099\}.*"
    yield Fault(
        "Shards",
        "a range without its brace",
        wrong,
        2,
        make=shards(storage="{folder}/{{00000..00002.tar"),
    )
    unreadable = {"make": locked("data/00001.tar", shards()), "unprivileged": True}
    denied = r".*1 of 3 shards cannot be read: .*Permission denied.*"
    yield Fault("Shards", "not readable for the user", denied, 2, **unreadable)
    refused = r".*'{}:' is refused; shards are local files, http\(s\) URLs, or .*"
    for scheme, address in (
        ("pipe", "pipe:touch {folder}/../executed"),
        ("file", "file:///etc/passwd"),
    ):
        yield Fault(
            "Shards",
            f"a {scheme}: address",
            refused.format(scheme),
            2,
            make=shards(storage=address),
        )


def _samples() -> Iterator[Fault]:
    def lost(name, why, reason, make):
        return Fault("Samples", name, skipped(why), lost={reason: 1}, make=make)

    yield lost("no caption", "no_caption", "no_caption", with_members(json=None))
    yield lost(
        "no key 'caption'",
        "'caption' is missing",
        "no_caption",
        with_members(json=b'{"title": "a circle"}'),
    )
    yield lost(
        "caption: broken JSON", "not valid JSON", "bad_record", with_members(json=b'{"caption": "a')
    )
    yield lost("caption: a list", "is list", "bad_record", with_members(json=b'["a circle"]'))
    yield lost(
        "caption: a number", "caption is int", "bad_caption", with_members(json=b'{"caption": 7}')
    )
    yield lost(
        "caption: empty", "caption is empty", "bad_caption", with_members(json=b'{"caption": ""}')
    )
    yield lost(
        "caption: not UTF-8",
        "codec can't decode",
        "bad_caption",
        with_members(json=None, txt=b"\xff\xfe"),
    )
    yield lost("no image", "no_image", "no_image", with_members(jpg=None))
    yield lost("JPEG cut off", "truncated", "bad_image", with_members(jpg=encoded()[:700]))
    yield lost("JPEG of 0 bytes", "bad_image", "bad_image", with_members(jpg=b""))
    yield lost(
        "text called .jpg",
        "cannot identify image file as",
        "bad_image",
        with_members(jpg=b"This is no image."),
    )
    yield lost(
        "SVG called .jpg", "cannot identify image file as", "bad_image", with_members(jpg=SVG)
    )
    yield lost(".heic", "no_image", "no_image", with_members(jpg=None, heic=b"HEIC"))
    bombs = with_members(jpg=None, png=bomb())
    yield lost("a bomb of 70 million pixels", "at most 67,108,864", "bad_image", bombs)
    yield lost(
        "a symbolic link as image", "no_image", "no_image", with_members(jpg="/etc/hostname")
    )
    fine = {
        "GIF called .jpg": with_members(jpg=encoded("GIF")),
        "1 x 1 pixel": with_members(jpg=encoded(size=(1, 1))),
        "CMYK": with_members(jpg=encoded(mode="CMYK")),
        "16 bits a pixel": with_members(jpg=None, png=sixteen_bits()),
        "turned by EXIF": with_members(jpg=sideways()),
        **{f"a pickle beside it (.{name})": with_pickle(name) for name in ("pyd", "pth", "pkl")},
        "named ../../escaped": sample(lambda members, _: members, "../../escaped"),
        "named by an absolute path": sample(lambda members, _: members, "{folder}/escaped"),
    }
    for name, make in fine.items():
        yield Fault("Samples", name, r"laion: 0 of \d+ samples skipped", lost={}, make=make)


def _web() -> Iterator[Fault]:
    yield Fault(
        "Shards by HTTP", "404", skipped("error: 404"), lost=BAD_SHARD, make=from_web("404")
    )
    yield Fault(
        "Shards by HTTP",
        "503, four times",
        skipped("error: 503"),
        lost=BAD_SHARD,
        make=from_web("503"),
    )
    yield Fault("Shards by HTTP", "503 twice, then it comes", lost={}, make=from_web("busy"))
    cut = skipped(r"curl: \(18\)")
    yield Fault(
        "Shards by HTTP", "connection cut at half", cut, lost=BAD_SHARD, make=from_web("cut")
    )
    slow = skipped(r"curl: \(28\)")
    yield Fault("Shards by HTTP", "no answer", slow, lost=BAD_SHARD, make=from_web("silent"))
    yield Fault("Shards by HTTP", "stalls at half", slow, lost=BAD_SHARD, make=from_web("stalls"))
    yield Fault(
        "Shards by HTTP",
        "a log-in page",
        skipped("ReadError"),
        lost=BAD_SHARD,
        make=from_web("page"),
    )


def _s3() -> Iterator[Fault]:
    group, whole = S3, {"lost": {}}
    yield Fault(
        group, "no such object", skipped("FileNotFoundError"), lost=BAD_SHARD, make=from_s3("404")
    )
    yield Fault(
        group, "503 each time", skipped("Service Unavailable"), lost=BAD_SHARD, make=from_s3("503")
    )
    yield Fault(group, "503 twice, then it comes", make=from_s3("busy"), **whole)
    yield Fault(
        group, "cut at half each time", skipped("bad_shard"), lost=BAD_SHARD, make=from_s3("cut")
    )
    yield Fault(group, "cut at half twice, then whole", make=from_s3("cut-twice"), **whole)
    says = r".*storage: 's3://nowhere/00000\.tar': FileNotFoundError.*"
    yield Fault(
        group, "no such bucket", says, 2, settings={STORAGE: "s3://nowhere/{00000..00002}.tar"}
    )
    unkept = (
        r"laion: a shard could not be kept in run\.shard_cache \({}\), and is read as it comes.*"
    )
    full = limited(resource.RLIMIT_FSIZE, 1 << 20, until="could not be kept")
    caching = from_s3("good", shard_cache="{folder}/cache")
    also = (r"laion: run\.shard_cache: .*\d not kept",)
    says = unkept.format(".*File too large")
    yield Fault(group, "the cache's disk is full", says, make=caching, act=full, also=also, **whole)
    small = from_s3("good", shard_cache="{folder}/cache", shard_cache_gb=1e-6)
    yield Fault(
        group,
        "a cache smaller than a shard",
        unkept.format("no room .*"),
        make=small,
        also=also,
        **whole,
    )
    kept = r"laion: run\.shard_cache: \d+ shards read from it, \d+ kept in it"
    again = {"make": caching, "settings": {"run.iters_per_epoch": 12}}
    yield Fault(group, "a cache, each shard read several times", kept, **again, **whole)


def _sizes() -> Iterator[Fault]:
    each = r".*1 shard\(s\) for 2 rank\(s\).*each worker walks all shards.*"
    yield Fault(
        "Sizes", "one shard for two ranks", each, lost={}, make=shards(number=1, samples=9), ranks=2
    )
    small = {"make": shards(number=1, samples=3), "settings": {"run.batch_size_train": 4}}
    yield Fault("Sizes", "3 samples, batches of 4", lost={}, **small)
    says = r"error: laion: 5 of the first 5 samples were unusable.*"
    yield Fault("Sizes", "not one sample usable", says, 1, make=unusable)


def _folders() -> Iterator[Fault]:
    def refused(name, says, **changes):
        return Fault("Stage 2", name, says, 2, stage=2, make=align(**changes))

    cap = "filter_cap.json"
    yield refused(
        "filter_cap.json broken",
        r".*not valid JSON.*",
        change=lambda f: (f / cap).write_text('{"annot'),
    )
    yield refused(
        "filter_cap.json missing",
        r".*has no filter_cap\.json.*",
        change=lambda f: (f / cap).unlink(),
    )
    keys = [{"image_id": "0", "text": "A circle."}]
    yield refused("a record without caption", r".*record 0: 'caption' is None.*", records=keys)
    escape = [{"image_id": "../outside", "caption": "A circle."}]
    yield refused("a path out of the folder", r".*leads out of the image folder.*", records=escape)
    for name, reason, change in (
        ("an image missing", "missing_file", lambda folder: (folder / "image/3.jpg").unlink()),
        ("an image cut off", "bad_image", lambda folder: cut_at(0.5)(folder / "image/3.jpg")),
        ("a link out of the folder", "bad_image", link_out),
    ):
        says = rf"cc_sbu_align: skipped 3: {reason}.*"
        yield Fault("Stage 2", name, says, lost={reason: 1}, stage=2, make=align(change))


def _numbers() -> Iterator[Fault]:
    own = {"program": "tests/survival/weighted_task.py", "ranks": 2}
    own["settings"] = {"run.task": "by_length", "run.batch_size_train": 1, "run.iters_per_epoch": 8}
    own["settings"] |= {"run.max_skipped_updates": 2}
    one_bad = captions(["a red circle"] * 8, ["a red circle"] * 7 + ["circle"])
    also = (r"step \d: update skipped on all ranks, 1 in a row, 1 so far",)
    says = r"step \d: loss is inf on rank \d \(samples laion/.*\); optimizer not stepped"
    found = {"lost": {}, "make": one_bad, "also": also, "never": "2 so far"}
    yield Fault("Numbers", "an infinite loss on one of two ranks", says, **found, **own)
    bad = captions(["a red circle"] * 8, ["circle"] * 8)
    stops = r"error: step 1: .*2 in a row \(run\.max_skipped_updates\).*"
    yield Fault("Numbers", "the same at every step", stops, 1, make=bad, **own)
    says = r".*run\.init_lr: 2e\+37 is out of range.*"
    yield Fault("Numbers", "a learning rate of 2e37", says, 2, settings={"run.init_lr": 2e37})
    says = r"error: laion: \d+ of the first \d+ samples were unusable \(\d+ bad_caption; last: .*leaves nothing of '\.'\).*"
    empty = {"make": captions(["."] * 8), "settings": {"model.end_sym": ""}}
    yield Fault("Numbers", "nothing to learn: the processor empties each caption", says, 1, **empty)
    says = r"error: model\.ckpt: .* holds numbers that are not finite.*"
    yield Fault("Numbers", "a nan in model.ckpt", says, 1, make=weights(a_nan))
    full = r"error: the memory of the machine is full.*run\.batch_size_train \(now 12000\).*"
    memory = limited(resource.RLIMIT_DATA, 3 * 2**30)
    yield Fault(
        "Numbers",
        "a batch larger than the memory",
        full,
        1,
        settings={"run.batch_size_train": 12000},
        act=memory,
    )


def _processes() -> Iterator[Fault]:
    group, saved = "Processes", r"ended by {} before epoch 0, step \d+: saved .*"
    long = {"settings": LONG}
    term, interrupt = at_step(2, send(signal.SIGTERM)), at_step(2, send(signal.SIGINT))
    yield Fault(group, "SIGTERM", saved.format("SIGTERM"), 143, act=term, **long)
    yield Fault(group, "SIGINT (Ctrl-C)", saved.format("SIGINT"), 130, act=interrupt, **long)
    yield Fault(
        group, "SIGTERM to torchrun, 2 ranks", saved.format("SIGTERM"), 1, act=term, ranks=2, **long
    )
    lost = at_step(2, send_to_child(signal.SIGKILL))
    says = r"error: rank 0 lost the other ranks: .*"
    yield Fault(group, "SIGKILL of one of 2 ranks", says, 1, act=lost, ranks=2, **long)
    again = {"run.save_every_iters": 2, "run.resume_ckpt_path": "auto", "run.iters_per_epoch": 20}
    restarted = {"settings": again, "launcher": ("--max-restarts=3",), "ranks": 2, "act": lost}
    says = r".*Resume checkpoint from .*checkpoint_0_iter_\d+\.pth"
    yield Fault(group, "the same with --max-restarts=3", says, 0, lost={}, **restarted)
    stop, patience = at_step(2, send_to_child(signal.SIGSTOP)), LONG | {"run.step_timeout_s": 5}
    says = r".*rank 0 has waited \d+ s for rank 1 \(run\.step_timeout_s\); .*"
    yield Fault(group, "one of 2 ranks hangs", says, 1, act=stop, ranks=2, settings=patience)
    workers = LONG | {"run.num_workers": 1}
    says = r"error: rank 0 lost a process that reads data: DataLoader worker .*"
    yield Fault(group, "SIGKILL of a DataLoader worker", says, 1, act=lost, settings=workers)


def _checkpoints() -> Iterator[Fault]:
    group, before = "Checkpoints", r".*is damaged .*; trying the one before"
    small, every = 200_000, {"settings": {"run.save_every_iters": 2}}
    unsaved = r".*checkpoint not saved to .*File too large.*; training goes on"
    full = limited(resource.RLIMIT_FSIZE, small)
    also = (r"error: the last epoch's checkpoint could not be written.*",)
    yield Fault(group, "disk full to the end", unsaved, 1, act=full, also=also, lost={}, **every)
    passing = limited(resource.RLIMIT_FSIZE, small, until="checkpoint not saved")
    yield Fault(
        group,
        "disk full for a while",
        unsaved,
        act=passing,
        also=(r"Checkpoint: .*checkpoint_0\.pth",),
        lost={},
        **every,
    )
    yield Fault(group, "newest cut at half", before, lost={}, make=resumed(damage_newest))
    yield Fault(group, "newest with one bit changed", before, lost={}, make=resumed(flip_a_byte))
    none = r"error: run\.resume_ckpt_path: none of the 2 checkpoints .* can be read.*"
    yield Fault(group, "all damaged", none, 1, make=resumed(damage_all))
    yield Fault(
        group,
        "of an LLM of another width",
        r"error: .*was trained for a 64-wide LLM.*",
        1,
        make=weights(narrow),
    )
    runs_code = r"error: {}: .*can run code.*"
    for key in ("model.ckpt", "run.resume_ckpt_path"):
        says = runs_code.format(re.escape(key))
        yield Fault(group, f"a pickle that runs code ({key})", says, 1, make=trap_as_weights(key))
    unwritable = {"make": locked("out", shards()), "unprivileged": True}
    yield Fault(
        group,
        "output folder not writable",
        r".*run\.output_dir: .* is not writable for user \d+; choose another place .*",
        2,
        **unwritable,
    )
    workers, rate = resumed(**{"run.num_workers": 1}), resumed(**{"run.init_lr": 0.5})
    for name, line, changes in (
        ("other number of ranks", "world size: 2, the checkpoint has 1", {"ranks": 2}),
        (
            "other number of workers",
            r"run\.num_workers: 1, the checkpoint has 0",
            {"make": workers},
        ),
        (
            "other shards",
            r"listing\.datasets\.laion: .*, the checkpoint has .*",
            {"make": other_shards},
        ),
        ("other settings", r"run\.init_lr: 0\.5, the checkpoint has 0\.02", {"make": rate}),
    ):
        also = ("is of a run with other settings and cannot be resumed exactly",)
        yield Fault(
            group,
            f"resume with {name}",
            rf"  {line}",
            1,
            also=also,
            **({"make": resumed()} | changes),
        )


def _configuration() -> Iterator[Fault]:
    group = "Configuration"
    yield Fault(
        group,
        "a misspelt key",
        r".*run\.init_lrr: unknown key\. Did you mean 'init_lr'\?.*",
        2,
        settings={"run.init_lrr": 1},
    )
    says = r".*unknown dataset builder 'webdatset'.*Did you mean 'webdataset'\?.*"
    yield Fault(
        group, "an unknown builder", says, 2, settings={"datasets.laion.builder": "webdatset"}
    )
    says = r".*run\.max_epoch: 'many' \(str\) is not an integer.*"
    yield Fault(group, "text for a number", says, 2, settings={"run.max_epoch": "many"})
    says = r".*model\.llama_model: no transformers model in .*"
    yield Fault(group, "no LLM there", says, 2, settings={"model.llama_model": "/nowhere/llm"})
    yield Fault(
        group,
        "no storage",
        r".*datasets\.laion\.build_info\.storage: .*",
        2,
        settings={STORAGE: None},
    )


GROUPS = (
    _shards,
    _samples,
    _web,
    _s3,
    _sizes,
    _folders,
    _numbers,
    _processes,
    _checkpoints,
    _configuration,
)
FAULTS = list(chain.from_iterable(group() for group in GROUPS))
