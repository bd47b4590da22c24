"""Whether a model of the Hub can be had, found out before its files are asked for one by one."""

from __future__ import annotations

from os.path import exists

from alignlab.core import ConfigError


def check_reachable(path: str, revision: str | None, key: str = "model.path") -> None:
    """Refuse a model that is neither here nor to be had: without a network each of its files would be tried for long.

    Raises:
        ConfigError: there is no such folder, nothing of it in the cache, and the Hub does not answer.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if exists(path) or constants.HF_HUB_OFFLINE:
        return
    try:
        if any(try_to_load_from_cache(path, f"{kind}config.json", revision=revision) for kind in ("", "adapter_")):
            return
        HfApi().model_info(path, revision=revision, timeout=10)
    except (HfHubHTTPError, HFValidationError):  # it answers, or is not asked: loading says what is wrong
        return
    except Exception as error:  # of whatever library makes the connection
        raise ConfigError(
            f"{key}={path!r}: there is no such folder, nor can it be had from the Hub: {constants.ENDPOINT} does not "
            f"answer ({error}); is there a network?"
        ) from error
