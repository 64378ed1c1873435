"""Exporting holds one tensor at a time: the peak stays under 1.3 times the largest, plus the quantiser's buffer."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_edge.formats.checkpoint import save_checkpoint
from minicpm_edge.model.transformer import MiniCPM

# In a process of its own, so that nothing else is in its memory. Everything is imported and run once on a small model
# before the peak is reset; then each step's own peak is read.
MEASURE = """
import json, resource, sys
from pathlib import Path
from minicpm_export.gguf import quantize
from minicpm_export.gguf.writer import write_gguf

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak(action):
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return status("VmHWM:") - before

small, large, out = map(Path, sys.argv[1:])
quantize.MAX_BUFFER_BYTES = 16 << 20
def write(folder, quant):
    write_gguf(folder, out / f"{quant}.gguf", quant=quant, name="m", report=lambda status: None)
def shrink():  # in a process of its own: the largest peak of any child so far
    quantize.quantize(out / "F32.gguf", out / "Q8_0.gguf", "Q8_0")
def children():
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
write(small, "F32"), write(small, "BF16"), shrink()
least = children()
print(json.dumps({
    "F32": peak(lambda: write(large, "F32")),
    "BF16": peak(lambda: write(large, "BF16")),
    "Q8_0": shrink() or children() - least,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_peak_memory(make_model, small_config, tokenizer_folder, tmp_path):
    # Several large tensors: holding two of them at once would already break the limit.
    config = dataclasses.replace(
        small_config, vocab_size=30_000, hidden_size=512, intermediate_size=25_000, num_hidden_layers=1
    )
    model = MiniCPM(config)
    model.init_weights(seed=1)
    save_checkpoint(tmp_path / "large", model, tokenizer=tokenizer_folder)
    largest = 30_000 * 512 * 4
    del model
    command = [sys.executable, "-c", MEASURE, str(make_model()), str(tmp_path / "large"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peaks = json.loads(run.stdout)
    print({name: round(value / largest, 2) for name, value in peaks.items()})
    assert peaks["F32"] < 1.3 * largest
    assert peaks["BF16"] < 1.3 * largest
    assert peaks["Q8_0"] < 1.3 * largest + (16 << 20)
