"""Many visitors, visitors who leave, long use: nobody's words mix, nothing is left running, memory stays flat."""

import concurrent.futures
import statistics
import time

from tests.demo.server import CONTROLS, Refused, Visitor
from tests.small_release import jpeg_bytes, picture

LONG = {**CONTROLS, "max_new_tokens": 400, "repetition_penalty": 1.5}


def is_idle(server, seconds=0.5):
    """Return whether the program hardly computes; an idle one takes 0.01 s of CPU time in half a second."""
    before = server.cpu_seconds()
    time.sleep(seconds)
    return server.cpu_seconds() - before < 0.1 * seconds


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)


def test_sessions_do_not_mix(server):
    questions = ["what is this?", "the old wall", "and the water?", "who watched?"]

    def dialogue(number):
        visitor = Visitor(server)
        image = visitor.upload("a.jpg", jpeg_bytes(picture(number)))
        visitor.chat(questions[number], image)
        return visitor.chat(questions[number - 1])

    alone = [dialogue(number) for number in range(4)]
    assert len({str(answer) for answer in alone}) == 4
    with concurrent.futures.ThreadPoolExecutor(4) as visitors:
        assert list(visitors.map(dialogue, range(4))) == alone


def test_a_flood_is_refused_and_the_rest_is_served(server):
    visitors = [Visitor(server) for _ in range(48)]
    for visitor in visitors:
        visitor.ask("hello")

    def answer(visitor):
        try:
            return len(visitor.answer())
        except Refused as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        results = list(pool.map(answer, visitors))
    assert results.count(2) >= 32, results  # the queue holds 32
    assert all("full" in result.lower() for result in results if result != 2), results
    assert len(visitors[0].chat("again")) == 4


def test_a_closed_tab_ends_the_answer(server):
    for beams in (1, 4):  # beam search is one long step, a streamed answer many short ones
        visitor = Visitor(server)
        visitor.ask("tell me everything")
        visitor.join("answer", None, *{**LONG, "num_beams": beams}.values())
        for event in visitor.events():
            if event["msg"] == "process_generating":
                break  # and leaves: the stream is closed
        visitor.http.close()
        start = time.monotonic()
        assert len(Visitor(server).chat("next", max_new_tokens=2)) == 2
        waited = time.monotonic() - start
        wait_until(lambda: is_idle(server), 5)
        assert waited < 2, waited  # the whole answer takes this long and more
