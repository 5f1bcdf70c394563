"""Which folders a wheel takes; all else is in pyproject.toml, which cannot say that a folder lies elsewhere."""

from setuptools import find_packages, setup

# what users edit lies at the top of a checkout, and inside the package once it is installed
shipped = {f"minigpt4.{folder}": folder for folder in ("train_configs", "eval_configs", "prompts")}
setup(packages=[*find_packages(include=["minigpt4*"]), *shipped], package_dir=shipped)
