"""The page of the demo, made with gradio; imported only where a page is shown."""

import asyncio
import os
import signal
import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from html import unescape
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from minigpt4.common.config import Config
from minigpt4.common.utils import is_url
from minigpt4.conversation.chat import MAX_MESSAGE_CHARS
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.serving.answers import SETTINGS, Answers, Listener, checked
from minigpt4.serving.api import Api, said
from minigpt4.serving.guard import Guard, Hosts
from minigpt4.serving.limits import Streams
from minigpt4.serving.session import Session, Sessions, Turn
from minigpt4.serving.shown import about, messages
from minigpt4.serving.tasks import add_tasks
from minigpt4.serving.uploads import Uploads

FORGET_AFTER_S = 3600  # a session and its uploads, from its last answer
FOLDER = Path(__file__).parent
EXAMPLES = {  # image -> question; the images are held-out ones of the quickstart
    str(FOLDER / "examples/night_sky.png"): "Describe this image in detail.",
    str(FOLDER / "examples/grass.png"): "What is in this image?",
    str(FOLDER / "examples/brick_wall.png"): "How many objects are there?",
}
# how a tab of a browser calls itself, also after a refresh; no other tab knows it
TAB = """() => sessionStorage.tab ||= crypto.getRandomValues(new Uint32Array(4)).join("-")"""
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}  # of an event
NOTHING = (gr.skip(), gr.skip(), gr.skip(), gr.skip())  # box, chatbot, line and session as they are


class Page:
    """The web page. What was said lives in a Session here; no browser is asked about the past.

    `template` is an empty Conversation, `settings` are first values of the controls, where they differ.
    """

    def __init__(self, chat: Chat, template: Conversation, cfg: Config, settings: dict):
        self.answers, self.cfg = Answers(chat, template), cfg
        first = {name: setting.first for name, setting in SETTINGS.items()}
        self.defaults = first | {"repetition_penalty": chat.penalty} | settings
        self.reads_boxes = cfg.model_cfg.get(
            "reads_boxes", False
        )  # a model of one's own may have no such key
        self.messages = partial(messages, with_boxes=self.reads_boxes)
        self.sessions = Sessions(age_s=FORGET_AFTER_S)
        self.streams = Streams()
        self.folder = Path(os.environ["GRADIO_TEMP_DIR"])

    def launch(self, args: Namespace) -> None:
        """Serve until the program is interrupted; `args` are those of demo.py."""
        gr.set_static_paths(list(EXAMPLES))
        fonts = {
            "font": ("system-ui", "sans-serif"),
            "font_mono": ("ui-monospace", "monospace"),
        }  # none is downloaded
        # the theme's edges are too faint
        edges = {
            "border_color_primary": "*neutral_300",
            "input_border_color": "*neutral_300",
            "block_border_width": "1px",
        }
        hosts, blocks = Hosts(args.server_name), self._build()
        guard = Middleware(
            Guard, hosts=hosts, uploads=Uploads(self.folder, EXAMPLES), streams=self.streams
        )
        # the line is the page's own; gradio only has to hold as many as may stand in it
        blocks.queue(max_size=32, default_concurrency_limit=None, api_open=False)
        name = args.server_name.strip("[]")
        share_url = blocks.launch(
            server_name=f"[{name}]" if ":" in name else name,  # as IPv6 is written in addresses
            server_port=args.server_port,
            share=args.share,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None,
            app_kwargs={"middleware": [guard]},
            max_file_size="20mb",
            max_threads=40,  # questions, waiting or answered, at the same time
            state_session_capacity=500,
            show_error=True,  # what gradio itself refuses is said too
            enable_monitoring=False,
            footer_links=[],
            ssr_mode=False,
            theme=gr.themes.Soft(**fonts).set(**edges),
            css_paths=[FOLDER / "page.css"],
            js=(FOLDER / "page.js").read_text(encoding="utf-8"),
            prevent_thread_lock=True,
        )[2]
        hosts.add(share_url)
        signal.signal(
            signal.SIGTERM, lambda number, _: sys.exit(128 + number)
        )  # so that uploads are removed
        blocks.block_thread()

    def _build(self) -> gr.Blocks:
        with gr.Blocks(
            title="MiniGPT-4", delete_cache=(600, FORGET_AFTER_S), fill_height=True
        ) as blocks:
            gr.Markdown("# MiniGPT-4\nShow it an image and ask.", elem_id="title")
            self.chatbot = gr.Chatbot(
                show_label=False,
                elem_id="chat",
                scale=1,
                editable="user",
                buttons=["copy", "copy_all"],
                render_markdown=False,
                latex_delimiters=[],
                examples=[
                    {"text": question, "files": [path]} for path, question in EXAMPLES.items()
                ],
                placeholder="### Drop images anywhere, or begin with one of these",
            )
            self.box = gr.MultimodalTextbox(
                show_label=False,
                elem_id="box",
                placeholder="Ask something; add images by the clip, by dropping or by pasting",
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=100_000,  # longer pasted text would become a file
                stop_btn=False,
                autofocus=True,
            )
            if self.reads_boxes:
                add_tasks(blocks, self.chatbot, self.box)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                self.controls = self._controls()
            self.line = gr.Markdown(about(self.answers.chat.model, self.cfg), elem_id="about")
            forget_old = {"delete_callback": lambda _: self.sessions.forget_old()}
            self.session = gr.State(Session(), time_to_live=FORGET_AFTER_S, **forget_old)
            self.tab = gr.Textbox(visible=False)  # what page.js calls this tab of the browser
            self._connect(blocks)
            api = Api(self.answers, self.defaults, self.streams, self.folder)
            gr.api(api.chat, api_name="chat", concurrency_limit=None)
        for block in blocks.blocks.values():
            _only_uploads(block)
        return blocks

    def _controls(self) -> dict:
        """Return the components of the settings by name; gradio holds them to their ranges."""
        controls = {}
        for names in (
            ["temperature", "top_p", "top_k", "num_beams"],
            ["max_new_tokens", "repetition_penalty", "seed"],
        ):
            with gr.Row():
                for name in names:
                    setting, kind = SETTINGS[name], gr.Number if name == "seed" else gr.Slider
                    controls[name] = kind(
                        value=self.defaults[name],
                        minimum=setting.least,
                        maximum=setting.most,
                        step=setting.step,
                        precision=0 if setting.step == 1 else None,
                        label=setting.label,
                        info=setting.info,
                        min_width=120,
                    )
        return controls

    # what it does: an event prepares a turn at once, then `_answer` waits for the model

    def _connect(self, blocks: gr.Blocks) -> None:
        session, temperature = self.session, self.controls["temperature"]
        outputs = [self.box, self.chatbot, self.line, session]
        quick = {"queue": False, **PRIVATE}
        prepared = [
            self.box.submit(self._asked, [self.box, session], outputs, api_name="ask", **quick),
            self.chatbot.retry(
                self._retried, [session, temperature], outputs, api_name="retry", **quick
            ),
            self.chatbot.edit(self._edited, session, outputs, api_name="edit", **quick),
            self.chatbot.example_select(
                self._example, session, outputs, api_name="example", **quick
            ),
        ]
        inputs, answering = (
            [session, *self.controls.values()],
            {"concurrency_limit": None, **PRIVATE},
        )
        answers = [
            event.success(self._answer, inputs, outputs, api_name="answer", **answering)
            for event in prepared
        ]
        for event in answers:
            event.failure(self._stopped, session, outputs, **quick)
        self.box.stop(self._stopped, session, outputs, cancels=answers, **PRIVATE)
        self.chatbot.undo(self._undone, session, outputs, cancels=answers, **PRIVATE)
        self.chatbot.clear(self._cleared, session, outputs, cancels=answers, **PRIVATE)
        blocks.load(self._returned, self.tab, outputs, js=TAB, api_name="return", **quick)

    async def _returned(self, tab: str, request: gr.Request) -> tuple:
        """Show a tab of a browser, opened anew or refreshed, what was said in it."""
        session = self.sessions.of((request.username, tab)) if 0 < len(tab) < 99 else Session()
        is_new = not (session.turns or session.pending or session.is_waiting)
        box, *others = await self._stopped(session)
        return gr.skip() if is_new else box, *others  # somebody may be typing already

    def _asked(self, message: dict | None, session: Session) -> tuple:
        message = message or {"text": "", "files": []}
        return self._prepare(session, Turn(message["text"], tuple(message["files"])))

    def _retried(self, session: Session, temperature: float) -> tuple:
        if temperature == 0:
            gr.Info("The temperature is 0: the answer is the same each time")
        turns = session.turns
        return self._prepare(
            session, session.edited(len(turns) - 1, turns[-1].text) if turns else None
        )

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
        """Return the updates that show `turn`, the next to be answered; none where nothing was asked."""
        session.pending = None
        if turn is None or not turn.text.strip():
            return NOTHING
        if len(turn.text) > MAX_MESSAGE_CHARS:
            raise gr.Error(
                f"{len(turn.text):,} characters; at most {MAX_MESSAGE_CHARS:,}: shorten it",
                print_exception=False,
            )
        session.pending = turn
        busy = gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)
        return busy, self.messages([*session.turns, turn]), gr.skip(), gr.skip()

    async def _answer(
        self, session: Session, request: gr.Request, *controls: float
    ) -> AsyncIterator[tuple]:
        """Yield updates of box, chatbot, line and session while the pending turn is answered."""
        turn, session.pending = session.pending, None
        if turn is None:
            yield NOTHING
            return
        shown, session.is_waiting = None, True
        try:
            settings = checked(dict(zip(self.controls, controls, strict=True)))
            self.sessions.use(session)
            listener = Listener(lambda: self.streams.is_open(request.session_hash))
            async with aclosing(
                self.answers.write(session, turn, settings, listener, gr.Warning)
            ) as steps:
                async for before in steps:
                    is_news, shown = (before, turn.answer) != shown, (before, turn.answer)
                    turns = session.turns if turn in session.turns else [*session.turns, turn]
                    waiting = f"{before} before you" if before else "…"
                    # also without news: that is when gradio notices a closed tab
                    chat = (
                        await asyncio.to_thread(self.messages, turns, waiting)
                        if is_news
                        else gr.skip()
                    )
                    yield gr.skip(), chat, gr.skip(), gr.skip()
        except Exception as error:
            raise said(error) from error
        finally:
            session.is_waiting = False
            if turn not in session.turns:  # refused, or stopped while it waited
                session.pending = turn
        yield (
            _ready(),
            self.messages(session.turns),
            about(self.answers.chat.model, self.cfg),
            session,
        )

    async def _stopped(self, session: Session) -> tuple:
        await _at_rest(session)
        turn, session.pending = session.pending, None  # what has no answer goes back into the box
        return (
            _ready(turn),
            self.messages(session.turns),
            about(self.answers.chat.model, self.cfg),
            session,
        )

    async def _undone(self, session: Session) -> tuple:
        await _at_rest(session)
        turn = session.pending or (session.turns.pop() if session.turns else None)
        session.pending = None
        return _ready(turn), self.messages(session.turns), gr.skip(), session

    async def _cleared(self, session: Session) -> tuple:
        await _at_rest(session)
        self.sessions.forget(session)
        return _ready(), [], gr.skip(), session


async def _at_rest(session: Session) -> None:
    """End the answer that is waited for or being written, if there is one; return when it has ended."""
    if session.stop is not None:
        session.stop.set()
    while session.is_busy or session.is_waiting:
        await asyncio.sleep(0.02)


def _ready(turn: Turn | None = None) -> dict:
    """Return the update of the box that lets people type again; `turn` is put back into it."""
    message = {"text": turn.text, "files": list(turn.images)} if turn else None
    return gr.update(value=message, interactive=True, submit_btn=True, stop_btn=False)


def _only_uploads(block: gr.blocks.Block) -> None:
    """Make gradio refuse addresses among what is sent to a component; it would fetch them."""
    keep = block.async_move_resource_to_block_cache

    async def keep_file(path: str | None) -> str | None:
        if path is not None and is_url(path):
            raise gr.Error("images are uploaded; addresses are not fetched", print_exception=False)
        return await keep(path)

    block.async_move_resource_to_block_cache = keep_file
