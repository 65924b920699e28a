"""Starts SGLang with the API key from the environment variable SGLANG_API_KEY.

SGLang takes its key as an argument only, where every process list would show it. This file
runs inside the container, under whatever Python and SGLang the image has.
"""

import os
import runpy
import sys

# With "=": a key may begin with a dash, and would be taken for another argument.
key = os.environ.pop("SGLANG_API_KEY", "")
sys.argv = ["sglang.launch_server", *sys.argv[1:], *([f"--api-key={key}"] if key else [])]
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
