from __future__ import annotations

import fcntl
import json
import math
import os
import re
import struct
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.record.loggers import Logger

from matwm_rl import files
from matwm_rl.evaluation import progress
from matwm_rl.evaluation.run_log import RunLog, read_metrics


def quiet(run_dir: Path, **kwargs: object) -> RunLog:
    return RunLog(run_dir, **{"total_steps": 100, "progress": False, "logger": None, **kwargs})


def tensorboard_scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


class Recorder(Logger):
    """A TorchRL logger that remembers what it is given."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int | None]] = []
        super().__init__(exp_name="recorder", log_dir="")

    def _create_experiment(self) -> object:
        return object()

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        self.scalars.append((name, value, step))

    def log_video(self, name: str, video: Tensor, step: int | None = None, **kwargs: object) -> None: ...

    def log_hparams(self, cfg: object) -> None: ...

    def log_histogram(self, name: str, data: object, **kwargs: object) -> None: ...

    def __repr__(self) -> str:
        return "Recorder()"


def test_accumulated_metrics_are_averaged_since_the_last_write(tmp_path: Path) -> None:
    log = quiet(tmp_path)
    log.accumulate(TensorDict({"loss": torch.tensor(1.0), "scale": torch.tensor([1.0, 3.0])}))
    log.accumulate(TensorDict({"loss": torch.tensor(4.0)}))
    log.accumulate({"loss": 4.0})
    log.write(10)
    log.accumulate({"loss": torch.tensor(7.0)})
    log.write(20)
    log.write(30)
    assert read_metrics(tmp_path) == {"loss": [(10, 3.0), (20, 7.0)], "scale": [(10, 2.0)]}


def test_accumulating_changes_no_tensor_of_the_caller_and_keeps_no_graph(tmp_path: Path) -> None:
    log = quiet(tmp_path)
    weight = torch.tensor(2.0, requires_grad=True)
    loss = weight * 1.0
    log.accumulate({"loss": loss})
    log.accumulate({"loss": loss})
    assert loss.item() == 2.0
    assert not any(total.requires_grad for total in log._sums.values())


def test_metrics_csv_is_one_tidy_table(tmp_path: Path) -> None:
    log = quiet(tmp_path)
    log.log({"evaluation/prey": torch.tensor(0.1), "loss": 1e-12}, env_steps=5)
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "env_steps,name,value\n5,evaluation/prey,0.1\n5,loss,1e-12\n"


def test_not_finite_values_survive_the_table(tmp_path: Path) -> None:
    quiet(tmp_path).log({"a": float("nan"), "b": float("inf")}, 1)
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert math.isnan(metrics["a"][0][1]) and metrics["b"] == [(1, math.inf)]


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\u2028b", ""])
def test_names_that_would_break_the_table_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    log = quiet(tmp_path)
    with pytest.raises(ValueError, match="must be one line"):
        log.log({"good": 1.0, name: 1.0}, 1)
    assert read_metrics(tmp_path) == {}


@pytest.mark.parametrize("name", ["a,b", 'a"b', '"a"', "a.b", "a/b", "a b", "ä", ',"'])
def test_names_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    quiet(tmp_path).log({name: 1.0, "other": 2.0}, 1)
    resumed = RunLog(tmp_path, total_steps=10, resume_from=1, progress=False, logger=None)
    resumed.log({name: 3.0}, 2)
    assert read_metrics(tmp_path) == {name: [(1, 1.0), (2, 3.0)], "other": [(1, 2.0)]}


def test_resuming_repeats_no_row(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=100, progress=False) as log:
        for step in (10, 20, 30):
            log.log({"loss": float(step)}, step)
    with RunLog(tmp_path, total_steps=100, progress=False, resume_from=20) as log:
        log.log({"loss": -30.0}, 30)
        log.log({"loss": -40.0}, 40)
    expected = [(10, 10.0), (20, 20.0), (30, -30.0), (40, -40.0)]
    assert read_metrics(tmp_path) == {"loss": expected}
    assert tensorboard_scalars(tmp_path, "loss") == expected


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    log = quiet(tmp_path)
    log.log({"loss": 1.0}, 1)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "2,loss,1.2")
    assert read_metrics(tmp_path) == {"loss": [(1, 1.0)]}
    quiet(tmp_path, resume_from=2).log({"loss": 3.0}, 3)
    assert read_metrics(tmp_path) == {"loss": [(1, 1.0), (3, 3.0)]}


def test_a_new_run_does_not_write_into_an_old_one(tmp_path: Path) -> None:
    quiet(tmp_path).log({"loss": 1.0}, 1)
    with pytest.raises(FileExistsError, match="choose another run_dir"):
        quiet(tmp_path)
    assert read_metrics(tmp_path) == {"loss": [(1, 1.0)]}


def test_reading_what_is_no_table_of_metrics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="env_steps,name,value"):
        read_metrics(tmp_path)


def test_every_logger_gets_every_scalar(tmp_path: Path) -> None:
    recorder = Recorder()
    log = quiet(tmp_path, loggers=[recorder])
    log.accumulate({"loss": 2.0})
    log.write(10)
    log.log({"evaluation/prey": 3.0}, 10)
    log.close()
    assert recorder.scalars == [("loss", 2.0, 10), ("evaluation/prey", 3.0, 10)]


def play_a_run(tmp_path: Path) -> None:
    """A log that tells all that there is to be told."""
    shown = {"shown": ("kl",), "time_left": lambda: "0:00:07 left"}
    with RunLog(tmp_path, total_steps=6000, progress=True, logger=None, resume_from=2000, **shown) as log:
        log.log({"kl": 1.25, "hidden": 3.0}, 3000)
        log.advance(3000, "model and critics")
        with log.task("evaluation after 5,000 steps", "episode") as tell:
            tell(0, 20, "match 1, 0 steps")
            tell(5, 20, "match 1, 25 steps")
        log.note("half-way")


def test_on_a_terminal_a_bar_shows_phase_steps_time_left_and_the_chosen_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "has_screen", lambda: True)
    play_a_run(tmp_path)
    out, err = capsys.readouterr()
    shown = re.sub(r"\|.*?\|", "|", err)
    assert re.search(r"model and critics:  83%\| 5000/6000 steps \[00:00, 0:00:07 left, kl=1.25\]", shown)
    assert re.search(r"evaluation after 5,000 steps:   0%\| 0/20 episodes \[00:00, match 1, 0 steps\]", shown)
    assert "hidden" not in shown and out == "half-way\n"


def test_a_terminal_of_no_size_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours, "wb"), os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        assert not progress.has_screen()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        assert progress.has_screen()
    assert not progress.has_screen()


def test_in_a_file_lines_show_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    play_a_run(tmp_path)
    assert capsys.readouterr() == (
        "5,000 of 6,000 steps (83%), model and critics, 0:00:00 elapsed, 0:00:07 left: kl 1.25\n"
        "evaluation after 5,000 steps: 0 of 20 episodes, match 1, 0 steps, 0:00:00 elapsed\n"
        "evaluation after 5,000 steps: 5 of 20 episodes, match 1, 25 steps, 0:00:00 elapsed\n"
        "half-way\n",
        "",
    )


def test_in_a_file_a_line_comes_every_half_minute_and_notes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with RunLog(tmp_path, total_steps=100, progress=True, logger=None) as log:
        for _ in range(10):
            log.advance(10)
            clock[0] += 10.0
        log.note("done")
    elapsed = re.findall(r"0:0\d:\d\d elapsed|done", capsys.readouterr().out)
    assert elapsed == ["0:00:30 elapsed", "0:01:00 elapsed", "0:01:30 elapsed", "done"]


def test_without_progress_only_notes_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = quiet(tmp_path)
    log.advance(50, "training")
    with log.task("evaluation", "episode") as tell:
        tell(1, 2, "")
    log.note("half-way")
    assert capsys.readouterr() == ("half-way\n", "")


def test_summary_is_plain_json_and_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = quiet(tmp_path)
    log.write_summary({"returns": {"prey": torch.tensor(1.5)}, "list": [torch.ones(2), float("nan")], "env": "mock"})
    path = tmp_path / "summary.json"
    whole = {"returns": {"prey": 1.5}, "list": [[1.0, 1.0], None], "env": "mock"}
    assert json.loads(path.read_text()) == whole
    with pytest.raises(TypeError):
        log.write_summary({"a": object()})

    def crash(file: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_sync", crash)
    with pytest.raises(KeyboardInterrupt):
        log.write_summary({"a": 1})
    assert json.loads(path.read_text()) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "summary.json"]


def test_whoever_reads_while_it_is_replaced_sees_a_whole_file(tmp_path: Path) -> None:
    path, reader = tmp_path / "a.txt", tmp_path / "reader"
    files.write_text(path, "old")
    # A second name stands for a reader who has opened the file: writing into it would change what is read.
    reader.hardlink_to(path)
    files.write_text(path, "new")
    assert (reader.read_text(), path.read_text()) == ("old", "new")


@pytest.mark.parametrize(
    ("package", "option"), [("tqdm", {"progress": True}), ("tensorboard", {"logger": "tensorboard"})]
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, option: dict[str, Any]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=rf"'{package}'.*matwm_rl\[train\]"):
        quiet(tmp_path / "run", **option)
    assert not (tmp_path / "run").exists()
