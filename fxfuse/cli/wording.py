"""Python's errors name Python's options; on the command line they name flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from fxfuse.errors import FxfuseError

E = TypeVar("E", bound=FxfuseError)

#: An option with its value, as Python writes them; not the end of a longer or a dotted name.
_OPTION = re.compile(
    r"""(?<![\w.(-])(?P<name>[a-z_]+)=(?P<value>\[(?:\[[^]]*\]|[^][])*\]|\{[^}]*\}|'[^']*'|"[^"]*"|"""
    r"""\.{3}|\w[\w.()]*)?"""
)
#: A call of which only one option is of interest.
_CALL = re.compile(r"\w+\((?:\.{3}|inputs), (\w+=[^()]*)\)")
#: An option of which a message says what it must be.
_REQUIRED = re.compile(r"^([a-z_]+)(?= must be )")
#: Nothing but options with values.
_ONLY_OPTIONS = re.compile(r"[a-z_]+=\S*(?:, [a-z_]+=\S*)*")


def in_one_line(error: BaseException) -> str:
    """Return what another library's error says, in one line that is not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def naming_flags(error: E, flags: Mapping[str, str], *, bare: bool = False) -> E:
    """Return an error that names flags, given as Python option → flag.

    `bare`: options are meant where they stand without a value, too, as in a message of the class
    that has them. Names with an underscore always are.
    """
    meant = {name: flag for name, flag in flags.items() if bare or "_" in name}

    def reword(text: str) -> str:
        found = _OPTION.sub(lambda match: _typed(match, flags), _CALL.sub(r"\1", text))
        found = _REQUIRED.sub(lambda match: flags.get(match[1], match[1]), found)
        for name, flag in meant.items():
            # The members' classes are no `--classes`.
            found = re.sub(rf"(?<![\w.`'-])(?<!s' )(?<!'s ){name}(?![\w.`'=-])", flag, found)
        return found

    where = reword(error.where) if _ONLY_OPTIONS.fullmatch(error.where) else error.where
    return type(error)(
        reword(error.what), where=where, why=reword(error.why), how=reword(error.how)
    )


def _typed(match: re.Match[str], flags: Mapping[str, str]) -> str:
    flag, value = flags.get(match["name"]), match["value"]
    if flag is None:
        return match[0]
    # Lists of lists come from a file.
    if value in (None, "True", "False") or value.startswith("[["):
        return flag
    text = value.strip("[]'\"").replace("()", "").replace(", ", ",")
    return f"{flag} {text.lower() if text[:1].isupper() else text}"
