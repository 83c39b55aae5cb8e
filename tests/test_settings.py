"""One class of settings gives flags, TOML, --set, signature, JSON and refusals."""

import dataclasses
import inspect
import json
import pathlib
import re
import subprocess
import sys
from typing import ClassVar, Literal

import click
import numpy as np
import pytest
from click.testing import CliRunner

from ping_llm import settings
from ping_llm.cli.options import settings_command
from ping_llm.errors import ConfigError
from ping_llm.settings import Settings, field


class ScalingSettings(Settings):
    """How positions are stretched.

    Attributes:
        factor: How many times longer.
        steps: Ramp.
    """

    factor: float = field(gt=0)
    steps: int = 1


class ModelSettings(Settings):
    """Shape of a model.

    Attributes:
        n_layers: Blocks.
        d_model: Width.
        dtype: Of activations.
        scaling: Of positions.
    """

    n_layers: int = field(default=4, gt=0)
    d_model: int = field(default=8, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    scaling: ScalingSettings | None = None


class SampleSettings(Settings):
    """Turn rock into sand.

    Run it again to continue.

    Attributes:
        inputs: Rocks.
        output: Where the sand goes.
        preset: Model and rate.
        steps: How many.
        batch_size: Rows at once.
        learning_rate: Peak rate.
        valid_fraction: Held out.
        spike_factor: Skips a step.
        workers: Threads.
        weights: Of the fields.
        half: Which half.
        groups: What decays.
        both_ends: Count twice.
        shuffle: Mix.
        model: Shape.
    """

    presets: ClassVar = {
        "small": {},
        "big": {"learning_rate": 0.5, "model": {"n_layers": 20}},
    }

    inputs: tuple[str, ...] = field(argument=True, metavar="INPUT...", location=True)
    output: str = field(location=True, stored=False, metavar="DIR")
    preset: Literal["small", "big"] = "small"
    steps: int = field(default=10, gt=0, changeable=True)
    batch_size: int = field(default=8, gt=0)
    learning_rate: float = field(default=0.1, gt=0)
    valid_fraction: float = field(default=0.05, ge=0, lt=1)
    spike_factor: float | None = field(default=20.0, gt=1)
    workers: int | None = field(default=None, gt=0, stored=False, default_text="one per CPU")
    weights: tuple[float, ...] = field(default=(1.0, 1.0), ge=0, flag=False)
    half: Literal["low", "high"] | None = None
    groups: tuple[Literal["kernel", "norm"], ...] = ("kernel",)
    both_ends: bool = False
    shuffle: bool = True
    model: ModelSettings = ModelSettings()

    def check(self) -> None:
        if self.batch_size > 100 * self.steps:
            raise ConfigError(f"batch_size={self.batch_size} is too much for steps={self.steps}")


@dataclasses.dataclass
class SandResult:
    grains: int


@settings.takes(SampleSettings)
def grind(chosen: SampleSettings) -> SampleSettings:
    """Returns what it was given."""
    return chosen


@settings_command("grind", SampleSettings)
def command(chosen):
    text = json.dumps(settings.to_json(chosen)) + f" {chosen.output}"
    return SandResult(chosen.steps), text, 3 if chosen.both_ends else 0


def run(*args):
    return CliRunner().invoke(command, ["a.csv", "b,c.csv", "--output", "out", *args])


def load(**given):
    return settings.load(SampleSettings, flags={"inputs": ["a"], "output": "out"}, **given)


def test_later_sources_win(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        'preset = "big"\nsteps = 7\nbatch_size = 4\nshuffle = false\n'
        "[model]\nd_model = 3\n[model.scaling]\nfactor = 4\n"
    )
    result = run("--config", str(toml), "--set", "batch_size=5", "--set", "steps=2", "--steps", "3")
    assert result.exit_code == 0, result.output
    stored = json.loads(result.output.rpartition(" ")[0])
    assert (stored["steps"], stored["batch_size"], stored["learning_rate"]) == (3, 5, 0.5)
    assert stored["shuffle"] is False
    assert stored["inputs"] == ["a.csv", "b,c.csv"]
    assert stored["model"] == {
        "n_layers": 20,
        "d_model": 3,
        "dtype": "float32",
        "scaling": {"factor": 4.0, "steps": 1},
    }


def test_the_result_is_one_json_object_and_may_set_the_exit_code():
    assert json.loads(run("--json", "--steps", "2").stdout) == {"grains": 2}
    assert run("--both-ends").exit_code == 3


def test_help_says_what_the_class_says():
    text = CliRunner().invoke(command, ["--help"]).output
    assert text.startswith("Usage: grind [OPTIONS] INPUT...\n\n  Turn rock into sand.\n\n  Run it")
    text = re.sub(r"\s+", " ", text)
    for line in (
        "--output DIR Where the sand goes. [required]",
        "--preset [small|big] Model and rate. [default: small]",
        "--steps INTEGER How many. [default: 10]",
        "--workers INTEGER Threads. [default: one per CPU]",
        "--groups [kernel|norm,...] What decays. [default: kernel]",
        "--both-ends Count twice. --shuffle / --no-shuffle Mix. [default: true]",
    ):
        assert line in text
    assert "--weights" not in text
    assert "--model" not in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "tall"], "'tall' is not one of 'small', 'big'"),
        (["--groups", "kernel,nrm"], "'nrm' is not one of kernel, norm; did you mean norm?"),
        (["--steps", "many"], "steps='many' is not a whole number"),
        (["--steps", "0"], "steps=0 must be above 0"),
        (["--valid-fraction", "1.5"], "valid_fraction=1.5 must be at least 0 and below 1"),
    ],
)
def test_a_bad_flag_is_wrong_usage(args, message):
    result = run(*args)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_missing_flag_or_argument_is_wrong_usage():
    assert CliRunner().invoke(command, ["--output", "out"]).exit_code == 2
    assert CliRunner().invoke(command, ["a.csv"]).exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=3", "--set lr=3: 'lr' is not a setting of sample; did you mean learning_rate?"),
        ("rate=3", "did you mean learning_rate?"),
        ("learning_rte=3", "did you mean learning_rate?"),
        ("n_layer=3", r"did you mean model.n_layers\?$"),
        ("dtype=3", r"did you mean model.dtype\?$"),
        ("model.n_layer=3", r"'model.n_layer' is not a setting of table \[model\]; did you .*n_l"),
        ("zzz=3", "'zzz' is not a setting of sample$"),
        ("steps", "--set 'steps': expected key=value"),
        ("=3", "expected key=value"),
        ("steps=", "steps='' is not a whole number"),
        ("steps=1.5", "steps='1.5' is not a whole number"),
        ("steps=none", "steps='none' is not a whole number"),
        ("steps.n=3", "steps={'n': '3'} is not a whole number"),
        ("learning_rate=nan", "learning_rate='nan' is not a finite number"),
        ("weights=1,-1", "weights=-1.0 must be at least 0"),
        ("weights.a=1", "weights={'a': '1'} is not a list"),
        ("spike_factor=1", "spike_factor=1.0 must be above 1, or none"),
        ("shuffle=maybe", "shuffle='maybe' is not true or false"),
        ("preset=smal", "preset='smal' is not one of small, big; did you mean small?"),
        ("model=tiny", "model is a table: set its fields, model.<field>"),
        ("model.scaling=4", "model.scaling is a table"),
        ("model.scaling.steps=4", "the table model.scaling needs factor"),
        ("model.dtype=int4", "--set model.dtype=int4: model.dtype='int4' is not one of float32"),
        ("batch_size=1001", "batch_size=1001 is too much for steps=10"),
    ],
)
def test_a_bad_override_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        load(overrides=[override])


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        (" learning_rate = .5 ", "learning_rate", 0.5),
        ("learning_rate=1e-3", "learning_rate", 1e-3),
        ("spike_factor=none", "spike_factor", None),
        ("weights=2,0.5,3", "weights", (2.0, 0.5, 3.0)),
        ("groups=norm, kernel", "groups", ("norm", "kernel")),
        ("groups=", "groups", ()),
        ("shuffle=false", "shuffle", False),
    ],
)
def test_a_setting_takes_the_text_of_its_value(override, name, value):
    assert getattr(load(overrides=[override]), name) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps = ", "is not valid TOML"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"steps = true", "steps=True is not a whole number"),
        (b"steps = 3.0", "steps=3.0 is not a whole number"),
        (b"learning_rate = inf", "learning_rate=inf is not a finite number"),
        (b"output = 3", "output=3 is not text"),
        (b"[modle]\nn_layers = 3", "did you mean model"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    toml = tmp_path / "run.toml"
    toml.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load(config_file=toml)
    assert str(error.value).startswith(f"{toml}: ")


def test_a_missing_file_or_setting_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        load(config_file=tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="sample needs output"):
        settings.load(SampleSettings, flags={"inputs": ["a"]})


def test_a_function_takes_the_fields_or_the_settings():
    chosen = grind(["a", "b"], pathlib.Path("out"), steps=np.int64(3), preset="big")
    assert (chosen.inputs, chosen.output, chosen.steps) == (("a", "b"), "out", 3)
    assert type(chosen.steps) is int
    assert chosen.model.n_layers == 20
    assert grind(chosen) is chosen
    assert grind("a,b", "out", overrides=["model.n_layers=2"]).inputs == ("a,b",)
    assert grind("a", "out", spike_factor=None).spike_factor is None
    with pytest.raises(TypeError, match="split"):
        grind("a", "out", split=3)
    with pytest.raises(ConfigError, match=r"^steps='many' is not a whole number"):
        grind("a", "out", steps="many")


def test_help_of_the_function_shows_its_arguments():
    parameters = inspect.signature(grind).parameters
    assert list(parameters)[:3] == ["inputs", "output", "preset"]
    assert list(parameters)[-3:] == ["model", "config_file", "overrides"]
    assert (parameters["steps"].default, parameters["steps"].annotation) == (10, int)
    assert str(grind.__doc__).startswith(
        "Returns what it was given.\n\nArgs:\n    inputs: Rocks.\n"
    )


def test_python_is_checked_like_the_command_line():
    with pytest.raises(ConfigError, match="preset='tall' is not one of small, big"):
        SampleSettings(inputs=("a",), output="out", preset="tall")  # pyright: ignore


def test_settings_survive_json_without_those_that_do_not_decide_the_result():
    chosen = load(overrides=["model.scaling.factor=2", "model.dtype=bfloat16", "workers=3"])
    stored = json.loads(json.dumps(settings.to_json(chosen)))
    assert "workers" not in stored
    assert settings.from_json(SampleSettings, stored, output="out", workers=3) == chosen
    with pytest.raises(ConfigError, match="'colour' is not a setting of sample"):
        settings.from_json(SampleSettings, {**stored, "colour": 1}, output="out")


def test_every_changed_setting_is_named_and_only_those_that_may_not_change():
    stored = json.loads(json.dumps(settings.to_json(load())))
    same = load(overrides=["steps=20", "workers=9"])
    settings.refuse_changes(stored, same, "out")
    changed = load(overrides=["steps=20", "batch_size=9", "model.n_layers=2"])
    assert settings.differences(stored, changed) == [
        ("batch_size", 8, 9),
        ("model.n_layers", 4, 2),
    ]
    with pytest.raises(ConfigError) as error:
        settings.refuse_changes(stored, changed, "out")
    assert str(error.value) == (
        "out was begun with other settings: batch_size=9, was 8, model.n_layers=2, was 4; "
        "give these their old values, or choose another output"
    )


def test_an_older_output_had_the_defaults_of_newer_settings():
    stored = settings.to_json(load())
    del stored["batch_size"]
    assert settings.differences(stored, load()) == []
    assert settings.differences(stored, load(overrides=["batch_size=9"])) == [("batch_size", 8, 9)]
    assert settings.differences({**stored, "gone": 1}, load()) == [("gone", 1, None)]


def test_facts_that_are_no_settings_are_compared_too():
    assert settings.differences({"data": {"rows": 1}}, {"data": {"rows": 2}}) == [
        ("data.rows", 1, 2)
    ]


def test_describe_is_what_the_reference_page_says():
    described = {each.name: each for each in settings.describe(SampleSettings)}
    fraction, workers = described["valid_fraction"], described["workers"]
    assert (fraction.type_text, fraction.shown_default) == ("float", "0.05")
    assert (fraction.help, fraction.bounds_text) == ("Held out.", "at least 0 and below 1")
    assert (workers.optional, workers.shown_default) == (True, "one per CPU")
    assert described["steps"].changeable
    assert described["inputs"].type_text == "path,..."
    assert described["inputs"].required
    assert described["groups"].choices == ("kernel", "norm")
    assert (described["half"].choices, described["half"].optional) == (("low", "high"), True)
    assert described["model"].is_table


def test_settings_and_the_options_of_a_command_import_nothing_heavy():
    code = (
        "import sys, ping_llm.settings, ping_llm.cli.options\n"
        "print({'jax', 'numpy', 'pyarrow', 'flax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_options_of_a_command_are_click_choices():
    preset = next(each for each in command.params if each.name == "preset")
    assert isinstance(preset.type, click.Choice)


@pytest.mark.parametrize("text", ["steps = " + "9" * 5000, "steps = " + "[" * 3000])
def test_odd_toml_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        settings.load(SampleSettings, config_file=tmp_path / "s.toml")
