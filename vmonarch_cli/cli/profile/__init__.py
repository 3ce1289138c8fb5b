"""`vmonarch profile kernel | model | quality`: flags, runs and tables, a file a command."""
