"""From an expression to a torch program."""
