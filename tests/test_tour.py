"""docs/tour.md shows the numbers that docs/tour.py makes."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"-?\d+\.\d+")


def made_anew(folder: Path) -> str:
    spec = importlib.util.spec_from_file_location("tour", ROOT / "docs" / "tour.py")
    tour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tour)
    return tour.main(folder)


def test_the_tour_shows_what_its_script_makes(tmp_path):
    shown = (ROOT / "docs" / "tour.md").read_text()
    made = made_anew(tmp_path)
    assert NUMBER.sub("#", made) == NUMBER.sub("#", shown), "run python docs/tour.py"
    expected = [float(number) for number in NUMBER.findall(shown)]
    found = [float(number) for number in NUMBER.findall(made)]
    # Processors differ by 1e-4: after the 60 steps, which are in float64, RL is in float32
    assert found == pytest.approx(expected, abs=1e-3), "run python docs/tour.py"


def test_the_tour_names_functions_that_exist():
    text = (ROOT / "docs" / "tour.md").read_text()
    named = set(re.findall(r"`((?:\w+\.)+\w+)`", text)) - {"method.carries_signal"}
    assert len(named) >= 12
    for name in named:
        if name.split(".")[-1] in ("py", "md"):
            continue
        module, _, function = name.partition(".")
        while (ROOT / module.replace(".", "/")).is_dir():
            part, _, function = function.partition(".")
            module = f"{module}.{part}"
        found = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
        assert callable(found), name
