"""The launcher: one compiled kernel for each thing that Triton would compile anew for."""

import importlib

import pytest
import torch
from triton import knobs

from packlight import _launch, _torch
from packlight._launch import new, new_like, new_rows, quick, together
from packlight._torch import backends


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    """There is none without a GPU."""
    monkeypatch.setattr(_launch, "_stream", lambda: lambda device: 7)


class Kernel:
    """What the launcher sees of a `@triton.jit` function and of the kernels that it compiles."""

    __name__, __doc__ = "kernel", "A kernel."
    arg_names = ("x_ptr", "n", "SCALE", "FORM")

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **constants):
            self.launches.append(("compiled", grid, arguments, constants))
            return Compiled(self)

        return compile_and_run


class Compiled:
    function, packed_metadata = 1, 2

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launches.append(("hooked", grid, arguments, {}))

    def run(self, x, y, z, stream, function, metadata, described, enter, leave, *arguments):
        assert (stream, function, metadata) == (7, 1, 2)
        assert (described, enter, leave) == (None, None, None)
        self.kernel.launches.append(("direct", (x, y, z), arguments, {}))


def kinds(kernel):
    return [kind for kind, *_ in kernel.launches]


def test_a_second_call_goes_to_the_compiled_kernel_with_constants_in_order():
    kernel = Kernel()
    launch = quick(kernel)
    x = torch.zeros(32)
    for _ in range(2):
        launch[(5,)](x, 32, FORM=2, SCALE=0.5, num_warps=4)
    assert kinds(kernel) == ["compiled", "direct"]
    assert kernel.launches[1] == ("direct", (5, 1, 1), (x.data_ptr(), 32, 0.5, 2), {})


def test_a_profiler_that_listens_to_launches_hears_of_each(monkeypatch):
    kernel = Kernel()
    launch = quick(kernel)
    x = torch.zeros(32)
    launch[(5,)](x, 32, SCALE=0.5, FORM=2)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    launch[(5,)](x, 32, SCALE=0.5, FORM=2)
    assert kinds(kernel) == ["compiled", "hooked"]
    assert kernel.launches[1] == ("hooked", (5, 1, 1), (x.data_ptr(), 32, 0.5, 2), {})


@pytest.mark.parametrize(
    ("arguments", "constants"),
    [
        ((torch.zeros(32, dtype=torch.float16), 32), {}),
        ((torch.zeros(33)[1:], 32), {}),
        ((torch.zeros(32), 33), {}),
        ((torch.zeros(32), 1), {}),
        ((torch.zeros(32), 2**31), {}),
        ((torch.zeros(32), 32.0), {}),
        ((torch.zeros(32), 32), {"SCALE": 0.25}),
        ((torch.zeros(32), 32), {"SCALE": (0.5, 0.25)}),
        ((torch.zeros(32), 32), {"FORM": None}),
        ((torch.zeros(32), 32), {"FORM": len}),
        ((torch.zeros(32), 32), {"num_warps": 8}),
    ],
)
def test_what_triton_compiles_anew_for_is_compiled_anew(arguments, constants):
    kernel = Kernel()
    launch = quick(kernel)
    usual = {"SCALE": 0.5, "FORM": 2, "num_warps": 4}
    launch[(1,)](torch.zeros(32), 32, **usual)
    launch[(1,)](*arguments, **usual | constants)
    launch[(1,)](torch.zeros(32), 48, **usual)  # another multiple of 16
    assert kinds(kernel) == ["compiled", "compiled", "direct"]


@pytest.mark.parametrize("scratch", [0, 16])
def test_a_launcher_of_triton_is_gone_past_where_it_has_nothing_else_to_do(monkeypatch, scratch):
    monkeypatch.setattr(backends, "triton_version", lambda: "3.6.0")
    direct = []

    class Launcher:
        global_scratch_size, profile_scratch_size = 0, scratch
        launch_cooperative_grid, launch_pdl = False, True

        def launch(self, *arguments):
            direct.append(arguments)

        def __call__(self, *arguments):
            direct.append(("itself", *arguments[3:]))

    kernel = Kernel()
    monkeypatch.setattr(Compiled, "run", Launcher())
    launch = quick(kernel)
    x = torch.zeros(32)
    for _ in range(2):
        launch[(5,)](x, 32, FORM=2, SCALE=0.5)
    rest = (2, None, None, None, x.data_ptr(), 32, 0.5, 2)
    own = (5, 1, 1, 7, 1, False, True, None, None, *rest)
    assert direct == [("itself", 7, 1, *rest) if scratch else own]


def test_constants_are_told_apart_by_value_even_where_objects_are_made_anew():
    kernel = Kernel()
    launch = quick(kernel)
    for number in range(200):
        launch[(1,)](torch.zeros(32), 32, SCALE=float(f"0.{number % 2}"), FORM=(number % 2, 1))
    assert kinds(kernel).count("compiled") == 2


def test_the_interpreter_keeps_nothing():
    class Interpreted(Kernel):
        def __getitem__(self, grid):
            return lambda *arguments, **constants: self.launches.append(("compiled", grid, (), {}))

    kernel = Interpreted()
    launch = quick(kernel)
    for _ in range(2):
        launch[(1,)](torch.zeros(32), 32, SCALE=0.5, FORM=2)
    assert kinds(kernel) == ["compiled", "compiled"]
    assert not launch.compiled


# --- Prepared launches.


def test_a_prepared_launch_takes_tensors_alone():
    kernel = Kernel()
    launch = quick(kernel).prepare((5,), 32, FORM=2, SCALE=0.5, num_warps=4)
    x = torch.zeros(32)
    launch(x)
    launch(x)
    assert kernel.launches == [
        ("compiled", (5, 1, 1), (x, 32), {"FORM": 2, "SCALE": 0.5, "num_warps": 4}),
        ("direct", (5, 1, 1), (x.data_ptr(), 32, 0.5, 2), {}),
    ]


@pytest.mark.parametrize("x", [torch.zeros(32, dtype=torch.float16), torch.zeros(33)[1:]])
def test_a_prepared_launch_compiles_anew_for_other_tensors(x):
    kernel = Kernel()
    launch = quick(kernel).prepare((1,), 32, SCALE=0.5, FORM=2)
    for tensor in (torch.zeros(32), x, torch.zeros(64), x):
        launch(tensor)
    assert kinds(kernel) == ["compiled", "compiled", "direct", "direct"]


def test_a_prepared_launch_tells_seeds_of_32_bits_from_those_of_64():
    launch = quick(Kernel()).prepare((5,), 32, FORM=2, SCALE=0.5, num_warps=4)
    x = torch.zeros(32)
    for seed in (7, 2**31 - 1, -(2**31)):
        launch(x, seeds=(seed,))
        assert len(launch.found) == 1
    for seed in (2**31, -(2**31) - 1, 2**62):
        launch(x, seeds=(seed,))
        assert len(launch.found) == 2


def test_a_seed_in_memory_is_an_address_behind_those_of_the_tensors():
    kernel = Kernel()
    launch = quick(kernel).prepare((5,), SCALE=0.5, FORM=2)
    x, seeds = torch.zeros(32), torch.zeros(8, dtype=torch.int64)
    for seed in (seeds, seeds[2:], seeds[1:], 7):  # the third is not aligned
        launch(x, seeds=(seed,))
    assert kinds(kernel) == ["compiled", "direct", "compiled", "compiled"]
    assert kernel.launches[1][2] == (x.data_ptr(), seeds[2:].data_ptr(), 0.5, 2)


def test_a_seed_of_several_is_the_address_of_its_place():
    kernel = Kernel()
    launch = quick(kernel).prepare((5,), SCALE=0.5, FORM=2)
    x, seeds = torch.zeros(32), torch.zeros(8, dtype=torch.int64)
    for place in (4, 6, 1):  # the third is not aligned
        launch(x, seeds=((seeds, place),))
    assert kinds(kernel) == ["compiled", "direct", "compiled"]
    assert kernel.launches[0][2][1].data_ptr() == seeds[4:].data_ptr()
    assert kernel.launches[1][2] == (x.data_ptr(), seeds[6:].data_ptr(), 0.5, 2)


# --- What kernels write to.


@pytest.mark.parametrize("known", [True, False], ids=["quick", "by the dispatcher"])
def test_what_kernels_write_to_is_what_torch_would_make(known, monkeypatch):
    if not known:
        monkeypatch.setattr(_torch.EMPTY, "values", None, raising=False)
    x = torch.zeros(4, 6, 5, dtype=torch.bfloat16)
    others = x.to(torch.float32), x.transpose(0, 1), x[:, ::2], x[:1].transpose(0, 1), x[:0]
    pairs = [(new_like(y), torch.empty_like(y)) for y in (x, *others)]
    pairs += [(new_like(y, torch.uint8), torch.empty_like(y, dtype=torch.uint8)) for y in others]
    pairs += [(new(x, n, torch.int32), x.new_empty(n, dtype=torch.int32)) for n in (0, 7)]
    pairs += [(new_rows(x, n, 3, x.dtype), x.new_empty(n, 3)) for n in (0, 1, 7)]
    for made, plain in pairs:
        assert (made.shape, made.stride(), made.dtype) == (
            plain.shape, plain.stride(), plain.dtype,
        )  # fmt: skip


def test_launches_together_take_the_tensors_of_all_and_run_in_their_order():
    first, second = Kernel(), Kernel()
    launch = together(
        (quick(first).prepare((5,), 32, SCALE=0.5, FORM=2), (0, 2)),
        (quick(second).prepare((7,), 48, SCALE=0.25, FORM=1), (2, 1)),
    )
    first.arg_names = second.arg_names = ("a_ptr", "b_ptr", "n", "SCALE", "FORM")
    order = first.launches = second.launches = []
    tensors = [torch.zeros(32) for _ in range(3)]
    a, b, c = (x.data_ptr() for x in tensors)
    for _ in range(2):
        launch(*tensors)
    assert [kind for kind, *_ in order] == ["compiled", "compiled", "direct", "direct"]
    assert order[2:] == [
        ("direct", (5, 1, 1), (a, c, 32, 0.5, 2), {}),
        ("direct", (7, 1, 1), (c, b, 48, 0.25, 1), {}),
    ]


def test_launches_together_are_told_apart_by_the_tensors_of_all(monkeypatch):
    kernel = Kernel()
    launch = together(
        (quick(kernel).prepare((1,), SCALE=0.5, FORM=2), (0, 1)),
        (quick(kernel).prepare((1,), SCALE=0.5, FORM=3), (0, 2)),
    )
    x, half = torch.zeros(32), torch.zeros(32, dtype=torch.float16)
    launch(x, x, x)
    launch(x, x, half)  # the first of the two is there
    assert kinds(kernel) == ["compiled", "compiled", "direct", "compiled"]
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    launch(x, x, x)
    assert kinds(kernel)[4:] == ["hooked", "hooked"]


def test_launches_of_other_shapes_share_what_is_compiled():
    kernel = Kernel()
    form = quick(kernel)
    for n in (32, 48, 33):
        form.prepare((n,), n, SCALE=0.5, FORM=2)(torch.zeros(64))
    assert kinds(kernel) == ["compiled", "direct", "compiled"]
    assert kernel.launches[1][1] == (48, 1, 1)


def test_a_profiler_hears_of_prepared_launches(monkeypatch):
    kernel = Kernel()
    launch = quick(kernel).prepare((5,), 32, SCALE=0.5, FORM=2)
    launch(torch.zeros(32))
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda metadata: None)
    launch(torch.zeros(32))
    assert kinds(kernel) == ["compiled", "hooked"]


@pytest.mark.parametrize(
    "module",
    [
        "fewbit.dropout_kernels",
        "fewbit.kernels",
        "fewbit.pooling_kernels",
        "groupquant.fixed_point.kernels",
        "groupquant.fixed_point.residual_kernels",
        "groupquant.gated_kernels",
        "groupquant.kernels",
        "groupquant.norm_kernels",
        "inverted.kernels",
        "inverted.norm_kernels",
        "low_rank.kernels",
        "packing.kernels",
        "sketch.kernels",
    ],
)
def test_what_launchers_keep_is_bounded(module):
    module = importlib.import_module(f"packlight.{module}")
    cached = [f for f in vars(module).values() if hasattr(f, "cache_parameters")]
    own = [f for f in cached if f.__module__ == module.__name__]
    assert own
    assert all(f.cache_parameters()["maxsize"] for f in own)
