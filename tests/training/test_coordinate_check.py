"""The width rules do what they are for: activations keep their size from 64 to 512 wide."""

import pytest
from minicpm_training.studies.coordinate_check import WIDTHS, measure, plot, spread


@pytest.mark.slow
def test_activations_stay_flat_with_width_and_would_not_without_the_rules(tmp_path):
    scaled = {width: measure(width, num_steps=6) for width in WIDTHS}
    for name, ratio in spread(scaled).items():
        assert ratio < 0.20, f"{name} changes by {ratio:.0%} between widths"
    plain = {width: measure(width, num_steps=6, scaled=False) for width in (WIDTHS[0], WIDTHS[-1])}
    assert max(spread(plain).values()) > 0.5
    plot({"MiniCPM's rules": scaled, "one rate": plain}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
