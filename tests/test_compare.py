from __future__ import annotations

import json

import pytest

from lirpa_fastwarmup import cli
from lirpa_fastwarmup.experiments.report.page import comparison, setting_text
from lirpa_fastwarmup.experiments.report.records import read_summary
from lirpa_fastwarmup.inspection.statistics import as_markdown, as_text


def run(folder, seed, errors, **settings):
    folder.mkdir()
    standard, pgd, verified = errors
    summary = {
        "dataset": "MNIST",
        "seed": seed,
        "standard_error": standard,
        "pgd_error": pgd,
        "verified_error": verified,
        "settings": {
            "seed": seed,
            "data_dir": str(folder),
            "dataset": "mnist",
            "method": "fast",
            "eps": 0.4,
            "lr": 5e-4,
            **settings,
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def table(folders):
    return comparison([(folder.name, read_summary(folder)) for folder in folders])


@pytest.fixture
def folders(tmp_path):
    return [
        run(tmp_path / "a", 1, (0.02, 0.04, 0.1)),
        run(tmp_path / "b", 0, (0.04, 0.06, 0.2)),
        run(tmp_path / "c", 0, (0.05, None, 0.3), method="gowal", kappa=0.5),
    ]


def test_runs_that_differ_in_their_seed_share_a_row(folders):
    # Standard deviations of the sample: |0.02 − 0.04|/√2 = 1.41 %, |0.1 − 0.2|/√2 = 7.07 %.
    assert table(folders) == [
        ("dataset", "method", "ε", "kappa", "seeds", "standard %", "PGD %", "verified %", "runs"),
        ("MNIST", "fast", "0.4", "–", "0, 1", "3.00 ± 1.41", "5.00 ± 1.41", "15.00 ± 7.07", "a, b"),
        ("MNIST", "gowal", "0.4", "0.5", "0", "5.00", "–", "30.00", "c"),
    ]


def test_dataset_method_and_eps_have_columns_always(folders):
    assert table(folders[:1])[0] == ("dataset", "method", "ε", "seeds", "standard %", "PGD %", "verified %", "runs")


def test_a_limit_on_the_data_makes_another_row(tmp_path):
    pair = [run(tmp_path / "a", 0, (0, 0, 0)), run(tmp_path / "b", 0, (0, 0, 0), data_limit=100)]
    assert [row[3] for row in table(pair)] == ["data_limit", "–", "100"]


def test_as_text_and_as_markdown():
    rows = [("a", "b %"), ("long", "1|2")]
    assert as_text(rows) == "a     b %\nlong  1|2"
    assert as_markdown(rows) == "| a | b % |\n| --- | --- |\n| long | 1\\|2 |"


@pytest.mark.parametrize(
    ("value", "text"),
    [(8 / 255, "8/255"), (1 / 255, "1/255"), (0.4, "0.4"), (0.1, "0.1"), (1.0, "1"), (0.0, "0"), (1 / 7, "0.1429")],
)
def test_fractions_of_255_are_printed_as_fractions(value, text):
    assert setting_text(value) == text
    assert setting_text([1, 2]) == "1 2"
    assert setting_text(None) == "–"


def test_the_command_prints_the_table(folders, capsys):
    assert cli.main(["compare", *map(str, folders)]) == 0
    assert capsys.readouterr().out.startswith("dataset  method  ε    kappa  seeds  standard %")
    assert cli.main(["compare", "--markdown", *map(str, folders)]) == 0
    assert capsys.readouterr().out.startswith("| dataset | method | ε | kappa |")


def test_folders_without_a_finished_run(tmp_path, folders, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no finished run \(no summary\.json\)"):
        table([*folders, tmp_path / "empty"])
    for text, message in (("{", "cannot be read"), ("{}", "lacks standard_error"), ("3", "holds no object")):
        (tmp_path / "empty" / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            table([tmp_path / "empty"])
    assert cli.main(["compare", str(tmp_path / "nowhere")]) == 1
    assert "holds no finished run" in capsys.readouterr().err
