"""The one error class that a user sees."""


class UserError(Exception):
    """Bad input or a missing piece, told in one line that names the thing and the remedy.

    The command line prints ``error: <message>`` and exits with code 1; the server turns it into an
    OpenAI-shaped error. Bugs of ours are other exceptions and keep their traceback.
    """
