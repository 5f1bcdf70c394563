"""The house rules that a reader relies on, kept true by a test."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minigpt4"

# who may import whom inside the package (beside itself)
MAY_IMPORT = {
    "common": set(),
    "text": {"common"},
    "processors": {"common"},
    "datasets": {"common", "text", "processors"},
    "models": {"common", "text"},
    "conversation": {"common", "text", "processors", "models"},
    "evaluation": {"common", "conversation", "datasets"},
    "serving": {"common", "text", "processors", "conversation"},
    "tasks": {"common", "datasets"},
    "runners": {"common", "models", "conversation", "evaluation"},
    "exporting": {"common", "models", "text"},
}
# the quickstart may import everything, and nothing imports it
MAY_IMPORT["quickstart"] = set(MAY_IMPORT)
# third parties with one home
HOMES = {
    "omegaconf": {"common"},
    "torchvision": {"processors"},
    "webdataset": {"datasets"},
    "ijson": {"datasets"},
    "timm": {"models"},
    "bitsandbytes": {"models"},
    "gradio": {"serving"},
}


def imports_of(path):
    """Return the dotted names that a Python file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files_of(part):
    return sorted((PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_import_directions(part):
    assert files_of(part)
    for path in files_of(part):
        siblings = {name.split(".")[1] for name in imports_of(path) if name.startswith("minigpt4.")}
        forbidden = siblings & set(MAY_IMPORT) - MAY_IMPORT[part] - {part}
        assert not forbidden, f"{path.relative_to(ROOT)} imports minigpt4.{', '.join(forbidden)}"


def test_nothing_imports_the_quickstart():
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]:
        # the latter: its former name
        if path.relative_to(ROOT).parts[1:2] not in (("quickstart",), ("embedded",)):
            assert not [
                name for name in imports_of(path) if name.startswith("minigpt4.quickstart")
            ], path


@pytest.mark.parametrize("library", HOMES)
def test_third_parties_have_one_home(library):
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0]
        uses = any(name.split(".")[0] == library for name in imports_of(path))
        assert not uses or part in HOMES[library], f"{path.relative_to(ROOT)} imports {library}"


def test_there_is_one_list_of_requirements():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.txt"]}


def test_every_package_that_the_programs_need_has_an_upper_bound():
    """What was run is promised, no more: transformers renames arguments between minor releases."""
    needed = (ROOT / "requirements.txt").read_text().partition("# development")[0]
    lines = [line for line in needed.splitlines() if line and not line.startswith("#")]
    assert len(lines) > 15 and all(re.fullmatch(r"[a-z-]+>=[\d.]+,<[\d.]+", line) for line in lines)


HELP_PROBE = """
import sys, runpy
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "program", ["train.py", "demo.py", "evaluate.py", "minigpt4/serve.py", "minigpt4/export.py"]
)
def test_help_answers_without_torch(program):
    command = [sys.executable, "-c", HELP_PROBE, program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--cfg-path" in result.stdout and result.stdout.endswith("False\n")


def test_the_package_and_its_configuration_load_no_torch():
    probe = "import sys, minigpt4, minigpt4.common.config; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False False\n"


def readme_text():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", readme_text())
    assert len(links) >= 5
    for link in links:
        assert (ROOT / link).exists(), link


def test_readme_commands_name_what_exists():
    blocks = re.findall(r"```bash\n(.*?)```", readme_text(), flags=re.S)
    commands = [
        line
        for block in blocks
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert len(commands) >= 5
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for command in commands:
        for word in command.split():
            if re.fullmatch(r"[\w/.-]+\.(py|yaml|sh|txt)", word) and not word.startswith(
                ("/", "my_")
            ):
                assert (ROOT / word).exists(), command
        if command.startswith("make "):
            assert command.split()[1] in targets, command


def test_make_demo_opens_what_quickstart_wrote_or_else_what_is_shipped(tmp_path):
    from minigpt4.demo import parse_args
    from minigpt4.quickstart import quickstart

    def arguments(*variables):
        command = ["make", "-n", "demo", *variables]
        plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (line,) = [line for line in plan.splitlines() if "demo.py" in line]
        return parse_args(line.split("demo.py ")[1].split())

    trained = tmp_path / "checkpoint.pth"
    trained.touch()
    args = arguments(f"TRAINED={trained}")
    assert args.checkpoint == str(trained) and (ROOT / args.cfg_path).is_file()
    makefile = (ROOT / "Makefile").read_text()
    assert f"TRAINED := {quickstart.parse_args([]).output}/checkpoint.pth" in makefile
    args = arguments("TRAINED=absent.pth")
    assert args.cfg_path == args.checkpoint == "minigpt4/quickstart/checkpoint"


def test_no_bare_weights_only_false_and_no_bare_wds_decode():
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]:
        text = path.read_text()
        assert "weights_only=False" not in text, path
        assert not re.search(r"\bwds\.decode\(", text), path


# how the code reads

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SOURCES = sorted(PACKAGE.rglob("*.py"))


def functions_of(path):
    """Return the public functions and methods of a file, with whether each is a method."""
    found = []
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(
                member, (ast.FunctionDef, ast.AsyncFunctionDef)
            ) and not member.name.startswith("_"):
                found.append((member, member is not node))
    return found


def test_public_functions_are_annotated():
    missing = []
    for path in SOURCES:
        for function, is_method in functions_of(path):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            if is_method and arguments and arguments[0].arg in ("self", "cls"):
                arguments = arguments[1:]
            if function.returns is None or any(
                argument.annotation is None for argument in arguments
            ):
                missing.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}")
    assert len(SOURCES) > 90 and not missing


def test_comprehensions_are_not_nested_and_assignments_have_two_targets_at_most():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, COMPREHENSIONS):
                inner = [
                    other
                    for other in ast.walk(node)
                    if isinstance(other, COMPREHENSIONS) and other is not node
                ]
                if inner or len(node.generators) > 1:
                    found.append(f"{where} nested comprehension")
            if isinstance(node, ast.Assign):
                targets = [target for target in node.targets if isinstance(target, ast.Tuple)]
                found += [f"{where} {len(t.elts)} targets" for t in targets if len(t.elts) > 2]
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_files_fit_a_few_screens(path):
    assert len(path.read_text().splitlines()) <= 300
