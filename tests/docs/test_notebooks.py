"""The notebooks run from the first cell to the last."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SHORTER = {"max_steps = 300": "max_steps = 60", "num_documents=1000": "num_documents=300"}


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(ROOT.glob("docs/notebooks/*.ipynb")), ids=lambda file: file.name)
def test_a_notebook_runs(file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(file, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    for written, shorter in SHORTER.items():
        [cell] = (cell for cell in notebook.cells if written in cell.source)
        cell.source = cell.source.replace(written, shorter)
    client = nbclient.NotebookClient(notebook, timeout=540, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=dict(os.environ))
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    figures = [output for output in shown if "image/png" in output.get("data", {})]
    printed = "".join(output["text"] for output in shown if output.get("name") == "stdout")
    assert len(figures) == 3  # the schedules, the loss, retrieval
    assert printed.count("[MASK]") >= 3
    assert "accuracy " in printed
