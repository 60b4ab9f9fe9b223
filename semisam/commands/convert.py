# SPDX-License-Identifier: Apache-2.0
"""Copy a folder of cases into another layout.

nnunet (imagesTr, labelsTr, ...), h5 (train.list and h5 files, as UA-MT and SSL4MIS read them) or images
(images/ and masks/, 2-D). What the layout cannot hold is refused, nothing is overwritten, and the new folder
appears when it is complete.

examples:
  semisam convert data/hippocampus data/hippocampus_h5 --to h5
  semisam convert data/la data/la_nifti --to nnunet --spacing 0.625 0.625 0.625
  semisam convert data/kvasir data/kvasir_nnunet --to nnunet
"""

from __future__ import annotations

import argparse

from semisam.cli import CommandError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("source", metavar="FROM", help="folder with the data")
    parser.add_argument("target", metavar="NEW", help="folder to make")
    parser.add_argument("--to", required=True, choices=("nnunet", "h5", "images"))
    parser.add_argument("--layout", default="auto", choices=("auto", "nnunet", "h5", "images"))
    parser.add_argument(
        "--spacing", nargs="+", type=float, metavar="MM", help="mm per axis, where h5 files do not say it"
    )


def run(options: argparse.Namespace) -> int:
    """Convert, and print what could not be kept."""
    from semisam.engine.convert import convert  # noqa: PLC0415
    from semisam.engine.scans import CaseError  # noqa: PLC0415

    try:
        notes = convert(
            options.source, options.target, options.to, layout=options.layout, spacing=options.spacing
        )
    except (CaseError, OSError) as error:
        raise CommandError(str(error)) from error
    for note in notes:
        print(f"note: {note}")
    print(f"{options.target}: written in layout {options.to}")
    return 0
