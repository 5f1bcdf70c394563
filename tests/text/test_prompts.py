"""Prompt files as editors save them: with byte order marks, in other encodings."""

from minigpt4.text.prompts import prompt_problems, read_prompts


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeff<Img><ImageHere></Img> What?\r\n<Img><ImageHere></Img> Why?\r\n".encode()
    )
    assert read_prompts(str(path), "{}") == [
        "<Img><ImageHere></Img> What?",
        "<Img><ImageHere></Img> Why?",
    ]


def test_another_encoding_is_a_problem_that_names_the_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("<Img><ImageHere></Img> Où?".encode("latin-1"))
    (problem,) = prompt_problems(str(path), "{}")
    assert (
        problem.key == "model.prompt_path"
        and str(path) in problem.message
        and "save it as UTF-8" in problem.message
    )
