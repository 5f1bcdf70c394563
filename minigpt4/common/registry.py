"""Names in YAML files -> classes. Nothing else is stored here.

`@registry.register_model("mini_gpt4")` beside a class files it, `registry.get_model_class("mini_gpt4")`
finds it: the first look-up of a kind imports its home (`_HOMES`), whose `__init__` names every class.
"""

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from functools import partialmethod

from minigpt4.common.startup import startup


class RegistryError(KeyError):
    """An unknown or doubly registered name; the message says what is known and where to add one."""

    def __str__(self) -> str:
        return self.args[0]


# kind -> (package imported at the first look-up, what a message calls it)
_HOMES = {
    "model": ("minigpt4.models", "model architecture"),
    "builder": ("minigpt4.datasets.builders", "dataset builder"),
    "processor": ("minigpt4.processors", "processor"),
    "task": ("minigpt4.tasks", "task"),
    "runner": ("minigpt4.runners", "runner"),
    "lr_scheduler": ("minigpt4.common.optims", "learning-rate schedule"),
    "benchmark": ("minigpt4.evaluation.benchmarks", "benchmark"),
}


class Registry:
    """One table a kind; ``register_<kind>(name)`` decorates, ``get_<kind>_class(name)`` finds."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in _HOMES}

    def register(self, kind: str, name: str) -> Callable[[type], type]:
        """Return a decorator that files a class under `name`; a taken name is refused."""

        def decorate(cls: type) -> type:
            holder = self._classes[kind].setdefault(name, cls)
            is_again = (holder.__module__, holder.__qualname__) == (
                cls.__module__,
                cls.__qualname__,
            )
            if is_again:  # its module was imported once more, after an error in it or by a notebook
                self._classes[kind][name] = cls
            else:
                raise RegistryError(
                    f"{_HOMES[kind][1]} '{name}' is already registered: it is "
                    f"{holder.__module__}.{holder.__qualname__}; give {cls.__qualname__} another name"
                )
            return cls

        return decorate

    def get(self, kind: str, name: str) -> type:
        """Return the class filed under `name`. Raises RegistryError that lists every known name."""
        home, label = _HOMES[kind]
        with startup.phase("imports"):
            importlib.import_module(home)
        known = self._classes[kind]
        if not isinstance(name, str) or name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            file = home.replace(".", "/") + (".py" if kind == "lr_scheduler" else "/__init__.py")
            own = "a module of your own that the configuration names under imports: [my_package.my_module]"
            raise RegistryError(
                f"unknown {label} '{name}'; known: {', '.join(sorted(known))}.{hint} Add one in {file}, or in {own}, "
                "as docs/custom_data.md shows"
            )
        return known[name]

    def names(self, kind: str) -> list[str]:
        """Return the sorted names registered under `kind`."""
        importlib.import_module(_HOMES[kind][0])
        return sorted(self._classes[kind])

    # The names that users' code calls (2023 release).
    register_model = partialmethod(register, "model")
    register_builder = partialmethod(register, "builder")
    register_processor = partialmethod(register, "processor")
    register_task = partialmethod(register, "task")
    register_runner = partialmethod(register, "runner")
    register_lr_scheduler = partialmethod(register, "lr_scheduler")
    register_benchmark = partialmethod(register, "benchmark")
    get_model_class = partialmethod(get, "model")
    get_builder_class = partialmethod(get, "builder")
    get_processor_class = partialmethod(get, "processor")
    get_task_class = partialmethod(get, "task")
    get_runner_class = partialmethod(get, "runner")
    get_lr_scheduler_class = partialmethod(get, "lr_scheduler")
    get_benchmark_class = partialmethod(get, "benchmark")
    list_models = partialmethod(names, "model")
    list_processors = partialmethod(names, "processor")
    list_benchmarks = partialmethod(names, "benchmark")


registry = Registry()
