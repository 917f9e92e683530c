"""What is read from a run's folder, and the report that is made of it."""

import base64
import csv
import json
import random
import re

import pytest
import yaml

from dcpo_megatron.cli import compare
from dcpo_megatron.comparison.plots import band_over_seeds
from dcpo_megatron.comparison.runs import interpolate, make_run, reached
from dcpo_megatron.comparison.study_page import Heading, Paragraph, Picture, Table, as_html
from tests.comparison import synthetic


def test_values_between_points_and_where_a_level_is_first_reached():
    points = [(0.0, 0.2), (10.0, 0.4), (20.0, 0.3), (30.0, 0.6)]
    assert interpolate(points, 5.0) == pytest.approx(0.3)
    assert interpolate(points, 30.0) == 0.6
    assert interpolate(points, 31.0) is None and interpolate([], 0.0) is None
    assert reached(points, 0.35) == pytest.approx(7.5)
    assert reached(points, 0.5) == pytest.approx(20 + 10 * 2 / 3)
    assert reached(points, 0.1) == 0.0 and reached(points, 0.7) is None


@pytest.mark.parametrize(("rounds", "steps"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_first_visits_end_when_as_many_responses_were_generated_as_all_prompts_have(rounds, steps):
    rows = synthetic.rows(0.5, 0.5, 0.01, rounds, random.Random(0), 0.0)
    assert make_run("grpo", 0, rows, synthetic.PROMPTS, synthetic.GROUP).first_visits == steps


def test_a_run_shorter_than_one_round_of_its_prompts_has_no_rur_after_it():
    rows = synthetic.rows(0.5, 0.5, 0.01, 1, random.Random(0), 0.0)
    run = make_run("grpo", 0, rows, 10_000, synthetic.GROUP)
    assert run.mean("response_utilization_ratio", run.first_visits) is None


def test_bands_are_over_seeds_on_the_stretch_that_all_runs_have():
    runs = synthetic.make({"grpo": (0.6, 0.44, 0.01, 1)}, seeds=3)
    points = band_over_seeds(runs, against="seconds")
    assert points[-1][0] == pytest.approx(min(run.seconds[-1] for run in runs))
    assert all(value.n == 3 for _, value in points)


@pytest.fixture
def folder(tmp_path):
    """A comparison whose runs are synthetic, as the files that real ones leave; one run is not finished."""
    plan = {
        "output": str(tmp_path / "out"),
        "seeds": [0, 1, 2],
        "methods": {"grpo": None, "dcpo-paper": None, "dapo": {"objective.overlong_buffer": 4}},
        "task": {"train": synthetic.PROMPTS},
        "train": {
            "rollout": {"prompts_per_step": 8, "group_size": synthetic.GROUP, "max_response_tokens": 24},
            "training": {"steps": synthetic.STEPS, "minibatch_prompts": 2},
        },
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    for method in plan["methods"]:
        for seed in plan["seeds"]:
            run = tmp_path / "out" / "runs" / method / f"seed-{seed}"
            run.mkdir(parents=True)
            rows = synthetic.rows(*synthetic.PAPER[method], random.Random(f"{method}/{seed}"), 0.01)
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            if (method, seed) != ("dapo", 2):
                summary = {"steps": synthetic.STEPS, "prompts": synthetic.PROMPTS}
                (run / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_the_report_is_rebuilt_from_finished_runs_alone(folder, capsys):
    assert compare.main([str(folder / "plan.yaml"), "--report-only"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^reproduced +DCPO's RUR is at least 20 points", printed, re.M)
    report = folder / "out" / "report"
    text = (report / "report.md").read_text()
    assert "8 of 9 runs: 3 methods, seeds 0, 1, 2" in text
    assert "no run of gspo" in text and "| not measured |" in text
    assert re.search(r"TCR, dapo over dcpo-paper: 1\d\.\d\d \(.*\) times, n = 2; limit 3 times", text)
    # "accuracy after" has two seeds of dapo, and intervals.
    (row,) = re.findall(r"^\| accuracy after \|.*$", text, re.M)
    assert row.count(" to ") == 3

    page = (report / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3 and all(base64.b64decode(data)[:4] == b"\x89PNG" for data in pictures)
    assert 'class="not-measured"' in page and "http" not in page.replace("http-equiv", "")

    with (report / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows].count(("dapo", "1")) == 1 and len(rows) == 8
    assert float(rows[0]["rur"]) == pytest.approx(0.44, abs=0.02)
    with (report / "steps.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8 * synthetic.STEPS
    with (report / "evaluations.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8 * 5


def test_text_of_a_page_stays_text_lines_stay_lines_and_a_verdict_has_its_class(tmp_path):
    (tmp_path / "p.png").write_bytes(b"\x89PNG")
    table = Table(["a & b", "verdict"], [["1 < 2\n3", "not measured"]], mark=1)
    page = as_html([Heading("<h>", 3), Paragraph("<p>"), table, Picture(tmp_path / "p.png", '"a"')], "<title>")
    for part in (
        "<title>&lt;title&gt;</title>", "<h3>&lt;h&gt;</h3>", "<p>&lt;p&gt;</p>", "<th>a &amp; b</th>",
        '<td>1 &lt; 2<br>3</td><td class="not-measured">not measured</td>',
        '<img alt="&#34;a&#34;" src="data:image/png;base64,iVBORw==">',
    ):  # fmt: skip
        assert part in page


def test_a_report_of_nothing_is_refused(folder, capsys):
    assert compare.main([str(folder / "plan.yaml"), "--output", str(folder / "empty"), "--report-only"]) == 2
    assert "holds no finished run" in capsys.readouterr().err
