"""``python -m sglang_harness`` is ``sglang-harness``: for a Python without installed scripts."""

from sglang_harness.cli import main

if __name__ == "__main__":
    main()
