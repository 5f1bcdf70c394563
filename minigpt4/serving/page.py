"""The web page of the demo, made with gradio; imported only when it is shown."""

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
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.conversation.message import check_length
from minigpt4.serving.answers import SETTINGS, Answers, Listener, checked
from minigpt4.serving.api import Api, gradio_error
from minigpt4.serving.arguments import in_url
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

FORGET_AFTER_S = 3600  # after its last answer a session, and its uploads, are deleted
# a random name for a browser tab, which it keeps after a refresh and no other tab knows
TAB_NAME = """() => sessionStorage.tab ||= crypto.getRandomValues(new Uint32Array(4)).join("-")"""
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}  # options of an event
NO_UPDATES = (gr.skip(), gr.skip(), gr.skip(), gr.skip())  # of box, chatbot, status, session


class Page:
    """The web page. The server keeps each dialogue in a Session and never reads it back from the browser.

    `template` is an empty Conversation; `settings` replace some of the initial values of SETTINGS.
    """

    def __init__(self, chat: Chat, template: Conversation, cfg: Config, settings: dict):
        self.answers, self.cfg = Answers(chat, template), cfg
        first = {name: setting.first for name, setting in SETTINGS.items()}
        self.defaults = first | {"repetition_penalty": chat.penalty} | settings
        # the configuration of a user's own model may not have this key
        self.reads_boxes = cfg.model_cfg.get("reads_boxes", False)
        self.messages = partial(messages, with_boxes=self.reads_boxes)
        self.sessions = Sessions(age_s=FORGET_AFTER_S)
        self.streams = Streams()
        self.folder = Path(os.environ["GRADIO_TEMP_DIR"])

    def launch(self, args: Namespace) -> None:
        """Serve the page until the program is interrupted; `args` are those of demo.py."""
        gr.set_static_paths(list(EXAMPLES))
        hosts, blocks = Hosts(args.server_name), self._build()
        if root := os.environ.get("GRADIO_ROOT_PATH"):
            hosts.add_root(root)
        guard = Middleware(
            Guard, hosts=hosts, uploads=Uploads(self.folder, EXAMPLES), streams=self.streams
        )
        # the page has a queue of its own; gradio's only has to be as long
        blocks.queue(max_size=32, default_concurrency_limit=None, api_open=False)
        share_url = blocks.launch(
            server_name=in_url(args.server_name),
            server_port=args.server_port,
            share=args.share,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None,
            app_kwargs={"middleware": [guard]},
            max_file_size="20mb",
            max_threads=40,  # questions that wait or are answered at the same time
            state_session_capacity=500,
            show_error=True,  # also what gradio itself refuses
            enable_monitoring=False,
            footer_links=[],
            ssr_mode=False,
            theme=theme(),
            css_paths=[FOLDER / "page.css"],
            js=(FOLDER / "page.js").read_text(encoding="utf-8"),
            prevent_thread_lock=True,
        )[2]
        if share_url:
            hosts.add(share_url)
        # exit normally, so that the uploads are removed
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        blocks.block_thread()

    def _build(self) -> gr.Blocks:
        cleaning = (600, FORGET_AFTER_S)  # every so many seconds, files older than so many
        with gr.Blocks(title="MiniGPT-4", delete_cache=cleaning, fill_height=True) as blocks:
            gr.Markdown("# MiniGPT-4\nShow it an image and ask.", elem_id="title")
            self.chatbot, self.box = chatbot(), textbox()
            if self.reads_boxes:
                add_tasks(blocks, self.chatbot, self.box)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                self.controls = controls(self.defaults)
            self.status = gr.Markdown(about(self.answers.chat.model, self.cfg), elem_id="about")
            self.session = gr.State(
                Session(),
                time_to_live=FORGET_AFTER_S,
                delete_callback=lambda _: self.sessions.forget_old(),
            )
            self.tab = gr.Textbox(visible=False)  # holds the tab's TAB_NAME
            self._connect(blocks)
            api = Api(self.answers, self.defaults, self.streams, self.folder)
            gr.api(api.chat, api_name="chat", concurrency_limit=None)
        for block in blocks.blocks.values():
            only_uploads(block)
        return blocks

    # events: a handler prepares the turn at once, then `_answer` waits for the model

    def _connect(self, blocks: gr.Blocks) -> None:
        session, temperature = self.session, self.controls["temperature"]
        chat, outputs = self.chatbot, [self.box, self.chatbot, self.status, session]
        quick = {"queue": False, **PRIVATE}
        prepared = [
            self.box.submit(self._asked, [self.box, session], outputs, api_name="ask", **quick),
            chat.retry(self._retried, [session, temperature], outputs, api_name="retry", **quick),
            chat.edit(self._edited, session, outputs, api_name="edit", **quick),
            chat.example_select(self._example, session, outputs, api_name="example", **quick),
        ]
        # no limit to the answers that are waited for: the page's own queue keeps the order
        inputs, answers = [session, *self.controls.values()], []
        answering = {"api_name": "answer", "concurrency_limit": None, **PRIVATE}
        for event in prepared:
            answers.append(event.success(self._answer, inputs, outputs, **answering))
        for event in answers:
            event.failure(self._stopped, session, outputs, **quick)
        # these end an answer that is being written
        self.box.stop(self._stopped, session, outputs, cancels=answers, **PRIVATE)
        chat.undo(self._undone, session, outputs, cancels=answers, **PRIVATE)
        chat.clear(self._cleared, session, outputs, cancels=answers, **PRIVATE)
        blocks.load(self._loaded, self.tab, outputs, js=TAB_NAME, api_name="return", **quick)

    async def _loaded(self, tab: str, request: gr.Request) -> tuple:
        """Show the dialogue of a browser tab that was opened or refreshed."""
        session = self.sessions.of((request.username, tab)) if 0 < len(tab) < 99 else Session()
        is_new = not (session.turns or session.pending or session.asked)
        box, *others = await self._stopped(session)
        if is_new:
            box = gr.skip()  # the user may be typing already
        return box, *others

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
        """Return the updates that show `turn`, the next to be answered; none if nothing was asked."""
        session.pending = None
        if turn is None or not turn.text.strip():
            return NO_UPDATES
        try:
            check_length(turn.text)
        except ValueError as error:
            raise gradio_error(error) from error
        session.pending = turn
        busy = gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)
        return busy, self.messages([*session.turns, turn]), gr.skip(), gr.skip()

    async def _answer(
        self, session: Session, request: gr.Request, *controls: float
    ) -> AsyncIterator[tuple]:
        """Yield updates of box, chatbot, status and session while the pending turn is answered."""
        turn, session.pending = session.pending, None
        if turn is None:
            yield NO_UPDATES
            return
        shown, session.asked = None, turn
        try:
            settings = checked(dict(zip(self.controls, controls, strict=True)))
            self.sessions.use(session)
            listener = Listener(lambda: self.streams.is_open(request.session_hash))
            writing = self.answers.write(session, turn, settings, listener, gr.Warning)
            async with aclosing(writing) as steps:
                async for num_ahead in steps:
                    chat = gr.skip()
                    if (num_ahead, turn.answer) != shown:
                        shown = (num_ahead, turn.answer)
                        turns = session.turns if turn in session.turns else [*session.turns, turn]
                        waiting = f"{num_ahead} ahead of you" if num_ahead else "…"
                        chat = await asyncio.to_thread(self.messages, turns, waiting)
                    # yield even if nothing changed: that is when gradio notices a closed tab
                    yield gr.skip(), chat, gr.skip(), gr.skip()
        except Exception as error:
            raise gradio_error(error) from error
        finally:
            is_current = session.asked is turn  # and has not been edited meanwhile
            if is_current:
                session.asked = None
                if turn not in session.turns:  # refused, or stopped while it waited
                    session.pending = turn
        yield self._idle(session) if is_current else NO_UPDATES

    async def _stopped(self, session: Session) -> tuple:
        await _end_answer(session)
        turn, session.pending = session.pending, None  # unanswered: it goes back into the box
        return self._idle(session, turn)

    def _idle(self, session: Session, turn: Turn | None = None) -> tuple:
        """Return the updates that show a session of which nothing is being answered; `turn` goes into the box."""
        status = about(self.answers.chat.model, self.cfg)
        return _enabled_box(turn), self.messages(session.turns), status, session

    async def _undone(self, session: Session) -> tuple:
        await _end_answer(session)
        turn = session.pending or (session.turns.pop() if session.turns else None)
        session.pending = None
        return _enabled_box(turn), self.messages(session.turns), gr.skip(), session

    async def _cleared(self, session: Session) -> tuple:
        await _end_answer(session)
        self.sessions.forget(session)
        return _enabled_box() | {"value": None}, [], gr.skip(), session


async def _end_answer(session: Session) -> None:
    """Stop the answer that is waited for or being written, if any; return when it has ended."""
    if session.stop is not None:
        session.stop.set()
    while session.is_busy or session.asked:
        await asyncio.sleep(0.02)


def _enabled_box(turn: Turn | None = None) -> dict:
    """Return the update that enables the box; a `turn` is put back into it.

    Without one the content stays: gradio sends the last update of an answer twice, and the user may have typed or added
    an image in between.
    """
    update = gr.update(interactive=True, submit_btn=True, stop_btn=False)
    return update | {"value": {"text": turn.text, "files": list(turn.images)}} if turn else update
