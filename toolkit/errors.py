"""The one exception that means "the user can mend this": launch/ and shards/ print it as a sentence, without traceback."""


class UserError(ValueError):
    """Carries what was given, what is allowed and what to do, in one sentence; to a program it is a ValueError."""


def in_one_line(error: Exception) -> str:
    """What a library's error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
