"""The parts of the page that know nothing of web pages: answers from a thread, drawn examples, a line on the model."""

import asyncio
import re
from pathlib import Path

EXAMPLES = {  # number of a held-out image of the drawn world -> question
    6: "Describe this image in detail.",
    17: "What is in this image?",
    26: "How many objects are there?",
}


async def in_thread(executor, work, stop):
    """Yield twenty times a second until `work()`, done by `executor`, has ended; raise what it raised.

    Work goes on while the caller shows how far it is. However this ends, the threading.Event `stop` is set: `work` is
    expected to look at it.
    """
    job = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        while not (await asyncio.wait({job}, timeout=0.05))[0]:
            yield
        job.result()
    finally:
        stop.set()
        job.cancel()  # if it has not begun


def draw_examples(folder):
    """Return [(question, path of an image)]; the images are drawn into `folder`."""
    from PIL import Image

    from minigpt4.quickstart import world

    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, question in EXAMPLES.items():
        path = folder / f"held_out_{number}.png"
        drawn = Image.fromarray(world.picture("held_out", number)[1])
        drawn.resize((3 * drawn.width, 3 * drawn.height), Image.Resampling.BICUBIC).save(path)
        examples.append((question, str(path)))
    return examples


def about(model, cfg):
    """Return a line on the model of a `model` section: sizes, device, number format, memory."""
    from minigpt4.common.device import peak_memory_mib

    llm, kind = model.llama_model, "int8" if cfg.low_resource else cfg.llm_quantization
    held = str(model.compute_dtype).removeprefix("torch.") if kind == "none" else f"{kind} LLM"
    parts = [
        f"{cfg.arch}, {llm.config.model_type} of {llm.num_parameters() / 1e6:,.0f} M parameters",
        Path(cfg.ckpt).name if cfg.ckpt else "no checkpoint",
        f"{model.device}, {held}",
        f"memory {peak_memory_mib(model.device) / 1024:.1f} GiB at most so far",
    ]
    return " · ".join(parts)


def as_typed(text):
    """Return HTML that shows `text` as it is: no tag in it works, so no message can make a browser load anything."""
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")


def messages(turns):
    """Return what a chatbot shows: two messages a turn, the second missing while the last answer has no word yet."""
    shown = []
    for turn in turns:
        shown.append({"role": "user", "content": [*({"path": path} for path in turn.pictures), as_typed(turn.text)]})
        if turn.answer or turn is not turns[-1]:
            shown.append({"role": "assistant", "content": as_typed(turn.answer) or "…"})
    return shown
