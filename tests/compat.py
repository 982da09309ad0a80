"""The core tests on the oldest, the locked and the newest transformers: `make compat`.

Each version runs in an environment of its own, made once under COMPAT_HOME (by default ~/.cache/prunehal/compat) and
used again; the newest is brought up to date each time. `python tests/compat.py newest --cut` runs one of them, and a
short part of the tests. It prints a table of versions and results, and ends with exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = (
    "pytest>=9",
    "pytest-xdist>=3.8",
    "hypothesis>=6.150",
    "accelerate>=1.10",
    "peft>=0.18",
    "num2words>=0.5.14",
    "torchvision",  # processors of SmolVLM and Idefics 3 up to 5.17
)
CORE = ("tests/decoders", "tests/baselines", "tests/prunehal", "tests/device/checks.py")
MAIN_JOB = "tests/test_run.py::test_main_job_in_small_and_resume"
# the seam, plain = generate, every decoder and search, golden traces of the official codes
CUT = ("tests/decoders/test_hf.py", "tests/decoders/test_plain.py", "tests/device/checks.py", "tests/baselines")
CUT_WORDS = "test_hf or test_plain or checks or opera or vcd"


@dataclass
class Environment:
    """Versions that are tested together.

    Attributes:
        name: `oldest`, `locked` or `newest`.
        requirements: what pip installs, in this order of importance.
        moves: whether a later release is taken whenever there is one.
    """

    name: str
    requirements: tuple[str, ...]
    moves: bool = False

    @property
    def folder(self) -> Path:
        """Named after what is in it, so that other requirements make another environment."""
        home = os.environ.get("COMPAT_HOME") or Path.home() / ".cache" / "prunehal" / "compat"
        told = f"{sys.version_info[:2]} {self.requirements}".encode()
        return Path(home) / f"{self.name}-{hashlib.sha256(told).hexdigest()[:8]}"

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    def make(self) -> None:
        """Make it, or bring it up to date."""
        ready = self.folder / ".ready"
        if ready.exists() and not self.moves:
            return
        if not ready.exists():
            print(f"{self.name}: making {self.folder}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=True)
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        # a constraint that this machine sets for all of pip would hide the newest release
        environ = {**os.environ, **({"PIP_CONSTRAINT": os.devnull} if self.moves else {})}
        done = subprocess.run([*pip, *self.requirements], capture_output=True, text=True, env=environ)
        if done.returncode:
            if not ready.exists():
                sys.exit(f"{self.name}: pip could not install {' '.join(self.requirements)}:\n{done.stderr[-2000:]}")
            print(f"{self.name}: could not be brought up to date, and is used as it is", flush=True)
        ready.touch()

    def versions(self) -> str:
        """Of transformers and torch, as installed."""
        code = (
            "from importlib.metadata import version as v; print('transformers', v('transformers'), 'torch', v('torch'))"
        )
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    def test(self, cut: bool, workers: str) -> tuple[str, str, float]:
        """Versions, pytest's last line, and seconds."""
        self.make()
        versions, begin = self.versions(), time.monotonic()
        print(f"{self.name}: {versions}", flush=True)
        chosen = [*CUT, "-k", CUT_WORDS] if cut else [*CORE, MAIN_JOB, "-m", "not slow or inductor"]
        command = [
            self.python,
            "-m",
            "pytest",
            "-n",
            workers,
            "--maxfail",
            "20",
            "-p",
            "no:cacheprovider",
            *chosen,
        ]
        lines = []
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout:
                lines.append(line.rstrip())
                if re.match(r"[.FEsx]+ +\[ *\d+%\]$", lines[-1]):
                    print(f"{self.name}: {lines[-1][-6:]}", flush=True)
        if process.returncode:
            print("\n".join(lines[-120:]), flush=True)
        summary = [line for line in lines if re.search(r"\b(passed|failed|error)", line)]
        last = re.sub(r"^=+ | =+$", "", summary[-1]) if summary else f"exit status {process.returncode}"
        return versions, ("" if process.returncode == 0 else f"BROKEN on {versions}: ") + last, time.monotonic() - begin


def environments() -> dict[str, Environment]:
    """All of them, by name; what the project needs comes from pyproject.toml, the oldest from decoders/versions.py."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = re.search(r'^OLDEST, NEWEST = "([\d.]+)"', (ROOT / "decoders" / "versions.py").read_text(), re.M)[1]
    torch = next(need for need in needs if need.startswith("torch"))
    pinned = (f"transformers=={oldest}", torch.replace(">=", "==") + ".0", *TOOLS)
    rest = tuple(need for need in needs if not need.startswith(("torch", "transformers")))
    return {
        "oldest": Environment("oldest", (*pinned, *rest)),
        "locked": Environment("locked", ("-r", str(ROOT / "requirements.lock"))),
        "newest": Environment("newest", ("transformers", "torch", *TOOLS, *rest), moves=True),
    }


def main() -> int:
    known = environments()
    parser = argparse.ArgumentParser(prog="python tests/compat.py", description=__doc__.split("\n\n")[1])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--cut", action="store_true", help="a short part of the tests")
    parser.add_argument("-n", "--workers", default="2", help="processes of pytest; default: %(default)s")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"there is no environment {unknown[0]!r}; there are {', '.join(known)}")
    found = [(name, *known[name].test(args.cut, args.workers)) for name in args.names or known]
    for name, versions, result, seconds in found:
        print(f"{name:8} {versions:36} {seconds:6.0f} s  {result}")
    return int(any("BROKEN" in result for _, _, result, _ in found))


if __name__ == "__main__":
    sys.exit(main())
