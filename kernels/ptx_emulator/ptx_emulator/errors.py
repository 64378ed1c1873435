"""The one error that the emulator raises: what a program does that a GPU would refuse, or leaves undefined."""


class PtxError(Exception):
    """A fault of the program, of its launch, or a gap of this emulator; the message names place and cause."""
