# SPDX-License-Identifier: Apache-2.0
"""Fixtures: real data where it is present, random numbers with a stated seed."""

import os
from pathlib import Path

import numpy as np
import pytest

os.environ["SEMISAM_HOME"] = str(Path(__file__).parent / "no weights here")  # not the user's

DATA = Path(os.environ.get("SEMISAM_DATA", Path(__file__).parents[2] / "shared" / "data"))


def data_dir(name: str) -> Path:
    """The folder of a real data set; skips the test with a reason where it is absent."""
    path = DATA / name
    if not path.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"the data set {name} must be present in CI: set SEMISAM_DATA")
        pytest.skip(f"data set {name} not found; set SEMISAM_DATA to the folder that has it")
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1337)


@pytest.fixture(scope="module")
def one_thread():
    """Small operators of torch: threads that wait for each other would take most of the time."""
    import torch  # noqa: PLC0415

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def la_case():
    """(image, label) of one left atrium volume, float32 and uint8."""
    h5py = pytest.importorskip("h5py")
    path = sorted((data_dir("la") / "2018LA_Seg_Training Set").glob("*/mri_norm2.h5"))[0]
    with h5py.File(path) as f:
        return f["image"][()], f["label"][()]


@pytest.fixture(scope="session")
def hippocampus_cases():
    """A dozen (image, label, spacing) of the hippocampus set; labels 0, 1, 2."""
    nib = pytest.importorskip("nibabel")
    root = data_dir("hippocampus")
    cases = []
    for path in sorted((root / "labelsTr").glob("*.nii.gz"))[:12]:
        label = nib.load(path)
        image = nib.load(root / "imagesTr" / path.name)
        cases.append(
            (
                np.asarray(image.dataobj, np.float32),
                np.asarray(label.dataobj).astype(np.uint8),
                tuple(map(float, label.header.get_zooms()[:3])),
            )
        )
    return cases


@pytest.fixture(scope="session")
def acdc_volumes():
    """All (image, label) validation volumes of ACDC; labels 0..3, spacing unknown."""
    h5py = pytest.importorskip("h5py")
    cases = []
    for path in sorted((data_dir("acdc") / "data").glob("*.h5")):
        with h5py.File(path) as f:
            cases.append((f["image"][()], f["label"][()]))
    return cases
