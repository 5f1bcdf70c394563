"""Chat about images: a page in the browser, on this machine only unless asked otherwise, or a terminal.

python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0
python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --cli
"""

import argparse
import asyncio
import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from html import unescape

from minigpt4.common.cli import run_program
from minigpt4.common.config import PACKAGE_DIR, Config, add_config_arguments
from minigpt4.common.utils import expand_path, is_url

FORGET_AFTER_S = 3600  # a session and its uploads, from its last answer
QUEUE_SIZE = 32  # people who wait
UPLOAD_LIMIT = "20mb"  # of one file
RANDOM = -1  # seed
STYLE = """
.gradio-container {max-width: 960px !important; width: 100%; margin: auto !important}
.gradio-container main, .gradio-container .wrap {width: 100%}
#title h1 {margin: 0} #title p {opacity: .7}
#about p {opacity: .7; font-size: .85em; text-align: center}
#chat .examples {grid-template-columns: repeat(3, 1fr); max-width: 100%}
#chat .example-content > div, #chat .example img {width: 112px; height: 112px}
#chat .message img {max-height: 220px; width: auto; border-radius: 6px}
#chat button[title="Share"], footer {display: none !important}
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
    sys.stdout.reconfigure(line_buffering=True)  # the page's address also reaches a log file at once
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


class Page:
    """The web page. What was said lives in a Session on the server; the browser is not asked about the past."""

    def __init__(self, chat, template, cfg, settings):
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio

        from minigpt4.serving import page, session

        self.gr, self.parts, self.chat, self.template, self.cfg = gradio, page, chat, template, cfg
        self.defaults, self.Session, self.Turn, self.warm = (
            settings,
            session.Session,
            session.Turn,
            session.WarmSessions(),
        )
        self.executor = ThreadPoolExecutor(1, "answers")  # one model, one answer at a time
        self.examples = page.draw_examples(expand_path(cfg.env_cfg.cache_root) / "demo")

    def launch(self, args):
        """Serve until the program is interrupted."""
        self.gr.set_static_paths([path for _, path in self.examples])
        fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # none is downloaded
        self._build().queue(max_size=QUEUE_SIZE, default_concurrency_limit=1).launch(
            server_name=args.server_name,
            server_port=args.server_port,
            share=args.share,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None,
            max_file_size=UPLOAD_LIMIT,
            max_threads=8,
            show_error=True,  # what gradio itself refuses is said too
            footer_links=[],
            ssr_mode=False,
            theme=self.gr.themes.Soft(**fonts),
            css=STYLE,
        )

    # what it looks like

    def _build(self):
        gr = self.gr
        with gr.Blocks(title="MiniGPT-4", delete_cache=(600, FORGET_AFTER_S), fill_height=True) as blocks:
            gr.Markdown("# MiniGPT-4\nShow it an image and ask.", elem_id="title")
            self.chatbot = gr.Chatbot(
                show_label=False,
                elem_id="chat",
                scale=1,
                editable="user",
                buttons=["copy", "copy_all"],
                render_markdown=False,
                latex_delimiters=[],
                examples=[{"text": question, "files": [path]} for question, path in self.examples],
                placeholder="### Drop images into the box below, or begin with one of these",
            )
            self.box = gr.MultimodalTextbox(
                show_label=False,
                placeholder="Ask something; add images by the clip, by dropping or by pasting",
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=100_000,  # longer pasted text would become a file
                stop_btn=False,
                autofocus=True,
            )
            self._only_uploads(self.box)
            with gr.Accordion("Settings", open=False):
                self.controls = self._controls()
            self.line = gr.Markdown(self._about(), elem_id="about")
            self.session = gr.State(self.Session(), time_to_live=FORGET_AFTER_S, delete_callback=self.warm.forget)
            self._connect()
        return blocks

    def _only_uploads(self, box):
        """Make gradio refuse addresses among the images; it would fetch them."""
        keep = box.async_move_resource_to_block_cache

        async def keep_file(path):
            if path is not None and is_url(path):
                raise self.gr.Error("images are uploaded; addresses are not fetched", print_exception=False)
            return await keep(path)

        box.async_move_resource_to_block_cache = keep_file

    def _controls(self):
        """Return the components of the sampling settings by name; gradio holds them to their ranges."""
        slider, first = self.gr.Slider, self.defaults["temperature"]
        with self.gr.Row():
            upper = {
                "temperature": slider(0, 2, first, step=0.05, label="Temperature", info="0: always the same answer"),
                "top_p": slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="1: any word"),
                "top_k": slider(0, 200, 50, step=1, precision=0, label="Top-k", info="0: any word"),
                "num_beams": slider(1, 10, 1, step=1, precision=0, label="Beams", info="1: word by word"),
            }
        with self.gr.Row():
            lower = {
                "max_new_tokens": slider(1, 1000, 300, step=1, precision=0, label="Longest answer", info="tokens"),
                "repetition_penalty": slider(1, 2, 1, step=0.05, label="Repetition penalty", info="1: none"),
                "seed": self.gr.Number(
                    RANDOM, precision=0, minimum=RANDOM, maximum=2**53, label="Seed", info=f"{RANDOM}: drawn anew"
                ),
            }
        return upper | lower

    def _about(self):
        return self.parts.about(self.chat.model, self.cfg.model_cfg)

    # what it does: an event prepares a turn at once, then `_answer` waits for the model

    def _connect(self):
        gr, session, private = self.gr, self.session, {"api_visibility": "private", "show_progress": "hidden"}
        outputs = [self.box, self.chatbot, self.line, session]

        def ask(message, session):
            message = message or {"text": "", "files": []}
            return self._prepare(session, self.Turn(message["text"], tuple(message["files"])))

        def retry(session, temperature):
            if temperature == 0:
                gr.Info("The temperature is 0: the answer is the same each time")
            last = len(session.turns) - 1
            return self._prepare(session, session.edited(last, session.turns[last].text) if session.turns else None)

        def edit(event: gr.EditData, session):
            index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
            is_known = isinstance(index, int) and 0 <= index // 2 < len(session.turns)
            return self._prepare(session, session.edited(index // 2, unescape(event.value)) if is_known else None)

        def example(event: gr.SelectData, session):
            is_known = event.index in range(len(self.examples))
            question, path = self.examples[event.index] if is_known else ("", "")
            return self._prepare(session, self.Turn(question, (path,)) if is_known else None)

        quick = {"queue": False, **private}
        prepared = [
            self.box.submit(ask, [self.box, session], outputs, api_name="ask", queue=False, show_progress="hidden"),
            self.chatbot.retry(retry, [session, self.controls["temperature"]], outputs, **quick),
            self.chatbot.edit(edit, session, outputs, **quick),
            self.chatbot.example_select(example, session, outputs, **quick),
        ]
        answering = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        inputs = [session, *self.controls.values()]
        answers = [event.success(self._answer, inputs, outputs, api_name="answer", **answering) for event in prepared]
        for event in answers:
            event.failure(self._stopped, session, outputs, **quick)
        self.box.stop(self._stopped, session, outputs, cancels=answers, **private)
        self.chatbot.undo(self._undone, session, outputs, cancels=answers, **private)
        self.chatbot.clear(self._cleared, session, outputs, cancels=answers, **private)

    def _prepare(self, session, turn):
        """Return the updates that show `turn`, the next to be answered; for None or an empty one an error."""
        if turn is None or not turn.text.strip():
            raise self.gr.Error("nothing to answer: type a question", print_exception=False)
        session.pending = turn
        busy = self.gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)
        return busy, self.parts.messages([*session.turns, turn]), self.gr.skip(), self.gr.skip()

    async def _answer(self, session, *controls):
        """Yield updates of box, chatbot, line and session while the answer to the pending turn is written."""
        gr, stop, notices = self.gr, threading.Event(), []
        turn, session.pending = session.pending, None
        if turn is None:
            raise gr.Error("nothing to answer: type a question", print_exception=False)
        self.warm.use(session)
        session.stop = stop
        settings = dict(zip(self.controls, controls, strict=True))
        settings |= {"seed": None if settings["seed"] == RANDOM else settings["seed"], "stop_event": stop}
        pieces, shown = session.stream(self.chat, self.template, turn, on_notice=notices.append, **settings), ""
        try:
            async for _ in self.parts.in_thread(self.executor, lambda: deque(pieces, 0), stop):
                while notices:
                    gr.Warning(notices.pop(0))
                is_news, shown = turn.answer != shown, turn.answer
                # also without news: that is when gradio notices a closed tab
                yield gr.skip(), self.parts.messages(session.turns) if is_news else gr.skip(), gr.skip(), gr.skip()
        except Exception as error:
            session.pending = turn
            is_known = isinstance(error, (ValueError, OSError))
            message = str(error) if is_known else f"{type(error).__name__}; the program's output says more"
            raise gr.Error(message, print_exception=not is_known) from error
        yield self._ready(), self.parts.messages(session.turns), self._about(), session

    async def _stopped(self, session):
        await self._at_rest(session)
        turn, session.pending = session.pending, None  # what has no answer goes back into the box
        return self._ready(turn), self.parts.messages(session.turns), self._about(), session

    async def _undone(self, session):
        await self._at_rest(session)
        turn = session.pending or (session.turns.pop() if session.turns else None)
        session.pending = None
        return self._ready(turn), self.parts.messages(session.turns), self.gr.skip(), session

    async def _cleared(self, session):
        await self._at_rest(session)
        self.warm.forget(session)
        return self._ready(), [], self.gr.skip(), session

    async def _at_rest(self, session):
        """End the answer that is being written, if one is; return when its last token is there."""
        if session.stop is not None:
            session.stop.set()
        while session.is_busy:
            await asyncio.sleep(0.02)

    def _ready(self, turn=None):
        """Return the update of the box that lets the next message be typed; `turn` is put back into it."""
        message = {"text": turn.text, "files": list(turn.pictures)} if turn else None
        return self.gr.update(value=message, interactive=True, submit_btn=True, stop_btn=False)


if __name__ == "__main__":
    sys.exit(run_program(demo, parse_args()))
