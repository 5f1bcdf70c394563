"""The real program in a process of its own, and visitors that speak raw HTTP to it."""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
CONTROLS = {
    "temperature": 0,
    "top_p": 0.9,
    "top_k": 50,
    "num_beams": 1,
    "max_new_tokens": 24,
    "repetition_penalty": 1,
    "seed": -1,
}


def command(release, *arguments, program=("demo.py",), **options):
    """Return the command line of a program with the small model of the released layout."""
    settings = {
        "model.ckpt": release.checkpoint,
        "model.low_resource": False,
        "model.llm_precision": "fp32",
        **options,
    }
    settings["env.cache_root"] = release.root / "cache"
    config = ["--cfg-path", "eval_configs/minigpt4_eval.yaml", *release.options(**settings)]
    return [sys.executable, *program, *config, *arguments]


class Server:
    """A running demo.py."""

    program = ("demo.py",)
    ready = r"Running on local URL:\s+(http://[\d.]+:\d+)"

    def __init__(self, release, log, *arguments):
        self.log = log
        env = {**release.env, "GRADIO_TEMP_DIR": str(release.root / "gradio")}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                self.command(release, *arguments),
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.url = self._wait_for(self.ready)

    def command(self, release, *arguments):
        return command(release, *arguments, program=self.program)

    def _wait_for(self, pattern, seconds=600):
        for _ in range(seconds * 10):
            if found := re.search(pattern, self.output()):
                return found[1]
            assert self.process.poll() is None, self.output()
            time.sleep(0.1)
        raise AssertionError(f"it did not start in {seconds} s:\n{self.output()}")

    def output(self):
        return Path(self.log).read_text(errors="replace")

    def close(self):
        self.process.terminate()
        self.process.wait(20)

    def fill_pool(self):
        """Bring the program's pool of threads to its full size; idle ones end after ten seconds."""
        with ThreadPoolExecutor(16) as visitors:
            list(visitors.map(lambda _: Visitor(self).chat("hello", max_new_tokens=2), range(16)))

    def _status(self, key):
        return int(
            re.search(
                rf"^{key}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.M
            )[1]
        )

    def memory_mib(self):
        return self._status("VmRSS") / 1024

    def num_threads(self):
        return self._status("Threads")

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Refused(Exception):
    """What the server says instead of an answer."""


class Visitor:
    """One browser session, without a browser."""

    def __init__(self, server):
        self.http = httpx.Client(
            base_url=server.url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self.session = uuid.uuid4().hex
        self.numbers = {}
        for function in self.http.get("/config").json()["dependencies"]:
            self.numbers.setdefault(function["api_name"], function["id"])

    def join(self, function, *data, event=None):
        """Ask for `function` (a name or a number); return its event id. Raises Refused."""
        body = {
            "data": list(data),
            "fn_index": self.numbers.get(function, function),
            "session_hash": self.session,
        }
        # not json=: that refuses NaN, which a hostile visitor does not
        content = json.dumps({**body, "event_data": event})
        reply = self.http.post(
            "/gradio_api/queue/join", content=content, headers={"content-type": "application/json"}
        )
        if reply.status_code != 200:
            raise Refused(f"{reply.status_code} {reply.text}")
        return reply.json()["event_id"]

    def events(self):
        """Yield what the server sends this session until nothing is open."""
        with self.http.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": self.session}
        ) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    yield event
                    if event["msg"] == "close_stream":
                        return

    def call(self, function, *data, event=None):
        """Return the outputs of `function`. Raises Refused with the server's message."""
        event_id = self.join(function, *data, event=event)
        output = None
        for message in self.events():
            if message.get("event_id") == event_id and message["msg"] == "process_completed":
                output = message["output"]
                if not message["success"]:
                    raise Refused(str(output.get("error")))
        assert output is not None, "the server closed the stream without an answer"
        return output["data"]

    def upload(self, name, content):
        """Upload bytes as `name`; return the FileData of it. Raises Refused."""
        reply = self.http.post("/gradio_api/upload", files={"files": (name, content)})
        if reply.status_code != 200:
            raise Refused(f"{reply.status_code} {reply.text}")
        return {"path": reply.json()[0], "meta": {"_type": "gradio.FileData"}, "orig_name": name}

    def ask(self, text, *files):
        return self.call("ask", {"text": text, "files": list(files)}, None)

    def answer(self, **controls):
        """Return what the chat shows after the answer: [(role, text), ..]."""
        return shown(self.call("answer", None, *{**CONTROLS, **controls}.values())[1])

    def chat(self, text, *files, **controls):
        self.ask(text, *files)
        return self.answer(**controls)


def shown(messages):
    return [(message["role"], "".join(map(_text_of, message["content"]))) for message in messages]


def _text_of(part):
    """Return what a browser shows of HTML; of an image, its place."""
    return unescape(re.sub(r"<[^>]*>", "", part["text"])).strip() if "text" in part else "[image]"


def is_idle(server, seconds=0.5):
    """Return whether the program hardly computes; an idle one takes 0.01 s of CPU time in half a second."""
    before = server.cpu_seconds()
    time.sleep(seconds)
    return server.cpu_seconds() - before < 0.1 * seconds


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
