"""The command line: one file a command, one sink (`output`) for everything that is printed."""
