# SPDX-License-Identifier: Apache-2.0
"""Strip the notebooks beside this file of outputs, counts and metadata: `make notebooks`."""

from pathlib import Path

import nbformat

for path in sorted(Path(__file__).parent.glob("*.ipynb")):
    notebook = nbformat.read(path, 4)
    kept = ("kernelspec", "language_info")
    notebook.metadata = {name: notebook.metadata[name] for name in kept if name in notebook.metadata}
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)
