"""The GPU's kernels, compiled for an H100 or H200 (sm_90) without one, with the very arguments that a pass launches them with."""

import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets here", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nni_darts_rnn.genotype import DARTS_V2  # noqa: E402
from nni_darts_rnn.gpu import kernels, plan  # noqa: E402
from nni_darts_rnn.graph import discrete_graph, mixed_graph  # noqa: E402

MIXED, NODE, DISCRETE = mixed_graph(8), mixed_graph(8, normalise=False), discrete_graph(DARTS_V2)
STEPS = ("step_forward", "step_backward", "step_backward_p")
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64"}


class Launches:
    """In the place of a kernel: what it is launched with."""

    def __init__(self):
        self.found = []

    def __getitem__(self, grid):
        return lambda *args, **named: self.found.append((grid, args, named))


def compiled(kernel, args: tuple, named: dict):
    """As `kernel[grid](*args, **named)` compiles it: a number is 1, a multiple of 16 or any, unless it is not to be told from others."""
    num_warps = named.pop("num_warps")
    signature, constants, attributes = {}, dict(named), {}
    for i, parameter in enumerate(kernel.params):
        value = args[i] if i < len(args) else None
        if isinstance(value, torch.Tensor):
            signature[parameter.name], special = TYPES[value.dtype], True  # torch's memory begins at multiples of more than that
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], special = "constexpr", False
            constants.setdefault(parameter.name, value)
        else:
            signature[parameter.name] = "i32" if -2**31 <= value < 2**31 else "i64"
            special = value % 16 == 0 and not parameter.do_not_specialize
        if special:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def usage(ptx: str, folder) -> tuple[int, int]:
    """Registers of a thread, and the bytes that do not fit into them."""
    (folder / "kernel.ptx").write_text(ptx)
    done = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", folder / "kernel.cubin", folder / "kernel.ptx"], capture_output=True, text=True, check=True)
    return int(re.search(r"Used (\d+) registers", done.stderr)[1]), int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])


@pytest.mark.parametrize("graph, B, H, masked, dtype, steps", [
    (MIXED, 256, 300, True, torch.float32, STEPS),  # the paper's search
    (MIXED, 10, 300, False, torch.float32, STEPS[:1]),  # its validation text
    (MIXED, 32, 64, True, torch.float64, STEPS[2:]),
    (NODE, 256, 300, True, torch.float32, STEPS[2:]),
    (DISCRETE, 64, 850, True, torch.float32, STEPS[:2]),  # the paper's retraining
    (DISCRETE, 1, 850, False, torch.float32, STEPS[:1]),  # its test text
])
def test_kernels_fit_an_sm_90(graph, B, H, masked, dtype, steps, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    key = plan.Key(graph, B, H, masked, graph.mixed, dtype, torch.device("meta"), "ieee", 0)  # no memory, and no product is computed
    made = plan.Plan(key, 35)
    for step in steps:
        name = "level_forward" if step == STEPS[0] else "level_backward"
        launches = Launches()
        monkeypatch.setattr(plan, name, launches)
        getattr(made, step)(34)
        assert len(launches.found) == len(made.levels)
        for grid, _, _ in launches.found:
            assert len(grid) == 3 and grid[0] < 2**31 and max(grid[1:]) < 2**16
        _, args, named = launches.found[0]
        kernel = compiled(getattr(kernels, name), args, named)
        registers, spilled = usage(kernel.asm["ptx"], tmp_path)
        print(name, B, H, dtype, "warps", kernel.metadata.num_warps, "registers", registers, "spilled", spilled, "shared", kernel.metadata.shared)
        assert kernel.metadata.shared <= 227 * 1024
        assert registers * 32 * kernel.metadata.num_warps <= 65536 and spilled <= 64
        if dtype == torch.float32 and not graph.normalise and step != STEPS[2]:
            assert ".f64" not in kernel.asm["ptx"]
