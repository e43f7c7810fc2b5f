"""Runs the notebooks and stores their outputs, images as JPEG. Needs `pip install nbclient ipykernel`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def main() -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if path.stem == "train":
            continue  # its output depends on the machine
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
        for cell in notebook.cells:
            cell.metadata = {}
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "image/jpeg" in data:
                    data.pop("image/png", None)
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.name == "stdout"]
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        nbformat.write(notebook, path)
        print(path, f"{path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
