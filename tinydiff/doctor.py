"""`tinydiff doctor`: what this machine can run, and whether the networks equal those of diffusers."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from tinydiff.entries import EntryDict
from tinydiff.records import UserError
from tinydiff.values import positional
from tinydiff.version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "tokenizers", "triton")


@dataclass(frozen=True)
class DoctorOptions:
    """What is examined, and how it is printed."""

    model: str | None = positional(None)
    """With --parity: a model or a family (`tinydiff models`). Default: all networks."""
    parity: bool = False
    """Compare the networks with those of the installed diffusers and transformers: tiny random weights,
    float64, stage by stage. The exit code is 1 if one differs."""
    json: bool = False
    """Print JSON."""
    markdown: bool = False
    """With --parity: print docs/parity.md."""


def run(options: DoctorOptions) -> int:
    """Run the command. Returns 1 if a comparison failed, else 0. Raises UserError."""
    if options.json and options.markdown:
        raise UserError("doctor", "doctor: give either --json or --markdown, not both")
    for name, given in (("--markdown", options.markdown), ("MODEL", options.model is not None)):
        if given and not options.parity:
            raise UserError("doctor", f"doctor: {name} needs --parity")
    if options.parity:
        return _parity(options)
    report = machine()
    print(json.dumps(report, indent=2) if options.json else _text(report))
    return 0


def _parity(options: DoctorOptions) -> int:
    from tinydiff.parity import models

    groups = models.chosen(options.model)
    outcome, as_text = [], not (options.json or options.markdown)
    if as_text:
        print(
            f"{_versions()}; float64 on the CPU, tiny random weights; equal means at most {models.BOUND:.0e}"
        )
    for group, results in models.compare(groups):
        outcome.append((group, results))
        if as_text:
            print(models.as_text(group, results, every=options.model is not None), flush=True)
    if options.json:
        rows = [models.as_json(*each) for each in outcome]
        print(json.dumps({"machine": machine(), "bound": models.BOUND, "groups": rows}, indent=2))
    if options.markdown:
        print(models.as_page(outcome, _versions()), end="")
    return 0 if all(result.equal for _, results in outcome for result in results) else 1


def machine() -> EntryDict:
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


def _text(report: EntryDict) -> str:
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
