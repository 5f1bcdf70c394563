"""What pyproject.toml cannot express: which folders a wheel contains, and its requirements without development tools."""

from pathlib import Path

from setuptools import find_packages, setup

# folders that users edit: at the top of a checkout, inside the package once it is installed
shipped = {f"minigpt4.{folder}": folder for folder in ("train_configs", "eval_configs", "prompts")}
requirements = (
    Path(__file__)
    .with_name("requirements.txt")
    .read_text(encoding="utf-8")
    .partition("# development")[0]
)
setup(
    packages=[*find_packages(include=["minigpt4*"]), *shipped],
    package_dir=shipped,
    install_requires=[
        line for line in requirements.splitlines() if line and not line.startswith("#")
    ],
)
