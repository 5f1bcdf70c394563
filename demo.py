"""Chat about pictures: a page in the browser, on this machine only unless asked otherwise, or a terminal.

python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0
python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --cli
"""

import argparse
import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minigpt4.common.cli import run_program
from minigpt4.common.config import PACKAGE_DIR, Config, add_config_arguments
from minigpt4.common.utils import expand_path, is_url

FORGET_AFTER_S = 3600  # a session and its uploads, from its last answer
QUEUE_SIZE = 32  # people who wait
UPLOAD_LIMIT = "20mb"  # of one file
EXAMPLES = {6: "Describe this image in detail.", 14: "What is in this picture?", 21: "Describe the background."}
STYLE = """
.gradio-container {max-width: 960px !important; margin: auto !important}
#about p {opacity: .7; font-size: .9em; margin: 0}
footer {display: none !important}
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", metavar="PATH", help="short for --options model.ckpt=PATH")
    parser.add_argument("--cli", action="store_true", help="chat in the terminal; no page")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: run.device)")
    where.add_argument("--gpu-id", type=int, metavar="N", help="--device cuda:N; where there is no CUDA, the CPU")
    page = parser.add_argument_group("the page")
    page.add_argument("--server-name", default="127.0.0.1", help="0.0.0.0: the whole network (default: %(default)s)")
    page.add_argument("--server-port", type=int, help="default: the first that is free from 7860 on")
    page.add_argument("--auth", metavar="USER:PASS", help="ask for a name and a password")
    page.add_argument("--share", action="store_true", help="a public link through gradio's servers; needs --auth")
    args = parser.parse_args(argv)
    if args.auth is not None and not all(args.auth.partition(":")):
        parser.error("--auth: expected USER:PASS")
    if args.share and not args.auth:
        parser.error("--share opens this program to the whole internet: add --auth USER:PASS")
    if args.checkpoint:
        pairs = args.options and "=" not in args.options[0]
        ckpt = ["model.ckpt", args.checkpoint] if pairs else [f"model.ckpt={args.checkpoint}"]
        args.options = [*(args.options or []), *ckpt]
    return args


def demo(args):
    """Load the model and chat until the user leaves."""
    print("Initializing Chat")
    cfg = Config(args)
    device = _device(args, cfg)
    from minigpt4 import load_config

    chat, template = load_config(cfg, device)
    is_embedded = expand_path(cfg.model_cfg.vit_ckpt).resolve().is_relative_to(PACKAGE_DIR / "embedded")
    settings = {"temperature": 0.0 if is_embedded else 1.0}  # the small model is no better for being drawn at random
    print("Initialization Finished", flush=True)
    if args.cli:
        from minigpt4.serving.terminal import Terminal

        Terminal(chat, template, **settings).run()
    else:
        Page(chat, template, cfg, settings).launch(args)


def _device(args, cfg):
    """Return the name of the device, None for `run.device`; an 8-bit LLM goes to the same GPU."""
    if args.gpu_id is None:
        return args.device
    import torch

    if not torch.cuda.is_available():
        print(f"--gpu-id {args.gpu_id}: torch sees no CUDA GPU on this machine; the CPU is used", file=sys.stderr)
        return "cpu"
    cfg.model_cfg.device_8bit = args.gpu_id
    return f"cuda:{args.gpu_id}"


async def in_thread(executor, pieces, stop):
    """Yield what the generator `pieces` gives, computed by the one thread of `executor`.

    None comes a few times a second while a piece is computed: that is when gradio notices a closed tab. However this
    ends, `stop` is set, so that the thread is done after the token it is computing.
    """
    end = object()
    try:
        while True:
            step = asyncio.get_running_loop().run_in_executor(executor, next, pieces, end)
            while not (await asyncio.wait({step}, timeout=0.2))[0]:
                yield None
            if step.result() is end:
                return
            yield step.result()
    finally:
        stop.set()
        executor.submit(pieces.close)  # comes after the step that is running


class Page:
    """The web page. What was said lives in a Session on the server; the browser is not asked about the past."""

    def __init__(self, chat, template, cfg, settings):
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio

        from minigpt4.serving.session import Session, WarmSessions

        self.gr, self.chat, self.template, self.cfg, self.defaults = gradio, chat, template, cfg, settings
        self.new_session, self.warm = Session, WarmSessions()
        self.executor = ThreadPoolExecutor(1, "answers")  # one model, one answer at a time

    def launch(self, args):
        """Serve until the program is interrupted."""
        fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # none is downloaded
        page = self._build().queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)
        page.launch(
            server_name=args.server_name,
            server_port=args.server_port,
            share=args.share,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None,
            max_file_size=UPLOAD_LIMIT,
            max_threads=8,
            footer_links=[],
            ssr_mode=False,
            theme=self.gr.themes.Soft(**fonts),
            css=STYLE,
        )

    # what it looks like

    def _build(self):
        gr = self.gr
        blocks = gr.Blocks(title="MiniGPT-4", delete_cache=(600, FORGET_AFTER_S), fill_height=True)
        with blocks:
            gr.Markdown("# MiniGPT-4\nUpload a picture and ask about it.")
            self.chatbot = gr.Chatbot(
                show_label=False,
                scale=1,
                editable="user",
                buttons=["copy", "copy_all"],
                render_markdown=False,  # an answer cannot make the browser load anything
                latex_delimiters=[],
                examples=self._examples(),
                placeholder="Drop pictures into the box below, or begin with one of these:",
            )
            self.box = self._box_class()(
                show_label=False,
                placeholder="Ask something; pictures by the clip, by dropping or by pasting",
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=100_000,  # longer pasted text would become a file
                stop_btn=False,
                autofocus=True,
            )
            with gr.Accordion("How answers are written", open=False):
                self.controls = self._controls()
            self.about = gr.Markdown(self._about(), elem_id="about")
            self.session = gr.State(self.new_session(), time_to_live=FORGET_AFTER_S, delete_callback=self.warm.forget)
            self._connect()
        return blocks

    def _box_class(self):
        gr = self.gr

        class PictureBox(gr.MultimodalTextbox):
            is_template = True  # looks like its parent

            async def async_move_resource_to_block_cache(self, url_or_file_path):
                if url_or_file_path is not None and is_url(url_or_file_path):
                    raise gr.Error("pictures are uploaded; addresses are not fetched", print_exception=False)
                return await super().async_move_resource_to_block_cache(url_or_file_path)

        return PictureBox

    def _controls(self):
        """Return the components of the sampling settings by name."""
        gr = self.gr
        with gr.Row():
            first = {
                "temperature": gr.Slider(
                    0, 2, self.defaults["temperature"], step=0.05, label="Temperature", info="0: always the same answer"
                ),
                "top_p": gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="likeliest words of this total"),
                "top_k": gr.Slider(0, 200, 50, step=1, label="Top-k", info="of so many likeliest words; 0: all"),
            }
        with gr.Row():
            second = {
                "max_new_tokens": gr.Slider(1, 1000, 300, step=1, label="Longest answer", info="tokens"),
                "repetition_penalty": gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty", info="1: none"),
                "num_beams": gr.Slider(1, 10, 1, step=1, label="Beams", info="above 1 the answer comes at once"),
                "seed": gr.Number(None, precision=0, label="Seed", info="empty: another draw each time"),
            }
        return first | second

    def _examples(self):
        """Return examples with drawn pictures, written to the cache folder; the files are fit to be shown to anyone."""
        from PIL import Image

        from minigpt4.embedded import world

        folder = expand_path(self.cfg.env_cfg.cache_root) / "demo"
        folder.mkdir(parents=True, exist_ok=True)
        self.gr.set_static_paths([folder])
        examples = []
        for index, question in EXAMPLES.items():
            path = folder / f"held_out_{index}.png"
            Image.fromarray(world.picture("held_out", index, size=336)[1]).save(path)
            examples.append({"text": question, "files": [str(path)]})
        self.example_files = [(example["text"], (example["files"][0],)) for example in examples]
        return examples

    def _about(self):
        """Return a line on the model and its memory."""
        from minigpt4.common.device import peak_memory_mib

        model, cfg = self.chat.model, self.cfg.model_cfg
        llm = model.llama_model
        parts = [
            f"LLM **{Path(cfg.llama_model).name}**, {llm.num_parameters() / 1e6:,.0f} M parameters",
            f"checkpoint {Path(cfg.ckpt).name}" if cfg.ckpt else "no checkpoint",
            f"{model.device}, {str(model.compute_dtype).removeprefix('torch.')}" + (", 8-bit" * cfg.low_resource),
            f"{peak_memory_mib(model.device) / 1024:.1f} GiB of memory at most so far",
        ]
        return " · ".join(parts)

    # what it does

    def _connect(self):
        gr, session, controls = self.gr, self.session, list(self.controls.values())
        outputs = [self.box, self.chatbot, self.about, session]
        from minigpt4.serving.session import Turn

        async def chat(message, session, *controls):
            message = message or {"text": "", "files": []}
            async for update in self._answer(session, Turn(message["text"], tuple(message["files"])), controls):
                yield update

        async def retry(session, *controls):
            if session.turns:
                if not controls[0]:
                    gr.Info("Temperature is 0: the answer is the same each time")
                async for update in self._answer(session, session.turns.pop(), controls):
                    yield update

        async def edit(event: gr.EditData, session, *controls):
            index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
            if isinstance(index, int) and 0 <= index // 2 < len(session.turns) and isinstance(event.value, str):
                async for update in self._answer(session, session.edited(index // 2, event.value), controls):
                    yield update

        async def example(event: gr.SelectData, session, *controls):
            if isinstance(event.index, int) and 0 <= event.index < len(self.example_files):
                async for update in self._answer(session, Turn(*self.example_files[event.index]), controls):
                    yield update

        one = {"concurrency_id": "answer", "concurrency_limit": 1, "show_progress": "hidden"}
        inputs = [session, *controls]
        answers = [
            self.box.submit(chat, [self.box, *inputs], outputs, api_name="chat", **one),
            self.chatbot.retry(retry, inputs, outputs, api_visibility="private", **one),
            self.chatbot.edit(edit, inputs, outputs, api_visibility="private", **one),
            self.chatbot.example_select(example, inputs, outputs, api_visibility="private", **one),
        ]
        after = {"inputs": session, "outputs": outputs, "cancels": answers, "api_visibility": "private", **one}
        after["concurrency_id"] = "after"
        self.box.stop(self._stopped, **after)
        self.chatbot.undo(self._undone, **after)
        self.chatbot.clear(self._cleared, **after)

    async def _answer(self, session, turn, controls):
        """Yield updates of box, chatbot, line and session while the answer to `turn` is written."""
        gr, stop, notices = self.gr, threading.Event(), []
        settings = dict(zip(self.controls, controls, strict=True))
        self.warm.use(session)
        busy = gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)
        yield busy, self._messages([*session.turns, turn]), gr.skip(), gr.skip()
        pieces = session.stream(self.chat, self.template, turn, stop_event=stop, on_notice=notices.append, **settings)
        try:
            async for piece in in_thread(self.executor, pieces, stop):
                while notices:
                    gr.Warning(notices.pop(0))
                messages = gr.skip() if piece is None else self._messages(session.turns)
                yield gr.skip(), messages, gr.skip(), gr.skip()
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
            yield self._ready(turn), self._messages(session.turns), gr.skip(), session
            raise gr.Error(str(error), print_exception=isinstance(error, RuntimeError)) from error
        yield self._ready(), self._messages(session.turns), self._about(), session

    async def _stopped(self, session):
        await asyncio.get_running_loop().run_in_executor(self.executor, int)  # the token being computed still counts
        return self._ready(), self._messages(session.turns), self._about(), session

    async def _undone(self, session):
        turn = session.turns.pop() if session.turns else None
        return self._ready(turn), self._messages(session.turns), self.gr.skip(), session

    async def _cleared(self, session):
        self.warm.forget(session)
        return self._ready(), [], self.gr.skip(), session

    def _ready(self, turn=None):
        """Return the update of the box that lets the next message be typed; `turn` is put back into it."""
        message = {"text": turn.text, "files": list(turn.pictures)} if turn else None
        return self.gr.update(value=message, interactive=True, submit_btn=True, stop_btn=False)

    @staticmethod
    def _messages(turns):
        messages = []
        for turn in turns:
            content = [*({"path": path} for path in turn.pictures), turn.text]
            messages.append({"role": "user", "content": content})
            if turn.answer or turn is not turns[-1]:
                messages.append({"role": "assistant", "content": turn.answer or "…"})
        return messages


if __name__ == "__main__":
    sys.exit(run_program(demo, parse_args()))
