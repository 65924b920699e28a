"""The checks, by subject: one file or one folder each."""

#: The modules that register checks, in the order in which their checks are asked: first what the
#: others build on, then cheapest first. ``log`` reads what the server wrote while the checks before
#: it used it as intended, so those that ask for something wrong come after it. A new subject is one
#: file and one line here.
SUBJECTS = (
    "launch",
    "generate",
    "sample",
    "stop",
    "chat",
    "control",
    "weights.disk",
    "weights.routes",
    "weights.pushes",
    "memory.readings",
    "memory.release",
    "memory.colocated",
    "log",
    "weights.refused",
    "architectures",
    "parallel",
    "weights.parallel",
    "lora",
    "hostile.requests",
    "hostile.weights",
    "memory.misuse",
)
