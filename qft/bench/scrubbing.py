"""Takes out of a record what is nobody else's business: folders of this machine, and secrets.

Records, like reports, are made to be shown and passed on. What goes into one is chosen elsewhere;
this is the last gate, and it knows nothing of what a text is about.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "***"
# an absolute path of two parts or more, or one below a home folder; not the path of a URL
_PATH = re.compile(r"(?<![\w.:/~-])(?:~[\w.-]*)?/(?:[^\s/:'\"]+/)+(?P<name>[^\s/:'\"]*)")
_HOME = re.compile(r"(?<![\w.:/~-])~[\w.-]*/(?P<name>[^\s/:'\"]+)")
_SECRETS = re.compile(
    r"hf_\w{8,}|api_org_\w{8,}|sk-[\w-]{8,}|gh[pousr]_\w{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}"
    r"|xox[a-z]-[\w-]{8,}|AKIA[A-Z0-9]{12,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"
)
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@]+@")
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters of an environment variable that are looked for


def scrubbed(value: Any) -> Any:
    """The value with every text in it, keys included, without folders and secrets."""
    secrets = [text for name, text in os.environ.items()
               if _SECRET_NAMES.search(name) and len(text) >= _SHORTEST_SECRET]  # fmt: skip
    return _scrub(value, str(Path.home()), secrets)


def _scrub(value: Any, home: str, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {_text(str(k), home, secrets): _scrub(v, home, secrets) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrub(inner, home, secrets) for inner in value]
    if isinstance(value, (str, Path)):
        return _text(str(value), home, secrets)
    return value


def _text(text: str, home: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _SECRETS.sub(HIDDEN, text)
    text = _USER_IN_ADDRESS.sub("", text)
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return _HOME.sub(_last, _PATH.sub(_last, text))


def _last(found: re.Match[str]) -> str:
    return found["name"] or Path(found[0]).name


def name_of(place: str | Path) -> str:
    """What a model or a file is called: a hub id as it is, of a local one the last part alone."""
    text = str(place)
    local = text.startswith(("/", "./", "../", "~")) or os.path.exists(os.path.expanduser(text))
    return Path(os.path.abspath(os.path.expanduser(text))).name if local else text
