"""Files of models on the Hugging Face hub: from the cache, or after one probe, so that nothing is retried offline."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROBE_SECONDS = 5.0
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class UnknownModelError(ValueError):
    """The hub knows no model of this name."""


def find(name: str, file: str) -> Path | None:
    """``file`` of the model ``name`` (a folder, or a hub name); None where the model has no such file.

    Raises:
        UnknownModelError: The hub knows no such model.
        OSError: Not in the cache, and the hub cannot be reached.
    """
    if is_path(name):
        path = Path(name).expanduser() / file
        return path if path.is_file() else None
    if not HUB_NAME.fullmatch(name):
        raise UnknownModelError(f"name_or_path: {name} is neither a folder nor a name on the hub")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(name, file)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None
    reason = unreachable(name)
    if reason is not None:
        raise OSError(
            f"name_or_path: {file} of {name} is not in the cache, and the hub cannot be reached: {reason}; pass "
            f"preprocess=<a processor or a Preprocess> to do without it"
        )
    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError as error:
        raise OSError(f"name_or_path: {file} of {name} cannot be fetched: {error}") from error
    except EntryNotFoundError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def is_path(name: str) -> bool:
    """Whether ``name`` is meant as a folder, not as a name on the hub."""
    return os.path.exists(name) or os.path.isabs(name) or name.startswith((".", "~"))


def model_name(name: str | os.PathLike[str]) -> str:
    """What a model is called in stores: a folder by its real path, another name as it is."""
    path = os.path.expanduser(os.fspath(name))
    return os.path.realpath(path) if os.path.isdir(path) else os.fspath(name)


def check_name(name: str, known: Iterable[str]) -> bool:
    """Checks a name that is no folder before transformers retries it for half a minute.

    Args:
        name: Of a model on the hub.
        known: Names that this library knows, to propose where ``name`` is a typing error.

    Returns:
        Whether the files must come from the cache, because the hub cannot be reached.

    Raises:
        UnknownModelError: No name on the hub, or the hub does not know it.
        OSError: Not in the cache, and the hub cannot be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    if "/" not in name or not HUB_NAME.fullmatch(name):
        raise UnknownModelError(
            f"name_or_path: {name} is neither a folder nor a known name{_proposal(name, known) or '.'} Known names: "
            f"{', '.join(known)}; names on the hub are owner/model"
        )
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    try:
        reason = unreachable(name)
    except UnknownModelError:
        # A private model may be in the cache of a user who is not logged in now.
        if cached:
            return True
        raise
    if reason is None or cached:
        return reason is not None
    raise OSError(
        f"name_or_path: {name} is not in the cache, and the hub cannot be reached: {reason}{_proposal(name, known)}"
    )


def _proposal(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.rpartition("/")[2], known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def unreachable(name: str) -> str | None:
    """Why the hub cannot be asked for ``name``, in one line; None where it can. One request, no retries.

    Raises:
        UnknownModelError: The hub knows no such model, or it is gated.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=PROBE_SECONDS)
    except RepositoryNotFoundError as error:
        raise UnknownModelError(f"name_or_path: the hub has no model {name}, or not for this user") from error
    except HfHubHTTPError as error:
        return f"{error}".splitlines()[0]
    # Transport errors are of another class in each release (requests, httpx); offline mode is a ConnectionError.
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
