"""Why a base that is named on the hub does not load: whether the hub was out of reach."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from mechlens.trained import first_line

OUT_OF_REACH = {
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError", "ReadTimeout",
}  # fmt: skip
"""names of the exceptions by which the hub's client, whichever HTTP library it uses, says that nothing answered"""


def why_not_loaded(base: str, source: str, part: str, error: Exception) -> str:
    """Why a base's files do not load, and what to do.

    Args:
        base: its name.
        source: its folder or its name on the hub.
        part: what was being loaded, as in "has no tokenizer that loads".
        error: what the loader raised.
    """
    fetched = Path(source).is_dir() or isinstance(try_to_load_from_cache(source, "config.json"), str)
    if fetched or not (constants.HF_HUB_OFFLINE or _out_of_reach(error)):
        return f"base {base!r} {part}: {first_line(error)}"
    hub = "HF_HUB_OFFLINE keeps this process from the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    remedy = "fetch it where the hub can be reached, or give the path of a checkpoint folder as the base"
    return f"base {base!r} is not on this machine, and {hub}; {remedy}"


def _out_of_reach(error: BaseException | None) -> bool:
    """Whether an exception, or one that it comes from, says that no server answered."""
    while error is not None:
        if OUT_OF_REACH & {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__ or error.__context__
    return False
