"""The picture of a run, from whatever part of metrics.jsonl a run left behind."""

import json

import pytest

from dcpo_megatron.monitor.curves import PANELS, draw_report, read_metrics

ROWS = [
    {"step": 0, "eval_accuracy": 0.1, "eval_greedy": 0.2, "eval_response_length": 3.0},
    *(
        {"step": step, "reward": 0.1 * step, "accuracy": 0.1 * step, "entropy": 2.0, "response_length": 5.0,
         "response_utilization_ratio": 0.5, "token_clipping_ratio": 0.01, "clipped_upper": None}
        for step in (1, 2, 3)
    ),
]  # fmt: skip


def write(folder, rows, tail=""):
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return file


def png_size(file):
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_last_line_cut_short_is_left_out(tmp_path):
    assert read_metrics(write(tmp_path, ROWS, '{"step": 4, "rew')) == ROWS


def test_the_report_is_a_picture_also_after_a_cut_last_line(tmp_path):
    draw_report(write(tmp_path, ROWS, '{"step": 4, "rew'), tmp_path / "report.png", "a run")
    width, height = png_size(tmp_path / "report.png")
    assert width > 1000 and height > 500


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_a_run_without_steps_still_gives_a_picture(tmp_path):
    draw_report(write(tmp_path, []), tmp_path / "report.png", "nothing yet")
    png_size(tmp_path / "report.png")


def test_every_panel_draws_its_points_against_their_steps(tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    draw_report(write(tmp_path, ROWS), tmp_path / "report.png", "a run")
    monkeypatch.undo()
    (figure,) = figures
    assert figure.get_suptitle() == "a run"
    drawn = {
        axis.get_title(): {line.get_label(): list(map(list, line.get_data())) for line in axis.get_lines()}
        for axis in figure.axes
    }
    pyplot.close(figure)
    assert list(drawn) == [label for _, label, _ in PANELS]
    assert drawn["reward (mean over responses)"]["reward"][0] == [1, 2, 3]
    assert drawn["reward (mean over responses)"]["reward"][1] == pytest.approx([0.1, 0.2, 0.3])
    assert drawn["accuracy"]["held-out accuracy"] == [[0], [0.1]]
    assert drawn["accuracy"]["held-out greedy"] == [[0], [0.2]]
    # A value that was not finite is null in the file: no point.
    assert "clipped_upper" not in drawn["TCR: tokens clipped"]


def test_a_missing_metrics_file_is_an_operating_system_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        draw_report(tmp_path / "metrics.jsonl", tmp_path / "report.png", "a run")
    assert not (tmp_path / "report.png").exists()
