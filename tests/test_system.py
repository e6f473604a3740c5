"""Effects of a run on its process."""

import json
import subprocess
import sys

import pytest

from dpa4.system import choose_device

STEPS = """
import json, resource, sys, torch
from dpa4.system import keep_freed_memory
if sys.argv[1] == "keeps":
    keep_freed_memory(torch.device("cpu"))

def faults():
    tensors = [torch.ones(2_000_000) for _ in range(8)]  # 8 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

print(json.dumps([faults() for _ in range(6)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="for the allocator of glibc")
def test_pages_of_freed_tensors_are_used_again():
    faults = {}
    for name in ("gives back", "keeps"):
        done = subprocess.run([sys.executable, "-c", STEPS, name], capture_output=True, text=True, check=True)
        counts = json.loads(done.stdout)
        faults[name] = counts[-1] - counts[1]
    pages = 4 * 8 * 8_000_000 / 4096
    if faults["gives back"] < 0.2 * pages:
        pytest.skip("this system hands out memory in large pages, or the allocator keeps it anyway")
    assert faults["keeps"] < 0.1 * pages  # the heap grows now and then


@pytest.mark.parametrize("name", ["gpu", "mps", "meta"])
def test_devices_other_than_cpu_and_cuda_are_refused(name):
    with pytest.raises(ValueError, match=f"device must be auto, cpu or cuda, got '{name}'"):
        choose_device(name)
