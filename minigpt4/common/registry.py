"""Names in YAML files -> classes. Nothing else is stored here.

A class is registered by a decorator beside it::

    @registry.register_model("mini_gpt4")
    class MiniGPT4(BaseModel): ...

and found again by name, from anywhere, without an import for its side effects::

    registry.get_model_class("mini_gpt4")

The first look-up of a kind imports the package in which that kind lives (``_HOMES``), whose ``__init__`` names
every class it offers.
"""

import importlib
from difflib import get_close_matches

from minigpt4.common.startup import startup


class RegistryError(KeyError):
    """An unknown or doubly registered name; the message says what is known and where to add one."""

    def __str__(self):
        return self.args[0]


# kind -> (package imported at the first look-up, what a message calls it)
_HOMES = {
    "model": ("minigpt4.models", "model architecture"),
    "builder": ("minigpt4.datasets.builders", "dataset builder"),
    "processor": ("minigpt4.processors", "processor"),
    "task": ("minigpt4.tasks", "task"),
    "runner": ("minigpt4.runners", "runner"),
    "lr_scheduler": ("minigpt4.common.optims", "learning-rate schedule"),
}


class Registry:
    """One table a kind; ``register_<kind>(name)`` decorates, ``get_<kind>_class(name)`` finds."""

    def __init__(self):
        self._classes = {kind: {} for kind in _HOMES}

    def register(self, kind, name):
        """Return a decorator that files a class under `name`; a second class under a taken name is refused."""

        def decorate(cls):
            holder = self._classes[kind].setdefault(name, cls)
            if holder is not cls:
                raise RegistryError(
                    f"{_HOMES[kind][1]} '{name}' is already registered: it is "
                    f"{holder.__module__}.{holder.__qualname__}; give {cls.__qualname__} another name"
                )
            return cls

        return decorate

    def get(self, kind, name):
        """Return the class filed under `name`. Raises RegistryError that lists every known name."""
        home, label = _HOMES[kind]
        with startup.phase("imports"):
            importlib.import_module(home)
        known = self._classes[kind]
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise RegistryError(
                f"unknown {label} '{name}'; known: {', '.join(sorted(known))}.{hint} "
                f"Add one in {home.replace('.', '/')}{'.py' if kind == 'lr_scheduler' else '/__init__.py'}"
            )
        return known[name]

    def names(self, kind):
        """Return the sorted names registered under `kind`."""
        importlib.import_module(_HOMES[kind][0])
        return sorted(self._classes[kind])

    # The names that users' code calls (2023 release).
    def register_model(self, name):
        return self.register("model", name)

    def register_builder(self, name):
        return self.register("builder", name)

    def register_processor(self, name):
        return self.register("processor", name)

    def register_task(self, name):
        return self.register("task", name)

    def register_runner(self, name):
        return self.register("runner", name)

    def register_lr_scheduler(self, name):
        return self.register("lr_scheduler", name)

    def get_model_class(self, name):
        return self.get("model", name)

    def get_builder_class(self, name):
        return self.get("builder", name)

    def get_processor_class(self, name):
        return self.get("processor", name)

    def get_task_class(self, name):
        return self.get("task", name)

    def get_runner_class(self, name):
        return self.get("runner", name)

    def get_lr_scheduler_class(self, name):
        return self.get("lr_scheduler", name)

    def list_models(self):
        return self.names("model")

    def list_datasets(self):
        return self.names("builder")

    def list_processors(self):
        return self.names("processor")

    def list_tasks(self):
        return self.names("task")

    def list_runners(self):
        return self.names("runner")

    def list_lr_schedulers(self):
        return self.names("lr_scheduler")


registry = Registry()
