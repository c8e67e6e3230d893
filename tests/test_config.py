"""Settings: where a value comes from, and what a mistake looks like."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tes.catalogue import available
from tes.config import load_config
from tes.errors import ConfigError


def test_set_overrides_a_flag_which_overrides_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {source: photos, shots: 1}\noptim: {batch_size: 16, learning_rate: 1e-3}\nseed: 7\n")
    config = load_config(file, {"data.shots": 2, "optim.batch_size": 32}, ["optim.batch_size=64"])
    assert (config.data.source, config.data.shots, config.optim.batch_size) == ("photos", 2, 64)
    assert (config.optim.learning_rate, config.seed) == (1e-3, 7)


def test_the_saved_copy_reads_back_equal(tmp_path):
    config = load_config(flags={"data.source": "x", "objective": "tes@paper"}, assignments=['text.templates=["a {}"]'])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config


def test_all_mistakes_are_reported_at_once_with_their_keys():
    with pytest.raises(ConfigError) as caught:
        load_config(
            flags={"objective": "label_smoothing"},
            assignments=["optim.batch_sise=8", "optim.momentum=2", "objective.smoothing=3", "seed=x", "data.shot=1"],
        )
    message = str(caught.value)
    for part in (
        "`optim.batch_sise`: unknown key. Did you mean `batch_size`?",
        "`optim.momentum`",
        "`objective.smoothing`",
        "`seed`",
        "`data.shot`: unknown key. Did you mean `shots`?",
        "`data.source`: say which images",
    ):
        assert part in message


def test_a_preset_gives_values_that_explicit_ones_override():
    config = load_config(
        flags={"data.source": "x", "objective": "tes@paper"}, assignments=["objective.temperature=0.05"]
    )
    assert config.objective.text_target_weight == 0.2
    assert config.objective.text_loss_weight == 0.4
    assert config.objective.temperature == 0.05
    assert config.text.centre is False and config.text.templates == ("a photo of a {}",)
    assert config.arm == "tes@paper"


def test_an_objectives_default_for_another_setting_gives_way_to_an_explicit_value(tmp_path):
    flags = {"data.source": "x", "objective": "l2_sp"}
    file = tmp_path / "c.yaml"
    file.write_text("optim: {weight_decay: 0.1}")
    assert load_config(flags=flags).optim.weight_decay == 0
    assert load_config(flags={"data.source": "x", "objective": "ce"}).optim.weight_decay > 0
    assert load_config(file, flags).optim.weight_decay == 0.1
    assert load_config(flags=flags, assignments=["optim.weight_decay=0.2"]).optim.weight_decay == 0.2
    with pytest.raises(ConfigError, match="`optim`"):
        load_config(flags=flags | {"optim": 3})


def test_an_explicit_start_is_part_of_the_arms_name():
    assert load_config(flags={"data.source": "x", "objective": "ce", "start": "random"}).arm == "ce+random"


@pytest.mark.parametrize(
    ("flags", "assignments", "words"),
    [
        ({"objective": "tess"}, [], "Did you mean `tes`"),
        ({"objective": "tes@papr"}, [], "Did you mean `paper`"),
        ({"objective": "ce@paper"}, [], "It has none"),
        ({}, ["optim.batch_size"], "has no `=`"),
        ({}, ["optim=3"], "`optim`"),
        ({}, ["seed.x=3"], "`seed`"),
        ({"data.shots": 2, "data.fraction": 0.5}, [], "give one of them"),
        ({"data.shots": "five"}, [], "`data.shots`"),
        ({"data.shots": -1}, [], "`data.shots`"),
        ({"optim.num_epochs": 2}, ["optim.num_steps=3"], "give one of them"),
        ({}, ["optim.accumulate=3"], "does not divide"),
        ({}, ["backbone.kwargs.checkpoint_path=/x"], "`backbone.checkpoint`"),
        ({}, ["image.mean=[0.5, 0.5]"], "`image.mean"),
        ({}, ["image.std=[0, 1, 1]"], "`image.std"),
        ({}, ["optim.learning_rate=.nan"], "`optim.learning_rate`"),
        ({}, ["text.templates=[["], "not valid YAML"),
        ({}, ["augment.mixup=-1"], "`augment.mixup`"),
        ({}, ["augment.cutmix=1e-9"], "mixes next to nothing; 0 switches it off"),
        ({}, ["optim.layer_decay=0"], "`optim.layer_decay`"),
        ({}, ["optim.layer_decay=1.5"], "`optim.layer_decay`"),
        ({}, ["optim.ema=1"], "`optim.ema`"),
    ],
)
def test_a_mistake_is_one_clear_sentence(flags, assignments, words):
    with pytest.raises(ConfigError) as caught:
        load_config(flags={"data.source": "x"} | flags, assignments=assignments)
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_a_missing_or_damaged_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="There is no config file"):
        load_config(tmp_path / "absent.yaml")
    damaged = tmp_path / "damaged.yaml"
    damaged.write_text("a: [1")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(damaged)
    damaged.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="keys and values"):
        load_config(damaged)


def test_a_config_file_cannot_make_python_objects(tmp_path):
    file = tmp_path / "evil.yaml"
    proof = tmp_path / "proof"
    file.write_text(f"seed: !!python/object/apply:os.system ['touch {proof}']\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file)
    assert not proof.exists()


@pytest.mark.parametrize("text", ["seed=2020-13-45", "seed=0b_", "seed=" + "[" * 5000, "objective.preset=[1]"])
def test_yaml_that_cannot_be_is_one_sentence(text):
    with pytest.raises(ConfigError):
        load_config(flags={"data.source": "x"}, assignments=[text])


KEYS = sorted(line.split(" = ")[0] for line in available("settings") if "[" not in line.split(" = ")[0])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_value_of_any_setting_is_taken_or_refused_with_its_key_and_what_is_taken_reads_back(values):
    try:
        config = load_config(flags={"data.source": "x", "objective": "tes"} | values)
    except ConfigError as problem:
        assert "`" in str(problem)
        return
    assert config.replace({}) == config
    assert type(config).model_validate(yaml.safe_load(config.to_yaml()) | {"objective": config.objective}) == config


@given(st.sampled_from(KEYS), st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_after_set_is_a_value_or_one_sentence(key, text):
    with contextlib.suppress(ConfigError):
        load_config(flags={"data.source": "x"}, assignments=[f"{key}={text}"])


def test_one_class_may_be_written_alone_and_labels_that_are_numbers_as_numbers():
    flags = {"data.source": "photos"}
    assert load_config(flags=flags, assignments=["data.only_classes=cat"]).data.only_classes == ("cat",)
    assert load_config(flags=flags, assignments=["data.only_classes=[1, b]"]).data.only_classes == ("1", "b")
    with pytest.raises(ConfigError, match="only_classes"):  # YAML has made another word of it
        load_config(flags=flags, assignments=["data.only_classes=[yes, b]"])
