"""What pyproject.toml cannot say: the folders that a wheel takes, and that it does without the tools of development."""

from pathlib import Path

from setuptools import find_packages, setup

# what users edit lies at the top of a checkout, and inside the package once it is installed
shipped = {f"minigpt4.{folder}": folder for folder in ("train_configs", "eval_configs", "prompts")}
needed = (
    Path(__file__)
    .with_name("requirements.txt")
    .read_text(encoding="utf-8")
    .partition("# development")[0]
)
setup(
    packages=[*find_packages(include=["minigpt4*"]), *shipped],
    package_dir=shipped,
    install_requires=[line for line in needed.splitlines() if line and not line.startswith("#")],
)
