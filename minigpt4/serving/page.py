"""The page of the demo, made with gradio; imported only where a page is shown."""

import asyncio
import re
import threading
from argparse import Namespace
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from html import unescape
from pathlib import Path

import gradio as gr
from torch import nn

from minigpt4.common.config import Config
from minigpt4.common.device import peak_memory_mib
from minigpt4.common.utils import is_url
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.serving.session import Session, Turn, WarmSessions

FORGET_AFTER_S = 3600  # a session and its uploads, from its last answer
RANDOM = -1  # seed
FOLDER = Path(__file__).parent
EXAMPLES = {  # image -> question; the images are held-out ones of the quickstart
    str(FOLDER / "examples/night_sky.png"): "Describe this image in detail.",
    str(FOLDER / "examples/grass.png"): "What is in this image?",
    str(FOLDER / "examples/brick_wall.png"): "How many objects are there?",
}
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}  # of an event
NOTHING = "nothing to answer: type a question"


class Page:
    """The web page. What was said lives in a Session here; no browser is asked about the past.

    `template` is an empty Conversation, `settings` the first values of the controls.
    """

    def __init__(self, chat: Chat, template: Conversation, cfg: Config, settings: dict):
        self.chat, self.template = chat, template
        self.cfg, self.defaults = cfg, settings
        self.warm = WarmSessions()
        self.executor = ThreadPoolExecutor(1, "answers")  # one model, one answer at a time

    def launch(self, args: Namespace) -> None:
        """Serve until the program is interrupted; `args` are those of demo.py."""
        gr.set_static_paths(list(EXAMPLES))
        fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # none is downloaded
        self._build().queue(max_size=32, default_concurrency_limit=1).launch(  # 32 people may wait
            server_name=args.server_name,
            server_port=args.server_port,
            share=args.share,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None,
            max_file_size="20mb",
            max_threads=8,
            show_error=True,  # what gradio itself refuses is said too
            footer_links=[],
            ssr_mode=False,
            theme=gr.themes.Soft(**fonts),
            css_paths=[FOLDER / "page.css"],
        )

    def _build(self) -> gr.Blocks:
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
                examples=[{"text": question, "files": [path]} for path, question in EXAMPLES.items()],
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
            _only_uploads(self.box)
            with gr.Accordion("Settings", open=False):
                self.controls = self._controls()
            self.line = gr.Markdown(about(self.chat.model, self.cfg), elem_id="about")
            self.session = gr.State(Session(), time_to_live=FORGET_AFTER_S, delete_callback=self.warm.forget)
            self._connect()
        return blocks

    def _controls(self) -> dict:
        """Return the components of the settings by name; gradio holds them to their ranges."""
        slider, whole = gr.Slider, {"step": 1, "precision": 0}
        first = self.defaults["temperature"]
        with gr.Row():
            upper = {
                "temperature": slider(0, 2, first, step=0.05, label="Temperature", info="0: always the same answer"),
                "top_p": slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="1: any word"),
                "top_k": slider(0, 200, 50, **whole, label="Top-k", info="0: any word"),
                "num_beams": slider(1, 10, 1, **whole, label="Beams", info="1: word by word"),
            }
        with gr.Row():
            seed = {"minimum": RANDOM, "maximum": 2**53, "precision": 0, "info": f"{RANDOM}: drawn anew"}
            lower = {
                "max_new_tokens": slider(1, 1000, 300, **whole, label="Longest answer", info="tokens"),
                "repetition_penalty": slider(1, 2, 1, step=0.05, label="Repetition penalty", info="1: none"),
                "seed": gr.Number(RANDOM, label="Seed", **seed),
            }
        return upper | lower

    # what it does: an event prepares a turn at once, then `_answer` waits for the model

    def _connect(self) -> None:
        session, temperature = self.session, self.controls["temperature"]
        outputs = [self.box, self.chatbot, self.line, session]
        quick, asking = {"queue": False, **PRIVATE}, {"queue": False, "show_progress": "hidden"}
        prepared = [
            self.box.submit(self._asked, [self.box, session], outputs, api_name="ask", **asking),
            self.chatbot.retry(self._retried, [session, temperature], outputs, api_name="retry", **quick),
            self.chatbot.edit(self._edited, session, outputs, api_name="edit", **quick),
            self.chatbot.example_select(self._example, session, outputs, api_name="example", **quick),
        ]
        answering = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        inputs = [session, *self.controls.values()]
        answers = [event.success(self._answer, inputs, outputs, api_name="answer", **answering) for event in prepared]
        for event in answers:
            event.failure(self._stopped, session, outputs, **quick)
        self.box.stop(self._stopped, session, outputs, cancels=answers, **PRIVATE)
        self.chatbot.undo(self._undone, session, outputs, cancels=answers, **PRIVATE)
        self.chatbot.clear(self._cleared, session, outputs, cancels=answers, **PRIVATE)

    def _asked(self, message: dict | None, session: Session) -> tuple:
        message = message or {"text": "", "files": []}
        return self._prepare(session, Turn(message["text"], tuple(message["files"])))

    def _retried(self, session: Session, temperature: float) -> tuple:
        if temperature == 0:
            gr.Info("The temperature is 0: the answer is the same each time")
        turns = session.turns
        return self._prepare(session, session.edited(len(turns) - 1, turns[-1].text) if turns else None)

    def _edited(self, event: gr.EditData, session: Session) -> tuple:
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        is_known = isinstance(index, int) and 0 <= index // 2 < len(session.turns)
        turn = session.edited(index // 2, unescape(event.value)) if is_known else None
        return self._prepare(session, turn)

    def _example(self, event: gr.SelectData, session: Session) -> tuple:
        is_known = event.index in range(len(EXAMPLES))
        path, question = list(EXAMPLES.items())[event.index if is_known else 0]
        return self._prepare(session, Turn(question, (path,)) if is_known else None)

    def _prepare(self, session: Session, turn: Turn | None) -> tuple:
        """Return the updates that show `turn`, the next to be answered. Raises gr.Error for none."""
        if turn is None or not turn.text.strip():
            raise gr.Error(NOTHING, print_exception=False)
        session.pending = turn
        busy = gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)
        return busy, messages([*session.turns, turn]), gr.skip(), gr.skip()

    async def _answer(self, session: Session, *controls: float) -> AsyncIterator[tuple]:
        """Yield updates of box, chatbot, line and session while the pending turn is answered."""
        turn, session.pending = session.pending, None
        if turn is None:
            raise gr.Error(NOTHING, print_exception=False)
        self.warm.use(session)
        stop, notices = threading.Event(), []
        session.stop = stop
        settings = dict(zip(self.controls, controls, strict=True))
        settings |= {"seed": None if settings["seed"] == RANDOM else settings["seed"], "stop_event": stop}
        # the thread writes into `turn`; the loop below looks how far it is
        pieces, shown = session.stream(self.chat, self.template, turn, on_notice=notices.append, **settings), ""
        try:
            async for _ in in_thread(self.executor, lambda: deque(pieces, 0), stop):
                while notices:
                    gr.Warning(notices.pop(0))
                is_news, shown = turn.answer != shown, turn.answer
                # also without news: that is when gradio notices a closed tab
                yield gr.skip(), messages(session.turns) if is_news else gr.skip(), gr.skip(), gr.skip()
        except Exception as error:
            session.pending = turn
            is_known = isinstance(error, (ValueError, OSError))
            message = str(error) if is_known else f"{type(error).__name__}; the program's output says more"
            raise gr.Error(message, print_exception=not is_known) from error
        yield _ready(), messages(session.turns), about(self.chat.model, self.cfg), session

    async def _stopped(self, session: Session) -> tuple:
        await _at_rest(session)
        turn, session.pending = session.pending, None  # what has no answer goes back into the box
        return _ready(turn), messages(session.turns), about(self.chat.model, self.cfg), session

    async def _undone(self, session: Session) -> tuple:
        await _at_rest(session)
        turn = session.pending or (session.turns.pop() if session.turns else None)
        session.pending = None
        return _ready(turn), messages(session.turns), gr.skip(), session

    async def _cleared(self, session: Session) -> tuple:
        await _at_rest(session)
        self.warm.forget(session)
        return _ready(), [], gr.skip(), session


async def in_thread(executor: Executor, work: Callable, stop: threading.Event) -> AsyncIterator[None]:
    """Yield twenty times a second until `work()`, done by `executor`, ends; raise what it raised.

    However this ends, `stop` is set: `work` is expected to look at it.
    """
    job = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        while not (await asyncio.wait({job}, timeout=0.05))[0]:
            yield
        job.result()
    finally:
        stop.set()
        job.cancel()  # if it has not begun


async def _at_rest(session: Session) -> None:
    """End the answer that is being written, if one is; return when its last token is there."""
    if session.stop is not None:
        session.stop.set()
    while session.is_busy:
        await asyncio.sleep(0.02)


def _ready(turn: Turn | None = None) -> dict:
    """Return the update of the box that lets people type again; `turn` is put back into it."""
    message = {"text": turn.text, "files": list(turn.images)} if turn else None
    return gr.update(value=message, interactive=True, submit_btn=True, stop_btn=False)


def _only_uploads(box: gr.MultimodalTextbox) -> None:
    """Make gradio refuse addresses among the images; it would fetch them."""
    keep = box.async_move_resource_to_block_cache

    async def keep_file(path: str | None) -> str | None:
        if path is not None and is_url(path):
            raise gr.Error("images are uploaded; addresses are not fetched", print_exception=False)
        return await keep(path)

    box.async_move_resource_to_block_cache = keep_file


def about(model: nn.Module, config: Config) -> str:
    """Return a line on the model that `config` made: sizes, device, number format, memory."""
    llm, cfg = model.llama_model, config.model_cfg
    kind = "int8" if cfg.low_resource else cfg.llm_quantization
    held = str(model.compute_dtype).removeprefix("torch.") if kind == "none" else f"{kind} LLM"
    parts = [
        f"{cfg.arch}, {llm.config.model_type} of {llm.num_parameters() / 1e6:,.0f} M parameters",
        Path(cfg.ckpt).name if cfg.ckpt else "no checkpoint",
        f"{model.device}, {held}",
        f"memory {peak_memory_mib(model.device) / 1024:.1f} GiB at most so far",
    ]
    return " · ".join(parts)


def as_typed(text: str) -> str:
    """Return HTML that shows `text` as it is: no tag works, so nothing can be loaded by it."""
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")


def messages(turns: list[Turn]) -> list[dict]:
    """Return what a chatbot shows: two messages a turn; an answer without a word yet is left out."""
    shown = []
    for turn in turns:
        images = [{"path": path} for path in turn.images]
        shown.append({"role": "user", "content": [*images, as_typed(turn.text)]})
        if turn.answer or turn is not turns[-1]:
            shown.append({"role": "assistant", "content": as_typed(turn.answer) or "…"})
    return shown
