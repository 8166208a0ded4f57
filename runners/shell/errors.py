"""The exception for mistakes that the user can correct, and text that is safe to print."""

from __future__ import annotations

import re

# Control characters except tab and newline (C0, DEL, C1), bidirectional marks, and unpaired
# surrogates, which cannot be encoded
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """One clear sentence naming the file, field or flag, and the fix.

    Runners print it without a traceback and exit with a non-zero status.
    """


def printable(text: str) -> str:
    r"""Text for a terminal, with control characters escaped.

    >>> print(printable("runs/\x1b[31mred"))
    runs/\x1b[31mred
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
