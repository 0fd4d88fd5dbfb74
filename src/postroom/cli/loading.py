"""From ``module:app`` to the app, with errors that say what to type instead."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click

from postroom import App, ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])


def load_app(target: str) -> App:
    """Import ``module:variable`` (or ``file.py:variable``; the variable is ``app`` by default).

    Raises ``ConfigurationError``; an error raised by the user's own module passes through.
    """
    name, _, variable = target.partition(":")
    module = _import(name)
    found = {key: value for key, value in vars(module).items() if isinstance(value, App)}
    app = found.get(variable or "app")
    if app is not None:
        return app
    if variable and hasattr(module, variable):
        raise ConfigurationError(f"{target}: that is a {type(getattr(module, variable)).__name__}, not a postroom.App")
    hint = f"did you mean {name}:{next(iter(found))}?" if found else "the module defines no App at its top level"
    raise ConfigurationError(f"{target}: no App named {variable or 'app'!r}; {hint}")


def _import(name: str) -> ModuleType:
    folder = os.getcwd()
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise ConfigurationError(f"no file {name}")
        folder, name = str(path.parent), path.stem
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # A module that the user's module imports is missing: its traceback shows where.
        near = difflib.get_close_matches(name, [module.name for module in pkgutil.iter_modules([folder])], n=1)
        hint = f"did you mean {near[0]}?" if near else f"it was looked for in {folder} and the installed packages"
        raise ConfigurationError(f"no module {name!r}; {hint}") from error


def operated(command: F) -> F:
    """Options ``--app`` and ``--broker`` for a command that operates on what exists; it receives ``app``."""

    def resolve(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
        ctx.obj = {**(ctx.obj or {}), "app": value}
        return None

    def make(ctx: click.Context, _: click.Parameter, value: str | None) -> App:
        return _operated_app((ctx.obj or {}).get("app"), value)

    app = click.option(
        "--app",
        "target",  # not "app": the two options would share one value
        envvar="POSTROOM_APP",
        metavar="MODULE:APP",
        expose_value=False,
        is_eager=True,
        callback=resolve,
        help="The app.",
    )
    broker = click.option("--broker", "app", metavar="URL", callback=make, help="The broker, if no app is at hand.")
    return app(broker(command))


def find_app(target: str | None) -> App:
    """The app for a URL or ``module:app``, by default that of the environment, else of ``postroom.db`` here.

    Never creates a database. Raises ``ConfigurationError``.
    """
    target = target or os.environ.get("POSTROOM_APP")
    return _existing(App(target) if target is None or "://" in target else load_app(target))


def _operated_app(target: str | None, url: str | None) -> App:
    return load_app(target) if url is None and target is not None else _existing(App(url))


def _existing(app: App) -> App:
    """A mistyped path must not look like an empty queue."""
    path = app.url.removeprefix("sqlite:///")
    if path != app.url and not Path(path).exists():
        raise ConfigurationError(
            f"there is no {path}: it comes with the first producer or worker; or name the broker by its URL, "
            "or the app as MODULE:APP"
        )
    return app
