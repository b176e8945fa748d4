"""Build `.typing/quantempo`, a tree of links that shows type checkers the installed shape of the package."""

from pathlib import Path

FOLDERS = ("export", "calib", "engines", "runtime")


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    tree = root / ".typing" / "quantempo"
    tree.mkdir(parents=True, exist_ok=True)
    for old in tree.iterdir():
        old.unlink()
    for target in [*(root / "quantempo").iterdir(), *(root / name for name in FOLDERS)]:
        if target.name != "__pycache__":
            (tree / target.name).symlink_to(target)


if __name__ == "__main__":
    main()
