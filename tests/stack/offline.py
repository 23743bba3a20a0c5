"""Images for a machine that reaches Debian's packages but no registry: made by debootstrap, for tests on that machine only."""

import os
import shutil
import subprocess
from pathlib import Path

from engines import Engine

STAND_INS = Path(__file__).parent / "images"
SUITE = "bookworm"
PACKAGES = "ca-certificates,python3,python3-dev,python3-pip,python3-venv"
BASE_IMAGE = f"localhost/ratchet-offline/base:{SUITE}"


class CannotMake(Exception):
    """The tools or rights to make an image are missing."""


def make_images(engine: Engine, scratch: Path) -> dict[str, str]:
    """Make what is missing; returns the compose file's variables that name the images."""
    if not engine.has(BASE_IMAGE):
        root = scratch / "root"
        debootstrap(root)
        engine.import_folder(root, BASE_IMAGE)
        shutil.rmtree(root)
    images = {"BASE_IMAGE": BASE_IMAGE}
    for name in ("postgres", "redis"):
        image = f"localhost/ratchet-offline/{name}"
        engine.build(STAND_INS / name, image, arguments={"BASE_IMAGE": BASE_IMAGE})
        images[f"{name.upper()}_IMAGE"] = image
    return images


def debootstrap(root: Path) -> None:
    """A minimal Debian with Python, as the official image has it: `python` is there, and it is 3.11."""
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise CannotMake("no registry can be reached, and making a base image needs root and the package debootstrap")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), mirror()]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    (root / "usr/bin/python").symlink_to("python3")


def mirror() -> str:
    """The archive that this machine's own apt uses for the suite."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if not listed:
        raise CannotMake(f"no registry can be reached, and apt here has no source for Debian {SUITE}")
    return listed[0]
