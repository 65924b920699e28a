"""``python -m sglang_harness`` is ``sglang-harness``: for a Python without installed scripts."""

import sys

try:
    from sglang_harness.cli import main
except ModuleNotFoundError as missing:
    # Such as a Python that was named for a checkout: the package is there, what it needs is not.
    sys.stderr.write(
        f"sglang-harness: {sys.executable} lacks the package {missing.name}. Install the harness "
        "there with its dependencies, or use a Python that has them.\n"
    )
    sys.exit(2)

if __name__ == "__main__":
    main()
