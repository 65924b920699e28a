"""``README.txt`` of a kit: how it is used, what is in it, and what is not."""

from __future__ import annotations

import textwrap

from sglang_harness.kit.record import KitRecord
from sglang_harness.kit.releases import Catalogue

_WIDTH = 96


def text(record: KitRecord, known: Catalogue) -> str:
    """For a person on the host that it is unpacked on."""
    made_for = record.made_for
    cuda = f"+cu{made_for.cuda}x" if made_for.cuda else ""
    gpus = ", ".join(made_for.architectures) or "none: for a rehearsal with --device cpu alone"
    built = record.harness.revision or "an installed package"
    lines = [
        record.name,
        "=" * len(record.name),
        "",
        "Tests SGLang on a GPU host that has no network and no Docker. On that host:",
        "",
        "    ./gpu-check --python PYTHON",
        "",
        *_wrapped(
            f"PYTHON is a Python {made_for.python} with torch {made_for.torch}{cuda} (glibc "
            f"{made_for.glibc} or newer, {made_for.machine}). It is used and not changed. The "
            f"first call unpacks {record.payload.unpacked_bytes / 1e6:.0f} MB to 'unpacked' beside "
            "this file; --unpack-to names another folder, and removing it removes everything. "
            "./gpu-check --help tells the rest."
        ),
        "",
        f"GPUs: {gpus}",
        *_wrapped(f"Expected there: {', '.join(record.needs)}"),
        f"Harness {record.harness.version}, built from {built}",
        "",
    ]
    for number, release in enumerate(record.releases):
        role = "the primary release" if number == 0 else "beside it"
        lines.append(f"SGLang {release.version} with {release.kernels} ({role})")
        lines += [f"  - {line}" for caveat in release.caveats for line in _item(caveat)]
        lines.append("")
    if stand_ins := record.releases[0].stand_ins:
        lines += ["Stand-ins: empty packages in place of some that are imported and never called"]
        lines += [f"  - {line}" for s in stand_ins for line in _item(f"{s.name}: {s.reason}")]
        lines.append("")
    lines.append("Wheels, from the package index (a part of each one's files; as they came)")
    lines += [f"  {p.site}: {p.name} {p.version} sha256:{p.sha256}" for p in record.packages]
    lines += ["", "Files of wheels that were left out"]
    for package, patterns in known.files_left_out.items():
        of = "any wheel" if package == "*" else package
        lines += [f"  {of}: {pattern}: {reason}" for pattern, reason in patterns.items()]
    lines += ["", "Requirements that were left out: a server for text does not import them"]
    lines += [f"  {name}: {reason}" for name, reason in known.requirements_left_out.items()]
    return "\n".join([*lines, ""])


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, break_on_hyphens=False)


def _item(line: str) -> list[str]:
    return [line]
