# SPDX-License-Identifier: Apache-2.0
"""Get the published weights of a generalist, once; later it finds them by its name.

They go to SEMISAM_HOME (default: semisam in the user's cache folder). A download that was cut is continued by
the same command. Where no hash is known, the file's own is printed: compare it with that of a copy you trust.

examples:
  semisam fetch sam-med3d-turbo
  semisam fetch segany-pet --file NAME                    a file of the model's repository
  semisam fetch sam-med3d --url https://host/file.pth --sha256 HEX
"""

from __future__ import annotations

import argparse
import re

from semisam import fetch, generalists
from semisam.cli import CommandError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("name", metavar="NAME", help="a name of `semisam generalists`")
    add("--file", metavar="NAME", help="another file of the model's repository")
    add("--url", metavar="ADDRESS", help="another address, of a single file")
    add("--sha256", metavar="HEX", help="what the file's hash must be; else it is removed")
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Fetch; return 0."""
    if options.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", options.sha256):
        options.refuse(f"--sha256: expected 64 hexadecimal digits, got {options.sha256}")
    if options.file and options.url:
        options.refuse("--file, --url: expected one of them, got both")
    if options.name not in generalists.GENERALISTS:
        known = ", ".join(generalists.GENERALISTS)
        raise CommandError(f"NAME: expected one of {known}, got {options.name}")
    spec = generalists.class_of(options.name).spec
    if spec.weights is None:
        print(f"{spec.name} needs no weights")
        return 0
    print(f"licence: {spec.licence}")
    several = len(spec.weights.files) > 1 and not (options.file or options.url)
    if options.sha256 and several:
        options.refuse(f"--sha256: expected with --file or --url, as {spec.name} has several files")
    chosen = {"file": options.file, "url": options.url, "checksum": options.sha256}
    try:
        place = fetch.fetch(options.name, spec.weights, **chosen, say=lambda text: print(text, flush=True))
    except fetch.FetchError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"{error.filename or fetch.home()}: cannot be written: {error.strerror}"
        ) from error
    if fetch.find(options.name, spec.weights) == place:
        print(f"ready: --generalist {options.name}")
    else:
        print(f"ready: --generalist {options.name} --checkpoint {place}")
    return 0
