"""`tinydiff doctor`: what is installed and can run here, and whether our networks still equal the
references'.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

from tinydiff import __version__
from tinydiff.records import UserError

USAGE = """\
usage: tinydiff doctor [--json]
       tinydiff doctor --parity [MODEL] [--json | --markdown]

Show versions, devices, attention kernels that run here and whether graphs can be compiled.

  --parity [MODEL]  compare the networks of MODEL, a model or a family (`tinydiff models`), or of all, with those of the installed
                    diffusers and transformers: tiny random weights, float64, stage by stage; exits with 1 where one differs
  --json            print JSON
  --markdown        print docs/parity.md
"""

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "tokenizers", "triton")


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 where a comparison failed, else 0. Raises UserError."""
    options = _parsed(argv)
    if options is None:
        print(USAGE, end="")
        return 0
    if options.parity is None:
        here = machine()
        print(json.dumps(here, indent=2) if options.json else _text(here))
        return 0
    return _parity(options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError("doctor", f"doctor: {message}; `tinydiff doctor --help` shows what it takes")


def _parsed(argv: Sequence[str]) -> argparse.Namespace | None:
    """The options, None where help is asked for. parity: "" where no model is named."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parity", nargs="?", const="")
    for flag in ("-h", "--help"):
        parser.add_argument(flag, dest="help", action="store_true")
    for flag in ("--json", "--markdown"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args(list(argv))
    if options.json and options.markdown:
        raise UserError("doctor", "doctor: --json and --markdown cannot both be given")
    if options.markdown and options.parity is None:
        raise UserError("doctor", "doctor: --markdown needs --parity, whose page it prints")
    return None if options.help else options


def _parity(options: argparse.Namespace) -> int:
    from tinydiff.parity import models

    groups = models.chosen(options.parity or None)
    outcome = []
    if not (options.json or options.markdown):
        print(f"{_versions()}; float64 on the CPU, tiny random weights; equal is at most {models.BOUND:.0e}")
    for group, results in models.compare(groups):
        outcome.append((group, results))
        if not (options.json or options.markdown):
            print(models.as_text(group, results, every=bool(options.parity)), flush=True)
    if options.json:
        report = {
            "machine": machine(),
            "bound": models.BOUND,
            "groups": [models.as_json(*each) for each in outcome],
        }
        print(json.dumps(report, indent=2))
    if options.markdown:
        print(models.as_page(outcome, _versions()), end="")
    return 0 if all(result.equal for _, results in outcome for result in results) else 1


def machine() -> dict[str, Any]:
    """What is installed, what there is to run on, and what runs there, as plain values."""
    import torch

    from tinydiff.parity.reference import versions
    from tinydiff.sampling.compile import has_compiler

    devices = [{"name": "cpu", "threads": torch.get_num_threads()}]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        devices.append(
            {"name": f"cuda:{i}", "model": about.name, "memory_gib": round(about.total_memory / 2**30, 1)}
        )
    return {
        "tinydiff": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions(PACKAGES),
        "cuda": torch.version.cuda,
        "devices": devices,
        "attention": {str(device["name"]): _kernels(str(device["name"])) for device in devices},
        "compiler": has_compiler(),
    }


def _kernels(device: str) -> dict[str, list[str]]:
    """Type -> the attention backends that serve heads of 128 without a mask."""
    import torch

    from tinydiff.ops.attention import BACKENDS, serves
    from tinydiff.runtime.blueprint import DTYPES

    place = torch.device(device)
    return {
        name: [kernel for kernel in BACKENDS if serves(kernel, 128, False, dtype, place)]
        for name, dtype in DTYPES.items()
    }


def _versions() -> str:
    from tinydiff.parity.reference import LIBRARIES, versions

    found = (
        {"tinydiff": __version__} | versions(("torch", *LIBRARIES)) | {"Python": platform.python_version()}
    )
    return ", ".join(f"{name} {number or '(not installed)'}" for name, number in found.items())


def _text(here: dict[str, Any]) -> str:
    lines = [f"tinydiff {here['tinydiff']}, Python {here['python']}, {here['system']}"]
    lines.append(
        ", ".join(f"{name} {number or '(not installed)'}" for name, number in here["packages"].items())
    )
    lines.append(f"CUDA {here['cuda'] or '(torch was built without it)'}")
    for device in here["devices"]:
        about = ", ".join(
            f"{value} {key.replace('_gib', ' GiB')}" for key, value in device.items() if key != "name"
        )
        lines.append(f"{device['name']}: {about}")
        for dtype, kernels in here["attention"][device["name"]].items():
            lines.append(f"  attention in {dtype}: {', '.join(kernels)}")
    found = (
        "found: --enable-torch-compile works"
        if here["compiler"]
        else "none found, which --enable-torch-compile needs (install g++)"
    )
    return "\n".join([*lines, f"C++ compiler: {found}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
