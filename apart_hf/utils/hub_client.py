"""Calls to the Hub: tried again where that is safe, else one line that says what to do."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from apart_hf.errors import ApartError

Result = TypeVar("Result")
CONNECT_SECONDS = 3.0  # then the Hub counts as out of reach
TRIES = 5
FIRST_WAIT = 0.5  # seconds; doubled at each try
LONGEST_WAIT = 60.0
PATIENCE = 20.0  # seconds after which nothing is tried again: some calls the client itself repeats for that long


def transport_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub's HTTP client raises where no answer comes: refused, cut, timed out."""
    client = type(huggingface_hub.get_session()).__module__.split(".")[0]  # httpx2 in 2.4, httpx before
    return (importlib.import_module(client).TransportError,)


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[str]:
    """Keep the libraries from a Hub that does not answer, within the block; give the reason, empty if it answers."""
    constants, own = huggingface_hub.constants, _datasets_settings()
    if huggingface_hub.is_offline_mode() or own.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set"
        return
    try:  # its own client: proxies and certificates are those of the user
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except transport_errors() as error:
        reason = f"{constants.ENDPOINT} cannot be reached ({error or type(error).__name__})"
    else:
        yield ""
        return
    kept = constants.HF_HUB_OFFLINE, own.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE = own.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for loader processes
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE, own.HF_HUB_OFFLINE = kept[:2]
        if kept[2] is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = kept[2]


def _datasets_settings() -> Any:
    """Return the settings of the package datasets; a stand-in where it is not installed."""
    try:
        import datasets  # half a second, which `import apart_hf` need not take
    except ImportError:
        return SimpleNamespace(HF_HUB_OFFLINE=False)
    return datasets.config


def attempt(
    call: Callable[[], Result],
    repo_id: str,
    *,
    arrived: Callable[[], Result | None] | None = None,
    again: bool = True,
    reading: bool = False,
) -> Result:
    """Return the result of `call`, which is tried up to `TRIES` times where no answer comes, or 429 or 5xx.

    Args:
        call: to the Hub.
        repo_id: for messages.
        arrived: asked before a further try: the result, where the last one got through although its answer did not.
        again: whether a further try does no harm.
        reading: nothing is to be changed there.

    Raises:
        ApartError: with the cause and the cure.
    """
    number, start = 0, time.monotonic()
    failures: tuple[type[Exception], ...] = HfHubHTTPError, LocalEntryNotFoundError, RuntimeError, *transport_errors()
    while True:
        number += 1
        try:
            return call()
        except OfflineModeIsEnabled as error:
            raise ApartError("HF_HUB_OFFLINE is set; unset it to reach the Hub, then run this again.") from error
        except (RemoteEntryNotFoundError, RevisionNotFoundError):
            raise  # the caller knows what is missing
        except failures as error:
            if isinstance(error, LocalEntryNotFoundError) and huggingface_hub.is_offline_mode():
                raise
            status = _status(error)
            if status is not None and status < 500 and status != 429:
                raise _refused(error, status, repo_id, reading) from error
            last = number == TRIES or time.monotonic() - start > PATIENCE or not (again or status == 429)
            found = _asked(arrived) if arrived is not None else None
            if found is not None:
                return found
            if last:
                raise _gave_up(error, status, repo_id, number, again, reading) from error
            time.sleep(_wait(error, number))


def _asked(arrived: Callable[[], Result | None]) -> Result | None:
    failures: tuple[type[Exception], ...] = HfHubHTTPError, *transport_errors()
    try:
        return arrived()
    except failures:
        return None  # not known; asked again after the next try


def _status(error: BaseException | None) -> int | None:
    """Return the status of the answer that an error, or its cause, is about: uploads and downloads wrap it."""
    if error is None:
        return None
    response = getattr(error, "response", None)
    return _status(error.__cause__) if response is None else response.status_code


def _wait(error: Exception, number: int) -> float:
    """Return the seconds to wait: what the server asks for, else twice as long at each try."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else FIRST_WAIT * 2 ** (number - 1)


def _refused(error: Exception, status: int, repo_id: str, reading: bool) -> ApartError:
    server = _reason(error)
    if isinstance(error, GatedRepoError):
        page = f"{huggingface_hub.constants.ENDPOINT}/{repo_id}"
        return ApartError(f"{repo_id} is gated and this account has no access; ask for it at {page}.")
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return ApartError(f"the Hub does not take the token ({server}); log in again (hf auth login) or set HF_TOKEN.")
    if isinstance(error, RepositoryNotFoundError):
        return ApartError(f"{repo_id} does not exist, or this account may not see it; check the name and the login.")
    if status == 403 and reading:
        return ApartError(f"this account or token may not read {repo_id} ({server}); log in as one that may.")
    if status == 403:
        return ApartError(
            f"this account or token may not write to {repo_id} ({server}); use a token with the write role, and a "
            "namespace of your own."
        )
    if status == 409:
        return ApartError(f"{repo_id} cannot be made: the name is taken ({server}); choose another.")
    return ApartError(f"the Hub refused {repo_id} with {status} ({server}).")


def _gave_up(error: Exception, status: int | None, repo_id: str, tries: int, again: bool, reading: bool) -> ApartError:
    what = f"answered {status}" if status is not None else f"gave no answer ({type(error).__name__}: {_reason(error)})"
    if reading:
        cure = "try again when it can be reached, or name a local folder"
    elif again:
        cure = "nothing was changed there by halves; run the same command again when it can be reached"
    else:
        page = f"{huggingface_hub.constants.ENDPOINT}/{repo_id}/discussions"
        cure = f"the pull request may be there all the same; look at {page} before trying again"
    return ApartError(f"the Hub {what} for {repo_id}, {tries} time(s): {cure}.")


def _reason(error: Exception) -> str:
    """Return the server's own words, on one line."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")[:200]


def check_repo_id(repo_id: str) -> None:
    """Raise ApartError unless it is user/name as the Hub takes it."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it needs a user or organisation before the name")
    except HFValidationError as error:
        reason = str(error).split(": ")[0].splitlines()[0].rstrip(".")
        raise ApartError(f"{repo_id!r} is no name for a repository ({reason}); use user/name.") from error
