"""The command `quant`, also as `python -m quant`: one line where the packages that it needs are missing."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        from quant import cli
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        from quant.tables import missing
        print(f"quant: {missing('the command', 'click')}", file=sys.stderr)
        return 2
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
