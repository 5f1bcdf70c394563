"""The registry of classes by their names in YAML files.

`@registry.register_model("mini_gpt4")` registers the class below it, `registry.get_model_class("mini_gpt4")`
returns it: a look-up imports the package of its kind (`_HOMES`), whose `__init__` imports every class.
"""

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from functools import partialmethod

from minigpt4.common.startup import startup


class RegistryError(KeyError):
    """An unknown name, or one that is registered twice; the message lists the known ones, or names the other class."""

    def __str__(self) -> str:
        return self.args[0]


# kind: (package that registers its classes, name of the kind in messages)
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
    """A table of classes for each kind: ``register_<kind>(name)`` is the decorator, ``get_<kind>_class(name)`` looks up."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in _HOMES}

    def register(self, kind: str, name: str) -> Callable[[type], type]:
        """Return a decorator that registers a class as `name`. It raises RegistryError if another class has that name."""

        def decorate(cls: type) -> type:
            other = self._classes[kind].get(name, cls)
            # a module may be imported again, after an error in it or in a notebook: its new class counts
            is_same = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
            if not is_same:
                raise RegistryError(
                    f"{_HOMES[kind][1]} '{name}' is already registered: it is "
                    f"{other.__module__}.{other.__qualname__}; give {cls.__qualname__} another name"
                )
            self._classes[kind][name] = cls
            return cls

        return decorate

    def get(self, kind: str, name: str) -> type:
        """Return the class registered as `name`. Raises RegistryError that lists every known name."""
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
        """Return the sorted names of all classes of `kind`."""
        importlib.import_module(_HOMES[kind][0])
        return sorted(self._classes[kind])

    # The methods that users' code calls (Source: 2023 release).
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
