"""Programs of another Debian release than this machine's, in a folder: unpacked, not installed, and entered to run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from services.base import TOOLS, ServiceMissing, installing

RELEASE = os.environ.get("POSTROOM_DEBIAN", "forky")
"""Where the newer servers are from."""

_BASE = ("base-files", "coreutils", "dash", "grep", "libc-bin", "sed", "util-linux")
"""What every Debian has, and so no package names it: the links of its folders, what scripts need, and a locale."""
_LEFT_OUT = ("doc", "i18n", "info", "locale", "man")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_NAMES = "passwd: files\ngroup: files\nhosts: files dns\n"
_ENTER = """
root=$1; shift
for path in /dev /proc /etc/passwd /etc/group /etc/hosts "$TEMPORARY"; do mount --rbind "$path" "$root$path"; done
exec env LC_ALL=C.UTF-8 chroot "$root" "$@"
"""
"""``exec`` to the end, so that the process we start is the program itself. Mounted for that process alone; it has no
other locale."""


def command(program: str, package: str, release: str = RELEASE) -> list[str]:
    """The beginning of a command line: ``program`` of the release's ``package``, which sees our temporary files.

    Fetched and unpacked the first time, with all it depends on. Raises ``ServiceMissing``.
    """
    missing = [tool for tool in ("apt-get", "dpkg-deb", "unshare") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        raise ServiceMissing(
            f"{package} of Debian {release} needs root on Debian, with {', '.join(missing) or 'rights'}"
        )
    root = _root(release, package)
    temporary = tempfile.gettempdir()
    (root / temporary.lstrip("/")).mkdir(parents=True, exist_ok=True)
    script = _ENTER.replace("$TEMPORARY", temporary)
    return ["unshare", "--mount", "sh", "-euc", script, "sh", str(root), program]


def _root(release: str, package: str) -> Path:
    folder = TOOLS / f"debian-{release}"
    root = folder / package
    with installing():
        if root.exists():
            return root
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _download(release, folder / "apt", Path(work), package)
            unpacked = Path(work, "root")
            _unpack(Path(work, "archives"), unpacked)
            unpacked.rename(root)
    return root


def _download(release: str, apt: Path, work: Path, package: str) -> None:
    """The package with all it depends on, as archives. What is known of the release is kept in ``apt``."""
    for path in (apt / "lists" / "partial", work / "archives" / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {_mirror()} {release} main\n")
    # As if nothing were installed: the whole of it is downloaded, and nothing of this machine is touched.
    (work / "status").touch()
    settings = {
        "APT::Sandbox::User": "root",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "Acquire::Languages": "none",
        "Dir::Cache::archives": f"{work}/archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Etc::preferencesparts": "-",
        "Dir::Etc::sourcelist": f"{apt}/sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": f"{apt}/lists",
        "Dir::State::status": f"{work}/status",
        "Dir::State::extended_states": f"{work}/extended_states",
    }
    begin = ["apt-get", "-qq", "-y", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    download = [*begin, "--no-install-recommends", "--download-only", "install", *_BASE, package]
    # What was known may be of yesterday, and its archives gone.
    if not _succeeds(download):
        _run([*begin, "update"], package)
        _run(download, package)


def _mirror() -> str:
    """Where this machine has its own Debian from. Raises ``ServiceMissing``."""
    listing = ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]
    for _ in range(2):
        done = subprocess.run(listing, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            label, _, address = line.partition(" ")
            if label == "Debian":
                return address
        # What belongs to whom is known only once the lists were fetched.
        _run(["apt-get", "-qq", "update"], "the list of packages")
    raise ServiceMissing("packages of another Debian release need apt sources of Debian itself")


def _unpack(archives: Path, root: Path) -> None:
    root.mkdir()
    left_out = [word for name in _LEFT_OUT for word in ("--exclude", f"./usr/share/{name}")]
    # The links of its folders come first, or the others would make folders where they belong.
    for archive in sorted(archives.glob("*.deb"), key=lambda path: not path.name.startswith("base-files_")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as opened:
            tar = ["tar", "--extract", "--keep-directory-symlink", "--directory", str(root), *left_out]
            subprocess.run(tar, stdin=opened.stdout, check=True)
        if opened.returncode:
            raise ServiceMissing(f"cannot unpack {archive.name}")
    for name in ("passwd", "group", "hosts"):
        (root / "etc" / name).touch()
    (root / "etc" / "nsswitch.conf").write_text(_NAMES)


def _succeeds(words: list[str]) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _run(words: list[str], package: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServiceMissing(f"cannot fetch {package}: {done.stderr.strip()[-500:]}")
