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
from minigpt4.conversation.chat import MAX_MESSAGE_CHARS
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.serving.answers import SETTINGS, Answers, Listener, checked
from minigpt4.serving.api import Api, said
from minigpt4.serving.guard import Guard, Hosts
from minigpt4.serving.limits import Streams
from minigpt4.serving.page_parts import (
    EXAMPLES,
    FOLDER,
    chatbot,
    controls,
    only_uploads,
    textbox,
    theme,
)
from minigpt4.serving.session import Session, Sessions, Turn
from minigpt4.serving.shown import about, messages
from minigpt4.serving.tasks import add_tasks
from minigpt4.serving.uploads import Uploads

FORGET_AFTER_S = 3600  # a session and its uploads, from its last answer
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
        # a model of one's own may have no such key
        self.reads_boxes = cfg.model_cfg.get("reads_boxes", False)
        self.messages = partial(messages, with_boxes=self.reads_boxes)
        self.sessions = Sessions(age_s=FORGET_AFTER_S)
        self.streams = Streams()
        self.folder = Path(os.environ["GRADIO_TEMP_DIR"])

    def launch(self, args: Namespace) -> None:
        """Serve until the program is interrupted; `args` are those of demo.py."""
        gr.set_static_paths(list(EXAMPLES))
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
            theme=theme(),
            css_paths=[FOLDER / "page.css"],
            js=(FOLDER / "page.js").read_text(encoding="utf-8"),
            prevent_thread_lock=True,
        )[2]
        hosts.add(share_url)
        # an exit, so that uploads are removed
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        blocks.block_thread()

    def _build(self) -> gr.Blocks:
        forgetting = (600, FORGET_AFTER_S)  # seconds between two looks, and the age
        with gr.Blocks(title="MiniGPT-4", delete_cache=forgetting, fill_height=True) as blocks:
            gr.Markdown("# MiniGPT-4\nShow it an image and ask.", elem_id="title")
            self.chatbot, self.box = chatbot(), textbox()
            if self.reads_boxes:
                add_tasks(blocks, self.chatbot, self.box)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                self.controls = controls(self.defaults)
            self.line = gr.Markdown(about(self.answers.chat.model, self.cfg), elem_id="about")
            forget_old = {"delete_callback": lambda _: self.sessions.forget_old()}
            self.session = gr.State(Session(), time_to_live=FORGET_AFTER_S, **forget_old)
            self.tab = gr.Textbox(visible=False)  # what page.js calls this tab of the browser
            self._connect(blocks)
            api = Api(self.answers, self.defaults, self.streams, self.folder)
            gr.api(api.chat, api_name="chat", concurrency_limit=None)
        for block in blocks.blocks.values():
            only_uploads(block)
        return blocks

    # what it does: an event prepares a turn at once, then `_answer` waits for the model

    def _connect(self, blocks: gr.Blocks) -> None:
        session, temperature = self.session, self.controls["temperature"]
        chat, outputs = self.chatbot, [self.box, self.chatbot, self.line, session]
        quick = {"queue": False, **PRIVATE}
        prepared = [
            self.box.submit(self._asked, [self.box, session], outputs, api_name="ask", **quick),
            chat.retry(self._retried, [session, temperature], outputs, api_name="retry", **quick),
            chat.edit(self._edited, session, outputs, api_name="edit", **quick),
            chat.example_select(self._example, session, outputs, api_name="example", **quick),
        ]
        # what is prepared is answered, as many at a time as ask; the model's own line keeps the order
        inputs, answers = [session, *self.controls.values()], []
        answering = {"api_name": "answer", "concurrency_limit": None, **PRIVATE}
        for event in prepared:
            answers.append(event.success(self._answer, inputs, outputs, **answering))
        for event in answers:
            event.failure(self._stopped, session, outputs, **quick)
        # what ends an answer
        self.box.stop(self._stopped, session, outputs, cancels=answers, **PRIVATE)
        chat.undo(self._undone, session, outputs, cancels=answers, **PRIVATE)
        chat.clear(self._cleared, session, outputs, cancels=answers, **PRIVATE)
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
        turn = session.edited(len(turns) - 1, turns[-1].text) if turns else None
        return self._prepare(session, turn)

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
            writing = self.answers.write(session, turn, settings, listener, gr.Warning)
            async with aclosing(writing) as steps:
                async for before in steps:
                    is_news, shown = (before, turn.answer) != shown, (before, turn.answer)
                    turns = session.turns if turn in session.turns else [*session.turns, turn]
                    waiting = f"{before} before you" if before else "…"
                    chat = gr.skip()
                    if is_news:
                        chat = await asyncio.to_thread(self.messages, turns, waiting)
                    # also without news: that is when gradio notices a closed tab
                    yield gr.skip(), chat, gr.skip(), gr.skip()
        except Exception as error:
            raise said(error) from error
        finally:
            session.is_waiting = False
            if turn not in session.turns:  # refused, or stopped while it waited
                session.pending = turn
        yield self._at_rest(session)

    async def _stopped(self, session: Session) -> tuple:
        await _ended(session)
        turn, session.pending = session.pending, None  # what has no answer goes back into the box
        return self._at_rest(session, turn)

    def _at_rest(self, session: Session, turn: Turn | None = None) -> tuple:
        """Return the updates that show a session without an answer being written; `turn` goes into the box."""
        line = about(self.answers.chat.model, self.cfg)
        return _ready(turn), self.messages(session.turns), line, session

    async def _undone(self, session: Session) -> tuple:
        await _ended(session)
        turn = session.pending or (session.turns.pop() if session.turns else None)
        session.pending = None
        return _ready(turn), self.messages(session.turns), gr.skip(), session

    async def _cleared(self, session: Session) -> tuple:
        await _ended(session)
        self.sessions.forget(session)
        return _ready() | {"value": None}, [], gr.skip(), session


async def _ended(session: Session) -> None:
    """End the answer that is waited for or being written, if there is one; return when it has ended."""
    if session.stop is not None:
        session.stop.set()
    while session.is_busy or session.is_waiting:
        await asyncio.sleep(0.02)


def _ready(turn: Turn | None = None) -> dict:
    """Return the update of the box that lets people type again; `turn` is put back into it.

    Without one its value is left alone: gradio sends the last update of an answer twice, and before the second one
    somebody may have typed or added an image already.
    """
    update = gr.update(interactive=True, submit_btn=True, stop_btn=False)
    return update | {"value": {"text": turn.text, "files": list(turn.images)}} if turn else update
