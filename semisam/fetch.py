# SPDX-License-Identifier: Apache-2.0
"""Weights of published models: where they are kept, and how they get there. Nothing is fetched at import.

A model's files lie in the folder of its name under `home()`. A file that is being fetched has a name of its
own until it is whole and its hash is right, so that what is there is always complete; what a cut connection
left behind is continued, not begun again. Nothing in these files is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

__all__ = ["FetchError", "Weights", "download", "fetch", "find", "home", "sha256"]

TRIES = 5
"""Connections that may end too early before `download` gives up."""

_CHUNK = 1 << 20
_SNAPSHOT = (
    "*.json",
    "*.safetensors",
    "*.txt",
)  # nothing that could be run, and no copies for other libraries
_TIMEOUT = 30.0  # seconds without a byte


class FetchError(RuntimeError):
    """Weights could not be fetched; the text says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Weights:
    """Where the published weights of a model are.

    `files` are paths in the repository `hub` of Hugging Face, or below the address `url`; `snapshot`: all
    tensors and settings of the repository instead. `load` is what the model is given, a file or a folder of
    these (default: the first file). `sha256` has the hashes that are known, by file; `page` is for people.

    >>> from semisam.fetch import Weights
    >>> Weights(hub="someone/model", files=("v1/model.pt",)).address("v1/model.pt")
    'https://huggingface.co/someone/model/resolve/main/v1/model.pt'
    """

    hub: str = ""
    files: tuple[str, ...] = ()
    url: str = ""
    load: str = ""
    snapshot: bool = False
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)
    page: str = ""

    def address(self, file: str) -> str:
        """Return the address of one file; HF_ENDPOINT may name a mirror of Hugging Face."""
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        base = self.url or f"{endpoint}/{self.hub}/resolve/main"
        return f"{base.rstrip('/')}/{urllib.parse.quote(file)}"


def home() -> Path:
    """Return the folder of all weights: SEMISAM_HOME, or "semisam" in the user's cache folder.

    >>> from semisam import fetch
    >>> fetch.home().is_absolute()
    True
    """
    given = os.environ.get("SEMISAM_HOME")
    if given:
        return Path(given).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "semisam"


def find(name: str, weights: Weights) -> Path | None:
    """Return what the model `name` is to be given as its checkpoint, if all of it is in `home()`.

    Without a list of files, that is a folder that has anything in it, or its only file.

    >>> from semisam import fetch
    >>> fetch.find("nobody", fetch.Weights(hub="no/body", files=("model.pt",))) is None
    True
    """
    folder = home() / name
    if weights.files:
        whole = all((folder / file).is_file() for file in weights.files)
        return folder / (weights.load or weights.files[0]) if whole else None
    if not folder.is_dir():
        return None
    inside = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and not _is_part(p)]
    if not inside:
        return None
    return inside[0] if len(inside) == 1 and inside[0].is_file() else folder / weights.load


def fetch(
    name: str,
    weights: Weights,
    *,
    file: str | None = None,
    url: str | None = None,
    checksum: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Get the weights of a model into `home()` and return what it is to be given as its checkpoint.

    `file` chooses another file of the repository, `url` another address of a single file; `checksum` is the
    sha256 that this file must have. What is there already is not fetched again. huggingface_hub is used for
    Hugging Face where it is installed, so that its login, mirrors and offline mode count. `say` gets one
    sentence per file: its hash, and whether it was compared with a known one.

    Raises FetchError: no source, no network, no such file, another hash (then the file is removed).

    >>> import os, pathlib, tempfile
    >>> from semisam import fetch
    >>> os.environ["SEMISAM_HOME"] = tempfile.mkdtemp()
    >>> source = pathlib.Path(tempfile.mkdtemp(), "model.pt")
    >>> _ = source.write_bytes(b"weights")
    >>> model = fetch.Weights(url=source.parent.as_uri(), files=("model.pt",))
    >>> fetch.fetch("mine", model).read_bytes()
    b'weights'
    >>> fetch.find("mine", model).name
    'model.pt'
    """
    folder = home() / name
    if url is not None:
        place = folder / _file_name(url)
        _one(place, url, checksum or "", say)
        return place
    if not weights.hub and not weights.url:
        raise FetchError(
            f"{name}: no address is known for its weights"
            + (f" (see {weights.page})" if weights.page else "")
            + f"; give --url, or put the file into {folder}"
        )
    files = (file,) if file else weights.files
    if not files and not weights.snapshot:
        raise FetchError(
            f"{name}: which file of {weights.page or weights.hub or weights.url} is wanted is not known: "
            "give --file NAME"
        )
    if not files and not util.find_spec("huggingface_hub"):
        raise FetchError(
            f"{name}: all files of {weights.hub} are wanted, which needs huggingface_hub: pip install "
            f"huggingface_hub, or put them into {folder}"
        )
    if not files:
        if find(name, weights) is None:
            part = folder.with_name(f"{name}.part")  # an unfinished one is continued
            wanted = {"repo_id": weights.hub, "local_dir": str(part), "allow_patterns": list(_SNAPSHOT)}
            _hub(name, say, "snapshot_download", **wanted)
            os.replace(part, folder)
        return folder / weights.load
    for each in files:
        expected = checksum or weights.sha256.get(each, "")
        if weights.hub and not weights.url and util.find_spec("huggingface_hub"):
            if not (folder / each).is_file():
                _hub(name, say, "hf_hub_download", repo_id=weights.hub, filename=each, local_dir=str(folder))
            _judge(folder / each, folder / each, expected, say)
        else:
            _one(folder / each, weights.address(each), expected, say)
    return folder / (file or weights.load or files[0])


def download(
    url: str,
    path: str | os.PathLike[str],
    expected: str = "",
    *,
    say: Callable[[str], None] = lambda text: None,
    pause: float = 1.0,
) -> Path:
    """Fetch one file: under a name ending in ".part" until it is whole and has the sha256 `expected`.

    A file that a cut connection left unfinished is continued where the server can do that and still has the
    same file (by its ETag or date, or in the end by the hash), here up to 5 times with `pause` seconds
    between, and by the next call.

    Raises FetchError as `fetch` does.

    >>> import pathlib, tempfile
    >>> from semisam import fetch
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "old.pt").write_bytes(b"weights")
    >>> fetch.download((folder / "old.pt").as_uri(), folder / "new.pt", say=print)  # doctest: +ELLIPSIS
    /.../new.pt: sha256 9a12...(not checked: no hash is known for this file)
    PosixPath('/.../new.pt')
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    tag = path.with_name(path.name + ".part.etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, reason = False, ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(pause)
        if part.exists() and not (tag.exists() or expected):
            part.unlink()  # nothing would tell whether the rest belongs to it
        whole, reason = _try(url, part, tag)
        if whole:
            break
    if not whole:
        size = part.stat().st_size if part.exists() else 0
        raise FetchError(
            f"{url}: {reason} ({TRIES} times); {size} bytes are kept in {part}, and the same command "
            "continues there"
        )
    tag.unlink(missing_ok=True)
    _judge(part, path, expected, say)
    return path


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the hash of a file's content.

    >>> import tempfile
    >>> from semisam import fetch
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     fetch.sha256(file.name)[:8]
    'e3b0c442'
    """
    made = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            made.update(chunk)
    return made.hexdigest()


# ---- one file -----------------------------------------------------------------------------------


def _one(path: Path, url: str, expected: str, say: Callable[[str], None]) -> None:
    if path.is_file():
        _judge(path, path, expected, say)
    else:
        download(url, path, expected, say=say)


def _judge(now: Path, path: Path, expected: str, say: Callable[[str], None]) -> None:
    """Give a whole file its name, or remove it: FetchError."""
    found = sha256(now)
    if expected and found != expected.lower():
        now.unlink()
        raise FetchError(
            f"{path}: expected the sha256 {expected.lower()}, got {found}: it is another file or was changed "
            "on its way, and was removed"
        )
    if now != path:
        os.replace(now, path)
    checked = "as it should be" if expected else "not checked: no hash is known for this file"
    say(f"{path}: sha256 {found} ({checked})")


def _try(url: str, part: Path, tag: Path) -> tuple[bool, str]:
    """One connection; (whole, what went wrong)."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "semisam", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text(encoding="utf-8")
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return _receive(response, part, tag, have)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after what is here: whole, or another file
            if _total(error.headers.get("Content-Range")) == have:
                return True, ""
            part.unlink()
            return False, "the file there is another one now"
        raise FetchError(_answer(url, error)) from None
    except (urllib.error.URLError, ValueError) as error:
        raise FetchError(_unreachable(url, error)) from None
    except (OSError, http.client.HTTPException) as error:
        return False, f"the connection ended: {error or type(error).__name__}"


def _receive(response: Any, part: Path, tag: Path, have: int) -> tuple[bool, str]:
    continued = response.status == 206 and _first(response.headers.get("Content-Range")) == have
    if have and not continued:  # the server sends all of it
        have = 0
    length = response.headers.get("Content-Length")
    total = None if length is None else have + int(length)
    etag = response.headers.get("ETag", "")
    version = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    if version:
        tag.write_text(version, encoding="utf-8")
    else:
        tag.unlink(missing_ok=True)
    size, cut = have, False
    with part.open("ab" if continued else "wb") as file:
        try:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                size += len(chunk)
        except http.client.IncompleteRead as error:
            file.write(error.partial)
            size += len(error.partial)
            cut = True
        file.flush()
        os.fsync(file.fileno())
    if cut or (total is not None and size < total):
        return False, f"the connection ended after {size} of {total or 'unknown'} bytes"
    return True, ""


def _first(content_range: str | None) -> int | None:
    match = re.match(r"bytes (\d+)-", content_range or "")
    return int(match[1]) if match else None


def _total(content_range: str | None) -> int | None:
    match = re.search(r"/(\d+)$", content_range or "")
    return int(match[1]) if match else None


def _answer(url: str, error: urllib.error.HTTPError) -> str:
    consent = "accept the licence on the model's page, then install huggingface_hub and log in"
    what = {
        401: f"it wants a login: {consent}",
        403: f"it refuses: {consent}",
        404: "there is no such file",
    }.get(error.code, "try again later, or fetch the file with a browser")
    return f"{url}: expected the file, got {error.code} {error.reason} from the server: {what}"


def _unreachable(url: str, error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return (
        f"{url}: expected an answer, got none ({reason}): without a network, copy the file by hand into "
        f"{home()}, in the folder of the model's name, or give its path"
    )


def _file_name(url: str) -> str:
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    if not name or name in (".", ".."):
        raise FetchError(f"{url}: expected an address that ends in a file's name")
    return name


def _is_part(path: Path) -> bool:
    return path.name.endswith((".part", ".part.etag"))


def _hub(name: str, say: Callable[[str], None], function: str, **arguments: Any) -> None:
    """One call of huggingface_hub, whose errors are many, as a sentence."""
    hub = importlib.import_module("huggingface_hub")
    with contextlib.suppress(AttributeError, TypeError):
        say(f"{name}: from {arguments['repo_id']} by huggingface_hub {hub.__version__}")
    try:
        getattr(hub, function)(**arguments)
    except Exception as error:  # its errors have no common class
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FetchError(
            f"{name}: huggingface_hub could not get {arguments.get('filename', 'the files')} of "
            f"{arguments['repo_id']}: {first}"
        ) from error
