"""Sampling settings: each is checked by name, and the keywords an editor completes are the settings there are."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest

from minicpm_edge.engines.sampling_params import LIMITS, SamplingOptions, SamplingParams
from minicpm_edge.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", bad) for bad in (0, -1, 1.5, "5", True, 10**400, float("nan"))],
        *[("temperature", bad) for bad in (-0.1, float("nan"), float("inf"), "hot", None, True, 10**400)],
        *[("top_p", bad) for bad in (0, -0.1, 1.01, float("nan"), "all", [])],
        *[("top_k", bad) for bad in (-1, 1.0, "40", False, 2**31)],
        *[("min_p", bad) for bad in (-0.1, 1.1, None)],
        *[("seed", bad) for bad in (1.0, "1", 2**64, -(2**63) - 1, True)],
        *[("stop", bad) for bad in ("", [""], [1], {"a": 1}, 5, ["x"] * 17, ["x" * 257], None)],
    ],
)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(UserError, match=rf"^{name} ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_settings_at_their_limits():
    params = SamplingParams(
        max_tokens=1, temperature=0, top_p=1, top_k=0, min_p=1, stop=["a", "b"], seed=-(2**63)
    )
    assert params.stop == ("a", "b")
    assert SamplingParams(stop="END").stop == ("END",)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(UserError, match="did you mean temperature"):
        SamplingParams.of(temprature=1)
    with pytest.raises(UserError, match="settings are max_tokens, "):
        SamplingParams.of(zzz=1)


def test_the_keywords_are_the_settings():
    options, settings = get_type_hints(SamplingOptions), get_type_hints(SamplingParams)
    assert set(options) == {field.name for field in fields(SamplingParams)} == {*LIMITS, "stop"}
    # A list or one string may be given for the strings that are kept as a tuple.
    assert {name: options[name] for name in LIMITS} == {name: settings[name] for name in LIMITS}


def test_what_is_left_out_has_its_default():
    assert SamplingParams.of() == SamplingParams() == SamplingParams.of(stop=[], seed=None, max_tokens=None)
