# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, show pictures, are short, and are kept without output."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def by_name(path: Path) -> str:
    return path.stem


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01_quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_kept_without_output(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}, "make notebooks strips it"
    for cell in notebook.cells:
        assert not cell.get("outputs"), "make notebooks strips them"
        assert cell.get("execution_count") is None
        assert not cell.metadata
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) <= 12
    assert sum(len(cell.source.split()) for cell in notebook.cells) < 1500, "five minutes"
    assert "SPDX-License-Identifier: Apache-2.0" in notebook.cells[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_runs(path, tmp_path, monkeypatch):
    """Every cell runs without a warning; every picture shows something."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, 4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 5
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert np.asarray(image.convert("L")).std() > 20
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    dice = [float(line.split("Dice")[1].split()[0]) for line in text.splitlines() if "Dice" in line]
    specialist, component, generalist = dice
    assert generalist > component > specialist, "what the text says about this scan"
