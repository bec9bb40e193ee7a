"""The `hope` command: parse, build, call."""
