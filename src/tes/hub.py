"""One look at the model hub before anything is fetched: no network means one sentence, not minutes of retries."""

from __future__ import annotations

import threading
from typing import Literal

from tes.errors import TesError, one_line

PATIENCE_SECONDS = 10.0  # for the whole look; a user without a network reads the sentence well within 15 s
SECONDS_PER_REQUEST = 6.0


def require_hub(
    repo_id: str,
    offline_choice: str,
    error: type[TesError] = TesError,
    repo_type: Literal["model", "dataset"] = "model",
) -> None:
    """Return if the Hub can be reached and lets us read the model or data set `repo_id`; nothing is downloaded.

    Call it once a local folder and the local Hub cache are known not to hold it. `HF_ENDPOINT`,
    `HF_HUB_OFFLINE` and the user's login are those of huggingface_hub.

    Args:
        repo_id: Its name on the Hub, "owner/name" or "name".
        offline_choice: What to use instead, as the end of a sentence ("use `--text minilm`").
        error: The error to raise.
        repo_type: What it is.

    Raises:
        TesError: `error`, within 10 s: no network, offline by choice, no such repository, gated, or the Hub is ill.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    problems: list[Exception] = []
    probed = "config.json" if repo_type == "model" else "README.md"
    kind = "model" if repo_type == "model" else "data set"

    def look() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, probed, repo_type=repo_type), timeout=SECONDS_PER_REQUEST)
        except Exception as problem:
            # Whatever the HTTP library raises in this release: to the user it is one thing, the Hub cannot be read.
            problems.append(problem)

    # A name server that does not answer blocks for as long as it likes, whatever the timeout: hence the thread.
    looking = threading.Thread(target=look, daemon=True, name="look at the Hub")
    looking.start()
    looking.join(PATIENCE_SECONDS)
    hub = constants.ENDPOINT
    page = repo_id if repo_type == "model" else f"datasets/{repo_id}"
    absent = f"`{repo_id}` is not on this machine"
    if looking.is_alive():
        raise error(f"{absent}, and the Hub ({hub}) gave no answer in {PATIENCE_SECONDS:.0f} s: {offline_choice}.")
    match problems:
        case [] | [EntryNotFoundError()]:  # some have no such file; that the name was known is enough
            return
        case [HFValidationError()]:
            raise error(f"`{repo_id}` is neither a folder here nor a name that the Hub could know: {offline_choice}.")
        case [OfflineModeIsEnabled()]:
            raise error(f"{absent}, and HF_HUB_OFFLINE forbids to fetch it: unset that, or {offline_choice}.")
        case [GatedRepoError()]:
            raise error(
                f"`{repo_id}` is gated: ask for access at {hub}/{page} and run `hf auth login`, or {offline_choice}."
            )
        case [RepositoryNotFoundError()]:
            raise error(
                f"`{repo_id}` is neither on this machine nor a public {kind} of the Hub ({hub}): check the spelling, "
                f"run `hf auth login` if it is private, or {offline_choice}."
            )
        case [HfHubHTTPError() as answer]:
            raise error(
                f"{absent}, and the Hub ({hub}) answered with status {answer.response.status_code}: "
                f"try again later, or {offline_choice}."
            )
        case [problem]:
            reason = one_line(problem)
            raise error(f"{absent}, and the Hub ({hub}) cannot be reached ({reason}): {offline_choice}.") from problem
