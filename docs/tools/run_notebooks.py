"""Run the notebooks from top to bottom and store their outputs: `make notebooks`.

A notebook that ends in an error is not changed.
"""

import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def main() -> None:
    """Run all notebooks, in the order of their names."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook, started = nbformat.read(path, as_version=4), time.perf_counter()
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which differ in every run
            if cell.cell_type == "code":  # progress bars and warnings
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
