"""The minicpm-edge command and what its subcommands share."""
