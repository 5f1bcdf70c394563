"""What pyproject.toml cannot say: which folders a wheel takes, and that tools of development are not installed with it."""

from pathlib import Path

from setuptools import find_packages, setup

# what users edit lies at the top of a checkout, and inside the package once it is installed
shipped = {f"minigpt4.{folder}": folder for folder in ("train_configs", "eval_configs", "prompts")}
needed = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").partition("# development")[0]
setup(
    packages=[*find_packages(include=["minigpt4*"]), *shipped],
    package_dir=shipped,
    install_requires=[line for line in needed.splitlines() if line and not line.startswith("#")],
)
