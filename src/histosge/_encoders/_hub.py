"""One request to the Hugging Face hub before weights are loaded, and errors with their remedy."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from histosge._encoders._spec import EncoderSpec

PAGES = "https://huggingface.co/"
OPEN = ("midnight", "phikon", "lunit-dino-s16")
"""Encoders without a permission, large to small, to offer where another is refused; a test checks them."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pt2", ".pth", ".ckpt")
_CLIENTS = ("httpcore", "httpx", "httpx2", "requests", "urllib3")  # huggingface_hub changed its client twice


class EncoderAccessError(RuntimeError):
    """The weights of an encoder cannot be loaded: no permission, no network, or no such weights."""


@contextmanager
def explained(spec: EncoderSpec, *, repo: str | None, weights: object, takes_weights: bool) -> Iterator[None]:
    """Raise an error with a remedy where loading fails. There is no fallback to another encoder.

    ``repo`` is the repository of the weights on the hub; ``None`` where timm gets them from elsewhere.
    """
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    try:
        with _requested_once(repo if weights is None else None, spec.revision):
            yield
    except Exception as err:
        # transformers, lazyslide-models and timm each wrap the hub's own error in one of theirs
        chain = list(_chain(err))
        if any(re.search(r"[Ww]eights.only", str(each)) for each in chain):  # of torch, which has no class for it
            of = "on the hub" if weights is None else f"in {str(weights)!r}"
            msg = (
                f"the weights {of} are not weights alone: the file is damaged, or a pickle, whose code would run when "
                f"it is read. None was run. Get the weights of encoder {spec.name!r} as .safetensors, or as a plain "
                "state_dict."
            )
            raise ValueError(msg) from err
        if weights is not None and not isinstance(err, ImportError):
            msg = (
                f"the weights in {str(weights)!r} could not be read as those of encoder {spec.name!r} "
                f"({type(err).__name__}). Check that they are complete and those of this encoder."
            )
            raise ValueError(msg) from err
        message = _message(chain, spec, takes_weights=takes_weights, was_offline=was_offline)
        if message is None:
            raise
        raise EncoderAccessError(message) from err


@contextmanager
def _requested_once(repo: str | None, revision: str | None) -> Iterator[None]:
    """Send one request to the hub before the loaders, which send several and repeat each five times.

    Where the hub does not answer, or refuses, weights are loaded from its cache without another request. The time-out
    is that of the hub's own client (``HF_HUB_ETAG_TIMEOUT``).
    """
    from huggingface_hub import constants, errors

    refusal = None if repo is None or constants.HF_HUB_OFFLINE else _refusal(repo, revision)
    if repo is None or refusal is None:
        yield
        return
    if not weights_kept(repo) or isinstance(refusal, errors.RevisionNotFoundError):
        raise refusal
    logger.info("    no access to the hub (%s): loading from its cache", type(refusal).__name__)
    constants.HF_HUB_OFFLINE = True  # read at each request; no argument of the loaders sets it
    try:
        yield
    except Exception as err:
        missing = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
        # the cache is incomplete: raise the reason why the rest cannot be fetched
        if any(isinstance(each, missing) for each in _chain(err)):
            raise refusal from err
        raise
    finally:
        constants.HF_HUB_OFFLINE = False


def _refusal(repo: str, revision: str | None) -> Exception | None:
    """Request a small file of a repository, once; return the error of the hub or of the network, if any."""
    from huggingface_hub import constants, errors, get_token, hf_hub_url
    from huggingface_hub.utils import get_session, hf_raise_for_status

    url = hf_hub_url(repo, "config.json", revision=revision)
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        answer = get_session().head(url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        hf_raise_for_status(answer)
    except errors.HfHubHTTPError as err:
        missing = isinstance(err, errors.RepositoryNotFoundError | errors.RevisionNotFoundError)
        return None if err.response.status_code == 404 and not missing else err  # not every encoder has that file
    except Exception as err:  # noqa: BLE001  each client has its own errors
        return err
    return None


def weights_kept(repo: str) -> bool:
    """Whether the hub's cache contains a file of weights of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"
    return any(path.suffix in _WEIGHTS and path.exists() for path in snapshots.glob("*/**/*"))


def commit(repo: str, revision: str | None) -> str | None:
    """Look up, in the hub's cache, the commit that ``revision`` stood for when it was fetched."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if revision is not None and len(revision) == 40:
        return revision
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    ref = folder / "refs" / (revision or "main")
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision


def _chain(err: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    at: BaseException | None = err
    while at is not None and at not in seen:
        yield at
        seen.append(at)
        at = at.__cause__ or at.__context__


def _message(chain: list[BaseException], spec: EncoderSpec, *, takes_weights: bool, was_offline: bool) -> str | None:
    from huggingface_hub import errors

    def among(*kinds: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kinds)), None)

    page = spec.url or PAGES
    folder = f", or pass a folder, histosge.load_encoder({spec.name!r}, weights=FOLDER)" if takes_weights else ""
    others = ", ".join(repr(name) for name in OPEN if name != spec.name)
    instead = f"Encoders that need no permission: {others}; no download either: 'stain-texture'."
    elsewhere = f"On a machine without network, copy a filled cache and point HF_HOME to it{folder}."

    http = among(errors.HfHubHTTPError)
    status = getattr(getattr(http, "response", None), "status_code", None)
    missing_file = among(errors.EntryNotFoundError)
    # a file that is not in the cache because there is no network is an EntryNotFoundError as well
    unreachable = among(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError, URLError) or next(
        (e for e in chain if type(e).__module__.split(".")[0] in _CLIENTS and getattr(e, "response", None) is None),
        None,
    )  # what has a response was reached
    if among(errors.GatedRepoError) or status == 403:
        return (
            f"encoder {spec.name!r} is gated and this machine has no access. Ask for it at {page}, wait for the "
            f"approval, then log in with `hf auth login`. {elsewhere} {instead}"
        )
    if among(errors.RepositoryNotFoundError) or status == 401:
        return (
            f"the hub shows no weights of encoder {spec.name!r} at {page} to this machine: the name is wrong, or it is "
            f"gated and you are not logged in. Ask for access there and log in with `hf auth login`. "
            f"{elsewhere} {instead}"
        )
    if among(errors.RevisionNotFoundError):
        return (
            f"the hub has no revision {spec.revision!r} of encoder {spec.name!r}: see {page} for its commits and tags."
        )
    if missing_file and not unreachable:
        return (
            f"the hub's folder of encoder {spec.name!r}, {page}, does not hold what is needed (config.json and weights "
            f"that timm can read). {instead}"
        )
    if http is not None:
        return (
            f"the hub answered with HTTP status {status} for encoder {spec.name!r} ({page}). Try again later. "
            f"{elsewhere} {instead}"
        )
    if unreachable:
        why = " (HF_HUB_OFFLINE is set)" if was_offline else ""
        return (
            f"the weights of encoder {spec.name!r} are not in the hub's cache and {page} cannot be reached{why}. Check "
            f"the network. {elsewhere} The encoder 'stain-texture' needs no download."
        )
    return None
