"""The short way to a kernel that was launched before: the same kernel for the same choice, or else Triton's own way."""

import pytest

from kv_transfer import triton_launch


class Compiled:
    packed_metadata = ()

    def __init__(self, name: str, fails: bool) -> None:
        self.name, self.fails, self.launched = name, fails, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int, int, int]):
        def launch(*args) -> None:
            if self.fails:
                raise TypeError("another number of arguments")
            self.launched.append((grid, args))

        return launch


class Kernel:
    """What Triton would compile for each call."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int]):
        def launch(*numbers, num_warps: int, **constants) -> Compiled:
            self.compiled.append(Compiled(f"{numbers} {constants} {num_warps}", self.fails))
            return self.compiled[-1]

        return launch


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compiled", {})


def test_the_same_choice_is_launched_directly():
    kernel = Kernel()
    triton_launch.run(kernel, 4, (1, 2), {"SIZE": 16}, 8)
    triton_launch.run(kernel, 9, (5, -7), {"SIZE": 16}, 8)
    assert len(kernel.compiled) == 1 and kernel.compiled[0].launched == [((9, 1, 1), (5, -7, 16))]


@pytest.mark.parametrize(
    ("numbers", "constants", "num_warps"),
    [((1, 1 << 31), {"SIZE": 16}, 8), ((1, 2), {"SIZE": 64}, 8), ((1, 2), {"SIZE": 16}, 4)],
)
def test_another_choice_is_tritons(numbers, constants, num_warps):
    kernel = Kernel()
    triton_launch.run(kernel, 4, (1, 2), {"SIZE": 16}, 8)
    triton_launch.run(kernel, 4, numbers, constants, num_warps)
    assert len(kernel.compiled) == 2 and not kernel.compiled[0].launched


def test_a_compiled_kernel_that_takes_something_else_is_left_to_triton():
    kernel = Kernel(fails=True)
    for _ in range(3):
        triton_launch.run(kernel, 4, (1, 2), {"SIZE": 16}, 8)
    assert len(kernel.compiled) == 3
