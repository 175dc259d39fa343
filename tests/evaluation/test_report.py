"""The page: it shows what the scores hold, needs no other file, and no name in it is taken for HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stable_diffusion.errors import InputError
from stable_diffusion.evaluation.benchmark import Benchmark, Seen, Share, TaskScores
from stable_diffusion.evaluation.detector import Found
from stable_diffusion.evaluation.distances import KernelDistance
from stable_diffusion.evaluation.report import (
    Codec,
    Example,
    GroupScores,
    Neighbour,
    Report,
    Shown,
    page,
    write_report,
)
from stable_diffusion.evaluation.scores import Scores
from stable_diffusion.evaluation.tasks import Boxed

PICTURE = np.full((8, 8, 3), 200, dtype=np.uint8)
REPORT = Report(
    model="<b>a & b</b>",
    weights="0123",
    size=8,
    sampler={"name": "euler"},
    num_inference_steps=4,
    guidance={"scale": 2.5},
    data="set",
    count=2,
    seed=0,
    objects=1935,
    left_out=("styles: none",),
    groups=(
        GroupScores(
            "val",
            2,
            {
                "generated": Scores(kernel_distance=KernelDistance(0.0123, -0.001, 0.02, 2), object_top5=0.5),
                "real": Scores(object_top5=0.9),
            },
        ),
    ),
    benchmark=None,
    codec=Codec(3, (4, 2, 2), 28.51, 22.9),
)
SHOWN = Shown(
    {"val": [Example("a <i>fox", PICTURE, PICTURE, 4)]},
    [Neighbour("an owl", PICTURE, PICTURE, 0.29)],
    [[PICTURE] * 3],
)


def test_the_page_holds_scores_pictures_and_reasons() -> None:
    html = page(REPORT, SHOWN)
    for words in (
        "12.3 <small>-1.0 to 20.0</small>",
        "0.50 <small>0.90</small>",
        "28.5 dB; a linear code of the same size (PCA) gives 22.9 dB",
        "styles: none",
        "a &lt;i&gt;fox · place 5",
        "0.29 · an owl",
        "nearest of all 1,935",
        "&lt;b&gt;a &amp; b&lt;/b&gt;",
    ):
        assert words in html
    assert "<b>a" not in html
    assert "Style<" not in html  # a column without a score
    assert html.count("data:image/webp;base64,") == 2 + 2 + 3


def test_the_page_holds_tasks_and_what_the_detector_saw() -> None:
    right, of_real = Share(value=0.25, low=0.2, high=0.3), Share(value=0.5, low=0.4, high=0.6)
    kinds = {"generated": {"right": right}, "real": {"right": of_real}}
    task = TaskScores(task="two", prompts=7, scores=kinds)
    overall = {"generated": right, "real": of_real}
    seen = Seen(found=Found(box=(1, 1, 5, 5), probability=0.9, names=("<i>fox", "wolf")), colour="red")
    html = page(
        replace(REPORT, benchmark=Benchmark(detector="0", seeds=4, tasks=(task,), overall=overall)),
        replace(SHOWN, tasks={"two": [Boxed("a fox & an owl", False, (PICTURE, [seen]), (PICTURE, []))]}),
    )
    for words in (
        "<tr><th>overall<td>0.25 <small>0.20 to 0.30</small><td>0.50 <small>0.40 to 0.60</small><td>0.50",
        "7 prompts",
        "✗ a fox &amp; an owl · red &lt;i&gt;fox",
    ):
        assert words in html
    assert html.count("data:image/webp;base64,") == 2 + 2 + 3 + 2
    assert "two" not in page(REPORT, SHOWN).split("How it was measured")[0]


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        scores, html = write_report(REPORT, SHOWN, tmp_path / "new")
    assert json.loads(scores.read_text(encoding="utf-8"))["codec"]["psnr"] == 28.51
    assert html.read_text(encoding="utf-8") == page(REPORT, SHOWN)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["index.html", "scores.json"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*scores\.json: Not a directory"):
        write_report(REPORT, SHOWN, tmp_path / "file")
