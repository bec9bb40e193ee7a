"""`python -m hope_megatron` is `hope`."""

from hope_megatron.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
