"""The whole pipeline, shortened to a tenth, by its own command."""
import os
import shutil
import subprocess

import pytest

from conftest import ROOT


@pytest.mark.long
def test_every_phase_ends_and_the_page_is_made(tmp_path):
    """In a copy without earlier results; ten minutes on a core. Its log has no carriage returns."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", ".venv"))
    with open(tmp_path / "log", "wb") as log:
        code = subprocess.run(["bash", "speedrun.sh", "0.1"], cwd=copy, stdout=log, stderr=log,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    output = (tmp_path / "log").read_bytes()
    assert code == 0, output[-2000:].decode()
    assert b"\r" not in output and (copy / "out/tiny-0.1/report.html").is_file()
