"""Files of a repository on the Hugging Face hub or on ModelScope, brought to the download cache."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from tinydiff import environment
from tinydiff.records import UserError

log = logging.getLogger(__name__)


def fetched(
    repository: str,
    wanted: Collection[str],
    revision: str | None = None,
    field: str = "model_path",
    unwanted: Collection[str] = (),
) -> Path:
    """The directory in the download cache with a repository's files, which are downloaded if need be.

    The files are those that the patterns `wanted` match and `unwanted` do not. field: the option to name in
    errors. Raises UserError.

    Files that are in the cache are not downloaded again, and one that was cut short is continued. Where the
    hub cannot be reached, the cache has to do.
    """
    download = _from_modelscope if environment.use_modelscope() else _from_hub
    return download(repository, [*wanted], revision, field, [*unwanted])


def listing(repository: str, revision: str | None) -> list[str]:
    """The repository's files; none where the hub does not answer.

    The download then says why, or needs nothing of the hub.
    """
    try:
        if environment.use_modelscope():
            from modelscope.hub.api import HubApi  # pyright: ignore[reportMissingImports]

            entries = HubApi().get_model_files(repository, revision=revision, recursive=True)
            return [entry["Path"] for entry in entries if entry.get("Type") != "tree"]
        from huggingface_hub import model_info  # one request; the listing of files is tried for half a minute

        return [each.rfilename for each in model_info(repository, revision=revision).siblings or ()]
    except Exception:  # of the hub's client, of the network below it, or offline
        return []


def _from_hub(
    repository: str, wanted: list[str], revision: str | None, field: str, unwanted: list[str]
) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
        )
    except errors.GatedRepoError:
        reason = (
            "the hub asks for its licence to be accepted; accept it on its page and log in with `hf "
            "auth login`"
        )
    except errors.RevisionNotFoundError:
        raise UserError(
            "revision", f"revision: {repository!r} has no branch, tag or commit {revision!r}"
        ) from None
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private and you are not logged in"
    except errors.LocalEntryNotFoundError as error:
        # The client asks for all that the patterns match, so for the weights of every variant; one was
        # fetched.
        if place := getattr(error, "snapshot_path", None):
            log.warning(
                "the hub cannot be reached; of %s the files in the download cache are used", repository
            )
            return Path(place)
        reason = "it is not a directory here, not in the download cache, and the hub cannot be reached"
    except errors.HFValidationError as error:
        reason = f"it is not a valid hub id ({error})"
    except (OSError, ConnectionError) as error:
        reason = f"the download failed ({error})".replace("\n", " ")
    raise UserError(field, f"{field}: cannot load {repository!r}: {reason}")


def _from_modelscope(
    repository: str, wanted: list[str], revision: str | None, field: str, unwanted: list[str]
) -> Path:
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        message = (
            f"cannot load {repository!r}: TINYDIFF_USE_MODELSCOPE asks for ModelScope, whose library is not "
            "installed; pip install modelscope, or unset the variable"
        )
        raise UserError(field, f"{field}: {message}") from None
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
        )
    except Exception as error:  # its client has errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(field, f"{field}: cannot load {repository!r} from ModelScope: {reason}") from error
