"""The checks, by subject: one file or one folder each."""

#: The modules that register checks, in the order in which their checks are asked: what the others
#: rest on first, then cheapest first. A new subject is one file and one line here.
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
    "architectures",
    "parallel",
    "weights.parallel",
    "lora",
    "hostile.requests",
    "hostile.weights",
    "memory.misuse",
)
