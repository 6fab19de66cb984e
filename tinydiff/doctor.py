"""`tinydiff doctor`: what this machine can run, and whether the networks equal those of diffusers."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from tinydiff.records import UserError
from tinydiff.version import __version__

USAGE = """\
usage: tinydiff doctor [--json]
       tinydiff doctor --parity [MODEL] [--json | --markdown]

Show versions, devices, the attention kernels that run here and whether a
compiler for torch.compile is installed.

  --parity [MODEL]  compare the networks of MODEL, a model or a family
                    (`tinydiff models`), or all networks, with the installed
                    diffusers and transformers: tiny random weights, float64,
                    stage by stage; exits with 1 if one differs
  --json            print JSON
  --markdown        with --parity: print docs/parity.md
"""

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "tokenizers", "triton")


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns 1 if a comparison failed, else 0. Raises UserError."""
    options = _parsed(argv)
    if options is None:
        print(USAGE, end="")
        return 0
    if options.parity is None:
        report = machine()
        print(json.dumps(report, indent=2) if options.json else _text(report))
        return 0
    return _parity(options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("doctor", f"doctor: {message}; see `tinydiff doctor --help`")


def _parsed(argv: Sequence[str]) -> argparse.Namespace | None:
    """The options, None for --help. parity: "" if no model is named, None without --parity."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parity", nargs="?", const="")
    for flag in ("-h", "--help"):
        parser.add_argument(flag, dest="help", action="store_true")
    for flag in ("--json", "--markdown"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args(list(argv))
    if options.json and options.markdown:
        raise UserError("doctor", "doctor: give either --json or --markdown, not both")
    if options.markdown and options.parity is None:
        raise UserError("doctor", "doctor: --markdown needs --parity")
    return None if options.help else options


def _parity(options: argparse.Namespace) -> int:
    from tinydiff.parity import models

    groups = models.chosen(options.parity or None)
    outcome, as_text = [], not (options.json or options.markdown)
    if as_text:
        print(
            f"{_versions()}; float64 on the CPU, tiny random weights; equal means at most {models.BOUND:.0e}"
        )
    for group, results in models.compare(groups):
        outcome.append((group, results))
        if as_text:
            print(models.as_text(group, results, every=bool(options.parity)), flush=True)
    if options.json:
        rows = [models.as_json(*each) for each in outcome]
        print(json.dumps({"machine": machine(), "bound": models.BOUND, "groups": rows}, indent=2))
    if options.markdown:
        print(models.as_page(outcome, _versions()), end="")
    return 0 if all(result.equal for _, results in outcome for result in results) else 1


def machine() -> dict[str, Any]:
    """Versions, devices and what runs on them, as JSON values."""
    import torch

    from tinydiff.parity.reference import versions
    from tinydiff.sampling.compile import has_compiler

    devices: list[dict[str, str | int | float]] = [{"name": "cpu", "threads": torch.get_num_threads()}]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        memory = round(about.total_memory / 2**30, 1)
        devices.append({"name": f"cuda:{i}", "model": about.name, "memory_gib": memory})
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
    """Data type -> the attention kernels that run there, for heads of width 128 without a mask."""
    import torch

    from tinydiff.ops.attention import BACKENDS, serves
    from tinydiff.runtime.blueprint import DTYPES

    on = torch.device(device)
    return {
        name: [kernel for kernel in BACKENDS if serves(kernel, 128, False, dtype, on)]
        for name, dtype in DTYPES.items()
    }


def _versions() -> str:
    from tinydiff.parity.reference import LIBRARIES, versions

    installed = versions(("torch", *LIBRARIES))
    return _listed({"tinydiff": __version__} | installed | {"Python": platform.python_version()})


def _listed(installed: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {number or '(not installed)'}" for name, number in installed.items())


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"tinydiff {report['tinydiff']}, Python {report['python']}, {report['system']}",
        _listed(report["packages"]),
        f"CUDA {report['cuda'] or '(torch was built without it)'}",
    ]
    for device in report["devices"]:
        facts = {key.replace("_gib", " GiB"): value for key, value in device.items() if key != "name"}
        lines.append(f"{device['name']}: {', '.join(f'{value} {key}' for key, value in facts.items())}")
        for dtype, kernels in report["attention"][device["name"]].items():
            lines.append(f"  attention in {dtype}: {', '.join(kernels)}")
    works, missing = (
        "--enable-torch-compile works",
        "not found; --enable-torch-compile needs one (install g++)",
    )
    return "\n".join([*lines, f"C++ compiler: {works if report['compiler'] else missing}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
