"""The command line that demo.py and minigpt4.serve share."""

import pytest

from minigpt4 import demo, serve
from minigpt4.conversation.chat import Chat
from minigpt4.serving.arguments import use_context


def test_dialogues_are_as_long_as_the_llm_reads(loaded, monkeypatch):
    chat = Chat(loaded[0].model, loaded[0].vis_processor)
    config = chat.model.llama_model.config
    for max_positions, max_length, longest in [
        (32_768, None, 8192),
        (32_768, 20_000, 20_000),
        (4096, None, 4096),
        (32_768, 500, 500),
        (400, 500, 400),
    ]:
        monkeypatch.setattr(config, "max_position_embeddings", max_positions)
        chat.max_length = 2000
        use_context(chat, max_length)
        assert chat.longest == longest
        context = loaded[1].copy()
        chat.ask("what is this?", context)
        assert chat.answer_prepare(context, [])["max_length"] == chat.max_length


@pytest.mark.parametrize("program", [demo, serve])
def test_a_longest_dialogue_of_nothing_is_refused(program, capsys):
    assert program.parse_args(["--cfg-path", "x", "--max-length", "900"]).max_length == 900
    for text in ("0", "-5", "1e3", "many"):
        with pytest.raises(SystemExit):
            program.parse_args(["--cfg-path", "x", f"--max-length={text}"])
        assert f"'{text}'; expected a number of tokens" in capsys.readouterr().err
