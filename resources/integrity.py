"""Whether stored files are still the published ones: hashed once for each identity of a file, not at every look."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression_dags.provenance.artifacts import MANIFEST, file_digest
from compression_dags.statefile import read_entries, replace_json, sync

#: Inode, size, and times of the last change of contents and of the inode: another value may mean other bytes.
Identity = tuple[int, int, int, int]


def identity(path: Path) -> Identity:
    """What the file system says of a file without reading it.

    Raises:
        OSError: there is no such file.
    """
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class Integrity:
    """Checks artifacts against their manifests.

    `<home>/verified/<kind>/<fingerprint>.json` holds the identities of files whose hashes were found right. A file of a
    remembered identity is not read again; a copied, linked or touched one is.
    """

    def __init__(self, home: Path):
        self._folder = home / "verified"

    def damage(self, directory: Path, manifest: Mapping[str, Any], *, thorough: bool = False) -> list[str]:
        """What is wrong with the files of an artifact, a line each; nothing if all are as published.

        Args:
            directory: `<home>/artifacts/<kind>/<fingerprint>`.
            thorough: hash every file, whatever is remembered.
        """
        note = self._note(directory)
        known = read_entries(note, lambda _, value: _identity(value))
        found: dict[str, Identity] = {}
        wrong: list[str] = []
        for name, entry in manifest["files"].items():
            path = directory / name
            try:
                now = identity(path)
                if now[1] != entry["bytes"]:
                    wrong.append(f"{name} has {now[1]} bytes, not {entry['bytes']}")
                elif (thorough or known.get(name) != now) and file_digest(path) != entry["sha256"]:
                    wrong.append(f"{name} has another sha256 than when it was stored")
                else:
                    found[name] = now
            except OSError as error:
                wrong.append(f"{name} cannot be read ({error.strerror})")
        if not wrong and found != known:
            self._write(note, found)
        return wrong

    def remember(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        """Note the files of an artifact that was hashed and published just now."""
        self._write(self._note(directory), {name: identity(directory / name) for name in manifest["files"]})

    def _note(self, directory: Path) -> Path:
        return self._folder / directory.parent.name / f"{directory.name}.json"

    @staticmethod
    def _write(note: Path, found: Mapping[str, Identity]) -> None:
        try:
            replace_json(note, found)
        except OSError:
            return  # a home that only reads: the next look hashes again


def _identity(value: Any) -> Identity:
    inode, size, changed, inode_changed = map(int, value)
    return inode, size, changed, inode_changed


def protect(directory: Path) -> None:
    """Take the write permission from every file below a directory, the manifest included."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o444)


def sync_tree(directory: Path) -> None:
    """`sync` of all files below a directory, then of the directories that name them."""
    folders = [directory]
    for path in directory.rglob("*"):
        if path.is_dir():
            folders.append(path)
        elif path.name != MANIFEST or path.parent != directory:
            sync(path)
    for folder in reversed(folders):
        sync(folder)
