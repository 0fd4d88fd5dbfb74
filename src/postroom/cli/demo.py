"""``postroom demo``: see the promises kept, on this machine, in a minute."""

from __future__ import annotations

import os
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from postroom.demo.narrator import Narrator
    from postroom.demo.service import Service

_NEEDED = {"PIL": "Pillow", "starlette": "Starlette", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
_MOST_PHOTOS = 24
_SHEETS = (".jpg", ".jpeg", ".png")


@click.command()
@click.option(
    "--photos",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help=f"Directory of photographs (the first {_MOST_PHOTOS} are taken); default: those that come with Postroom.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default=Path("postroom-demo.jpg"),
    show_default=True,
    help="Where the contact sheet goes (.jpg or .png).",
)
@click.option("--workers", type=click.IntRange(2, 32), default=5, show_default=True, help="Worker processes.")
@click.option("--broker", metavar="URL", help="Broker to run on; default: a temporary SQLite file.")
@click.option("--keep", is_flag=True, help="Leave gateway and workers running until Ctrl-C, to try it yourself.")
@click.option("--no-color", is_flag=True, help="No colours (also by the environment variable NO_COLOR).")
def demo(photos: Path | None, out: Path, workers: int, broker: str | None, keep: bool, no_color: bool) -> None:
    """Watch a photo service keep its promises.

    Starts a gateway and workers as real processes on a temporary SQLite file, hands in photographs over HTTP,
    kills a worker in mid-job, damages a photo, delivers a payment twice, and checks what came of it.
    Exits with 0 if every check held, 1 if one did not. Nothing is left behind but the contact sheet.

    \b
    Examples:
      postroom demo
      postroom demo --photos ~/Pictures --out sheet.png
      postroom demo --keep
    """
    missing = [name for module, name in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise click.ClickException(f"the demo needs {', '.join(missing)}: pip install 'postroom[demo]'")
    if out.suffix.lower() not in _SHEETS or not out.absolute().parent.is_dir():
        raise click.BadParameter(
            f"{out}: a file name ending in .jpg or .png, in a directory that exists", param_hint="--out"
        )
    if os.name == "nt":
        raise click.ClickException("the demo kills processes as Unix does; run it on Linux, macOS or in WSL")
    sys.exit(_run(photos, out, workers, broker, keep, no_color))


def _run(photos: Path | None, out: Path, workers: int, broker: str | None, keep: bool, no_color: bool) -> int:
    from postroom.demo.narrator import Narrator
    from postroom.demo.place import example, photographs

    narrator = Narrator(color=not no_color)
    chosen = photographs(photos or example() / "photos")
    if len(chosen) > _MOST_PHOTOS:
        narrator.say(f"{photos} has {len(chosen)} photographs; the first {_MOST_PHOTOS} are taken")
    try:
        return _play(narrator, chosen[:_MOST_PHOTOS], out, workers, broker, keep)
    except KeyboardInterrupt:
        narrator.say("\nStopped; all processes have ended, the temporary directory is removed.")
        return 130


def _play(narrator: Narrator, photos: list[Path], out: Path, workers: int, broker: str | None, keep: bool) -> int:
    from postroom.demo.processes import DemoFailed
    from postroom.demo.service import running
    from postroom.demo.story import Story

    try:
        with running(narrator, workers=workers, broker=broker) as service:
            story = Story(service, narrator, photos, workers)
            story.tell()
            story.draw(out)
            narrator.say(f"  contact sheet of all thumbnails: {out.absolute()}")
            if keep:
                _stay(narrator, service, photos[0])
    except DemoFailed as error:
        narrator.failed(str(error))
        return 1
    return 0


def _stay(narrator: Narrator, service: Service, photo: Path) -> None:
    """Until Ctrl-C."""
    url = service.client.url
    narrator.heading("Still running: try it")
    narrator.commands(
        f"curl -F photo=@{shlex.quote(str(photo))} {url}/v1/tasks/make_thumbnail",
        f"curl {url}/v1/jobs/<id>",
        f'curl --json \'{{"account": "alice", "amount": 5}}\' {url}/v1/tasks/pay',
        f"curl {url}/v1/queues",
        f"ls {service.out}",
    )
    narrator.say("Ctrl-C stops it and removes everything but the contact sheet.")
    try:
        while True:
            service.processes.must_run()
            time.sleep(0.5)
    except KeyboardInterrupt:
        narrator.say("\nStopping …")
