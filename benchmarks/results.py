"""Where results are kept: benchmarks/results/<machine>.json, one entry per operator with its provenance."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def provenance(device: str) -> dict:
    """What a figure depends on. A copy of a tree takes its commit from BITKERNELS_COMMIT: its .git may be another's."""
    named = os.environ.get("BITKERNELS_COMMIT")
    commit = named or _output("git", "rev-parse", "HEAD") or "unknown"
    elsewhere = ":!benchmarks/results", ":!README.md", ":!docs"
    changed = not named and _output("git", "status", "--porcelain", "--", *elsewhere)
    return {
        "commit": commit,
        "dirty": bool(changed),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        if device == "cuda"
        else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in ("gemlite", "mamba-ssm")},
    }


def save(device: str, rows: dict[str, list[dict]]) -> Path:
    """Replaces the entries of the operators in ``rows``; a reader sees the old file or the new one."""
    name = machine_name(device)
    path = FOLDER / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    content = json.loads(path.read_text()) if path.is_file() else {"machine": name, "device": device, "ops": {}}
    for op, found in rows.items():
        content["ops"][op] = {**provenance(device), "rows": found}
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    return path
