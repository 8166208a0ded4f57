"""The one exception for mistakes that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """One clear sentence naming the file, field or flag, and the fix.

    Runners print it without a traceback and exit with a non-zero status.
    """
