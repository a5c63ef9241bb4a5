"""Checks of the Hugging Face hub by ``histosge doctor``: the login, and access to gated encoders."""

from __future__ import annotations

import threading
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from histosge.cli._doctor_checks import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_SECONDS = 4.0
"""Time for all requests to the hub, which are sent at once"""


def hub() -> Iterator[Check]:
    from huggingface_hub import HfApi, constants, get_token

    from histosge._encoders import weights_kept

    api = None if constants.HF_HUB_OFFLINE else HfApi()
    yield from check_hub(api, has_token=get_token() is not None, kept=weights_kept)


def check_hub(api: Any, *, has_token: bool, kept: Callable[[str], bool], seconds: float = _SECONDS) -> Iterator[Check]:
    """Check the hub, the weights in its cache, and access to gated encoders.

    Parameters
    ----------
    api
        A ``huggingface_hub.HfApi``. ``None`` is offline.
    has_token
        Whether somebody is logged in.
    kept
        Whether the weights of a repository are in the cache.
    seconds
        Time for all requests together.
    """
    from histosge._encoders import DEFAULT_ENCODER, OPEN, PAGES, encoders

    frame = encoders()
    repos = {str(name): str(url).removeprefix(PAGES) for name, url in frame["url"].items() if url}
    gated = [str(name) for name in frame.index[frame["gated"]]]
    answers: dict[str, Any] = {}
    if api is not None:
        requests: dict[str, Callable[[], Any]] = {"open": partial(_may_read, api, repos[OPEN[-1]], token=False)}
        if has_token:
            requests["who"] = api.whoami
            requests |= {repos[name]: partial(_may_read, api, repos[name]) for name in gated}
        answers = _within(seconds, requests)
    yield _login(answers, offline=api is None, has_token=has_token)

    here = [name for name, repo in repos.items() if kept(repo)]
    message = f"weights in the hub's cache: {', '.join(here) if here else 'none'}; stain-texture needs none"
    if DEFAULT_ENCODER not in here:
        message += f"; those of {DEFAULT_ENCODER}, the default, come at the first call (4.5 GB, no login)"
    yield Check("encoders", "ok", message, details={"weights_here": here})
    code = [str(name) for name in frame.index[frame["remote_code"]]]
    message = f"encoders that run code of others, only with trust_remote_code=True: {', '.join(code)}"
    yield Check("remote code", "ok", message, details={"encoders": code})
    for name in gated:
        page, answer = f"{PAGES}{repos[name]}", answers.get(repos[name])
        access = True if answer is True else False if _status(answer) in (401, 403, 404) else None
        words = {True: "access granted", False: "no access", None: "access not known"}[access]
        message = f"gated, {words}{', weights are here' if name in here else ''}"
        remedy = None
        if access is False:
            remedy = f"Ask for access at {page} with the account that is logged in here."
        elif access is None and name not in here:
            remedy = f"Ask for access at {page}" + ("." if has_token else ", and log in with `hf auth login`.")
        details = {"url": page, "access": access, "weights_here": name in here}
        yield Check(f"encoder {name}", "ok" if access or name in here else "note", message, remedy, details=details)


def _may_read(api: Any, repo: str, *, token: bool | None = None) -> bool:
    api.auth_check(repo, token=token)  # the answer of the hub is an error or none
    return True


def _login(answers: Mapping[str, Any], *, offline: bool, has_token: bool) -> Check:
    """Check who is logged in, or why that is not known."""
    log_in = "Log in with `hf auth login`, for encoders that are gated; open ones and stain-texture need no login."
    if offline:
        remedy = "Unset it to fetch weights; encoders whose weights are here, and stain-texture, work without."
        return Check("hub", "note", "offline: HF_HUB_OFFLINE is set, no request was sent", remedy)
    who = answers.get("who")
    if isinstance(who, dict):
        return Check("hub", "ok", f"logged in as {who.get('name', '?')}")
    if _status(who) == 401:
        return Check("hub", "note", "the token of this machine is refused: expired, or withdrawn", log_in)
    if answers["open"] is not True and _status(answers["open"]) is None:
        remedy = (
            "Check the network or a proxy (HTTPS_PROXY). Encoders whose weights are here, and stain-texture, work "
            "without."
        )
        return Check("hub", "note", f"cannot be reached ({type(answers['open']).__name__})", remedy)
    if not has_token:
        return Check("hub", "note", "reached, not logged in", log_in)
    return Check("hub", "note", f"reached, but does not state who is logged in ({type(who).__name__})", log_in)


def _within(seconds: float, requests: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Send all requests at once; an error counts as an answer. Requests that take too long are dropped."""
    answers: dict[str, Any] = {name: TimeoutError() for name in requests}

    def send(name: str, request: Callable[[], Any]) -> None:
        try:
            answers[name] = request()
        except Exception as err:  # noqa: BLE001  any error is an answer
            answers[name] = err

    threads = [threading.Thread(target=send, args=item, daemon=True) for item in requests.items()]
    end = monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(end - monotonic(), 0))
    return dict(answers)


def _status(err: Any) -> int | None:
    """HTTP status of the answer of the hub."""
    return getattr(getattr(err, "response", None), "status_code", None)
