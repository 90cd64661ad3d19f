"""The one exception that means "the user can mend this": launch/ and shards/ print it as a sentence, without traceback."""


class UserError(ValueError):
    """Carries what was given, what is allowed and what to do, in one sentence; to a program it is a ValueError."""


def in_words(message: str) -> str:
    """What pydantic says of a value, as the rest of a sentence that names it: "it should be greater than 0"."""
    return message.removeprefix("Value error, ").replace("Input should", "it should")


def printable(text: str) -> str:
    """Escape what a terminal would obey or could not write: names come from files that somebody else made."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_one_line(error: Exception) -> str:
    """What a library's error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def list_some(faults: list[str]) -> str:
    """Name the first few of many."""
    return "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
