"""loss.png: the trunk and its decays, raw and smoothed, with validation points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicpm_edge.atomic import atomic_file
from minicpm_training.run import Branch, Run

RAW_ALPHA = 0.25
SMOOTH_SHARE = 0.02  # the moving average spans this share of the points


def plot_run(run: Run, target: Path | None = None) -> Path:
    """Draw a run's loss over tokens into ``target`` (default: loss.png of the run) and return the path."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    target = target or run.folder / "loss.png"
    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    loss_axes, validation_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    names: dict[str, str] = {}
    for branch, label in _branches(run):
        lines = [*_branch_point(run, branch), *branch.metrics()]
        colour = _plot_loss(loss_axes, lines, label)
        _plot_validation(validation_axes, lines, label, colour, names)
    loss_axes.set(title=run.name, xlabel="tokens", ylabel="loss (nats per token)")
    validation_axes.set(title="validation", xlabel="tokens", ylabel="bits per byte")
    for axes in (loss_axes, validation_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        if axes.has_data():
            axes.legend(fontsize=8)
    _crop_start(loss_axes)
    with atomic_file(target) as temporary:
        figure.savefig(temporary, format="png")
    return target


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with the bias of its start removed; ``span`` as in pandas' ``ewm``."""
    alpha = 2.0 / (span + 1)
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average = (1 - alpha) * average + alpha * value
        weight = (1 - alpha) * weight + alpha
        result.append(average / weight)
    return result


def _branches(run: Run) -> list[tuple[Branch, str]]:
    return [(run.trunk, "trunk"), *((branch, f"decay {branch.folder.name}") for branch in run.decays())]


def _branch_point(run: Run, branch: Branch) -> list[dict[str, Any]]:
    """The trunk's validation where a decay left it, so that the decay's line starts there."""
    lines = branch.metrics()
    if branch == run.trunk or not lines:
        return []
    before = [line for line in run.trunk.metrics() if "valid" in line and line["step"] < lines[0]["step"]]
    return before[-1:] if before and before[-1]["step"] == lines[0]["step"] - 1 else []


def _plot_loss(axes: Any, lines: Sequence[dict[str, Any]], label: str) -> str:
    points = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    if not points:
        return "gray"
    tokens, losses = zip(*points, strict=True)
    smoothed = smooth(losses, max(1, round(len(losses) * SMOOTH_SHARE)))
    colour: str = axes.plot(tokens, smoothed, linewidth=1.6, label=label)[0].get_color()
    axes.plot(tokens, losses, linewidth=0.6, alpha=RAW_ALPHA, color=colour)
    return colour


def _plot_validation(
    axes: Any, lines: Sequence[dict[str, Any]], label: str, colour: str, markers: dict[str, str]
) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, bits in line.get("valid", {}).items():
            series.setdefault(name, []).append((line["tokens"], bits))
    for name, points in series.items():
        marker = markers.setdefault(name, "os^Dvp*X"[len(markers) % 8])
        axes.plot(
            *zip(*points, strict=True), marker=marker, markersize=4, color=colour, label=f"{name}, {label}"
        )


def _crop_start(axes: Any) -> None:
    """Leave out the first fall from ln(vocabulary), which would press the rest of the curve flat."""
    values = [value for line in axes.get_lines() for value in line.get_ydata()[len(line.get_ydata()) // 50 :]]
    if len(values) > 100:
        low, high = min(values), max(sorted(values)[: -max(1, len(values) // 100)])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
