"""One page with everything: out/<run>/report.html, report/page.html filled in.

Jinja escapes whatever it is given: text of models is hostile. The page loads nothing: pictures are
in it, and no script is.
"""
import base64
import platform
import time
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import torch

import common
from loop import gain_rows
from report import samples, tables

FOLDER = Path(__file__).parent


def write_page(config: SimpleNamespace, pictures: dict[str, Path]) -> Path:
    """Writes report.html; pictures: as draw_pictures() draws them."""
    path = config.out / "report.html"
    render("page.html", path, **collect_contents(config, pictures))
    return path


def render(template: str, path: Path, **contents) -> None:
    """Writes a page: a template of this folder, filled in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    contents["made"] = time.strftime("%Y-%m-%d %H:%M")
    common.write_atomic(path, environment.get_template(template).render(contents))


def collect_contents(config: SimpleNamespace, pictures: dict[str, Path]) -> dict[str, object]:
    """All that the template shows, by its names there."""
    out = config.out
    scores = tables.read_scores(out)
    return dict(
        run=config.run,
        pictures={name: as_address(path.read_bytes()) for name, path in pictures.items()},
        accuracy=tables.accuracy_rows(scores, gains=True),
        k=read_k(scores),
        pipeline=tables.describe_pipeline(out),
        stages=tables.stage_rows(out / "pretrain"),
        refinement=tables.describe_refinement(out / "refine"),
        gains=dict(
            sft=gain_rows(out / "sft"),
            distill=gain_rows(out / "distill"),
            rl=gain_rows(out / "rl")),
        teacher=tables.teacher_rows(out / "distill"),
        held_out=tables.verdict_rows(out / "reward"),
        rl=tables.rl_rows(out / "rl"),
        samples=samples.collect_samples(out, config.evaluate),
        ablations=tables.read_experiments(),
        config_path=config.path,
        config=Path(config.path).read_text(),
        origins=tables.origin_rows(out),
        settings=tables.describe_settings(out),
        versions=version_rows())


def as_address(png: bytes) -> str:
    """The address of an <img> that holds the picture itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def read_k(scores: dict[str, dict]) -> int:
    """Samples of each problem, as the first evaluation had them; 0 before it."""
    for by_task in scores.values():
        for score in by_task.values():
            return score["k"]
    return 0


def version_rows() -> list[list[str]]:
    return [["", "version"],
            ["Python", platform.python_version()],
            ["PyTorch", torch.__version__],
            ["NumPy", np.__version__],
            ["commit", common.current_commit()],
            ["system", platform.platform()],
            ["machine", common.describe_machine(torch.device("cpu"))]]
