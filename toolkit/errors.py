"""The one exception that means "the user can mend this": launch/ and shards/ print it as a sentence, without traceback."""


class UserError(Exception):
    """Carries what was given, what is allowed and what to do, in one sentence."""
