"""Local server, chat page and terminal chat."""
