"""Comparisons: the same conditions for every arm, figures that can be recomputed, and nothing done twice."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import tes
from tes.comparison import Comparison
from tes.errors import ConfigError, DataError, RunError
from tes.predictions import Predictions
from tes.verbs.compare import Settings, compare


@pytest.fixture
def begin(photos, with_prior, tmp_path):
    def run(arms=("ce", "tes"), *, assignments=(), flags=None, file=None, out="comparison", **how):
        settings = Settings(file, {"data.source": str(photos), **with_prior, **(flags or {})}, assignments)
        how = {"shots": ("1", "2"), "num_seeds": 2} | how
        return compare(settings, arms, out=str(tmp_path / out), **how)

    return run


def table(comparison):
    return list(csv.DictReader((comparison.path / "table.csv").open()))


def test_every_arm_is_scored_in_every_cell_beside_what_credit_needs(begin):
    comparison = begin()
    rows = table(comparison)
    arms = ["ce", "tes", "ce+probe+prior", "ce+probe+lookup", "ce+probe+permuted"]
    cells = {(row["arm"], row["shots"], row["seed"]) for row in rows}
    assert cells == {(arm, shots, seed) for arm in arms for shots in "12" for seed in "01"}
    assert {row["start"] for row in rows if row["arm"] == "tes"} == {"probe+prior"}
    assert {row["head"] for row in rows if row["arm"] == "tes"} == {"vision", "text", "both"}
    for row in rows:
        run = tes.Run.open(comparison.path / row["run"])
        assert float(row["mean_per_class"]) == run.metrics["test"][row["head"]]["mean_per_class"]
    entry = comparison.summary["arms"]["tes"]
    added = comparison.summary["arms"]["ce+probe+lookup"]
    assert not added["typed"] and "sentence" not in added and added["effect"]["verdict"] is None
    assert "sentence" in entry and list(entry["controls"]) == ["the start `ce+probe+permuted`"]
    assert sum(entry["credit"].values()) == pytest.approx(entry["effect"]["mean"])
    assert set(entry["credit"]) == {"the text prior", "the objective"}


def test_the_difference_is_paired_by_seed_with_the_mean_over_shots_first(begin):
    comparison = begin(controls=False)
    scores = {
        (row["arm"], row["seed"], row["shots"]): float(row["mean_per_class"])
        for row in table(comparison)
        if row["head"] == "vision"
    }
    by_seed = [
        np.mean([scores["tes", seed, shots] for shots in "12"]) - np.mean([scores["ce", seed, shots] for shots in "12"])
        for seed in "01"
    ]
    effect = comparison.summary["arms"]["tes"]["effect"]
    assert effect["mean"] == pytest.approx(np.mean(by_seed)) and effect["num_seeds"] == 2


def test_an_arm_equal_to_ce_is_no_evidence(begin):
    comparison = begin(("ce", "ce+probe"), num_seeds=5)
    effect = comparison.summary["arms"]["ce+probe"]["effect"]
    assert effect["mean"] == 0 and effect["ties"] == 5 and effect["verdict"] == "no evidence"
    assert comparison.summary["sentences"][0].startswith(
        "no evidence that `ce+probe` helped: 0.0 points (95 % CI 0.0 to 0.0"
    )


def test_an_arm_that_reads_the_names_is_held_against_the_same_without_their_meaning(begin):
    arms = ("ce", "tes", "tes@random-text", "tes@permuted-text", "tes@random-text+probe")
    comparison = begin(arms, shots=("1",))
    entry = comparison.summary["arms"]["tes"]
    assert set(entry["controls"]) == {
        "`tes@random-text`", "`tes@permuted-text`", "the start `ce+probe+permuted`"
    }  # fmt: skip
    scores = {
        (row["arm"], row["seed"]): float(row["mean_per_class"]) for row in table(comparison) if row["head"] == "vision"
    }
    for name, pair in {
        "`tes@random-text`": ("tes", "tes@random-text"),
        "the start `ce+probe+permuted`": ("ce+probe+prior", "ce+probe+permuted"),
    }.items():
        expected = np.mean([scores[pair[0], seed] - scores[pair[1], seed] for seed in "01"])
        assert entry["controls"][name]["mean"] == pytest.approx(expected)
    assert set(comparison.summary["arms"]["tes@random-text"]["controls"]) == {"the start `ce+probe+permuted`"}
    assert comparison.summary["arms"]["tes@random-text+probe"]["controls"] == {}


def test_a_share_of_everything_is_everything_and_one_run_counts_as_one(begin):
    flags = {"train": "head"}
    comparison = begin(("ce", "label_smoothing"), shots=("100%",), num_seeds=3, flags=flags)
    assert comparison.plan.shots == ("all",) and len(table(comparison)) == 2
    plan = json.loads((comparison.path / "compare.json").read_text())
    (comparison.path / "compare.json").write_text(json.dumps(plan | {"shots": ["100%"]}))  # as it was once spelled
    (comparison.path / "cells" / "all-s0").rename(comparison.path / "cells" / "100pct-s0")
    again = begin(("ce", "label_smoothing"), shots=("100%",), num_seeds=1, flags=flags)
    assert again.plan.shots == ("100%",)
    # A draw that takes every image of the pool is the same from every seed: 12 images, 3 for test.
    comparison = begin(("ce", "label_smoothing"), shots=("9",), num_seeds=3, flags=flags, out="nine")
    assert len(table(comparison)) == 6
    effect = comparison.summary["arms"]["label_smoothing"]["effect"]
    assert effect["num_seeds"] == 0 and effect["p"] is None


@pytest.mark.slow
def test_seeds_that_share_all_images_are_said_to(begin):
    flags = {"train": "all", "optim.num_steps": 2, "optim.batch_size": 4}
    comparison = begin(("ce", "label_smoothing"), shots=("all",), flags=flags, controls=False)
    assert "every seed trains on the same images" in comparison.summary["sentences"][0]


def test_controls_are_left_out_on_request(begin):
    comparison = begin(("tes",), shots=("1",), num_seeds=1, controls=False)
    assert list(comparison.summary["arms"]) == ["tes", "ce"]


def test_arms_of_one_draw_solve_what_they_share_once(begin, monkeypatch):
    from tes.engine.solve import HeadProblem

    solved = []
    solve = HeadProblem.solve
    monkeypatch.setattr(HeadProblem, "solve", lambda self, *given: solved.append(self.prior) or solve(self, *given))
    begin(("ce", "label_smoothing", "text_ce"), shots=("1",), num_seeds=1)
    assert len(solved) == 2  # the probe, for all three, and the head for smoothed labels


def test_an_interrupted_comparison_continues_and_ends_with_the_same_table(begin):
    comparison = begin(controls=False)
    before = (comparison.path / "table.csv").read_bytes()
    runs = sorted(comparison.path.glob("cells/*/*/run.json"))
    summary = comparison.summary
    (comparison.path / "summary.json").unlink()
    runs[3].unlink()  # as a kill leaves a cell: begun, not finished
    times = {path: path.stat().st_mtime_ns for path in runs if path.exists()}
    with pytest.raises(RunError, match="not finished"):
        Comparison.open(comparison.path)
    again = begin(controls=False)
    assert (again.path / "table.csv").read_bytes() == before and again.summary == summary
    assert {path: path.stat().st_mtime_ns for path in times} == times and runs[3].exists()


def test_other_settings_are_refused_with_the_difference_and_more_seeds_are_welcome(begin):
    begin(("ce",), num_seeds=1)
    with pytest.raises(RunError, match=r"optim\.head_penalty: 0\.3 there, 1\.0 here"):
        begin(("ce",), num_seeds=1, assignments=["optim.head_penalty=1.0"])
    with pytest.raises(RunError, match="split: test there, val here"):
        begin(("ce",), num_seeds=1, split="val")
    comparison = begin(("ce",), num_seeds=2)
    assert comparison.summary["seeds"] == [0, 1]


def test_split_val_never_opens_the_test_split(begin):
    comparison = begin(split="val", shots=("1",))
    assert not list(comparison.path.rglob("test.npz")) and comparison.summary["split"] == "val"
    run = comparison.run("1", 0, "tes")
    rows = list(csv.DictReader(run.file("splits.csv").open()))
    allowed = {row["path"] for row in rows if row["split"] in ("val", "unused")}
    assert set(run.predictions("val").paths) == allowed
    assert {row["split"] for row in table(comparison)} == {"val"}


def test_shots_that_a_class_lacks_are_left_out_and_the_class_is_named(begin, photos, tmp_path):
    comparison = begin(("ce",), shots=("1", "50"), num_seeds=1)
    assert comparison.summary["shots"] == ["1"]
    assert any("50 shots" in note and "`blue_square` has" in note for note in comparison.summary["notes"])
    with pytest.raises(DataError, match="`blue_square` has"):
        begin(("ce",), shots=("50",), out="other")


def test_a_search_gives_every_arm_the_same_number_of_trials_and_reports_them(begin):
    comparison = begin(("ce", "tes+probe"), num_trials=3, num_seeds=1)
    rows = list(csv.DictReader((comparison.path / "trials.csv").open()))
    counts = {(row["arm"], row["shots"]): 0 for row in rows}
    for row in rows:
        counts[row["arm"], row["shots"]] += 1
    assert set(counts.values()) == {3}
    settings = {(row["arm"], row["trial"]): json.loads(row["settings"]) for row in rows}
    assert settings["ce", "0"] == {}
    shared = "optim.head_penalty"
    assert settings["ce", "1"][shared] == settings["tes+probe", "1"][shared]
    assert sum(row["selected"] == "True" for row in rows) == len(counts)


def test_the_papers_protocol_trains_on_val_too_and_is_labelled(begin):
    comparison = begin(
        ("ce+random",), protocol="paper", shots=("all",), num_seeds=1, flags={"train": "all", "optim.num_epochs": 10}
    )
    assert comparison.summary["protocol"] == "paper" and {row["protocol"] for row in table(comparison)} == {"paper"}
    run = comparison.run("all", 0, "ce+random")
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert not any(row["split"] == "val" for row in logged)  # test is called test
    looked = [row["heads"]["vision"]["mean_per_class"] for row in logged if row["split"] == "test"]
    *looked, final = looked
    assert len(looked) == 2 and run.metrics["test"]["vision"]["mean_per_class"] == max(looked) == final


def test_a_cell_is_a_run_that_predicts_and_evaluates(begin, photos):
    comparison = begin(shots=("2",), num_seeds=1)
    run = comparison.run("2", 0, "tes")
    assert not (run.path / "model.safetensors").exists()
    saved = run.predictions("test")
    rows = list(tes.Classifier.from_run(run).predict([photos / path for path in saved.paths]))
    expected = saved.probabilities("vision")
    assert [row.label for row in rows] == [run.classes[row.argmax()]["class"] for row in expected]
    assert set(tes.evaluate(run, data_source=str(photos))["heads"]) == {"vision", "text", "both"}


def test_a_shared_file_is_found_only_under_the_names_that_a_comparison_writes(begin):
    comparison = begin(("ce",), shots=("1",), num_seeds=1)
    run = comparison.run("1", 0, "ce")
    summary = json.loads((run.path / "run.json").read_text())
    summary["shared"]["backbone.safetensors"] = "../../../somewhere/else.safetensors"
    (run.path / "run.json").write_text(json.dumps(summary))
    with pytest.raises(RunError, match="which no comparison writes"):
        tes.Classifier.from_run(run.path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"arms": ()}, "--arms"),
        ({"arms": ("ce", "ce")}, "twice"),
        ({"arms": ("ce", "tess")}, "Did you mean `tes`"),
        ({"arms": ("ce+prbe",)}, "`start`"),
        ({"arms": ("ce+",)}, "no arm"),
        ({"shots": ("1", "01")}, "once"),
        ({"shots": ("0",)}, "tes train --shots 0"),
        ({"arms": ("ce+random",)}, "--train all"),
        ({"shots": ("one",)}, "`one` is neither"),
        ({"num_seeds": 0}, "--seeds"),
        ({"split": "train"}, "--split"),
        ({"protocol": "papers"}, "--protocol"),
        ({"protocol": "paper", "split": "val"}, "no --split val"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(begin, tmp_path, how, words):
    arms = how.pop("arms", ("ce",))
    with pytest.raises(ConfigError) as caught:
        begin(arms, flags={"train": "head"}, **how)
    assert words in str(caught.value) and not (tmp_path / "comparison").exists()


def test_the_command_prints_one_json_object(cli, photos, with_prior, tmp_path):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in with_prior.items()]
    code, out, err = cli(
        "compare", photos, "--arms", "ce,tes", "--shots", "1", "--seeds", "1", "--out", tmp_path / "c", "--json", *sets
    )
    assert code == 0, err
    assert json.loads(out)["arms"].keys() == {"ce", "tes", "ce+probe+prior", "ce+probe+lookup", "ce+probe+permuted"}


def test_a_setting_of_an_objective_goes_to_the_arms_that_have_it(begin):
    comparison = begin(("ce", "tes"), shots=("1",), num_seeds=1, assignments=["objective.temperature=0.2"])
    assert comparison.run("1", 0, "tes").settings["objective"]["temperature"] == 0.2
    with pytest.raises(ConfigError, match=r"objective\.smoothing=0\.2`: no arm's objective has this setting"):
        begin(("ce", "tes"), out="other", assignments=["objective.smoothing=0.2"])


@pytest.mark.parametrize(
    "assignment",
    [
        "seed=5",
        "data.shots=4",
        "data.fraction=0.5",
        "objective=ce",
        "start=probe+prior",
        "refit=all",
        "start_fallback=val",
    ],
)
def test_what_a_comparison_varies_cannot_be_set_from_outside(begin, tmp_path, assignment):
    with pytest.raises(ConfigError, match="a comparison decides it itself"):
        begin(("ce", "tes"), shots=("all",), assignments=[assignment])
    key, _, value = assignment.partition("=")
    *rooms, name = key.split(".")
    file = tmp_path / "settings.yaml"
    file.write_text(f"{rooms[0]}:\n  {name}: {value}\n" if rooms else f"{name}: {value}\n")
    if key in ("data.shots", "data.fraction", "start"):  # the others are flags of each cell, which override a file
        with pytest.raises(ConfigError, match="a comparison decides it itself"):
            begin(("ce", "tes"), shots=("all",), file=file)


@pytest.mark.parametrize("change", ["objective", "classes", "images"])
def test_a_comparison_is_not_continued_on_other_content(begin, photos, tmp_path, change):
    import shutil

    copy, classes = tmp_path / "copy", tmp_path / "classes.json"
    shutil.copytree(photos, copy)
    classes.write_text(json.dumps({name.name: {"name": f"a {name.name}"} for name in photos.iterdir()}))
    how = {
        "flags": {"data.source": str(copy), "data.classes": str(classes)},
        "shots": ("1",),
        "num_seeds": 1,
        "controls": False,
    }
    begin(("tes",), **how, assignments=["objective.temperature=0.1"])
    temperature = 0.1
    if change == "objective":
        temperature = 0.3
    elif change == "classes":
        classes.write_text(classes.read_text().replace("a red", "a big red"))
    else:
        (copy / "red_square" / "11.png").unlink()
    words = {"objective": "objective of tes.temperature: 0.1 there, 0.3 here", "classes": "classes", "images": "images"}
    with pytest.raises(RunError, match=f"begun with other settings .{words[change]}"):
        begin(("tes",), **how, assignments=[f"objective.temperature={temperature}"])


def test_a_comparison_only_grows(begin):
    begin(("ce", "tes"), shots=("1", "2"), num_seeds=1, controls=False)
    comparison = begin(("ce", "label_smoothing"), shots=("1",), num_seeds=1, controls=False)
    assert comparison.plan.arms == ("ce", "tes", "label_smoothing") and comparison.plan.shots == ("1", "2")


@pytest.mark.parametrize("damage", ["metrics", "predictions", "shared"])
def test_a_damaged_cell_is_done_again(begin, damage, capsys):
    comparison = begin(("ce",), shots=("1",), num_seeds=1)
    run = comparison.run("1", 0, "ce")
    before = (comparison.path / "table.csv").read_bytes()
    if damage == "metrics":
        (run.path / "run.json").write_text('{"format": 1}')
    elif damage == "predictions":
        (run.path / "predictions" / "test.npz").write_text("x")
    else:
        run.file("backbone.safetensors").unlink()
    again = begin(("ce",), shots=("1",), num_seeds=1)
    assert "is damaged and is done again" in capsys.readouterr().err
    assert (again.path / "table.csv").read_bytes() == before and again.run("1", 0, "ce").file("splits.csv").is_file()


def test_nothing_left_to_score_is_said_before_any_work(begin, photos, tmp_path):
    import shutil

    for folder in photos.iterdir():
        (tmp_path / "few" / folder.name).mkdir(parents=True)
        for name in ("00.png", "01.png"):
            shutil.copy(folder / name, tmp_path / "few" / folder.name)
    with pytest.raises(DataError, match=r"no image is left to score \(val\)"):
        begin(("ce",), shots=("1",), split="val", num_seeds=1, flags={"data.source": str(tmp_path / "few")})


@pytest.fixture
def walks(photos, tmp_path):
    """A CSV of the photos whose images come in groups of three, as frames of one walk do."""
    rows = [
        f"{photos.name}/{folder.name}/{image.name},{folder.name},{folder.name} {int(image.stem) // 3}"
        for folder in sorted(photos.iterdir())
        for image in sorted(folder.iterdir())
    ]
    (tmp_path / photos.name).symlink_to(photos)
    (tmp_path / "walks.csv").write_text("\n".join(["path,label,group", *rows]))
    return tmp_path / "walks.csv"


@pytest.mark.parametrize("num_trials", [1, 2])
def test_copies_of_images_that_were_used_are_not_scored_with_split_val(begin, walks, num_trials, capsys):
    flags = {"data.source": str(walks)}
    comparison = begin(("ce",), shots=("1",), split="val", num_seeds=1, num_trials=num_trials, flags=flags)
    run = comparison.run("1", 0, "ce")
    rows = list(csv.DictReader(run.file("splits.csv").open()))
    used = {"train"} if num_trials == 1 else {"train", "val"}
    groups = {row["group"] for row in rows if row["split"] in used}
    expected = {row["path"] for row in rows if row["split"] in ("val", "unused") and row["group"] not in groups}
    assert set(run.predictions("val").paths) == expected and len(expected) >= 6
    assert tes.verify(run)["holds"]
    # A cell of the days when copies were scored as well is done again.
    said = run.predictions("val")
    cut = Predictions(said.paths[1:], said.labels[1:], {"vision": said.logits["vision"][1:]})
    cut.save(run.path / "predictions" / "val.npz")
    begin(("ce",), shots=("1",), split="val", num_seeds=1, num_trials=num_trials, flags=flags)
    assert "was scored on other images, and is done again" in capsys.readouterr().err
    assert set(tes.Run.open(run.path).predictions("val").paths) == expected


def test_images_that_chose_a_trial_do_not_score_it_where_a_draw_takes_the_whole_pool(begin):
    # 12 images, 3 of them for test: 5 shots and 4 to choose with leave nothing.
    comparison = begin(("ce",), shots=("1", "5"), split="val", num_seeds=1, num_trials=2)
    assert comparison.plan.shots == ("1",)
    assert comparison.summary["notes"][-2:] == [
        "Left out: 5 shots: no image is left to score (val)",
        "Scored on images outside the test split, which was not opened.",
    ]
    assert begin(("ce",), shots=("5",), split="val", num_seeds=1, out="plain").plan.shots == ("5",)


def test_a_comparison_is_not_continued_with_images_fitted_otherwise(begin):
    comparison = begin(("ce",), shots=("1",), num_seeds=1)
    plan = json.loads((comparison.path / "compare.json").read_text())
    assert plan["settings"]["decided"].pop("fit") == "crop"
    (comparison.path / "compare.json").write_text(json.dumps(plan))  # as before there was a choice
    begin(("ce",), shots=("1",), num_seeds=1)
    plan["settings"]["decided"]["fit"] = "squash"
    (comparison.path / "compare.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match=r"decided\.fit: squash there, crop here"):
        begin(("ce",), shots=("1",), num_seeds=1)


def test_a_comparison_is_not_continued_at_another_default_learning_rate(begin):
    import yaml

    flags = {"train": "all", "optim.num_steps": 1}
    comparison = begin(("ce",), shots=("1",), num_seeds=1, controls=False, flags=flags)
    file = comparison.run("1", 0, "ce").path / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["optim"]["learning_rate"] /= 3
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(RunError, match=r"at `1` shots .* the default of that day, which is 0\.001 now"):
        begin(("ce",), shots=("1",), num_seeds=2, controls=False, flags=flags)


def test_results_among_the_images_are_refused(begin, photos):
    with pytest.raises(RunError, match="taken for a class"):
        begin(("ce",), out=photos / "comparison")
    assert not (photos / "comparison").exists()


def test_the_papers_protocol_takes_as_many_epochs_as_asked_over_train_and_val(begin):
    flags = {"train": "all", "optim.num_epochs": 5, "optim.batch_size": 4}
    comparison = begin(("ce+random",), protocol="paper", shots=("2",), num_seeds=1, flags=flags)
    run = comparison.run("2", 0, "ce+random")
    assert run.summary["num_train"] == 12 and run.settings["optim"]["num_steps"] == 5 * 12 / 4


def test_an_interruption_says_how_to_go_on_and_the_same_command_does(cli, photos, with_prior, tmp_path, monkeypatch):
    from tes.verbs import compare as room

    begun, run_job = [], room.run_job

    def interrupted(*given, **how):
        begun.append(given)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return run_job(*given, **how)

    monkeypatch.setattr(room, "run_job", interrupted)
    sets = [f"--set={key}={json.dumps(value)}" for key, value in with_prior.items()]
    command = ["compare", photos, "--arms", "tes", "--shots", "1", "--seeds", "1", "--out", tmp_path / "c", *sets]
    code, _, err = cli(*command)
    assert code == 75 and "the same command goes on from here" in err
    code, out, err = cli(*command)
    assert code == 0 and "2 of 5 cells are done already" in err and "comparison:" in out
    assert len(begun) == 3 + 3


def test_a_comparison_from_before_a_setting_existed_continues_with_its_default(begin):
    how = {"arms": ("ce",), "shots": ("1",), "num_seeds": 1, "controls": False}
    path = begin(**how).path / "compare.json"
    plan = json.loads(path.read_text())
    del plan["settings"]["augment"]["mixup"], plan["settings"]["optim"]["ema"], plan["settings"]["memory_format"]
    plan["settings"]["optim"]["warmup"] = 0.0  # as it was before it was open
    path.write_text(json.dumps(plan))
    begin(**how, flags={"checkpoint.every_minutes": 1})  # which changes no result
    path.write_text(json.dumps(plan))
    with pytest.raises(RunError, match=r"other settings \(.*memory_format: auto there, contiguous here\)"):
        begin(**how, flags={"memory_format": "contiguous"})


@pytest.mark.slow
def test_the_classical_objectives_are_arms_with_any_start(begin):
    names = ("bss", "co_tuning", "bi_tuning")
    arms = [f"{name}+{start}" for name in names for start in ("probe", "random", "prior", "probe+prior")]
    flags = {"train": "all", "optim.num_steps": 2, "optim.batch_size": 6}
    comparison = begin(arms, flags=flags, shots=("2",), num_seeds=1, num_trials=2, controls=False)
    rows = table(comparison)
    assert {row["arm"] for row in rows} == {"ce", *arms}
    assert {row["start"] for row in rows if row["arm"] == "co_tuning+random"} == {"random"}
    assert all({"optim.learning_rate"} <= trial["settings"].keys() for trial in _searched(comparison))


def _searched(comparison):
    runs = [tes.Run.open(comparison.path / row["run"]) for row in table(comparison)]
    return [trial for run in runs for trial in run.summary["trials"][1:]]
