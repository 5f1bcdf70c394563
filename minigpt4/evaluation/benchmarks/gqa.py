"""GQA: compositional questions about scenes, with one correct answer each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minigpt4.common.registry import registry
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, group_of, ident, mapping, read_json, rows
from minigpt4.evaluation.benchmarks.scores import Scores, label_scores, num_empty


@registry.register_benchmark("gqa")
class GQA(Benchmark):
    """`eval_file_path`: `testdev_balanced_questions.json`

        {question id: {"imageId", "question", "answer", "types": {"structural"}}}
    or MiniGPT-v2's list [{"image", "question", "answer"}], where an id is the position in the list.
    `img_path`: the folder with <imageId>.jpg.
    """

    RULES = "exact match, case and punctuation aside (lmms-eval's task gqa); accuracy_minigpt4: eval_vqa.py's"

    def items(self) -> list[BenchmarkItem]:
        path, prompt = self.find("*balanced_questions.json", "*gqa*.json"), self.prompt()
        content = read_json(path)
        found = _of_list(content, path) if isinstance(content, list) else _of_gqa(content, path)
        items = []
        for name, image, row, where in found:
            question, answer = (field(row, key, str, where) for key in ("question", "answer"))
            group = group_of(mapping(row.get("types") or {}, where), "structural", where)
            items.append(
                BenchmarkItem(name, (self.image(image),), prompt.ask(question), answer, group)
            )
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        return label_scores(items, answers, num_empty(answers))


Row = tuple[
    str, str, dict, str
]  # id, file name of the image, the row, its place for error messages


def _of_gqa(content: Any, path: object) -> Iterator[Row]:
    for name, row in mapping(content, f"'{path}'").items():
        where = f"'{path}' question {name}"
        yield name, f"{ident(row, 'imageId', where)}.jpg", row, where


def _of_list(content: list, path: Any) -> Iterator[Row]:
    for number, (where, row) in enumerate(rows(content, "", path)):
        yield str(number), field(row, "image", str, where), row, where
